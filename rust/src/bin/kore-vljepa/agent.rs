//! `kore-vljepa agent`: questions about an image, with tools where the model is confused.

use std::path::PathBuf;

use kore_vljepa::agent::{AgentAnswer, MAX_ROUNDS, Mamba3Agent, Step, Stop, read_tools};
use kore_vljepa::files::demand_writable;
use kore_vljepa::image::load_image;
use kore_vljepa::memory::KnowledgeMemory;
use kore_vljepa::texts::read_lines;
use kore_vljepa::vljepa::{AnswererOptions, Image, Sample};
use serde::Serialize;

use crate::args::{GenerationArgs, ModelArgs, between};
use crate::ask::{Near, demand_question, nearest};
use crate::output::{Failure, print, print_json, printable, progress, write_json};

/// More are a mistake.
const MOST_ROUNDS: usize = 100;

/// Ask a trained model, which calls tools where it is confused: a memory, commands.
#[derive(clap::Args)]
pub(crate) struct Agent {
    /// Questions, each answered by itself; without one, the image is described.
    #[arg(value_name = "TEXT", allow_negative_numbers = true)]
    questions: Vec<String>,
    #[command(flatten)]
    model: ModelArgs,
    /// What the questions are about; they may also be asked without image.
    #[arg(long, value_name = "PATH")]
    image: Option<PathBuf>,
    /// A JSON file with tools to call: commands, run without a shell.
    #[arg(long, value_name = "PATH")]
    tools: Option<PathBuf>,
    /// The tool "memory": a text file, one text a line, or a saved memory.
    #[arg(long, value_name = "PATH")]
    memory: Option<PathBuf>,
    /// Known answers, one a line in a text file; default: the frequent answers of the training data.
    #[arg(long, value_name = "PATH")]
    answers: Option<PathBuf>,
    /// Call at most this many tools for a question.
    #[arg(long, value_name = "INT", default_value_t = MAX_ROUNDS as i64, allow_negative_numbers = true)]
    max_rounds: i64,
    /// Write every step to this JSON file.
    #[arg(long, value_name = "PATH")]
    trace: Option<PathBuf>,
    /// Print JSON.
    #[arg(long, overrides_with = "json")]
    json: bool,
    #[command(flatten)]
    generation: GenerationArgs,
}

/// An answer as JSON has it, in this order.
#[derive(Serialize)]
struct Values<'a> {
    question: &'a str,
    text: &'a str,
    confidence: f64,
    confused: Option<bool>,
    sure: Option<bool>,
    nearest: Vec<Near<'a>>,
    warnings: &'a [String],
    stopped: Stop,
    tools: &'a [String],
    trace: &'a [Step],
}

impl Agent {
    pub(crate) fn run(&self) -> Result<(), Failure> {
        let generation = self.generation.config()?;
        let max_rounds = between("max-rounds", self.max_rounds, 0, MOST_ROUNDS)?;
        demand_question(&self.questions, self.image.as_deref())?;
        demand_writable(&self.trace)?;
        self.image.as_ref().map(load_image).transpose()?; // what is wrong with it is said at once
        let tools = self.tools.as_ref().map(read_tools).transpose()?.unwrap_or_default();
        let model = self.model.open()?;
        let memory = self.memory.as_ref().map(|path| KnowledgeMemory::open(&model, path, &mut progress("texts")));
        let memory = memory.transpose()?;
        let known_answers = self.answers.as_ref().map(|path| read_lines(path, "answer")).transpose()?;
        let answerer = model.answerer(AnswererOptions { memory, known_answers, generation, ..Default::default() })?;
        let mut agent = Mamba3Agent::new(answerer, tools)?.max_rounds(max_rounds);

        let image = self.image.as_deref().map(Image::File);
        let questions: Vec<Option<&str>> = match &self.questions[..] {
            [] => vec![None],
            questions => questions.iter().map(|question| Some(question.as_str())).collect(),
        };
        let mut answered = Vec::new();
        for (number, question) in questions.into_iter().enumerate() {
            let found = agent.run(Sample { image, question })?;
            if !self.json {
                let gap = if number == 0 { "" } else { "\n" };
                print(&format!("{gap}{}", panel(&found)))?;
            }
            answered.push(found);
        }
        let values: Vec<Values<'_>> = answered.iter().map(values).collect();
        if let Some(path) = &self.trace {
            write_json(path, &values)?;
        }
        if self.json { print_json(&values) } else { Ok(()) }
    }
}

fn values(found: &AgentAnswer) -> Values<'_> {
    let answer = &found.answer;
    Values {
        question: &found.question,
        text: &answer.text,
        confidence: answer.confidence,
        confused: answer.confused,
        sure: answer.sure,
        nearest: nearest(answer),
        warnings: &answer.warnings,
        stopped: found.stopped,
        tools: &found.tools,
        trace: &found.trace,
    }
}

/// An answer for people: the question, what is said to it, the steps to that, and why they ended.
fn panel(found: &AgentAnswer) -> String {
    let text = printable(&found.answer.text);
    let doubt = if found.answer.sure == Some(false) { "not sure: " } else { "" };
    let said = if text.is_empty() { "(nothing)" } else { &text };
    let mut panel = format!("{}\n  {doubt}{said}\n\n", printable(&found.question));
    for step in &found.trace {
        panel += &format!("  {}\n", printable(&words(step)));
    }
    panel + "  " + why(found.stopped)
}

fn why(stopped: Stop) -> &'static str {
    match stopped {
        Stop::Sure => "not confused",
        Stop::NoTool => "confused, and no tool is left that is likely to help",
        Stop::NothingNew => "confused, and a tool said what was said before",
        Stop::Rounds => "confused, and as many tools were called as --max-rounds allows",
    }
}

/// A step in a line.
fn words(step: &Step) -> String {
    match step {
        Step::Observe { answer, confusion, .. } => {
            let said = if answer.is_empty() { "(nothing)" } else { answer };
            format!("looks: {said}, confusion {:.3}", confusion.unwrap_or_default())
        }
        Step::Call { tool, probability, result, error } => {
            let likely = probability.map(|probability| format!(" ({probability:.3})")).unwrap_or_default();
            let said = error.as_deref().or(result.as_deref()).unwrap_or("nothing to say");
            format!("calls {tool}{likely}: {said}")
        }
        Step::Inject { answers, kept, .. } => {
            let likely = answers.map(|answers| format!(", answers the question {answers:.3}")).unwrap_or_default();
            format!("is told that{likely}{}", if *kept { "" } else { ": put back" })
        }
    }
}
