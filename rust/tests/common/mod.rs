//! Tiny exported models with random weights, as Python's `export` writes them: for the unit tests, the tests of the
//! command, and those of this folder. It uses nothing of the crate, so that every kind of test can include it.
#![allow(dead_code, reason = "each test binary that includes this file uses another part of it")]

use std::fs;
use std::path::Path;

use half::{bf16, f16};
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

/// Every component an export can have.
pub(crate) const COMPONENTS: [&str; 6] = ["predictor", "y_encoder", "angn", "y_decoder", "recursion", "x_encoder"];

/// The three Mamba-3 backbones.
const BACKBONES: [&str; 3] = ["predictor", "y_encoder", "y_decoder"];

/// A model that has a configuration and makes up its weights as it is asked for them, always the same.
#[derive(Clone)]
pub(crate) struct TinyModel {
    /// `model` of `config.json`.
    pub(crate) config: Value,
    /// float32, float16 or bfloat16: type of the matrices.
    pub(crate) dtype: &'static str,
    /// Export format.
    pub(crate) format_version: u32,
    /// The last phase that trained it.
    pub(crate) phase: u32,
    /// Another seed gives other weights.
    pub(crate) seed: u64,
}

impl TinyModel {
    /// SISO, half the state rotated, ANGN on, all three phases, float32.
    pub(crate) fn new() -> TinyModel {
        let backbone = json!({
            "n_layers": 2,
            "layer": {
                "d_model": 32, "d_state": 16, "expand": 2, "headdim": 8, "ngroups": 1, "rope_fraction": 0.5,
                "a_activation": "heavy_tail", "is_mimo": false, "mimo_rank": 4, "is_outproj_norm": false,
                "chunk_size": 64
            }
        });
        let config = json!({
            "preset": "tiny",
            "vision": {
                "hidden_size": 48, "depth": 2, "heads": 2, "mlp_ratio": 4.0, "image_size": 32, "patch_size": 8,
                "tubelet_size": 2, "frames": 2, "pretrained": false
            },
            "predictor": backbone, "y_encoder": backbone, "y_decoder": backbone,
            "prefix_tokens": 4, "embed_dim": 24, "vocab_size": 259, "max_query_tokens": 32, "max_answer_tokens": 32,
            "query_prompt": "Describe the image.",
            "angn": {"enabled": true, "sparsity_weight": 0.01, "context_reset_threshold": 0.3, "ema_decay": 0.9},
            "recursion": {"hidden_dim": 40, "knowledge_dim": null, "ema_decay": 0.9}
        });
        TinyModel { config, dtype: "float32", format_version: 2, phase: 3, seed: 0 }
    }

    /// Sets `key` of the Mamba-3 layers in all three backbones.
    pub(crate) fn layer(mut self, key: &str, value: impl Into<Value>) -> TinyModel {
        let value = value.into();
        for name in BACKBONES {
            self.config[name]["layer"][key] = value.clone();
        }
        self
    }

    /// Sets `key` of the predictor, which files may leave out.
    pub(crate) fn predictor(mut self, key: &str, value: impl Into<Value>) -> TinyModel {
        self.config["predictor"][key] = value.into();
        self
    }

    /// Sets `key` of the recursion, which files may leave out.
    pub(crate) fn recursion(mut self, key: &str, value: impl Into<Value>) -> TinyModel {
        self.config["recursion"][key] = value.into();
        self
    }

    /// Sets the value at `pointer`, such as `/vision/depth`, which must exist.
    pub(crate) fn set(mut self, pointer: &str, value: impl Into<Value>) -> TinyModel {
        *self.config.pointer_mut(pointer).expect("a key of the configuration") = value.into();
        self
    }

    /// Stores the matrices as `dtype`.
    pub(crate) fn dtype(mut self, dtype: &'static str) -> TinyModel {
        self.dtype = dtype;
        self
    }

