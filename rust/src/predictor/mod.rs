//! The Mamba-3 predictor: visual tokens and a query in, the embedding of the answer out.
//!
//! Letters: Nv visual tokens, Nq query tokens, D model width, E embedding width.

mod layout;
#[cfg(test)]
mod reference;
#[cfg(test)]
mod tests;

use self::layout::Layout;
use crate::angn::{AdaptiveNeuralGate, GateActivity};
use crate::config::{Mamba3JepaConfig, Part, Pooling};
use crate::error::{Error, LoadError};
use crate::linalg::{Linear, Matrix};
use crate::loader::{Fields, Weights};
use crate::mamba3::Mamba3Backbone;
use crate::pooling;

/// Visual tokens and query in the configured order -> Mamba-3 backbone -> mean over the configured positions -> linear head
/// -> unit length.
pub struct Mamba3Predictor {
    config: Mamba3JepaConfig,
    pub(crate) vision_proj: Linear,
    pub(crate) query_proj: Linear,
    pub(crate) backbone: Mamba3Backbone,
    /// (1, D), with [`Pooling::Attention`].
    pool_score: Option<Matrix>,
    pred_head: Linear,
}

/// What one prediction reads.
#[derive(Clone, Copy, Debug)]
pub struct PredictorInput<'a> {
    /// (Nv, width of the X-Encoder) visual tokens; `None` without a picture.
    pub visual: Option<&'a [f32]>,
    /// (Nq, width of the Y-Encoder) token embeddings of the query.
    pub query: &'a [f32],
}

/// What the predictor makes of a sample.
#[derive(Clone, Debug, PartialEq)]
pub struct Prediction {
    /// (E) of unit length.
    pub embedding: Vec<f32>,
    /// (D) the state the embedding was read from.
    pub pooled: Vec<f32>,
}

impl Mamba3Predictor {
    /// Reads `predictor.safetensors`.
    ///
    /// # Errors
    /// [`LoadError`] if the file holds another component, a tensor is missing, unknown or of another shape or type.
    pub fn from_weights(weights: &Weights) -> Result<Mamba3Predictor, LoadError> {
        let (mut fields, config) = Fields::open(weights, "predictor")?;
        let width = config.predictor.d_model();
        let mut backbone = Mamba3Backbone::from_fields(&mut fields, &config.predictor.backbone())?;
        if config.predictor.bidirectional {
            backbone = backbone.with_reverse_layers(&mut fields)?;
        }
        let predictor = Mamba3Predictor {
            vision_proj: fields.linear("vision_proj", width, config.vision.hidden_size)?,
            query_proj: fields.linear("query_proj", width, config.y_encoder.d_model())?,
            backbone,
            pool_score: (config.predictor.pooling == Pooling::Attention)
                .then(|| fields.matrix("pool_score.weight", 1, width))
                .transpose()?,
            pred_head: fields.linear("pred_head", config.embed_dim, width)?,
            config,
        };
        fields.finish()?;
        Ok(predictor)
    }

    /// The configuration in the file's header.
    pub fn config(&self) -> &Mamba3JepaConfig {
        &self.config
    }

