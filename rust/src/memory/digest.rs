//! What tells one text encoder from another.

use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use crate::config::Mamba3JepaConfig;
use crate::hex::hex;
use crate::loader::Weights;

/// SHA-256 in hex of everything a text's embedding depends on: token limit, sizes, tokenizer and weights.
///
/// `tokenizer`: SHA-256 in hex of `tokenizer.json`; `weights`: `y_encoder.safetensors`. The tensors enter in the order of
/// their keys, as they are stored, so that a folder in 16 bits has a digest of its own.
pub(crate) fn encoder_digest(config: &Mamba3JepaConfig, tokenizer: &str, weights: &Weights) -> String {
    let sizes = json!({"max_answer_tokens": config.max_answer_tokens, "y_encoder": config.y_encoder});
    let mut digest = Sha256::new();
    digest.update(format!("mamba3-jepa y_encoder\n{}\n{tokenizer}\n", canonical(&sizes)));
    for (key, info) in weights.tensors() {
        let shape: Vec<String> = info.shape.iter().map(usize::to_string).collect();
        digest.update(format!("{key} {:?} {}\n", info.dtype, shape.join("x")));
        digest.update(weights.tensor_bytes(info));
    }
    hex(&digest.finalize())
}

/// JSON with sorted keys and no spaces, as `json.dumps(..., sort_keys=True, separators=(",", ":"))` writes plain names
/// and numbers.
fn canonical(value: &Value) -> String {
    match value {
        Value::Object(members) => {
            let sorted: std::collections::BTreeMap<_, _> = Map::iter(members).collect();
            let members: Vec<String> =
                sorted.into_iter().map(|(key, value)| format!("{}:{}", json!(key), canonical(value))).collect();
            format!("{{{}}}", members.join(","))
        }
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn canonical_json_is_sorted_and_dense() {
        let value = json!({"b": {"z": 1.0, "a": true}, "a": 0.5, "c": "heavy_tail"});
        assert_eq!(canonical(&value), r#"{"a":0.5,"b":{"a":true,"z":1.0},"c":"heavy_tail"}"#);
    }
}