    /// One of every kind that the Python side accepts, with a name.
    pub(crate) fn variants() -> Vec<(&'static str, TinyModel)> {
        let new = TinyModel::new;
        vec![
            ("siso", new()),
            ("siso bfloat16", new().dtype("bfloat16")),
            ("siso float16, no gates", new().dtype("float16").set("/angn/enabled", false)),
            ("softplus, groups", new().layer("a_activation", "softplus").layer("ngroups", 2)),
            ("full rotation, groups", new().layer("rope_fraction", 1.0).layer("ngroups", 4)),
            ("odd state, output norm", new().layer("d_state", 13).layer("is_outproj_norm", true)),
            ("mimo", new().layer("is_mimo", true).layer("mimo_rank", 3)),
            (
                "mimo, output norm, full rotation, groups",
                new()
                    .layer("is_mimo", true)
                    .layer("mimo_rank", 2)
                    .layer("is_outproj_norm", true)
                    .layer("rope_fraction", 1.0)
                    .layer("ngroups", 2),
            ),
            ("knowledge of its own length", new().set("/recursion/knowledge_dim", 7)),
            (
                "recursion with all its parts",
                new()
                    .recursion("hears_answer", true)
                    .recursion("injector_sees_state", true)
                    .recursion("retriever_dim", 9)
                    .recursion("episodes", true)
                    .recursion("weighs_knowledge", true)
                    .recursion("tools", json!(["memory", "calculator", "dictionary"])),
            ),
            (
                "read from both sides, question first and last",
                new()
                    .predictor("order", "question_visual_question")
                    .predictor("pooling", "question")
                    .predictor("bidirectional", true),
            ),
            (
                "attention over question, picture, question",
                new().predictor("order", "question_visual_question").predictor("pooling", "attention"),
            ),
        ]
    }

