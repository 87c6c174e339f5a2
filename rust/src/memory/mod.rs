//! A memory: texts (facts) with their Y-Encoder embeddings, and episodes, looked up when a model is confused.
//!
//! Letters: M texts, P episodes, E embedding width.

mod changes;
mod digest;
mod episodes;
mod file;
mod lock;

use std::path::Path;

use serde::Serialize;

pub use changes::Changes;
pub(crate) use digest::{encoder_digest, observer_digest};
pub use episodes::{Episode, Episodes};

use crate::error::Error;
use crate::files::path_text;
use crate::nearest::nearest;
use crate::texts::{distinct, read_lines};
use crate::vljepa::{Mamba3Jepa, Progress};

/// What a saved memory calls itself, the version of the format that this crate writes, and those that it reads.
pub(crate) const FORMAT: &str = "mamba3-jepa memory";
pub(crate) const FORMAT_VERSION: &str = "3";
pub(crate) const READABLE_VERSIONS: [&str; 2] = ["2", FORMAT_VERSION];

/// M different texts and their embeddings (M, E) of unit length, and P episodes.
#[derive(Clone, Debug, PartialEq)]
pub struct KnowledgeMemory {
    texts: Vec<String>,
    embeddings: Vec<f32>,
    width: usize,
    encoder: String,
    episodes: Option<Episodes>,
}

/// Of what kind something remembered is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum MemoryKind {
    /// A text.
    Fact,
    /// A picture and a question seen before, with the right answer.
    Episode,
}

