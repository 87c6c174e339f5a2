//! How confused the model is by what it is asked: the one place where that is judged.
//!
//! Letters: B turns, D width of the pooled state, E embedding width.

use super::Mamba3Jepa;
use crate::error::Error;
use crate::generate::{Doubt, GenerationConfig};
use crate::recursion::{ConfusionMonitor, Recursion, Signal};

/// How confused the model is in one turn.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Confusion {
    /// P(confused).
    pub score: f32,
    /// The threshold that travels with the model.
    pub threshold: f32,
    /// What tells of confusion, if there is any; see [`ConfusionMonitor::signal`].
    pub cause: Signal,
}

impl Confusion {
    /// Whether the score is over the threshold.
    pub fn is_confused(&self) -> bool {
        self.score > self.threshold
    }

    /// The cause, where the model is confused.
    pub fn signal(&self) -> Option<Signal> {
        self.is_confused().then_some(self.cause)
    }
}

impl Mamba3Jepa {
    /// How confused the model is in each of B turns, given the embeddings (E,) that it predicts and the states (D,) that
    /// they are read from; `None` without recursion. On the current pool.
    pub(super) fn judge(&self, embeddings: &[&[f32]], pooled: &[&[f32]]) -> Result<Vec<Option<Confusion>>, Error> {
        let Some(Recursion { confusion_probe: monitor, .. }) = &self.recursion else {
            return Ok(vec![None; pooled.len()]);
        };
        let doubts = self.doubts(monitor, embeddings)?;
        let judged = pooled.iter().zip(doubts).map(|(pooled, doubt)| {
            let (score, cause) = (monitor.score(pooled, doubt)?, monitor.signal(pooled)?);
            Ok(Some(Confusion { score, threshold: monitor.threshold, cause }))
        });
        judged.collect()
    }

    /// What the monitor hears: the doubt in greedy answers.
    fn doubts(&self, monitor: &ConfusionMonitor, embeddings: &[&[f32]]) -> Result<Vec<Option<Doubt>>, Error> {
        if !monitor.hears_answer() {
            return Ok(vec![None; embeddings.len()]);
        }
        let mut doubts = Vec::with_capacity(embeddings.len());
        for embeddings in embeddings.chunks(self.batch_size) {
            let answers = self.speak(embeddings, &GenerationConfig::default(), 0)?;
            doubts.extend(answers.iter().map(|answer| Some(answer.doubt())));
        }
        Ok(doubts)
    }
}
