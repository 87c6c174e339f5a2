//! `kore-vljepa bench`: how long a model takes, and how much memory.
//!
//! Everything that is compared is timed in turns, so that a busy machine slows all of it alike; medians count.

mod memory;
mod parts;
mod prefill;

use std::fs;
use std::path::PathBuf;
use std::time::Instant;

use kore_vljepa::image::Picture;
use kore_vljepa::linalg::instruction_set;
use kore_vljepa::vljepa::Sample;
use serde::Serialize;

use crate::args::{ModelArgs, at_least_one_and_at_most as count, thread_pool};
use crate::output::{Failure, Table, failure, grouped, print, print_json, progress, shown};
use parts::{Parts, files};
use prefill::{Prefill, measure, measure_apart};

const OPENINGS: usize = 5;
const MAX_NUMBERS: usize = 1 << 30; // of the tokens that the predictor reads
const MAX_TOKENS: usize = 1 << 16; // that it reads; each takes some 10 KiB and more
const MAX_POSITION: usize = 1 << 20; // in a text
const MAX_ROUNDS: usize = 10_000;
const QUESTION: &str = "What is in the picture?";

/// Time a model: opening, X-Encoder, predictor, tokens early and late in a text, whole answers; and its memory.
#[derive(clap::Args)]
pub(crate) struct Bench {
    #[command(flatten)]
    model: ModelArgs,
    /// Visual tokens that the predictor reads; default: those of one image.
    #[arg(long, value_name = "INT", allow_negative_numbers = true)]
    visual_tokens: Option<i64>,
    /// Tokens of the question it reads.
    #[arg(long, value_name = "INT", default_value_t = 16, allow_negative_numbers = true)]
    question_tokens: i64,
    /// Position of the early token.
    #[arg(long, value_name = "INT", default_value_t = 20, allow_negative_numbers = true)]
    early: i64,
    /// Position of the late token.
    #[arg(long, value_name = "INT", default_value_t = 2000, allow_negative_numbers = true)]
    late: i64,
    /// Tokens to time around each position.
    #[arg(long, value_name = "INT", default_value_t = 32, allow_negative_numbers = true)]
    window: i64,
    /// Rounds; in each everything runs once, and the medians over the rounds count.
    #[arg(long, value_name = "INT", default_value_t = 15, allow_negative_numbers = true)]
    rounds: i64,
    /// Visual tokens for which the predictor's time and memory are measured.
    #[arg(long, value_name = "INT", num_args = 0.., default_values_t = [256, 1024, 4096], allow_negative_numbers = true)]
    lengths: Vec<i64>,
    /// Measure only this of `lengths`, in this process; for `bench` itself.
    #[arg(long, value_name = "INT", hide = true)]
    only_prefill: Option<i64>,
    /// Print JSON.
    #[arg(long, overrides_with = "json")]
    json: bool,
}

/// The settings as counts.
struct Counts {
    visual: Option<usize>,
    question: usize,
    early: usize,
    late: usize,
    window: usize,
    rounds: usize,
    lengths: Vec<usize>,
}

/// What was measured. A part that was not exported is `None`, and so is memory where the system does not tell it.
#[derive(Serialize)]
struct Measured {
    weights: String,
    dtype: String,
    cpu: String,
    instruction_set: &'static str,
    threads: usize,
    rounds: usize,
    weights_bytes: u64,
    /// After opening the model and asking one question about a picture.
    peak_bytes: Option<u64>,
    open_seconds: f64,
    /// Reading the same files into memory.
    read_seconds: f64,
    x_encoder_seconds: Option<f64>,
    visual_tokens: usize,
    question_tokens: usize,
    predictor_seconds: f64,
    early: usize,
    late: usize,
    window: usize,
    token_seconds_early: Option<f64>,
    token_seconds_late: Option<f64>,
    /// Median over the rounds of late / early.
    late_to_early: Option<f64>,
    ask_seconds: f64,
    prefill: Vec<Prefill>,
}

/// What a whole model costs.
struct Whole {
    dtype: String,
    peak_bytes: Option<u64>,
    open_seconds: f64,
    read_seconds: f64,
    ask_seconds: f64,
}

/// What the parts of a model cost by themselves: seconds for each round.
#[derive(Default)]
struct Rounds {
    x_encoder: Vec<f64>,
    predictor: Vec<f64>,
    /// Of one token.
    early: Vec<f64>,
    late: Vec<f64>,
}

