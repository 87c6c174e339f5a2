//! Adaptive neural gating network (ANGN): elementwise gates on the predictor's residual stream.
//!
//! Before layer i the residual stream h becomes h sigmoid(weight_i h + bias_i). How open the gates are is measured on every
//! pass; a moving average of it tells when the stream has gone quiet and the context should be reset.

use rayon::prelude::*;

use crate::config::{AngnConfig, Mamba3JepaConfig};
use crate::error::LoadError;
use crate::linalg::math;
use crate::loader::{Fields, Weights};
use crate::mamba3::LayerHook;

/// Rows that a thread gates in a row.
const ROWS_PER_TASK: usize = 16;
/// Numbers that are gated at a time.
const BLOCK: usize = 128;

/// One gate for each layer of the predictor.
pub struct AdaptiveNeuralGate {
    config: AngnConfig,
    gates: Vec<Gate>,
}

/// (D) each.
struct Gate {
    weight: Vec<f32>,
    bias: Vec<f32>,
}

impl Gate {
    /// Gates rows of h, and returns the sum of the gate over all of it.
    fn apply(&self, h: &mut [f32]) -> f64 {
        let mut open = [0.0; BLOCK];
        let mut sum = 0.0;
        for row in h.chunks_exact_mut(self.bias.len()) {
            let weights = self.weight.chunks(BLOCK).zip(self.bias.chunks(BLOCK));
            for (h, (weight, bias)) in row.chunks_mut(BLOCK).zip(weights) {
                let open = &mut open[..h.len()];
                for (((open, h), weight), bias) in open.iter_mut().zip(&*h).zip(weight).zip(bias) {
                    *open = weight * h + bias;
                }
                math::sigmoid_slice(open);
                for (h, open) in h.iter_mut().zip(&*open) {
                    *h *= open;
                }
                sum += f64::from(open.iter().sum::<f32>());
            }
        }
        sum
    }
}

impl AdaptiveNeuralGate {
    /// Reads `angn.safetensors`.
    ///
    /// # Errors
    /// [`LoadError`] if the file holds another component, a tensor is missing, unknown or of another shape or type.
    pub fn from_weights(weights: &Weights) -> Result<AdaptiveNeuralGate, LoadError> {
        let (mut fields, config) = Fields::open(weights, "angn")?;
        let Mamba3JepaConfig { angn, predictor, .. } = config;
        let mut gates = Vec::new();
        for i in 0..predictor.n_layers {
            let mut vector = |kind: &str| fields.vector(&format!("gates.{i}.{kind}"), &[predictor.d_model()]);
            gates.push(Gate { weight: vector("weight")?, bias: vector("bias")? });
        }
        fields.finish()?;
        Ok(AdaptiveNeuralGate { config: angn, gates })
    }

    /// Layers it has gates for.
    pub fn n_layers(&self) -> usize {
        self.gates.len()
    }

    /// Width D of the residual stream it gates.
    pub fn d_model(&self) -> usize {
        self.gates.first().map_or(0, |gate| gate.bias.len())
    }

    /// h (T, D) becomes h sigmoid(weight h + bias) with the gate of `layer`; returns the gate's mean activation, 0 of
    /// none. Runs on the current thread pool, with the same result on any number of threads.
    ///
    /// # Panics
    /// If there is no such layer.
    pub fn apply(&self, layer: usize, h: &mut [f32]) -> f32 {
        let gate = &self.gates[layer];
        let rows = h.par_chunks_mut(ROWS_PER_TASK * gate.bias.len());
        let sums: Vec<f64> = rows.map(|rows| gate.apply(rows)).collect();
        (sums.iter().sum::<f64>() / h.len().max(1) as f64) as f32
    }

    /// Gates every layer of one pass over the predictor, and keeps its record in `activity`.
    pub(crate) fn hook<'a>(&'a self, activity: &'a mut GateActivity) -> GateHook<'a> {
        GateHook { gate: self, activity }
    }
}

/// How open the gates were: the record of one context, kept by who runs the predictor.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GateActivity {
    last: Vec<f32>,
    ema: Vec<f32>,
    reset_due: bool,
}

impl GateActivity {
    /// The record before any pass.
    pub fn new() -> GateActivity {
        GateActivity::default()
    }

