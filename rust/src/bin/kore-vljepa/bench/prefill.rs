//! What the predictor costs as its input gets longer.
//!
//! Each length is measured in a process of its own: memory that was used before and freed again would hide what is used
//! now.

use std::process::{Command, Stdio};

use serde::{Deserialize, Serialize};

use super::parts::Predictor;
use super::{median, memory, timed, tokens};
use crate::args::{ModelArgs, thread_pool};
use crate::output::{Failure, failure};

const ROUNDS: usize = 3;

/// The predictor on so many visual tokens and a question.
#[derive(Serialize, Deserialize)]
pub(super) struct Prefill {
    pub(super) visual_tokens: usize,
    pub(super) seconds: f64,
    /// Beside the weights and the tokens themselves; `None` where the system does not tell it.
    pub(super) peak_bytes: Option<u64>,
}

/// Measures it in a process of its own.
pub(super) fn measure_apart(
    model: &ModelArgs,
    visual_tokens: usize,
    question_tokens: usize,
) -> Result<Prefill, Failure> {
    let failed = |reason: String| failure(format!("bench: cannot measure {visual_tokens} tokens apart: {reason}"));
    let program = std::env::current_exe().map_err(|error| failed(error.to_string()))?;
    let mut command = Command::new(program);
    command.arg("bench").arg("--weights").arg(&model.weights).arg("--json").stderr(Stdio::inherit());
    command.args(["--question-tokens", &question_tokens.to_string(), "--only-prefill", &visual_tokens.to_string()]);
    if let Some(threads) = model.threads {
        command.args(["--threads", &threads.to_string()]);
    }
    let output = command.output().map_err(|error| failed(error.to_string()))?;
    if !output.status.success() {
        return Err(failed(output.status.to_string()));
    }
    serde_json::from_slice(&output.stdout).map_err(|error| failed(error.to_string()))
}

/// Measures it in this process, which should have done nothing before.
pub(super) fn measure(model: &ModelArgs, visual_tokens: usize, question_tokens: usize) -> Result<Prefill, Failure> {
    let mut predictor = Predictor::load(&model.weights)?;
    let visual = tokens(visual_tokens, predictor.config().vision.hidden_size)?;
    let query = tokens(question_tokens, predictor.config().y_encoder.d_model())?;
    thread_pool(model.threads)?.install(|| {
        let before = memory::resident_bytes().filter(|_| memory::forget_peak());
        predictor.predict(&visual, &query)?;
        let peak_bytes = before.zip(memory::peak_bytes()).map(|(before, peak)| peak.saturating_sub(before));
        let mut seconds = Vec::new();
        for _ in 0..ROUNDS {
            seconds.push(timed(|| predictor.predict(&visual, &query))?);
        }
        Ok(Prefill { visual_tokens, seconds: median(&seconds).unwrap_or(f64::NAN), peak_bytes })
    })
}
