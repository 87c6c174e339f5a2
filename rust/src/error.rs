//! What can go wrong: [`LoadError`] for files of weights, [`Error`] for the rest.
//!
//! Every message is one line that names the file and the key, says what was found, and what to do.

use std::fmt::{self, Display, Formatter, Write};
use std::io;
use std::path::PathBuf;

use crate::files::path_text;
use crate::texts::is_printable;

/// A file of weights, or the folder around it, that cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LoadError {
    /// The machine's fault, or a wrong path: the file cannot be read.
    #[error("{}: cannot be read: {source}", Line(path_text(path)))]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The file is damaged, cut short, or something else: its bytes are not what they should be.
    #[error("{}: {}", Line(path_text(path)), Line(reason))]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A whole file, but one that does not belong here: another format, version, component, phase or model.
    #[error("{}: {}", Line(path_text(path)), Line(reason))]
    Mismatch {
        /// The file.
        path: PathBuf,
        /// What it is, and what was expected.
        reason: String,
    },
    /// The configuration has an unknown or missing key, or an impossible value.
    #[error("{}: not a valid configuration: {}", Line(path_text(path)), Line(reason))]
    Config {
        /// The file that holds it.
        path: PathBuf,
        /// The key, and what is wrong with its value.
        reason: String,
    },
    /// A tensor that should be there is not.
    #[error("{}: {}: missing; the configuration asks for it", Line(path_text(path)), Line(key))]
    MissingKey {
        /// The file.
        path: PathBuf,
        /// The tensor.
        key: String,
    },
    /// Tensors that nothing in the configuration asks for.
    #[error("{}: {}: not expected{}", Line(path_text(path)), Line(key), others(*more))]
    UnknownKey {
        /// The file.
        path: PathBuf,
        /// The first such tensor.
        key: String,
        /// How many more there are.
        more: usize,
    },
    /// A tensor of another shape.
    #[error("{}: {}: expected shape {expected:?}, found {found:?}", Line(path_text(path)), Line(key))]
    Shape {
        /// The file.
        path: PathBuf,
        /// The tensor.
        key: String,
        /// The shape the configuration asks for.
        expected: Vec<usize>,
        /// The shape in the file.
        found: Vec<usize>,
    },
    /// A tensor of another type.
    #[error("{}: {}: expected type {expected}, found {found}", Line(path_text(path)), Line(key))]
    Type {
        /// The file.
        path: PathBuf,
        /// The tensor.
        key: String,
        /// The type the file's header promises for it.
        expected: String,
        /// The type it has.
        found: String,
    },
    /// The file is not the one that was exported.
    #[error(
        "{}: has changed since the export: its SHA-256 is not the one in config.json; export again, or copy it again",
        Line(path_text(path))
    )]
    Digest {
        /// The file.
        path: PathBuf,
    },
}

/// A text as part of one line: what cannot be seen, which names in a file may hold, is escaped.
struct Line<T>(T);

impl<T: Display> Display for Line<T> {
    fn fmt(&self, out: &mut Formatter<'_>) -> fmt::Result {
        for character in self.0.to_string().chars() {
            match is_printable(character) {
                true => out.write_char(character)?,
                false => write!(out, "{}", character.escape_default())?,
            }
        }
        Ok(())
    }
}

fn others(more: usize) -> String {
    if more == 0 { String::new() } else { format!(" (and {more} more)") }
}

/// Everything that can go wrong.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Weights that cannot be used.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// A picture that cannot be used: missing, not an image, damaged, too large.
    #[error("{}: {}", Line(name), Line(reason))]
    Image {
        /// The file, or what the picture is called.
        name: String,
        /// What is wrong, and what was expected.
        reason: String,
    },
    /// Any other file that cannot be used: a list of texts, a memory, a vector.
    #[error("{}: {}", Line(path_text(path)), Line(reason))]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong, and what was expected.
        reason: String,
    },
    /// The caller's fault: an argument that does not fit the model.
    #[error("{}", Line(.0))]
    Input(String),
    /// The model has no such part: its phase came before the one that trains it, or it was not exported.
    #[error("{}", Line(.0))]
    Absent(String),
    /// The model's numbers are of no use.
    #[error("{}", Line(.0))]
    NotFinite(String),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whatever_a_file_says_its_message_is_one_line() {
        let (path, text) = (PathBuf::from("a\nb/é.safetensors"), "x\r\n\u{1b}[2J\u{85}\u{2028}\u{202e}ü".to_owned());
        let source = || io::Error::other("text");
        let key = || text.clone();
        let messages = [
            LoadError::Read { path: path.clone(), source: source() },
            LoadError::Damaged { path: path.clone(), reason: key() },
            LoadError::Mismatch { path: path.clone(), reason: key() },
            LoadError::Config { path: path.clone(), reason: key() },
            LoadError::MissingKey { path: path.clone(), key: key() },
            LoadError::UnknownKey { path: path.clone(), key: key(), more: 2 },
            LoadError::Shape { path: path.clone(), key: key(), expected: vec![1], found: vec![2] },
            LoadError::Type { path: path.clone(), key: key(), expected: "F32".into(), found: "U8".into() },
            LoadError::Digest { path: path.clone() },
        ];
        let messages = messages.map(|error| error.to_string()).into_iter().chain([
            Error::Image { name: key(), reason: key() }.to_string(),
            Error::File { path, reason: key() }.to_string(),
            Error::Input(key()).to_string(),
        ]);
        for message in messages {
            assert!(message.chars().all(is_printable), "{message:?}");
            assert!(message.contains("é") || message.contains("ü"), "{message}");
        }
        let message = LoadError::MissingKey { path: "a".into(), key: "b\nc".into() }.to_string();
        assert_eq!(message, "a: b\\nc: missing; the configuration asks for it");
    }
}
