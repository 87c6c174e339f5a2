//! Answers to questions about images, with what the model thinks of them.
//!
//! Letters: B questions, G known answers, D width of the pooled state, E embedding width, K knowledge width.

mod turn;

use std::borrow::Cow;

pub use turn::Turn;

use super::averages::Averages;
use super::recall::Recall;
use super::{Confusion, Mamba3Jepa, Observation, Progress, Sample};
use crate::episodes::EpisodeFinder;
use crate::error::Error;
use crate::files::path_text;
use crate::generate::GenerationConfig;
use crate::memory::{KnowledgeMemory, MemoryKind};
use crate::nearest::{cosines, nearest, shares};
use crate::recursion::{Recursion, Signal};
use crate::texts::{distinct, is_letter, strip};

/// Cosines of known answers are divided by it, where there is no Y-Decoder; what training starts with.
const TEMPERATURE: f32 = 0.07;

/// What the model says to one question, and about it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Answer {
    /// The generated answer; of a model without Y-Decoder, the nearest known answer.
    pub text: String,
    /// In [0, 1], the geometric mean of the probabilities of the answer's tokens, the end mark included; without
    /// Y-Decoder, the share of the nearest known answer in a softmax over all of them.
    pub confidence: f64,
    /// P(confused) at this question; `None` without recursion.
    pub confusion: Option<f32>,
    /// Its moving average over the turns with this question so far; `None` without recursion.
    pub smoothed_confusion: Option<f32>,
    /// The score from which on the model counts as confused, which travels with it; `None` without recursion.
    pub threshold: Option<f32>,
    /// Whether the score that is judged (see [`AnswererOptions::smooth`]) is over the threshold; `None` without recursion.
    pub confused: Option<bool>,
    /// P(confused) after something was injected: `confusion` times the probability that it does not answer what was
    /// asked. `None` where nothing was, or the model does not weigh knowledge.
    pub confusion_after: Option<f32>,
    /// Whether the answer can be relied on: the model is not confused, or no longer, after something was injected (a model
    /// that does not weigh it takes everything for an answer); `None` without recursion.
    pub sure: Option<bool>,
    /// What tells of confusion; `None` where the model is not confused.
    pub signal: Option<Signal>,
    /// Known answers and their cosines, nearest first.
    pub nearest: Vec<(String, f32)>,
    /// What was injected from the memory, if something was: a fact's text, or an episode's question and answer.
    pub memory_used: Option<String>,
    /// Which of the two it is.
    pub memory_kind: Option<MemoryKind>,
    /// Whether the knowledge that was given was injected; see [`Inject`].
    pub knowledge_used: bool,
    /// Sentences to be said aloud.
    pub warnings: Vec<String>,
}

/// What is known beside the question, and may be injected into the pooled state; see [`Inject`].
#[derive(Clone, Copy, Debug)]
pub enum Knowledge<'a> {
    /// A text; the Y-Encoder embeds it.
    Text(&'a str),
    /// A vector (K,).
    Vector(&'a [f32]),
}

/// Where [`Knowledge`] that is given is injected.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Inject {
    /// Where the model is confused.
    #[default]
    Confused,
    /// In every turn.
    Always,
}

/// How an [`Answerer`] answers.
#[derive(Clone, Debug)]
pub struct AnswererOptions {
    /// What to look up when confused, and no knowledge is given.
    pub memory: Option<KnowledgeMemory>,
    /// Where knowledge that is given is injected.
    pub inject: Inject,
    /// Candidates for [`Answer::nearest`], and for the text itself where there is no Y-Decoder; `None`: the answers the
    /// model was trained with.
    pub known_answers: Option<Vec<String>>,
    /// How to choose the tokens.
    pub generation: GenerationConfig,
    /// Turns with the same question belong together, as of the frames of a film: judge confusion by its moving average
    /// over them. Otherwise each turn is judged by itself, which is what the threshold was chosen for.
    pub smooth: bool,
    /// How many known answers to name.
    pub top: usize,
}

impl Default for AnswererOptions {
    fn default() -> Self {
        AnswererOptions {
            memory: None,
            inject: Inject::Confused,
            known_answers: None,
            generation: GenerationConfig::default(),
            smooth: false,
            top: 5,
        }
    }
}

