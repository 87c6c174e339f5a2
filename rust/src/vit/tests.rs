use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::Path;

use half::{bf16, f16};
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::reference::Reference;
use super::{PixelShape, VisionEncoder};
use crate::config::VisionConfig;
use crate::error::{Error, LoadError};
use crate::loader::Weights;

/// Numbers in [-1, 1) that are the same at every run (SplitMix64).
struct Random(u64);

impl Random {
    fn next(&mut self) -> f32 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 40) as f32 / (1_u32 << 23) as f32 - 1.0
    }

    fn numbers(&mut self, len: usize) -> Vec<f32> {
        (0..len).map(|_| self.next()).collect()
    }
}

/// Hidden size, heads, depth, patch, tubelet; the perceptron is 2.5 times as wide as the rest.
fn config(hidden_size: usize, heads: usize, depth: usize, patch_size: usize, tubelet_size: usize) -> VisionConfig {
    VisionConfig {
        hidden_size,
        depth,
        heads,
        mlp_ratio: 2.5,
        image_size: 4 * patch_size,
        patch_size,
        tubelet_size,
        frames: 4 * tubelet_size,
        pretrained: true,
    }
}

type Tensors = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

/// Random weights under `transformers`' names.
fn random_tensors(config: &VisionConfig) -> Tensors {
    let (width, wide, patch) = (config.hidden_size, config.mlp_size(), config.patch_size);
    let mut shapes = vec![
        ("encoder.embeddings.patch_embeddings.proj".to_owned(), vec![width, 3, config.tubelet_size, patch, patch]),
        ("encoder.layernorm".to_owned(), vec![width]),
    ];
    for i in 0..config.depth {
        for (part, shape) in [
            ("norm1", vec![width]),
            ("attention.query", vec![width, width]),
            ("attention.key", vec![width, width]),
            ("attention.value", vec![width, width]),
            ("attention.proj", vec![width, width]),
            ("norm2", vec![width]),
            ("mlp.fc1", vec![wide, width]),
            ("mlp.fc2", vec![width, wide]),
        ] {
            shapes.push((format!("encoder.layer.{i}.{part}"), shape));
        }
    }
    let mut random = Random(7);
    let mut tensors = Tensors::new();
    for (name, shape) in shapes {
        let len = shape.iter().product();
        let scale = (len as f32 / shape[0] as f32).sqrt().recip() * 2.0;
        let offset = if shape.len() == 1 { 1.0 } else { 0.0 };
        let weight = random.numbers(len).iter().map(|x| x * scale + offset).collect();
        let bias = random.numbers(shape[0]);
        tensors.insert(format!("{name}.bias"), (vec![shape[0]], bias));
        tensors.insert(format!("{name}.weight"), (shape, weight));
    }
    tensors
}

/// Rounds matrices to a type, as its file would.
fn round(tensors: &mut Tensors, dtype: Dtype) {
    for (shape, numbers) in tensors.values_mut() {
        if shape.len() > 1 {
            for x in numbers {
                *x = match dtype {
                    Dtype::F16 => f16::from_f32(*x).to_f32(),
                    Dtype::BF16 => bf16::from_f32(*x).to_f32(),
                    _ => *x,
                };
            }
        }
    }
}

fn bytes(numbers: &[f32], dtype: Dtype) -> Vec<u8> {
    match dtype {
        Dtype::F64 => numbers.iter().flat_map(|&x| f64::from(x).to_le_bytes()).collect(),
        Dtype::F16 => numbers.iter().flat_map(|&x| f16::from_f32(x).to_le_bytes()).collect(),
        Dtype::BF16 => numbers.iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes()).collect(),
        _ => numbers.iter().flat_map(|x| x.to_le_bytes()).collect(),
    }
}

/// A safetensors file; matrices in `dtype`, vectors in `vectors`.
fn serialize(tensors: &Tensors, dtype: Dtype, vectors: Dtype, metadata: HashMap<String, String>) -> Vec<u8> {
    let of = |shape: &[usize]| if shape.len() > 1 { dtype } else { vectors };
    let data: Vec<_> = tensors.iter().map(|(k, (shape, x))| (k, of(shape), shape, bytes(x, of(shape)))).collect();
    let views = data.iter().map(|(k, dtype, shape, data)| {
        (k.as_str(), TensorView::new(*dtype, shape.to_vec(), data).expect("the shape fits"))
    });
    safetensors::serialize(views, Some(metadata)).expect("valid tensors")
}

