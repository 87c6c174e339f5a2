//! Reading a folder that `transformers` wrote for a V-JEPA 2 model.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use safetensors::Dtype;
use serde_json::{Map, Value, json};

use super::pixels::CHANNELS;
use super::source::Source;
use crate::config::{VisionConfig, VisionKind};
use crate::error::LoadError;
use crate::linalg::Matrix;
use crate::loader::{TensorInfo, Weights, load_safetensors};

const CONFIG: &str = "config.json";
const WHOLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
const EXPECTED: &str = "expected a transformers folder of a V-JEPA 2 model, with config.json and model.safetensors";
/// Tensors of a published checkpoint that come after the encoder, and are not used.
const UNUSED: [&str; 3] = ["predictor.", "pooler.", "classifier."];
const PATCHES: &str = "encoder.embeddings.patch_embeddings.proj.weight";
const FIRST_PERCEPTRON: &str = "encoder.layer.0.mlp.fc1.weight";

/// The tensors of a folder, taken one by one; [`Folder::finish`] demands that none is left.
pub(super) struct Folder {
    path: PathBuf,
    shards: Vec<Weights>,
    /// Name without the prefix of a larger model -> shard, and the name there.
    places: BTreeMap<String, (usize, String)>,
    taken: BTreeSet<String>,
}

impl Folder {
    /// Reads the folder, and what its settings and shapes say about the encoder.
    ///
    /// # Errors
    /// [`LoadError`] if a file is missing or damaged, or the model is another one.
    pub(super) fn open(path: &Path) -> Result<(Folder, VisionConfig), LoadError> {
        let settings = Settings::read(path)?;
        let mut folder =
            Folder { path: path.to_path_buf(), shards: Vec::new(), places: BTreeMap::new(), taken: BTreeSet::new() };
        for file in shard_files(path)? {
            folder.add(load_safetensors(file)?);
        }
        let config = folder.config(&settings)?;
        Ok((folder, config))
    }

    fn add(&mut self, shard: Weights) {
        for key in shard.tensors().keys() {
            let name = key.strip_prefix("vjepa2.").unwrap_or(key);
            if !UNUSED.iter().any(|prefix| name.starts_with(prefix)) {
                self.places.insert(name.to_owned(), (self.shards.len(), key.clone()));
            }
        }
        self.shards.push(shard);
    }

    /// Demands that every tensor of the encoder was taken.
    ///
    /// # Errors
    /// [`LoadError::UnknownKey`] for what is left.
    pub(super) fn finish(self) -> Result<(), LoadError> {
        let mut left = self.places.iter().filter(|(name, _)| !self.taken.contains(*name));
        match left.next() {
            None => Ok(()),
            Some((_, (shard, key))) => Err(LoadError::UnknownKey {
                path: self.shards[*shard].path().to_path_buf(),
                key: key.clone(),
                more: left.count(),
            }),
        }
    }

    fn find(&self, name: &str) -> Result<(&Weights, &str, &TensorInfo), LoadError> {
        let missing = || LoadError::MissingKey { path: self.path.clone(), key: name.to_owned() };
        let (shard, key) = self.places.get(name).ok_or_else(missing)?;
        let shard = &self.shards[*shard];
        let info = shard.tensors().get(key).ok_or_else(missing)?;
        Ok((shard, key, info))
    }

    fn take(&mut self, name: &str, shape: &[usize]) -> Result<(&Weights, &str, &TensorInfo), LoadError> {
        self.taken.insert(name.to_owned());
        let (shard, key, info) = self.find(name)?;
        if info.shape != shape {
            return Err(LoadError::Shape {
                path: shard.path().to_path_buf(),
                key: key.to_owned(),
                expected: shape.to_vec(),
                found: info.shape.clone(),
            });
        }
        if !matches!(info.dtype, Dtype::F64 | Dtype::F32 | Dtype::F16 | Dtype::BF16) {
            return Err(LoadError::Type {
                path: shard.path().to_path_buf(),
                key: key.to_owned(),
                expected: "F32, F16, BF16 or F64".into(),
                found: format!("{:?}", info.dtype),
            });
        }
        Ok((shard, key, info))
    }

