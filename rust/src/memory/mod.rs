//! A small memory: texts with their Y-Encoder embeddings, looked up by cosine. Letters: M texts, E embedding width.

mod digest;

use std::path::Path;

use safetensors::Dtype;

pub(crate) use digest::encoder_digest;

use crate::error::Error;
use crate::loader::{NewTensor, load_safetensors, write_safetensors};
use crate::nearest::nearest;
use crate::texts::{distinct, read_lines};
use crate::vljepa::{Mamba3Jepa, Progress};

/// What a saved memory calls itself, and the version of the format that this crate writes and reads.
pub(crate) const FORMAT: &str = "mamba3-jepa memory";
pub(crate) const FORMAT_VERSION: &str = "2";
const TENSOR: &str = "embeddings";

/// M different texts and their embeddings (M, E) of unit length.
#[derive(Clone, Debug, PartialEq)]
pub struct KnowledgeMemory {
    texts: Vec<String>,
    embeddings: Vec<f32>,
    width: usize,
    encoder: String,
}

impl KnowledgeMemory {
    /// Embeds `texts`; of equal ones the first is kept. `progress` is called with the texts done and their number.
    ///
    /// ```no_run
    /// use kore_vljepa::memory::KnowledgeMemory;
    /// use kore_vljepa::vljepa::Mamba3Jepa;
    ///
    /// # fn main() -> Result<(), kore_vljepa::Error> {
    /// let model = Mamba3Jepa::from_dir("weights/")?;
    /// let memory = KnowledgeMemory::build(&model, &["The car is red."], &mut |_, _| {})?;
    /// memory.save("facts.safetensors")?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`Error::Input`]: no text, or an empty one.
    pub fn build(
        model: &Mamba3Jepa,
        texts: &[impl AsRef<str>],
        progress: Progress<'_>,
    ) -> Result<KnowledgeMemory, Error> {
        let texts = distinct(texts.iter().map(AsRef::as_ref));
        let embeddings = model.embed_text_with(&texts, progress)?.concat();
        let texts = texts.into_iter().map(String::from).collect();
        Ok(Self::new(texts, embeddings, model.encoder_digest()))
    }

    /// A saved memory (`.safetensors`), or a text file with one text a line, which is embedded now; see
    /// [`KnowledgeMemory::build`] for `progress`.
    ///
    /// # Errors
    /// [`Error::Load`] or [`Error::File`]: the file is missing, damaged, no memory, or was made with other weights; the
    /// text file is empty or not UTF-8.
    pub fn open(model: &Mamba3Jepa, path: impl AsRef<Path>, progress: Progress<'_>) -> Result<KnowledgeMemory, Error> {
        let path = path.as_ref();
        if path.extension().is_some_and(|suffix| suffix == "safetensors") {
            return Self::load(path, model.config().embed_dim, &model.encoder_digest());
        }
        Self::build(model, &read_lines(path, "text to remember")?, progress)
    }

    fn new(texts: Vec<String>, embeddings: Vec<f32>, encoder: String) -> KnowledgeMemory {
        let width = embeddings.len() / texts.len().max(1);
        KnowledgeMemory { texts, embeddings, width, encoder }
    }

    /// Reads a memory of embeddings of `width` that the text encoder with the digest `encoder` made.
    fn load(path: &Path, width: usize, encoder: &str) -> Result<KnowledgeMemory, Error> {
        let weights = load_safetensors(path)?;
        let failed = |reason: String| Err(Error::File { path: path.to_path_buf(), reason });
        let said = |key: &str| weights.metadata().get(key).map(String::as_str);
        if said("format") != Some(FORMAT) {
            return failed("not a saved memory; make one with ask --save-memory".into());
        }
        let version = said("format_version").unwrap_or("none");
        if version != FORMAT_VERSION {
            return failed(format!(
                "a saved memory of format {version:?}, this version reads {FORMAT_VERSION}; make it again from its texts: \
                 ask --memory TEXTS.txt --save-memory FILE"
            ));
        }
        if said("encoder") != Some(encoder) {
            return failed(
                "made with another Y-Encoder or tokenizer, so its embeddings mean nothing to this model; make it again \
                 from its texts"
                    .into(),
            );
        }
        let texts: Vec<String> = said("texts").and_then(|json| serde_json::from_str(json).ok()).unwrap_or_default();
        let info = weights.tensors().get(TENSOR);
        let is_right =
            |info: &crate::loader::TensorInfo| info.dtype == Dtype::F32 && info.shape == [texts.len(), width];
        let embeddings = if info.is_some_and(is_right) { weights.to_f32(TENSOR)? } else { Vec::new() };
        if texts.is_empty() || embeddings.is_empty() || !embeddings.iter().all(|x| x.is_finite()) {
            return failed(format!(
                "damaged: expected {} texts and finite F32 embeddings of shape ({}, {width})",
                texts.len(),
                texts.len()
            ));
        }
        Ok(Self::new(texts, embeddings, encoder.into()))
    }

