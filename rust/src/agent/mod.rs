//! An agent: it looks, and where it is confused it calls a tool, is told what that says, and looks again.
//!
//! The states are the predictor's; what a tool says is injected into them ([`StateInjector`](crate::recursion::StateInjector)),
//! and whether it answers the question is judged ([`KnowledgeProbe`](crate::recursion::KnowledgeProbe)). What does not
//! answer is put back.

mod command;
mod file;
mod process;
mod tools;
mod trace;

use std::collections::HashSet;
use std::path::{self, Path, PathBuf};

pub use command::CommandTool;
pub use file::read_tools;
pub use process::stop_tools;
pub use tools::{Tool, ToolError, ToolRegistry, ToolRequest};
pub use trace::{AgentAnswer, Step, Stop};

use crate::config::MEMORY_TOOL;
use crate::error::Error;
use crate::generate::argmax;
use crate::texts::strip;
use crate::vljepa::{Answerer, Image, Knowledge, Sample, Turn};

/// Calls for one question, unless [`Mamba3Agent::max_rounds`] says otherwise.
pub const MAX_ROUNDS: usize = 3;

/// A tool that the selector finds less likely is not called.
const LEAST_PROBABILITY: f64 = 0.1;

/// What a tool says is put back, if it is less likely to answer the question.
const LEAST_ANSWER: f32 = 0.5;

/// Asks an [`Answerer`], and tools where it is confused.
///
/// The memory of the answerer, if it has one, is the tool "memory". Each tool is called at most once for a question: of
/// those that are there, the one that the selector finds most likely, unless its probability is less than 0.1. A model
/// without selector, or of whose tools none is there, tries all in their order, the memory first.
///
/// ```no_run
/// use kore_vljepa::agent::{Mamba3Agent, ToolError, ToolRegistry, ToolRequest};
/// use kore_vljepa::vljepa::{AnswererOptions, Mamba3Jepa, Sample};
///
/// # fn main() -> Result<(), kore_vljepa::Error> {
/// let model = Mamba3Jepa::from_dir("weights/")?;
/// let mut tools = ToolRegistry::new();
/// tools.add("clock", |request: &ToolRequest<'_>| match request.question {
///     Some(question) if question.contains("time") => Ok("noon".into()),
///     Some(_) => Ok(String::new()), // nothing to say
///     None => Err(ToolError("it needs a question".into())),
/// })?;
/// let mut agent = Mamba3Agent::new(model.answerer(AnswererOptions::default())?, tools)?;
/// let found = agent.run(Sample::file("photo.jpg").asking("What time is it?"))?;
/// println!("{} ({:?})", found.answer.text, found.tools);
/// # Ok(())
/// # }
/// ```
pub struct Mamba3Agent<'m> {
    answerer: Answerer<'m>,
    tools: ToolRegistry,
    max_rounds: usize,
}

/// What a tool said: its text is injected, or of an episode of the memory the answer.
struct Told {
    text: String,
    /// Of what the memory recalled, (E,).
    embedding: Option<Vec<f32>>,
}

impl Told {
    fn knowledge(&self) -> Knowledge<'_> {
        self.embedding.as_deref().map_or(Knowledge::Text(&self.text), Knowledge::Vector)
    }
}

impl<'m> Mamba3Agent<'m> {
    /// An agent that calls these tools, and the memory of the answerer.
    ///
    /// # Errors
    /// [`Error::Absent`]: the model has no recursion part, and so never knows that it needs help.
    pub fn new(answerer: Answerer<'m>, tools: ToolRegistry) -> Result<Mamba3Agent<'m>, Error> {
        if answerer.model().recursion().is_none() {
            return Err(Error::Absent(
                "the model has no confusion monitor and no state injector, so it cannot know when to call a tool: phase 3 \
                 (train_agent.py) trains them"
                    .into(),
            ));
        }
        Ok(Mamba3Agent { answerer, tools, max_rounds: MAX_ROUNDS })
    }

    /// The same with at most this many calls for one question.
    #[must_use]
    pub fn max_rounds(self, max_rounds: usize) -> Mamba3Agent<'m> {
        Mamba3Agent { max_rounds, ..self }
    }

