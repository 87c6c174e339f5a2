//! The model's configuration, as `config.json` and every header carry it: strict, and checked when it is read.

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::error::LoadError;
use crate::json;
use crate::texts::strip;

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

/// How the decay rate is made from its projection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AActivation {
    /// 1 + v for v >= 0, 1 / (1 - v) below.
    HeavyTail,
    /// ln(1 + e^v), as mamba-ssm had it up to version 2.3.2.
    Softplus,
}

/// One Mamba-3 layer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Mamba3Config {
    /// Width D of input and output.
    pub d_model: usize,
    /// State size N per head.
    pub d_state: usize,
    /// Inner width / D.
    pub expand: usize,
    /// Head size P.
    pub headdim: usize,
    /// Groups G of heads that share B and C.
    pub ngroups: usize,
    /// Share of the state dimensions that rotate: 0.5 or 1.0.
    pub rope_fraction: f64,
    /// How the decay rate is made.
    pub a_activation: AActivation,
    /// Whether the layer has several ranks (multi-input multi-output).
    pub is_mimo: bool,
    /// Ranks R, where `is_mimo`.
    pub mimo_rank: usize,
    /// Whether the scan's output is normalised per head before the gate.
    pub is_outproj_norm: bool,
    /// Tokens per chunk in training; no meaning for the result.
    pub chunk_size: usize,
}

impl Mamba3Config {
    /// Inner width: H P.
    pub fn d_inner(&self) -> usize {
        self.expand * self.d_model
    }

    /// Heads H.
    pub fn nheads(&self) -> usize {
        self.d_inner() / self.headdim
    }

    /// Ranks R: 1 unless MIMO.
    pub fn rank(&self) -> usize {
        if self.is_mimo { self.mimo_rank } else { 1 }
    }

    /// Rotated pairs S.
    pub fn n_angles(&self) -> usize {
        // rope_fraction is 0.5 or 1.0
        if self.rope_fraction < 1.0 { self.d_state / 4 } else { self.d_state / 2 }
    }

    /// Outputs of `in_proj`: z, x, B, C, dd_dt, dd_A, trap, angle.
    pub fn projected(&self) -> usize {
        2 * self.d_inner() + 2 * self.rank() * self.ngroups * self.d_state + 3 * self.nheads() + self.n_angles()
    }

    fn check(&self, name: &str) -> Result<(), String> {
        let sizes = [
            ("d_model", self.d_model),
            ("d_state", self.d_state),
            ("expand", self.expand),
            ("headdim", self.headdim),
            ("ngroups", self.ngroups),
            ("mimo_rank", self.mimo_rank),
            ("chunk_size", self.chunk_size),
        ];
        counts(&format!("{name}.layer."), &sizes)?;
        count(&format!("{name}.layer: expand * d_model"), self.expand.saturating_mul(self.d_model))?;
        let per_state = self.rank().saturating_mul(self.ngroups).saturating_mul(self.d_state);
        count(&format!("{name}.layer: mimo_rank * ngroups * d_state"), per_state)?;
        // the state of one layer: it takes memory for every sequence, and no tensor of the file is as large
        let state = self.d_inner().saturating_mul(self.d_state);
        count(&format!("{name}.layer: expand * d_model * d_state"), state)?;
        if self.rope_fraction != 0.5 && self.rope_fraction != 1.0 {
            return Err(format!("{name}.layer.rope_fraction: {} must be 0.5 or 1.0", self.rope_fraction));
        }
        if !self.d_inner().is_multiple_of(self.headdim) {
            return Err(format!("{name}.layer.headdim: {} does not divide {}", self.headdim, self.d_inner()));
        }
        if !self.nheads().is_multiple_of(self.ngroups) {
            return Err(format!("{name}.layer.ngroups: {} does not divide {} heads", self.ngroups, self.nheads()));
        }
        if self.n_angles() == 0 {
            return Err(format!("{name}.layer.d_state: {} leaves no pair to rotate", self.d_state));
        }
        if self.is_mimo && !self.d_state.is_multiple_of(2) {
            return Err(format!("{name}.layer.d_state: MIMO needs an even one, not {}", self.d_state));
        }
        Ok(())
    }
}

