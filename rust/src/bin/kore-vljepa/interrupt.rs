//! Ctrl-C, SIGTERM, and on Linux SIGHUP, which comes when a terminal is closed: the program ends at once, and neither a
//! half-written file nor a running tool stays.

use std::fs;
use std::io;
use std::process::exit;
use std::thread;

use kore_vljepa::agent::stop_tools;
use kore_vljepa::files::abandon_writes;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

/// From now on each of these signals ends running tools, removes unfinished files and ends the program with 128 + its
/// number, as shells count it.
pub(crate) fn leave_nothing_behind() -> io::Result<()> {
    let mut signals = Signals::new([SIGINT, SIGTERM])?;
    if hears_hangup() {
        signals.add_signal(SIGHUP)?;
    }
    thread::Builder::new().name("signals".into()).spawn(move || {
        if let Some(signal) = signals.forever().next() {
            stop_tools();
            abandon_writes();
            exit(128 + signal);
        }
    })?;
    Ok(())
}

/// Whether SIGHUP would end the program: not under `nohup`, which has it ignored. Known on Linux only.
fn hears_hangup() -> bool {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let ignored = ignored.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    ignored.is_some_and(|mask| mask >> (SIGHUP - 1) & 1 == 0)
}

#[cfg(test)]
mod tests {
    use std::ffi::OsString;
    use std::path::Path;
    use std::process::{Child, Command};
    use std::time::{Duration, Instant};

    use kore_vljepa::agent::{CommandTool, Tool, ToolRequest};
    use kore_vljepa::files::write_whole;

    use super::*;

    const OUTPUT: &str = "KORE_VLJEPA_INTERRUPTED_OUTPUT";

    /// Each with the status that it ends the program with; SIGHUP where whoever runs the tests does not have it ignored.
    fn signals() -> Vec<(&'static str, i32)> {
        let hangup = hears_hangup().then_some(("HUP", 129));
        [("INT", 130), ("TERM", 143)].into_iter().chain(hangup).collect()
    }

    /// A program that writes half a file, for ever.
    fn write_half(path: OsString) {
        leave_nothing_behind().unwrap();
        let written = write_whole(path.as_ref(), |out| {
            out.write_all(&[7; 1 << 16])?;
            loop {
                thread::park();
            }
        });
        unreachable!("{written:?}");
    }

    /// Of the files in a folder.
    fn sizes_in(folder: &Path) -> impl Iterator<Item = u64> {
        fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().metadata().unwrap().len())
    }

    /// The test `name` of this module as a program of its own, whose environment has `value` as `key`, behind the words of
    /// `launcher`.
    fn alone(launcher: &[&str], name: &str, key: &str, value: &Path) -> Command {
        let itself = std::env::current_exe().unwrap();
        let mut words = launcher.iter().map(OsString::from).chain([itself.into_os_string()]);
        let mut program = Command::new(words.next().unwrap());
        program.args(words).args(["--exact", &format!("interrupt::tests::{name}")]).env(key, value);
        program
    }

    fn wait_until(ready: impl Fn() -> bool, running: &mut Child) {
        let deadline = Instant::now() + Duration::from_secs(60);
        while !ready() {
            assert!(Instant::now() < deadline && running.try_wait().unwrap().is_none(), "it does not get there");
            thread::sleep(Duration::from_millis(5));
        }
    }

    fn send(signal: &str, running: &Child) {
        let sent = Command::new("kill").args([format!("-{signal}"), running.id().to_string()]).status().unwrap();
        assert!(sent.success());
    }

    /// The exit status of a program that is about to end.
    fn ended(running: &mut Child) -> Option<i32> {
        let deadline = Instant::now() + Duration::from_secs(60);
        while Instant::now() < deadline {
            if let Some(status) = running.try_wait().unwrap() {
                return status.code();
            }
            thread::sleep(Duration::from_millis(5));
        }
        running.kill().unwrap();
        panic!("it does not end");
    }

    /// Runs the program; once it is `ready` sends it the signal, and demands that it ends as that signal says.
    fn interrupt(mut program: Command, ready: impl Fn() -> bool, (signal, status): (&str, i32)) {
        let mut running = program.spawn().unwrap();
        wait_until(ready, &mut running);
        send(signal, &running);
        assert_eq!(ended(&mut running), Some(status));
    }

    #[test]
    fn a_signal_takes_the_half_written_file_along() {
        if let Some(path) = std::env::var_os(OUTPUT) {
            return write_half(path);
        }
        for signal in signals() {
            let folder = tempfile::tempdir().unwrap();
            let output = folder.path().join("output.npy");
            fs::write(&output, "as it was").unwrap();
            let sizes = || sizes_in(folder.path());
            let writes = || sizes().max() >= Some(1 << 16);
            interrupt(alone(&[], "a_signal_takes_the_half_written_file_along", OUTPUT, &output), writes, signal);
            assert_eq!(sizes().count(), 1, "something is left beside the output");
            assert_eq!(fs::read(&output).unwrap(), b"as it was");
        }
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_hangup_that_is_ignored_ends_nothing() {
        if let Some(path) = std::env::var_os(OUTPUT) {
            return write_half(path);
        }
        let folder = tempfile::tempdir().unwrap();
        let as_nohup = ["sh", "-c", "trap '' HUP; exec \"$0\" \"$@\""];
        let output = folder.path().join("output.npy");
        let mut running = alone(&as_nohup, "a_hangup_that_is_ignored_ends_nothing", OUTPUT, &output).spawn().unwrap();
        let sizes = || sizes_in(folder.path());
        wait_until(|| sizes().max() >= Some(1 << 16), &mut running);
        send("HUP", &running);
        thread::sleep(Duration::from_millis(300));
        assert!(running.try_wait().unwrap().is_none(), "it has ended");
        send("TERM", &running);
        assert_eq!(ended(&mut running), Some(143));
    }

    const FOLDER: &str = "KORE_VLJEPA_INTERRUPTED_TOOL";

    /// A program that waits for a tool, which writes for ever, as does what it started.
    fn call_tool(folder: OsString) {
        leave_nothing_behind().unwrap();
        let script = "(while :; do echo >> a; sleep 0.02; done) & while :; do echo >> b; sleep 0.02; done";
        let command = ["sh", "-c", script].map(String::from).to_vec();
        let tool = CommandTool { command, folder: folder.into(), timeout: Duration::from_secs(60), max_output: 1 };
        let said = tool.call(&ToolRequest { question: None, image: None });
        thread::sleep(Duration::from_secs(60)); // the signal's thread ends the program
        unreachable!("{said:?}");
    }

    #[test]
    fn a_signal_takes_running_tools_along() {
        if let Some(folder) = std::env::var_os(FOLDER) {
            return call_tool(folder);
        }
        for signal in signals() {
            let folder = tempfile::tempdir().unwrap();
            let written = || ["a", "b"].map(|name| fs::metadata(folder.path().join(name)).map_or(0, |file| file.len()));
            let calls = || !written().contains(&0);
            interrupt(alone(&[], "a_signal_takes_running_tools_along", FOLDER, folder.path()), calls, signal);
            thread::sleep(Duration::from_millis(200)); // what is killed may be writing its last
            let before = written();
            thread::sleep(Duration::from_millis(300));
            assert_eq!(written(), before, "a tool goes on");
        }
    }
}
