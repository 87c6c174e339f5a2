//! A pre-norm residual stack: for each layer, gate, RMSNorm, Mamba-3, add, and where there are MLPs RMSNorm, MLP, add; then a
//! final RMSNorm.
//!
//! Where it is bidirectional, each layer has a second Mamba-3 that reads the same from the right, and both are added. Every
//! state then knows the whole sequence, and nothing can go on from the last one.

use std::iter::Empty;

use super::buffers::{PassBuffers, StepBuffers};
use super::layer::Mamba3Layer;
use super::mlp::GatedMlp;
use super::state::BackboneState;
use crate::config::{BackboneConfig, NORM_EPS};
use crate::error::LoadError;
use crate::linalg::norm;
use crate::loader::Fields;

/// Called between the parts of a backbone, on the rows (T, D) of all sequences.
pub(crate) trait LayerHook {
    /// On the residual stream before a layer's norm; it may change it.
    fn before_layer(&mut self, _layer: usize, _x: &mut [f32]) {}

    /// On what the Mamba-3 layer that reads from the left adds to the residual stream.
    fn after_mixer(&mut self, _layer: usize, _y: &[f32]) {}

    /// On what the MLP behind the layer adds to the residual stream, where there is one.
    fn after_mlp(&mut self, _layer: usize, _y: &[f32]) {}

    /// On the residual stream after the layer and its MLP.
    fn after_layer(&mut self, _layer: usize, _x: &[f32]) {}
}

/// The hook that does nothing.
impl LayerHook for () {}

const NO_STATE: &str = "a bidirectional backbone reads whole sequences: it has no state to go on from";

/// The weights of a stack of equal Mamba-3 layers.
pub(crate) struct Mamba3Backbone {
    pub(super) config: BackboneConfig,
    pub(super) layers: Vec<Mamba3Layer>,
    /// One beside each layer, which reads from the right, or none.
    reverse_layers: Vec<Mamba3Layer>,
    pub(super) norms: Vec<Vec<f32>>,
    /// One behind each layer, or none.
    mlps: Vec<GatedMlp>,
    final_norm: Vec<f32>,
}

impl Mamba3Backbone {
    /// Reads the backbone of a component, its layers that read from the left.
    ///
    /// # Errors
    /// [`LoadError::MissingKey`], [`LoadError::Shape`] or [`LoadError::Type`].
    pub(crate) fn from_fields(fields: &mut Fields<'_>, config: &BackboneConfig) -> Result<Mamba3Backbone, LoadError> {
        let mut layers = Vec::new();
        let mut norms = Vec::new();
        let mut mlps = Vec::new();
        for i in 0..config.n_layers {
            layers.push(Mamba3Layer::from_fields(fields, &format!("layers.{i}"), &config.layer)?);
            norms.push(fields.vector(&format!("norms.{i}.weight"), &[config.d_model()])?);
            if config.mlp_dim > 0 {
                mlps.push(GatedMlp::from_fields(fields, i, config)?);
            }
        }
        let final_norm = fields.vector("final_norm.weight", &[config.d_model()])?;
        Ok(Mamba3Backbone { config: config.clone(), layers, reverse_layers: Vec::new(), norms, mlps, final_norm })
    }

    /// Reads the layers that read from the right as well. From then on no state may be kept, and no step made.
    ///
    /// # Errors
    /// [`LoadError::MissingKey`], [`LoadError::Shape`] or [`LoadError::Type`].
    pub(crate) fn with_reverse_layers(mut self, fields: &mut Fields<'_>) -> Result<Mamba3Backbone, LoadError> {
        for i in 0..self.config.n_layers {
            let layer = Mamba3Layer::from_fields(fields, &format!("reverse_layers.{i}"), &self.config.layer)?;
            self.reverse_layers.push(layer);
        }
        Ok(self)
    }

    /// Width D of the residual stream.
    pub(crate) fn d_model(&self) -> usize {
        self.config.d_model()
    }

    /// x (T, D), the sequences of `lengths` one after the other, becomes the output of the final norm. With `states`, one
    /// for each sequence, it continues from them and leaves them as they are after the last token.
    ///
    /// Memory is linear in T. A sequence gives the same numbers whatever others are beside it, up to the rounding of the
    /// matrix products, which may be computed in another order for another number of rows.
    ///
    /// # Panics
    /// If x is not (T, D) with T the sum of `lengths`, there is not one state for each sequence, or there are states and the
    /// backbone is bidirectional.
    pub(crate) fn forward(
        &self,
        x: &mut [f32],
        lengths: &[usize],
        states: Option<&mut [BackboneState]>,
        hook: &mut dyn LayerHook,
    ) {
        self.pass(x, lengths, lengths, states, hook);
    }

