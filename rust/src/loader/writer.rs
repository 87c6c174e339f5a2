//! safetensors files as Python's export writes them: the same bytes for the same tensors, whole or not at all.
//!
//! The format: <https://github.com/huggingface/safetensors#format>.

use std::path::Path;

use serde_json::json;

use crate::error::Error;
use crate::files::write_whole;

const ALIGNMENT: usize = 8;

/// A tensor of float32 to be written.
#[derive(Clone, Copy, Debug)]
pub struct NewTensor<'a> {
    /// Its name.
    pub name: &'a str,
    /// Sizes, outermost first.
    pub shape: &'a [usize],
    /// The numbers, row-major.
    pub numbers: &'a [f32],
}

/// Writes tensors, ordered by name, and metadata, in the order given.
///
/// # Errors
/// [`Error::Input`] if the numbers of a tensor do not fill its shape, or two have one name; [`Error::File`] if the file
/// cannot be written: then what was at `path` is unchanged.
pub fn write_safetensors(path: &Path, tensors: &[NewTensor<'_>], metadata: &[(&str, &str)]) -> Result<(), Error> {
    let mut tensors = tensors.to_vec();
    tensors.sort_by_key(|tensor| tensor.name);
    if let Some(pair) = tensors.windows(2).find(|pair| pair[0].name == pair[1].name) {
        return Err(Error::Input(format!("two tensors are called {:?}", pair[0].name)));
    }
    let header = header(&tensors, metadata)?;
    write_whole(path, |out| {
        out.write_all(&(header.len() as u64).to_le_bytes())?;
        out.write_all(header.as_bytes())?;
        for tensor in &tensors {
            tensor.numbers.iter().try_for_each(|number| out.write_all(&number.to_le_bytes()))?;
        }
        Ok(())
    })
}

fn header(tensors: &[NewTensor<'_>], metadata: &[(&str, &str)]) -> Result<String, Error> {
    let member = |key: &str, value: String| format!("{}:{value}", json!(key));
    let metadata: Vec<String> = metadata.iter().map(|&(key, value)| member(key, json!(value).to_string())).collect();
    let mut members = vec![member("__metadata__", format!("{{{}}}", metadata.join(",")))];
    let mut start = 0;
    for tensor in tensors {
        if tensor.shape.iter().try_fold(1_usize, |n, &size| n.checked_mul(size)) != Some(tensor.numbers.len()) {
            return Err(Error::Input(format!(
                "{}: {} numbers do not fill the shape {:?}",
                tensor.name,
                tensor.numbers.len(),
                tensor.shape
            )));
        }
        let end = start + size_of_val(tensor.numbers);
        let entry = format!(r#"{{"dtype":"F32","shape":{},"data_offsets":[{start},{end}]}}"#, json!(tensor.shape));
        members.push(member(tensor.name, entry));
        start = end;
    }
    let header = format!("{{{}}}", members.join(","));
    let padding = header.len().next_multiple_of(ALIGNMENT) - header.len();
    Ok(header + &" ".repeat(padding))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::loader::load_safetensors;

    #[test]
    fn what_is_written_can_be_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.safetensors");
        let tensors = [
            NewTensor { name: "texts", shape: &[1, 3], numbers: &[1.0, -2.5, 0.1] },
            NewTensor { name: "images", shape: &[2, 1], numbers: &[3.0, 4.0] },
            NewTensor { name: "none", shape: &[0, 4], numbers: &[] },
        ];
        write_safetensors(&path, &tensors, &[("z", "[\"Größe \u{1b}\", \"\\\"色\"]"), ("a", "")]).unwrap();
        let read = load_safetensors(&path).unwrap();
        assert_eq!(read.metadata()["z"], "[\"Größe \u{1b}\", \"\\\"色\"]");
        assert_eq!(read.metadata()["a"], "");
        assert_eq!(std::fs::read(&path).unwrap()[0] % 8, 0, "the tensors would not be aligned");
        for tensor in tensors {
            assert_eq!(read.tensors()[tensor.name].shape, tensor.shape);
            assert_eq!(read.to_f32(tensor.name).unwrap(), tensor.numbers);
        }
    }

    #[test]
    fn the_bytes_are_those_of_the_python_writer() {
        let tensors = [
            NewTensor { name: "b", shape: &[1, 2], numbers: &[1.0, 2.0] },
            NewTensor { name: "a", shape: &[1], numbers: &[3.0] },
        ];
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.safetensors");
        write_safetensors(&path, &tensors, &[("format", "mamba3-jepa embeddings")]).unwrap();
        let header = concat!(
            r#"{"__metadata__":{"format":"mamba3-jepa embeddings"},"#,
            r#""a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"#,
            r#""b":{"dtype":"F32","shape":[1,2],"data_offsets":[4,12]}}       "#,
        );
        let mut expected = Vec::from(168_u64.to_le_bytes());
        expected.extend(header.as_bytes());
        for number in [3.0_f32, 1.0, 2.0] {
            expected.extend(number.to_le_bytes());
        }
        assert_eq!(String::from_utf8_lossy(&std::fs::read(&path).unwrap()), String::from_utf8_lossy(&expected));
    }

    #[test]
    fn tensors_that_do_not_fit() {
        let path = Path::new("/proc/nowhere/x.safetensors");
        let tensor = NewTensor { name: "a", shape: &[2], numbers: &[1.0] };
        assert!(write_safetensors(path, &[tensor], &[]).unwrap_err().to_string().contains("do not fill"));
        let tensor = NewTensor { name: "a", shape: &[1], numbers: &[1.0] };
        assert!(write_safetensors(path, &[tensor, tensor], &[]).unwrap_err().to_string().contains("two tensors"));
        assert!(write_safetensors(path, &[tensor], &[]).unwrap_err().to_string().contains("cannot write"));
    }
}
