//! The Mamba-3 predictor: visual tokens and a query in, the embedding of the answer out.
//!
//! Letters: Nv visual tokens, Nq query tokens, D model width, E embedding width.

use crate::angn::{AdaptiveNeuralGate, GateActivity};
use crate::config::Mamba3JepaConfig;
use crate::error::{Error, LoadError};
use crate::linalg::Linear;
use crate::loader::{Fields, Weights};
use crate::mamba3::Mamba3Backbone;
use crate::pooling;

/// [visual ; query] -> Mamba-3 backbone -> mean over the tokens -> linear head -> unit length.
pub struct Mamba3Predictor {
    config: Mamba3JepaConfig,
    pub(crate) vision_proj: Linear,
    pub(crate) query_proj: Linear,
    pub(crate) backbone: Mamba3Backbone,
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
        let predictor = Mamba3Predictor {
            vision_proj: fields.linear("vision_proj", width, config.vision.hidden_size)?,
            query_proj: fields.linear("query_proj", width, config.y_encoder.d_model())?,
            backbone: Mamba3Backbone::from_fields(&mut fields, &config.predictor)?,
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
    /// [`Error::Input`] if tokens are not of the width the model takes, a sample has none at all, or the gates belong to
    /// another model.
    pub fn predict(
        &self,
        samples: &[PredictorInput<'_>],
        gates: Option<(&AdaptiveNeuralGate, &mut GateActivity)>,
    ) -> Result<Vec<Prediction>, Error> {
        let lengths = samples.iter().map(|sample| self.length(sample)).collect::<Result<Vec<_>, _>>()?;
        let mut x = self.project(samples, &lengths);
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
        let pooled = pooling::means(&x, &lengths, width);
        let embeddings = pooling::embed(&self.pred_head, &pooled);
        let pooled = pooled.chunks_exact(width).map(<[f32]>::to_vec);
        Ok(embeddings.into_iter().zip(pooled).map(|(embedding, pooled)| Prediction { embedding, pooled }).collect())
    }

    /// A pooled state (D) to the embedding (E) of unit length that is read from it.
    ///
    /// # Errors
    /// [`Error::Input`] if `pooled` has another length.
    pub fn embed(&self, pooled: &[f32]) -> Result<Vec<f32>, Error> {
        let width = self.config.predictor.d_model();
        if pooled.len() != width {
            return Err(Error::Input(format!("a pooled state of length {}: expected {width}", pooled.len())));
        }
        Ok(pooling::embed(&self.pred_head, pooled).concat())
    }

    /// Tokens of a sample.
    fn length(&self, sample: &PredictorInput<'_>) -> Result<usize, Error> {
        let count = |what: &str, numbers: &[f32], width: usize| match numbers.len() % width {
            0 => Ok(numbers.len() / width),
            _ => Err(Error::Input(format!("{what}: {} numbers are no rows of {width}", numbers.len()))),
        };
        let visual = count("visual tokens", sample.visual.unwrap_or_default(), self.vision_proj.weight.cols())?;
        let query = count("query tokens", sample.query, self.query_proj.weight.cols())?;
        match visual + query {
            0 => Err(Error::Input("a sample has neither visual tokens nor a query".into())),
            length => Ok(length),
        }
    }

    /// The tokens (T, D) of all samples, one after the other.
    fn project(&self, samples: &[PredictorInput<'_>], lengths: &[usize]) -> Vec<f32> {
        let width = self.config.predictor.d_model();
        let mut x = vec![0.0; lengths.iter().sum::<usize>() * width];
        let mut rest = &mut x[..];
        for sample in samples {
            for (tokens, projection) in
                [(sample.visual.unwrap_or_default(), &self.vision_proj), (sample.query, &self.query_proj)]
            {
                let (rows, others) = rest.split_at_mut(tokens.len() / projection.weight.cols() * width);
                projection.apply(tokens, rows);
                rest = others;
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
