//! The model's configuration, as `config.json` and every header carry it: strict, and checked when it is read.

mod backbone;
mod predictor;

use std::path::Path;

use serde::{Deserialize, Serialize};

pub use self::backbone::{AActivation, BackboneConfig, Mamba3Config};
pub use self::predictor::{Order, Part, Pooling, PredictorConfig};
use crate::error::LoadError;
use crate::json;
use crate::texts::{distinct, strip};

/// Added to the mean square in every RMSNorm.
pub const NORM_EPS: f32 = 1e-5;
/// The decay rate |A| of a Mamba-3 layer is at least this.
pub const A_FLOOR: f32 = 1e-4;
/// Embeddings are divided by their length, or by this if that is longer.
pub const NORMALIZE_EPS: f32 = 1e-6;
/// Added to the variance in the LayerNorms of the X-Encoder.
pub const X_ENCODER_LAYER_NORM_EPS: f32 = 1e-6;
/// Added to the variance in the LayerNorm of the confusion probe.
pub const CONFUSION_PROBE_LAYER_NORM_EPS: f32 = 1e-5;

/// Characters in the name of a tool.
pub(crate) const LONGEST_TOOL_NAME: usize = 64;
/// The tool that is built in.
pub(crate) const MEMORY_TOOL: &str = "memory";

/// No count in a configuration may be larger: products of four of them stay far below 2^64.
const MAX_COUNT: usize = 1 << 24;
const MAX_LAYERS: usize = 1 << 10;
/// Pixels in the side of an image, and patches in the whole of it: memory is taken for both, whatever the weights are.
const MAX_SIDE: usize = 1 << 13;
const MAX_PATCHES: usize = 1 << 16;
/// Tokens in a text: rows of every buffer between two layers.
const MAX_TOKENS: usize = 1 << 16;
/// Numbers between two layers for all patches of one image: they take memory, however small the weights are.
const MAX_ACTIVATIONS: usize = 1 << 26;

/// Which vision transformer the X-Encoder is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum VisionKind {
    /// V-JEPA 2, arXiv 2506.09985.
    #[default]
    #[serde(rename = "vjepa2")]
    Vjepa2,
    /// V-JEPA 2.1, arXiv 2603.14482: a branch for images, a vector added to every token, other rotary angles.
    #[serde(rename = "vjepa2.1")]
    Vjepa21,
}

/// The X-Encoder, a V-JEPA 2 or 2.1 vision transformer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VisionConfig {
    /// Which of the two; V-JEPA 2 where a file is from before there was a choice.
    #[serde(default)]
    pub kind: VisionKind,
    /// Width of a visual token.
    pub hidden_size: usize,
    /// Layers.
    pub depth: usize,
    /// Attention heads.
    pub heads: usize,
    /// Width of the perceptron / hidden_size.
    pub mlp_ratio: f64,
    /// Side of the images it sees, in pixels.
    pub image_size: usize,
    /// Side of a patch, in pixels.
    pub patch_size: usize,
    /// Frames in a token.
    pub tubelet_size: usize,
    /// Frames of the clips it was trained on.
    pub frames: usize,
    /// Whether its weights come from a file, rather than from chance.
    pub pretrained: bool,
}

impl VisionConfig {
    /// Width of the perceptron's hidden layer.
    pub fn mlp_size(&self) -> usize {
        // checked to be positive and small when the configuration was read
        (self.hidden_size as f64 * self.mlp_ratio) as usize
    }

