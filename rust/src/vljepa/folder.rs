//! The files of an exported folder, each what `config.json` says it is.

use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use super::manifest::{Listed, Manifest};
use crate::error::LoadError;
use crate::files::path_text;
use crate::hex::hex;
use crate::loader::{Buffer, Weights, read_header};
use crate::tokenizer::{self, Tokenizer};

/// Reads one component's file.
///
/// # Errors
/// [`LoadError::Read`], [`LoadError::Damaged`] or [`LoadError::Digest`] if it is not the file that was exported,
/// [`LoadError::Mismatch`] if its header does not agree with `config.json`.
pub(super) fn component(folder: &Path, name: &str, manifest: &Manifest) -> Result<Weights, LoadError> {
    let path = folder.join(format!("{name}.safetensors"));
    let listed = manifest.files.get(name).ok_or_else(|| LoadError::Config {
        path: manifest.path.clone(),
        reason: format!("files: {name}.safetensors is missing"),
    })?;
    check_size(&path, listed, manifest)?;
    read_header(&path)?; // before memory is taken for the rest
    let weights = Weights::new(&path, checked(&path, listed)?)?;
    agree(&weights, name, manifest)?;
    Ok(weights)
}

/// Reads `tokenizer.json`.
///
/// # Errors
/// As for [`component`]; [`LoadError::Mismatch`] if its vocabulary or special tokens are not the model's.
pub(super) fn tokenizer(folder: &Path, manifest: &Manifest) -> Result<Tokenizer, LoadError> {
    let path = folder.join("tokenizer.json");
    check_size(&path, &manifest.tokenizer, manifest)?;
    tokenizer::check_size(&path)?;
    let tokenizer = Tokenizer::from_bytes(&path, checked(&path, &manifest.tokenizer)?.bytes())?;
    let mismatch = |reason: String| Err(LoadError::Mismatch { path: path.clone(), reason });
    if tokenizer.vocab_size() != manifest.config.vocab_size {
        return mismatch(format!(
            "it has {} tokens, but config.json says vocab_size {}",
            tokenizer.vocab_size(),
            manifest.config.vocab_size
        ));
    }
    let (found, expected) = (
        [tokenizer.pad_id(), tokenizer.bos_id(), tokenizer.eos_id()],
        [&manifest.tokens.pad, &manifest.tokens.bos, &manifest.tokens.eos],
    );
    if found.iter().ne(expected) {
        return mismatch(format!("pad, bos and eos are {found:?}, but config.json says {expected:?}"));
    }
    Ok(tokenizer)
}

/// The file has the size listed.
fn check_size(path: &Path, listed: &Listed, manifest: &Manifest) -> Result<(), LoadError> {
    let unreadable = |source| LoadError::Read { path: path.to_path_buf(), source };
    let found = std::fs::metadata(path).map_err(unreadable)?.len();
    if found != listed.bytes {
        return Err(LoadError::Damaged {
            path: path.to_path_buf(),
            reason: format!(
                "{found} bytes, but {} says {}: cut short or changed; copy it again",
                path_text(&manifest.path),
                listed.bytes
            ),
        });
    }
    Ok(())
}

/// The bytes of a file that has the digest listed.
fn checked(path: &Path, listed: &Listed) -> Result<Buffer, LoadError> {
    let mut digest = Sha256::new();
    let buffer =
        Buffer::read(path, Some(&mut digest)).map_err(|source| LoadError::Read { path: path.to_path_buf(), source })?;
    if hex(&digest.finalize()) != listed.sha256 {
        return Err(LoadError::Digest { path: PathBuf::from(path) });
    }
    Ok(buffer)
}

/// The header says what `config.json` says.
fn agree(weights: &Weights, component: &str, manifest: &Manifest) -> Result<(), LoadError> {
    let mismatch = |reason: String| Err(LoadError::Mismatch { path: weights.path().to_path_buf(), reason });
    let config = weights.config()?; // its format first: of another kind of file nothing else means anything
    for (key, expected) in [
        ("format_version", manifest.format_version.to_string()),
        ("component", component.to_owned()),
        ("phase", manifest.phase.to_string()),
        ("dtype", manifest.dtype.clone()),
    ] {
        let found = weights.metadata().get(key).map_or("nothing", String::as_str);
        if found != expected {
            return mismatch(format!("its header says {key} {found:?}, expected {expected:?} as in config.json"));
        }
    }
    if config != manifest.config {
        return mismatch("it belongs to another model: its configuration differs from config.json's".into());
    }
    Ok(())
}