/// Asks a model, turn by turn.
///
/// Where the model has a recursion part, every question has a score of confusion. Over the threshold, knowledge that is
/// given is injected into the pooled state, and the answer read from there; if none is given and there is a memory, what
/// is recalled from it is injected. That is its nearest text, if its cosine is not under the model's `memory_floor`, looked
/// up with the question, if the model has a retriever (nothing is, where there is no question), and otherwise with the
/// predicted embedding; or the answer of its nearest episode, if that is not under the floor of
/// [`EpisodeFinder`](crate::episodes::EpisodeFinder); of the two the one that is further above its floor.
///
/// ```no_run
/// use kore_vljepa::memory::KnowledgeMemory;
/// use kore_vljepa::vljepa::{AnswererOptions, Mamba3Jepa, Sample};
///
/// # fn main() -> Result<(), kore_vljepa::Error> {
/// let model = Mamba3Jepa::from_dir("weights/")?;
/// let memory = KnowledgeMemory::open(&model, "facts.txt", &mut |_, _| {})?;
/// let mut answerer = model.answerer(AnswererOptions { memory: Some(memory), ..Default::default() })?;
/// let answer = answerer.ask(Sample::file("photo.jpg").asking("Whose car is this?"))?;
/// if let Some(text) = answer.memory_used {
///     println!("{} (I looked it up: {text})", answer.text);
/// }
/// # Ok(())
/// # }
/// ```
pub struct Answerer<'m> {
    model: &'m Mamba3Jepa,
    options: AnswererOptions,
    known: Cow<'m, [String]>,
    /// (G, E).
    known_embeddings: Cow<'m, [f32]>,
    /// Looks things up in the memory of the options.
    recall: Option<Recall>,
    observed: Vec<Observation>,
    smoothed: Averages,
    turns: u64,
}

impl Mamba3Jepa {
    /// One question by itself, with everything as [`AnswererOptions`] has it by default.
    ///
    /// # Errors
    /// As for [`Mamba3Jepa::answerer`] and [`Answerer::ask`].
    pub fn ask(&self, sample: Sample<'_>) -> Result<Answer, Error> {
        self.answerer(AnswererOptions::default())?.ask(sample)
    }

