//! What `in_proj` gives for each token, and how its columns become what the recurrence needs.

use std::f32::consts::PI;
use std::ops::Range;

use super::rotation::Order;
use crate::config::{A_FLOOR, AActivation, Mamba3Config, NORM_EPS};
use crate::linalg::{math, norm};

/// Where the parts of a projected row lie.
pub(super) struct Columns {
    /// (H, P) the gate.
    pub(super) z: Range<usize>,
    /// (H, P) the values.
    pub(super) x: Range<usize>,
    /// (R, G, N) becomes K.
    pub(super) b: Range<usize>,
    /// (R, G, N) becomes Q.
    pub(super) c: Range<usize>,
    /// (H) the step size.
    pub(super) dt: Range<usize>,
    /// (H) the decay.
    pub(super) a: Range<usize>,
    /// (H) weight of this token against the one before.
    pub(super) trap: Range<usize>,
    /// (S) the angular velocities.
    pub(super) angle: Range<usize>,
    /// Numbers in a row.
    pub(super) width: usize,
}

impl Columns {
    pub(super) fn new(config: &Mamba3Config) -> Columns {
        let (inner, heads) = (config.d_inner(), config.nheads());
        let shared = config.rank() * config.ngroups * config.d_state;
        let mut end = 0;
        let mut next = |size: usize| {
            end += size;
            end - size..end
        };
        Columns {
            z: next(inner),
            x: next(inner),
            b: next(shared),
            c: next(shared),
            dt: next(heads),
            a: next(heads),
            trap: next(heads),
            angle: next(config.n_angles()),
            width: config.projected(),
        }
    }
}

/// The weights between `in_proj` and the recurrence.
pub(super) struct Preparation {
    /// (H).
    pub(super) dt_bias: Vec<f32>,
    /// (N) of `B_norm`.
    pub(super) b_norm: Vec<f32>,
    /// (N) of `C_norm`.
    pub(super) c_norm: Vec<f32>,
    pub(super) activation: AActivation,
}

impl Preparation {
    /// Turns a row of `in_proj` in place into what the recurrence reads: B and C normed and in `order`, dt the step size,
    /// a the logarithm of the decay A dt, trap the share lambda, angle the angular velocity omega in radians per unit of
    /// dt. `spare` (N) is overwritten.
    pub(super) fn apply(&self, row: &mut [f32], columns: &Columns, order: &Order, spare: &mut [f32]) {
        for (range, weight) in [(&columns.b, &self.b_norm), (&columns.c, &self.c_norm)] {
            for x in row[range.clone()].chunks_exact_mut(weight.len()) {
                norm::rms_norm(x, weight, NORM_EPS, spare);
                order.apply(spare, x);
            }
        }
        let (dt, rest) = row[columns.dt.start..].split_at_mut(columns.dt.len());
        let (a, rest) = rest.split_at_mut(columns.a.len());
        let (trap, angle) = rest.split_at_mut(columns.trap.len());
        for (dt, bias) in dt.iter_mut().zip(&self.dt_bias) {
            *dt += bias;
        }
        math::softplus_slice(dt);
        for (a, dt) in a.iter_mut().zip(dt) {
            *a = -self.decay_rate(*a).max(A_FLOOR) * *dt;
        }
        math::sigmoid_slice(trap);
        math::tanh_slice(angle);
        for omega in angle {
            *omega *= PI;
        }
    }

    fn decay_rate(&self, x: f32) -> f32 {
        match self.activation {
            AActivation::HeavyTail if x >= 0.0 => 1.0 + x,
            AActivation::HeavyTail => 1.0 / (1.0 - x),
            AActivation::Softplus => math::softplus(x),
        }
    }
}
