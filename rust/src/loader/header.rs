//! What a safetensors file says it holds, read without its tensors.

use std::collections::BTreeMap;
use std::io::{self, Read};
use std::path::Path;

use safetensors::Dtype;
use safetensors::tensor::Metadata;

use super::MAX_FILE;
use crate::error::LoadError;
use crate::files::open_file;

/// As the `safetensors` library has it.
const MAX_HEADER: u64 = 100_000_000;

/// The header of a safetensors file.
#[derive(Clone, Debug)]
pub struct Header {
    /// Bytes of the whole file.
    pub bytes: u64,
    /// The metadata, by key.
    pub metadata: BTreeMap<String, String>,
    /// Type and shape of every tensor, by name.
    pub tensors: BTreeMap<String, (Dtype, Vec<usize>)>,
}

/// Reads the header of a safetensors file, and checks that the file is as long as it says.
///
/// # Errors
/// [`LoadError::Read`] if the file cannot be read, [`LoadError::Damaged`] if it is not a whole safetensors file.
pub fn read_header(path: impl AsRef<Path>) -> Result<Header, LoadError> {
    let path = path.as_ref();
    let unreadable = |source: io::Error| LoadError::Read { path: path.to_path_buf(), source };
    let damaged = |reason: &str| LoadError::Damaged {
        path: path.to_path_buf(),
        reason: format!("not a safetensors file, or cut short: {reason}"),
    };
    let mut file = open_file(path).map_err(unreadable)?;
    let bytes = file.metadata().map_err(unreadable)?.len();
    let mut word = [0; size_of::<u64>()];
    let data = bytes.checked_sub(word.len() as u64).ok_or_else(|| damaged("it has no header"))?;
    file.read_exact(&mut word).map_err(unreadable)?;
    let length = u64::from_le_bytes(word);
    if bytes > MAX_FILE {
        return Err(damaged(&format!("{bytes} bytes are more than this crate reads")));
    }
    if length > MAX_HEADER.min(data) {
        return Err(damaged("its header has an impossible length"));
    }
    let mut text = Vec::new();
    file.take(length).read_to_end(&mut text).map_err(unreadable)?;
    let header: Metadata = serde_json::from_slice(&text).map_err(|error| damaged(&error.to_string()))?;
    if u64::try_from(header.data_len()) != Ok(data - length) {
        return Err(damaged("it is not as long as its header says"));
    }
    let tensors = header.tensors().into_iter().map(|(name, info)| (name, (info.dtype, info.shape.clone()))).collect();
    let metadata = header.metadata().clone().unwrap_or_default().into_iter().collect();
    Ok(Header { bytes, metadata, tensors })
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::loader::{NewTensor, load_safetensors, write_safetensors};

    #[test]
    fn the_header_alone_is_that_of_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.safetensors");
        let tensor = NewTensor { name: "a.b", shape: &[2, 1], numbers: &[1.0, 2.0] };
        write_safetensors(&path, &[tensor], &[("key", "value")]).unwrap();
        let header = read_header(&path).unwrap();
        assert_eq!(header.bytes, fs::metadata(&path).unwrap().len());
        assert_eq!(&header.metadata, load_safetensors(&path).unwrap().metadata());
        assert_eq!(header.tensors["a.b"], (Dtype::F32, vec![2, 1]));
    }

    #[test]
    fn what_is_no_safetensors_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.safetensors");
        let tensor = NewTensor { name: "a", shape: &[1], numbers: &[1.0] };
        write_safetensors(&path, &[tensor], &[]).unwrap();
        let whole = fs::read(&path).unwrap();
        for length in 0..whole.len() {
            fs::write(&path, &whole[..length]).unwrap();
            assert!(read_header(&path).unwrap_err().to_string().contains("cut short"), "{length}");
        }
        fs::write(&path, [whole.as_slice(), &[0]].concat()).unwrap();
        assert!(read_header(&path).unwrap_err().to_string().contains("not as long"));
        assert!(matches!(read_header(folder.path().join("none")), Err(LoadError::Read { .. })));
        assert!(read_header(folder.path()).is_err());
    }
}