    /// Predicts the embedding of each sample's answer: what the sample alone would give. With `gates`, they gate the
    /// residual stream, and the pass is recorded as one.
    ///
    /// # Errors
    /// [`Error::Input`] if tokens are not of the width the model takes, a sample has none at all or none that are pooled, or
    /// the gates belong to another model; [`Error::NotFinite`] if the weights are damaged.
    pub fn predict(
        &self,
        samples: &[PredictorInput<'_>],
        gates: Option<(&AdaptiveNeuralGate, &mut GateActivity)>,
    ) -> Result<Vec<Prediction>, Error> {
        let layouts = self.layouts(samples)?;
        let lengths: Vec<usize> = layouts.iter().map(|layout| layout.rows().len()).collect();
        let mut x = self.project(samples, &layouts);
        match gates {
            None => self.backbone.forward(&mut x, &lengths, None, &mut ()),
            Some((gate, activity)) => {
                self.check(gate)?;
                if !samples.is_empty() {
                    self.backbone.forward(&mut x, &lengths, None, &mut gate.hook(activity));
                }
            }
        }
        let width = self.config.predictor.d_model();
        let pooled: Vec<f32> = layouts.iter().flat_map(|layout| self.pool(&x, layout)).collect();
        let embeddings = pooling::embed(&self.pred_head, &pooled)?;
        let pooled = pooled.chunks_exact(width).map(<[f32]>::to_vec);
        Ok(embeddings.into_iter().zip(pooled).map(|(embedding, pooled)| Prediction { embedding, pooled }).collect())
    }

    /// A pooled state (D) to the embedding (E) of unit length that is read from it.
    ///
    /// # Errors
    /// [`Error::Input`] if `pooled` has another length; [`Error::NotFinite`] if it or the embedding is not finite.
    pub fn embed(&self, pooled: &[f32]) -> Result<Vec<f32>, Error> {
        let width = self.config.predictor.d_model();
        if pooled.len() != width {
            return Err(Error::Input(format!("a pooled state of length {}: expected {width}", pooled.len())));
        }
        Ok(pooling::embed(&self.pred_head, pooled)?.concat())
    }

    /// The pooled state (D) of a sample whose final states are among h (T, D).
    fn pool(&self, h: &[f32], layout: &Layout) -> Vec<f32> {
        let config = &self.config.predictor;
        let width = config.d_model();
        let rows = layout.pooled(config.pooling);
        let states = &h[rows.start * width..rows.end * width];
        match &self.pool_score {
            None => pooling::mean(states, width),
            Some(score) => pooling::attention_mean(states, score),
        }
    }

    /// Where each sample's parts stand, the samples one after the other.
    fn layouts(&self, samples: &[PredictorInput<'_>]) -> Result<Vec<Layout>, Error> {
        let count = |what: &str, numbers: &[f32], width: usize| match numbers.len() % width {
            0 => Ok(numbers.len() / width),
            _ => Err(Error::Input(format!("{what}: {} numbers are no rows of {width}", numbers.len()))),
        };
        let config = &self.config.predictor;
        let mut start = 0;
        let layouts = samples.iter().map(|sample| {
            let visual = count("visual tokens", sample.visual.unwrap_or_default(), self.vision_proj.weight.cols())?;
            let query = count("query tokens", sample.query, self.query_proj.weight.cols())?;
            let layout = Layout::new(config.order, start, visual, query);
            start = layout.rows().end;
            match layout.pooled(config.pooling).is_empty() {
                false => Ok(layout),
                true if visual > 0 => Err(Error::Input("a sample has no query, which is what is pooled".into())),
                true => Err(Error::Input("a sample has neither visual tokens nor a query".into())),
            }
        });
        layouts.collect()
    }

    /// The tokens (T, D) of all samples, one after the other.
    fn project(&self, samples: &[PredictorInput<'_>], layouts: &[Layout]) -> Vec<f32> {
        let width = self.config.predictor.d_model();
        let mut x = vec![0.0; layouts.last().map_or(0, |layout| layout.rows().end) * width];
        for (sample, layout) in samples.iter().zip(layouts) {
            for (i, (part, rows)) in layout.parts().iter().enumerate() {
                let (tokens, projection) = match part {
                    Part::Visual => (sample.visual.unwrap_or_default(), &self.vision_proj),
                    Part::Question => (sample.query, &self.query_proj),
                };
                let (start, end) = (rows.start * width, rows.end * width);
                match layout.parts()[..i].iter().find(|(before, _)| before == part) {
                    Some((_, same)) => x.copy_within(same.start * width..same.end * width, start),
                    None => projection.apply(tokens, &mut x[start..end]),
                }
            }
        }
        x
    }

    fn check(&self, gate: &AdaptiveNeuralGate) -> Result<(), Error> {
        let config = &self.config.predictor;
        if (gate.n_layers(), gate.d_model()) != (config.n_layers, config.d_model()) {
            return Err(Error::Input(format!(
                "the gates are for {} layers of width {}, the predictor has {} of width {}",
                gate.n_layers(),
                gate.d_model(),
                config.n_layers,
                config.d_model()
            )));
        }
        Ok(())
    }
}
