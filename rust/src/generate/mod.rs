//! Text from the Y-Decoder, token by token: greedy, sampled, or by beam search.
//!
//! Only the decoder's `prefill` and `step` are used, so memory and time per token do not depend on how much has been
//! said. Sequences that have ended leave the batch.
//!
//! Letters: B samples, E embedding width, V vocabulary, N sequences still being generated, K beams.

mod beam;
mod config;
mod random;
mod sample;

pub use config::{GenerationConfig, LARGEST, MAX_BEAMS, MAX_TOKENS, Method};

use crate::error::Error;
use crate::y_decoder::{DecoderState, Mamba3Decoder};
use random::SplitMix64;

/// One generated answer.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Generated {
    /// The tokens, without bos and eos.
    pub ids: Vec<u32>,
    /// The natural logarithm of the probability the decoder gave to each token when it was chosen, that of eos last if
    /// it was; temperature, top-k and top-p do not enter.
    pub log_probs: Vec<f32>,
    /// Whether it ended with eos, rather than by the limit.
    pub finished: bool,
}

impl Generated {
    /// In [0, 1], the geometric mean of the tokens' probabilities, the end mark included.
    pub fn confidence(&self) -> f64 {
        let total: f64 = self.log_probs.iter().copied().map(f64::from).sum();
        (total / self.log_probs.len().max(1) as f64).exp()
    }

    /// How improbable the decoder found what it said itself: log(1e-5 - mean of the tokens' log-probabilities),
    /// and the same of the least probable token. The floor keeps what rounding makes of a sure answer from mattering.
    pub fn doubt(&self) -> Doubt {
        let total: f64 = self.log_probs.iter().copied().map(f64::from).sum();
        let mean = (total / self.log_probs.len().max(1) as f64) as f32;
        let least = self.log_probs.iter().copied().fold(0.0, f32::min);
        [mean, least].map(|log_prob| (DOUBT_FLOOR - log_prob.min(0.0)).ln())
    }
}

/// What [`Generated::doubt`] gives.
pub type Doubt = [f32; 2];

/// In nats.
const DOUBT_FLOOR: f32 = 1e-5;

/// The doubt in an answer of whose every token the decoder was certain.
pub(crate) fn surest_doubt() -> Doubt {
    [DOUBT_FLOOR.ln(); 2]
}

/// A model that speaks embeddings: what generation needs of the Y-Decoder.
pub(crate) trait Speaker {
    /// The constant memory of several sequences.
    type State;

    /// Tokens V.
    fn vocab_size(&self) -> usize;

    /// The state of one new sequence for each of B embeddings (E,); bos comes next.
    fn prefill(&self, embeddings: &[&[f32]]) -> Result<Self::State, Error>;

    /// One token more for each of N sequences: `ids` (N,) in, logits (N, V) of the next ones out.
    fn step<'a>(&self, ids: &[u32], state: &'a mut Self::State) -> Result<&'a [f32], Error>;

    /// The sequences at `rows` in this order; a row may come several times, or not at all.
    fn select(&self, state: &mut Self::State, rows: &[usize]) -> Result<(), Error>;
}

impl Speaker for Mamba3Decoder {
    type State = DecoderState;

    fn vocab_size(&self) -> usize {
        self.config().vocab_size
    }

    fn prefill(&self, embeddings: &[&[f32]]) -> Result<DecoderState, Error> {
        self.prefill(embeddings)
    }

    fn step<'a>(&self, ids: &[u32], state: &'a mut DecoderState) -> Result<&'a [f32], Error> {
        self.step(ids, state).map(|logits| &*logits)
    }

    fn select(&self, state: &mut DecoderState, rows: &[usize]) -> Result<(), Error> {
        self.select(state, rows)
    }
}

/// What every way of generating needs besides the decoder.
#[derive(Clone, Copy)]
pub(crate) struct Request<'a> {
    pub(crate) bos_id: u32,
    pub(crate) eos_id: u32,
    pub(crate) config: &'a GenerationConfig,
    /// Tokens at most, eos included, where the configuration does not say.
    pub(crate) max_tokens: usize,
    /// Number of the first sample: sampling draws from a stream of its own for each (seed, number).
    pub(crate) first_row: u64,
}