    /// Answers one question. Of a tool that fails the trace says how; the agent goes on without it.
    ///
    /// # Errors
    /// As [`Answerer::ask_many`].
    pub fn run(&mut self, sample: Sample<'_>) -> Result<AgentAnswer, Error> {
        let mut turn = self.answerer.observe(sample)?;
        let mut trace = vec![Step::seen(&turn.answer)];
        let mut called: Vec<String> = Vec::new();
        let mut said = HashSet::new();
        let image = path_of(sample.image);
        let stopped = loop {
            if turn.answer.sure == Some(true) {
                break Stop::Sure;
            }
            let Some(choice) = self.choice(&turn, &called)? else { break Stop::NoTool };
            if called.len() == self.max_rounds {
                break Stop::Rounds;
            }
            let (tool, probability) = choice;
            let (told, error) = match self.call(&tool, &turn, image.as_deref())? {
                Ok(told) => (told, None),
                Err(ToolError(reason)) => (None, Some(reason)),
            };
            called.push(tool.clone());
            let result = told.as_ref().map(|told| told.text.clone());
            trace.push(Step::Call { tool, probability, result, error });
            let Some(told) = told else { continue };
            if !said.insert(told.text.clone()) {
                break Stop::NothingNew;
            }
            let after = self.answerer.told(&turn, told.knowledge())?;
            let kept = after.told_answers.is_none_or(|probability| probability >= LEAST_ANSWER);
            trace.push(Step::Inject { knowledge: told.text, answers: after.told_answers, kept });
            if kept {
                turn = after;
                trace.push(Step::seen(&turn.answer));
            }
        };
        let prompt = self.answerer.model().config().query_prompt.as_str();
        let question = sample.question.unwrap_or(prompt).to_owned();
        Ok(AgentAnswer { question, answer: turn.answer, stopped, tools: called, trace })
    }

    /// The next tool with its probability; `None` if there is none to call.
    fn choice(&self, turn: &Turn, called: &[String]) -> Result<Option<(String, Option<f32>)>, Error> {
        let memory = self.answerer.has_memory().then_some(MEMORY_TOOL);
        let there: Vec<&str> = memory.into_iter().chain(self.tools.names()).collect();
        let left: Vec<&str> = there.iter().copied().filter(|&name| called.iter().all(|other| other != name)).collect();
        let model = self.answerer.model();
        let known = &model.config().recursion.tools;
        let selector = model.recursion().and_then(|recursion| recursion.tool_selector.as_ref());
        let Some(selector) = selector.filter(|_| known.iter().any(|name| there.contains(&name.as_str()))) else {
            return Ok(left.first().map(|&name| (name.to_owned(), None)));
        };
        let scores = selector.score(&turn.pooled)?;
        let probability = |name: &str| known.iter().position(|other| other == name).map_or(0.0, |place| scores[place]);
        let probabilities: Vec<f32> = left.iter().map(|name| probability(name)).collect();
        let best = argmax(&probabilities);
        let likely = probabilities.get(best).filter(|&&probability| f64::from(probability) >= LEAST_PROBABILITY);
        Ok(likely.map(|&probability| (left[best].to_owned(), Some(probability))))
    }

    /// What a tool says; `None` if it has nothing to say.
    fn call(&self, name: &str, turn: &Turn, image: Option<&Path>) -> Result<Result<Option<Told>, ToolError>, Error> {
        let Some(tool) = self.tools.get(name) else {
            let found = self.answerer.recalled(turn)?;
            return Ok(Ok(found.map(|found| Told { text: found.text, embedding: Some(found.embedding.to_vec()) })));
        };
        let said = tool.call(&ToolRequest { question: turn.question.as_deref(), image });
        Ok(said.map(|said| {
            let text = strip(&said);
            (!text.is_empty()).then(|| Told { text: text.to_owned(), embedding: None })
        }))
    }
}

/// Where a picture lies, if it lies in a file.
fn path_of(image: Option<Image<'_>>) -> Option<PathBuf> {
    match image? {
        Image::File(file) => Some(path::absolute(file).unwrap_or_else(|_| file.to_path_buf())),
        Image::Picture(_) => None,
    }
}

#[cfg(test)]
mod tests;
