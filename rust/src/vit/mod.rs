//! The X-Encoder: the vision transformer of V-JEPA 2 (Assran et al. 2025, arXiv 2506.09985), as the class `VJEPA2Model`
//! of `transformers` computes it, or of V-JEPA 2.1 (Mur-Labadia et al. 2026, arXiv 2603.14482).
//!
//! Letters: T frames, H and W height and width in pixels, N visual tokens, D hidden size, P head size.

mod attention;
mod layer;
mod pixels;
mod rotary;
mod source;
mod transformers;

#[cfg(test)]
mod reference;
#[cfg(test)]
mod tests;

use std::path::Path;

use crate::config::{VisionConfig, VisionKind};
use crate::error::{Error, LoadError};
use crate::linalg::Linear;
use crate::loader::{Fields, Weights};

use layer::{Layer, LayerNorm, Scratch, block_rows};
pub use pixels::PixelShape;
use pixels::{CHANNELS, Grid, cut_patches, patch_len};
use rotary::Rotary;
use source::Source;
use transformers::Folder;

/// A frozen V-JEPA 2 or 2.1 encoder: pixels to visual tokens.
pub struct VisionEncoder {
    config: VisionConfig,
    patches: Linear,
    /// V-JEPA 2.1's branch for images.
    image_patches: Option<Linear>,
    layers: Vec<Layer>,
    norm: LayerNorm,
}

impl VisionEncoder {
    /// The encoder of an exported `x_encoder.safetensors`.
    ///
    /// # Errors
    /// [`LoadError`] if the file holds another component, or a tensor is missing, not expected, or of another shape or
    /// type than its header's configuration asks for.
    pub fn from_weights(weights: &Weights) -> Result<VisionEncoder, LoadError> {
        let (mut fields, config) = Fields::open(weights, "x_encoder")?;
        let encoder = Self::load(&mut fields, config.vision)?;
        fields.finish()?;
        Ok(encoder)
    }

    /// The encoder of a folder that `transformers` wrote for a `VJEPA2Model`: `config.json` and `model.safetensors`, or
    /// the latter in shards with `model.safetensors.index.json`. Weights of float64 become float32; V-JEPA 2's own
    /// predictor and a classifier are not read.
    ///
    /// ```no_run
    /// use kore_vljepa::vit::{PixelShape, VisionEncoder};
    ///
    /// # fn main() -> Result<(), kore_vljepa::Error> {
    /// let encoder = VisionEncoder::from_transformers_dir("vjepa2-vitl-fpc64-256")?;
    /// let pixels = vec![0.0; 3 * 256 * 256]; // normalised
    /// let tokens = encoder.encode(&pixels, PixelShape::Image { height: 256, width: 256 })?;
    /// assert_eq!(tokens.len(), 256 * encoder.config().hidden_size);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`LoadError`] if a file of it is missing or damaged, `config.json` describes another model, or a tensor is missing,
    /// not expected, or of another shape.
    pub fn from_transformers_dir(path: impl AsRef<Path>) -> Result<VisionEncoder, LoadError> {
        let (mut folder, config) = Folder::open(path.as_ref())?;
        let encoder = Self::load(&mut folder, config)?;
        folder.finish()?;
        Ok(encoder)
    }

    fn load(source: &mut impl Source, config: VisionConfig) -> Result<VisionEncoder, LoadError> {
        let width = config.hidden_size;
        let mut patches = load_patches(source, "patch_embeddings", &config, config.tubelet_size)?;
        let mut image_patches = None;
        if config.kind == VisionKind::Vjepa21 {
            let mut image = load_patches(source, "patch_embeddings_img", &config, 1)?;
            add_modality(source, "img_mod_embed", &mut image)?;
            add_modality(source, "video_mod_embed", &mut patches)?;
            image_patches = Some(image);
        }
        let layers = (0..config.depth).map(|i| Layer::load(source, i, &config)).collect::<Result<_, _>>()?;
        let norm = LayerNorm::load(source, "encoder.layernorm", width)?;
        Ok(VisionEncoder { config, patches, image_patches, layers, norm })
    }

    /// Its sizes.
    pub fn config(&self) -> &VisionConfig {
        &self.config
    }

    /// The visual tokens (N, D) of an image or a clip, with N = T / tubelet · H / patch · W / patch in the order time,
    /// row, column; one tubelet for an image, or one frame where there is a branch for images.
    ///
    /// `pixels`: normalised by ImageNet's mean and standard deviation, (3, H, W) or (T, 3, H, W). Memory grows linearly
    /// with N: some seven times that of the result. Runs on the current thread pool, with the same result on any number of
    /// threads.
    ///
    /// # Errors
    /// [`Error::Input`] if H or W is no multiple of the patch, T is none of the tubelet, or `pixels` has another length.
    pub fn encode(&self, pixels: &[f32], shape: PixelShape) -> Result<Vec<f32>, Error> {
        let config = &self.config;
        let grid = Grid::new(config, shape, pixels.len())?;
        let (tokens, width) = (grid.tokens(), config.hidden_size);
        let mut x = vec![0.0; tokens * width];
        self.embed_patches(pixels, shape, grid, &mut x);
        let rotary = Rotary::new(config, grid, width / config.heads);
        let mut scratch = Scratch::new(tokens, width, config.mlp_size());
        // Each layer leaves behind what the next one begins with, its own input normed; the last one leaves the result.
        let mut norms = self.layers.iter().map(|layer| &layer.norm1).chain([&self.norm]);
        if let Some(first) = norms.next() {
            first.apply(&x, &mut scratch.normed);
        }
        for (layer, next) in self.layers.iter().zip(norms) {
            layer.forward(&mut x, &rotary, &mut scratch, next);
        }
        Ok(scratch.normed)
    }

    /// x (N, D): what each patch of `pixels` becomes.
    fn embed_patches(&self, pixels: &[f32], shape: PixelShape, grid: Grid, x: &mut [f32]) {
        let len = patch_len(grid.tubelet, self.config.patch_size);
        let branch = self.image_patches.as_ref().filter(|_| grid.of_image_branch).unwrap_or(&self.patches);
        let block = block_rows(grid.tokens(), len);
        let mut patches = vec![0.0; block * len];
        for (index, x) in x.chunks_mut(block * self.config.hidden_size).enumerate() {
            let patches = &mut patches[..x.len() / self.config.hidden_size * len];
            cut_patches(&self.config, pixels, shape, grid, index * block, patches);
            branch.apply(patches, x);
        }
    }
}

/// The convolution `encoder.embeddings.{name}.proj` over patches of `tubelet` frames.
fn load_patches(
    source: &mut impl Source,
    name: &str,
    config: &VisionConfig,
    tubelet: usize,
) -> Result<Linear, LoadError> {
    let (width, patch) = (config.hidden_size, config.patch_size);
    let name = format!("encoder.embeddings.{name}.proj");
    let kernel = [width, CHANNELS, tubelet, patch, patch];
    Ok(Linear {
        weight: source.matrix(&format!("{name}.weight"), &kernel, width, patch_len(tubelet, patch))?,
        bias: source.vector(&format!("{name}.bias"), width)?,
    })
}

/// Adds what V-JEPA 2.1 adds to every token of an image or of a clip to the bias that every token gets.
fn add_modality(source: &mut impl Source, name: &str, patches: &mut Linear) -> Result<(), LoadError> {
    let modality = source.numbers(&format!("encoder.embeddings.{name}"), &[1, 1, patches.bias.len()])?;
    for (bias, modality) in patches.bias.iter_mut().zip(modality) {
        *bias += modality;
    }
    Ok(())
}
