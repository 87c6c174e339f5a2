//! Any text as the configuration of a model, or a configuration, damaged.

#![no_main]

mod common;

use std::path::Path;
use std::sync::LazyLock;

use common::{TinyModel, damaged};
use kore_vljepa::config::Mamba3JepaConfig;
use libfuzzer_sys::fuzz_target;

static WHOLE: LazyLock<String> = LazyLock::new(|| TinyModel::new().config.to_string());

fuzz_target!(|bytes: &[u8]| {
    let content = match bytes {
        [0, cut, changes @ ..] => damaged(WHOLE.as_bytes(), *cut, changes),
        other => other.to_vec(),
    };
    let text = String::from_utf8_lossy(&content);
    if let Ok(config) = Mamba3JepaConfig::from_json(&text, Path::new("config.json")) {
        // sizes that were accepted can be computed with
        for layer in [&config.predictor.layer, &config.y_encoder.layer, &config.y_decoder.layer] {
            let _ = (layer.projected(), layer.nheads(), layer.n_angles());
        }
        let _ = (config.vision.mlp_size(), config.knowledge_dim());
    }
});
