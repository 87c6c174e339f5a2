//! What it is read from.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::Path;

use half::bf16;
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::{Tensors, config, config_21, encoder, exported, image, model, pixels, tensors};
use crate::config::VisionConfig;
use crate::error::LoadError;
use crate::loader::Weights;
use crate::vit::VisionEncoder;

/// A safetensors file of one type.
fn serialize(tensors: &Tensors, dtype: Dtype, metadata: Option<HashMap<String, String>>) -> Vec<u8> {
    let bytes = |numbers: &[f32]| -> Vec<u8> {
        match dtype {
            Dtype::F64 => numbers.iter().flat_map(|&x| f64::from(x).to_le_bytes()).collect(),
            Dtype::BF16 => numbers.iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes()).collect(),
            _ => numbers.iter().flat_map(|x| x.to_le_bytes()).collect(),
        }
    };
    let data: Vec<_> = tensors.iter().map(|(name, (shape, numbers))| (name, shape, bytes(numbers))).collect();
    let views = data.iter().map(|(name, shape, data)| {
        (name.as_str(), TensorView::new(dtype, shape.to_vec(), data).expect("the shape fits"))
    });
    safetensors::serialize(views, metadata).expect("valid tensors")
}

/// The error that reading gives, of one line.
fn refused(read: Result<VisionEncoder, LoadError>) -> LoadError {
    let error = read.map(|_| ()).expect_err("it was read");
    assert!(!error.to_string().contains('\n'), "{error}");
    error
}

#[test]
fn the_branch_for_images_must_be_there_where_the_configuration_says_so() {
    let with = model(&config_21(16, 2, 1, 4, 2)).component("x_encoder");
    let whole = Weights::from_bytes("x_encoder.safetensors", &with).expect("a whole file");
    let numbers = |key: &str| whole.to_f32(key).expect("numbers");
    let tensors = whole.tensors().iter().map(|(key, info)| (key.clone(), (info.shape.clone(), numbers(key))));
    let metadata: HashMap<_, _> = whole.metadata().clone().into_iter().collect();
    for key in ["img_mod_embed", "video_mod_embed", "patch_embeddings_img.proj.weight"] {
        let key = format!("x_encoder.encoder.embeddings.{key}");
        let rest: Tensors = tensors.clone().filter(|(name, _)| *name != key).collect();
        let bytes = serialize(&rest, Dtype::F32, Some(metadata.clone()));
        let weights = Weights::from_bytes("x_encoder.safetensors", &bytes).expect("a whole file");
        let error = refused(VisionEncoder::from_weights(&weights));
        assert!(matches!(&error, LoadError::MissingKey { key: missing, .. } if *missing == key), "{error}");
    }
}

#[test]
fn an_exported_file_is_read_strictly() {
    let whole = exported(&model(&config(16, 2, 2, 4, 2)));
    let metadata: HashMap<_, _> = whole.metadata().clone().into_iter().collect();
    let read = |change: &dyn Fn(&mut Tensors)| {
        let numbers = |key: &str| whole.to_f32(key).expect("numbers");
        let tensors = whole.tensors().iter();
        let mut tensors = tensors.map(|(key, info)| (key.clone(), (info.shape.clone(), numbers(key)))).collect();
        change(&mut tensors);
        let bytes = serialize(&tensors, Dtype::F32, Some(metadata.clone()));
        VisionEncoder::from_weights(&Weights::from_bytes("x_encoder.safetensors", &bytes).expect("a whole file"))
    };
    read(&|_| ()).map(|_| ()).expect("unchanged, it is read");

    let error = refused(read(&|tensors| drop(tensors.remove("x_encoder.encoder.layer.1.mlp.fc2.bias"))));
    assert_eq!(
        error.to_string(),
        "x_encoder.safetensors: x_encoder.encoder.layer.1.mlp.fc2.bias: missing; the configuration asks for it"
    );
    let unknown = "x_encoder.encoder.layer.2.norm1.bias";
    let error = refused(read(&|tensors| drop(tensors.insert(unknown.into(), (vec![16], vec![0.0; 16])))));
    assert!(matches!(&error, LoadError::UnknownKey { key, more: 0, .. } if key == unknown), "{error}");
    let narrow = "x_encoder.encoder.layer.0.attention.key.weight";
    let error = refused(read(&|tensors| drop(tensors.insert(narrow.into(), (vec![16, 8], vec![0.0; 128])))));
    assert!(error.to_string().contains("expected shape [16, 16], found [16, 8]"), "{error}");
}

