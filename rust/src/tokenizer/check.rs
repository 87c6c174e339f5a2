//! What `tokenizer.json` must be before the `tokenizers` library sees it.
//!
//! The library trusts its input: of damaged files it panics (merges longer than any token, a decoder that is no object,
//! pieces of length 0), and some whole ones make it take memory without end (a chain of replacements that each double
//! the text, regular expressions by the thousand). Those are refused here. Nothing that a tokenizer in use needs is.

use serde_json::{Map, Value};

/// A larger file is refused.
pub(super) const MAX_BYTES: u64 = 1 << 26;
/// No token has a larger id.
const MAX_ID: u64 = 1 << 24;
/// Parts of normalizer, pre-tokenizer, post-processor and decoder together.
const MAX_PARTS: usize = 128;
/// Bytes of all regular expressions together: each may compile to some MiB.
const MAX_PATTERNS: usize = 1 << 12;
/// How many times longer a text may get by all replacements together.
const MAX_GROWTH: usize = 1 << 12;

/// Checks the whole file.
///
/// # Errors
/// One line that names the part.
pub(super) fn check(tokenizer: &Value) -> Result<(), String> {
    let top = tokenizer.as_object().ok_or("it is no JSON object")?;
    let model = top.get("model").and_then(Value::as_object).ok_or("model: it is missing, or no object")?;
    check_vocabulary(model)?;
    check_merges(model)?;
    check_dropout(model)?;
    check_added(top.get("added_tokens"))?;
    let mut parts = Parts { number: 0, patterns: 0, growth: 1 };
    for key in ["normalizer", "pre_tokenizer", "post_processor", "decoder"] {
        match top.get(key) {
            None | Some(Value::Null) => {}
            Some(part) => parts.check(key, part)?,
        }
    }
    Ok(())
}

/// Every id is small; Unigram has a list of tokens with scores, whose ids are their places.
fn check_vocabulary(model: &Map<String, Value>) -> Result<(), String> {
    match model.get("vocab") {
        Some(Value::Object(vocab)) => match vocab.iter().find(|(_, id)| !is_id(id)) {
            Some((token, id)) => Err(format!("model.vocab: {token:?} has the impossible id {id}")),
            None => Ok(()),
        },
        Some(Value::Array(_)) => Ok(()),
        _ => Err("model.vocab: it is missing, or no vocabulary".into()),
    }
}

fn is_id(value: &Value) -> bool {
    value.as_u64().is_some_and(|id| id < MAX_ID)
}

/// Both sides of every merge, and what they merge to, are tokens.
fn check_merges(model: &Map<String, Value>) -> Result<(), String> {
    let (Some(Value::Array(merges)), Some(Value::Object(vocab))) = (model.get("merges"), model.get("vocab")) else {
        return Ok(()); // not byte-pair encoding, or the library says what is wrong
    };
    let prefix = model.get("continuing_subword_prefix").and_then(Value::as_str).unwrap_or_default();
    let known = |token: &str| vocab.contains_key(token);
    let mut merged = String::new();
    for merge in merges {
        let pair = match merge {
            Value::String(line) if line.starts_with("#version") => continue,
            Value::String(line) => line.split_once(' '),
            Value::Array(pair) => pair.first().and_then(Value::as_str).zip(pair.get(1).and_then(Value::as_str)),
            _ => None,
        };
        let (left, right) = pair.ok_or_else(|| format!("model.merges: {merge} is no pair of tokens"))?;
        let tail = right
            .strip_prefix(prefix)
            .ok_or_else(|| format!("model.merges: {right:?} lacks the continuing_subword_prefix {prefix:?}"))?;
        merged.clear();
        merged.extend([left, tail]);
        if let Some(token) = [left, right, &merged].into_iter().find(|token| !known(token)) {
            return Err(format!("model.merges: {token:?} is not in the vocabulary"));
        }
    }
    Ok(())
}

/// The library drops merges by chance while it encodes, where the model says so: the same text would give other ids each
/// time.
fn check_dropout(model: &Map<String, Value>) -> Result<(), String> {
    match model.get("dropout") {
        None | Some(Value::Null) => Ok(()),
        Some(dropout) if dropout.as_f64() == Some(0.0) => Ok(()),
        Some(dropout) => Err(format!(
            "model.dropout: {dropout} would make the ids of a text random; set it to null, which changes no token"
        )),
    }
}

fn check_added(added: Option<&Value>) -> Result<(), String> {
    let tokens = added.and_then(Value::as_array).into_iter().flatten();
    for token in tokens {
        if !token.get("id").is_some_and(is_id) {
            return Err(format!("added_tokens: {token} has an impossible id"));
        }
    }
    Ok(())
}

/// What all parts together cost.
struct Parts {
    number: usize,
    patterns: usize,
    growth: usize,
}

impl Parts {
    fn check(&mut self, key: &str, part: &Value) -> Result<(), String> {
        let part = part.as_object().ok_or_else(|| format!("{key}: it is no object"))?;
        let kind = part.get("type").and_then(Value::as_str).ok_or_else(|| format!("{key}: it has no type"))?;
        self.number += 1;
        if self.number > MAX_PARTS {
            return Err(format!("{key}: there are more than {MAX_PARTS} parts"));
        }
        for list in ["normalizers", "pretokenizers", "processors", "decoders"] {
            for inner in part.get(list).and_then(Value::as_array).into_iter().flatten() {
                if inner.get("type").and_then(Value::as_str) == Some("BPEDecoder") {
                    return Err(format!(
                        "{key}: BPEDecoder must be the only one: where another leaves no token it fails"
                    ));
                }
                self.check(key, inner)?;
            }
        }
        if let Some(pattern) = part.get("pattern") {
            self.patterns += pattern.to_string().len();
            if self.patterns > MAX_PATTERNS {
                return Err(format!("{key}: its patterns have more than {MAX_PATTERNS} bytes"));
            }
        }
        self.growth = self.growth.saturating_mul(growth(kind, part));
        if self.growth > MAX_GROWTH {
            return Err(format!("{key}: its replacements would make texts more than {MAX_GROWTH} times longer"));
        }
        self.check_kind(key, kind, part)
    }

    fn check_kind(&self, key: &str, kind: &str, part: &Map<String, Value>) -> Result<(), String> {
        match kind {
            "Precompiled" => Err(format!(
                "{key}: a Precompiled table of SentencePiece cannot be checked and is not read; NFKC is nearly the same"
            )),
            "FixedLength" if part.get("length").and_then(Value::as_u64) == Some(0) => {
                Err(format!("{key}: FixedLength pieces of length 0"))
            }
            "Strip" if key == "decoder" && part.get("stop").and_then(Value::as_u64) != Some(0) => {
                Err(format!("{key}: Strip with a stop that is not 0 is not read: of short tokens the library fails"))
            }
            _ => Ok(()),
        }
    }
}

/// How many times longer one part may make a text, at most.
fn growth(kind: &str, part: &Map<String, Value>) -> usize {
    let length = |key: &str| part.get(key).and_then(Value::as_str).map_or(0, str::len);
    match kind {
        // Each byte, or each place between two, may become the content.
        "Replace" => length("content").max(1),
        "Prepend" => 1 + length("prepend"),
        // A byte may become two; a suffix or delimiter that is empty puts a space at every place.
        "ByteLevel" | "BPEDecoder" | "CTC" => 2,
        // The tokens once for each time the template names them.
        "TemplateProcessing" => {
            let pieces = part.get("single").and_then(Value::as_array).into_iter().flatten();
            pieces.filter(|piece| piece.get("Sequence").is_some()).count().max(1)
        }
        _ => 1,
    }
}
