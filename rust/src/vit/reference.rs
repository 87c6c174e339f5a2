//! The encoder once more, in f64, one plain loop after the other: what the tests trust. It follows the text of
//! `modeling_vjepa2.py` in `transformers`, and of WEIGHT_MAPPING.md for V-JEPA 2.1, and shares nothing with the code it
//! checks.

use std::collections::BTreeMap;

use crate::config::{VisionConfig, VisionKind};

/// An encoder: its sizes, and its tensors by `transformers`' names.
pub(super) struct Reference {
    pub(super) config: VisionConfig,
    pub(super) tensors: BTreeMap<String, Vec<f64>>,
}

impl Reference {
    /// Tokens (N, D) of a clip (T, 3, H, W).
    pub(super) fn encode(&self, clip: &[f64], frames: usize, height: usize, width: usize) -> Vec<f64> {
        let patch = self.config.patch_size;
        let (name, modality, tubelet) = match self.config.kind {
            VisionKind::Vjepa2 => ("patch_embeddings", None, self.config.tubelet_size),
            VisionKind::Vjepa21 if frames == 1 => ("patch_embeddings_img", Some("img_mod_embed"), 1),
            VisionKind::Vjepa21 => ("patch_embeddings", Some("video_mod_embed"), self.config.tubelet_size),
        };
        let grid = [frames / tubelet, height / patch, width / patch];
        let mut x = self.embed_patches(clip, grid, name, tubelet);
        if let Some(modality) = modality {
            let modality = self.tensor(&format!("encoder.embeddings.{modality}"));
            x.chunks_exact_mut(modality.len()).for_each(|token| add(token, modality));
        }
        for i in 0..self.config.depth {
            let layer = format!("encoder.layer.{i}");
            let attended = self.attention(&self.layer_norm(&x, &format!("{layer}.norm1")), &layer, grid);
            add(&mut x, &attended);
            let mut wide = self.linear(&self.layer_norm(&x, &format!("{layer}.norm2")), &format!("{layer}.mlp.fc1"));
            for x in &mut wide {
                *x *= 0.5 * (1.0 + erf(*x / 2.0_f64.sqrt()));
            }
            add(&mut x, &self.linear(&wide, &format!("{layer}.mlp.fc2")));
        }
        self.layer_norm(&x, "encoder.layernorm")
    }

    fn tensor(&self, name: &str) -> &[f64] {
        &self.tensors[name]
    }

    /// A convolution whose stride is its kernel.
    fn embed_patches(&self, clip: &[f64], grid: [usize; 3], name: &str, tubelet: usize) -> Vec<f64> {
        let (patch, [_, rows, columns]) = (self.config.patch_size, grid);
        let (height, width) = (rows * patch, columns * patch);
        let kernel = self.tensor(&format!("encoder.embeddings.{name}.proj.weight"));
        let bias = self.tensor(&format!("encoder.embeddings.{name}.proj.bias"));
        let mut out = Vec::new();
        for (t, r, c) in positions(grid) {
            for (d, bias) in bias.iter().enumerate() {
                let mut sum = *bias;
                for channel in 0..3 {
                    for dt in 0..tubelet {
                        for dy in 0..patch {
                            for dx in 0..patch {
                                let weight = (((d * 3 + channel) * tubelet + dt) * patch + dy) * patch + dx;
                                let (frame, y, x) = (t * tubelet + dt, r * patch + dy, c * patch + dx);
                                sum += kernel[weight] * clip[((frame * 3 + channel) * height + y) * width + x];
                            }
                        }
                    }
                }
                out.push(sum);
            }
        }
        out
    }

    fn attention(&self, x: &[f64], layer: &str, grid: [usize; 3]) -> Vec<f64> {
        let width = self.config.hidden_size;
        let size = width / self.config.heads;
        let tokens = x.len() / width;
        let mut query = self.linear(x, &format!("{layer}.attention.query"));
        let mut key = self.linear(x, &format!("{layer}.attention.key"));
        let value = self.linear(x, &format!("{layer}.attention.value"));
        for x in [&mut query, &mut key] {
            for (row, (t, r, c)) in x.chunks_exact_mut(width).zip(positions(grid)) {
                for head in row.chunks_exact_mut(size) {
                    let part = 2 * ((size / 3) / 2);
                    for (axis, position) in [t, r, c].into_iter().enumerate() {
                        let part = &mut head[axis * part..(axis + 1) * part];
                        match self.config.kind {
                            VisionKind::Vjepa2 => rotate(part, position),
                            VisionKind::Vjepa21 => rotate_pairs(part, self.stretched(position, axis, grid)),
                        }
                    }
                }
            }
        }
        let mut context = vec![0.0; x.len()];
        for head in 0..self.config.heads {
            for n in 0..tokens {
                let at = |x: &[f64], token: usize, p: usize| x[token * width + head * size + p];
                let scores: Vec<f64> = (0..tokens)
                    .map(|m| (0..size).map(|p| at(&query, n, p) * at(&key, m, p)).sum::<f64>() / (size as f64).sqrt())
                    .collect();
                let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let weights: Vec<f64> = scores.iter().map(|score| (score - max).exp()).collect();
                let sum: f64 = weights.iter().sum();
                for p in 0..size {
                    context[n * width + head * size + p] =
                        (0..tokens).map(|m| weights[m] / sum * at(&value, m, p)).sum();
                }
            }
        }
        self.linear(&context, &format!("{layer}.attention.proj"))
    }

