//! `kore-vljepa memory`: what a model is to look up when it is confused.

use std::path::{Path, PathBuf};

use clap::Subcommand;
use kore_vljepa::memory::{Changes, Entry, Episode, Episodes, KnowledgeMemory, MemoryKind};
use kore_vljepa::texts::read_lines;
use kore_vljepa::vljepa::{Image, Sample};
use serde::Serialize;

use crate::args::ModelArgs;
use crate::ask::{demand_words, demand_words_in_each};
use crate::output::{Failure, Table, failure, print, print_json, printable, progress, shown, without_dots};

/// What a model is to look up when it is confused: sentences, and pictures and questions with their answers.
#[derive(clap::Args)]
pub(crate) struct Memory {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Add(Add),
    List(List),
    Remove(Remove),
}

/// Remember sentences, and answers to questions about images, in a memory file for ask --memory.
#[derive(clap::Args)]
struct Add {
    /// The memory, a .safetensors file; it is made if it is not there.
    file: PathBuf,
    /// Sentences to remember.
    #[arg(value_name = "TEXT", allow_negative_numbers = true)]
    facts: Vec<String>,
    #[command(flatten)]
    model: ModelArgs,
    /// Remember every line of this text file.
    #[arg(long, value_name = "PATH")]
    texts: Option<PathBuf>,
    /// Remember what was asked about this image (--question) and what is right (--answer).
    #[arg(long, value_name = "PATH")]
    image: Option<PathBuf>,
    /// What was asked; without it, the prompt for describing an image.
    #[arg(long, value_name = "TEXT", allow_negative_numbers = true)]
    question: Option<String>,
    /// The right answer.
    #[arg(long, value_name = "TEXT", allow_negative_numbers = true)]
    answer: Option<String>,
    /// Print JSON.
    #[arg(long, overrides_with = "json")]
    json: bool,
}

/// What a memory file holds.
#[derive(clap::Args)]
struct List {
    /// The memory, a .safetensors file.
    file: PathBuf,
    /// Print JSON.
    #[arg(long, overrides_with = "json")]
    json: bool,
}

/// Take entries out of a memory file.
#[derive(clap::Args)]
struct Remove {
    /// The memory, a .safetensors file.
    file: PathBuf,
    /// Numbers of entries, as memory list gives them.
    #[arg(value_name = "NUMBER", allow_negative_numbers = true)]
    numbers: Vec<i64>,
    /// Remove what has this text; of an episode it is question and answer, as memory list shows it.
    #[arg(long, value_name = "TEXT", allow_negative_numbers = true)]
    text: Option<String>,
    /// Print JSON.
    #[arg(long, overrides_with = "json")]
    json: bool,
}

#[derive(Serialize)]
struct Added {
    file: String,
    added: usize,
    changed: usize,
    facts: usize,
    episodes: usize,
}

#[derive(Serialize)]
struct Removed<'a> {
    file: String,
    removed: &'a [Entry],
    facts: usize,
    episodes: usize,
}

impl Memory {
    pub(crate) fn run(&self) -> Result<(), Failure> {
        match &self.command {
            Command::Add(command) => command.run(),
            Command::List(command) => command.run(),
            Command::Remove(command) => command.run(),
        }
    }
}

impl Add {
    fn run(&self) -> Result<(), Failure> {
        self.check()?;
        let mut texts = self.facts.clone();
        if let Some(path) = &self.texts {
            texts.extend(read_lines(path, "text to remember")?);
        }
        let model = self.model.open()?;
        let mut new = match texts.is_empty() {
            true => KnowledgeMemory::empty(&model),
            false => KnowledgeMemory::build(&model, &texts, &mut progress("texts"))?,
        };
        if let Some(answer) = &self.answer {
            model.demand_episodes()?;
            let image = self.image.as_deref().map(Image::File);
            let seen = model.observe(&[Sample { image, question: self.question.as_deref() }])?;
            let image = self.image.as_deref().map(shown);
            let episode = Episode { question: self.question.clone(), answer: answer.clone(), image };
            new = new.with_episodes(Episodes::of(&model, &seen, vec![episode])?);
        }
        let (Changes { added, changed }, memory) = new.add_to(&model, without_dots(&self.file))?;
        let (facts, episodes) = counts(&memory);
        let file = shown(&self.file);
        if self.json {
            return print_json(&Added { file, added, changed, facts, episodes });
        }
        let held = held(&memory);
        print(&printable(&format!("{file}: {added} added, {changed} changed; now {held}")))
    }

