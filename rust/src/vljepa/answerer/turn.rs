//! A turn that goes on: what is told is chosen by the caller, one thing after another.

use super::{Answer, Answerer, Knowledge};
use crate::error::Error;
use crate::vljepa::recall::Recalled;
use crate::vljepa::{Mamba3Jepa, Observation, Sample};

/// A question, the state that it is answered from, and the answer; see [`Answerer::observe`].
#[derive(Clone, Debug, PartialEq)]
pub struct Turn {
    /// What was asked; `None`: the model's own prompt.
    pub question: Option<String>,
    /// The pooled state (D,), with what was told so far.
    pub pooled: Vec<f32>,
    /// What its picture looks like; see [`Observation::picture`].
    pub picture: Vec<f32>,
    /// What is said from there.
    pub answer: Answer,
    /// The probability that what was told last answers the question; `None` where nothing was, or the model does not weigh
    /// it.
    pub told_answers: Option<f32>,
}

impl Answer {
    /// Whether something that was injected leaves the model under its threshold.
    pub(super) fn is_calmed(&self) -> bool {
        let after = self.confusion_after.zip(self.threshold);
        after.is_none_or(|(confusion, threshold)| confusion <= threshold)
    }
}

impl<'m> Answerer<'m> {
    /// The model that is asked.
    pub fn model(&self) -> &'m Mamba3Jepa {
        self.model
    }

    /// Whether there is a memory to look up.
    pub fn has_memory(&self) -> bool {
        self.options.memory.is_some()
    }

    /// One turn in which nothing is told and nothing is looked up.
    ///
    /// # Errors
    /// As [`Answerer::ask_many`].
    pub fn observe(&mut self, sample: Sample<'_>) -> Result<Turn, Error> {
        let model = self.model;
        let mut answers = model.pool.install(|| self.turns(&[sample], None, false, &mut |_, _| {}))?;
        let (Some(answer), [observation]) = (answers.pop(), &self.observed[..]) else {
            return Err(Error::Input("expected one answer, found none".into()));
        };
        let Observation { pooled, picture, .. } = observation.clone();
        Ok(Turn { question: sample.question.map(String::from), pooled, picture, answer, told_answers: None })
    }

    /// The same turn after something was injected, however confused the model is; once more, if it was before.
    ///
    /// # Errors
    /// [`Error::Input`]: knowledge that does not fit the model. [`Error::Absent`]: the model has no recursion part.
    /// [`Error::NotFinite`]: the weights are damaged.
    pub fn told(&self, turn: &Turn, knowledge: Knowledge<'_>) -> Result<Turn, Error> {
        self.model.pool.install(|| {
            let recursion = self.model.demand_recursion()?;
            let vector = self.model.knowledge_vector(knowledge)?;
            let pooled = recursion.injector.inject(&turn.pooled, &vector)?;
            let probe = recursion.knowledge_probe.as_ref();
            let told_answers = probe.map(|probe| probe.score(&turn.pooled, &vector)).transpose()?;
            let mut answer = turn.answer.clone();
            let before = answer.confusion_after.or(answer.confusion);
            answer.confusion_after = before.zip(told_answers).map(|(before, answers)| before * (1.0 - answers));
            answer.sure = Some(answer.is_calmed());
            answer.knowledge_used = true;
            let observation =
                Observation { embedding: self.model.predictor.embed(&pooled)?, pooled, picture: turn.picture.clone() };
            answer.nearest = self.nearest(&observation.embedding);
            let mut answers = [answer];
            self.say(std::slice::from_ref(&observation), &mut answers)?;
            let [answer] = answers;
            let Observation { pooled, picture, .. } = observation;
            Ok(Turn { question: turn.question.clone(), pooled, picture, answer, told_answers })
        })
    }

    /// What the memory has for a turn; `None` where there is none, or nothing near enough.
    ///
    /// # Errors
    /// As [`Answerer::told`].
    pub fn recalled(&self, turn: &Turn) -> Result<Option<Recalled<'_>>, Error> {
        let (Some(memory), Some(recall)) = (&self.options.memory, &self.recall) else { return Ok(None) };
        self.model.pool.install(|| {
            let recursion = self.model.demand_recursion()?;
            let embedding = self.model.predictor.embed(&turn.pooled)?;
            let observation = Observation { embedding, pooled: turn.pooled.clone(), picture: turn.picture.clone() };
            let asked = [(turn.question.as_deref(), &observation)];
            Ok(recall.look_up(self.model, recursion, memory, &asked)?.pop().flatten())
        })
    }
}
