//! Text to token ids and back, by the `tokenizer.json` that travels with the weights.

mod check;

use std::any::Any;
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::Value;
use tokenizers::{ModelWrapper, NormalizedString, Normalizer, Tokenizer as Library};

use crate::error::{Error, LoadError};
use crate::texts::distinct;

/// What the special tokens may be called; the first that the vocabulary has counts. Where there is none, eos stands in for
/// pad, which is masked wherever it stands, and for bos, which only has to be the same each time.
const PAD: [&str; 5] = ["<pad>", "[PAD]", "<|pad|>", "<|padding|>", "<PAD_TOKEN>"];
const BOS: [&str; 9] = [
    "<bos>",
    "<s>",
    "[BOS]",
    "[CLS]",
    "<|bos|>",
    "<|startoftext|>",
    "<|begin_of_text|>",
    "<\u{ff5c}begin\u{2581}of\u{2581}sentence\u{ff5c}>",
    "<BOS_TOKEN>",
];
const EOS: [&str; 10] = [
    "<eos>",
    "</s>",
    "[EOS]",
    "[SEP]",
    "<|eos|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<\u{ff5c}end\u{2581}of\u{2581}sentence\u{ff5c}>",
    "<EOS_TOKEN>",
    "<|im_end|>",
];

/// One text as token ids.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Encoded {
    /// bos, the text, eos.
    pub ids: Vec<u32>,
    /// Whether the text was longer than the limit, and was cut.
    pub truncated: bool,
}

/// A tokenizer with known pad, bos and eos; every encoded text is `[bos] ... [eos]`. One token may be several of them:
/// GPT-2 and GPT-NeoX begin and end with `<|endoftext|>`, CLIP and Llama have no pad.
///
/// The text never gives a special token: `<eos>` typed by somebody is encoded as five ordinary characters.
///
/// ```no_run
/// use kore_vljepa::tokenizer::Tokenizer;
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let tokenizer = Tokenizer::from_file("weights/tokenizer.json")?;
/// let encoded = tokenizer.encode("What color is the circle?", 64)?;
/// assert_eq!(tokenizer.decode(&encoded.ids)?, "What color is the circle?");
/// # Ok(())
/// # }
/// ```
pub struct Tokenizer {
    library: Library,
    path: PathBuf,
    unknown: Option<String>,
    pad_id: u32,
    bos_id: u32,
    eos_id: u32,
    vocab_size: usize,
}

impl Tokenizer {
    /// Reads a `tokenizer.json` of the `tokenizers` library. Of its kinds, the normalizer `Precompiled` and the decoder
    /// `Strip` with a `stop` are not read.
    ///
    /// # Errors
    /// [`LoadError::Read`] if the file cannot be read, [`LoadError::Damaged`] if it is not a tokenizer or lacks eos.
    pub fn from_file(path: impl AsRef<Path>) -> Result<Tokenizer, LoadError> {
        let path = path.as_ref();
        check_size(path)?;
        let json = fs::read(path).map_err(|source| LoadError::Read { path: path.to_path_buf(), source })?;
        Self::from_bytes(path, &json)
    }

    /// The tokenizer whose JSON is in `json`; `path` only names it in messages.
    ///
    /// # Errors
    /// [`LoadError::Damaged`] if it is not a tokenizer or lacks eos.
    pub fn from_bytes(path: impl AsRef<Path>, json: &[u8]) -> Result<Tokenizer, LoadError> {
        let path = path.as_ref();
        let invalid =
            |reason: String| damaged(path, &format!("not a tokenizer.json of the `tokenizers` library: {reason}"));
        if json.len() as u64 > check::MAX_BYTES {
            return Err(too_large(path, json.len() as u64));
        }
        let value: Value = serde_json::from_slice(json).map_err(|error| invalid(error.to_string()))?;
        check::check(&value).map_err(invalid)?;
        // From the checked value, not from the text: there a key could stand twice.
        let mut library =
            guarded(|| Library::deserialize(&value).map_err(|error| error.to_string())).map_err(invalid)?;
        drop(value);
        guarded(|| demand_visible_tokens(&library)).map_err(invalid)?;
        library.with_padding(None);
        library.with_truncation(None).map_err(|error| invalid(error.to_string()))?;
        library.set_encode_special_tokens(true);
        let special = |names: &[&str]| names.iter().find_map(|name| library.token_to_id(name));
        let eos_id = special(&EOS).ok_or_else(|| {
            let names = EOS.join(", ");
            let reason = format!(
                "it has no eos token; add one of {names} to it as a special token, or, if its eos has another name, \
                 rename it so in `added_tokens` and, where it stands there too, in `vocab`"
            );
            damaged(path, &reason)
        })?;
        let (pad_id, bos_id) = (special(&PAD).unwrap_or(eos_id), special(&BOS).unwrap_or(eos_id));
        let largest = library.get_vocab(true).into_values().max().unwrap_or(0);
        let vocab_size = usize::try_from(largest).map_or(usize::MAX, |id| id.saturating_add(1));
        let unknown = unknown_token(&library);
        Ok(Tokenizer { library, path: path.to_path_buf(), unknown, pad_id, bos_id, eos_id, vocab_size })
    }

    /// Id of the token that fills up batches; nothing in this crate needs it.
    pub fn pad_id(&self) -> u32 {
        self.pad_id
    }

