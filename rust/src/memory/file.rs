//! What a saved memory's file holds. Letters: M texts, P episodes, S length of an episode's key, E embedding width.

use std::path::Path;

use safetensors::Dtype;
use serde_json::json;

use super::{Episode, Episodes, FORMAT, FORMAT_VERSION, KnowledgeMemory, READABLE_VERSIONS};
use crate::error::Error;
use crate::loader::{NewTensor, TensorInfo, Weights, load_safetensors, write_safetensors};

const TENSOR: &str = "embeddings";
const STATES: &str = "episode_states";
const QUESTIONS: &str = "episode_questions";
const ANSWERS: &str = "episode_answers";

impl KnowledgeMemory {
    /// A saved memory of whatever model, checked against itself.
    ///
    /// # Errors
    /// [`Error::Load`] or [`Error::File`]: the file is missing, damaged, or no memory that this version reads.
    pub fn read(path: impl AsRef<Path>) -> Result<KnowledgeMemory, Error> {
        let path = path.as_ref();
        let weights = load_safetensors(path)?;
        let failed = |reason: String| Error::File { path: path.to_path_buf(), reason };
        let said = |key: &str| weights.metadata().get(key).map(String::as_str);
        if said("format") != Some(FORMAT) {
            return Err(failed("not a saved memory; make one with ask --save-memory, or memory add".into()));
        }
        let version = said("format_version").unwrap_or("none");
        if !READABLE_VERSIONS.contains(&version) {
            return Err(failed(format!(
                "a saved memory of format {version:?}, this version reads {}; make it again from its texts: ask --memory \
                 TEXTS.txt --save-memory FILE",
                READABLE_VERSIONS.join(" and ")
            )));
        }
        let texts: Option<Vec<String>> = said("texts").and_then(|json| serde_json::from_str(json).ok());
        let rows = texts.as_ref().map_or(0, Vec::len);
        let (Some(texts), Some((embeddings, width))) = (texts, finite(&weights, TENSOR, rows)?) else {
            return Err(failed(format!(
                "damaged: expected {rows} texts and finite F32 embeddings of shape ({rows}, E)"
            )));
        };
        let episodes = episodes(&weights, width, failed)?;
        Ok(KnowledgeMemory { texts, embeddings, width, encoder: said("encoder").unwrap_or("").into(), episodes })
    }

    /// Writes a safetensors file that both halves of the project read, whole or not at all.
    ///
    /// # Errors
    /// [`Error::File`] if it cannot be written; what was at `path` is unchanged.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<(), Error> {
        let texts = list(self.texts.iter().map(|text| json!(text).to_string()));
        let mut metadata = vec![
            ("format", FORMAT),
            ("format_version", FORMAT_VERSION),
            ("encoder", self.encoder.as_str()),
            ("texts", texts.as_str()),
        ];
        let shape = [self.texts.len(), self.width];
        let mut tensors = vec![NewTensor { name: TENSOR, shape: &shape, numbers: &self.embeddings }];
        let entries = list(self.episodes.iter().flat_map(|episodes| &episodes.entries).map(object));
        let (width, wide) = self.episodes.as_ref().map_or((0, 0), Episodes::widths);
        let rows = self.episodes.as_ref().map_or(0, Episodes::len);
        let (states, embeddings) = ([rows, width], [rows, wide]);
        if let Some(episodes) = &self.episodes {
            metadata.extend([("observer", episodes.observer.as_str()), ("episodes", entries.as_str())]);
            tensors.extend([
                NewTensor { name: STATES, shape: &states, numbers: &episodes.seen },
                NewTensor { name: QUESTIONS, shape: &embeddings, numbers: &episodes.questions },
                NewTensor { name: ANSWERS, shape: &embeddings, numbers: &episodes.answers },
            ]);
        }
        write_safetensors(path.as_ref(), &tensors, &metadata)
    }
}

/// The episodes of a file with text embeddings of `width`, if it has any.
fn episodes(weights: &Weights, width: usize, failed: impl Fn(String) -> Error) -> Result<Option<Episodes>, Error> {
    let said = |key: &str| weights.metadata().get(key).map(String::as_str);
    if said("episodes").is_none()
        && ![STATES, QUESTIONS, ANSWERS].iter().any(|name| weights.tensors().contains_key(*name))
    {
        return Ok(None);
    }
    let entries: Vec<Episode> = said("episodes").and_then(|json| serde_json::from_str(json).ok()).unwrap_or_default();
    let rows = entries.len();
    let damaged = || {
        failed(format!(
            "damaged: expected {rows} episodes with an observer, and finite F32 {STATES}, {QUESTIONS}, {ANSWERS} with a \
             row for each"
        ))
    };
    let embeddings = |name: &str| Ok::<_, Error>(finite(weights, name, rows)?.filter(|(_, found)| *found == width));
    let (seen, questions, answers) = (finite(weights, STATES, rows)?, embeddings(QUESTIONS)?, embeddings(ANSWERS)?);
    match (seen, questions, answers, said("observer")) {
        (Some((seen, _)), Some((questions, _)), Some((answers, _)), Some(observer)) if rows > 0 => {
            Ok(Some(Episodes { entries, seen, questions, answers, observer: observer.into() }))
        }
        _ => Err(damaged()),
    }
}

/// A tensor of finite F32 with so many rows, and their width; `None` where it is something else.
fn finite(weights: &Weights, name: &str, rows: usize) -> Result<Option<(Vec<f32>, usize)>, Error> {
    let is_right = |info: &&TensorInfo| info.dtype == Dtype::F32 && info.shape.len() == 2 && info.shape[0] == rows;
    let Some(info) = weights.tensors().get(name).filter(is_right) else { return Ok(None) };
    let numbers = weights.to_f32(name)?;
    Ok(numbers.iter().all(|x| x.is_finite()).then_some((numbers, info.shape[1])))
}

/// A JSON list as Python's `json.dumps` writes it.
fn list(items: impl Iterator<Item = String>) -> String {
    format!("[{}]", items.collect::<Vec<_>>().join(", "))
}

/// An episode as Python's `json.dumps` writes it.
fn object(Episode { question, answer, image }: &Episode) -> String {
    format!(r#"{{"question": {}, "answer": {}, "image": {}}}"#, json!(question), json!(answer), json!(image))
}
