//! Files that are either whole or not there, and how their names are printed.

use std::collections::HashSet;
use std::ffi::{OsStr, OsString};
use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{LazyLock, Mutex, PoisonError};

use crate::error::Error;

/// Writes `path` through `content`: to a temporary file beside it, flushed to the disk, renamed. Makes the folder if
/// need be. A symbolic link stays one: what it leads to is replaced. Threads and processes may write the same path at once:
/// one of them is last. On Unix a pipe, a character device and the file that the program's own output goes to are written
/// to directly, since a rename would put a file in their place.
///
/// # Errors
/// [`Error::File`] if it cannot be written, or if what is at `path` is a folder or a socket; it is unchanged then, and
/// nothing is left beside it.
pub fn write_whole(path: &Path, content: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> Result<(), Error> {
    write(path, content).map_err(|error| cannot_write(path, &error))
}

/// Refuses at once paths that [`write_whole`] could not write once all is computed.
///
/// # Errors
/// [`Error::File`]: what is there is a folder, or what it is to lie in is none.
pub fn demand_writable<P: AsRef<Path>>(paths: impl IntoIterator<Item = P>) -> Result<(), Error> {
    for path in paths {
        let path = path.as_ref();
        let folder = path.ancestors().skip(1).find(|folder| folder.exists());
        if path.is_dir() {
            return Err(cannot_write(path, &not_a_file()));
        } else if let Some(folder) = folder.filter(|folder| !folder.is_dir()) {
            return Err(cannot_write(path, &invalid(&format!("{} is not a folder", path_text(folder)))));
        }
    }
    Ok(())
}

fn cannot_write(path: &Path, error: &io::Error) -> Error {
    Error::File { path: path.to_path_buf(), reason: format!("cannot write it: {error}") }
}

fn not_a_file() -> io::Error {
    invalid("what is there is not a file; name another")
}

fn invalid(reason: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, reason)
}

/// Removes what every [`write_whole`] under way has written so far; it fails then, and so does one that begins later. For
/// a program that ends at once.
pub fn abandon_writes() {
    let under_way = UNDER_WAY.lock().unwrap_or_else(PoisonError::into_inner).take();
    for temporary in under_way.into_iter().flatten() {
        let _ = fs::remove_file(temporary); // nobody to tell if it cannot be removed
    }
}

/// The path as it is printed, and written where names are kept: of what is not UTF-8 in it, each byte is `\xNN`.
pub fn path_text(path: impl AsRef<Path>) -> String {
    let mut text = String::new();
    for piece in path.as_ref().as_os_str().as_encoded_bytes().utf8_chunks() {
        text += piece.valid();
        for byte in piece.invalid() {
            let _ = write!(text, "\\x{byte:02x}"); // a String takes everything
        }
    }
    text
}

/// What the system says of an error, without its number: `No such file or directory`.
pub(crate) fn system_text(error: &io::Error) -> String {
    let text = error.to_string();
    let number = error.raw_os_error().map(|number| format!(" (os error {number})"));
    number.and_then(|number| text.strip_suffix(&number)).unwrap_or(&text).to_owned()
}

/// Opens a file for reading; anything else is refused before it is opened, for opening a pipe may wait for ever.
pub(crate) fn open_file(path: &Path) -> io::Result<File> {
    if !fs::metadata(path)?.is_file() {
        return Err(invalid("it is not a file"));
    }
    File::open(path)
}