    pub(crate) fn check(&self, name: &str) -> Result<(), String> {
        let sizes = [
            ("hidden_size", self.hidden_size),
            ("depth", self.depth),
            ("heads", self.heads),
            ("image_size", self.image_size),
            ("patch_size", self.patch_size),
            ("tubelet_size", self.tubelet_size),
            ("frames", self.frames),
        ];
        counts(&format!("{name}."), &sizes)?;
        if self.depth > MAX_LAYERS {
            return Err(format!("{name}.depth: {} is more than {MAX_LAYERS}", self.depth));
        }
        if !(self.mlp_ratio > 0.0 && self.mlp_ratio <= 1024.0) {
            return Err(format!("{name}.mlp_ratio: {} must be above 0 and at most 1024", self.mlp_ratio));
        }
        count(&format!("{name}: hidden_size * mlp_ratio"), self.mlp_size())?;
        if !self.hidden_size.is_multiple_of(self.heads) {
            return Err(format!("{name}.heads: {} does not divide hidden_size {}", self.heads, self.hidden_size));
        }
        if !self.image_size.is_multiple_of(self.patch_size) {
            return Err(format!(
                "{name}.patch_size: {} does not divide image_size {}",
                self.patch_size, self.image_size
            ));
        }
        if self.image_size > MAX_SIDE || self.patches() > MAX_PATCHES {
            return Err(format!(
                "{name}.image_size: {} with patches of {}: at most {MAX_SIDE} pixels and {MAX_PATCHES} patches",
                self.image_size, self.patch_size
            ));
        }
        let activations = self.patches().saturating_mul(self.mlp_size().max(self.hidden_size));
        at_most(&format!("{name}: patches of an image * hidden_size * mlp_ratio"), activations, MAX_ACTIVATIONS)
    }

    /// Patches in the side of an image.
    pub(crate) fn side(&self) -> usize {
        self.image_size / self.patch_size
    }

    /// Patches of one image.
    fn patches(&self) -> usize {
        self.side().pow(2)
    }
}

/// The gates on the predictor's residual stream.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AngnConfig {
    /// Whether there are any.
    pub enabled: bool,
    /// Weight of their penalty in training; no meaning here.
    pub sparsity_weight: f64,
    /// Mean activity under which the context should be reset.
    pub context_reset_threshold: f64,
    /// How much of the moving average of activity stays at each pass.
    pub ema_decay: f64,
}

/// What an episode is found by beside its question.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EpisodeKey {
    /// The pooled state; so it was before there was a choice.
    #[default]
    State,
    /// What the picture looks like; see [`picture_key`](crate::episodes::picture_key).
    Picture,
}

/// The confusion monitor, the state injector, what judges and finds knowledge, and the selector of tools.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RecursionConfig {
    /// Width of the hidden layers: of the confusion probe and of the other parts that have one.
    pub hidden_dim: usize,
    /// Length K of a knowledge vector; `None`: `embed_dim`.
    pub knowledge_dim: Option<usize>,
    /// How much of the smoothed confusion score stays at each turn.
    pub ema_decay: f64,
    /// Whether the monitor is told how improbable the Y-Decoder found its own answer, beside the pooled state.
    #[serde(default, skip_serializing_if = "is_default")]
    pub hears_answer: bool,
    /// Whether what knowledge adds to the pooled state depends on that state, and so on what was asked.
    #[serde(default, skip_serializing_if = "is_default")]
    pub injector_sees_state: bool,
    /// Width R in which questions find the texts of a memory; 0: the predicted embedding looks for them.
    #[serde(default, skip_serializing_if = "is_default")]
    pub retriever_dim: usize,
    /// Whether a memory may hold episodes, pictures and questions seen before with their answers, beside texts.
    #[serde(default, skip_serializing_if = "is_default")]
    pub episodes: bool,
    /// What an episode is found by beside its question.
    #[serde(default, skip_serializing_if = "is_default")]
    pub episode_key: EpisodeKey,
    /// Whether it is judged if what the model was told answers the question, so that it can stay confused.
    #[serde(default, skip_serializing_if = "is_default")]
    pub weighs_knowledge: bool,
    /// Names of the T tools that a selector chooses among; none: there is no selector.
    #[serde(default, skip_serializing_if = "is_default")]
    pub tools: Vec<String>,
}

