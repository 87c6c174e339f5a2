//! Any text as the configuration of a model.

#![no_main]

use std::path::Path;

use kore_vljepa::config::Mamba3JepaConfig;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    if let Ok(config) = Mamba3JepaConfig::from_json(text, Path::new("config.json")) {
        // sizes that were accepted can be computed with
        for backbone in [&config.predictor, &config.y_encoder, &config.y_decoder] {
            let _ = (backbone.layer.projected(), backbone.layer.nheads(), backbone.layer.n_angles());
        }
        let _ = (config.vision.mlp_size(), config.knowledge_dim());
    }
});
