//! Arguments that several commands share.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use kore_vljepa::generate::{GenerationConfig, LARGEST, MAX_BEAMS, MAX_TOKENS, Method};
use kore_vljepa::texts::{distinct, read_lines};
use kore_vljepa::vljepa::{MAX_THREADS, Mamba3Jepa, Options};

use crate::output::{Failure, failure, print_warning};

/// Which model, and how it computes.
#[derive(clap::Args)]
pub(crate) struct ModelArgs {
    /// The folder that `mamba3-jepa export` wrote.
    #[arg(long, value_name = "DIR")]
    pub(crate) weights: PathBuf,
    /// Where to compute: cpu.
    #[arg(long, value_name = "STR", default_value = "cpu")]
    device: String,
    /// Threads to compute with; default: one for each core. The results do not depend on it.
    #[arg(long, value_name = "INT", allow_negative_numbers = true)]
    pub(crate) threads: Option<i64>,
    /// The X-Encoder, where the export has none: a transformers folder with V-JEPA 2, or an export's x_encoder.safetensors.
    #[arg(long, value_name = "PATH")]
    pub(crate) x_encoder: Option<PathBuf>,
}

impl ModelArgs {
    /// Opens the model.
    pub(crate) fn open(&self) -> Result<Mamba3Jepa, Failure> {
        self.open_with(Mamba3Jepa::options())
    }

    /// Opens the model with these options beside its own.
    pub(crate) fn open_with(&self, options: Options) -> Result<Mamba3Jepa, Failure> {
        check_device(&self.device)?;
        open_folder(&self.weights, self.threads, self.x_encoder.as_deref(), options)
    }
}

/// Opens the model in a folder; what it warns of goes to the standard error.
pub(crate) fn open_folder(
    folder: &Path,
    threads: Option<i64>,
    x_encoder: Option<&Path>,
    options: Options,
) -> Result<Mamba3Jepa, Failure> {
    let mut options = options.on_warning(print_warning);
    if let Some(count) = thread_count(threads)? {
        options = options.threads(count);
    }
    if let Some(path) = x_encoder {
        options = options.x_encoder(path);
    }
    Ok(options.open(folder)?)
}

