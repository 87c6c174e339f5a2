//! Files as they should be, and files as they should not: every one of these is answered with a sentence.

use std::path::Path;

use proptest::prelude::*;

use super::*;

/// A safetensors file from its header's text and its data.
fn file(header: &str, data: &[u8]) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    bytes.extend_from_slice(data);
    bytes
}

fn floats(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

fn open(bytes: &[u8]) -> Result<Weights, LoadError> {
    Weights::from_bytes("w.safetensors", bytes)
}

fn message(bytes: &[u8]) -> String {
    open(bytes).err().map_or_else(|| "no error".into(), |error| error.to_string())
}

#[test]
fn tensors_are_read_at_any_alignment() {
    for padding in 0..9 {
        let header = format!(
            r#"{{"a":{{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]}},"b":{{"dtype":"BF16","shape":[],"data_offsets":[16,18]}}}}{}"#,
            " ".repeat(padding)
        );
        let mut data = floats(&[1.0, -2.5, 3.0, f32::MIN_POSITIVE]);
        data.extend_from_slice(&half::bf16::from_f32(0.5).to_le_bytes());
        let weights = open(&file(&header, &data)).unwrap();
        assert_eq!(weights.to_f32("a").unwrap(), [1.0, -2.5, 3.0, f32::MIN_POSITIVE], "{padding}");
        assert_eq!(weights.to_f32("b").unwrap(), [0.5], "{padding}");
        assert_eq!(weights.tensors()["a"].shape, [2, 2]);
        let matrix = weights.matrix(&weights.tensors()["a"], 2, 2).unwrap();
        let mut row = [0.0; 2];
        matrix.row(1, &mut row);
        assert_eq!(row, [3.0, f32::MIN_POSITIVE]);
    }
}

#[test]
fn a_file_from_the_disk_is_the_file_from_memory_and_its_digest_is_right() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("w.safetensors");
    let values: Vec<f32> = (0_u16..40_000).map(f32::from).collect();
    let header = r#"{"__metadata__":{"k":"v"},"a":{"dtype":"F32","shape":[40000],"data_offsets":[0,160000]}} "#;
    let bytes = file(header, &floats(&values));
    assert_ne!(bytes.len() % 8, 0); // the last word is a part of one
    std::fs::write(&path, &bytes).unwrap();
    let weights = load_safetensors(&path).unwrap();
    assert_eq!(weights.to_f32("a").unwrap(), values);
    assert_eq!(weights.metadata()["k"], "v");
    assert_eq!(weights.len_bytes(), bytes.len());
    use sha2::{Digest, Sha256};
    let mut digest = Sha256::new();
    let buffer = Buffer::read(&path, Some(&mut digest)).unwrap();
    assert_eq!(buffer.bytes(), bytes);
    assert_eq!(digest.finalize(), Sha256::digest(&bytes));
}

#[cfg(feature = "mmap")]
#[test]
#[allow(unsafe_code, reason = "the mapped file belongs to this test")]
fn a_mapped_file_is_the_file_that_is_read() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("w.safetensors");
    let header = r#"{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,12]}}"#;
    std::fs::write(&path, file(header, &floats(&[1.0, 2.0, 3.0]))).unwrap();
    // SAFETY: nobody else knows the file.
    let weights = unsafe { load_mmap(&path) }.unwrap();
    assert_eq!(weights.to_f32("a").unwrap(), [1.0, 2.0, 3.0]);
}

