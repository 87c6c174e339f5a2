//! What `verify` refuses. That it accepts what Python exports is tested where there is Python.

mod common;

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use common::TinyModel;
use kore_vljepa::verify::verify;
use safetensors::tensor::TensorView;

/// Writes a golden file without tensors.
fn write_empty(golden: &Path, name: &str, metadata: &[(&str, &str)]) {
    let said = [("format", "mamba3-jepa-golden"), ("format_version", "2"), ("component", name)];
    let metadata: HashMap<String, String> =
        said.iter().chain(metadata).map(|&(key, value)| (key.to_owned(), value.to_owned())).collect();
    let none: [(&str, TensorView<'_>); 0] = [];
    let bytes = safetensors::serialize(none, Some(metadata)).expect("no tensor that could be wrong");
    fs::write(golden.join(format!("{name}.safetensors")), bytes).expect("a folder to write to");
}

fn refused(folder: &Path) -> String {
    let error = verify(folder).expect_err("it must be refused").to_string();
    assert_eq!(error.lines().count(), 1, "{error}");
    error
}

#[test]
fn golden_files_that_are_missing_or_unknown_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let golden = folder.path().join("golden");
    TinyModel::new().write(folder.path());
    assert!(refused(folder.path()).contains("golden: cannot be read"));
    fs::create_dir(&golden).unwrap();
    assert!(refused(folder.path()).contains("no golden files; export with --golden"));

    write_empty(&golden, "images", &[("images", "{}")]);
    let error = refused(folder.path());
    assert!(error.contains("tokens.safetensors: cannot be read"), "{error}");
    write_empty(&golden, "tokens", &[("texts", "[\"a circle\"]")]);
    let error = refused(folder.path());
    assert!(error.contains("tokens.safetensors: ids.0: missing"), "{error}");
    write_empty(&golden, "tokens", &[("texts", "[]")]);
    write_empty(&golden, "x_encoder", &[]);
    let error = refused(folder.path());
    assert!(error.contains("x_encoder.safetensors: pixels: missing"), "{error}");
    write_empty(&golden, "other", &[]);
    let error = refused(folder.path());
    assert!(error.contains("other.safetensors: not a golden file that is known"), "{error}");
}