    /// Id of the token every text begins with.
    pub fn bos_id(&self) -> u32 {
        self.bos_id
    }

    /// Id of the token every text ends with.
    pub fn eos_id(&self) -> u32 {
        self.eos_id
    }

    /// Tokens V: the largest id and one.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// `text` as at most `max_tokens` ids (at least 2), bos and eos included; a text that is cut keeps its eos.
    ///
    /// # Errors
    /// [`Error::File`] if the tokenizer's model fails on the text.
    pub fn encode(&self, text: &str, max_tokens: usize) -> Result<Encoded, Error> {
        let encoding = self.guarded(|| self.library.encode(text, false))?;
        let body = encoding.get_ids();
        let kept = body.len().min(max_tokens.saturating_sub(2));
        let mut ids = Vec::with_capacity(kept + 2);
        ids.push(self.bos_id);
        ids.extend(&body[..kept]);
        ids.push(self.eos_id);
        Ok(Encoded { ids, truncated: kept < body.len() })
    }

    /// The different characters of `text` that it has no token for, in their order.
    ///
    /// A byte-level vocabulary encodes any character, if need be as bytes that mean nothing by themselves. That is how
    /// it encodes a script it was not trained on. ASCII characters are never among them.
    ///
    /// # Errors
    /// As for [`Tokenizer::encode`].
    pub fn unlearned(&self, text: &str) -> Result<String, Error> {
        if text.is_ascii() {
            return Ok(String::new());
        }
        let encoding = self.guarded(|| self.library.encode_char_offsets(text, false))?;
        let mut pieces = vec![0_usize; text.chars().count()];
        for (token, &(start, end)) in encoding.get_tokens().iter().zip(encoding.get_offsets()) {
            let weight = if Some(token) == self.unknown.as_ref() { 2 } else { 1 };
            for piece in pieces.iter_mut().take(end).skip(start) {
                *piece += weight;
            }
        }
        let found = text.chars().zip(pieces).filter(|&(character, n)| n > 1 && !character.is_ascii());
        Ok(distinct(found.map(|(character, _)| character)).into_iter().collect())
    }

    /// The text of `ids`; special tokens, and ids that are no token's, are dropped.
    ///
    /// # Errors
    /// [`Error::File`] if the tokenizer's decoder fails on the tokens.
    pub fn decode(&self, ids: &[u32]) -> Result<String, Error> {
        let is_special = |token: &str| self.library.get_added_vocabulary().is_special_token(token);
        let is_text = |&id: &u32| self.library.id_to_token(id).is_some_and(|token| !is_special(&token));
        if !ids.iter().any(is_text) {
            return Ok(String::new()); // of no token at all, the decoder of plain byte-pair encoding fails
        }
        self.guarded(|| self.library.decode(ids, true))
    }

    fn guarded<T>(&self, run: impl FnOnce() -> tokenizers::Result<T>) -> Result<T, Error> {
        guarded(|| run().map_err(|error| error.to_string()))
            .map_err(|reason| Error::File { path: self.path.clone(), reason: one_line(&reason) })
    }
}

/// The token that stands for what the model cannot encode. Unigram has none by name, as in the library's Python half.
fn unknown_token(library: &Library) -> Option<String> {
    match library.get_model() {
        ModelWrapper::BPE(model) => model.unk_token.clone(),
        ModelWrapper::WordPiece(model) => Some(model.unk_token.clone()),
        ModelWrapper::WordLevel(model) => Some(model.unk_token.clone()),
        ModelWrapper::Unigram(_) => None,
    }
}

/// Refuses an added token of which the normalizer leaves nothing: the library would find it everywhere, without end.
fn demand_visible_tokens(library: &Library) -> Result<(), String> {
    let Some(normalizer) = library.get_normalizer() else { return Ok(()) };
    for token in library.get_added_tokens_decoder().into_values().filter(|token| token.normalized) {
        let mut text = NormalizedString::from(token.content.as_str());
        normalizer.normalize(&mut text).map_err(|error| error.to_string())?;
        if text.is_empty() {
            return Err(format!("added_tokens: the normalizer leaves nothing of {:?}", token.content));
        }
    }
    Ok(())
}

/// Runs the library. `check` keeps away what it cannot bear at all; with some odd parts, such as regular expressions that
/// match nothing, it panics on a few texts only, and that becomes an error here.
fn guarded<T>(run: impl FnOnce() -> Result<T, String>) -> Result<T, String> {
    catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|panic| Err(format!("the library failed: {}", said(&*panic))))
}

fn said(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("no reason given")
}

/// The file is not too large to be read.
pub(crate) fn check_size(path: &Path) -> Result<(), LoadError> {
    let found = fs::metadata(path).map_err(|source| LoadError::Read { path: path.to_path_buf(), source })?;
    if found.len() > check::MAX_BYTES { Err(too_large(path, found.len())) } else { Ok(()) }
}

fn too_large(path: &Path, size: u64) -> LoadError {
    damaged(path, &format!("{size} bytes are more than a tokenizer has ({})", check::MAX_BYTES))
}

fn damaged(path: &Path, reason: &str) -> LoadError {
    LoadError::Damaged { path: path.to_path_buf(), reason: one_line(reason) }
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
pub(crate) mod tests;
