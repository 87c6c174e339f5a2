//! `kore-vljepa ask`: questions about an image.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use kore_vljepa::files::demand_writable;
use kore_vljepa::image::load_image;
use kore_vljepa::memory::{Episode, Episodes, KnowledgeMemory, MemoryKind};
use kore_vljepa::npy::read_npy_vector;
use kore_vljepa::texts::{read_lines, strip};
use kore_vljepa::vljepa::{Answer, AnswererOptions, Image, Inject, Knowledge, Mamba3Jepa, Observation, Sample, Signal};
use serde::Serialize;

use crate::args::{GenerationArgs, ModelArgs, at_least_one};
use crate::output::{Failure, failure, print, print_json, printable, progress, shown, without_dots};

/// Bytes of a knowledge vector as JSON that are read at most; a longer one does not end as JSON does.
const MAX_VECTOR: u64 = 1 << 28;

/// Ask a trained model about an image: answer, confidence, confusion, nearest known answers.
#[derive(clap::Args)]
pub(crate) struct Ask {
    /// Questions; without one, the image is described.
    #[arg(value_name = "TEXT", allow_negative_numbers = true)]
    questions: Vec<String>,
    #[command(flatten)]
    model: ModelArgs,
    /// What the questions are about; they may also be asked without image.
    #[arg(long, value_name = "PATH")]
    image: Option<PathBuf>,
    /// Known answers, one a line in a text file; default: the frequent answers of the training data.
    #[arg(long, value_name = "PATH")]
    answers: Option<PathBuf>,
    /// Knowledge to look up when the model is confused: a text file, one text a line, or a saved memory.
    #[arg(long, value_name = "PATH")]
    memory: Option<PathBuf>,
    /// Write the memory with its embeddings to this .safetensors file, which opens faster.
    #[arg(long, value_name = "PATH")]
    save_memory: Option<PathBuf>,
    /// The right answer: add picture, question and this answer to --memory, a .safetensors file that is made if need be.
    #[arg(long, value_name = "TEXT", allow_negative_numbers = true)]
    remember: Option<String>,
    /// Inject this text, where the model is confused.
    #[arg(long, value_name = "TEXT", allow_negative_numbers = true)]
    knowledge: Option<String>,
    /// Inject this vector, where the model is confused: a .npy file, or a JSON list of numbers.
    #[arg(long, value_name = "PATH")]
    knowledge_vector: Option<PathBuf>,
    /// Inject the knowledge given where the model is confused, or always.
    #[arg(long, value_enum, default_value = "confused")]
    inject: InjectName,
    /// Show this many of the nearest known answers.
    #[arg(long, value_name = "INT", default_value_t = 5, allow_negative_numbers = true)]
    top: i64,
    /// Where a question comes several times, judge its confusion by the moving average over those turns.
    #[arg(long, overrides_with = "smooth")]
    smooth: bool,
    /// Print JSON.
    #[arg(long, overrides_with = "json")]
    json: bool,
    #[command(flatten)]
    generation: GenerationArgs,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum InjectName {
    Confused,
    Always,
}

/// An answer as JSON has it, in this order.
#[derive(Serialize)]
struct Values<'a> {
    question: &'a str,
    text: &'a str,
    confidence: f64,
    confusion: Option<f64>,
    smoothed_confusion: Option<f64>,
    threshold: Option<f64>,
    confused: Option<bool>,
    signal: Option<Signal>,
    confusion_after: Option<f64>,
    sure: Option<bool>,
    nearest: Vec<Near<'a>>,
    memory_used: Option<&'a str>,
    memory_kind: Option<MemoryKind>,
    knowledge_used: bool,
    warnings: &'a [String],
    remembered: Option<&'a str>,
}

#[derive(Serialize)]
pub(crate) struct Near<'a> {
    text: &'a str,
    cosine: f64,
}