impl RecursionConfig {
    fn check_tools(&self) -> Result<(), String> {
        if let Some(name) = self.tools.iter().find(|name| !(1..=LONGEST_TOOL_NAME).contains(&name.chars().count())) {
            return Err(format!("recursion.tools: {name:?}: a name has 1 to {LONGEST_TOOL_NAME} characters"));
        }
        if distinct(&self.tools).len() < self.tools.len() {
            return Err(format!("recursion.tools: a name is there twice: {}", self.tools.join(", ")));
        }
        Ok(())
    }
}

/// Everything that decides the shape and the meaning of the weights.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Mamba3JepaConfig {
    /// Name of the size it started from.
    pub preset: String,
    /// The X-Encoder.
    pub vision: VisionConfig,
    /// The predictor.
    pub predictor: PredictorConfig,
    /// The Y-Encoder's backbone.
    pub y_encoder: BackboneConfig,
    /// The Y-Decoder's backbone.
    pub y_decoder: BackboneConfig,
    /// Prefix tokens the Y-Decoder reads from an embedding.
    pub prefix_tokens: usize,
    /// Embedding width E.
    pub embed_dim: usize,
    /// Tokens V in the vocabulary.
    pub vocab_size: usize,
    /// Longest question in tokens, bos and eos included.
    pub max_query_tokens: usize,
    /// Longest other text in tokens, bos and eos included.
    pub max_answer_tokens: usize,
    /// What an image without a question is asked.
    pub query_prompt: String,
    /// The gates.
    pub angn: AngnConfig,
    /// The confusion monitor, the state injector, what judges and finds knowledge, and the selector of tools.
    pub recursion: RecursionConfig,
}

impl Mamba3JepaConfig {
    /// Visual tokens of one image as the predictor reads them.
    pub fn visual_tokens(&self) -> usize {
        (self.vision.side() / self.predictor.visual_pool).pow(2)
    }

    /// Length K of a knowledge vector.
    pub fn knowledge_dim(&self) -> usize {
        self.recursion.knowledge_dim.unwrap_or(self.embed_dim)
    }

    /// Length S of what an episode is found by beside its question.
    pub fn episode_dim(&self) -> usize {
        match self.recursion.episode_key {
            EpisodeKey::State => self.predictor.d_model(),
            EpisodeKey::Picture => crate::episodes::PICTURE_CELLS * self.vision.hidden_size,
        }
    }

    /// Reads and checks the JSON of a header or of `config.json`'s `model`.
    ///
    /// # Errors
    /// [`LoadError::Config`] for an unknown or missing key, a wrong type, or sizes that do not fit together; it names
    /// `path` and the key.
    pub fn from_json(json: &str, path: &Path) -> Result<Self, LoadError> {
        let invalid = |reason: String| LoadError::Config { path: path.to_path_buf(), reason };
        let config: Self = serde_json::from_str(json).map_err(|error| invalid(json::reason(json, &error)))?;
        config.check().map_err(invalid)?;
        Ok(config)
    }

    pub(crate) fn check(&self) -> Result<(), String> {
        self.vision.check("vision")?;
        self.predictor.check()?;
        self.y_encoder.check("y_encoder")?;
        self.y_decoder.check("y_decoder")?;
        self.check_pool()?;
        let visual_tokens = self.visual_tokens().saturating_mul(self.predictor.order.count(Part::Visual));
        let activations = visual_tokens.saturating_mul(self.predictor.layer.projected());
        at_most("vision, predictor: visual tokens of a sample * outputs of in_proj", activations, MAX_ACTIVATIONS)?;
        let sizes = [
            ("prefix_tokens", self.prefix_tokens),
            ("embed_dim", self.embed_dim),
            ("vocab_size", self.vocab_size),
            ("recursion.hidden_dim", self.recursion.hidden_dim),
            ("recursion.knowledge_dim", self.knowledge_dim()),
        ];
        counts("", &sizes)?;
        if self.recursion.retriever_dim > 0 {
            count("recursion.retriever_dim", self.recursion.retriever_dim)?;
        }
        self.recursion.check_tools()?;
        for (key, value) in [("max_query_tokens", self.max_query_tokens), ("max_answer_tokens", self.max_answer_tokens)]
        {
            at_most(key, value, MAX_TOKENS)?;
            if value < 2 {
                return Err(format!("{key}: {value} leaves no room for bos and eos"));
            }
        }
        if strip(&self.query_prompt).is_empty() {
            return Err("query_prompt: it is empty".into());
        }
        for (key, value) in [
            ("angn.context_reset_threshold", self.angn.context_reset_threshold),
            ("angn.ema_decay", self.angn.ema_decay),
            ("recursion.ema_decay", self.recursion.ema_decay),
        ] {
            if !(0.0..=1.0).contains(&value) {
                return Err(format!("{key}: {value} must be in [0, 1]"));
            }
        }
        Ok(())
    }