    /// The components it has.
    pub(crate) fn components(&self) -> Vec<&'static str> {
        let gates = self.config["angn"]["enabled"] == json!(true);
        let has = |name: &str| match name {
            "angn" => gates,
            "y_decoder" => self.phase >= 2,
            "recursion" => self.phase >= 3,
            _ => true,
        };
        COMPONENTS.into_iter().filter(|name| has(name)).collect()
    }

    /// The bytes of `{component}.safetensors`.
    pub(crate) fn component(&self, component: &str) -> Vec<u8> {
        self.file(component, &self.tensors(component))
    }

    /// The same after `change` was called with each key and its numbers, before they are rounded to the type.
    pub(crate) fn component_with(&self, component: &str, mut change: impl FnMut(&str, &mut Vec<f32>)) -> Vec<u8> {
        let mut tensors = self.tensors(component);
        for Tensor { key, numbers, .. } in &mut tensors {
            change(key, numbers);
        }
        self.file(component, &tensors)
    }

    /// The tensors of a component.
    pub(crate) fn tensors(&self, component: &str) -> Vec<Tensor> {
        let shapes = self.shapes(component).into_iter();
        shapes.map(|(key, shape)| Tensor { numbers: self.numbers(&key, &shape), key, shape }).collect()
    }

    /// The bytes of a file of these tensors, under the header of a component.
    pub(crate) fn file(&self, component: &str, tensors: &[Tensor]) -> Vec<u8> {
        let stored: Vec<(Dtype, Vec<u8>)> = tensors.iter().map(|tensor| self.stored(tensor)).collect();
        let views = tensors.iter().zip(&stored).map(|(tensor, (dtype, bytes))| {
            let view = TensorView::new(*dtype, tensor.shape.clone(), bytes).expect("shape and numbers agree");
            (tensor.key.as_str(), view)
        });
        let metadata = [
            ("format", "mamba3-jepa".to_owned()),
            ("format_version", self.format_version.to_string()),
            ("component", component.to_owned()),
            ("phase", self.phase.to_string()),
            ("dtype", self.dtype.to_owned()),
            ("config", self.config.to_string()),
        ];
        let metadata = metadata.map(|(key, value)| (key.to_owned(), value)).into_iter().collect();
        safetensors::serialize(views, Some(metadata)).expect("tensors of known types")
    }

    /// Writes a whole export: every component, `config.json` and `tokenizer.json`.
    pub(crate) fn write(&self, folder: &Path) {
        fs::create_dir_all(folder).expect("a folder");
        let mut files = serde_json::Map::new();
        for component in self.components() {
            let (name, bytes) = (format!("{component}.safetensors"), self.component(component));
            fs::write(folder.join(&name), &bytes).expect("a file");
            files.insert(name, described(&bytes));
        }
        let tokenizer = byte_tokenizer().to_string();
        fs::write(folder.join("tokenizer.json"), &tokenizer).expect("a file");
        let config = self.document(&Value::Object(files), &described(tokenizer.as_bytes()));
        fs::write(folder.join("config.json"), config.to_string()).expect("a file");
    }

    /// `config.json`.
    fn document(&self, files: &Value, tokenizer: &Value) -> Value {
        let knowledge_dim = match &self.config["recursion"]["knowledge_dim"] {
            Value::Null => &self.config["embed_dim"],
            given => given,
        };
        let mut document = json!({
            "format": "mamba3-jepa", "format_version": self.format_version, "phase": self.phase, "dtype": self.dtype,
            "files": files, "tokenizer": tokenizer, "model": self.config, "knowledge_dim": knowledge_dim,
            "tokens": {"pad": 0, "bos": 1, "eos": 2},
            "image": {
                "size": self.config["vision"]["image_size"], "mean": [0.485, 0.456, 0.406],
                "std": [0.229, 0.224, 0.225], "resize": "centre square, then bicubic with antialiasing"
            },
            "data": {"source": "synthetic scenes", "synthetic": true}, "metrics": {"val/loss": 0.5}
        });
        if self.format_version == 1 {
            document["constants"] = json!({"norm_eps": 1e-5, "A_floor": 1e-4, "layer_norm_eps": 1e-5});
            return document;
        }
        document["constants"] = json!({
            "norm_eps": 1e-5, "A_floor": 1e-4, "normalize_eps": 1e-6, "x_encoder_layer_norm_eps": 1e-6,
            "confusion_probe_layer_norm_eps": 1e-5
        });
        document["answers"] = json!(["red", "yes", "größer"]);
        document["classify"] = json!({"temperature": 0.07, "template": "{}"});
        document["memory"] = json!({"format": "mamba3-jepa memory", "format_version": "3"});
        if self.phase >= 2 {
            document["generation"] = json!({"max_tokens": self.size("/max_answer_tokens") - 1});
        }
        document
    }

    fn size(&self, pointer: &str) -> usize {
        let number = self.config.pointer(pointer).and_then(Value::as_u64).expect("a count of the configuration");
        usize::try_from(number).expect("a small count")
    }

    /// Every key of a component, and its shape.
    pub(crate) fn shapes(&self, component: &str) -> Vec<(String, Vec<usize>)> {
        let size = |pointer: &str| self.size(pointer);
        let width = |backbone: &str| size(&format!("/{backbone}/layer/d_model"));
        let (embed, vocab) = (size("/embed_dim"), size("/vocab_size"));
        let mut shapes = Vec::new();
        let mut add = |key: &str, shape: &[usize]| shapes.push((format!("{component}.{key}"), shape.to_vec()));
        let mut linear = |key: &str, outputs: usize, inputs: usize| {
            add(&format!("{key}.weight"), &[outputs, inputs]);
            add(&format!("{key}.bias"), &[outputs]);
        };
        match component {
            "predictor" => {
                linear("vision_proj", width("predictor"), size("/vision/hidden_size"));
                linear("query_proj", width("predictor"), width("y_encoder"));
                linear("pred_head", embed, width("predictor"));
                if self.config["predictor"]["pooling"] == json!("attention") {
                    add("pool_score.weight", &[1, width("predictor")]);
                }
            }
            "y_encoder" => {
                linear("projection", embed, width("y_encoder"));
                add("embedding.weight", &[vocab, width("y_encoder")]);
            }
            "y_decoder" => {
                linear("embed_to_prefix", size("/prefix_tokens") * width("y_decoder"), embed);
                add("embedding.weight", &[vocab, width("y_decoder")]);
                add("lm_head.weight", &[vocab, width("y_decoder")]);
            }
            "angn" => {
                for i in 0..size("/predictor/n_layers") {
                    add(&format!("gates.{i}.weight"), &[width("predictor")]);
                    add(&format!("gates.{i}.bias"), &[width("predictor")]);
                }
            }
            "recursion" => {
                let (width, hidden) = (width("predictor"), size("/recursion/hidden_dim"));
                let said = &self.config["recursion"];
                let count = |key: &str| said[key].as_u64().map(|k| usize::try_from(k).expect("a small count"));
                let knowledge = count("knowledge_dim").unwrap_or(embed);
                let doubts = if said["hears_answer"] == json!(true) { 2 } else { 0 };
                linear("confusion_probe.hidden", hidden, width + doubts);
                linear("confusion_probe.linear", 1, hidden);
                let sees_state = said["injector_sees_state"] == json!(true);
                if sees_state {
                    linear("injector.hidden", hidden, width + knowledge);
                }
                let tools = said["tools"].as_array().map_or(0, Vec::len);
                let weighs_knowledge = said["weighs_knowledge"] == json!(true);
                for (name, more, outputs, is_there) in
                    [("knowledge_probe", knowledge, 1, weighs_knowledge), ("tool_selector", 0, tools, tools > 0)]
                {
                    if is_there {
                        linear(&format!("{name}.hidden"), hidden, width + more);
                        linear(&format!("{name}.linear"), outputs, hidden);
                    }
                }
                if let Some(retriever) = count("retriever_dim").filter(|&size| size > 0) {
                    for tower in ["question", "text"] {
                        linear(&format!("retriever.{tower}.hidden"), hidden, embed);
                        linear(&format!("retriever.{tower}.output"), retriever, hidden);
                    }
                }
                for kind in ["weight", "bias"] {
                    add(&format!("confusion_probe.norm.{kind}"), &[width]);
                    for (name, is_there) in
                        [("injector", sees_state), ("knowledge_probe", weighs_knowledge), ("tool_selector", tools > 0)]
                    {
                        if is_there {
                            add(&format!("{name}.norm.{kind}"), &[width]);
                        }
                    }
                }
                if sees_state {
                    add("injector.output.weight", &[width, hidden]);
                }
                add("injector.projection.weight", &[width, knowledge]);
                add("confusion_probe.threshold", &[]);
                add("confusion_probe.temperature", &[]);
                if self.format_version >= 2 {
                    add("memory_floor", &[]);
                }
                if said["episodes"] == json!(true) {
                    add("episode_blend", &[]);
                    add("episode_floor", &[]);
                    match said["episode_key"] == json!("picture") {
                        true => add("picture_mean", &[4 * size("/vision/hidden_size")]),
                        false => add("state_mean", &[width]),
                    }
                }
            }
            "x_encoder" => self.add_vision(&mut shapes),
            other => panic!("there is no component {other}"),
        }
        if BACKBONES.contains(&component) {
            self.add_backbone(component, &mut shapes);
        }
        shapes
    }

    fn add_vision(&self, shapes: &mut Vec<(String, Vec<usize>)>) {
        let size = |pointer: &str| self.size(pointer);
        let mut add = |key: &str, shape: &[usize]| shapes.push((format!("x_encoder.{key}"), shape.to_vec()));
        let (hidden, patch) = (size("/vision/hidden_size"), size("/vision/patch_size"));
        let ratio = self.config["vision"]["mlp_ratio"].as_f64().expect("a number");
        let wide = (hidden as f64 * ratio) as usize;
        let patches = "encoder.embeddings.patch_embeddings.proj";
        add(&format!("{patches}.weight"), &[hidden, 3, size("/vision/tubelet_size"), patch, patch]);
        add(&format!("{patches}.bias"), &[hidden]);
        if self.config["vision"]["kind"] == json!("vjepa2.1") {
            add("encoder.embeddings.patch_embeddings_img.proj.weight", &[hidden, 3, 1, patch, patch]);
            add("encoder.embeddings.patch_embeddings_img.proj.bias", &[hidden]);
            add("encoder.embeddings.img_mod_embed", &[1, 1, hidden]);
            add("encoder.embeddings.video_mod_embed", &[1, 1, hidden]);
        }
        let mut norms = vec!["encoder.layernorm".to_owned()];
        for i in 0..size("/vision/depth") {
            let layer = format!("encoder.layer.{i}");
            norms.extend([format!("{layer}.norm1"), format!("{layer}.norm2")]);
            for (name, outputs, inputs) in [
                ("attention.query", hidden, hidden),
                ("attention.key", hidden, hidden),
                ("attention.value", hidden, hidden),
                ("attention.proj", hidden, hidden),
                ("mlp.fc1", wide, hidden),
                ("mlp.fc2", hidden, wide),
            ] {
                add(&format!("{layer}.{name}.weight"), &[outputs, inputs]);
                add(&format!("{layer}.{name}.bias"), &[outputs]);
            }
        }
        for norm in norms {
            add(&format!("{norm}.weight"), &[hidden]);
            add(&format!("{norm}.bias"), &[hidden]);
        }
    }

    fn add_backbone(&self, component: &str, shapes: &mut Vec<(String, Vec<usize>)>) {
        let layer = &self.config[component]["layer"];
        let size = |key: &str| self.size(&format!("/{component}/layer/{key}"));
        let (width, state, head) = (size("d_model"), size("d_state"), size("headdim"));
        let inner = size("expand") * width;
        let heads = inner / head;
        let rank = if layer["is_mimo"] == json!(true) { size("mimo_rank") } else { 1 };
        let angles = if layer["rope_fraction"] == json!(1.0) { state / 2 } else { state / 4 };
        let projected = 2 * inner + 2 * rank * size("ngroups") * state + 3 * heads + angles;
        let mut add = |key: String, shape: &[usize]| shapes.push((format!("{component}.{key}"), shape.to_vec()));
        let n_layers = self.size(&format!("/{component}/n_layers"));
        for i in 0..n_layers {
            add(format!("norms.{i}.weight"), &[width]);
        }
        let directions: &[&str] = match self.config[component]["bidirectional"] == json!(true) {
            true => &["layers", "reverse_layers"],
            false => &["layers"],
        };
        for (layers, i) in directions.iter().flat_map(|layers| (0..n_layers).map(move |i| (layers, i))) {
            let mut add = |key: &str, shape: &[usize]| add(format!("{layers}.{i}.{key}"), shape);
            add("in_proj.weight", &[projected, width]);
            add("dt_bias", &[heads]);
            add("B_bias", &[heads, rank, state]);
            add("C_bias", &[heads, rank, state]);
            add("B_norm.weight", &[state]);
            add("C_norm.weight", &[state]);
            add("D", &[heads]);
            add("out_proj.weight", &[width, inner]);
            if layer["is_mimo"] == json!(true) {
                for name in ["mimo_x", "mimo_z", "mimo_o"] {
                    add(name, &[heads, rank, head]);
                }
            }
            if layer["is_outproj_norm"] == json!(true) {
                add("norm.weight", &[inner]);
            }
        }
        add("final_norm.weight".to_owned(), &[width]);
    }

    /// Numbers of the size that such a tensor has after some training.
    fn numbers(&self, key: &str, shape: &[usize]) -> Vec<f32> {
        let seed = key.bytes().fold(self.seed ^ 0xcbf2_9ce4_8422_2325, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        });
        let mut random = Random::new(seed);
        let name = key.rsplit('.').next().expect("a key");
        let len = shape.iter().product();
        let (centre, spread) = match name {
            "dt_bias" => return (0..len).map(|_| -6.0 + 4.0 * random.uniform()).collect(),
            "threshold" => return vec![0.5],
            "temperature" => return vec![1.7],
            "memory_floor" => return vec![-1.0],
            "episode_blend" => return vec![0.5],
            "episode_floor" => return vec![0.25],
            "B_bias" | "C_bias" | "D" | "mimo_z" => (1.0, 0.1),
            "mimo_x" | "mimo_o" => (1.0 / shape[1] as f32, 0.1),
            "bias" if key.contains("gates") => (1.5, 0.1),
            "weight" if key.contains("gates") => (0.0, 0.1),
            "weight" if key.contains("embedding.weight") => (0.0, 1.0),
            "weight" if shape.len() == 1 => (1.0, 0.1),
            "weight" => (0.0, 1.0 / (shape[1..].iter().product::<usize>() as f32).sqrt()),
            _ => (0.0, 0.1),
        };
        (0..len).map(|_| centre + spread * random.normal()).collect()
    }

    fn stored(&self, Tensor { key, shape, numbers }: &Tensor) -> (Dtype, Vec<u8>) {
        let matrix = key.ends_with(".weight") && shape.len() >= 2;
        match self.dtype {
            "float16" if matrix => (Dtype::F16, numbers.iter().flat_map(|&x| f16::from_f32(x).to_le_bytes()).collect()),
            "bfloat16" if matrix => {
                (Dtype::BF16, numbers.iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes()).collect())
            }
            _ => (Dtype::F32, numbers.iter().flat_map(|x| x.to_le_bytes()).collect()),
        }
    }
}