    /// What the shapes say, checked against the settings and completed by them.
    fn config(&self, settings: &Settings) -> Result<VisionConfig, LoadError> {
        let (shard, key, patches) = self.find(PATCHES)?;
        let &[hidden_size, CHANNELS, tubelet_size, patch_size, other_side] = patches.shape.as_slice() else {
            return Err(LoadError::Mismatch {
                path: shard.path().to_path_buf(),
                reason: format!(
                    "{key}: expected a patch embedding (D, {CHANNELS}, tubelet, patch, patch), found shape {:?}",
                    patches.shape
                ),
            });
        };
        if patch_size != other_side {
            return Err(settings.invalid(format!("patches of {patch_size} x {other_side} pixels are not square")));
        }
        let (_, _, fc1) = self.find(FIRST_PERCEPTRON)?;
        let wide = fc1.shape.first().copied().unwrap_or(0);
        let mut mlp_ratio = wide as f64 / hidden_size as f64;
        if (hidden_size as f64 * mlp_ratio) as usize != wide {
            mlp_ratio = mlp_ratio.next_up(); // the division rounded down
        }
        let depth = self.places.keys().filter_map(|name| layer_index(name)).max().map_or(0, |i| i.saturating_add(1));
        settings.agree(&["hidden_size"], hidden_size as f64)?;
        settings.agree(&["num_hidden_layers", "depth"], depth as f64)?;
        settings.agree(&["mlp_ratio"], mlp_ratio)?;
        settings.agree(&["patch_size"], patch_size as f64)?;
        settings.agree(&["tubelet_size"], tubelet_size as f64)?;
        let config = VisionConfig {
            kind: VisionKind::Vjepa2,
            hidden_size,
            depth,
            heads: settings.count(&["num_attention_heads", "heads"], usual_heads(hidden_size, depth))?,
            mlp_ratio,
            image_size: settings.count(&["crop_size", "image_size"], 256)?,
            patch_size,
            tubelet_size,
            frames: settings.count(&["frames_per_clip", "frames"], 64)?,
            pretrained: true,
        };
        config.check("vision").map_err(|reason| settings.invalid(reason))?;
        Ok(config)
    }
}

impl Source for Folder {
    fn matrix(&mut self, name: &str, shape: &[usize], rows: usize, cols: usize) -> Result<Matrix, LoadError> {
        let (shard, key, info) = self.take(name, shape)?;
        match shard.matrix(info, rows, cols) {
            Some(matrix) => Ok(matrix),
            None => Ok(Matrix::from_f32(rows, cols, shard.to_f32(key)?.into())),
        }
    }

    fn numbers(&mut self, name: &str, shape: &[usize]) -> Result<Vec<f32>, LoadError> {
        let (shard, key, _) = self.take(name, shape)?;
        shard.to_f32(key)
    }
}

/// Heads are 64 wide in ViT-L and ViT-g, and 80 in ViT-H.
fn usual_heads(hidden_size: usize, depth: usize) -> usize {
    if (hidden_size, depth) == (1280, 32) { 16 } else { (hidden_size / 64).max(1) }
}

/// The i of `encoder.layer.{i}.…`.
fn layer_index(name: &str) -> Option<usize> {
    name.strip_prefix("encoder.layer.")?.split_once('.')?.0.parse().ok()
}

/// `config.json` of the folder.
struct Settings {
    path: PathBuf,
    values: Map<String, Value>,
}

impl Settings {
    fn read(folder: &Path) -> Result<Settings, LoadError> {
        let path = folder.join(CONFIG);
        if !path.is_file() {
            return Err(not_a_folder(folder));
        }
        let values = read_object(&path)?;
        let settings = Settings { path, values };
        // What every V-JEPA 2 has in common, and the configuration therefore does not say.
        for (key, expected) in [
            ("model_type", json!("vjepa2")),
            ("layer_norm_eps", json!(1e-6)),
            ("hidden_act", json!("gelu")),
            ("qkv_bias", json!(true)),
            ("in_chans", json!(CHANNELS)),
        ] {
            let found = settings.values.get(key).unwrap_or(&expected);
            if *found != expected {
                return Err(settings.invalid(format!("expected {key} {expected} (V-JEPA 2), found {found}")));
            }
        }
        Ok(settings)
    }

