//! Files that one command at a time reads, changes and writes.

use std::ffi::OsString;
use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use crate::error::Error;
use crate::files::at_the_end_of_links;

const PATIENCE: Duration = Duration::from_secs(10); // a change takes far less
const PAUSE: Duration = Duration::from_millis(20);

/// While this lives, no other command, of either half of the project, changes the file; who comes second waits.
///
/// The lock is the operating system's, on `.NAME.lock` beside the file. Where there are no locks, or the folder cannot be
/// written into, it goes on without one: who writes there will say why it cannot be done.
pub(super) struct FileLock(Option<(File, PathBuf)>);

impl FileLock {
    /// # Errors
    /// [`Error::File`] if another command has been changing the file for ten seconds.
    pub(super) fn take(path: &Path) -> Result<FileLock, Error> {
        Self::take_within(path, PATIENCE)
    }

    fn take_within(path: &Path, patience: Duration) -> Result<FileLock, Error> {
        let target = at_the_end_of_links(path).unwrap_or_else(|_| path.to_path_buf());
        let Some(name) = target.file_name() else { return Ok(FileLock(None)) };
        let mut hidden = OsString::from(".");
        hidden.push(name);
        hidden.push(".lock");
        let lock = target.with_file_name(hidden);
        if let Some(folder) = lock.parent().filter(|folder| !folder.as_os_str().is_empty()) {
            let _ = fs::create_dir_all(folder); // who writes there will say why it cannot be done
        }
        let end = Instant::now() + patience;
        loop {
            let Ok(file) = File::options().read(true).write(true).create(true).truncate(false).open(&lock) else {
                return Ok(FileLock(None));
            };
            match file.try_lock() {
                Ok(()) if is_current(&file, &lock) => return Ok(FileLock(Some((file, lock)))),
                Ok(()) => continue, // its holder removed it in between
                Err(TryLockError::Error(_)) => return Ok(FileLock(None)),
                Err(TryLockError::WouldBlock) if Instant::now() < end => sleep(PAUSE),
                Err(TryLockError::WouldBlock) => {
                    let seconds = patience.as_secs();
                    let reason = format!("another command has been changing it for {seconds} s; try again");
                    return Err(Error::File { path: path.to_path_buf(), reason });
                }
            }
        }
    }
}

impl Drop for FileLock {
    fn drop(&mut self) {
        if let Some((file, path)) = self.0.take() {
            if cfg!(unix) {
                let _ = fs::remove_file(path); // while it is locked, so that it is nobody else's
            }
            let _ = file.unlock();
        }
    }
}

/// Whether the file that is open is the one in the folder.
#[cfg(unix)]
fn is_current(file: &File, path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;

    let of = |metadata: &fs::Metadata| (metadata.dev(), metadata.ino());
    matches!((file.metadata(), fs::metadata(path)), (Ok(open), Ok(there)) if of(&open) == of(&there))
}

#[cfg(not(unix))]
fn is_current(_: &File, _: &Path) -> bool {
    true // it is never removed
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_at_a_time() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("new/m.safetensors");
        let first = FileLock::take(&path).unwrap();
        assert!(folder.path().join("new/.m.safetensors.lock").exists());
        let error = FileLock::take_within(&path, Duration::ZERO).err().unwrap().to_string();
        assert!(error.contains("another command has been changing it"), "{error}");
        FileLock::take_within(&folder.path().join("new/other"), Duration::ZERO).unwrap();
        drop(first);
        assert!(!folder.path().join("new/.m.safetensors.lock").exists());
        FileLock::take_within(&path, Duration::ZERO).unwrap();
        // nowhere to lock: the write says what is wrong
        assert!(FileLock::take(Path::new("/proc/nowhere/m.safetensors")).unwrap().0.is_none());
    }

    #[test]
    fn who_comes_second_waits() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("count");
        fs::write(&path, "0").unwrap();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..10 {
                        let _lock = FileLock::take(&path).unwrap();
                        let count: u32 = fs::read_to_string(&path).unwrap().parse().unwrap();
                        fs::write(&path, (count + 1).to_string()).unwrap();
                    }
                });
            }
        });
        assert_eq!(fs::read_to_string(&path).unwrap(), "40");
    }
}