impl Ask {
    pub(crate) fn run(&self) -> Result<(), Failure> {
        let generation = self.generation.config()?;
        let top = self.check()?;
        let remembers = self.remember.is_some();
        demand_writable(self.save_memory.iter().chain(self.memory.iter().filter(|_| remembers)))?;
        let picture = self.image.as_ref().map(load_image).transpose()?;
        let vector = self.knowledge_vector.as_deref().map(read_vector).transpose()?;
        let model = self.model.open()?;
        if remembers {
            model.demand_episodes()?;
        }
        let there = self.memory.as_ref().filter(|path| !remembers || path.exists());
        let memory = there.map(|path| KnowledgeMemory::open(&model, path, &mut progress("texts")));
        let memory = memory.transpose()?;
        let known_answers = self.answers.as_ref().map(|path| read_lines(path, "answer")).transpose()?;
        let inject = match self.inject {
            InjectName::Confused => Inject::Confused,
            InjectName::Always => Inject::Always,
        };
        let options =
            AnswererOptions { memory: memory.clone(), inject, known_answers, generation, smooth: self.smooth, top };
        let mut answerer = model.answerer(options)?;

        let image = picture.as_ref().map(Image::Picture);
        let mut samples: Vec<Sample<'_>> =
            self.questions.iter().map(|question| Sample { image, question: Some(question) }).collect();
        if samples.is_empty() {
            samples.push(Sample { image, question: None });
        }
        let knowledge = match (&self.knowledge, &vector) {
            (Some(text), _) => Some(Knowledge::Text(text)),
            (None, Some(vector)) => Some(Knowledge::Vector(vector)),
            (None, None) => None,
        };
        let answers = answerer.ask_many(&samples, knowledge, &mut progress("questions"))?;
        if let (Some(memory), Some(path)) = (&memory, &self.save_memory) {
            memory.save(path)?;
        }

        let prompt = model.config().query_prompt.as_str();
        let asked = samples.iter().map(|sample| sample.question.unwrap_or(prompt)).zip(&answers);
        if self.json {
            self.add_to_memory(&model, answerer.observed())?;
            let remembered = self.remember.as_deref();
            return print_json(
                &asked.map(|(question, answer)| values(question, answer, remembered)).collect::<Vec<_>>(),
            );
        }
        let panels: Vec<String> = asked
            .zip(&samples)
            .map(|((question, answer), sample)| self.panel(question, answer, answerer.can_look_up(sample.question)))
            .collect();
        print(&panels.join("\n"))?;
        match self.add_to_memory(&model, answerer.observed())? {
            Some(line) => print(&printable(&line)),
            None => Ok(()),
        }
    }

    /// Adds the only question with its right answer to the memory's file, if that is asked for; returns what to say of it.
    fn add_to_memory(&self, model: &Mamba3Jepa, observed: &[Observation]) -> Result<Option<String>, Failure> {
        let (Some(answer), Some(path)) = (&self.remember, &self.memory) else { return Ok(None) };
        let image = self.image.as_deref().map(shown);
        let episode = Episode { question: self.questions.first().cloned(), answer: answer.clone(), image };
        let line = format!("remembered in {}: {}", shown(path), episode.text());
        let episodes = Episodes::of(model, observed, vec![episode])?;
        KnowledgeMemory::empty(model).with_episodes(episodes).add_to(model, without_dots(path))?;
        Ok(Some(line))
    }

    /// Refuses to remember what is no answer to one question.
    fn check_remember(&self, answer: &str) -> Result<(), Failure> {
        if self.memory.as_ref().is_none_or(|path| path.extension().is_none_or(|suffix| suffix != "safetensors")) {
            return Err(failure("--remember needs the --memory to add to, a file whose name ends in .safetensors"));
        }
        if self.questions.len() > 1 {
            let count = self.questions.len();
            return Err(failure(format!(
                "--remember is the answer to one question, not to {count}: ask them one by one"
            )));
        }
        if strip(answer).is_empty() {
            return Err(failure("--remember is empty; give the right answer"));
        }
        Ok(())
    }

    /// Refuses contradictory or impossible settings; returns how many known answers to show.
    fn check(&self) -> Result<usize, Failure> {
        let has_knowledge = self.knowledge.is_some() || self.knowledge_vector.is_some();
        demand_question(&self.questions, self.image.as_deref())?;
        demand_words("--knowledge", self.knowledge.as_deref())?;
        if self.knowledge.is_some() && self.knowledge_vector.is_some() {
            return Err(failure("--knowledge and --knowledge-vector exclude each other; give one of them"));
        }
        if matches!(self.inject, InjectName::Always) && !has_knowledge {
            return Err(failure("--inject always: there is nothing to inject; give --knowledge or --knowledge-vector"));
        }
        if self.memory.is_some() && has_knowledge {
            return Err(failure(
                "--memory is looked up when there is no --knowledge and no --knowledge-vector; give one",
            ));
        }
        if let Some(answer) = &self.remember {
            self.check_remember(answer)?;
        }
        if let Some(path) = &self.save_memory {
            if self.memory.is_none() {
                return Err(failure("--save-memory needs a --memory to save"));
            }
            if path.extension().is_none_or(|suffix| suffix != "safetensors") {
                return Err(failure(format!("--save-memory {}: its name must end in .safetensors", shown(path))));
            }
        }
        at_least_one("top", self.top)
    }

