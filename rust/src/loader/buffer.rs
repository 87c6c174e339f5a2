//! The bytes of a file in memory, so aligned that every tensor type can be read in place.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;
use std::sync::Arc;

use bytemuck::Pod;
use sha2::{Digest, Sha256};

use crate::files::open_file;

/// How much is read, and hashed while it is in the cache, at a time.
const BLOCK: usize = 1 << 18;
const WORD: usize = size_of::<u64>();

/// A whole file.
pub(crate) enum Buffer {
    /// Read into memory; the last word may be padded.
    Owned { words: Vec<u64>, len: usize },
    /// Read by the operating system as it is used.
    #[cfg(feature = "mmap")]
    Mapped(memmap2::Mmap),
}

impl Buffer {
    /// Reads `path`; with `digest`, also computes its SHA-256.
    ///
    /// Memory is taken for the size the file system reports, and no more.
    pub(crate) fn read(path: &Path, digest: Option<&mut Sha256>) -> io::Result<Buffer> {
        let mut file = open_file(path)?;
        let size = usize::try_from(file.metadata()?.len()).map_err(|_| io::ErrorKind::OutOfMemory)?;
        let mut words = Vec::new();
        words.try_reserve_exact(size.div_ceil(WORD)).map_err(|_| io::ErrorKind::OutOfMemory)?;
        let len = fill(&mut words, size, &mut file, digest)?;
        Ok(Buffer::Owned { words, len })
    }

    /// A copy of `bytes`.
    pub(crate) fn copy(bytes: &[u8]) -> Buffer {
        let mut words = vec![0_u64; bytes.len().div_ceil(WORD)];
        bytemuck::cast_slice_mut(&mut words)[..bytes.len()].copy_from_slice(bytes);
        Buffer::Owned { words, len: bytes.len() }
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        match self {
            Buffer::Owned { words, len } => &bytemuck::cast_slice(words)[..*len],
            #[cfg(feature = "mmap")]
            Buffer::Mapped(map) => map,
        }
    }
}

/// Appends `size` bytes to `words` without touching the memory twice; returns `size`.
fn fill(words: &mut Vec<u64>, size: usize, file: &mut File, mut digest: Option<&mut Sha256>) -> io::Result<usize> {
    let mut block = vec![0_u64; BLOCK / WORD];
    let mut left = size;
    while left > 0 {
        let n = left.min(BLOCK);
        let bytes = &mut bytemuck::cast_slice_mut(&mut block)[..n];
        file.read_exact(bytes)?;
        if let Some(digest) = digest.as_deref_mut() {
            digest.update(&*bytes);
        }
        words.extend_from_slice(&block[..n.div_ceil(WORD)]);
        left -= n;
    }
    Ok(size)
}

/// Numbers of a tensor: a part of a file's bytes, or, where those are not aligned, a copy.
#[derive(Clone)]
pub(crate) enum Numbers<T> {
    /// `len` numbers from byte `start` of a file.
    InFile { buffer: Arc<Buffer>, start: usize, len: usize },
    /// Numbers of their own.
    Owned(Arc<[T]>),
}

impl<T: Pod> Numbers<T> {
    /// The `len` numbers from byte `start`, which the caller has checked to lie in `buffer`.
    pub(crate) fn new(buffer: &Arc<Buffer>, start: usize, len: usize) -> Numbers<T> {
        let bytes = &buffer.bytes()[start..start + len * size_of::<T>()];
        match bytemuck::try_cast_slice::<u8, T>(bytes) {
            Ok(_) => Numbers::InFile { buffer: Arc::clone(buffer), start, len },
            Err(_) => Numbers::Owned(bytes.chunks_exact(size_of::<T>()).map(bytemuck::pod_read_unaligned).collect()),
        }
    }

    pub(crate) fn as_slice(&self) -> &[T] {
        match self {
            Numbers::InFile { buffer, start, len } => {
                bytemuck::cast_slice(&buffer.bytes()[*start..*start + len * size_of::<T>()])
            }
            Numbers::Owned(numbers) => numbers,
        }
    }
}

impl<T: Pod> From<Vec<T>> for Numbers<T> {
    fn from(numbers: Vec<T>) -> Self {
        Numbers::Owned(numbers.into())
    }
}
