//! Episodes: pictures and questions seen before, with the answers that were right.
//!
//! Letters: P episodes, S length of the key, E embedding width.

use serde::{Deserialize, Serialize};

use crate::error::Error;
use crate::vljepa::{Mamba3Jepa, Observation};

/// A key that differs by at most this share of its length is the same: what two machines make of one picture and
/// question differs less.
const SAME: f32 = 1e-4;

/// A picture and a question seen before, with the right answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Episode {
    /// What was asked; `None`: the model's prompt.
    #[serde(deserialize_with = "Option::deserialize")]
    pub question: Option<String>,
    /// The right answer.
    pub answer: String,
    /// The image file's name; `None`: there was no image.
    #[serde(deserialize_with = "Option::deserialize")]
    pub image: Option<String>,
}

impl Episode {
    /// As it is listed: "question answer".
    pub fn text(&self) -> String {
        match &self.question {
            Some(question) => format!("{question} {}", self.answer),
            None => self.answer.clone(),
        }
    }
}

/// P episodes by what they are found and answered with.
#[derive(Clone, Debug, PartialEq)]
pub struct Episodes {
    /// What they are.
    pub(crate) entries: Vec<Episode>,
    /// Keys (P, S): what the pictures look like, or the pooled states.
    pub(crate) seen: Vec<f32>,
    /// Embeddings of the questions (P, E).
    pub(crate) questions: Vec<f32>,
    /// Embeddings of the answers (P, E).
    pub(crate) answers: Vec<f32>,
    /// Digest of what made the keys.
    pub(crate) observer: String,
}

impl Episodes {
    /// Episodes of what `model` observed, one for each observation, which nothing was injected into.
    ///
    /// # Errors
    /// [`Error::Absent`]: the model recalls no episodes; [`Error::Input`]: there are not as many observations, or none, or
    /// a question or an answer is empty; [`Error::NotFinite`]: the weights are damaged.
    pub fn of(model: &Mamba3Jepa, observations: &[Observation], entries: Vec<Episode>) -> Result<Episodes, Error> {
        let finder = model.demand_episodes()?;
        if observations.len() != entries.len() {
            return Err(Error::Input(format!("{} observations, but {} episodes", observations.len(), entries.len())));
        }
        let prompt = model.config().query_prompt.as_str();
        let asked: Vec<&str> = entries.iter().map(|entry| entry.question.as_deref().unwrap_or(prompt)).collect();
        let answers: Vec<&str> = entries.iter().map(|entry| entry.answer.as_str()).collect();
        Ok(Episodes {
            seen: observations.iter().flat_map(|observation| finder.seen(observation)).copied().collect(),
            questions: model.embed_text(&asked)?.concat(),
            answers: model.embed_text(&answers)?.concat(),
            observer: model.observer_digest(),
            entries,
        })
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// What they are.
    pub fn entries(&self) -> &[Episode] {
        &self.entries
    }

    /// Digest of the predictor, and all else, that made their keys.
    pub fn observer(&self) -> &str {
        &self.observer
    }

    /// Widths of a key and of an embedding.
    pub(crate) fn widths(&self) -> (usize, usize) {
        let rows = self.entries.len().max(1);
        (self.seen.len() / rows, self.answers.len() / rows)
    }

    /// The embedding of an answer.
    pub(crate) fn answer(&self, row: usize) -> &[f32] {
        let (_, width) = self.widths();
        &self.answers[row * width..][..width]
    }

    /// Some of them, in this order; `None` where that is none.
    pub(crate) fn only(&self, rows: &[usize]) -> Option<Episodes> {
        let (key, width) = self.widths();
        let some = |numbers: &[f32], width: usize| {
            rows.iter().flat_map(|row| &numbers[row * width..][..width]).copied().collect()
        };
        (!rows.is_empty()).then(|| Episodes {
            entries: rows.iter().map(|&row| self.entries[row].clone()).collect(),
            seen: some(&self.seen, key),
            questions: some(&self.questions, width),
            answers: some(&self.answers, width),
            observer: self.observer.clone(),
        })
    }

    /// Puts `others` of the same observer behind these; returns how many were added, and how many have a new answer. One
    /// with the key and the question of another takes its place, so that nothing is remembered twice.
    pub(crate) fn join(&mut self, others: &Episodes) -> (usize, usize) {
        let (key, width) = others.widths();
        let (mut added, mut changed) = (0, 0);
        for (row, entry) in others.entries.iter().enumerate() {
            let seen = &others.seen[row * key..][..key];
            let is_same = |at: &usize| {
                self.entries[*at].question == entry.question && is_near(&self.seen[at * key..][..key], seen)
            };
            match (0..self.entries.len()).find(is_same) {
                None => {
                    self.entries.push(entry.clone());
                    self.seen.extend(seen);
                    self.questions.extend(&others.questions[row * width..][..width]);
                    self.answers.extend(others.answer(row));
                    added += 1;
                }
                Some(at) if self.entries[at].answer != entry.answer => {
                    self.entries[at] = entry.clone();
                    self.answers[at * width..][..width].copy_from_slice(others.answer(row));
                    changed += 1;
                }
                Some(_) => {}
            }
        }
        (added, changed)
    }
}

fn is_near(a: &[f32], b: &[f32]) -> bool {
    let length = |x: &mut dyn Iterator<Item = f32>| x.map(|x| x * x).sum::<f32>().sqrt();
    length(&mut a.iter().zip(b).map(|(a, b)| a - b)) <= SAME * length(&mut a.iter().copied())
}
