//! What a confused model recalls from a memory: its best fact, or its best episode.
//!
//! Letters: M facts, P episodes, E embedding width, R width of the retriever.

use super::{Mamba3Jepa, Observation};
use crate::error::Error;
use crate::memory::{Episodes, KnowledgeMemory, MemoryKind};
use crate::nearest::nearest;
use crate::recursion::{KnowledgeRetriever, Recursion};

/// Something recalled from a memory; see [`Answerer::recalled`](super::Answerer::recalled).
#[derive(Clone, Debug, PartialEq)]
pub struct Recalled<'t> {
    /// Whether it is a fact or an episode.
    pub kind: MemoryKind,
    /// As the memory lists it.
    pub text: String,
    /// What is injected, (E,).
    pub embedding: &'t [f32],
    /// How far it is above its floor.
    margin: f32,
}

/// Looks things up in one memory, which every call is given.
pub(super) struct Recall {
    /// What the retriever makes of the M facts, (M, R); nothing without retriever.
    keys: Vec<f32>,
    has_retriever: bool,
    recalls_episodes: bool,
}

impl Recall {
    pub(super) fn new(recursion: &Recursion, memory: &KnowledgeMemory) -> Result<Recall, Error> {
        let mut keys = Vec::new();
        if let Some(KnowledgeRetriever { text, .. }) = &recursion.retriever {
            for place in 0..memory.texts().len() {
                keys.extend(text.apply(memory.embedding(place))?);
            }
        }
        let recalls_episodes = recursion.episodes.as_ref().is_some_and(crate::episodes::EpisodeFinder::recalls);
        Ok(Recall { keys, has_retriever: recursion.retriever.is_some(), recalls_episodes })
    }

    /// Whether anything there may be found: facts by a retriever need a question.
    pub(super) fn can_look_up(&self, memory: &KnowledgeMemory, question: Option<&str>) -> bool {
        let finds_facts = !memory.texts().is_empty() && (!self.has_retriever || question.is_some());
        finds_facts || (self.recalls_episodes && memory.episodes().is_some())
    }

    /// What is recalled in each of some turns: of a fact and an episode that reach their floors the one further above it,
    /// the fact if neither is.
    pub(super) fn look_up<'t>(
        &self,
        model: &Mamba3Jepa,
        recursion: &Recursion,
        memory: &'t KnowledgeMemory,
        turns: &[(Option<&str>, &Observation)],
    ) -> Result<Vec<Option<Recalled<'t>>>, Error> {
        if turns.is_empty() {
            return Ok(Vec::new());
        }
        let prompt = model.config().query_prompt.as_str();
        let asked: Vec<&str> = turns.iter().map(|(question, _)| question.unwrap_or(prompt)).collect();
        let asked = model.read_texts(&asked, &mut |_, _| {})?;
        let mut recalled = Vec::with_capacity(turns.len());
        for ((question, observation), asked) in turns.iter().zip(&asked) {
            let fact = self.fact(recursion, memory, observation, question.map(|_| asked.as_slice()))?;
            let episode = match memory.episodes() {
                Some(episodes) if self.recalls_episodes => episode(recursion, episodes, observation, asked)?,
                _ => None,
            };
            recalled.push(match (fact, episode) {
                (Some(fact), Some(episode)) if episode.margin > fact.margin => Some(episode),
                (fact, episode) => fact.or(episode),
            });
        }
        Ok(recalled)
    }

    /// The nearest fact, if it reaches its floor; `question`: its embedding, if there is one.
    fn fact<'t>(
        &self,
        recursion: &Recursion,
        memory: &'t KnowledgeMemory,
        observation: &Observation,
        question: Option<&[f32]>,
    ) -> Result<Option<Recalled<'t>>, Error> {
        let best = match (&recursion.retriever, question) {
            (None, _) => memory.places(&observation.embedding, 1)?.first().copied(),
            (Some(retriever), Some(question)) => {
                nearest(&retriever.question.apply(question)?, &self.keys, 1).first().copied()
            }
            (Some(_), None) => None,
        };
        Ok(best.filter(|&(_, cosine)| cosine >= recursion.memory_floor).map(|(place, cosine)| Recalled {
            kind: MemoryKind::Fact,
            text: memory.texts()[place].clone(),
            embedding: memory.embedding(place),
            margin: cosine - recursion.memory_floor,
        }))
    }
}

/// The nearest episode, if it reaches its floor; `asked`: embedding of the question.
fn episode<'t>(
    recursion: &Recursion,
    episodes: &'t Episodes,
    observation: &Observation,
    asked: &[f32],
) -> Result<Option<Recalled<'t>>, Error> {
    let Some(finder) = &recursion.episodes else { return Ok(None) };
    let scores = finder.scores(finder.seen(observation), asked, &episodes.seen, &episodes.questions)?;
    let best = crate::generate::argmax(&scores);
    let score = scores.get(best).copied().filter(|&score| score >= finder.floor);
    Ok(score.map(|score| Recalled {
        kind: MemoryKind::Episode,
        text: episodes.entries[best].text(),
        embedding: episodes.answer(best),
        margin: score - finder.floor,
    }))
}