/// A folder as `save_pretrained` writes it, cut into files by `shard_of`.
fn transformers_dir(
    config: &VisionConfig,
    tensors: &Tensors,
    dtype: Dtype,
    shard_of: impl Fn(&str) -> &'static str,
) -> TempDir {
    let dir = tempfile::tempdir().expect("a folder");
    write_settings(dir.path(), config, &[]);
    let mut shards: BTreeMap<&str, Tensors> = BTreeMap::new();
    for (name, tensor) in tensors {
        shards.entry(shard_of(name)).or_default().insert(name.clone(), tensor.clone());
    }
    for (file, tensors) in &shards {
        fs::write(dir.path().join(file), serialize(tensors, dtype, None)).expect("written");
    }
    if shards.len() > 1 {
        let map: BTreeMap<_, _> = tensors.keys().map(|name| (name, shard_of(name))).collect();
        let index = json!({"metadata": {}, "weight_map": map});
        fs::write(dir.path().join("model.safetensors.index.json"), index.to_string()).expect("written");
    }
    dir
}

fn write_settings(dir: &Path, config: &VisionConfig, changes: &[(&str, Value)]) {
    let mut settings = json!({
        "model_type": "vjepa2", "layer_norm_eps": 1e-6, "hidden_act": "gelu", "qkv_bias": true, "in_chans": 3,
        "hidden_size": config.hidden_size, "num_hidden_layers": config.depth, "num_attention_heads": config.heads,
        "mlp_ratio": config.mlp_ratio, "patch_size": config.patch_size, "tubelet_size": config.tubelet_size,
        "crop_size": config.image_size, "frames_per_clip": config.frames, "pred_hidden_size": 12,
    });
    for (key, value) in changes {
        settings[key] = value.clone();
    }
    fs::write(dir.join("config.json"), settings.to_string()).expect("written");
}

fn whole(_: &str) -> &'static str {
    "model.safetensors"
}

fn halves(name: &str) -> &'static str {
    if name.contains("layer.1.") { "model-00002-of-00002.safetensors" } else { "model-00001-of-00002.safetensors" }
}

#[test]
fn a_transformers_folder_holds_the_same_encoder() {
    let config = config(16, 2, 2, 4, 2);
    let tensors = tensors(&model(&config));
    let shape = image(8, 12);
    let tokens = |encoder: &VisionEncoder| encoder.encode(&pixels(shape), shape).expect("valid");
    let expected = tokens(&encoder(&config));
    let read = |dir: &TempDir| {
        let encoder = VisionEncoder::from_transformers_dir(dir.path()).expect("a valid folder");
        assert_eq!(encoder.config(), &config);
        tokens(&encoder)
    };
    let mut published: Tensors = tensors.iter().map(|(name, x)| (format!("vjepa2.{name}"), x.clone())).collect();
    published.insert("vjepa2.predictor.proj.bias".into(), (vec![2], vec![0.0; 2]));
    published.insert("classifier.weight".into(), (vec![1, 2], vec![0.0; 2]));

    assert_eq!(read(&transformers_dir(&config, &tensors, Dtype::F32, whole)), expected);
    assert_eq!(read(&transformers_dir(&config, &published, Dtype::F32, whole)), expected);
    assert_eq!(read(&transformers_dir(&config, &tensors, Dtype::F64, whole)), expected);
    let sharded = transformers_dir(&config, &tensors, Dtype::F32, halves);
    assert_eq!(read(&sharded), expected);
    fs::remove_file(sharded.path().join("model.safetensors.index.json")).expect("removed");
    assert_eq!(read(&sharded), expected);
}

/// Biases and norms too have 16 bits there.
#[test]
fn a_folder_of_16_bits_is_computed_in_32() {
    let config = config(16, 2, 2, 4, 2);
    let mut rounded = tensors(&model(&config));
    for (_, numbers) in rounded.values_mut() {
        numbers.iter_mut().for_each(|x| *x = bf16::from_f32(*x).to_f32());
    }
    let tokens = |dtype| {
        let dir = transformers_dir(&config, &rounded, dtype, whole);
        let encoder = VisionEncoder::from_transformers_dir(dir.path()).expect("a valid folder");
        encoder.encode(&pixels(image(8, 12)), image(8, 12)).expect("valid")
    };
    let difference = |(a, b): (&f32, &f32)| (a - b).abs();
    let largest = tokens(Dtype::BF16).iter().zip(&tokens(Dtype::F32)).map(difference).fold(0.0, f32::max);
    assert!(largest < 1e-5, "{largest}");
}