    /// Refuses contradictory or impossible settings.
    fn check(&self) -> Result<(), Failure> {
        check_name(&self.file)?;
        let is_seen = self.image.is_some() || self.question.is_some();
        match (&self.answer, is_seen) {
            (None, true) => Err(failure("--image and --question are remembered with their --answer; give it")),
            (Some(_), false) => Err(failure("--answer: to what? Give an --image, a --question, or both")),
            (None, false) if self.facts.is_empty() && self.texts.is_none() => {
                Err(failure("nothing to remember: give sentences, --texts, or --image, --question and --answer"))
            }
            _ => Ok(()),
        }?;
        demand_words_in_each("sentence", &self.facts)?;
        demand_words("--question", self.question.as_deref())?;
        demand_words("--answer", self.answer.as_deref())
    }
}

impl List {
    fn run(&self) -> Result<(), Failure> {
        check_name(&self.file)?;
        let memory = KnowledgeMemory::read(without_dots(&self.file))?;
        let entries = memory.entries();
        if self.json {
            return print_json(&entries);
        }
        let mut text = String::new();
        if !entries.is_empty() {
            let mut table = Table::left(["number", "kind", "text", "image"]);
            for Entry { number, kind, text, image } in &entries {
                table.row([&number.to_string(), name(*kind), text, image.as_deref().unwrap_or("")]);
            }
            text = format!("{table}\n");
        }
        print(&format!("{text}{}", printable(&format!("{}: {}", shown(&self.file), held(&memory)))))
    }
}

impl Remove {
    fn run(&self) -> Result<(), Failure> {
        check_name(&self.file)?;
        if self.numbers.is_empty() == self.text.is_none() {
            return Err(failure("give the numbers of what to remove, or its --text"));
        }
        let path = without_dots(&self.file);
        let (removed, left) = KnowledgeMemory::remove_from(path, &self.numbers, self.text.as_deref())?;
        let ((facts, episodes), file) = (counts(&left), shown(&self.file));
        if self.json {
            return print_json(&Removed { file, removed: &removed, facts, episodes });
        }
        for Entry { number, kind, text, .. } in &removed {
            print(&printable(&format!("removed {} {number}: {text}", name(*kind))))?;
        }
        print(&printable(&format!("{file}: {}", held(&left))))
    }
}

fn check_name(file: &Path) -> Result<(), Failure> {
    if file.extension().is_none_or(|suffix| suffix != "safetensors") {
        return Err(failure(format!("{}: the name of a memory must end in .safetensors", shown(file))));
    }
    Ok(())
}

/// What a kind is called.
pub(crate) fn name(kind: MemoryKind) -> &'static str {
    match kind {
        MemoryKind::Fact => "fact",
        MemoryKind::Episode => "episode",
    }
}

fn counts(memory: &KnowledgeMemory) -> (usize, usize) {
    let facts = memory.texts().len();
    (facts, memory.len() - facts)
}

/// How much a memory holds, in words.
fn held(memory: &KnowledgeMemory) -> String {
    let (facts, episodes) = counts(memory);
    let some = |count: usize, kind: &str| format!("{count} {kind}{}", if count == 1 { "" } else { "s" });
    match (facts, episodes) {
        (0, 0) => "empty".into(),
        (facts, 0) => some(facts, "fact"),
        (0, episodes) => some(episodes, "episode"),
        (facts, episodes) => format!("{} and {}", some(facts, "fact"), some(episodes, "episode")),
    }
}
