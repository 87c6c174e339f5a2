//! The exports that the tests make up are ones that the crate reads.

mod common;

use common::TinyModel;
use kore_vljepa::loader::{Weights, load_safetensors};

#[test]
fn every_component_of_every_variant_has_a_valid_header() {
    for (name, model) in TinyModel::variants() {
        for component in model.components() {
            let weights = Weights::from_bytes(component, &model.component(component)).expect(name);
            assert!(weights.config().is_ok(), "{name}: {component}");
        }
    }
}

#[test]
fn a_written_folder_has_every_file() {
    let folder = tempfile::tempdir().unwrap();
    let model = TinyModel::new();
    model.write(folder.path());
    for component in model.components() {
        assert!(load_safetensors(folder.path().join(format!("{component}.safetensors"))).is_ok());
    }
    for name in ["config.json", "tokenizer.json"] {
        assert!(folder.path().join(name).is_file());
    }
}