/// A tensor before it is rounded to the type of its file.
#[derive(Clone)]
pub(crate) struct Tensor {
    pub(crate) key: String,
    pub(crate) shape: Vec<usize>,
    pub(crate) numbers: Vec<f32>,
}

/// Random numbers that are the same on every machine (splitmix64).
pub(crate) struct Random(u64);

impl Random {
    /// A sequence of its own for each seed.
    pub(crate) fn new(seed: u64) -> Random {
        Random(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }

    /// In [0, 1).
    pub(crate) fn uniform(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1_u64 << 24) as f32
    }

    /// Of mean 0 and variance 1, nearly normal.
    pub(crate) fn normal(&mut self) -> f32 {
        (0..12).map(|_| self.uniform()).sum::<f32>() - 6.0
    }

    /// `n` such numbers.
    pub(crate) fn normals(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.normal()).collect()
    }
}

/// A byte-level tokenizer that has learnt nothing: pad, bos, eos, then the 256 bytes.
pub(crate) fn byte_tokenizer() -> Value {
    let mut vocab = serde_json::Map::new();
    for token in ["<pad>", "<bos>", "<eos>"] {
        vocab.insert(token.to_owned(), json!(vocab.len()));
    }
    // GPT-2's alphabet: printable bytes stand for themselves, the others for the characters from U+0100 on.
    let printable = |byte: u8| matches!(byte, 33..=126 | 161..=172 | 174..=255);
    let mut others = (0x100..).map(|code| char::from_u32(code).expect("a character"));
    for byte in 0..=255_u8 {
        let symbol = if printable(byte) { char::from(byte) } else { others.next().expect("enough characters") };
        vocab.insert(symbol.to_string(), json!(vocab.len()));
    }
    let special: Vec<Value> = ["<pad>", "<bos>", "<eos>"]
        .iter()
        .enumerate()
        .map(|(id, token)| {
            json!({"id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": true})
        })
        .collect();
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": special, "normalizer": null,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "post_processor": null,
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
            "vocab": vocab, "merges": []
        }
    })
}

/// What `config.json` says of a file.
pub(crate) fn described(bytes: &[u8]) -> Value {
    let sha256: String = Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect();
    json!({"bytes": bytes.len(), "sha256": sha256})
}

/// Puts other bytes in a component's place in an export, as if they had been exported.
pub(crate) fn put(folder: &Path, component: &str, bytes: &[u8]) {
    let name = format!("{component}.safetensors");
    fs::write(folder.join(&name), bytes).expect("a file");
    let path = folder.join("config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path).expect("a file")).expect("JSON");
    config["files"][&name] = described(bytes);
    fs::write(path, config.to_string()).expect("a file");
}

/// Length of the difference over length of what is expected.
pub(crate) fn relative(found: &[f32], expected: &[f32]) -> f64 {
    assert_eq!(found.len(), expected.len());
    let pairs = || found.iter().zip(expected).map(|(&a, &b)| (f64::from(a), f64::from(b)));
    let difference: f64 = pairs().map(|(a, b)| (a - b).powi(2)).sum();
    let length: f64 = pairs().map(|(_, b)| b * b).sum();
    (difference / length).sqrt()
}
