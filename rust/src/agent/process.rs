//! Programs under way: what they say is read, and what they started is ended with them.

use std::io::{self, ErrorKind, Read};
use std::process::{Child, ChildStderr, ChildStdout, Command, ExitStatus};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread;
use std::time::{Duration, Instant};

/// What escaped being killed may hold a pipe open: its end is waited for no longer than this.
const LAST_BREATH: Duration = Duration::from_secs(1);

const SHORTEST_PAUSE: Duration = Duration::from_micros(500);
const LONGEST_PAUSE: Duration = Duration::from_millis(10);

/// The programs under way; `None` once they were stopped.
static UNDER_WAY: Mutex<Option<Vec<Arc<Program>>>> = Mutex::new(Some(Vec::new()));

/// Kills every [`CommandTool`](super::CommandTool) that is running, with what it started; none starts any more. For a
/// program that ends at once: one that is killed, or ended by a signal that it does not hear, leaves its tools running.
pub fn stop_tools() {
    let under_way = locked(&UNDER_WAY).take();
    under_way.into_iter().flatten().for_each(|program| program.kill());
}

/// A program that is running; it ends with this.
pub(super) struct Running {
    program: Guard,
    output: Reader,
    complaint: Reader,
}

/// What a program left.
pub(super) struct Ended {
    pub(super) status: io::Result<ExitStatus>,
    /// Of the standard output: at most one byte over the limit.
    pub(super) output: Vec<u8>,
    /// Of the standard error likewise.
    pub(super) complaint: Vec<u8>,
}

impl Running {
    /// Starts a program whose output and error are pipes. More bytes of output than `most_output` end it; of the error
    /// `most_complaint` are kept.
    pub(super) fn start(command: &mut Command, most_output: usize, most_complaint: usize) -> io::Result<Running> {
        #[cfg(unix)]
        std::os::unix::process::CommandExt::process_group(command, 0);
        let (program, output, complaint) = Guard::start(command)?;
        let output = Reader::start(output, most_output, Some(program.0.clone()))?;
        let complaint = Reader::start(complaint, most_complaint, None)?;
        Ok(Running { program, output, complaint })
    }

    /// Waits for the program to end by itself; returns whether it did in time.
    pub(super) fn wait(&self, timeout: Duration) -> bool {
        let start = Instant::now();
        let mut pause = SHORTEST_PAUSE;
        while self.program.0.is_running() {
            let left = timeout.saturating_sub(start.elapsed());
            if left.is_zero() {
                return false;
            }
            thread::sleep(pause.min(left));
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
        true
    }

    /// Kills whatever is left of it.
    pub(super) fn end(self) -> Ended {
        let status = self.program.0.end();
        Ended { status, output: self.output.content(), complaint: self.complaint.content() }
    }
}

/// A program with what it started, for whoever may end it: its caller, the reader of its output, a signal. `None`: it was
/// waited for, and its number may be another's by now.
struct Program(Mutex<Option<Child>>);

impl Program {
    fn kill(&self) {
        if let Some(child) = locked(&self.0).as_mut() {
            kill(child);
        }
    }

    fn is_running(&self) -> bool {
        locked(&self.0).as_mut().is_some_and(|child| matches!(child.try_wait(), Ok(None)))
    }

    /// Kills whatever is left of it; its status is known once.
    fn end(&self) -> io::Result<ExitStatus> {
        let child = locked(&self.0).take();
        let mut child = child.ok_or_else(|| io::Error::other("it has ended already"))?;
        kill(&mut child);
        child.wait()
    }
}

#[cfg(unix)]
fn kill(child: &mut Child) {
    use rustix::process::{Pid, Signal, kill_process_group};

    let _ = kill_process_group(Pid::from_child(child), Signal::KILL); // there may be none left
}

#[cfg(not(unix))]
fn kill(child: &mut Child) {
    let _ = child.kill(); // it may have ended
}

/// Ends a program when it goes.
struct Guard(Arc<Program>);

impl Guard {
    fn start(command: &mut Command) -> io::Result<(Guard, Option<ChildStdout>, Option<ChildStderr>)> {
        let mut under_way = locked(&UNDER_WAY);
        let Some(programs) = under_way.as_mut() else {
            return Err(io::Error::new(ErrorKind::Interrupted, "the program is ending"));
        };
        let mut child = command.spawn()?;
        let (output, complaint) = (child.stdout.take(), child.stderr.take());
        let program = Arc::new(Program(Mutex::new(Some(child))));
        programs.push(program.clone());
        Ok((Guard(program), output, complaint))
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        let _ = self.0.end(); // it may have ended before
        if let Some(programs) = locked(&UNDER_WAY).as_mut() {
            programs.retain(|program| !Arc::ptr_eq(program, &self.0));
        }
    }
}

/// Reads a pipe to its end, and keeps one byte more than a limit at most.
struct Reader {
    content: Arc<Mutex<Vec<u8>>>,
    /// Closed at the end of the pipe.
    is_reading: mpsc::Receiver<()>,
}

impl Reader {
    /// `ended`: the program that ends when it says more than the limit.
    fn start(
        pipe: Option<impl Read + Send + 'static>,
        limit: usize,
        ended: Option<Arc<Program>>,
    ) -> io::Result<Reader> {
        let content = Arc::new(Mutex::new(Vec::new()));
        let (reading, is_reading) = mpsc::channel();
        let kept = content.clone();
        thread::Builder::new().name("tool".into()).spawn(move || {
            let _reading: mpsc::Sender<()> = reading;
            let Some(mut pipe) = pipe else { return };
            let mut piece = [0; 1 << 13];
            loop {
                let length = match pipe.read(&mut piece) {
                    Ok(0) => return,
                    Ok(length) => length,
                    Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                    Err(_) => return,
                };
                let mut kept = locked(&kept);
                let room = limit.saturating_add(1) - kept.len();
                kept.extend_from_slice(&piece[..length.min(room)]);
                if kept.len() > limit
                    && let Some(program) = &ended
                {
                    program.kill();
                }
            }
        })?;
        Ok(Reader { content, is_reading })
    }

    fn content(self) -> Vec<u8> {
        let _ = self.is_reading.recv_timeout(LAST_BREATH); // nothing is sent: it ends, or the time does
        std::mem::take(&mut locked(&self.content))
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