/// The hidden width of an MLP is a multiple of this.
const MLP_MULTIPLE: usize = 128;

/// A stack of equal Mamba-3 layers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BackboneConfig {
    /// How many.
    pub n_layers: usize,
    /// Each of them.
    pub layer: Mamba3Config,
    /// Hidden width of the gated MLP behind each layer, before it is rounded up; 0, and left out of files: there is none.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub mlp_dim: usize,
}

/// serde passes a reference.
fn is_zero(value: &usize) -> bool {
    *value == 0
}

impl BackboneConfig {
    /// Width D of the residual stream.
    pub fn d_model(&self) -> usize {
        self.layer.d_model
    }

    /// Hidden width of the MLPs: `mlp_dim` rounded up to a multiple of 128.
    pub fn mlp_width(&self) -> usize {
        self.mlp_dim.next_multiple_of(MLP_MULTIPLE)
    }

    fn check(&self, name: &str) -> Result<(), String> {
        count(&format!("{name}.n_layers"), self.n_layers)?;
        if self.mlp_dim > 0 {
            count(&format!("{name}.mlp_dim"), self.mlp_dim)?;
        }
        if self.n_layers > MAX_LAYERS {
            return Err(format!("{name}.n_layers: {} is more than {MAX_LAYERS}", self.n_layers));
        }
        self.layer.check(name)
    }
}

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

    /// Patches of one image.
    fn patches(&self) -> usize {
        (self.image_size / self.patch_size).pow(2)
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

/// The confusion monitor and the state injector.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RecursionConfig {
    /// Width of the confusion probe's hidden layer.
    pub hidden_dim: usize,
    /// Length K of a knowledge vector; `None`: `embed_dim`.
    pub knowledge_dim: Option<usize>,
    /// How much of the smoothed confusion score stays at each turn.
    pub ema_decay: f64,
}

/// Everything that decides the shape and the meaning of the weights.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Mamba3JepaConfig {
    /// Name of the size it started from.
    pub preset: String,
    /// The X-Encoder.
    pub vision: VisionConfig,
    /// The predictor's backbone.
    pub predictor: BackboneConfig,
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
    /// The confusion monitor and the state injector.
    pub recursion: RecursionConfig,
}

impl Mamba3JepaConfig {
    /// Length K of a knowledge vector.
    pub fn knowledge_dim(&self) -> usize {
        self.recursion.knowledge_dim.unwrap_or(self.embed_dim)
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
        self.predictor.check("predictor")?;
        self.y_encoder.check("y_encoder")?;
        self.y_decoder.check("y_decoder")?;
        let activations = self.vision.patches().saturating_mul(self.predictor.layer.projected());
        at_most("vision, predictor.layer: patches of an image * outputs of in_proj", activations, MAX_ACTIVATIONS)?;
        let sizes = [
            ("prefix_tokens", self.prefix_tokens),
            ("embed_dim", self.embed_dim),
            ("vocab_size", self.vocab_size),
            ("recursion.hidden_dim", self.recursion.hidden_dim),
            ("recursion.knowledge_dim", self.knowledge_dim()),
        ];
        counts("", &sizes)?;
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
        assert!(message.contains("patches of an image * outputs of in_proj"), "{message}");
        let wide = [("/vision/mlp_ratio", json!(1024.0))];
        assert_eq!(check(&wide), Ok(()));
        let message = check(&[many.as_slice(), &wide].concat()).unwrap_err();
        assert!(message.contains("vision: patches of an image * hidden_size"), "{message}");
    }

    #[test]
    fn a_prompt_of_nothing_but_space_is_none() {
        for blank in ["", " ", "\u{1c}\u{1f}"] {
            assert!(check(&[("/query_prompt", json!(blank))]).unwrap_err().contains("query_prompt: it is empty"));
        }
    }
}
