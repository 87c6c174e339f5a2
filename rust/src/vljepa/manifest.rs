//! `config.json` of an exported folder: read strictly, every value that the computation depends on checked.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use crate::config::{
    A_FLOOR, CONFUSION_PROBE_LAYER_NORM_EPS, Mamba3JepaConfig, NORM_EPS, NORMALIZE_EPS, X_ENCODER_LAYER_NORM_EPS,
};
use crate::error::LoadError;
use crate::files::path_text;
use crate::loader::FORMAT;
use crate::memory;
use crate::texts::{distinct, strip};

/// A larger `config.json` is refused.
const MAX_BYTES: u64 = 1 << 26;
const VERSIONS: [u32; 2] = [1, 2];
const DTYPES: [&str; 3] = ["float32", "float16", "bfloat16"];
const RESIZE: &str = "centre square, then bicubic with antialiasing";
/// Every key that there may be. Any other means nothing to this version: what changes the meaning of the rest changes the
/// version of the format.
const KEYS: [&str; 17] = [
    "answers",
    "classify",
    "constants",
    "data",
    "dtype",
    "files",
    "format",
    "format_version",
    "generation",
    "image",
    "knowledge_dim",
    "memory",
    "metrics",
    "model",
    "phase",
    "tokenizer",
    "tokens",
];
/// Temperature and template of `classify` where a file of version 1 does not say.
const CLASSIFY: Classify = Classify { temperature: 0.07, template: String::new() };

/// What a file of the folder must be.
#[derive(Clone, Debug, Deserialize)]
pub(super) struct Listed {
    pub(super) bytes: u64,
    /// In lower-case hex.
    pub(super) sha256: String,
}

/// How images enter the X-Encoder.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ImageRule {
    size: usize,
    pub(super) mean: [f32; 3],
    pub(super) std: [f32; 3],
    #[serde(default)]
    resize: Option<String>,
}

/// Ids of the special tokens.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Tokens {
    pub(super) pad: u32,
    pub(super) bos: u32,
    pub(super) eos: u32,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Classify {
    pub(super) temperature: f32,
    pub(super) template: String,
}

/// Everything `config.json` says that this crate uses.
#[derive(Clone, Debug)]
pub(super) struct Manifest {
    pub(super) path: PathBuf,
    pub(super) format_version: u32,
    pub(super) phase: u32,
    pub(super) dtype: String,
    pub(super) config: Mamba3JepaConfig,
    /// The files of weights by component; whether `x_encoder` is among them is up to the export.
    pub(super) files: BTreeMap<String, Listed>,
    pub(super) tokenizer: Listed,
    pub(super) tokens: Tokens,
    pub(super) image: ImageRule,
    pub(super) classify: Classify,
    /// The known answers, each once.
    pub(super) answers: Vec<String>,
    /// Tokens to generate at most, eos included.
    pub(super) max_tokens: usize,
    /// Keys that this version does not know.
    unknown: Vec<String>,
}

impl Manifest {
    /// Reads `config.json` of `folder`.
    ///
    /// # Errors
    /// [`LoadError::Read`], [`LoadError::Mismatch`] if it is another kind of file or version, [`LoadError::Config`] with
    /// the key whose value is missing or impossible.
    pub(super) fn read(folder: &Path) -> Result<Manifest, LoadError> {
        let path = folder.join("config.json");
        let unreadable = |source| LoadError::Read { path: path.clone(), source };
        let size = fs::metadata(&path).map_err(unreadable)?.len();
        if size > MAX_BYTES {
            return Err(LoadError::Damaged { path, reason: format!("{size} bytes are more than this crate reads") });
        }
        Self::from_bytes(&path, &fs::read(&path).map_err(unreadable)?)
    }