    fn check_pool(&self) -> Result<(), String> {
        let (side, pool) = (self.vision.side(), self.predictor.visual_pool);
        if pool == 0 || !side.is_multiple_of(pool) {
            return Err(format!(
                "predictor.visual_pool: {pool} does not divide the {side} x {side} visual tokens of a picture"
            ));
        }
        Ok(())
    }
}

/// Whether a choice that came later is what there was before there was a choice: then files leave it out.
fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

/// Each of `sizes` is a count; their keys stand after `prefix`.
fn counts(prefix: &str, sizes: &[(&str, usize)]) -> Result<(), String> {
    sizes.iter().try_for_each(|(key, value)| count(&format!("{prefix}{key}"), *value))
}

fn count(key: &str, value: usize) -> Result<(), String> {
    at_most(key, value, MAX_COUNT)
}

fn at_most(key: &str, value: usize, limit: usize) -> Result<(), String> {
    if value == 0 || value > limit {
        return Err(format!("{key}: {value} must be between 1 and {limit}"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::testing::TinyModel;

    /// What is said of the tiny model's configuration with these values changed.
    fn check(changes: &[(&str, Value)]) -> Result<(), String> {
        let model = changes.iter().fold(TinyModel::new(), |model, (key, value)| model.set(key, value.clone()));
        let read = Mamba3JepaConfig::from_json(&model.config.to_string(), Path::new("config.json"));
        read.map(|_| ()).map_err(|error| error.to_string())
    }

    #[test]
    fn sizes_that_take_memory_without_weights_are_bounded() {
        let layer = |d_state: usize, inner: usize| {
            let sizes = [("d_model", 1), ("d_state", d_state), ("expand", inner), ("headdim", inner), ("ngroups", 1)];
            sizes.map(|(key, value)| (format!("/predictor/layer/{key}"), json!(value)))
        };
        let check_layer = |d_state, inner| {
            let changes = layer(d_state, inner);
            check(&changes.each_ref().map(|(key, value)| (key.as_str(), value.clone())))
        };
        assert_eq!(check_layer(1 << 12, 1 << 12), Ok(()));
        for (d_state, inner) in [(1 << 13, 1 << 12), (1 << 14, 1 << 14), (1 << 20, 1 << 20)] {
            let message = check_layer(d_state, inner).unwrap_err();
            assert!(message.contains("predictor.layer: expand * d_model * d_state: "), "{message}");
        }
        for key in ["max_query_tokens", "max_answer_tokens"] {
            let path = format!("/{key}");
            assert_eq!(check(&[(&path, json!(1 << 16))]), Ok(()));
            let message = check(&[(&path, json!((1 << 16) + 1))]).unwrap_err();
            assert!(message.contains(&format!("{key}: 65537 must be between 1 and 65536")), "{message}");
        }
        let many = [("/vision/image_size", json!(256)), ("/vision/patch_size", json!(1))];
        let wide = [("/predictor/layer/expand", json!(64))];
        assert_eq!(check(&many), Ok(()));
        assert_eq!(check(&wide), Ok(()));
        let message = check(&[many.as_slice(), &wide].concat()).unwrap_err();
        assert!(message.contains("visual tokens of a sample * outputs of in_proj"), "{message}");
        let wide = [("/vision/mlp_ratio", json!(1024.0))];
        assert_eq!(check(&wide), Ok(()));
        let message = check(&[many.as_slice(), &wide].concat()).unwrap_err();
        assert!(message.contains("vision: patches of an image * hidden_size"), "{message}");
    }

    #[test]
    fn visual_tokens_are_pooled_evenly_or_refused() {
        let read = |side: usize, pool: usize| {
            let model = TinyModel::new().set("/vision/image_size", side).set("/vision/patch_size", 1);
            let model = model.predictor("visual_pool", pool);
            let read = Mamba3JepaConfig::from_json(&model.config.to_string(), Path::new("config.json"));
            read.map(|config| config.visual_tokens()).map_err(|error| error.to_string())
        };
        assert_eq!([read(12, 1), read(12, 2), read(12, 12)], [Ok(144), Ok(36), Ok(1)]);
        for pool in [0, 5, 24] {
            let said = read(12, pool).unwrap_err();
            assert!(said.contains(&format!("predictor.visual_pool: {pool} does not divide the 12 x 12")), "{said}");
        }
    }

    #[test]
    fn what_the_recursion_may_have_is_left_out_where_it_has_it_not() {
        let read = |model: &TinyModel| {
            Mamba3JepaConfig::from_json(&model.config.to_string(), Path::new("config.json")).unwrap()
        };
        let plain = read(&TinyModel::new());
        assert!(
            !plain.recursion.injector_sees_state && plain.recursion.retriever_dim == 0 && !plain.recursion.episodes
        );
        assert!(!plain.recursion.weighs_knowledge && plain.recursion.tools.is_empty());
        assert_eq!(serde_json::to_value(&plain.recursion).unwrap(), TinyModel::new().config["recursion"]);
        let whole = TinyModel::new()
            .recursion("injector_sees_state", true)
            .recursion("retriever_dim", 9)
            .recursion("episodes", true)
            .recursion("episode_key", "picture")
            .recursion("weighs_knowledge", true)
            .recursion("tools", json!(["memory", "größer"]));
        assert_eq!(serde_json::to_value(read(&whole).recursion).unwrap(), whole.config["recursion"]);
        let wide = TinyModel::new().recursion("retriever_dim", MAX_COUNT + 1);
        let error = Mamba3JepaConfig::from_json(&wide.config.to_string(), Path::new("config.json")).unwrap_err();
        assert!(error.to_string().contains("recursion.retriever_dim: 16777217 must be between"), "{error}");
    }

    #[test]
    fn tools_have_different_names_of_1_to_64_characters() {
        let check = |tools: Value| {
            let model = TinyModel::new().recursion("tools", tools);
            let read = Mamba3JepaConfig::from_json(&model.config.to_string(), Path::new("config.json"));
            read.map(|read| read.recursion.tools.len()).map_err(|error| error.to_string())
        };
        assert_eq!(check(json!([])), Ok(0));
        assert_eq!(check(json!(["a", "ü".repeat(64)])), Ok(2));
        for (tools, message) in [
            (json!([""]), r#"recursion.tools: "": a name has 1 to 64 characters"#),
            (json!(["a".repeat(65)]), "a name has 1 to 64 characters"),
            (json!(["a", "b", "a"]), "recursion.tools: a name is there twice: a, b, a"),
            (json!(["a", 1]), "recursion.tools: invalid type: integer `1`, expected a string"),
        ] {
            let said = check(tools).unwrap_err();
            assert!(said.contains(message), "{said}");
        }
    }

    #[test]
    fn a_prompt_of_nothing_but_space_is_none() {
        for blank in ["", " ", "\u{1c}\u{1f}"] {
            assert!(check(&[("/query_prompt", json!(blank))]).unwrap_err().contains("query_prompt: it is empty"));
        }
    }
}