/// What export writes as `x_encoder.safetensors`.
fn exported(config: &VisionConfig, tensors: &Tensors, dtype: Dtype) -> Weights {
    let layer = json!({
        "d_model": 8, "d_state": 4, "expand": 2, "headdim": 4, "ngroups": 1, "rope_fraction": 0.5,
        "a_activation": "heavy_tail", "is_mimo": false, "mimo_rank": 4, "is_outproj_norm": false, "chunk_size": 64
    });
    let backbone = json!({"n_layers": 1, "layer": layer});
    let model = json!({
        "preset": "tiny", "vision": config, "predictor": backbone, "y_encoder": backbone, "y_decoder": backbone,
        "prefix_tokens": 2, "embed_dim": 8, "vocab_size": 300, "max_query_tokens": 16, "max_answer_tokens": 16,
        "query_prompt": "Describe the image.",
        "angn": {"enabled": false, "sparsity_weight": 0.01, "context_reset_threshold": 0.3, "ema_decay": 0.99},
        "recursion": {"hidden_dim": 8, "knowledge_dim": null, "ema_decay": 0.9},
    });
    let dtype_name = match dtype {
        Dtype::F16 => "float16",
        Dtype::BF16 => "bfloat16",
        _ => "float32",
    };
    let metadata = [
        ("format", "mamba3-jepa"),
        ("format_version", "1"),
        ("component", "x_encoder"),
        ("phase", "1"),
        ("dtype", dtype_name),
        ("config", &model.to_string()),
    ];
    let metadata = metadata.map(|(key, value)| (key.to_owned(), value.to_owned())).into();
    let tensors = tensors.iter().map(|(name, tensor)| (format!("x_encoder.{name}"), tensor.clone())).collect();
    Weights::from_bytes("x_encoder.safetensors", &serialize(&tensors, dtype, Dtype::F32, metadata))
        .expect("a whole file")
}

fn encoder(config: &VisionConfig, tensors: &Tensors) -> VisionEncoder {
    VisionEncoder::from_weights(&exported(config, tensors, Dtype::F32)).expect("valid weights")
}

fn len(shape: PixelShape) -> usize {
    match shape {
        PixelShape::Image { height, width } => 3 * height * width,
        PixelShape::Clip { frames, height, width } => 3 * frames * height * width,
    }
}

/// What the reference makes of it: (N, D).
fn expected(config: &VisionConfig, tensors: &Tensors, pixels: &[f32], shape: PixelShape) -> Vec<f64> {
    let wide = |x: &[f32]| x.iter().copied().map(f64::from).collect::<Vec<_>>();
    let tensors = tensors.iter().map(|(name, (_, numbers))| (name.clone(), wide(numbers))).collect();
    let reference = Reference { config: config.clone(), tensors };
    match shape {
        PixelShape::Image { height, width } => {
            reference.encode(&wide(&pixels.repeat(config.tubelet_size)), config.tubelet_size, height, width)
        }
        PixelShape::Clip { frames, height, width } => reference.encode(&wide(pixels), frames, height, width),
    }
}

fn assert_close(found: &[f32], expected: &[f64], bound: f64) {
    assert_eq!(found.len(), expected.len());
    let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
    let difference = norm(&mut found.iter().zip(expected).map(|(&a, b)| f64::from(a) - b));
    let relative = difference / norm(&mut expected.iter().copied());
    assert!(relative < bound, "relative difference {relative:e}");
}

