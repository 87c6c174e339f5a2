//! Programs as tools, run without a shell and within limits.

use std::ffi::OsString;
use std::io;
use std::path::{self, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::str::Utf8Error;
use std::time::Duration;

use super::process::Running;
use super::{Tool, ToolError, ToolRequest};
use crate::files::system_text;
use crate::texts::{is_line_end, short_number, strip};

/// Bytes of the standard error that are kept.
const LAST_WORDS: usize = 1 << 16;

/// A program with arguments, in which `{question}` and `{image}` stand for what is asked (empty without); what it writes
/// to its standard output is the result.
///
/// No shell is involved. It is killed at its time limit and when it says too much, on Unix with all that it started (what
/// takes a session or a process group of its own escapes), and what it leaves behind when it ends is killed too. It
/// outlives a program that is itself killed: see [`stop_tools`](super::stop_tools).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CommandTool {
    /// The program, looked for on the path or, where it has a folder, from `folder`; and its arguments.
    pub command: Vec<String>,
    /// Where it runs.
    pub folder: PathBuf,
    /// How long it may take.
    pub timeout: Duration,
    /// Bytes that it may say.
    pub max_output: usize,
}

impl Tool for CommandTool {
    fn call(&self, request: &ToolRequest<'_>) -> Result<String, ToolError> {
        let words: Vec<OsString> = self.command.iter().map(|argument| filled(argument, request)).collect();
        let [program, arguments @ ..] = &words[..] else { return Err(ToolError("its command is empty".into())) };
        if words.iter().any(|word| word.as_encoded_bytes().contains(&0)) {
            return Err(ToolError("the question holds a zero character, which no program can be given".into()));
        }
        let has_folder = program.to_string_lossy().contains(path::is_separator);
        let mut command = Command::new(if has_folder { self.folder.join(program) } else { program.into() });
        command.args(arguments).current_dir(&self.folder);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let cannot_start =
            |error: io::Error| ToolError(format!("cannot start {}: {}", program.display(), system_text(&error)));
        let running = Running::start(&mut command, self.max_output, LAST_WORDS).map_err(cannot_start)?;
        let is_late = !running.wait(self.timeout);
        let ended = running.end();
        if is_late {
            return Err(ToolError(format!("it was stopped after {} seconds", short_number(self.timeout.as_secs_f64()))));
        }
        if ended.output.len() > self.max_output {
            return Err(ToolError(format!("its output is longer than {} bytes", self.max_output)));
        }
        let status = ended.status.map_err(|error| ToolError(format!("it is lost: {}", system_text(&error))))?;
        if !status.success() {
            return Err(ToolError(format!("it ended with {}{}", number(status), last_line(ended.complaint.get(..LAST_WORDS).unwrap_or(&ended.complaint)))));
        }
        let text = str::from_utf8(&ended.output).map_err(|error| {
            let (reason, at) = (reason(&ended.output, error), error.valid_up_to());
            ToolError(format!("its output is not UTF-8: {reason} at byte {at}"))
        })?;
        Ok(strip(text).to_owned())
    }
}

/// The argument with what is asked in it; what is filled in is not looked at again.
fn filled(argument: &str, request: &ToolRequest<'_>) -> OsString {
    let mut word = OsString::new();
    for (place, part) in argument.split("{question}").enumerate() {
        if place > 0 {
            word.push(request.question.unwrap_or_default());
        }
        for (place, part) in part.split("{image}").enumerate() {
            if let (1.., Some(image)) = (place, request.image) {
                word.push(image);
            }
            word.push(part);
        }
    }
    word
}

/// Its status, or its signal below zero.
fn number(status: ExitStatus) -> i32 {
    #[cfg(unix)]
    if let Some(signal) = std::os::unix::process::ExitStatusExt::signal(&status) {
        return -signal;
    }
    status.code().unwrap_or(-1)
}

/// The last line of what it complained about, if it did.
fn last_line(complaint: &[u8]) -> String {
    let text = String::from_utf8_lossy(complaint);
    let last = strip(&text).rsplit(is_line_end).next().unwrap_or_default();
    if last.is_empty() { String::new() } else { format!(": {last}") }
}

/// What is wrong with bytes that are not UTF-8, as Python says it.
fn reason(bytes: &[u8], error: Utf8Error) -> &'static str {
    match (error.error_len(), bytes.get(error.valid_up_to())) {
        (None, _) => "unexpected end of data",
        (_, Some(0xc2..=0xf4)) => "invalid continuation byte",
        _ => "invalid start byte",
    }
}

#[cfg(test)]
mod tests;