fn write(path: &Path, content: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> io::Result<()> {
    if let Some(file) = written_to_directly(path)? {
        let mut file = BufWriter::new(file);
        content(&mut file)?;
        return file.flush();
    }
    let path = &at_the_end_of_links(path)?;
    let Some(name) = path.file_name() else {
        return Err(invalid("it is not the name of a file"));
    };
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    fs::create_dir_all(folder)?;
    if fs::metadata(path).is_ok_and(|there| !there.is_file()) {
        return Err(not_a_file());
    }
    let (temporary, file) = Temporary::create(folder, name)?;
    let mut file = BufWriter::new(file);
    content(&mut file)?;
    file.into_inner().map_err(io::IntoInnerError::into_error)?.sync_all()?;
    fs::rename(&temporary.0, path)
}

/// What is at `path`, open, if it must not be replaced by another file.
#[cfg(unix)]
fn written_to_directly(path: &Path) -> io::Result<Option<File>> {
    use std::os::fd::AsFd;
    use std::os::unix::fs::{FileTypeExt, MetadataExt};

    let Ok(found) = fs::metadata(path) else { return Ok(None) };
    if found.file_type().is_char_device() || found.file_type().is_fifo() {
        return fs::OpenOptions::new().write(true).open(path).map(Some);
    }
    // the standard output or error, as /dev/stdout of `command > file` is; opened anew it would have another position
    let (out, err) = (io::stdout(), io::stderr());
    for own in [out.as_fd(), err.as_fd()] {
        let Ok(own) = own.try_clone_to_owned().map(File::from) else { continue }; // it may be closed
        if own.metadata().is_ok_and(|own| (own.dev(), own.ino()) == (found.dev(), found.ino())) {
            return Ok(Some(own));
        }
    }
    Ok(None)
}

#[cfg(not(unix))]
fn written_to_directly(_: &Path) -> io::Result<Option<File>> {
    Ok(None)
}

/// Where symbolic links at `path` lead, if there are any; there need not be a file yet.
pub(crate) fn at_the_end_of_links(path: &Path) -> io::Result<PathBuf> {
    const MOST: usize = 40; // as Linux has it
    let mut end = path.to_path_buf();
    for _ in 0..MOST {
        let Ok(next) = fs::read_link(&end) else { return Ok(end) };
        end.pop(); // `next` is relative to the folder of the link, or absolute and takes its place
        end.push(next);
    }
    Err(io::Error::new(io::ErrorKind::InvalidInput, "too many symbolic links"))
}

/// The temporary files; `None` once the writes were abandoned.
static UNDER_WAY: LazyLock<Mutex<Option<HashSet<PathBuf>>>> = LazyLock::new(|| Mutex::new(Some(HashSet::new())));

/// A file that is gone when this is, unless it was renamed before.
struct Temporary(PathBuf);

impl Temporary {
    /// A new file in `folder` that nobody else has: its name tells processes and calls apart.
    fn create(folder: &Path, name: &OsStr) -> io::Result<(Temporary, File)> {
        static CALLS: AtomicU64 = AtomicU64::new(0);
        loop {
            let call = CALLS.fetch_add(1, Ordering::Relaxed);
            let mut hidden = OsString::from(".");
            hidden.push(name);
            hidden.push(format!(".{}.{call}.tmp", std::process::id()));
            let path = folder.join(hidden);
            let mut under_way = UNDER_WAY.lock().unwrap_or_else(PoisonError::into_inner);
            let Some(under_way) = under_way.as_mut() else {
                return Err(io::Error::new(io::ErrorKind::Interrupted, "the program is ending"));
            };
            match File::create_new(&path) {
                Ok(file) => {
                    under_way.insert(path.clone());
                    return Ok((Temporary(path), file));
                }
                // left by a process of the same number that was killed
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(error),
            }
        }
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        // there is none after a rename, and nobody to tell if it cannot be removed
        let _ = fs::remove_file(&self.0);
        if let Some(under_way) = UNDER_WAY.lock().unwrap_or_else(PoisonError::into_inner).as_mut() {
            under_way.remove(&self.0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_whole_or_as_it_was() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("new/deep/file.txt");
        write_whole(&path, |out| out.write_all(b"first")).unwrap();
        let failed = write_whole(&path, |out| {
            out.write_all(b"second")?;
            Err(io::Error::other("no more"))
        });
        assert!(failed.unwrap_err().to_string().ends_with("file.txt: cannot write it: no more"));
        assert_eq!(fs::read(&path).unwrap(), b"first");
        write_whole(&path, |out| out.write_all(b"third")).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"third");
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
    }

    #[cfg(unix)]
    #[test]
    fn every_byte_that_is_not_utf8_is_escaped() {
        use std::os::unix::ffi::OsStrExt;

        for (name, text) in [
            (&b"a/gr\xc3\xbcn.png"[..], "a/gr\u{fc}n.png"),
            (b"gr\xfcn\xff", "gr\\xfcn\\xff"),
            (b"\xed\xa0\x80\xe6\x97", "\\xed\\xa0\\x80\\xe6\\x97"),
            (b"", ""),
        ] {
            assert_eq!(path_text(OsStr::from_bytes(name)), text);
        }
    }

    #[cfg(unix)]
    #[test]
    fn a_pipe_is_refused_without_waiting_for_a_writer() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("pipe");
        assert!(std::process::Command::new("mkfifo").arg(&path).status().unwrap().success());
        for refused in [
            open_file(&path).unwrap_err().to_string(),
            crate::image::load_image(&path).unwrap_err().to_string(),
            crate::loader::load_safetensors(&path).err().unwrap().to_string(),
            crate::loader::read_header(&path).unwrap_err().to_string(),
        ] {
            assert!(refused.ends_with("it is not a file"), "{refused}");
        }
    }

    #[test]
    fn threads_may_write_one_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file.txt");
        std::thread::scope(|scope| {
            for number in 0..8_u8 {
                let path = &path;
                scope.spawn(move || {
                    for _ in 0..20 {
                        write_whole(path, |out| out.write_all(&[number; 1000])).unwrap();
                    }
                });
            }
        });
        let found = fs::read(&path).unwrap();
        assert_eq!(found, vec![found[0]; 1000]);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[cfg(unix)]
    #[test]
    fn what_is_not_a_file_stays() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("socket");
        let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        let link = folder.path().join("link");
        std::os::unix::fs::symlink(&socket, &link).unwrap();
        for path in [&socket, &link] {
            let message = write_whole(path, |out| out.write_all(b"x")).unwrap_err().to_string();
            assert!(message.contains("not a file"), "{message}");
        }
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2);
        assert!(!fs::metadata(&link).unwrap().is_file());
    }

    #[cfg(unix)]
    #[test]
    fn a_pipe_and_a_device_are_written_to() {
        use std::os::unix::fs::FileTypeExt;

        let folder = tempfile::tempdir().unwrap();
        let (pipe, link) = (folder.path().join("pipe"), folder.path().join("link"));
        assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
        std::os::unix::fs::symlink("/dev/null", &link).unwrap();
        let read = std::thread::scope(|scope| {
            let reader = scope.spawn(|| fs::read(&pipe));
            write_whole(&pipe, |out| out.write_all(b"into the pipe")).unwrap();
            reader.join().unwrap().unwrap()
        });
        assert_eq!(read, b"into the pipe");
        write_whole(&link, |out| out.write_all(b"gone")).unwrap();
        assert!(fs::metadata(&pipe).unwrap().file_type().is_fifo());
        assert!(fs::metadata(&link).unwrap().file_type().is_char_device());
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2);
    }

    #[cfg(unix)]
    #[test]
    fn links_stay_links() {
        let folder = tempfile::tempdir().unwrap();
        let (file, link, second) =
            (folder.path().join("real/file"), folder.path().join("link"), folder.path().join("b"));
        std::os::unix::fs::symlink("real/file", &link).unwrap(); // leads to what is not there yet
        std::os::unix::fs::symlink(&link, &second).unwrap();
        for (path, content) in [(&link, b"one"), (&second, b"two")] {
            write_whole(path, |out| out.write_all(content)).unwrap();
            assert_eq!(fs::read(&file).unwrap(), content);
            assert!(fs::symlink_metadata(path).unwrap().is_symlink());
        }
        let round = folder.path().join("round");
        std::os::unix::fs::symlink("round", &round).unwrap();
        let message = write_whole(&round, |out| out.write_all(b"x")).unwrap_err().to_string();
        assert!(message.ends_with("too many symbolic links"), "{message}");
    }

    #[test]
    fn what_cannot_be_written() {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("taken")).unwrap();
        for path in [folder.path().join("taken"), folder.path().join(".."), PathBuf::from("/proc/nowhere/x")] {
            assert!(write_whole(&path, |out| out.write_all(b"x")).is_err(), "{}", path.display());
        }
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn what_cannot_be_written_is_said_before() {
        let folder = tempfile::tempdir().unwrap();
        let (new, file) = (folder.path().join("new/newer/a.json"), folder.path().join("file"));
        fs::write(&file, "a").unwrap();
        demand_writable([&new, &file, &PathBuf::from("a.json")]).unwrap();
        let said = |path: &Path| demand_writable([path]).unwrap_err().to_string();
        assert!(said(folder.path()).ends_with("cannot write it: what is there is not a file; name another"));
        assert!(said(&file.join("a.json")).ends_with("file is not a folder"));
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }
}