#[test]
fn damaged_files_are_answered_with_a_sentence() {
    let entry =
        |shape: &str, offsets: &str| format!(r#"{{"a":{{"dtype":"F32","shape":{shape},"data_offsets":{offsets}}}}}"#);
    let cases: Vec<(&str, Vec<u8>)> = vec![
        ("empty", vec![]),
        ("half a length", vec![1, 2, 3]),
        ("a header longer than the file", file("{", &[]).into_iter().take(8).collect()),
        ("a length near 2^64", u64::MAX.to_le_bytes().to_vec()),
        ("a length of 2^63", (1_u64 << 63).to_le_bytes().to_vec()),
        ("no JSON", file("hello", &[])),
        ("data that are not there", file(&entry("[4]", "[0,16]"), &[0; 12])),
        ("data that nobody names", file(&entry("[1]", "[0,4]"), &[0; 12])),
        ("a shape larger than its data", file(&entry("[400]", "[0,16]"), &[0; 16])),
        ("a shape whose product overflows", file(&entry("[4294967296,4294967296,4]", "[0,16]"), &[0; 16])),
        ("offsets that run backwards", file(&entry("[1]", "[16,0]"), &[0; 16])),
        ("offsets near 2^64", file(&entry("[1]", "[18446744073709551608,18446744073709551612]"), &[0; 16])),
        ("a negative shape", file(&entry("[-1]", "[0,4]"), &[0; 4])),
        ("an unknown type", file(r#"{"a":{"dtype":"X9","shape":[1],"data_offsets":[0,4]}}"#, &[0; 4])),
        ("metadata that are no texts", file(r#"{"__metadata__":{"a":1}}"#, &[])),
        ("deep nesting", file(&"[".repeat(100_000), &[])),
    ];
    for (what, bytes) in cases {
        let said = message(&bytes);
        assert!(said.starts_with("w.safetensors: "), "{what}: {said}");
        assert!(!said.contains('\n'), "{what}: {said}");
    }
}

/// Sparse, and larger than any memory.
#[test]
fn a_large_file_that_is_none_is_refused_before_it_is_read() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("w.safetensors");
    let promises_less = file(r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#, &[0; 4]);
    for (start, size, expected) in [
        (&b"junk of more than eight bytes"[..], 1 << 39, "impossible length"),
        (&promises_less, 1 << 39, "not as long as its header says"),
        (&promises_less, MAX_FILE + 1, "more than this crate reads"),
    ] {
        std::fs::write(&path, start).unwrap();
        std::fs::File::options().write(true).open(&path).unwrap().set_len(size).unwrap();
        let message = load_safetensors(&path).err().unwrap().to_string();
        assert!(message.contains(expected), "{message}");
    }
}

#[test]
fn what_is_not_there_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let missing = folder.path().join("nothing.safetensors");
    let said = load_safetensors(&missing).err().map(|error| error.to_string()).unwrap();
    assert!(said.contains("nothing.safetensors"), "{said}");
    let said = load_safetensors(folder.path()).err().map(|error| error.to_string()).unwrap();
    assert!(said.contains(&folder.path().display().to_string()), "{said}");
    let weights = open(&file(r#"{"a":{"dtype":"I64","shape":[1],"data_offsets":[0,8]}}"#, &[0; 8])).unwrap();
    assert!(matches!(weights.to_f32("b"), Err(LoadError::MissingKey { .. })));
    assert!(matches!(weights.to_f32("a"), Err(LoadError::Type { .. })));
    assert!(matches!(weights.to_u8("a"), Err(LoadError::Type { .. })));
    assert_eq!(weights.to_i64("a").unwrap(), [0]);
    assert!(matches!(weights.config(), Err(LoadError::Mismatch { .. })));
}

fn any_file() -> impl Strategy<Value = Vec<u8>> {
    let header = r#"{"__metadata__":{"format":"mamba3-jepa"},"a":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]}}"#;
    let whole = file(header, &[7; 16]);
    (
        Just(whole),
        proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6),
        any::<prop::sample::Index>(),
    )
        .prop_map(|(mut bytes, changes, cut)| {
            for (place, value) in changes {
                let place = place.index(bytes.len());
                bytes[place] = value;
            }
            if cut.index(3) == 0 {
                bytes.truncate(cut.index(bytes.len()));
            }
            bytes
        })
}

proptest! {
    #[test]
    fn no_bytes_panic(bytes in any_file()) {
        if let Ok(weights) = Weights::from_bytes(Path::new("w"), &bytes) {
            for key in weights.tensors().keys() {
                let _ = weights.to_f32(key);
            }
            let _ = weights.config();
        }
    }
}