    /// An answer for people: the question, what is said to it, and the facts about that.
    fn panel(&self, question: &str, answer: &Answer, looked_up: bool) -> String {
        let text = printable(&answer.text);
        let doubt = if answer.sure == Some(false) { "not sure: " } else { "" };
        let said = if text.is_empty() { "(nothing)" } else { &text };
        let mut panel = format!("{}\n  {doubt}{said}\n", printable(question));
        if let Some(note) = self.note(answer) {
            panel += &format!("  {note}\n");
        }
        panel += "\n";
        let mut fact = |name: &str, value: &str| panel += &format!("  {name:<21}   {}\n", printable(value));
        fact("confidence", &format!("{:.3}", answer.confidence));
        if let (Some(score), Some(smoothed)) = (answer.confusion, answer.smoothed_confusion) {
            let average = if smoothed == score {
                String::new()
            } else {
                format!(", {smoothed:.3} over the turns with this question")
            };
            let verdict = if answer.confused == Some(true) { "confused" } else { "not confused" };
            fact("confusion", &format!("{score:.3}{average} ({verdict})"));
            let used = match (&answer.memory_used, answer.memory_kind) {
                (Some(text), Some(MemoryKind::Episode)) => format!("used: {text} (episode)"),
                (Some(text), _) => format!("used: {text}"),
                (None, _) if looked_up && answer.confused == Some(true) => "nothing near enough".into(),
                (None, _) => "not used".into(),
            };
            fact("memory", &used);
        }
        if answer.knowledge_used {
            fact("knowledge", "used");
        }
        for (number, (text, cosine)) in answer.nearest.iter().enumerate() {
            fact(if number == 0 { "nearest known answers" } else { "" }, &format!("{cosine: >6.3}  {text}"));
        }
        panel
    }

    /// Why an answer is not sure, or knowledge that was given was not used.
    fn note(&self, answer: &Answer) -> Option<String> {
        let judged = if self.smooth { answer.smoothed_confusion } else { answer.confusion };
        let has_knowledge = self.knowledge.is_some() || self.knowledge_vector.is_some();
        if answer.sure == Some(false) {
            let reason = match answer.signal? {
                Signal::Answer => "the decoder hesitates over its answer",
                Signal::State => "this picture and question are not like those it knows",
                Signal::Before => "this question was confusing in the turns before",
            };
            return Some(format!("confusion {:.2} over the threshold {:.2}: {reason}", judged?, answer.threshold?));
        }
        (has_knowledge && !answer.knowledge_used)
            .then(|| "not confused: the knowledge was not used (--inject always uses it)".into())
    }
}

/// Refuses a text without words.
pub(crate) fn demand_words(flag: &str, text: Option<&str>) -> Result<(), Failure> {
    match text.filter(|text| strip(text).is_empty()) {
        Some(text) => Err(failure(format!("{flag} is empty: {text:?}; give a text, or leave it out"))),
        None => Ok(()),
    }
}

/// Refuses a text without words among several.
pub(crate) fn demand_words_in_each(kind: &str, texts: &[String]) -> Result<(), Failure> {
    match texts.iter().position(|text| strip(text).is_empty()) {
        Some(i) => Err(failure(format!("{kind} {} of {} is empty: {:?}", i + 1, texts.len(), texts[i]))),
        None => Ok(()),
    }
}

/// Refuses to ask nothing.
pub(crate) fn demand_question(questions: &[String], image: Option<&Path>) -> Result<(), Failure> {
    if questions.is_empty() && image.is_none() {
        return Err(failure("nothing to ask: give a question, such as \"What colour is the circle?\", or an --image"));
    }
    demand_words_in_each("question", questions)
}

/// The nearest known answers as JSON has them.
pub(crate) fn nearest(answer: &Answer) -> Vec<Near<'_>> {
    answer.nearest.iter().map(|(text, cosine)| Near { text, cosine: (*cosine).into() }).collect()
}

/// A vector (K,) of a `.npy` file or a JSON list.
fn read_vector(path: &Path) -> Result<Vec<f32>, Failure> {
    const EXPECTED: &str = "expected a .npy file with one row of numbers, or a JSON list of numbers";
    let name = shown(path);
    let numbers: Vec<f64> = if path.extension().is_some_and(|suffix| suffix == "npy") {
        read_npy_vector(path).map_err(|error| failure(format!("{error}; {EXPECTED}")))?
    } else {
        let mut text = Vec::new();
        let read = File::open(path).and_then(|file| file.take(MAX_VECTOR).read_to_end(&mut text));
        read.map_err(|error| failure(format!("{name}: cannot read the knowledge vector: {error}")))?;
        serde_json::from_slice(&text)
            .map_err(|error| failure(format!("{name}: not a knowledge vector ({error}); {EXPECTED}")))?
    };
    Ok(numbers.into_iter().map(|number| number as f32).collect()) // what is too large for float32 is refused as infinite
}

fn values<'a>(question: &'a str, answer: &'a Answer, remembered: Option<&'a str>) -> Values<'a> {
    Values {
        question,
        text: &answer.text,
        confidence: answer.confidence,
        confusion: answer.confusion.map(f64::from),
        smoothed_confusion: answer.smoothed_confusion.map(f64::from),
        threshold: answer.threshold.map(f64::from),
        confused: answer.confused,
        signal: answer.signal,
        confusion_after: answer.confusion_after.map(f64::from),
        sure: answer.sure,
        nearest: nearest(answer),
        memory_used: answer.memory_used.as_deref(),
        memory_kind: answer.memory_kind,
        knowledge_used: answer.knowledge_used,
        warnings: &answer.warnings,
        remembered,
    }
}