#[test]
fn sizes_that_the_settings_leave_out_follow_from_the_shapes() {
    // 52 / 24 is not a number of f64: the width of the perceptron must still come back
    let config = VisionConfig { mlp_ratio: 52.0 / 24.0, image_size: 256, frames: 64, ..config(24, 1, 2, 4, 2) };
    let dir = transformers_dir(&config, &tensors(&model(&config)), Dtype::F32, whole);
    fs::write(dir.path().join("config.json"), "{}").expect("written");
    let found = VisionEncoder::from_transformers_dir(dir.path()).expect("valid");
    assert_eq!(found.config().mlp_size(), 52);
    assert_eq!(VisionConfig { mlp_ratio: config.mlp_ratio, ..found.config().clone() }, config);
}

#[test]
fn a_wrong_folder_is_refused() {
    let config = config(16, 2, 2, 4, 2);
    let tensors = tensors(&model(&config));
    let message = |path: &Path| {
        let text = refused(VisionEncoder::from_transformers_dir(path)).to_string();
        assert!(text.contains(&*path.to_string_lossy()), "{text}");
        text
    };
    let empty = tempfile::tempdir().expect("a folder");
    assert!(message(empty.path()).contains("found nothing"));
    assert!(message(&empty.path().join("absent")).contains("cannot be read"));

    let dir = transformers_dir(&config, &tensors, Dtype::F32, whole);
    for (key, value, expected) in [
        ("model_type", json!("vit"), r#"expected model_type "vjepa2" (V-JEPA 2), found "vit""#),
        ("layer_norm_eps", json!(1e-5), "expected layer_norm_eps"),
        ("hidden_size", json!(32), "it says hidden_size 32, the weights say 16"),
        ("hidden_size", json!("16"), "it says hidden_size \"16\""),
        ("num_hidden_layers", json!(3), "it says num_hidden_layers 3, the weights say 2"),
        ("num_attention_heads", json!(0), "vision.heads: 0 must be between 1"),
        ("num_attention_heads", json!(3), "3 does not divide hidden_size 16"),
        ("num_attention_heads", json!(-1), "num_attention_heads: expected a whole number, found -1"),
        ("crop_size", json!(30), "4 does not divide image_size 30"),
    ] {
        write_settings(dir.path(), &config, &[(key, value)]);
        let text = message(dir.path());
        assert!(text.contains(expected), "{text}");
    }
    fs::write(dir.path().join("config.json"), "{").expect("written");
    assert!(message(dir.path()).contains("not a JSON object"));
}

#[test]
fn a_folder_with_other_tensors_is_refused() {
    let config = config(16, 2, 2, 4, 2);
    let whole_model = tensors(&model(&config));
    let open = |change: &dyn Fn(&mut Tensors)| {
        let mut tensors = whole_model.clone();
        change(&mut tensors);
        let dir = transformers_dir(&config, &tensors, Dtype::F32, whole);
        refused(VisionEncoder::from_transformers_dir(dir.path()))
    };
    let patches = "encoder.embeddings.patch_embeddings.proj.weight";
    let error = open(&|tensors| drop(tensors.remove("encoder.layernorm.bias")));
    assert!(matches!(&error, LoadError::MissingKey { key, .. } if key == "encoder.layernorm.bias"), "{error}");
    let error = open(&|tensors| drop(tensors.remove(patches)));
    assert!(matches!(&error, LoadError::MissingKey { key, .. } if key == patches), "{error}");
    let error = open(&|tensors| drop(tensors.insert("encoder.pos_embed".into(), (vec![1], vec![0.0]))));
    assert!(matches!(&error, LoadError::UnknownKey { key, .. } if key == "encoder.pos_embed"), "{error}");
    let error = open(&|tensors| drop(tensors.insert(patches.into(), (vec![16, 96], vec![0.0; 16 * 96]))));
    assert!(error.to_string().contains("expected a patch embedding (D, 3, tubelet, patch, patch)"), "{error}");
}

#[test]
fn a_missing_shard_is_named() {
    let config = config(16, 2, 2, 4, 2);
    let dir = transformers_dir(&config, &tensors(&model(&config)), Dtype::F32, halves);
    let message = || refused(VisionEncoder::from_transformers_dir(dir.path())).to_string();
    fs::remove_file(dir.path().join("model-00002-of-00002.safetensors")).expect("removed");
    assert!(message().contains("model-00002-of-00002.safetensors: this part of the model is missing"));

    let index = dir.path().join("model.safetensors.index.json");
    fs::write(&index, r#"{"weight_map": {"a": "../model.safetensors"}}"#).expect("written");
    assert!(message().contains("is not the name of a file in this folder"));
    fs::write(&index, r#"{"weight_map": {"a": 1}}"#).expect("written");
    assert!(message().contains("names something that is no file"));
    fs::write(&index, "{}").expect("written");
    assert!(message().contains("it has no weight_map"));
}
