//! safetensors files as typed, checked views, and the strict reading of a component out of one.

mod buffer;
mod fields;
mod header;
#[cfg(feature = "mmap")]
#[allow(unsafe_code, reason = "a mapped file can be changed by others: its callers promise that nobody does")]
mod mmap;
#[cfg(test)]
mod tests;
mod writer;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use half::{bf16, f16};
use safetensors::{Dtype, SafeTensors};

pub(crate) use buffer::{Buffer, Numbers};
pub(crate) use fields::Fields;
pub use header::{Header, read_header};
#[cfg(feature = "mmap")]
pub use mmap::load_mmap;
pub use writer::{NewTensor, write_safetensors};

use crate::config::Mamba3JepaConfig;
use crate::error::LoadError;
use crate::linalg::Matrix;

/// What an export calls itself in every header.
pub const FORMAT: &str = "mamba3-jepa";
/// The versions of the format that this crate reads.
pub const FORMAT_VERSIONS: [&str; 2] = ["1", "2"];
/// A file of more bytes is refused.
const MAX_FILE: u64 = 1 << 40;

/// One tensor of a file: where it lies, its type, its shape.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// Element type.
    pub dtype: Dtype,
    /// Sizes, outermost first; empty for a scalar.
    pub shape: Vec<usize>,
    start: usize,
    len: usize,
}

impl TensorInfo {
    /// How many numbers it has.
    pub fn numel(&self) -> usize {
        self.len
    }
}

/// A safetensors file: its metadata, and its tensors by name.
pub struct Weights {
    path: PathBuf,
    buffer: Arc<Buffer>,
    metadata: BTreeMap<String, String>,
    tensors: BTreeMap<String, TensorInfo>,
}

/// Reads a safetensors file into memory and checks its header.
///
/// ```
/// # #[path = "../../tests/common/mod.rs"] mod common;
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let folder = tempfile::tempdir()?;
/// # std::env::set_current_dir(&folder)?;
/// # std::fs::create_dir("weights")?;
/// # common::TinyModel::new().write("weights".as_ref());
/// use kore_vljepa::loader::load_safetensors;
///
/// let weights = load_safetensors("weights/predictor.safetensors")?;
/// // Apply weights to Mamba3Predictor...
/// let predictor = kore_vljepa::predictor::Mamba3Predictor::from_weights(&weights)?;
/// # assert_eq!(predictor.config().embed_dim, 24);
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// [`LoadError::Read`] if the file cannot be read, [`LoadError::Damaged`] if it is not a whole safetensors file.
pub fn load_safetensors(path: impl AsRef<Path>) -> Result<Weights, LoadError> {
    let path = path.as_ref();
    read_header(path)?; // before memory is taken for the rest
    let buffer = Buffer::read(path, None).map_err(|source| LoadError::Read { path: path.to_path_buf(), source })?;
    Weights::new(path, buffer)
}

impl Weights {
    /// The file `path` whose bytes are in `bytes`; `path` only names it in messages.
    ///
    /// # Errors
    /// [`LoadError::Damaged`] if the bytes are not a whole safetensors file.
    pub fn from_bytes(path: impl AsRef<Path>, bytes: &[u8]) -> Result<Weights, LoadError> {
        Self::new(path.as_ref(), Buffer::copy(bytes))
    }

