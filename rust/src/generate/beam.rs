//! Beam search.

use std::cmp::Ordering;

use super::{Generated, Request, Speaker, demand_finite, id, log_prob, log_sum_exp};
use crate::error::Error;

/// One way to go on: the token at `slot`'s next place.
#[derive(Clone, Copy, Debug)]
struct Candidate {
    /// Log-probability of the whole sequence.
    total: f32,
    /// The sequence it continues.
    slot: usize,
    token: u32,
    /// Log-probability of the token.
    log_prob: f32,
}

/// The search for one sample's answer.
///
/// Of `width` places, every answer that ends takes one for good; the search is over when none is left.
struct Beam {
    width: usize,
    /// For each step and sequence: the sequence it continues, its token, the token's log-probability.
    trace: Vec<Vec<(usize, u32, f32)>>,
    /// Log-probability of each sequence that goes on, best first.
    totals: Vec<f32>,
    best: Generated,
    best_score: f64,
}

impl Beam {
    fn new(width: usize) -> Beam {
        Beam { width, trace: Vec::new(), totals: vec![0.0], best: Generated::default(), best_score: f64::NEG_INFINITY }
    }

    /// Takes the best continuations, best first.
    fn advance(&mut self, candidates: &[Candidate], eos_id: u32, penalty: f64) {
        let mut step = Vec::new();
        self.totals.clear();
        for candidate in &candidates[..candidates.len().min(self.width)] {
            if candidate.token != eos_id {
                step.push((candidate.slot, candidate.token, candidate.log_prob));
                self.totals.push(candidate.total);
                continue;
            }
            let mut answer = self.answer(candidate.slot);
            answer.log_probs.push(candidate.log_prob);
            answer.finished = true;
            self.finish(answer, penalty);
            self.width -= 1;
        }
        self.trace.push(step);
    }

    /// What sequence `slot` says so far.
    fn answer(&self, mut slot: usize) -> Generated {
        let mut answer = Generated::default();
        for step in self.trace.iter().rev() {
            let (before, token, log_prob) = step[slot];
            answer.ids.push(token);
            answer.log_probs.push(log_prob);
            slot = before;
        }
        answer.ids.reverse();
        answer.log_probs.reverse();
        answer
    }

    /// Keeps the answer if it is the best so far.
    fn finish(&mut self, answer: Generated, penalty: f64) {
        let total: f64 = answer.log_probs.iter().copied().map(f64::from).sum();
        let score = total / (answer.log_probs.len() as f64).powf(penalty);
        if score > self.best_score || self.best.log_probs.is_empty() {
            (self.best, self.best_score) = (answer, score);
        }
    }

    /// Whether a sequence that goes on could still end better than the best answer: its total can only fall, so its
    /// score is greatest with nothing more lost, at the next token or at the limit.
    fn can_improve(&self, limit: usize, penalty: f64) -> bool {
        let Some(&best) = self.totals.first() else { return false };
        let lengths = [self.trace.len() + 1, limit];
        self.width > 0
            && lengths.into_iter().any(|length| f64::from(best) / (length as f64).powf(penalty) > self.best_score)
    }
}

/// The best answer of each of B embeddings.
pub(super) fn search<S: Speaker>(
    speaker: &S,
    embeddings: &[&[f32]],
    request: Request<'_>,
    limit: usize,
) -> Result<Vec<Generated>, Error> {
    let (beams_per_sample, penalty) = (request.config.beams, request.config.length_penalty);
    let mut beams: Vec<Beam> = embeddings.iter().map(|_| Beam::new(beams_per_sample)).collect();
    let mut live: Vec<usize> = (0..beams.len()).collect();
    let mut state = speaker.prefill(embeddings)?;
    let mut ids = vec![request.bos_id; live.len()];
    for _ in 0..limit {
        let logits = speaker.step(&ids, &mut state)?;
        demand_finite(logits)?;
        // The sequences of each live sample lie one after the other; `first` is where they begin.
        let (mut rows, mut first) = (Vec::new(), 0);
        ids.clear();
        live.retain(|&sample| {
            let beam = &mut beams[sample];
            let n = beam.totals.len();
            let range = first * speaker.vocab_size()..(first + n) * speaker.vocab_size();
            let candidates = best(&logits[range], &beam.totals, beams_per_sample);
            beam.advance(&candidates, request.eos_id, penalty);
            let goes_on = beam.can_improve(limit, penalty);
            if goes_on && let Some(step) = beam.trace.last() {
                rows.extend(step.iter().map(|&(slot, _, _)| first + slot));
                ids.extend(step.iter().map(|&(_, token, _)| token));
            }
            first += n;
            goes_on
        });
        if live.is_empty() {
            break;
        }
        speaker.select(&mut state, &rows)?;
    }
    Ok(beams.into_iter().map(|beam| closed(beam, penalty)).collect())
}

/// The best answer; where none has ended, the best of the sequences that were going on.
fn closed(mut beam: Beam, penalty: f64) -> Generated {
    if !beam.best.finished {
        for slot in 0..beam.totals.len() {
            let answer = beam.answer(slot);
            beam.finish(answer, penalty);
        }
    }
    beam.best
}

/// The `n` best continuations of the sequences with these totals, best first; `logits` is (sequences, V).
fn best(logits: &[f32], totals: &[f32], n: usize) -> Vec<Candidate> {
    let vocab = logits.len() / totals.len().max(1);
    let mut found: Vec<Candidate> = Vec::new();
    for (slot, (logits, &before)) in logits.chunks_exact(vocab.max(1)).zip(totals).enumerate() {
        let normalizer = log_sum_exp(logits);
        for (token, &logit) in logits.iter().enumerate() {
            let log_prob = log_prob(logit, normalizer);
            let total = before + log_prob;
            let is_worse = |other: &Candidate| other.total.total_cmp(&total) != Ordering::Less;
            if found.len() >= n && found.last().is_some_and(is_worse) {
                continue;
            }
            let place = found.partition_point(is_worse);
            found.insert(place, Candidate { total, slot, token: id(token), log_prob });
            found.truncate(n);
        }
    }
    found
}