    /// The manifest in `json`; `path` only names it in messages.
    pub(super) fn from_bytes(path: &Path, json: &[u8]) -> Result<Manifest, LoadError> {
        let value: Value = serde_json::from_slice(json).map_err(|error| LoadError::Damaged {
            path: path.to_path_buf(),
            reason: format!("cannot be read as JSON: {error}"),
        })?;
        let mismatch = |reason: String| LoadError::Mismatch { path: path.to_path_buf(), reason };
        let ours = value.as_object().filter(|keys| keys.get("format").and_then(Value::as_str) == Some(FORMAT));
        let keys = Keys {
            path,
            values: ours.ok_or_else(|| {
                mismatch(format!("not the config.json of a Mamba3-JEPA export: it names no format {FORMAT:?}"))
            })?,
        };
        let format_version: u32 = keys.get("format_version")?;
        if !VERSIONS.contains(&format_version) {
            let readable = VERSIONS.map(|version| version.to_string()).join(" and ");
            return Err(mismatch(format!("it has export format {format_version}; this version reads {readable}")));
        }
        let config = keys.model()?;
        let phase: u32 = keys.get("phase")?;
        keys.demand("phase", (1..=3).contains(&phase), || format!("{phase}, expected 1, 2 or 3"))?;
        let dtype: String = keys.get("dtype")?;
        keys.demand("dtype", DTYPES.contains(&dtype.as_str()), || {
            format!("{dtype:?}, expected {}", DTYPES.join(", "))
        })?;
        let files = keys.files(&config, phase)?;
        let since_2 = format_version >= 2;
        let manifest = Manifest {
            path: path.to_path_buf(),
            format_version,
            phase,
            dtype,
            files,
            tokenizer: keys.get("tokenizer")?,
            tokens: keys.get("tokens")?,
            image: keys.get("image")?,
            classify: if since_2 { keys.get("classify")? } else { Classify { template: "{}".into(), ..CLASSIFY } },
            answers: if since_2 { distinct(keys.get::<Vec<String>>("answers")?) } else { Vec::new() },
            max_tokens: keys.max_tokens(&config)?,
            unknown: keys.values.keys().filter(|key| !KEYS.contains(&key.as_str())).cloned().collect(),
            config,
        };
        manifest.check(&keys)?;
        Ok(manifest)
    }

    /// What the user should know of the file, in one line.
    pub(super) fn warning(&self) -> Option<String> {
        let path = path_text(&self.path);
        let names = self.unknown.join(", ");
        (!names.is_empty()).then(|| format!("{path}: not known to this version, and ignored: {names}"))
    }

    fn check(&self, keys: &Keys<'_>) -> Result<(), LoadError> {
        let (config, image) = (&self.config, &self.image);
        let knowledge_dim: usize = keys.get("knowledge_dim")?;
        keys.demand("knowledge_dim", knowledge_dim == config.knowledge_dim(), || {
            format!("{knowledge_dim}, but the model says {}", config.knowledge_dim())
        })?;
        keys.demand("image.size", image.size == config.vision.image_size, || {
            format!("{}, but the model says {}", image.size, config.vision.image_size)
        })?;
        let is_number = image.mean.iter().chain(&image.std).all(|x| x.is_finite());
        keys.demand("image", is_number && image.std.iter().all(|&std| std > 0.0), || {
            format!("mean {:?} and std {:?}: expected numbers, std above 0", image.mean, image.std)
        })?;
        keys.demand("image.resize", image.resize.as_ref().is_none_or(|rule| rule == RESIZE), || {
            format!("{:?}, this version does {RESIZE:?}", image.resize)
        })?;
        let temperature = self.classify.temperature;
        keys.demand("classify.temperature", temperature > 0.0 && temperature.is_finite(), || {
            format!("{temperature}, expected a number above 0")
        })?;
        let template = &self.classify.template;
        keys.demand("classify.template", template.matches("{}").count() == 1, || {
            format!("{template:?}, expected a text with {{}} in it once, where the label goes")
        })?;
        keys.demand("answers", self.answers.iter().all(|answer| !strip(answer).is_empty()), || {
            "one of them is empty, expected texts".into()
        })?;
        if self.format_version >= 2 {
            let memory: MemoryFormat = keys.get("memory")?;
            let is_known =
                memory.format == memory::FORMAT && memory::READABLE_VERSIONS.contains(&memory.format_version.as_str());
            keys.demand("memory", is_known, || {
                format!(
                    "format {:?}, version {:?}: this version knows {:?}, versions {}",
                    memory.format,
                    memory.format_version,
                    memory::FORMAT,
                    memory::READABLE_VERSIONS.join(" and ")
                )
            })?;
        }
        keys.check_constants(self.format_version, self.phase)
    }
}

#[derive(Deserialize)]
struct MemoryFormat {
    format: String,
    format_version: String,
}

/// The members of `config.json`; every error names one.
struct Keys<'a> {
    path: &'a Path,
    values: &'a Map<String, Value>,
}