    pub(crate) fn new(path: &Path, buffer: Buffer) -> Result<Weights, LoadError> {
        let damaged = |reason: String| LoadError::Damaged { path: path.to_path_buf(), reason };
        let bytes = buffer.bytes();
        if bytes.len() as u64 > MAX_FILE {
            return Err(damaged(format!("{} bytes are more than this crate reads", bytes.len())));
        }
        let (header, metadata) = SafeTensors::read_metadata(bytes)
            .map_err(|error| damaged(format!("not a safetensors file, or cut short: {error}")))?;
        let data = header.checked_add(WORD).ok_or_else(|| damaged("its header has an impossible length".into()))?;
        let mut tensors = BTreeMap::new();
        for (name, info) in metadata.tensors() {
            let (from, to) = info.data_offsets;
            let start = data.checked_add(from);
            let end = data.checked_add(to);
            let (Some(start), Some(end)) = (start, end) else {
                return Err(damaged(format!("{name}: its offsets are impossible")));
            };
            if end > bytes.len() || start > end {
                return Err(damaged(format!("{name}: its data lie outside the file")));
            }
            let len = info.shape.iter().try_fold(1_usize, |n, &size| n.checked_mul(size));
            let len = len.ok_or_else(|| damaged(format!("{name}: its shape is impossible")))?;
            let expected = len.checked_mul(info.dtype.bitsize()).map(|bits| bits.div_ceil(8));
            if expected != Some(end - start) {
                return Err(damaged(format!("{name}: its shape and its data have different sizes")));
            }
            tensors.insert(name, TensorInfo { dtype: info.dtype, shape: info.shape.clone(), start, len });
        }
        let metadata = metadata.metadata().clone().unwrap_or_default().into_iter().collect();
        Ok(Weights { path: path.to_path_buf(), buffer: Arc::new(buffer), metadata, tensors })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The header's metadata, by key.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// The tensors, by name.
    pub fn tensors(&self) -> &BTreeMap<String, TensorInfo> {
        &self.tensors
    }

    /// Bytes of the file.
    pub fn len_bytes(&self) -> usize {
        self.buffer.bytes().len()
    }

    /// The configuration in the header of an exported component.
    ///
    /// # Errors
    /// [`LoadError::Mismatch`] if the file is not an exported component, [`LoadError::Config`] if its configuration is
    /// not valid.
    pub fn config(&self) -> Result<Mamba3JepaConfig, LoadError> {
        let mismatch = |reason: String| LoadError::Mismatch { path: self.path.clone(), reason };
        if self.metadata.get("format").map(String::as_str) != Some(FORMAT) {
            return Err(mismatch(format!(
                "not a file of a Mamba3-JEPA export: its metadata name no format {FORMAT:?}"
            )));
        }
        let version = self.metadata.get("format_version").map_or("none", String::as_str);
        if !FORMAT_VERSIONS.contains(&version) {
            return Err(mismatch(format!(
                "it has export format {version}; this version reads {}",
                FORMAT_VERSIONS.join(" and ")
            )));
        }
        let Some(json) = self.metadata.get("config") else {
            return Err(mismatch("its metadata have no config".into()));
        };
        Mamba3JepaConfig::from_json(json, &self.path)
    }

    /// The numbers of a tensor of F32, F16, BF16, F64 or U8 as f32, row-major; those of F64 are rounded.
    ///
    /// # Errors
    /// [`LoadError::MissingKey`], or [`LoadError::Type`] for any other type.
    pub fn to_f32(&self, key: &str) -> Result<Vec<f32>, LoadError> {
        let info = self.tensors.get(key).ok_or_else(|| self.missing(key))?;
        Ok(match info.dtype {
            Dtype::F32 => self.numbers::<f32>(info).as_slice().to_vec(),
            Dtype::F16 => self.numbers::<f16>(info).as_slice().iter().map(|x| x.to_f32()).collect(),
            Dtype::BF16 => self.numbers::<bf16>(info).as_slice().iter().map(|x| x.to_f32()).collect(),
            Dtype::F64 => self.numbers::<f64>(info).as_slice().iter().map(|&x| x as f32).collect(),
            Dtype::U8 => self.numbers::<u8>(info).as_slice().iter().map(|&x| f32::from(x)).collect(),
            _ => return Err(self.wrong_type(key, "F32, F16, BF16, F64 or U8", info.dtype)),
        })
    }

    /// The numbers of an I64 tensor.
    ///
    /// # Errors
    /// [`LoadError::MissingKey`] or [`LoadError::Type`].
    pub fn to_i64(&self, key: &str) -> Result<Vec<i64>, LoadError> {
        let info = self.tensors.get(key).ok_or_else(|| self.missing(key))?;
        match info.dtype {
            Dtype::I64 => Ok(self.numbers::<i64>(info).as_slice().to_vec()),
            _ => Err(self.wrong_type(key, "I64", info.dtype)),
        }
    }

    /// The bytes of a U8 tensor.
    ///
    /// # Errors
    /// [`LoadError::MissingKey`] or [`LoadError::Type`].
    pub fn to_u8(&self, key: &str) -> Result<Vec<u8>, LoadError> {
        let info = self.tensors.get(key).ok_or_else(|| self.missing(key))?;
        match info.dtype {
            Dtype::U8 => Ok(self.numbers::<u8>(info).as_slice().to_vec()),
            _ => Err(self.wrong_type(key, "U8", info.dtype)),
        }
    }

    /// A tensor of F32, F16 or BF16 as a matrix, its first dimension by all others together; it shares the memory of the
    /// file.
    ///
    /// # Errors
    /// [`LoadError::MissingKey`] or [`LoadError::Type`].
    pub fn to_matrix(&self, key: &str) -> Result<Matrix, LoadError> {
        let info = self.tensors.get(key).ok_or_else(|| self.missing(key))?;
        let rows = info.shape.first().copied().unwrap_or(1);
        let cols = info.shape.iter().skip(1).fold(1, |n: usize, &size| n.saturating_mul(size));
        self.matrix(info, rows, cols).ok_or_else(|| self.wrong_type(key, "F32, F16 or BF16", info.dtype))
    }

    pub(crate) fn matrix(&self, info: &TensorInfo, rows: usize, cols: usize) -> Option<Matrix> {
        match info.dtype {
            Dtype::F32 => Some(Matrix::from_f32(rows, cols, self.numbers(info))),
            Dtype::F16 => Some(Matrix::from_f16(rows, cols, self.numbers(info))),
            Dtype::BF16 => Some(Matrix::from_bf16(rows, cols, self.numbers(info))),
            _ => None,
        }
    }

    /// The bytes of a tensor of this file, as they are stored.
    pub(crate) fn tensor_bytes(&self, info: &TensorInfo) -> &[u8] {
        &self.buffer.bytes()[info.start..info.start + info.len * info.dtype.bitsize() / 8]
    }

    fn numbers<T: bytemuck::Pod>(&self, info: &TensorInfo) -> Numbers<T> {
        Numbers::new(&self.buffer, info.start, info.len)
    }

    fn missing(&self, key: &str) -> LoadError {
        LoadError::MissingKey { path: self.path.clone(), key: key.into() }
    }

    fn wrong_type(&self, key: &str, expected: &str, found: Dtype) -> LoadError {
        LoadError::Type {
            path: self.path.clone(),
            key: key.into(),
            expected: expected.into(),
            found: format!("{found:?}"),
        }
    }
}

const WORD: usize = size_of::<u64>();
