//! What can go wrong: [`LoadError`] for files of weights, [`Error`] for the rest.
//!
//! Every message is one line that names the file and the key, says what was found, and what to do.

#![forbid(unsafe_code)]

use std::io;
use std::path::PathBuf;

use crate::files::path_text;

/// A file of weights, or the folder around it, that cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LoadError {
    /// The machine's fault, or a wrong path: the file cannot be read.
    #[error("{}: cannot be read: {source}", path_text(path))]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The file is damaged, cut short, or something else: its bytes are not what they should be.
    #[error("{}: {reason}", path_text(path))]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A whole file, but one that does not belong here: another format, version, component, phase or model.
    #[error("{}: {reason}", path_text(path))]
    Mismatch {
        /// The file.
        path: PathBuf,
        /// What it is, and what was expected.
        reason: String,
    },
    /// The configuration has an unknown or missing key, or an impossible value.
    #[error("{}: not a valid configuration: {reason}", path_text(path))]
    Config {
        /// The file that holds it.
        path: PathBuf,
        /// The key, and what is wrong with its value.
        reason: String,
    },
    /// A tensor that should be there is not.
    #[error("{}: {key}: missing; the configuration asks for it", path_text(path))]
    MissingKey {
        /// The file.
        path: PathBuf,
        /// The tensor.
        key: String,
    },
    /// Tensors that nothing in the configuration asks for.
    #[error("{}: {key}: not expected{}", path_text(path), others(*more))]
    UnknownKey {
        /// The file.
        path: PathBuf,
        /// The first such tensor.
        key: String,
        /// How many more there are.
        more: usize,
    },
    /// A tensor of another shape.
    #[error("{}: {key}: expected shape {expected:?}, found {found:?}", path_text(path))]
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
    #[error("{}: {key}: expected type {expected}, found {found}", path_text(path))]
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
        path_text(path)
    )]
    Digest {
        /// The file.
        path: PathBuf,
    },
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
    #[error("{name}: {reason}")]
    Image {
        /// The file, or what the picture is called.
        name: String,
        /// What is wrong, and what was expected.
        reason: String,
    },
    /// Any other file that cannot be used: a list of texts, a memory, a vector.
    #[error("{}: {reason}", path_text(path))]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong, and what was expected.
        reason: String,
    },
    /// The caller's fault: an argument that does not fit the model.
    #[error("{0}")]
    Input(String),
    /// The model has no such part: its phase came before the one that trains it, or it was not exported.
    #[error("{0}")]
    Absent(String),
    /// The model's numbers are of no use.
    #[error("{0}")]
    NotFinite(String),
}
