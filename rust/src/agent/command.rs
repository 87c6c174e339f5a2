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
        if !running.wait(self.timeout) {
            return Err(ToolError(format!(
                "it was stopped after {} seconds",
                short_number(self.timeout.as_secs_f64())
            )));
        }
        let ended = running.end();
        if ended.output.len() > self.max_output {
            return Err(ToolError(format!("its output is longer than {} bytes", self.max_output)));
        }
        let status = ended.status.map_err(|error| ToolError(format!("it is lost: {}", system_text(&error))))?;
        if !status.success() {
            return Err(ToolError(format!(
                "it ended with {}{}",
                number(status),
                last_line(ended.complaint.get(..LAST_WORDS).unwrap_or(&ended.complaint))
            )));
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

#[cfg(all(test, unix))]
mod tests {
    use std::fs;
    use std::path::Path;
    use std::time::Instant;

    use super::*;

    fn tool(folder: &Path, command: &[&str]) -> CommandTool {
        let command = command.iter().copied().map(String::from).collect();
        CommandTool { command, folder: folder.to_path_buf(), timeout: Duration::from_secs(20), max_output: 1000 }
    }

    fn shell(folder: &Path, script: &str) -> CommandTool {
        tool(folder, &["sh", "-c", script])
    }

    fn call(tool: &CommandTool) -> Result<String, String> {
        tool.call(&ToolRequest { question: Some("?"), image: None }).map_err(|error| error.to_string())
    }

    #[test]
    fn a_command_is_given_question_and_image_and_no_shell() {
        let folder = tempfile::tempdir().unwrap();
        let script = r#"pwd; printf "%s|" "$@""#;
        let words = ["zero", "{question}", "at {image}!", "{question}{image}{question}", "{questio}"];
        let tool = tool(folder.path(), &[&["sh", "-c", script][..], &words].concat());
        let question = "a $HOME; `id` {image}?";
        let said = tool.call(&ToolRequest { question: Some(question), image: Some(Path::new("/a b.png")) }).unwrap();
        let (place, said) = said.split_once('\n').unwrap();
        assert_eq!(fs::canonicalize(place).unwrap(), fs::canonicalize(folder.path()).unwrap());
        assert_eq!(said, format!("{question}|at /a b.png!|{question}/a b.png{question}|{{questio}}|"));
        let said = tool.call(&ToolRequest { question: None, image: None }).unwrap();
        assert!(said.ends_with("\n|at !||{questio}|"), "{said}");
    }

    #[test]
    fn an_image_may_have_any_name() {
        use std::ffi::OsStr;
        use std::os::unix::ffi::OsStrExt;

        let word =
            filled("a{image}b", &ToolRequest { question: None, image: Some(Path::new(OsStr::from_bytes(b"\xff"))) });
        assert_eq!(word.as_bytes(), b"a\xffb");
    }

    #[test]
    fn a_command_that_fails_says_how_and_nothing_waits_for_it() {
        let folder = tempfile::tempdir().unwrap();
        for (script, message) in [
            ("echo first >&2; printf 'no such thing\\r\\n' >&2; exit 3", "it ended with 3: no such thing"),
            ("exit 1", "it ended with 1"),
            ("printf 'a\\377' >&2; exit 1", "it ended with 1: a\u{fffd}"),
            ("kill -9 $$", "it ended with -9"),
            ("printf '\\377'", "its output is not UTF-8: invalid start byte at byte 0"),
            ("head -c 1001 /dev/zero | tr '\\0' a", "its output is longer than 1000 bytes"),
            ("yes", "its output is longer than 1000 bytes"),
            ("yes >&2 & sleep 60", "it was stopped after 0.5 seconds"),
            ("sleep 60", "it was stopped after 0.5 seconds"),
            ("sleep 60 & sleep 60", "it was stopped after 0.5 seconds"),
        ] {
            let mut tool = shell(folder.path(), script);
            if script.contains("sleep") {
                tool.timeout = Duration::from_millis(500);
            }
            let start = Instant::now();
            assert_eq!(call(&tool), Err(message.to_owned()), "{script}");
            assert!(start.elapsed() < Duration::from_secs(15), "{script}");
        }
    }

    #[test]
    fn what_says_nothing_has_no_result_and_the_limit_itself_is_not_over_it() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(call(&shell(folder.path(), "echo")), Ok(String::new()));
        let said = call(&shell(folder.path(), "head -c 1000 /dev/zero | tr '\\0' a"));
        assert_eq!(said, Ok("a".repeat(1000)));
        assert_eq!(call(&shell(folder.path(), "cat; head -c 200000 /dev/zero >&2; echo done")), Ok("done".into()));
    }

    #[test]
    fn what_cannot_be_started_says_why() {
        use std::os::unix::fs::PermissionsExt;

        let folder = tempfile::tempdir().unwrap();
        let script = folder.path().join("say-it");
        fs::write(&script, "echo a shell ran it\n").unwrap();
        let start = |command: &[&str]| call(&tool(folder.path(), command)).unwrap_err();
        assert_eq!(start(&["no-such-program"]), "cannot start no-such-program: No such file or directory");
        assert_eq!(start(&["./say-it"]), "cannot start ./say-it: Permission denied");
        fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).unwrap();
        assert_eq!(start(&["./say-it"]), "cannot start ./say-it: Exec format error");
        assert_eq!(start(&["say-it"]), "cannot start say-it: No such file or directory", "it is not on the path");
        fs::write(&script, "#!/bin/sh\necho run from $PWD\n").unwrap();
        let said = call(&tool(folder.path(), &["./say-it"])).unwrap();
        assert_eq!(said, format!("run from {}", fs::canonicalize(folder.path()).unwrap().display()));
        assert_eq!(start(&["echo", "a\0b"]), "the question holds a zero character, which no program can be given");
        let gone = tool(&folder.path().join("gone"), &["echo"]);
        assert_eq!(call(&gone).unwrap_err(), "cannot start echo: No such file or directory");
    }

    #[test]
    fn what_a_command_leaves_behind_ends_with_it() {
        let folder = tempfile::tempdir().unwrap();
        let script = "(while :; do echo >> alive; sleep 0.02; done) & while [ ! -s alive ]; do :; done; echo here";
        assert_eq!(call(&shell(folder.path(), script)), Ok("here".into()));
        let written = || fs::metadata(folder.path().join("alive")).unwrap().len();
        std::thread::sleep(Duration::from_millis(200)); // what is killed may be writing its last
        let before = written();
        std::thread::sleep(Duration::from_millis(300));
        assert_eq!(written(), before, "it goes on");
    }

    #[cfg(target_os = "linux")] // others have no setsid
    #[test]
    fn what_escapes_does_not_hold_the_result_back() {
        let folder = tempfile::tempdir().unwrap();
        let start = Instant::now();
        let said = call(&tool(folder.path(), &["sh", "-c", "setsid sleep 5 & sleep 0.2; echo here"]));
        assert_eq!(said, Ok("here".into()));
        assert!(start.elapsed() < Duration::from_secs(4));
    }

    #[test]
    fn what_is_no_utf8_is_told_as_in_python() {
        for (bytes, message) in [
            (&b"\xff"[..], "invalid start byte at byte 0"),
            (b"\x80", "invalid start byte at byte 0"),
            (b"a\xc0\x80", "invalid start byte at byte 1"),
            (b"\xc1", "invalid start byte at byte 0"),
            (b"\xf5\x80", "invalid start byte at byte 0"),
            (b"ab\xc3", "unexpected end of data at byte 2"),
            (b"\xc3(", "invalid continuation byte at byte 0"),
            (b"\xe2\x82", "unexpected end of data at byte 0"),
            (b"\xe2\x82(", "invalid continuation byte at byte 0"),
            (b"\xe2(", "invalid continuation byte at byte 0"),
            (b"\xe0\x80\x80", "invalid continuation byte at byte 0"),
            (b"\xe0\x80", "invalid continuation byte at byte 0"),
            (b"\xe0", "unexpected end of data at byte 0"),
            (b"\xed\xa0\x80", "invalid continuation byte at byte 0"),
            (b"\xed\xa0", "invalid continuation byte at byte 0"),
            (b"\xf0\x9f\x98", "unexpected end of data at byte 0"),
            (b"\xf0\x9f\x98x", "invalid continuation byte at byte 0"),
            (b"\xf0\x80\x80\x80", "invalid continuation byte at byte 0"),
            (b"\xf4\x90\x80\x80", "invalid continuation byte at byte 0"),
            (b"\xf4\x90", "invalid continuation byte at byte 0"),
            (b"\xf4", "unexpected end of data at byte 0"),
            (b"\xc3\xa9\xe6\x97", "unexpected end of data at byte 2"),
            (b"\xc3\xa9\xff", "invalid start byte at byte 2"),
        ] {
            let error = str::from_utf8(bytes).unwrap_err();
            assert_eq!(format!("{} at byte {}", reason(bytes, error), error.valid_up_to()), message, "{bytes:?}");
        }
    }
}
