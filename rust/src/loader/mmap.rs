//! Weights that the operating system reads from the disk as they are used.

use std::path::Path;

use super::{Buffer, Weights};
use crate::error::LoadError;
use crate::files::open_file;

/// Maps a safetensors file instead of reading it: it opens at once, and several processes share its memory.
///
/// # Safety
/// Nobody may change or shorten the file while the weights are in use: a change shows in the numbers, and a file cut
/// short ends the process when its missing part is touched.
///
/// # Errors
/// As [`super::load_safetensors`].
pub unsafe fn load_mmap(path: impl AsRef<Path>) -> Result<Weights, LoadError> {
    let path = path.as_ref();
    let mapped = open_file(path).and_then(|file| {
        // SAFETY: the caller promises that nobody changes the file.
        unsafe { memmap2::Mmap::map(&file) }
    });
    let map = mapped.map_err(|source| LoadError::Read { path: path.to_path_buf(), source })?;
    Weights::new(path, Buffer::Mapped(map))
}