/// One thing that is remembered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Entry {
    /// From 1 on, facts first.
    pub number: usize,
    /// Of what kind it is.
    pub kind: MemoryKind,
    /// A fact's text, or an episode's question and answer.
    pub text: String,
    /// The name of an episode's image file.
    pub image: Option<String>,
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
        Ok(KnowledgeMemory { texts, embeddings, ..Self::empty(model) })
    }

    /// One that holds nothing, to add to.
    pub fn empty(model: &Mamba3Jepa) -> KnowledgeMemory {
        KnowledgeMemory {
            texts: Vec::new(),
            embeddings: Vec::new(),
            width: model.config().embed_dim,
            encoder: model.encoder_digest(),
            episodes: None,
        }
    }

    /// The same facts with these episodes, which the same model has seen.
    ///
    /// ```no_run
    /// use kore_vljepa::memory::{Episode, Episodes, KnowledgeMemory};
    /// use kore_vljepa::vljepa::{Mamba3Jepa, Sample};
    ///
    /// # fn main() -> Result<(), kore_vljepa::Error> {
    /// let model = Mamba3Jepa::from_dir("weights/")?;
    /// let seen = model.observe(&[Sample::file("photo.jpg").asking("Whose car is this?")])?;
    /// let episode = Episode { question: Some("Whose car is this?".into()), answer: "Anna's".into(), image: None };
    /// let episodes = Episodes::of(&model, &seen, vec![episode])?;
    /// KnowledgeMemory::empty(&model).with_episodes(episodes).add_to(&model, "memory.safetensors")?;
    /// # Ok(())
    /// # }
    /// ```
    #[must_use]
    pub fn with_episodes(self, episodes: Episodes) -> KnowledgeMemory {
        KnowledgeMemory { episodes: (!episodes.is_empty()).then_some(episodes), ..self }
    }

    /// A saved memory (`.safetensors`), or a text file with one text a line, which is embedded now; see
    /// [`KnowledgeMemory::build`] for `progress`. What cannot be of use, an empty memory or episodes that the model does not
    /// recall, is a warning of the model.
    ///
    /// # Errors
    /// As for [`KnowledgeMemory::load`]; or the text file is missing, empty or not UTF-8.
    pub fn open(model: &Mamba3Jepa, path: impl AsRef<Path>, progress: Progress<'_>) -> Result<KnowledgeMemory, Error> {
        let path = path.as_ref();
        if path.extension().is_none_or(|suffix| suffix != "safetensors") {
            return Self::build(model, &read_lines(path, "text to remember")?, progress);
        }
        let memory = Self::load(model, path)?;
        let name = path_text(path);
        if memory.is_empty() {
            model.warn(&format!("{name}: this memory is empty: there is nothing to look up"));
        } else if memory.episodes.is_some() && !model.recalls_episodes() {
            model.warn(&format!("{name}: its episodes are not looked up: this model has not learned to recall any"));
        }
        Ok(memory)
    }

    /// Reads a saved memory that this model's Y-Encoder made, and its predictor, where there are episodes.
    ///
    /// # Errors
    /// [`Error::Load`] or [`Error::File`]: the file is missing, damaged, no memory, or was made with other weights.
    pub fn load(model: &Mamba3Jepa, path: impl AsRef<Path>) -> Result<KnowledgeMemory, Error> {
        let path = path.as_ref();
        let memory = Self::read(path)?;
        memory.check_encoder(path, model.config().embed_dim, &model.encoder_digest())?;
        let Some(episodes) = &memory.episodes else { return Ok(memory) };
        let failed = |reason: String| Err(Error::File { path: path.to_path_buf(), reason });
        if episodes.observer != model.observer_digest() {
            return failed(
                "its episodes were seen by another predictor, so what was seen means nothing to this model; remember them \
                 again with it, or remove them (memory list FILE gives their numbers)"
                    .into(),
            );
        }
        let (found, width) = (episodes.widths().0, model.config().episode_dim());
        if found != width {
            return failed(format!(
                "its episode_states have width {found}, this model finds episodes by {width} numbers; remember them again \
                 with it"
            ));
        }
        Ok(memory)
    }

    /// Whether the embeddings have `width`, and the text encoder with the digest `encoder` made them.
    fn check_encoder(&self, path: &Path, width: usize, encoder: &str) -> Result<(), Error> {
        let failed = |reason: String| Err(Error::File { path: path.to_path_buf(), reason });
        if self.encoder != encoder {
            return failed(
                "made with another Y-Encoder or tokenizer, so its embeddings mean nothing to this model; make it again \
                 from its texts"
                    .into(),
            );
        }
        if self.width != width {
            let rows = self.texts.len();
            return failed(format!(
                "damaged: expected {rows} texts and finite F32 embeddings of shape ({rows}, {width})"
            ));
        }
        Ok(())
    }

    /// Facts and episodes.
    pub fn len(&self) -> usize {
        self.texts.len() + self.episodes.as_ref().map_or(0, Episodes::len)
    }

    /// Whether nothing is remembered.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The texts.
    pub fn texts(&self) -> &[String] {
        &self.texts
    }

    /// Their embeddings, (M, E).
    pub fn embeddings(&self) -> &[f32] {
        &self.embeddings
    }

    /// The episodes, if there are any.
    pub fn episodes(&self) -> Option<&Episodes> {
        self.episodes.as_ref()
    }

    /// Digest of the text encoder that made the embeddings.
    pub fn encoder(&self) -> &str {
        &self.encoder
    }

    /// All that is remembered, in order.
    pub fn entries(&self) -> Vec<Entry> {
        let facts = self.texts.iter().map(|text| (MemoryKind::Fact, text.clone(), None));
        let episodes = self.episodes.iter().flat_map(|episodes| &episodes.entries);
        let episodes = episodes.map(|entry| (MemoryKind::Episode, entry.text(), entry.image.clone()));
        let all = facts.chain(episodes).enumerate();
        all.map(|(row, (kind, text, image))| Entry { number: row + 1, kind, text, image }).collect()
    }

    /// The `k` texts nearest to `embedding` (E,) with their cosines, nearest first.
    ///
    /// # Errors
    /// [`Error::Input`] if `embedding` has another length, or a number that is not finite.
    pub fn search(&self, embedding: &[f32], k: usize) -> Result<Vec<(&str, f32)>, Error> {
        let found = self.places(embedding, k)?;
        Ok(found.into_iter().map(|(place, cosine)| (self.texts[place].as_str(), cosine)).collect())
    }

    /// [`KnowledgeMemory::search`] for the texts' places.
    pub(crate) fn places(&self, embedding: &[f32], k: usize) -> Result<Vec<(usize, f32)>, Error> {
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
        Ok(nearest(embedding, &self.embeddings, k))
    }

    /// The embedding of a text.
    pub(crate) fn embedding(&self, place: usize) -> &[f32] {
        &self.embeddings[place * self.width..][..self.width]
    }

    /// Puts what `others`, a memory of the same model, holds behind what is here. A text that is here already is not added.
    fn join(&mut self, others: &KnowledgeMemory) -> Changes {
        let new: Vec<usize> = (0..others.texts.len()).filter(|&row| !self.texts.contains(&others.texts[row])).collect();
        for &row in &new {
            self.texts.push(others.texts[row].clone());
            self.embeddings.extend(others.embedding(row));
        }
        let (mut added, mut changed) = (0, 0);
        if let Some(seen) = &others.episodes {
            let none = || Episodes {
                entries: Vec::new(),
                seen: Vec::new(),
                questions: Vec::new(),
                answers: Vec::new(),
                observer: seen.observer.clone(),
            };
            (added, changed) = self.episodes.get_or_insert_with(none).join(seen);
        }
        Changes { added: new.len() + added, changed }
    }

    /// The entries in these rows, which ascend.
    fn only(&self, rows: &[usize]) -> KnowledgeMemory {
        let facts = self.texts.len();
        let (texts, rest): (Vec<usize>, Vec<usize>) = rows.iter().partition(|&&row| row < facts);
        let rest: Vec<usize> = rest.into_iter().map(|row| row - facts).collect();
        KnowledgeMemory {
            texts: texts.iter().map(|&row| self.texts[row].clone()).collect(),
            embeddings: texts.iter().flat_map(|&row| self.embedding(row)).copied().collect(),
            episodes: self.episodes.as_ref().and_then(|episodes| episodes.only(&rest)),
            ..self.clone()
        }
    }
}

#[cfg(test)]
mod tests;
