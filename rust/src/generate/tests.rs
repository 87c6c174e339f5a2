use std::cell::RefCell;

use super::*;

const BOS: u32 = 0;
const EOS: u32 = 1;
const VOCAB: usize = 5;

/// A decoder whose logits depend on the embedding and on everything said so far, in a way that is easy to compute.
struct Toy {
    /// Rows of each step, to see that ended sequences leave the batch.
    rows: RefCell<Vec<usize>>,
    bad_after: usize,
    /// Added to the logit of eos.
    eager: f32,
}

impl Toy {
    fn new(eager: f32) -> Toy {
        Toy { rows: RefCell::default(), bad_after: usize::MAX, eager }
    }

    fn logits(&self, embedding: f32, said: &[u32]) -> [f32; VOCAB] {
        let mut sum = embedding;
        for &token in said {
            sum = (sum * 1.7 + token as f32 * 0.9).sin() * 3.0;
        }
        let mut logits: [f32; VOCAB] = std::array::from_fn(|i| ((sum + i as f32 * 2.1) * 1.3).sin() * 2.0);
        logits[EOS as usize] += self.eager;
        if said.len() > self.bad_after {
            logits[2] = f32::NAN;
        }
        logits
    }

    /// Log-probability of `ids` (eos included, if it is there) after bos, token by token.
    fn log_probs(&self, embedding: f32, ids: &[u32]) -> Vec<f32> {
        let mut said = vec![BOS];
        ids.iter()
            .map(|&token| {
                let logits = self.logits(embedding, &said);
                said.push(token);
                log_prob(logits[token as usize], log_sum_exp(&logits))
            })
            .collect()
    }
}

/// What each sequence has said, and the last logits.
struct ToyState {
    sequences: Vec<(f32, Vec<u32>)>,
    logits: Vec<f32>,
}

impl Speaker for Toy {
    type State = ToyState;

    fn vocab_size(&self) -> usize {
        VOCAB
    }

    fn prefill(&self, embeddings: &[&[f32]]) -> Result<ToyState, Error> {
        let sequences = embeddings.iter().map(|embedding| (embedding[0], Vec::new())).collect();
        Ok(ToyState { sequences, logits: Vec::new() })
    }

    fn step<'a>(&self, ids: &[u32], state: &'a mut ToyState) -> Result<&'a [f32], Error> {
        assert_eq!(ids.len(), state.sequences.len());
        self.rows.borrow_mut().push(ids.len());
        state.logits.clear();
        for (&token, (embedding, said)) in ids.iter().zip(&mut state.sequences) {
            said.push(token);
            state.logits.extend(self.logits(*embedding, said));
        }
        Ok(&state.logits)
    }

    fn select(&self, state: &mut ToyState, rows: &[usize]) -> Result<(), Error> {
        state.sequences = rows.iter().map(|&row| state.sequences[row].clone()).collect();
        Ok(())
    }
}

fn run(toy: &Toy, embeddings: &[f32], config: &GenerationConfig, max_tokens: usize) -> Vec<Generated> {
    let embeddings: Vec<[f32; 1]> = embeddings.iter().map(|&x| [x]).collect();
    let rows: Vec<&[f32]> = embeddings.iter().map(|row| &row[..]).collect();
    let request = Request { bos_id: BOS, eos_id: EOS, config, max_tokens, first_row: 7 };
    generate(toy, &rows, request).expect("finite")
}

fn said(answer: &Generated) -> Vec<u32> {
    answer.ids.iter().copied().chain(answer.finished.then_some(EOS)).collect()
}

const EMBEDDINGS: [f32; 7] = [0.0, 0.5, -1.3, 2.2, 3.7, -4.1, 9.9];

#[test]
fn greedy_takes_the_best_token_each_time_and_ended_answers_leave() {
    let toy = Toy::new(0.5);
    let answers = run(&toy, &EMBEDDINGS, &GenerationConfig::default(), 9);
    for (&embedding, answer) in EMBEDDINGS.iter().zip(&answers) {
        let mut tokens = vec![BOS];
        while tokens.len() <= 9 && tokens.last() != Some(&EOS) {
            tokens.push(id(argmax(&toy.logits(embedding, &tokens))));
        }
        assert_eq!(said(answer), tokens[1..]);
        assert_eq!(answer.log_probs, toy.log_probs(embedding, &tokens[1..]));
        assert_eq!(answer.finished, tokens.last() == Some(&EOS));
    }
    let rows = toy.rows.borrow();
    assert_eq!(rows[0], EMBEDDINGS.len());
    assert!(rows.is_sorted_by(|a, b| a >= b) && rows.last() < rows.first(), "{rows:?}");
    assert!(answers.iter().any(|answer| answer.finished));
}

#[test]
fn an_answer_is_the_same_alone_and_in_any_batch() {
    for config in [
        GenerationConfig::default(),
        GenerationConfig { method: Method::Beam, beams: 3, ..Default::default() },
        GenerationConfig { method: Method::Sample, temperature: 0.0, ..Default::default() },
    ] {
        let together = run(&Toy::new(0.0), &EMBEDDINGS, &config, 6);
        for (&embedding, answer) in EMBEDDINGS.iter().zip(&together) {
            assert_eq!(run(&Toy::new(0.0), &[embedding], &config, 6), std::slice::from_ref(answer), "{config:?}");
        }
    }
}