    /// As [`forward`](Self::forward), from the zero state, on sequences of which only the first `valid` tokens count and the
    /// others are padding. Padding changes nothing before it: what reads from the right begins at the last valid token.
    ///
    /// # Panics
    /// If x is not (T, D) with T the sum of `lengths`, or there is not one number of valid tokens, within the length, for each
    /// sequence.
    pub(crate) fn forward_padded(&self, x: &mut [f32], lengths: &[usize], valid: &[usize], hook: &mut dyn LayerHook) {
        assert_eq!(valid.len(), lengths.len(), "valid tokens and lengths differ");
        self.pass(x, lengths, valid, None, hook);
    }

    fn pass(
        &self,
        x: &mut [f32],
        lengths: &[usize],
        valid: &[usize],
        mut states: Option<&mut [BackboneState]>,
        hook: &mut dyn LayerHook,
    ) {
        assert!(states.is_none() || self.reverse_layers.is_empty(), "{NO_STATE}");
        assert_eq!(x.len(), lengths.iter().sum::<usize>() * self.config.d_model(), "rows and lengths differ");
        assert!(states.as_ref().is_none_or(|states| states.len() == lengths.len()), "states and lengths differ");
        let mut u = vec![0.0; x.len()];
        // what the layers that read from the right add; empty where there are none
        let mut from_right = vec![0.0; if self.reverse_layers.is_empty() { 0 } else { x.len() }];
        let mut buffers = PassBuffers::new(&self.config.layer, lengths);
        for (i, (layer, weight)) in self.layers.iter().zip(&self.norms).enumerate() {
            hook.before_layer(i, x);
            norm::rms_norm(x, weight, NORM_EPS, &mut u);
            if let Some(reverse) = self.reverse_layers.get(i) {
                from_right.copy_from_slice(&u);
                self.mirror(&mut from_right, lengths, valid);
                reverse.forward(&mut from_right, lengths, None::<Empty<_>>, &mut buffers);
                self.mirror(&mut from_right, lengths, valid);
            }
            let states = states.as_mut().map(|states| states.iter_mut().map(|state| &mut state.layers[i]));
            layer.forward(&mut u, lengths, states, &mut buffers);
            hook.after_mixer(i, &u);
            add(x, &u);
            add(x, &from_right);
            self.add_mlp(i, x, &mut u, &mut buffers.mlp, hook);
            hook.after_layer(i, x);
        }
        self.norm_finally(x, &mut u);
    }

    /// One token of each of B sequences: x (B, D) becomes the output of the final norm. `buffers` are for B sequences.
    ///
    /// Time and memory do not depend on how many tokens there were; nothing is allocated, but for MLPs once.
    ///
    /// # Panics
    /// If x, `states` and `buffers` are not for the same number of sequences, or the backbone is bidirectional.
    pub(crate) fn step(
        &self,
        x: &mut [f32],
        states: &mut [BackboneState],
        buffers: &mut StepBuffers,
        hook: &mut dyn LayerHook,
    ) {
        assert!(self.reverse_layers.is_empty(), "{NO_STATE}");
        assert_eq!(x.len(), states.len() * self.config.d_model(), "rows and states differ");
        assert_eq!(x.len(), buffers.u.len(), "rows and buffers differ");
        let mut u = std::mem::take(&mut buffers.u);
        for (i, (layer, weight)) in self.layers.iter().zip(&self.norms).enumerate() {
            hook.before_layer(i, x);
            norm::rms_norm(x, weight, NORM_EPS, &mut u);
            layer.step(&mut u, states.iter_mut().map(|state| &mut state.layers[i]), buffers);
            hook.after_mixer(i, &u);
            add(x, &u);
            self.add_mlp(i, x, &mut u, &mut buffers.mlp, hook);
            hook.after_layer(i, x);
        }
        self.norm_finally(x, &mut u);
        buffers.u = u;
    }

    /// Lets the MLP behind a layer, if there is one, add to the residual stream; `spare` (T, D) is overwritten.
    fn add_mlp(&self, layer: usize, x: &mut [f32], spare: &mut [f32], buffer: &mut Vec<f32>, hook: &mut dyn LayerHook) {
        if let Some(mlp) = self.mlps.get(layer) {
            mlp.forward(x, spare, buffer);
            hook.after_mlp(layer, spare);
            add(x, spare);
        }
    }

    /// Turns the order of the first `valid` rows of each sequence around; the others stay.
    fn mirror(&self, mut x: &mut [f32], lengths: &[usize], valid: &[usize]) {
        let width = self.config.d_model();
        for (&length, &valid) in lengths.iter().zip(valid) {
            let (sequence, others) = x.split_at_mut(length * width);
            x = others;
            let rows = &mut sequence[..valid * width];
            rows.reverse();
            rows.chunks_exact_mut(width).for_each(<[f32]>::reverse);
        }
    }

    fn norm_finally(&self, x: &mut [f32], spare: &mut [f32]) {
        norm::rms_norm(x, &self.final_norm, NORM_EPS, spare);
        x.copy_from_slice(spare);
    }
}

fn add(x: &mut [f32], y: &[f32]) {
    for (x, y) in x.iter_mut().zip(y) {
        *x += y;
    }
}
