use super::*;
use crate::loader::{NewTensor, write_safetensors};

fn memory() -> KnowledgeMemory {
    let texts = ["red", "it's \"blue\"\n", "grün 日"].map(String::from).into();
    let embeddings = vec![1.0, 0.0, 0.0, 1.0, -0.6, 0.8];
    KnowledgeMemory { texts, embeddings, width: 2, encoder: "ab".repeat(32), episodes: None }
}

fn message(path: &Path, width: usize, encoder: &str) -> String {
    let checked = KnowledgeMemory::read(path).and_then(|memory| memory.check_encoder(path, width, encoder));
    checked.expect_err("no memory of this model").to_string()
}

#[test]
fn finds_the_nearest_texts() {
    let memory = memory();
    let found = memory.search(&[0.0, 2.0], 2).unwrap();
    assert_eq!((found[0], found[1].0), (("it's \"blue\"\n", 1.0), "grün 日"));
    assert!((found[1].1 - 0.8).abs() < 1e-6);
    assert_eq!(memory.search(&[1.0, 0.0], 9).unwrap().len(), 3);
    assert!(memory.search(&[1.0], 1).is_err());
}

#[test]
fn what_is_saved_can_be_read_by_the_same_encoder_only() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("facts.safetensors");
    memory().save(&path).unwrap();
    assert_eq!(KnowledgeMemory::read(&path).unwrap(), memory());
    assert!(message(&path, 2, "cd").contains("made with another Y-Encoder or tokenizer"));
    assert!(message(&path, 3, memory().encoder()).contains("damaged: expected 3 texts and finite F32 embeddings"));
}

#[test]
fn what_is_no_memory_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("facts.safetensors");
    assert!(message(&path, 2, "e").contains("cannot be read"));
    std::fs::write(&path, "red\nblue\n").unwrap();
    assert!(message(&path, 2, "e").contains("not a safetensors file"));
    let write = |numbers: &[f32], metadata: &[(&str, &str)]| {
        write_safetensors(&path, &[NewTensor { name: "embeddings", shape: &[1, 2], numbers }], metadata).unwrap();
        message(&path, 2, "e")
    };
    let head = [("format", FORMAT), ("format_version", "2"), ("encoder", "e")];
    assert!(write(&[1.0, 0.0], &[]).contains("not a saved memory"));
    let old = [("format", FORMAT), ("format_version", "1"), ("encoder", "e")];
    assert!(write(&[1.0, 0.0], &old).contains("format \"1\", this version reads 2 and 3"));
    for texts in ["[]", "[1]", "{}", "[\"a\", \"b\"]", "[\"a\""] {
        assert!(write(&[1.0, 0.0], &[&head[..], &[("texts", texts)]].concat()).contains("damaged"), "{texts}");
    }
    assert!(write(&[1.0, f32::NAN], &[&head[..], &[("texts", "[\"a\"]")]].concat()).contains("damaged"));
    assert!(write(&[1.0, 0.0], &head).contains("damaged"));
}
