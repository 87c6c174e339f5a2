//! The layer written out plainly, in f64, one token after the other, from the weights as the file has them: what the tests
//! hold the quick forms against.

use std::collections::BTreeMap;
use std::f64::consts::PI;

use crate::config::{AActivation, Mamba3Config};
use crate::loader::Weights;

const EPS: f64 = 1e-5;

/// One layer's weights under their names in the file, without the layer's prefix.
pub(crate) struct Reference {
    config: Mamba3Config,
    weights: BTreeMap<String, Vec<f64>>,
}

/// theta (H, S), h (H, P, N), k (H, R, N), v (H, P), with N in the order of the weights.
#[derive(Clone, Default)]
pub(crate) struct ReferenceState {
    pub(super) theta: Vec<f64>,
    pub(super) h: Vec<f64>,
    pub(super) k: Vec<f64>,
    pub(super) v: Vec<f64>,
}

impl Reference {
    /// The layer whose keys start with `prefix`, which ends in a dot.
    pub(crate) fn new(config: &Mamba3Config, weights: &Weights, prefix: &str) -> Reference {
        let named = weights.tensors().keys().filter_map(|key| Some((key, key.strip_prefix(prefix)?)));
        let numbers = |key| weights.to_f32(key).unwrap().into_iter().map(f64::from).collect();
        let weights = named.map(|(key, name)| (name.to_owned(), numbers(key))).collect();
        Reference { config: config.clone(), weights }
    }

    /// u (L, D) to the layer's output (L, D), from the zero state; and the state after the last token.
    pub(crate) fn run(&self, u: &[f32]) -> (Vec<f64>, ReferenceState) {
        let config = &self.config;
        let mut state = ReferenceState {
            theta: vec![0.0; config.nheads() * config.n_angles()],
            h: vec![0.0; config.d_inner() * config.d_state],
            k: vec![0.0; config.nheads() * config.rank() * config.d_state],
            v: vec![0.0; config.d_inner()],
        };
        let mut out = Vec::new();
        for u in u.chunks_exact(config.d_model) {
            let u: Vec<f64> = u.iter().map(|&x| f64::from(x)).collect();
            let y = self.token(&times(self.weight("in_proj.weight"), &u), &mut state);
            out.extend(times(self.weight("out_proj.weight"), &y));
        }
        (out, state)
    }

    fn weight(&self, name: &str) -> &[f64] {
        &self.weights[name]
    }

    /// A row of in_proj to the gated output (H P).
    fn token(&self, row: &[f64], state: &mut ReferenceState) -> Vec<f64> {
        let c = &self.config;
        let (heads, size, ranks, n, angles) = (c.nheads(), c.headdim, c.rank(), c.d_state, c.n_angles());
        let shared = ranks * c.ngroups * n;
        let mut rest = row;
        let mut next = |count: usize| {
            let (part, others) = rest.split_at(count);
            rest = others;
            part.to_vec()
        };
        let (z, x, b, c_) = (next(heads * size), next(heads * size), next(shared), next(shared));
        let (dd_dt, dd_a, trap, angle) = (next(heads), next(heads), next(heads), next(angles));
        let (dt_bias, skip) = (self.weight("dt_bias"), self.weight("D"));
        let (b_bias, c_bias) = (self.weight("B_bias"), self.weight("C_bias"));
        let (b_norm, c_norm) = (self.weight("B_norm.weight"), self.weight("C_norm.weight"));
        let mimo = |name: &str, i: usize| if c.is_mimo { self.weight(name)[i] } else { 1.0 };
        let mut out = vec![0.0; heads * size];
        for head in 0..heads {
            let group = head / (heads / c.ngroups);
            let dt = softplus(dd_dt[head] + dt_bias[head]);
            let decay = match c.a_activation {
                AActivation::Softplus => softplus(dd_a[head]),
                AActivation::HeavyTail if dd_a[head] >= 0.0 => 1.0 + dd_a[head],
                AActivation::HeavyTail => 1.0 / (1.0 - dd_a[head]),
            };
            let alpha = (-decay.max(1e-4) * dt).exp();
            let lambda = sigmoid(trap[head]);
            let theta = &mut state.theta[head * angles..(head + 1) * angles];
            for (theta, angle) in theta.iter_mut().zip(&angle) {
                *theta += PI * angle.tanh() * dt;
            }
            let row_of = |shared: &[f64], norm: &[f64], bias: &[f64], r: usize| {
                let start = (r * c.ngroups + group) * n;
                let mut row = rms_norm(&shared[start..start + n], norm);
                for (row, bias) in row.iter_mut().zip(&bias[(head * ranks + r) * n..]) {
                    *row += bias;
                }
                self.rotate(&mut row, theta);
                row
            };
            let k: Vec<_> = (0..ranks).map(|r| row_of(&b, b_norm, b_bias, r)).collect();
            let q: Vec<_> = (0..ranks).map(|r| row_of(&c_, c_norm, c_bias, r)).collect();
            let mut y = vec![vec![0.0; size]; ranks];
            for p in 0..size {
                let at = |r: usize| (head * ranks + r) * size + p;
                for i in 0..n {
                    let h = &mut state.h[(head * size + p) * n + i];
                    let mut before = 0.0;
                    let mut now = 0.0;
                    for r in 0..ranks {
                        let spread = mimo("mimo_x", at(r));
                        before += state.v[head * size + p] * spread * state.k[(head * ranks + r) * n + i];
                        now += x[head * size + p] * spread * k[r][i];
                    }
                    *h = alpha * *h + (1.0 - lambda) * dt * alpha * before + lambda * dt * now;
                    for r in 0..ranks {
                        y[r][p] += *h * q[r][i];
                    }
                }
                for r in 0..ranks {
                    y[r][p] += skip[head] * x[head * size + p] * mimo("mimo_x", at(r));
                }
            }
            for r in 0..ranks {
                if c.is_outproj_norm {
                    y[r] = rms_norm(&y[r], &self.weight("norm.weight")[head * size..(head + 1) * size]);
                }
                for p in 0..size {
                    let at = (head * ranks + r) * size + p;
                    let z = z[head * size + p] * mimo("mimo_z", at);
                    out[head * size + p] += y[r][p] * z * sigmoid(z) * mimo("mimo_o", at);
                }
                state.k[(head * ranks + r) * n..(head * ranks + r + 1) * n].copy_from_slice(&k[r]);
            }
            state.v[head * size..(head + 1) * size].copy_from_slice(&x[head * size..(head + 1) * size]);
        }
        out
    }

    fn rotate(&self, x: &mut [f64], theta: &[f64]) {
        for (i, theta) in theta.iter().enumerate() {
            let (first, second) = if self.config.is_mimo { (i, i + x.len() / 2) } else { (2 * i, 2 * i + 1) };
            let (a, b) = (x[first], x[second]);
            (x[first], x[second]) = (a * theta.cos() - b * theta.sin(), a * theta.sin() + b * theta.cos());
        }
    }
}

pub(crate) fn times(matrix: &[f64], x: &[f64]) -> Vec<f64> {
    matrix.chunks_exact(x.len()).map(|row| row.iter().zip(x).map(|(a, b)| a * b).sum()).collect()
}

pub(crate) fn rms_norm(x: &[f64], weight: &[f64]) -> Vec<f64> {
    let mean = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
    x.iter().zip(weight).map(|(x, weight)| x / (mean + EPS).sqrt() * weight).collect()
}

pub(crate) fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

fn softplus(x: f64) -> f64 {
    if x > 30.0 { x } else { x.exp().ln_1p() }
}