impl Bench {
    pub(crate) fn run(&self) -> Result<(), Failure> {
        let counts = self.counts()?;
        if let Some(length) = self.only_prefill {
            return print_json(&measure(&self.model, count("only-prefill", length, MAX_TOKENS)?, counts.question)?);
        }
        let pool = thread_pool(self.model.threads)?;
        let files = files(&self.model.weights, self.model.x_encoder.as_deref())?;
        let weights_bytes = files.iter().filter_map(|file| fs::metadata(file).ok()).map(|found| found.len()).sum();
        let whole = self.measure_whole(&files, counts.rounds)?;
        let mut parts = Parts::load(&self.model.weights, self.model.x_encoder.as_deref())?;
        let visual_tokens = counts.visual.unwrap_or_else(|| parts.visual_tokens());
        let rounds = pool.install(|| measure_parts(&mut parts, visual_tokens, &counts))?;
        drop(parts);
        let prefill = counts.lengths.iter().map(|&length| measure_apart(&self.model, length, counts.question));
        let prefill = prefill.collect::<Result<Vec<_>, _>>()?;
        let ratios: Vec<f64> = rounds.late.iter().zip(&rounds.early).map(|(late, early)| late / early).collect();
        let measured = Measured {
            weights: shown(&self.model.weights),
            dtype: whole.dtype,
            cpu: cpu(),
            instruction_set: instruction_set(),
            threads: pool.current_num_threads(),
            rounds: counts.rounds,
            weights_bytes,
            peak_bytes: whole.peak_bytes,
            open_seconds: whole.open_seconds,
            read_seconds: whole.read_seconds,
            x_encoder_seconds: median(&rounds.x_encoder),
            visual_tokens,
            question_tokens: counts.question,
            predictor_seconds: median(&rounds.predictor).unwrap_or(f64::NAN),
            early: counts.early,
            late: counts.late,
            window: counts.window,
            token_seconds_early: median(&rounds.early),
            token_seconds_late: median(&rounds.late),
            late_to_early: median(&ratios),
            ask_seconds: whole.ask_seconds,
            prefill,
        };
        if self.json { print_json(&measured) } else { print(&text(&measured)) }
    }

    fn counts(&self) -> Result<Counts, Failure> {
        let counts = Counts {
            visual: self.visual_tokens.map(|value| count("visual-tokens", value, MAX_TOKENS)).transpose()?,
            question: count("question-tokens", self.question_tokens, MAX_TOKENS)?,
            early: count("early", self.early, MAX_POSITION)?,
            late: count("late", self.late, MAX_POSITION)?,
            window: count("window", self.window, MAX_POSITION)?,
            rounds: count("rounds", self.rounds, MAX_ROUNDS)?,
            lengths: self.lengths.iter().map(|&value| count("lengths", value, MAX_TOKENS)).collect::<Result<_, _>>()?,
        };
        if counts.early < counts.window / 2 {
            return Err(failure(format!(
                "bench: a window of {} tokens around token {} starts before the text; choose a smaller --window or a \
                 later --early",
                counts.window, counts.early
            )));
        }
        if counts.late <= counts.early {
            return Err(failure(format!("bench: --late {} must come after --early {}", counts.late, counts.early)));
        }
        Ok(counts)
    }

    /// Opening, in turns with reading the same files; then whole questions. Memory is measured first, while there is
    /// nothing else in it.
    fn measure_whole(&self, files: &[PathBuf], rounds: usize) -> Result<Whole, Failure> {
        let peak_is_known = memory::forget_peak();
        let model = self.model.open()?;
        let size = model.config().vision.image_size;
        let picture = Picture::new(size, size, (0..size * size * 3).map(|i| (i % 251) as u8).collect())?;
        let sample = match model.has_x_encoder() {
            true => Sample::picture(&picture).asking(QUESTION),
            false => Sample::question(QUESTION),
        };
        model.ask(sample)?;
        let peak_bytes = memory::peak_bytes().filter(|_| peak_is_known);
        let dtype = model.dtype().to_owned();
        let ask_seconds = (0..rounds).map(|_| timed(|| model.ask(sample).map(drop))).collect::<Result<Vec<_>, _>>()?;
        drop(model);
        let (mut open, mut read) = (Vec::new(), Vec::new());
        for _ in 0..rounds.min(OPENINGS) {
            open.push(timed(|| self.model.open().map(drop))?);
            read.push(
                timed(|| files.iter().map(fs::read).collect::<Result<Vec<_>, _>>().map(drop))
                    .map_err(|error| failure(format!("{}: cannot be read: {error}", shown(&self.model.weights))))?,
            );
        }
        let seconds = |rounds: &[f64]| median(rounds).unwrap_or(f64::NAN);
        Ok(Whole {
            dtype,
            peak_bytes,
            open_seconds: seconds(&open),
            read_seconds: seconds(&read),
            ask_seconds: seconds(&ask_seconds),
        })
    }
}