    /// A conversation with this model.
    ///
    /// # Errors
    /// [`Error::Absent`]: a memory, but no recursion part; neither Y-Decoder nor known answers. [`Error::Input`]: the
    /// model cannot use texts as knowledge; an empty known answer; a memory of another model; a wrong setting of generation.
    pub fn answerer(&self, options: AnswererOptions) -> Result<Answerer<'_>, Error> {
        options.generation.check()?;
        if self.y_decoder.is_some() {
            options.generation.check_choice(self.config().vocab_size)?;
        }
        let known = match &options.known_answers {
            None => Cow::Borrowed(self.known_answers()),
            Some(answers) => Cow::Owned(distinct(answers.iter().cloned())),
        };
        if self.y_decoder.is_none() && known.is_empty() {
            return Err(Error::Absent(
                "the model has no Y-Decoder yet (phase 2 trains it), so it can only choose among known answers, and none \
                 are known: give --answers, a text file with one answer a line"
                    .into(),
            ));
        }
        let mut recall = None;
        if let Some(memory) = &options.memory {
            self.demand_text_knowledge("a memory")?;
            recall = Some(Recall::new(self.demand_recursion()?, memory)?);
        }
        let known_embeddings = match &known {
            Cow::Borrowed(_) => Cow::Borrowed(self.known_embeddings()?),
            Cow::Owned(answers) if answers.is_empty() => Cow::Owned(Vec::new()),
            Cow::Owned(answers) => Cow::Owned(self.embed_text(answers)?.concat()),
        };
        Ok(Answerer {
            model: self,
            options,
            known,
            known_embeddings,
            recall,
            observed: Vec::new(),
            smoothed: Averages::default(),
            turns: 0,
        })
    }

    /// Embeddings (G, E) of the answers the model was trained with, computed once.
    fn known_embeddings(&self) -> Result<&[f32], Error> {
        if let Some(embeddings) = self.known.get() {
            return Ok(embeddings);
        }
        let answers = self.known_answers();
        let embeddings = if answers.is_empty() { Vec::new() } else { self.embed_text(answers)?.concat() };
        Ok(self.known.get_or_init(|| embeddings))
    }

    /// Whether an episode of a memory can be near enough to be recalled.
    pub fn recalls_episodes(&self) -> bool {
        let finder = self.recursion.as_ref().and_then(|recursion| recursion.episodes.as_ref());
        finder.is_some_and(EpisodeFinder::recalls)
    }

    /// Demands that this model can recall what it is to remember of what it sees.
    ///
    /// # Errors
    /// [`Error::Absent`]: it has no recursion part, was trained without episodes, or learned nothing about them.
    pub fn demand_episodes(&self) -> Result<&EpisodeFinder, Error> {
        let folder = self.manifest.path.parent().unwrap_or(&self.manifest.path);
        let reason = match &self.recursion {
            None => "it cannot remember what it sees: phase 3 (train_agent.py) trains that",
            Some(Recursion { episodes: None, .. }) => {
                "it was trained without episodes, so it would never recall one: train phase 3 with --model \
                 recursion.episodes=true, or remember a sentence instead (memory add FILE TEXT)"
            }
            Some(Recursion { episodes: Some(finder), .. }) if finder.recalls() => return Ok(finder),
            Some(_) => {
                "its validation had too little to learn when to recall an episode, so it would never recall one: train \
                 phase 3 with more validation samples, or remember a sentence instead (memory add FILE TEXT)"
            }
        };
        Err(Error::Absent(format!("{}: {reason}", path_text(folder))))
    }

    fn demand_recursion(&self) -> Result<&Recursion, Error> {
        self.recursion.as_ref().ok_or_else(|| {
            Error::Absent(
                "the model has no confusion monitor and no state injector, so it cannot use knowledge: phase 3 \
                 (train_agent.py) trains them"
                    .into(),
            )
        })
    }

    fn demand_text_knowledge(&self, what: &str) -> Result<(), Error> {
        self.demand_recursion()?;
        let (expected, width) = (self.config().knowledge_dim(), self.config().embed_dim);
        if expected == width {
            return Ok(());
        }
        Err(Error::Input(format!(
            "this model takes knowledge vectors of length {expected}, but its Y-Encoder embeds texts as {width} numbers, so \
             {what} cannot be injected: give a vector of length {expected}"
        )))
    }
}