#[test]
fn equals_the_reference_at_awkward_sizes() {
    let image = |height, width| PixelShape::Image { height, width };
    let clip = |frames, height, width| PixelShape::Clip { frames, height, width };
    for (config, shape) in [
        // head size 8: a part of 2 numbers for each axis, 2 left over
        (config(16, 2, 2, 4, 2), image(4, 4)),
        (config(16, 2, 2, 4, 2), image(8, 20)),
        // 12: nothing left over
        (config(36, 3, 1, 2, 2), clip(2, 6, 2)),
        // 20: parts with an odd number of angles; three tubelets
        (config(20, 1, 2, 2, 2), clip(6, 4, 6)),
        // 7: an odd size; tubelets of one and three frames
        (config(21, 3, 2, 3, 1), clip(5, 3, 9)),
        (config(21, 3, 1, 1, 3), clip(9, 2, 5)),
        // 4: too small to rotate
        (config(8, 2, 2, 2, 2), image(6, 4)),
        // more tokens than one block of queries, and of keys
        (config(24, 2, 2, 1, 2), image(17, 19)),
        (config(24, 2, 1, 1, 1), clip(5, 16, 8)),
    ] {
        let tensors = random_tensors(&config);
        let pixels = Random(3).numbers(len(shape));
        let found = encoder(&config, &tensors).encode(&pixels, shape).expect("a valid input");
        assert_close(&found, &expected(&config, &tensors, &pixels, shape), 3e-6);
    }
}

#[test]
fn weights_of_16_bits_are_computed_in_32() {
    let config = config(32, 2, 2, 4, 2);
    let shape = PixelShape::Image { height: 20, width: 12 };
    let pixels = Random(3).numbers(len(shape));
    for dtype in [Dtype::F16, Dtype::BF16] {
        let mut tensors = random_tensors(&config);
        round(&mut tensors, dtype);
        let encoder = VisionEncoder::from_weights(&exported(&config, &tensors, dtype)).expect("valid weights");
        let found = encoder.encode(&pixels, shape).expect("a valid input");
        assert_close(&found, &expected(&config, &tensors, &pixels, shape), 3e-6);
    }
}

#[test]
fn the_result_does_not_depend_on_the_number_of_threads() {
    let config = config(48, 3, 2, 2, 2);
    let encoder = encoder(&config, &random_tensors(&config));
    let shape = PixelShape::Clip { frames: 4, height: 26, width: 22 };
    let pixels = Random(3).numbers(len(shape));
    let on = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a pool");
        pool.install(|| encoder.encode(&pixels, shape)).expect("a valid input")
    };
    let one = on(1);
    assert_eq!(one, on(2));
    assert_eq!(one, on(5));
}

#[test]
fn an_image_is_a_clip_of_equal_frames() {
    let config = config(16, 2, 2, 4, 2);
    let encoder = encoder(&config, &random_tensors(&config));
    let pixels = Random(3).numbers(3 * 8 * 12);
    let image = encoder.encode(&pixels, PixelShape::Image { height: 8, width: 12 }).expect("valid");
    let clip = encoder.encode(&pixels.repeat(2), PixelShape::Clip { frames: 2, height: 8, width: 12 }).expect("valid");
    assert_eq!(image, clip);
    assert_eq!(image.len(), 2 * 3 * 16);
}

#[test]
fn pixels_of_another_shape_are_refused() {
    let config = config(16, 2, 1, 4, 2);
    let encoder = encoder(&config, &random_tensors(&config));
    let image = |height, width| PixelShape::Image { height, width };
    let clip = |frames, height, width| PixelShape::Clip { frames, height, width };
    for (len, shape, message) in [
        (3 * 6 * 8, image(6, 8), "height and width must be multiples of the patch 4, found (3, 6, 8)"),
        (0, image(0, 8), "multiples of the patch 4, found (3, 0, 8)"),
        (3 * 8 * 8 - 1, image(8, 8), "191 numbers do not fill the shape, found (3, 8, 8)"),
        (3 * 3 * 8 * 8, clip(3, 8, 8), "the number of frames must be a multiple of 2, found (3, 3, 8, 8)"),
        (0, clip(0, 8, 8), "the number of frames must be a multiple of 2"),
        (0, image(1 << 40, 1 << 40), "0 numbers do not fill the shape"),
    ] {
        match encoder.encode(&vec![0.0; len], shape) {
            Err(Error::Input(text)) => assert!(text.contains(message), "{text}"),
            other => panic!("{shape:?}: {other:?}"),
        }
    }
}