    fn invalid(&self, reason: String) -> LoadError {
        LoadError::Config { path: self.path.clone(), reason }
    }

    fn get(&self, names: &[&'static str]) -> Option<(&'static str, &Value)> {
        names.iter().find_map(|&name| Some((name, self.values.get(name)?)))
    }

    /// Demands that the setting, where it is there, is what the weights say.
    fn agree(&self, names: &[&'static str], value: f64) -> Result<(), LoadError> {
        match self.get(names) {
            Some((name, said)) if said.as_f64().is_none_or(|said| (said - value).abs() > 1e-6 * value.abs()) => {
                Err(self.invalid(format!("it says {name} {said}, the weights say {value}")))
            }
            _ => Ok(()),
        }
    }

    /// A whole number, or `default` where there is no such setting.
    fn count(&self, names: &[&'static str], default: usize) -> Result<usize, LoadError> {
        let Some((name, value)) = self.get(names) else { return Ok(default) };
        let count = value.as_u64().and_then(|count| usize::try_from(count).ok());
        count.ok_or_else(|| self.invalid(format!("{name}: expected a whole number, found {value}")))
    }
}

/// The safetensors files of a folder: one, else the shards that the index names, else all that are called like shards.
fn shard_files(folder: &Path) -> Result<Vec<PathBuf>, LoadError> {
    let whole = folder.join(WHOLE);
    let index = folder.join(INDEX);
    if whole.is_file() {
        return Ok(vec![whole]);
    }
    if index.is_file() {
        return indexed_files(folder, &index);
    }
    let names: Vec<_> = file_names(folder)?.into_iter().filter(|name| is_shard(name)).collect();
    if names.is_empty() { Err(not_a_folder(folder)) } else { Ok(names.iter().map(|name| folder.join(name)).collect()) }
}

fn is_shard(name: &str) -> bool {
    name.starts_with("model") && name.ends_with(".safetensors")
}

fn indexed_files(folder: &Path, index: &Path) -> Result<Vec<PathBuf>, LoadError> {
    let damaged = |reason: String| LoadError::Damaged { path: index.to_path_buf(), reason };
    let values = read_object(index)?;
    let map = values.get("weight_map").and_then(Value::as_object);
    let map = map.ok_or_else(|| damaged("it has no weight_map".into()))?;
    let names: Option<BTreeSet<&str>> = map.values().map(Value::as_str).collect();
    let names = names.ok_or_else(|| damaged("its weight_map names something that is no file".into()))?;
    let mut files = Vec::new();
    for name in names {
        // Only a file of this folder: a name with a separator could lead anywhere.
        if Path::new(name).file_name().is_none_or(|file| file != name) {
            return Err(damaged(format!("{name:?} is not the name of a file in this folder")));
        }
        let path = folder.join(name);
        if !path.is_file() {
            let reason = format!("this part of the model is missing; {INDEX} names it");
            return Err(LoadError::Mismatch { path, reason });
        }
        files.push(path);
    }
    Ok(files)
}

fn file_names(folder: &Path) -> Result<BTreeSet<String>, LoadError> {
    let entries = fs::read_dir(folder).map_err(|source| LoadError::Read { path: folder.to_path_buf(), source })?;
    Ok(entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect())
}

fn not_a_folder(path: &Path) -> LoadError {
    let names = match file_names(path) {
        Err(error) => return error,
        Ok(names) => names,
    };
    let shown: Vec<_> = names.into_iter().take(5).collect();
    let found = if shown.is_empty() { "nothing".to_owned() } else { shown.join(", ") };
    LoadError::Mismatch { path: path.to_path_buf(), reason: format!("{EXPECTED}; found {found}") }
}

fn read_object(path: &Path) -> Result<Map<String, Value>, LoadError> {
    let text = fs::read(path).map_err(|source| LoadError::Read { path: path.to_path_buf(), source })?;
    let damaged = |reason| LoadError::Damaged { path: path.to_path_buf(), reason };
    serde_json::from_slice(&text).map_err(|error| damaged(format!("not a JSON object: {error}")))
}
