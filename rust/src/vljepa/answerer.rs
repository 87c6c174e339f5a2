//! Answers to questions about images, with what the model thinks of them.
//!
//! Letters: B questions, G known answers, D width of the pooled state, E embedding width, K knowledge width.

use std::borrow::Cow;

use super::{Mamba3Jepa, Observation, Progress, Sample};
use crate::error::Error;
use crate::generate::{Doubt, GenerationConfig};
use crate::memory::KnowledgeMemory;
use crate::nearest::{cosines, nearest, shares};
use crate::recursion::{ConfusionMonitor, KnowledgeRetriever, Recursion, Signal};
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
    /// Its moving average over the turns so far; `None` without recursion.
    pub smoothed_confusion: Option<f32>,
    /// The score from which on the model counts as confused, which travels with it; `None` without recursion.
    pub threshold: Option<f32>,
    /// Whether the score that is judged (see [`AnswererOptions::smooth`]) is over the threshold; `None` without recursion.
    pub confused: Option<bool>,
    /// Whether the answer can be relied on: the model is not confused, or something was injected; `None` without
    /// recursion.
    pub sure: Option<bool>,
    /// What tells of confusion; `None` where the model is not confused.
    pub signal: Option<Signal>,
    /// Known answers and their cosines, nearest first.
    pub nearest: Vec<(String, f32)>,
    /// The text from the memory that was injected, if one was.
    pub memory_used: Option<String>,
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
    /// The turns belong together, as the frames of a film do: judge confusion by its moving average. Otherwise each
    /// question is judged by itself, which is what the threshold was chosen for.
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
/// given is injected into the pooled state, and the answer read from there; if none is given and there is a memory, its
/// nearest text is looked up and its embedding injected, if its cosine is not under the model's `memory_floor`. What is
/// looked up with is the question, if the model has a retriever (nothing is, where there is no question), and otherwise
/// the predicted embedding.
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
    /// What the retriever makes of the memory's M texts, (M, R).
    keys: Vec<f32>,
    smoothed: Option<f32>,
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
        let mut keys = Vec::new();
        if let Some(memory) = &options.memory {
            self.demand_text_knowledge("a memory")?;
            keys = self.keys(memory)?;
        }
        let known_embeddings = match &known {
            Cow::Borrowed(_) => Cow::Borrowed(self.known_embeddings()?),
            Cow::Owned(answers) if answers.is_empty() => Cow::Owned(Vec::new()),
            Cow::Owned(answers) => Cow::Owned(self.embed_text(answers)?.concat()),
        };
        Ok(Answerer { model: self, options, known, known_embeddings, keys, smoothed: None, turns: 0 })
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

    /// What the retriever makes of a memory's M texts, (M, R); nothing without retriever.
    fn keys(&self, memory: &KnowledgeMemory) -> Result<Vec<f32>, Error> {
        let Some(KnowledgeRetriever { text, .. }) = self.retriever() else { return Ok(Vec::new()) };
        let width = memory.embeddings().len() / memory.texts().len().max(1);
        let embeddings = memory.embeddings().chunks(width.max(1));
        let keys = embeddings.map(|embedding| text.apply(embedding)).collect::<Result<Vec<_>, _>>()?;
        Ok(keys.concat())
    }

    fn retriever(&self) -> Option<&KnowledgeRetriever> {
        self.recursion.as_ref()?.retriever.as_ref()
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
        (self.smoothed, self.turns) = (None, 0);
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
        model.pool.install(|| self.turns(samples, knowledge, progress))
    }

    fn turns(
        &mut self,
        samples: &[Sample<'_>],
        knowledge: Option<Knowledge<'_>>,
        progress: Progress<'_>,
    ) -> Result<Vec<Answer>, Error> {
        let vector = knowledge.map(|knowledge| self.model.knowledge_vector(knowledge)).transpose()?;
        let mut observations = self.model.look(samples, progress)?;
        let (mut answers, smoothed) = self.judge(&observations)?;
        for (answer, sample) in answers.iter_mut().zip(samples) {
            answer.warnings = self.model.warnings(sample.question)?;
        }
        match vector {
            Some(vector) => {
                let recursion = self.model.demand_recursion()?;
                for (observation, answer) in observations.iter_mut().zip(&mut answers) {
                    if self.options.inject == Inject::Always || answer.confused == Some(true) {
                        self.model.inject(recursion, observation, &vector)?;
                        answer.knowledge_used = true;
                    }
                }
            }
            None => self.remember(samples, &mut observations, &mut answers)?,
        }
        for answer in &mut answers {
            let is_told = answer.knowledge_used || answer.memory_used.is_some();
            answer.sure = answer.confused.map(|confused| !confused || is_told);
        }
        self.say(&observations, &mut answers)?;
        for (answer, observation) in answers.iter_mut().zip(&observations) {
            let found = nearest(&observation.embedding, &self.known_embeddings, self.options.top);
            answer.nearest = found.into_iter().map(|(place, cosine)| (self.known[place].clone(), cosine)).collect();
        }
        self.smoothed = smoothed;
        self.turns = self.turns.saturating_add(answers.len() as u64);
        Ok(answers)
    }

    /// Answers that hold only how confused the model is, and the moving average after them.
    fn judge(&self, observations: &[Observation]) -> Result<(Vec<Answer>, Option<f32>), Error> {
        let mut smoothed = self.smoothed;
        let mut answers = vec![Answer::default(); observations.len()];
        if let Some(Recursion { confusion_probe, .. }) = &self.model.recursion {
            let doubts = self.doubts(observations, confusion_probe)?;
            for ((answer, observation), doubt) in answers.iter_mut().zip(observations).zip(doubts) {
                let score = confusion_probe.score(&observation.pooled, doubt)?;
                let average = confusion_probe.smooth(score, smoothed);
                smoothed = Some(average);
                let judged = if self.options.smooth { average } else { score };
                answer.confusion = Some(score);
                answer.smoothed_confusion = smoothed;
                answer.threshold = Some(confusion_probe.threshold);
                answer.confused = Some(judged > confusion_probe.threshold);
                if answer.confused == Some(true) {
                    answer.signal = Some(confusion_probe.signal(&observation.pooled)?);
                }
            }
        }
        Ok((answers, smoothed))
    }

    /// What the monitor hears: the doubt in greedy answers, whatever the options say of generation.
    fn doubts(&self, observations: &[Observation], monitor: &ConfusionMonitor) -> Result<Vec<Option<Doubt>>, Error> {
        if !monitor.hears_answer() {
            return Ok(vec![None; observations.len()]);
        }
        let embeddings: Vec<&[f32]> = observations.iter().map(|observation| &observation.embedding[..]).collect();
        let mut doubts = Vec::with_capacity(observations.len());
        for embeddings in embeddings.chunks(self.model.batch_size) {
            let answers = self.model.speak(embeddings, &GenerationConfig::default(), 0)?;
            doubts.extend(answers.iter().map(|answer| Some(answer.doubt())));
        }
        Ok(doubts)
    }

    /// Where the model is confused, the memory's nearest text is injected, if it is near enough.
    fn remember(
        &self,
        samples: &[Sample<'_>],
        observations: &mut [Observation],
        answers: &mut [Answer],
    ) -> Result<(), Error> {
        let (Some(memory), Some(recursion)) = (&self.options.memory, &self.model.recursion) else { return Ok(()) };
        let nearest = self.look_up(memory, samples, observations, answers)?;
        let mut found = Vec::new();
        for ((observation, answer), nearest) in observations.iter_mut().zip(answers).zip(nearest) {
            if let Some((text, cosine)) = nearest
                && cosine >= recursion.memory_floor
            {
                answer.memory_used = Some(text.to_owned());
                found.push((observation, text));
            }
        }
        if found.is_empty() {
            return Ok(());
        }
        let texts: Vec<&str> = found.iter().map(|&(_, text)| text).collect();
        let vectors = self.model.read_texts(&texts, &mut |_, _| {})?;
        for ((observation, _), vector) in found.into_iter().zip(vectors) {
            self.model.inject(recursion, observation, &vector)?;
        }
        Ok(())
    }

    /// For each turn that is confused, the memory's nearest text and its cosine: to the question, if there is one, with a
    /// retriever, else to the predicted embedding.
    fn look_up<'t>(
        &self,
        memory: &'t KnowledgeMemory,
        samples: &[Sample<'_>],
        observations: &[Observation],
        answers: &[Answer],
    ) -> Result<Vec<Option<(&'t str, f32)>>, Error> {
        let mut found = vec![None; answers.len()];
        let confused = (0..answers.len()).filter(|&turn| answers[turn].confused == Some(true));
        let Some(KnowledgeRetriever { question: tower, .. }) = self.model.retriever() else {
            for turn in confused {
                found[turn] = memory.search(&observations[turn].embedding, 1)?.first().copied();
            }
            return Ok(found);
        };
        let (turns, questions): (Vec<usize>, Vec<&str>) =
            confused.filter_map(|turn| Some((turn, samples[turn].question?))).unzip();
        if questions.is_empty() {
            return Ok(found);
        }
        for (turn, embedding) in turns.into_iter().zip(self.model.read_texts(&questions, &mut |_, _| {})?) {
            let best = nearest(&tower.apply(&embedding)?, &self.keys, 1).first().copied();
            found[turn] = best.map(|(place, cosine)| (memory.texts()[place].as_str(), cosine));
        }
        Ok(found)
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
        let embeddings: Vec<&[f32]> = observations.iter().map(|observation| &observation.embedding[..]).collect();
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

impl Mamba3Jepa {
    /// The embedding read from the pooled state with the knowledge `vector` (K,).
    fn inject(&self, recursion: &Recursion, observation: &mut Observation, vector: &[f32]) -> Result<(), Error> {
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