#[test]
fn an_exported_file_is_read_strictly() {
    let config = config(16, 2, 2, 4, 2);
    let load = |tensors: &Tensors| match VisionEncoder::from_weights(&exported(&config, tensors, Dtype::F32)) {
        Err(error) => error.to_string(),
        Ok(_) => panic!("it was read"),
    };
    let whole = random_tensors(&config);

    let mut tensors = whole.clone();
    tensors.remove("encoder.layer.1.mlp.fc2.bias");
    assert_eq!(
        load(&tensors),
        "x_encoder.safetensors: x_encoder.encoder.layer.1.mlp.fc2.bias: missing; the configuration asks for it"
    );

    let mut tensors = whole.clone();
    tensors.insert("encoder.layer.2.norm1.bias".into(), (vec![16], vec![0.0; 16]));
    assert!(load(&tensors).contains("x_encoder.encoder.layer.2.norm1.bias: not expected"));

    let mut tensors = whole;
    tensors.insert("encoder.layer.0.attention.key.weight".into(), (vec![16, 8], vec![0.0; 128]));
    assert!(load(&tensors).contains("expected shape [16, 16], found [16, 8]"));
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
        fs::write(dir.path().join(file), serialize(tensors, dtype, dtype, HashMap::new())).expect("written");
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
    let tensors = random_tensors(&config);
    let shape = PixelShape::Image { height: 8, width: 12 };
    let pixels = Random(3).numbers(len(shape));
    let expected = encoder(&config, &tensors).encode(&pixels, shape).expect("valid");
    let read = |dir: &TempDir| {
        let encoder = VisionEncoder::from_transformers_dir(dir.path()).expect("a valid folder");
        assert_eq!(encoder.config(), &config);
        encoder.encode(&pixels, shape).expect("valid")
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

#[test]
fn a_folder_of_16_bits_is_computed_in_32() {
    let config = config(16, 2, 2, 4, 2);
    let shape = PixelShape::Image { height: 8, width: 12 };
    let pixels = Random(3).numbers(len(shape));
    let mut tensors = random_tensors(&config);
    for (_, numbers) in tensors.values_mut() {
        numbers.iter_mut().for_each(|x| *x = bf16::from_f32(*x).to_f32());
    }
    let dir = transformers_dir(&config, &tensors, Dtype::BF16, whole);
    let found = VisionEncoder::from_transformers_dir(dir.path()).expect("valid").encode(&pixels, shape).expect("valid");
    assert_close(&found, &expected(&config, &tensors, &pixels, shape), 3e-6);
}

#[test]
fn sizes_that_the_settings_leave_out_follow_from_the_shapes() {
    // 52 / 24 is not a number of f64: the width of the perceptron must still come back
    let config = VisionConfig { mlp_ratio: 52.0 / 24.0, image_size: 256, frames: 64, ..config(24, 1, 2, 4, 2) };
    let dir = transformers_dir(&config, &random_tensors(&config), Dtype::F32, whole);
    fs::write(dir.path().join("config.json"), "{}").expect("written");
    let found = VisionEncoder::from_transformers_dir(dir.path()).expect("valid");
    assert_eq!(found.config().mlp_size(), 52);
    assert_eq!(VisionConfig { mlp_ratio: config.mlp_ratio, ..found.config().clone() }, config);
}

#[test]
fn a_wrong_folder_is_refused() {
    let config = config(16, 2, 2, 4, 2);
    let tensors = random_tensors(&config);
    let message = |path: &Path| {
        let text = VisionEncoder::from_transformers_dir(path).map(|_| ()).expect_err("it was read").to_string();
        assert!(!text.contains('\n') && text.contains(&*path.to_string_lossy()), "{text}");
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
    let whole_model = random_tensors(&config);
    let open = |change: &dyn Fn(&mut Tensors)| {
        let mut tensors = whole_model.clone();
        change(&mut tensors);
        let dir = transformers_dir(&config, &tensors, Dtype::F32, whole);
        VisionEncoder::from_transformers_dir(dir.path()).map(|_| ()).expect_err("it was read")
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
    let dir = transformers_dir(&config, &random_tensors(&config), Dtype::F32, halves);
    let message = || match VisionEncoder::from_transformers_dir(dir.path()) {
        Err(error) => error.to_string(),
        Ok(_) => panic!("it was read"),
    };
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