#[test]
fn samples_follow_the_probabilities_and_the_seed() {
    let toy = Toy::new(0.0);
    let config = GenerationConfig { method: Method::Sample, ..Default::default() };
    let n = 4000;
    let first: Vec<u32> = run(&toy, &vec![0.5; n], &config, 1).iter().map(|answer| said(answer)[0]).collect();
    for token in 0..VOCAB {
        let expected = toy.log_probs(0.5, &[id(token)])[0].exp();
        let share = first.iter().filter(|&&drawn| drawn == id(token)).count() as f32 / n as f32;
        assert!((share - expected).abs() < 0.03, "token {token}: {share} for {expected}");
    }
    let other = GenerationConfig { seed: 1, ..config.clone() };
    assert_eq!(run(&toy, &EMBEDDINGS, &config, 6), run(&toy, &EMBEDDINGS, &config, 6));
    assert_ne!(run(&toy, &EMBEDDINGS, &config, 6), run(&toy, &EMBEDDINGS, &other, 6));
}

/// Every answer of at most `limit` tokens, those cut off by the limit too.
fn all_answers(limit: usize) -> Vec<Vec<u32>> {
    let mut open = vec![vec![]];
    let mut closed = Vec::new();
    for _ in 0..limit {
        let mut next = Vec::new();
        for ids in open {
            for token in 0..id(VOCAB) {
                let longer = [&ids[..], &[token]].concat();
                if token == EOS { closed.push(longer) } else { next.push(longer) }
            }
        }
        open = next;
    }
    closed
}

#[test]
fn a_wide_beam_finds_the_best_answer_there_is() {
    let limit = 4;
    for penalty in [0.0, 0.7, 1.0, -0.5] {
        let config =
            GenerationConfig { method: Method::Beam, beams: 1000, length_penalty: penalty, ..Default::default() };
        for embedding in EMBEDDINGS {
            let toy = Toy::new(0.0);
            let score = |ids: &Vec<u32>| {
                let total: f64 = toy.log_probs(embedding, ids).into_iter().map(f64::from).sum();
                total / (ids.len() as f64).powf(penalty)
            };
            let best = all_answers(limit).into_iter().max_by(|a, b| score(a).total_cmp(&score(b))).expect("some");
            let found = run(&toy, &[embedding], &config, limit).remove(0);
            assert_eq!(said(&found), best, "penalty {penalty}, embedding {embedding}");
            assert_eq!(found.log_probs, toy.log_probs(embedding, &best));
        }
    }
}

#[test]
fn a_beam_of_one_is_greedy_and_ends_by_the_limit() {
    let config = GenerationConfig { method: Method::Beam, beams: 1, ..Default::default() };
    let beam = run(&Toy::new(-20.0), &EMBEDDINGS, &config, 6);
    assert_eq!(beam, run(&Toy::new(-20.0), &EMBEDDINGS, &GenerationConfig::default(), 6));
    assert!(beam.iter().all(|answer| !answer.finished && answer.ids.len() == 6));
    let short = GenerationConfig { max_tokens: Some(2), ..config };
    assert!(run(&Toy::new(-20.0), &EMBEDDINGS, &short, 6).iter().all(|answer| answer.ids.len() == 2));
}

#[test]
fn an_ended_answer_takes_its_place_in_the_beam_for_good() {
    // Width 2: at the first step eos and the best token; then only one sequence goes on.
    let toy = Toy::new(3.0);
    let config = GenerationConfig { method: Method::Beam, beams: 2, length_penalty: 9.0, ..Default::default() };
    run(&toy, &[0.5], &config, 5);
    assert!(toy.rows.borrow().iter().skip(1).all(|&rows| rows == 1), "{:?}", toy.rows.borrow());
}

#[test]
fn outputs_that_are_not_finite_are_an_error() {
    for method in [Method::Greedy, Method::Sample, Method::Beam] {
        let toy = Toy { bad_after: 2, ..Toy::new(-20.0) };
        let config = GenerationConfig { method, ..Default::default() };
        let request = Request { bos_id: BOS, eos_id: EOS, config: &config, max_tokens: 9, first_row: 0 };
        let error = generate(&toy, &[&[0.5]], request).expect_err("a NaN");
        assert!(matches!(error, Error::NotFinite(_)), "{error}");
    }
}

#[test]
fn confidence_is_the_geometric_mean() {
    let answer = Generated { log_probs: vec![0.5_f32.ln(), 0.125_f32.ln()], ..Default::default() };
    assert!((answer.confidence() - 0.25).abs() < 1e-7);
    assert!(run(&Toy::new(0.0), &[], &GenerationConfig::default(), 3).is_empty());
}

#[test]
fn log_probabilities_of_what_is_almost_certain_have_all_their_digits() {
    // -ln(1 + e^-15 + e^-18), and what is left of the others
    let logits = [18.0, 3.0, 0.0];
    let found = logits.map(|logit| log_prob(logit, log_sum_exp(&logits)));
    for (found, expected) in found.into_iter().zip([-3.211_322_5e-7_f32, -15.0, -18.0]) {
        assert!((found / expected - 1.0).abs() < 1e-6, "{found} {expected}");
    }
}