impl Keys<'_> {
    fn get<T: DeserializeOwned>(&self, key: &str) -> Result<T, LoadError> {
        let value = self.values.get(key).ok_or_else(|| self.wrong(key, "missing"))?;
        T::deserialize(value).map_err(|error| self.wrong(key, &error.to_string()))
    }

    fn demand(&self, key: &str, is_right: bool, what: impl FnOnce() -> String) -> Result<(), LoadError> {
        if is_right { Ok(()) } else { Err(self.wrong(key, &what())) }
    }

    fn wrong(&self, key: &str, what: &str) -> LoadError {
        LoadError::Config { path: self.path.to_path_buf(), reason: format!("{key}: {what}") }
    }

    fn model(&self) -> Result<Mamba3JepaConfig, LoadError> {
        let value = self.values.get("model").ok_or_else(|| self.wrong("model", "missing"))?;
        Mamba3JepaConfig::from_json(&value.to_string(), self.path).map_err(|error| match error {
            LoadError::Config { reason, .. } => self.wrong("model", &reason),
            other => other,
        })
    }

    /// The files of weights by component: exactly those that the phase has, and `x_encoder` if it was exported.
    fn files(&self, config: &Mamba3JepaConfig, phase: u32) -> Result<BTreeMap<String, Listed>, LoadError> {
        let listed: BTreeMap<String, Listed> = self.get("files")?;
        let expected = components(config, phase);
        let mut files = BTreeMap::new();
        for (name, file) in listed {
            let component = name.strip_suffix(".safetensors").unwrap_or_default();
            self.demand("files", expected.contains(&component) || component == "x_encoder", || {
                format!("{name}: an export of phase {phase} has {}", expected.join(", "))
            })?;
            files.insert(component.to_owned(), file);
        }
        match expected.iter().find(|&&component| !files.contains_key(component)) {
            None => Ok(files),
            Some(missing) => {
                Err(self.wrong("files", &format!("{missing}.safetensors is missing; phase {phase} has it")))
            }
        }
    }

    fn max_tokens(&self, config: &Mamba3JepaConfig) -> Result<usize, LoadError> {
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Generation {
            max_tokens: usize,
        }
        let longest = config.max_answer_tokens - 1; // of bos, answer, eos, bos is given
        if !self.values.contains_key("generation") {
            return Ok(longest);
        }
        let generation: Generation = self.get("generation")?;
        self.demand("generation.max_tokens", generation.max_tokens == longest, || {
            format!("{}, but the model's answers have at most {longest}", generation.max_tokens)
        })?;
        Ok(longest)
    }

    /// The numbers that this crate computes with are those the model was trained with.
    fn check_constants(&self, version: u32, phase: u32) -> Result<(), LoadError> {
        let constants: BTreeMap<String, f32> = self.get("constants")?;
        let mut known = BTreeMap::from([("norm_eps", NORM_EPS), ("A_floor", A_FLOOR)]);
        if version == 1 {
            known.insert("layer_norm_eps", CONFUSION_PROBE_LAYER_NORM_EPS);
        } else {
            known.insert("normalize_eps", NORMALIZE_EPS);
            known.insert("x_encoder_layer_norm_eps", X_ENCODER_LAYER_NORM_EPS);
            if phase >= 3 || constants.contains_key("confusion_probe_layer_norm_eps") {
                known.insert("confusion_probe_layer_norm_eps", CONFUSION_PROBE_LAYER_NORM_EPS);
            }
        }
        for (name, expected) in &known {
            let found = constants.get(*name);
            self.demand(&format!("constants.{name}"), found == Some(expected), || {
                let found = found.map_or("missing".into(), f32::to_string);
                format!("{found}, but this version computes with {expected}")
            })?;
        }
        match constants.keys().find(|name| !known.contains_key(name.as_str())) {
            None => Ok(()),
            Some(name) => Err(self.wrong(&format!("constants.{name}"), "not known to this version")),
        }
    }
}

/// The components that an export of `phase` holds, besides the X-Encoder.
fn components(config: &Mamba3JepaConfig, phase: u32) -> Vec<&'static str> {
    let gates = config.angn.enabled.then_some("angn");
    let mut components = vec!["predictor", "y_encoder"];
    components.extend(gates);
    components.extend((phase >= 2).then_some("y_decoder"));
    components.extend((phase >= 3).then_some("recursion"));
    components
}
