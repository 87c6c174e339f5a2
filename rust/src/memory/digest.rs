//! What tells one text encoder, and one observer of pictures and questions, from another.

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
    add_tensors(&mut digest, weights);
    hex(&digest.finalize())
}

/// SHA-256 in hex of everything a pooled state depends on but the picture, the question and the X-Encoder's weights.
///
/// `encoder`: [`encoder_digest`]; `weights`: `predictor.safetensors`, and `angn.safetensors` if there is one.
pub(crate) fn observer_digest(config: &Mamba3JepaConfig, encoder: &str, weights: &[Weights]) -> String {
    let parts = json!({
        "angn": config.angn.enabled, "max_query_tokens": config.max_query_tokens, "predictor": config.predictor,
        "query_prompt": config.query_prompt, "vision": config.vision
    });
    let mut digest = Sha256::new();
    digest.update(format!("mamba3-jepa observer\n{encoder}\n{}\n", canonical(&parts)));
    weights.iter().for_each(|weights| add_tensors(&mut digest, weights));
    hex(&digest.finalize())
}

fn add_tensors(digest: &mut Sha256, weights: &Weights) {
    for (key, info) in weights.tensors() {
        let shape: Vec<String> = info.shape.iter().map(usize::to_string).collect();
        digest.update(format!("{key} {:?} {}\n", info.dtype, shape.join("x")));
        digest.update(weights.tensor_bytes(info));
    }
}

/// JSON with sorted keys and no spaces, as `json.dumps(..., sort_keys=True, separators=(",", ":"), ensure_ascii=False)`
/// writes plain names, texts and numbers.
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
