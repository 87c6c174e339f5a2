//! One layer of the encoder: attention and a perceptron, each added to the residual stream.

use rayon::prelude::*;

use super::attention::attend;
use super::rotary::Rotary;
use super::source::Source;
use crate::config::{VisionConfig, X_ENCODER_LAYER_NORM_EPS};
use crate::error::LoadError;
use crate::linalg::math::gelu;
use crate::linalg::{Linear, norm};

/// Rows that one task works on.
const ROWS: usize = 8;
/// Numbers in a block of rows: 1,024 tokens of ViT-L's perceptron. Few in tests, so that they see many blocks.
const BLOCK: usize = if cfg!(test) { 1 << 10 } else { 1 << 22 };

/// (x - mean) / √(variance + eps) weight + bias.
pub(super) struct LayerNorm {
    weight: Vec<f32>,
    bias: Vec<f32>,
}

impl LayerNorm {
    pub(super) fn load(source: &mut impl Source, name: &str, width: usize) -> Result<LayerNorm, LoadError> {
        let weight = source.vector(&format!("{name}.weight"), width)?;
        let bias = source.vector(&format!("{name}.bias"), width)?;
        Ok(LayerNorm { weight, bias })
    }

    /// out (N, D) = norm of x (N, D).
    pub(super) fn apply(&self, x: &[f32], out: &mut [f32]) {
        let len = ROWS * self.weight.len();
        out.par_chunks_mut(len).zip(x.par_chunks(len)).for_each(|(out, x)| self.rows(x, out));
    }

    /// x (N, D) += branch (N, D) + bias (D); out (N, D) = norm of x.
    pub(super) fn add_and_apply(&self, x: &mut [f32], branch: &[f32], bias: &[f32], out: &mut [f32]) {
        let len = ROWS * self.weight.len();
        let chunks = x.par_chunks_mut(len).zip(branch.par_chunks(len)).zip(out.par_chunks_mut(len));
        chunks.for_each(|((x, branch), out)| {
            for (x, branch) in x.chunks_exact_mut(bias.len()).zip(branch.chunks_exact(bias.len())) {
                for ((x, branch), bias) in x.iter_mut().zip(branch).zip(bias) {
                    *x += branch + bias;
                }
            }
            self.rows(x, out);
        });
    }

    fn rows(&self, x: &[f32], out: &mut [f32]) {
        norm::layer_norm(x, &self.weight, &self.bias, X_ENCODER_LAYER_NORM_EPS, out);
    }
}

/// The weights of a layer.
pub(super) struct Layer {
    heads: usize,
    pub(super) norm1: LayerNorm,
    query: Linear,
    key: Linear,
    value: Linear,
    projection: Linear,
    norm2: LayerNorm,
    fc1: Linear,
    fc2: Linear,
}

/// What all layers of a pass write to: N tokens, width D, perceptron M.
pub(super) struct Scratch {
    /// (N, D) each.
    pub(super) normed: Vec<f32>,
    query: Vec<f32>,
    key: Vec<f32>,
    value: Vec<f32>,
    branch: Vec<f32>,
    /// (n, M) for a block of n tokens.
    wide: Vec<f32>,
}

impl Scratch {
    pub(super) fn new(tokens: usize, width: usize, wide: usize) -> Scratch {
        let narrow = || vec![0.0; tokens * width];
        Scratch {
            normed: narrow(),
            query: narrow(),
            key: narrow(),
            value: narrow(),
            branch: narrow(),
            wide: vec![0.0; block_rows(tokens, wide) * wide],
        }
    }
}

impl Layer {
    pub(super) fn load(source: &mut impl Source, index: usize, config: &VisionConfig) -> Result<Layer, LoadError> {
        let (width, wide) = (config.hidden_size, config.mlp_size());
        let name = |part: &str| format!("encoder.layer.{index}.{part}");
        Ok(Layer {
            heads: config.heads,
            norm1: LayerNorm::load(source, &name("norm1"), width)?,
            query: source.linear(&name("attention.query"), width, width)?,
            key: source.linear(&name("attention.key"), width, width)?,
            value: source.linear(&name("attention.value"), width, width)?,
            projection: source.linear(&name("attention.proj"), width, width)?,
            norm2: LayerNorm::load(source, &name("norm2"), width)?,
            fc1: source.linear(&name("mlp.fc1"), wide, width)?,
            fc2: source.linear(&name("mlp.fc2"), width, wide)?,
        })
    }

    /// One pass: `scratch.normed` holds `norm1` of x (N, D) before, and `next` of the new x after it.
    pub(super) fn forward(&self, x: &mut [f32], rotary: &Rotary, scratch: &mut Scratch, next: &LayerNorm) {
        let Scratch { normed, query, key, value, branch, wide } = scratch;
        self.query.weight.apply(normed, query);
        rotary.add_and_rotate(query, &self.query.bias);
        self.key.weight.apply(normed, key);
        rotary.add_and_rotate(key, &self.key.bias);
        self.value.apply(normed, value);
        let width = self.projection.bias.len();
        attend(query, key, value, self.heads, width / self.heads, branch);
        // The queries are done with: their place takes the heads' results side by side.
        join_heads(branch, self.heads, width, query);
        self.projection.weight.apply(query, branch);
        self.norm2.add_and_apply(x, branch, &self.projection.bias, normed);

        self.perceptron(normed, wide, branch);
        next.add_and_apply(x, branch, &self.fc2.bias, normed);
    }

    /// out (N, D) = fc2(gelu(fc1(x (N, D)))) without fc2's bias; `wide` (n, M) holds what is between for a block of tokens.
    fn perceptron(&self, x: &[f32], wide: &mut [f32], out: &mut [f32]) {
        let (width, wide_width) = (self.fc2.bias.len(), self.fc1.bias.len());
        let block = wide.len() / wide_width * width;
        for (x, out) in x.chunks(block).zip(out.chunks_mut(block)) {
            let wide = &mut wide[..x.len() / width * wide_width];
            self.fc1.weight.apply(x, wide);
            add_and_gelu(wide, &self.fc1.bias);
            self.fc2.weight.apply(wide, out);
        }
    }
}

/// Rows of `width` numbers that are worked on at a time, of `rows` in all: what is wider than a token is never held for
/// more tokens than that.
pub(super) fn block_rows(rows: usize, width: usize) -> usize {
    (BLOCK / width).clamp(1, rows)
}

/// out (N, H P) = x (H, N, P) with the heads of a token side by side; `width` is H P.
fn join_heads(x: &[f32], heads: usize, width: usize, out: &mut [f32]) {
    let head_size = width / heads;
    let tokens = x.len() / width;
    out.par_chunks_mut(ROWS * width).enumerate().for_each(|(block, rows)| {
        for (i, row) in rows.chunks_exact_mut(width).enumerate() {
            for (head, out) in row.chunks_exact_mut(head_size).enumerate() {
                let start = (head * tokens + block * ROWS + i) * head_size;
                out.copy_from_slice(&x[start..start + head_size]);
            }
        }
    });
}

/// x (N, M) = gelu(x + bias (M)).
fn add_and_gelu(x: &mut [f32], bias: &[f32]) {
    x.par_chunks_mut(bias.len()).for_each(|row| {
        for (x, bias) in row.iter_mut().zip(bias) {
            *x += bias;
        }
        gelu(row);
    });
}