    /// Where V-JEPA 2.1 sees a row or a column: the last where that of a picture of 256 pixels is.
    fn stretched(&self, position: usize, axis: usize, grid: [usize; 3]) -> f64 {
        if axis == 0 || grid[axis] == 1 {
            return position as f64;
        }
        position as f64 * ((256 / self.config.patch_size) as f64 - 1.0) / (grid[axis] as f64 - 1.0)
    }

    fn linear(&self, x: &[f64], name: &str) -> Vec<f64> {
        let (weight, bias) = (self.tensor(&format!("{name}.weight")), self.tensor(&format!("{name}.bias")));
        let inputs = weight.len() / bias.len();
        let mut out = Vec::new();
        for x in x.chunks_exact(inputs) {
            for (weight, bias) in weight.chunks_exact(inputs).zip(bias) {
                out.push(bias + x.iter().zip(weight).map(|(x, weight)| x * weight).sum::<f64>());
            }
        }
        out
    }

    fn layer_norm(&self, x: &[f64], name: &str) -> Vec<f64> {
        let (weight, bias) = (self.tensor(&format!("{name}.weight")), self.tensor(&format!("{name}.bias")));
        let mut out = Vec::new();
        for x in x.chunks_exact(weight.len()) {
            let mean = x.iter().sum::<f64>() / x.len() as f64;
            let variance = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / x.len() as f64;
            for ((x, weight), bias) in x.iter().zip(weight).zip(bias) {
                out.push((x - mean) / (variance + 1e-6).sqrt() * weight + bias);
            }
        }
        out
    }
}

/// (time, row, column) of every token in order.
fn positions([times, rows, columns]: [usize; 3]) -> impl Iterator<Item = (usize, usize, usize)> {
    (0..times).flat_map(move |t| (0..rows).flat_map(move |r| (0..columns).map(move |c| (t, r, c))))
}

/// `rotate_queries_or_keys`: sine and cosine of D/2 angles repeated twice, not each of them twice.
fn rotate(x: &mut [f64], position: usize) {
    let dim = x.len();
    let omega: Vec<f64> = (0..dim / 2).map(|i| 10_000_f64.powf(-(i as f64) / (dim as f64 / 2.0))).collect();
    let frequencies: Vec<f64> = omega.iter().map(|omega| position as f64 * omega).collect();
    let frequencies = [frequencies.as_slice(), frequencies.as_slice()].concat();
    let y: Vec<f64> = x.chunks_exact(2).flat_map(|pair| [-pair[1], pair[0]]).collect();
    for j in 0..dim {
        x[j] = x[j] * frequencies[j].cos() + y[j] * frequencies[j].sin();
    }
}

/// V-JEPA 2.1: the two of a pair turn by one angle.
fn rotate_pairs(x: &mut [f64], place: f64) {
    let pairs = x.len() / 2;
    for (i, pair) in x.chunks_exact_mut(2).enumerate() {
        let (sin, cos) = (place * 10_000_f64.powf(-(i as f64) / pairs as f64)).sin_cos();
        (pair[0], pair[1]) = (pair[0] * cos - pair[1] * sin, pair[1] * cos + pair[0] * sin);
    }
}

fn add(x: &mut [f64], y: &[f64]) {
    for (x, y) in x.iter_mut().zip(y) {
        *x += y;
    }
}

/// The error function by a series of positive terms: 2/√π e^(-x²) Σ 2ⁿ x^(2n+1) / (1 · 3 · … · (2n+1)).
fn erf(x: f64) -> f64 {
    if x.abs() > 6.0 {
        return x.signum();
    }
    let mut term = x;
    let mut sum = x;
    for n in 1..200 {
        term *= 2.0 * x * x / f64::from(2 * n + 1);
        sum += term;
    }
    2.0 / std::f64::consts::PI.sqrt() * (-x * x).exp() * sum
}