    /// Mean activation in (0, 1) of each layer over all positions of the last pass; empty before any.
    pub fn activity(&self) -> &[f32] {
        &self.last
    }

    /// Moving average of [`activity`](Self::activity) over the passes since the last reset; empty before any.
    pub fn activity_ema(&self) -> &[f32] {
        &self.ema
    }

    /// Whether the mean of the moving average over the layers is under the configured threshold.
    pub fn context_reset_due(&self) -> bool {
        self.reset_due
    }

    /// Forgets the moving average: the next pass starts a new one.
    pub fn reset(&mut self) {
        self.ema.clear();
        self.reset_due = false;
    }

    /// Takes over what one pass, recorded by itself, found.
    pub(crate) fn follow(&mut self, pass: &GateActivity, gate: &AdaptiveNeuralGate) {
        for (layer, &activity) in pass.last.iter().enumerate() {
            self.record(layer, activity, gate);
        }
    }

    fn record(&mut self, layer: usize, activity: f32, gate: &AdaptiveNeuralGate) {
        self.last.resize(gate.n_layers(), f32::NAN);
        self.last[layer] = activity;
        self.ema.resize(gate.n_layers(), f32::NAN);
        let ema = &mut self.ema[layer];
        let decay = gate.config.ema_decay as f32;
        *ema = if ema.is_nan() { activity } else { decay * *ema + (1.0 - decay) * activity };
        if layer + 1 == gate.n_layers() {
            let mean = self.ema.iter().sum::<f32>() / self.ema.len() as f32;
            self.reset_due = f64::from(mean) < gate.config.context_reset_threshold;
        }
    }
}

/// The gates and their record, as a backbone calls them.
pub(crate) struct GateHook<'a> {
    gate: &'a AdaptiveNeuralGate,
    activity: &'a mut GateActivity,
}

impl LayerHook for GateHook<'_> {
    fn before_layer(&mut self, layer: usize, x: &mut [f32]) {
        let activity = self.gate.apply(layer, x);
        self.activity.record(layer, activity, self.gate);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Random, TinyModel};

    fn gates(model: &TinyModel) -> AdaptiveNeuralGate {
        AdaptiveNeuralGate::from_weights(&Weights::from_bytes("angn", &model.component("angn")).unwrap()).unwrap()
    }

    #[test]
    fn a_gate_is_its_formula() {
        let gates = gates(&TinyModel::new());
        let before = Random::new(1).normals(3 * gates.d_model());
        let mut after = before.clone();
        let activity = gates.apply(1, &mut after);
        let Gate { weight, bias } = &gates.gates[1];
        let mut sum = 0.0;
        for (i, (before, after)) in before.iter().zip(&after).enumerate() {
            let i = i % bias.len();
            let open = 1.0 / (1.0 + (-(weight[i] * before + bias[i])).exp());
            sum += open;
            assert!((after - before * open).abs() < 1e-6);
        }
        assert!((activity - sum / before.len() as f32).abs() < 1e-6);
    }

    #[test]
    fn the_moving_average_starts_with_the_first_pass_and_asks_for_a_reset_when_the_stream_is_quiet() {
        let gates = gates(&TinyModel::new().set("/angn/ema_decay", 0.5).set("/angn/context_reset_threshold", 0.6));
        let mut activity = GateActivity::new();
        let pass = |activity: &mut GateActivity, values: [f32; 2]| {
            for (layer, value) in values.into_iter().enumerate() {
                activity.record(layer, value, &gates);
            }
        };
        assert!(!activity.context_reset_due() && activity.activity_ema().is_empty());
        pass(&mut activity, [0.75, 0.75]);
        assert_eq!((activity.activity_ema(), activity.context_reset_due()), (&[0.75, 0.75][..], false));
        pass(&mut activity, [0.25, 0.5]);
        assert_eq!(activity.activity(), [0.25, 0.5]);
        assert_eq!((activity.activity_ema(), activity.context_reset_due()), (&[0.5, 0.625][..], true));
        activity.reset();
        assert!(!activity.context_reset_due());
        pass(&mut activity, [1.0, 0.5]);
        assert_eq!((activity.activity_ema(), activity.context_reset_due()), (&[1.0, 0.5][..], false));
    }
}
