//! What an agent did, step by step.

use serde::{Serialize, Serializer};

use crate::recursion::Signal;
use crate::vljepa::Answer;

/// The last answer, and how it came about.
#[derive(Clone, Debug, PartialEq)]
pub struct AgentAnswer {
    /// What was asked, or the model's own prompt.
    pub question: String,
    /// What the model says in the end.
    pub answer: Answer,
    /// Why it ended.
    pub stopped: Stop,
    /// The tools that were called.
    pub tools: Vec<String>,
    /// Every step.
    pub trace: Vec<Step>,
}

/// Why an agent calls no further tool.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum Stop {
    /// The model is not confused, or no longer.
    #[serde(rename = "sure")]
    Sure,
    /// None is left that is likely to help.
    #[serde(rename = "no tool")]
    NoTool,
    /// A tool said what was said before.
    #[serde(rename = "nothing new")]
    NothingNew,
    /// So many calls as are allowed.
    #[serde(rename = "rounds")]
    Rounds,
}

/// One step, as the trace's JSON has it.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "step", rename_all = "lowercase")]
pub enum Step {
    /// What the model says and how confused it is, at first or after something was told.
    Observe {
        /// See [`Answer::text`].
        answer: String,
        /// See [`Answer::confidence`].
        confidence: f64,
        /// What is judged: after something was told, [`Answer::confusion_after`] where the model weighs that.
        #[serde(serialize_with = "wide")]
        confusion: Option<f32>,
        /// See [`Answer::threshold`].
        #[serde(serialize_with = "wide")]
        threshold: Option<f32>,
        /// See [`Answer::sure`].
        sure: Option<bool>,
        /// What tells of confusion; `None` where the model is sure.
        signal: Option<Signal>,
    },
    /// A tool that was called.
    Call {
        /// Its name.
        tool: String,
        /// What the selector gave it among all tools; `None` where the model has no selector, or knows none of the tools.
        #[serde(serialize_with = "wide")]
        probability: Option<f32>,
        /// What it said; `None` if it failed, or had nothing to say.
        result: Option<String>,
        /// How it failed.
        error: Option<String>,
    },
    /// What was told.
    Inject {
        /// Its text.
        knowledge: String,
        /// The probability that it answers the question; `None` where the model does not weigh it.
        #[serde(serialize_with = "wide")]
        answers: Option<f32>,
        /// Whether the next step goes on from it, or as if it had not been said.
        kept: bool,
    },
}

impl Step {
    pub(super) fn seen(answer: &Answer) -> Step {
        Step::Observe {
            answer: answer.text.clone(),
            confidence: answer.confidence,
            confusion: answer.confusion_after.or(answer.confusion),
            threshold: answer.threshold,
            sure: answer.sure,
            signal: answer.signal.filter(|_| answer.sure != Some(true)),
        }
    }
}

/// With the digits that Python's numbers have.
#[expect(clippy::ref_option, reason = "as serde calls it")]
fn wide<S: Serializer>(number: &Option<f32>, to: S) -> Result<S::Ok, S::Error> {
    number.map(f64::from).serialize(to)
}