    /// The texts.
    pub fn texts(&self) -> &[String] {
        &self.texts
    }

    /// Their embeddings, (M, E).
    pub fn embeddings(&self) -> &[f32] {
        &self.embeddings
    }

    /// Digest of the text encoder that made the embeddings.
    pub fn encoder(&self) -> &str {
        &self.encoder
    }

    /// The `k` texts nearest to `embedding` (E,) with their cosines, nearest first.
    ///
    /// # Errors
    /// [`Error::Input`] if `embedding` has another length, or a number that is not finite.
    pub fn search(&self, embedding: &[f32], k: usize) -> Result<Vec<(&str, f32)>, Error> {
        if embedding.len() != self.width {
            return Err(Error::Input(format!(
                "an embedding of length {}, but the memory's have {}",
                embedding.len(),
                self.width
            )));
        }
        if !embedding.iter().all(|x| x.is_finite()) {
            return Err(Error::Input("an embedding has a number that is not finite".into()));
        }
        let found = nearest(embedding, &self.embeddings, k);
        Ok(found.into_iter().map(|(place, cosine)| (self.texts[place].as_str(), cosine)).collect())
    }

    /// Writes a safetensors file that both halves of the project read, whole or not at all.
    ///
    /// # Errors
    /// [`Error::File`] if it cannot be written; what was at `path` is unchanged.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<(), Error> {
        let texts: Vec<String> =
            self.texts.iter().map(|text| serde_json::Value::from(text.as_str()).to_string()).collect();
        let texts = format!("[{}]", texts.join(", ")); // as Python's json.dumps writes a list
        let metadata = [
            ("format", FORMAT),
            ("format_version", FORMAT_VERSION),
            ("encoder", self.encoder.as_str()),
            ("texts", texts.as_str()),
        ];
        let shape = [self.texts.len(), self.width];
        write_safetensors(
            path.as_ref(),
            &[NewTensor { name: TENSOR, shape: &shape, numbers: &self.embeddings }],
            &metadata,
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memory() -> KnowledgeMemory {
        let texts = ["red", "it's \"blue\"\n", "grün 日"].map(String::from).into();
        KnowledgeMemory::new(texts, vec![1.0, 0.0, 0.0, 1.0, -0.6, 0.8], "ab".repeat(32))
    }

    fn message(path: &Path, width: usize, encoder: &str) -> String {
        KnowledgeMemory::load(path, width, encoder).expect_err("no memory of this model").to_string()
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
        assert_eq!(KnowledgeMemory::load(&path, 2, memory().encoder()).unwrap(), memory());
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
            write_safetensors(&path, &[NewTensor { name: TENSOR, shape: &[1, 2], numbers }], metadata).unwrap();
            message(&path, 2, "e")
        };
        let head = [("format", FORMAT), ("format_version", "2"), ("encoder", "e")];
        assert!(write(&[1.0, 0.0], &[]).contains("not a saved memory"));
        let old = [("format", FORMAT), ("format_version", "1"), ("encoder", "e")];
        assert!(write(&[1.0, 0.0], &old).contains("format \"1\", this version reads 2"));
        for texts in ["[]", "[1]", "{}", "[\"a\", \"b\"]", "[\"a\""] {
            assert!(write(&[1.0, 0.0], &[&head[..], &[("texts", texts)]].concat()).contains("damaged"), "{texts}");
        }
        assert!(write(&[1.0, f32::NAN], &[&head[..], &[("texts", "[\"a\"]")]].concat()).contains("damaged"));
        assert!(write(&[1.0, 0.0], &head).contains("damaged"));
    }
}