/// Lets the decoder speak each of B embeddings (E,). A sample's tokens do not depend on the others in the batch.
///
/// # Errors
/// [`Error::Input`] for a wrong configuration, [`Error::NotFinite`] if the decoder's outputs are not finite.
pub(crate) fn generate<S: Speaker>(
    speaker: &S,
    embeddings: &[&[f32]],
    request: Request<'_>,
) -> Result<Vec<Generated>, Error> {
    request.config.check()?;
    if embeddings.is_empty() {
        return Ok(Vec::new());
    }
    let limit = request.config.max_tokens.unwrap_or(request.max_tokens).max(1);
    match request.config.method {
        Method::Beam => beam::search(speaker, embeddings, request, limit),
        Method::Greedy | Method::Sample => one_each(speaker, embeddings, request, limit),
    }
}

/// Greedy and sampling: one sequence for each sample.
fn one_each<S: Speaker>(
    speaker: &S,
    embeddings: &[&[f32]],
    request: Request<'_>,
    limit: usize,
) -> Result<Vec<Generated>, Error> {
    let config = request.config;
    let is_drawn = config.method == Method::Sample && config.temperature > 0.0;
    let rows = request.first_row..request.first_row.saturating_add(embeddings.len() as u64);
    let mut streams: Vec<SplitMix64> = rows.map(|row| SplitMix64::new(config.seed, row)).collect();
    let mut answers = vec![Generated::default(); embeddings.len()];
    let mut live: Vec<usize> = (0..answers.len()).collect();
    let mut state = speaker.prefill(embeddings)?;
    let mut ids = vec![request.bos_id; live.len()];
    for _ in 0..limit {
        let logits = speaker.step(&ids, &mut state)?;
        demand_finite(logits)?;
        let mut stay = Vec::with_capacity(live.len());
        for (row, (&sample, logits)) in live.iter().zip(logits.chunks_exact(speaker.vocab_size())).enumerate() {
            let token = if is_drawn { sample::draw(logits, streams[sample].uniform(), config) } else { argmax(logits) };
            let answer = &mut answers[sample];
            answer.log_probs.push(log_prob(logits[token], log_sum_exp(logits)));
            ids[row] = id(token);
            answer.finished = ids[row] == request.eos_id;
            if !answer.finished {
                answer.ids.push(ids[row]);
                stay.push(row);
            }
        }
        if stay.is_empty() {
            break;
        }
        if stay.len() < live.len() {
            live = stay.iter().map(|&row| live[row]).collect();
            ids = stay.iter().map(|&row| ids[row]).collect();
            speaker.select(&mut state, &stay)?;
        }
    }
    Ok(answers)
}

/// A place in the vocabulary as a token id; the configuration keeps vocabularies far below 2^32.
fn id(token: usize) -> u32 {
    u32::try_from(token).unwrap_or(u32::MAX)
}

/// The place of the largest number, the first of equal ones.
pub(crate) fn argmax(logits: &[f32]) -> usize {
    let mut best = 0;
    for (place, &logit) in logits.iter().enumerate() {
        if logit > logits[best] {
            best = place;
        }
    }
    best
}

/// ln Σ e^x, without overflow.
fn log_sum_exp(logits: &[f32]) -> f64 {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let total: f64 = logits.iter().map(|&logit| f64::from((logit - largest).exp())).sum();
    f64::from(largest) + total.ln()
}

/// The log-probability of a token with this logit. Of a token that is almost certain all digits count: doubt is measured
/// by them.
fn log_prob(logit: f32, log_sum_exp: f64) -> f32 {
    (f64::from(logit) - log_sum_exp) as f32
}

fn demand_finite(logits: &[f32]) -> Result<(), Error> {
    if logits.iter().all(|logit| logit.is_finite()) {
        return Ok(());
    }
    Err(Error::NotFinite("the Y-Decoder's outputs are not finite: its weights or the embeddings are damaged".into()))
}

#[cfg(test)]
mod tests;