impl Answerer<'_> {
    /// Forgets the turns so far: the next question starts a new conversation.
    pub fn reset(&mut self) {
        (self.smoothed, self.turns) = (Averages::default(), 0);
    }

    /// What the model made of the last turns, before anything was injected.
    pub fn observed(&self) -> &[Observation] {
        &self.observed
    }

    /// Whether the memory is looked up when the model is confused by a question: there may be none, or one of facts alone,
    /// where the model's retriever needs a question.
    pub fn can_look_up(&self, question: Option<&str>) -> bool {
        match (&self.recall, &self.options.memory) {
            (Some(recall), Some(memory)) => recall.can_look_up(memory, question),
            _ => false,
        }
    }

    /// One turn; see [`Answerer::ask_many`].
    ///
    /// # Errors
    /// As there.
    pub fn ask(&mut self, sample: Sample<'_>) -> Result<Answer, Error> {
        let mut answers = self.ask_many(&[sample], None, &mut |_, _| {})?;
        answers.pop().ok_or_else(|| Error::Input("expected one answer, found none".into()))
    }

    /// B turns in their order, computed together. `knowledge` is for every turn; [`AnswererOptions::inject`] says in which
    /// it is injected.
    ///
    /// # Errors
    /// [`Error::Input`]: no sample, an empty question, knowledge that does not fit the model. [`Error::Image`]: an image
    /// that cannot be read. [`Error::Absent`]: an image without X-Encoder, knowledge without recursion part.
    /// [`Error::NotFinite`]: the weights are damaged. The turns of a failed call do not count.
    pub fn ask_many(
        &mut self,
        samples: &[Sample<'_>],
        knowledge: Option<Knowledge<'_>>,
        progress: Progress<'_>,
    ) -> Result<Vec<Answer>, Error> {
        let model = self.model;
        model.pool.install(|| self.turns(samples, knowledge, true, progress))
    }

    /// `remembers`: whether the memory is looked up.
    fn turns(
        &mut self,
        samples: &[Sample<'_>],
        knowledge: Option<Knowledge<'_>>,
        remembers: bool,
        progress: Progress<'_>,
    ) -> Result<Vec<Answer>, Error> {
        let vector = knowledge.map(|knowledge| self.model.knowledge_vector(knowledge)).transpose()?;
        let mut observations = self.model.look(samples, progress)?;
        self.observed.clone_from(&observations);
        let (mut answers, smoothed) = self.judge(samples, &observations)?;
        for (answer, sample) in answers.iter_mut().zip(samples) {
            answer.warnings = self.model.warnings(sample.question)?;
        }
        match vector {
            Some(vector) => {
                let recursion = self.model.demand_recursion()?;
                for (observation, answer) in observations.iter_mut().zip(&mut answers) {
                    if self.options.inject == Inject::Always || answer.confused == Some(true) {
                        self.model.inject(recursion, observation, answer, &vector)?;
                        answer.knowledge_used = true;
                    }
                }
            }
            None if remembers => self.remember(samples, &mut observations, &mut answers)?,
            None => {}
        }
        for answer in &mut answers {
            let is_told = answer.knowledge_used || answer.memory_used.is_some();
            answer.sure = answer.confused.map(|confused| !confused || (is_told && answer.is_calmed()));
        }
        self.say(&observations, &mut answers)?;
        for (answer, observation) in answers.iter_mut().zip(&observations) {
            answer.nearest = self.nearest(&observation.embedding);
        }
        self.smoothed = smoothed;
        self.turns = self.turns.saturating_add(answers.len() as u64);
        Ok(answers)
    }

    /// Answers that hold only how confused the model is, and the moving averages after them.
    fn judge(&self, samples: &[Sample<'_>], observations: &[Observation]) -> Result<(Vec<Answer>, Averages), Error> {
        let pooled: Vec<&[f32]> = observations.iter().map(|observation| &observation.pooled[..]).collect();
        let mut smoothed = self.smoothed.clone();
        let mut answers = vec![Answer::default(); observations.len()];
        let Some(Recursion { confusion_probe, .. }) = &self.model.recursion else { return Ok((answers, smoothed)) };
        let confusions = self.model.judge(&embeddings_of(observations), &pooled)?;
        for ((answer, sample), confusion) in answers.iter_mut().zip(samples).zip(confusions) {
            let Some(confusion) = confusion else { continue };
            let question = sample.question.unwrap_or(&self.model.config().query_prompt);
            let average = confusion_probe.smooth(confusion.score, smoothed.get(question));
            smoothed.set(question, average);
            let judged = if self.options.smooth { Confusion { score: average, ..confusion } } else { confusion };
            answer.confusion = Some(confusion.score);
            answer.smoothed_confusion = Some(average);
            answer.threshold = Some(confusion.threshold);
            answer.confused = Some(judged.is_confused());
            answer.signal = judged.is_confused().then(|| confusion.signal().unwrap_or(Signal::Before));
        }
        Ok((answers, smoothed))
    }

    /// Where the model is confused, what it recalls from the memory is injected.
    fn remember(
        &self,
        samples: &[Sample<'_>],
        observations: &mut [Observation],
        answers: &mut [Answer],
    ) -> Result<(), Error> {
        let (Some(memory), Some(recall)) = (&self.options.memory, &self.recall) else { return Ok(()) };
        let recursion = self.model.demand_recursion()?;
        let turns: Vec<usize> = (0..answers.len()).filter(|&turn| answers[turn].confused == Some(true)).collect();
        let confused: Vec<(Option<&str>, &Observation)> =
            turns.iter().map(|&turn| (samples[turn].question, &observations[turn])).collect();
        let recalled = recall.look_up(self.model, recursion, memory, &confused)?;
        for (turn, found) in turns.into_iter().zip(recalled) {
            let Some(found) = found else { continue };
            self.model.inject(recursion, &mut observations[turn], &mut answers[turn], found.embedding)?;
            (answers[turn].memory_used, answers[turn].memory_kind) = (Some(found.text), Some(found.kind));
        }
        Ok(())
    }

    /// The known answers that are nearest to an embedding (E,).
    fn nearest(&self, embedding: &[f32]) -> Vec<(String, f32)> {
        let found = nearest(embedding, &self.known_embeddings, self.options.top);
        found.into_iter().map(|(place, cosine)| (self.known[place].clone(), cosine)).collect()
    }

    /// Texts and confidences.
    fn say(&self, observations: &[Observation], answers: &mut [Answer]) -> Result<(), Error> {
        let model = self.model;
        if model.y_decoder.is_none() {
            for (answer, observation) in answers.iter_mut().zip(observations) {
                let shares = shares(&cosines(&observation.embedding, &self.known_embeddings), TEMPERATURE);
                let best = crate::generate::argmax(&shares);
                (answer.text, answer.confidence) = (self.known[best].clone(), f64::from(shares[best]));
            }
            return Ok(());
        }
        let embeddings = embeddings_of(observations);
        let mut first_row = self.turns;
        let batch = self.options.generation.samples_at_once(model.batch_size);
        for (answers, embeddings) in answers.chunks_mut(batch).zip(embeddings.chunks(batch)) {
            let generated = model.speak(embeddings, &self.options.generation, first_row)?;
            for (answer, generated) in answers.iter_mut().zip(generated) {
                answer.text = strip(&model.tokenizer.decode(&generated.ids)?).to_owned();
                answer.confidence = generated.confidence();
            }
            first_row = first_row.saturating_add(embeddings.len() as u64);
        }
        Ok(())
    }
}

fn embeddings_of(observations: &[Observation]) -> Vec<&[f32]> {
    observations.iter().map(|observation| &observation.embedding[..]).collect()
}

impl Mamba3Jepa {
    /// The embedding read from the pooled state with the knowledge `vector` (K,), and how confused the model is after it.
    fn inject(
        &self,
        recursion: &Recursion,
        observation: &mut Observation,
        answer: &mut Answer,
        vector: &[f32],
    ) -> Result<(), Error> {
        if let (Some(probe), Some(confusion)) = (&recursion.knowledge_probe, answer.confusion) {
            answer.confusion_after = Some(confusion * (1.0 - probe.score(&observation.pooled, vector)?));
        }
        let injected = recursion.injector.inject(&observation.pooled, vector)?;
        observation.embedding = self.predictor.embed(&injected)?;
        Ok(())
    }

    /// Knowledge as a vector (K,).
    fn knowledge_vector(&self, knowledge: Knowledge<'_>) -> Result<Vec<f32>, Error> {
        match knowledge {
            Knowledge::Text(text) => {
                self.demand_text_knowledge("a knowledge text")?;
                Ok(self.read_texts(&[text], &mut |_, _| {})?.concat())
            }
            Knowledge::Vector(vector) => {
                self.demand_recursion()?;
                let expected = self.config().knowledge_dim();
                if vector.len() != expected {
                    return Err(Error::Input(format!(
                        "the knowledge vector has length {}, but this model takes length {expected}",
                        vector.len()
                    )));
                }
                if !vector.iter().all(|x| x.is_finite()) {
                    return Err(Error::Input("the knowledge vector has a value that is not finite".into()));
                }
                Ok(vector.to_vec())
            }
        }
    }

    /// Says that the model cannot read the question, if so.
    fn warnings(&self, question: Option<&str>) -> Result<Vec<String>, Error> {
        let Some(question) = question else { return Ok(Vec::new()) };
        let unlearned = self.tokenizer.unlearned(question)?;
        if unlearned.is_empty() {
            return Ok(Vec::new());
        }
        let letters: Vec<char> = question.chars().filter(|&character| is_letter(character)).collect();
        let strange = letters.iter().filter(|&&character| unlearned.contains(character)).count();
        let what =
            if 2 * strange > letters.len() { "this script".to_owned() } else { format!("the characters {unlearned}") };
        let question = serde_json::Value::from(question);
        let warning = format!("{question}: the tokenizer has not seen {what} in training; the answer means little");
        self.warn(&warning);
        Ok(vec![warning])
    }
}