/// X-Encoder, predictor, and both windows of tokens, in turns.
fn measure_parts(parts: &mut Parts, visual_tokens: usize, counts: &Counts) -> Result<Rounds, Failure> {
    let config = parts.config.clone();
    let pixels = numbers(3 * config.vision.image_size.pow(2));
    let visual = tokens(visual_tokens, config.vision.hidden_size)?;
    let query = tokens(counts.question, config.y_encoder.d_model())?;
    let starts = [counts.early, counts.late].map(|position| position - counts.window / 2);
    let spoken = parts.speak(&numbers(config.embed_dim), starts)?;
    let mut rounds = Rounds::default();
    let mut bar = progress("rounds");
    for round in 0..=counts.rounds {
        let x_encoder = timed(|| parts.look(&pixels))?;
        let predictor = timed(|| parts.predictor.predict(&visual, &query))?;
        let mut tokens = [0.0; 2];
        if let Some(spoken) = &spoken {
            for which in if round % 2 == 0 { [0, 1] } else { [1, 0] } {
                let mut start = spoken[which].clone();
                tokens[which] = timed(|| parts.speak_on(&mut start, counts.window))? / counts.window as f64;
            }
        }
        bar(round, counts.rounds);
        if round == 0 {
            continue; // to warm up
        }
        rounds.predictor.push(predictor);
        if parts.has_x_encoder() {
            rounds.x_encoder.push(x_encoder);
        }
        if spoken.is_some() {
            rounds.early.push(tokens[0]);
            rounds.late.push(tokens[1]);
        }
    }
    Ok(rounds)
}

fn timed<E>(run: impl FnOnce() -> Result<(), E>) -> Result<f64, E> {
    let start = Instant::now();
    run()?;
    Ok(start.elapsed().as_secs_f64())
}

fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.len() {
        0 => None,
        odd if odd % 2 == 1 => Some(sorted[middle]),
        _ => Some(f64::midpoint(sorted[middle - 1], sorted[middle])),
    }
}

/// `count` tokens of `width` numbers.
fn tokens(count: usize, width: usize) -> Result<Vec<f32>, Failure> {
    match count.checked_mul(width) {
        Some(len) if len <= MAX_NUMBERS => Ok(numbers(len)),
        _ => Err(failure(format!("bench: {count} tokens are too many"))),
    }
}

/// `n` numbers of about the size that activations have; what they are does not change how long anything takes.
fn numbers(n: usize) -> Vec<f32> {
    (0..n).map(|i| ((i * 7919) % 1009) as f32 / 504.5 - 1.0).collect()
}

fn cpu() -> String {
    let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    name.map_or_else(|| std::env::consts::ARCH.to_owned(), |(_, name)| name.to_owned())
}

fn text(measured: &Measured) -> String {
    let mut table = Table::left(["", "median", ""]);
    let seconds = |value: f64| if value < 1.0 { format!("{:.2} ms", value * 1e3) } else { format!("{value:.2} s") };
    let ratio = measured.open_seconds / measured.read_seconds;
    let note = format!("{ratio:.2} times reading the same bytes ({})", seconds(measured.read_seconds));
    table.row(["opening the folder", &seconds(measured.open_seconds), &note]);
    let absent = || "not exported".to_owned();
    let or_absent = |value: Option<f64>| value.map_or_else(absent, seconds);
    table.row(["X-Encoder, one image", &or_absent(measured.x_encoder_seconds), ""]);
    let tokens = format!("{} visual and {} question tokens", measured.visual_tokens, measured.question_tokens);
    table.row(["predictor", &seconds(measured.predictor_seconds), &tokens]);
    for (position, value) in
        [(measured.early, measured.token_seconds_early), (measured.late, measured.token_seconds_late)]
    {
        let rate = value.map_or_else(String::new, |value| format!("{:.1} tokens a second", 1.0 / value));
        table.row([&format!("one token, around token {position}"), &or_absent(value), &rate]);
    }
    table.row(["a whole question", &seconds(measured.ask_seconds), ""]);
    let bytes =
        |value: Option<u64>| value.map_or("unknown".into(), |value| format!("{:.1} MiB", value as f64 / 1048576.0));
    let mut prefill = Table::new(["predictor reads visual tokens", "time", "peak memory"]);
    for found in &measured.prefill {
        prefill.row([grouped(found.visual_tokens as u64), seconds(found.seconds), bytes(found.peak_bytes)]);
    }
    let mut lines = vec![
        format!(
            "{}: {}, {}, {} threads, instruction set {}, medians of {} interleaved rounds\n",
            measured.weights, measured.dtype, measured.cpu, measured.threads, measured.instruction_set, measured.rounds
        ),
        table.to_string(),
        prefill.to_string(),
    ];
    if let Some(ratio) = measured.late_to_early {
        lines.push(format!("token {} takes {ratio:.3} times as long as token {}", measured.late, measured.early));
    }
    if let Some(peak) = measured.peak_bytes {
        let ratio = peak as f64 / measured.weights_bytes as f64;
        let weights = grouped(measured.weights_bytes);
        lines.push(format!(
            "opening it and asking a question takes {ratio:.2} times the weights' {weights} bytes of memory"
        ));
    }
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians() {
        assert_eq!(median(&[]), None);
        assert_eq!(median(&[3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), Some(2.5));
    }
}