/// How the Y-Decoder chooses its tokens.
#[derive(clap::Args)]
pub(crate) struct GenerationArgs {
    /// greedy: the most probable token each time; sample: draw it; beam: search for the most probable answer.
    #[arg(long, value_enum, default_value = "greedy")]
    method: MethodName,
    /// sample: divides the logits; below 1 the probable tokens get more probable, 0 is greedy.
    #[arg(long, value_name = "FLOAT", default_value_t = 1.0, allow_negative_numbers = true)]
    temperature: f64,
    /// sample: draw from the k most probable tokens only.
    #[arg(long, value_name = "INT", allow_negative_numbers = true)]
    top_k: Option<i64>,
    /// sample: draw from the fewest most probable tokens that have this probability together.
    #[arg(long, value_name = "FLOAT", allow_negative_numbers = true)]
    top_p: Option<f64>,
    /// beam: unfinished answers kept at a time.
    #[arg(long, value_name = "INT", default_value_t = 4, allow_negative_numbers = true)]
    beams: i64,
    /// beam: an answer's log-probability is divided by its number of tokens to this power; 0 prefers the most probable
    /// answer, 1 the one with the best mean.
    #[arg(long, value_name = "FLOAT", default_value_t = 0.0, allow_negative_numbers = true)]
    length_penalty: f64,
    /// Stop after this many tokens, the end mark included; default: as long as the model's longest answers.
    #[arg(long, value_name = "INT", allow_negative_numbers = true)]
    max_tokens: Option<i64>,
    /// sample: the same seed draws the same answers.
    #[arg(long, value_name = "INT", default_value_t = 0, allow_negative_numbers = true)]
    seed: i64,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum MethodName {
    Greedy,
    Sample,
    Beam,
}

impl GenerationArgs {
    /// The settings, checked.
    pub(crate) fn config(&self) -> Result<GenerationConfig, Failure> {
        let count = |name: &str, value: i64, most: usize| {
            let wrong = |_| failure(format!("generation: {name} is {value}, it must be at least 1 and at most {most}"));
            usize::try_from(value).map_err(wrong)
        };
        let config = GenerationConfig {
            method: match self.method {
                MethodName::Greedy => Method::Greedy,
                MethodName::Sample => Method::Sample,
                MethodName::Beam => Method::Beam,
            },
            temperature: self.temperature,
            top_k: self.top_k.map(|value| count("top_k", value, LARGEST)).transpose()?,
            top_p: self.top_p,
            beams: count("beams", self.beams, MAX_BEAMS)?,
            length_penalty: self.length_penalty,
            max_tokens: self.max_tokens.map(|value| count("max_tokens", value, MAX_TOKENS)).transpose()?,
            seed: self.seed.cast_unsigned(),
        };
        config.check()?;
        Ok(config)
    }
}

/// How many threads, if that is given.
fn thread_count(given: Option<i64>) -> Result<Option<usize>, Failure> {
    given.map(|value| at_least_one_and_at_most("threads", value, MAX_THREADS)).transpose()
}

/// Threads for what is computed outside a model.
pub(crate) fn thread_pool(threads: Option<i64>) -> Result<rayon::ThreadPool, Failure> {
    let threads = thread_count(threads)?.unwrap_or(0); // which is one for each core
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
    pool.map_err(|error| failure(format!("cannot start {threads} threads: {error}")))
}

/// The count, if it is one; the message names its flag.
pub(crate) fn at_least_one(flag: &str, value: i64) -> Result<usize, Failure> {
    at_least_one_and_at_most(flag, value, LARGEST)
}

/// The count, if it is one and no greater than `most`; the message names its flag.
pub(crate) fn at_least_one_and_at_most(flag: &str, value: i64, most: usize) -> Result<usize, Failure> {
    between(flag, value, 1, most)
}

/// The count, if it is in this range; the message names its flag.
pub(crate) fn between(flag: &str, value: i64, least: usize, most: usize) -> Result<usize, Failure> {
    match usize::try_from(value) {
        Ok(count) if (least..=most).contains(&count) => Ok(count),
        _ => Err(failure(format!("--{flag} {value}: must be at least {least} and at most {most}"))),
    }
}

/// What the names of text files end in.
const TEXT_FILES: [&str; 9] = ["txt", "text", "csv", "tsv", "json", "jsonl", "md", "lst", "names"];

/// The different texts given, or the lines of the file that the only one of them names; `what` is what a text is, `flag`
/// where they come from, for messages.
///
/// A file's name is never a text: neither a value that ends as those of text files do, nor one that stands alone and
/// begins with a folder that is there. In a file every line is a text.
pub(crate) fn texts_or_file(values: &[String], what: &str, flag: &str) -> Result<Vec<String>, Failure> {
    let is_alone = values.len() == 1;
    for value in values {
        let path = Path::new(value);
        if is_alone && path.is_file() {
            return Ok(read_lines(path, what)?);
        }
        if is_text_file(value) || (is_alone && is_path(value)) {
            let found = match (path.is_file(), path.exists()) {
                (true, _) => "a file must stand alone",
                (_, true) => "it is no file",
                _ => "there is no such file",
            };
            return Err(failure(format!(
                "--{flag} {value}: {found}; if it is the {what} itself, write it into a text file, one {what} a line, and \
                 give that as --{flag}"
            )));
        }
    }
    Ok(distinct(values.iter().cloned()))
}

fn is_text_file(value: &str) -> bool {
    value.rsplit_once('.').is_some_and(|(_, suffix)| TEXT_FILES.contains(&suffix.to_ascii_lowercase().as_str()))
}

/// Whether it reads as a path: "/my data/labels", or "data/labels" where there is such a folder; not "km/h".
fn is_path(value: &str) -> bool {
    let folder = value.rfind(std::path::is_separator).map_or("", |at| &value[..=at]);
    !folder.is_empty() && (Path::new(value).is_absolute() || Path::new(folder).is_dir())
}

/// The arguments with hyphens in the names of flags: `--image_dir` is `--image-dir`.
pub(crate) fn with_hyphens(arguments: impl IntoIterator<Item = OsString>) -> Vec<OsString> {
    let mut flags_end = false;
    arguments
        .into_iter()
        .map(|argument| {
            flags_end |= argument == "--";
            match argument.to_str() {
                Some(text) if text.starts_with("--") && !flags_end => {
                    let (name, value) = text.split_at(text.find('=').unwrap_or(text.len()));
                    (name.replace('_', "-") + value).into()
                }
                _ => argument,
            }
        })
        .collect()
}

/// Refuses a place to compute other than the CPU.
pub(crate) fn check_device(device: &str) -> Result<(), Failure> {
    match device {
        "cpu" => Ok(()),
        _ => Err(failure(format!("--device {device}: not available here; this program computes on the cpu"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_of_a_file_that_is_not_there_is_no_text() {
        let folder = tempfile::tempdir().unwrap();
        let there = folder.path().join("there.txt").to_str().unwrap().to_owned();
        let below = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
        std::fs::write(&there, "a\nnone.txt\na/b\n").unwrap();
        std::fs::write(below("there"), "c\n").unwrap();
        let read = |given: &[&str]| {
            let given: Vec<String> = given.iter().copied().map(String::from).collect();
            texts_or_file(&given, "label", "labels")
        };
        let long = "x".repeat(5000);
        for (given, expected) in [
            (&[there.as_str()][..], &["a", "none.txt", "a/b"][..]),
            (&[&below("there")], &["c"]),
            (&["red", "there", "red"], &["red", "there"]),
            (&["src"], &["src"]),
            (&["is it red and/or blue?"], &["is it red and/or blue?"]),
            (&["n/a", "TV/monitor"], &["n/a", "TV/monitor"]),
            (&["km/h"], &["km/h"]),
            (&["it costs 3.50"], &["it costs 3.50"]),
            (&["what is a .txt file?"], &["what is a .txt file?"]),
            (&[&long], &[&long]),
            (&[], &[]),
        ] {
            assert_eq!(read(given).unwrap(), expected);
        }
        for (given, complaint) in [
            (&["none.txt"][..], "none.txt: there is no such file"),
            (&["src/none"], "src/none: there is no such file"), // the tests run in the crate's folder
            (&["/my data/none"], "/my data/none: there is no such file"),
            (&["my none.CSV"], "my none.CSV: there is no such file"),
            (&["src/"], "src/: it is no file"),
            (&[&there, &there], &format!("{there}: a file must stand alone")),
            (&["red", "none.json"], "none.json: there is no such file"),
        ] {
            let Err(Failure::User(message)) = read(given) else { panic!("{given:?} must be refused") };
            let rest =
                "if it is the label itself, write it into a text file, one label a line, and give that as --labels";
            assert_eq!(message, format!("--labels {complaint}; {rest}"));
        }
    }

    #[test]
    fn underscores_in_names_of_flags_only() {
        let given = ["x", "--image_dir", "a_b", "--on_bad_sample=a_b", "-x_y", "--", "--a_b"].map(OsString::from);
        let expected = ["x", "--image-dir", "a_b", "--on-bad-sample=a_b", "-x_y", "--", "--a_b"].map(OsString::from);
        assert_eq!(with_hyphens(given), expected);
    }
}
