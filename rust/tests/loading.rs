//! Every component is read strictly: all of its tensors, and no other.

mod common;

use common::{Tensor, TinyModel};
use kore_vljepa::LoadError;
use kore_vljepa::angn::AdaptiveNeuralGate;
use kore_vljepa::loader::Weights;
use kore_vljepa::predictor::Mamba3Predictor;
use kore_vljepa::recursion::Recursion;
use kore_vljepa::vit::VisionEncoder;
use kore_vljepa::y_decoder::Mamba3Decoder;
use kore_vljepa::y_encoder::Mamba3TextEncoder;

fn load(component: &str, bytes: &[u8]) -> Result<(), LoadError> {
    let weights = Weights::from_bytes(format!("{component}.safetensors"), bytes)?;
    match component {
        "predictor" => Mamba3Predictor::from_weights(&weights).map(drop),
        "y_encoder" => Mamba3TextEncoder::from_weights(&weights).map(drop),
        "angn" => AdaptiveNeuralGate::from_weights(&weights).map(drop),
        "y_decoder" => Mamba3Decoder::from_weights(&weights).map(drop),
        "recursion" => Recursion::from_weights(&weights).map(drop),
        _ => VisionEncoder::from_weights(&weights).map(drop),
    }
}

/// The error of a component whose tensors were changed.
fn refused(model: &TinyModel, component: &str, change: impl FnOnce(&mut Vec<Tensor>)) -> LoadError {
    let mut tensors = model.tensors(component);
    change(&mut tensors);
    let error = load(component, &model.file(component, &tensors)).expect_err("it must be refused");
    assert_eq!(error.to_string().lines().count(), 1, "{error}");
    assert!(error.to_string().starts_with(&format!("{component}.safetensors: ")), "{error}");
    error
}

#[test]
fn every_component_of_every_variant_loads() {
    for (name, model) in TinyModel::variants() {
        for component in model.components() {
            load(component, &model.component(component)).unwrap_or_else(|error| panic!("{name}: {error}"));
        }
    }
}

#[test]
fn a_file_of_format_1_has_no_memory_floor() {
    let model = TinyModel { format_version: 1, ..TinyModel::new() };
    let weights = Weights::from_bytes("recursion.safetensors", &model.component("recursion")).unwrap();
    assert_eq!(Recursion::from_weights(&weights).unwrap().memory_floor, -1.0);
    let error = refused(&model, "recursion", |tensors| {
        tensors.push(Tensor { key: "recursion.memory_floor".into(), shape: vec![], numbers: vec![0.0] });
    });
    assert!(matches!(error, LoadError::UnknownKey { .. }), "{error}");
}

#[test]
fn any_missing_tensor_is_named() {
    for (name, model) in TinyModel::variants() {
        for component in model.components() {
            for i in 0..model.tensors(component).len() {
                let mut gone = String::new();
                let error = refused(&model, component, |tensors| gone = tensors.remove(i).key);
                assert!(matches!(&error, LoadError::MissingKey { key, .. } if *key == gone), "{name}: {error}");
            }
        }
    }
}

#[test]
fn any_tensor_of_another_shape_is_named() {
    for (name, model) in TinyModel::variants() {
        for component in model.components() {
            for i in 0..model.tensors(component).len() {
                let mut longer = String::new();
                let error = refused(&model, component, |tensors| {
                    let Tensor { key, shape, numbers } = &mut tensors[i];
                    longer.clone_from(key);
                    shape.push(2);
                    numbers.extend_from_within(..);
                });
                assert!(matches!(&error, LoadError::Shape { key, .. } if *key == longer), "{name}: {error}");
            }
        }
    }
}

#[test]
fn a_tensor_too_many_is_named() {
    let model = TinyModel::new();
    for component in model.components() {
        let key = format!("{component}.layers.2.D");
        let error = refused(&model, component, |tensors| {
            tensors.push(Tensor { key: key.clone(), shape: vec![1], numbers: vec![0.0] });
        });
        assert!(matches!(&error, LoadError::UnknownKey { key: found, more: 0, .. } if *found == key), "{error}");
    }
}

#[test]
fn another_component_or_version_is_refused() {
    let model = TinyModel::new();
    let error = load("predictor", &model.component("y_encoder")).unwrap_err();
    assert!(matches!(error, LoadError::Mismatch { .. }), "{error}");
    let model = TinyModel { format_version: 99, ..model };
    let error = load("predictor", &model.component("predictor")).unwrap_err();
    assert!(error.to_string().contains("export format 99"), "{error}");
}

#[test]
fn the_type_of_the_header_is_the_type_of_the_matrices() {
    let (wide, narrow) = (TinyModel::new(), TinyModel::new().dtype("bfloat16"));
    let bytes = narrow.component("predictor");
    let text = String::from_utf8_lossy(&bytes).replace("\"dtype\":\"bfloat16\"", "\"dtype\":\"float32\" ");
    assert!(text.contains("\"dtype\":\"float32\" "), "the header was changed");
    let mut changed = bytes.clone();
    let at = bytes.windows(8).position(|window| window == b"bfloat16").unwrap();
    changed[at - 1..at + 9].copy_from_slice(b"\"float32\" ");
    let error = load("predictor", &changed).unwrap_err();
    assert!(matches!(error, LoadError::Type { .. }), "{error}");
    assert!(load("predictor", &wide.component("predictor")).is_ok());
}
