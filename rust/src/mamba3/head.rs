//! The small weights of one head, and what it makes of a token before and after the recurrence.

use super::projection::Columns;
use super::rotation::{self, Order};
use crate::config::{Mamba3Config, NORM_EPS};
use crate::error::LoadError;
use crate::linalg::{math, norm};
use crate::loader::Fields;

/// The weights of all heads of a layer.
pub(super) struct HeadWeights {
    /// (H, R, N) of K and of Q, in [`Order`].
    k_bias: Vec<f32>,
    q_bias: Vec<f32>,
    /// (H) D.
    skip: Vec<f32>,
    /// (H, P), where the output is normed.
    norm: Option<Vec<f32>>,
    mimo: Option<Mimo>,
}

/// (H, R, P) each.
struct Mimo {
    /// Spreads V over the ranks.
    x: Vec<f32>,
    /// Spreads the gate.
    z: Vec<f32>,
    /// Gathers the ranks.
    o: Vec<f32>,
}

impl HeadWeights {
    /// Reads those of the layer whose keys start with `prefix`.
    pub(super) fn from_fields(
        fields: &mut Fields<'_>,
        prefix: &str,
        config: &Mamba3Config,
        order: &Order,
    ) -> Result<HeadWeights, LoadError> {
        let (heads, rank) = (config.nheads(), config.rank());
        let mut bias = |name: &str| -> Result<Vec<f32>, LoadError> {
            Ok(order.applied(&fields.vector(&format!("{prefix}.{name}"), &[heads, rank, config.d_state])?))
        };
        let (k_bias, q_bias) = (bias("B_bias")?, bias("C_bias")?);
        let skip = fields.vector(&format!("{prefix}.D"), &[heads])?;
        let norm = match config.is_outproj_norm {
            true => Some(fields.vector(&format!("{prefix}.norm.weight"), &[config.d_inner()])?),
            false => None,
        };
        let mut spread = |name: &str| fields.vector(&format!("{prefix}.{name}"), &[heads, rank, config.headdim]);
        let mimo = match config.is_mimo {
            true => Some(Mimo { x: spread("mimo_x")?, z: spread("mimo_z")?, o: spread("mimo_o")? }),
            false => None,
        };
        Ok(HeadWeights { k_bias, q_bias, skip, norm, mimo })
    }

    /// Those of head `index`.
    pub(super) fn head<'a>(&'a self, index: usize, config: &Mamba3Config) -> Head<'a> {
        let part = |weights: &'a [f32], size: usize| &weights[index * size..(index + 1) * size];
        let (rank, state, size) = (config.rank(), config.d_state, config.headdim);
        Head {
            index,
            group: index / (config.nheads() / config.ngroups),
            groups: config.ngroups,
            rank,
            state,
            k_bias: part(&self.k_bias, rank * state),
            q_bias: part(&self.q_bias, rank * state),
            skip: self.skip[index],
            norm: self.norm.as_deref().map(|norm| part(norm, size)),
            mimo: self
                .mimo
                .as_ref()
                .map(|mimo| [part(&mimo.x, rank * size), part(&mimo.z, rank * size), part(&mimo.o, rank * size)]),
            size,
        }
    }
}

/// The weights of one head.
pub(super) struct Head<'a> {
    pub(super) index: usize,
    group: usize,
    groups: usize,
    /// R.
    pub(super) rank: usize,
    /// N.
    pub(super) state: usize,
    /// P.
    pub(super) size: usize,
    /// (R, N).
    k_bias: &'a [f32],
    q_bias: &'a [f32],
    /// D.
    pub(super) skip: f32,
    /// (P).
    norm: Option<&'a [f32]>,
    /// (R, P): `mimo_x`, `mimo_z`, `mimo_o`.
    mimo: Option<[&'a [f32]; 3]>,
}

impl Head<'_> {
    /// A head's part of the columns that hold P numbers per head.
    pub(super) fn part<'a>(&self, numbers: &'a [f32]) -> &'a [f32] {
        &numbers[self.index * self.size..(self.index + 1) * self.size]
    }

    /// K and Q (R, N) of a prepared row: biased, and turned by the angles whose `sin` and `cos` (S) are given.
    pub(super) fn keys_and_queries(
        &self,
        row: &[f32],
        columns: &Columns,
        (sin, cos): (&[f32], &[f32]),
        k: &mut [f32],
        q: &mut [f32],
    ) {
        for (range, bias, out) in [(&columns.b, self.k_bias, k), (&columns.c, self.q_bias, q)] {
            let per_rank = row[range.clone()].chunks_exact(self.groups * self.state);
            for ((shared, bias), out) in
                per_rank.zip(bias.chunks_exact(self.state)).zip(out.chunks_exact_mut(self.state))
            {
                let shared = &shared[self.group * self.state..(self.group + 1) * self.state];
                for ((out, x), bias) in out.iter_mut().zip(shared).zip(bias) {
                    *out = x + bias;
                }
                rotation::turn(out, sin, cos);
            }
        }
    }

    /// V (P) over the ranks: (R, P).
    pub(super) fn spread(&self, v: &[f32], out: &mut [f32]) {
        match self.mimo {
            None => out.copy_from_slice(v),
            Some([x, ..]) => {
                for (out, x) in out.chunks_exact_mut(self.size).zip(x.chunks_exact(self.size)) {
                    for ((out, v), x) in out.iter_mut().zip(v).zip(x) {
                        *out = v * x;
                    }
                }
            }
        }
    }

    /// The output (P) of a token from y (R, P) and z (P): norm if there is one, gate, ranks gathered. y and `spare` (P)
    /// are overwritten.
    pub(super) fn gate(&self, y: &mut [f32], z: &[f32], spare: &mut [f32], out: &mut [f32]) {
        if let Some(weight) = self.norm {
            for y in y.chunks_exact_mut(self.size) {
                norm::rms_norm(y, weight, NORM_EPS, spare);
                y.copy_from_slice(spare);
            }
        }
        let Some([_, spread, gather]) = self.mimo else {
            out.copy_from_slice(y);
            math::silu_gate(out, z);
            return;
        };
        out.fill(0.0);
        for ((y, spread), gather) in
            y.chunks_exact_mut(self.size).zip(spread.chunks_exact(self.size)).zip(gather.chunks_exact(self.size))
        {
            for ((spare, z), spread) in spare.iter_mut().zip(z).zip(spread) {
                *spare = z * spread;
            }
            math::silu_gate(y, spare);
            for ((out, y), gather) in out.iter_mut().zip(y).zip(gather) {
                *out += *y * gather;
            }
        }
    }
}
