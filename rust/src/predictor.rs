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
    /// another model; [`Error::NotFinite`] if the weights are damaged.
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Random, TinyModel, relative};

    fn predictor(model: &TinyModel) -> Mamba3Predictor {
        let weights = Weights::from_bytes("predictor", &model.component("predictor")).unwrap();
        Mamba3Predictor::from_weights(&weights).unwrap()
    }

    fn gates(model: &TinyModel) -> AdaptiveNeuralGate {
        AdaptiveNeuralGate::from_weights(&Weights::from_bytes("angn", &model.component("angn")).unwrap()).unwrap()
    }

    /// Visual tokens and query tokens of two samples with pictures and one without.
    fn tokens(predictor: &Mamba3Predictor) -> Vec<(Option<Vec<f32>>, Vec<f32>)> {
        let mut random = Random::new(3);
        let (visual, query) = (predictor.vision_proj.weight.cols(), predictor.query_proj.weight.cols());
        [(16, 5), (0, 3), (70, 1)]
            .map(|(v, q)| ((v > 0).then(|| random.normals(v * visual)), random.normals(q * query)))
            .to_vec()
    }

    fn inputs(tokens: &[(Option<Vec<f32>>, Vec<f32>)]) -> Vec<PredictorInput<'_>> {
        tokens.iter().map(|(visual, query)| PredictorInput { visual: visual.as_deref(), query }).collect()
    }

    #[test]
    fn a_sample_is_the_same_alone_and_beside_others() {
        for (name, model) in TinyModel::variants() {
            let predictor = predictor(&model);
            let tokens = tokens(&predictor);
            let samples = inputs(&tokens);
            let together = predictor.predict(&samples, None).unwrap();
            for (sample, found) in samples.iter().zip(&together) {
                let alone = predictor.predict(&[*sample], None).unwrap().remove(0);
                assert!(relative(&found.embedding, &alone.embedding) < 3e-6, "{name}");
                assert!(relative(&found.pooled, &alone.pooled) < 3e-6, "{name}");
                let length: f32 = found.embedding.iter().map(|x| x * x).sum();
                assert!((length - 1.0).abs() < 1e-5, "{name}: not of unit length");
                assert_eq!(predictor.embed(&alone.pooled).unwrap(), alone.embedding, "{name}");
            }
        }
    }

    #[test]
    fn gates_change_the_prediction_and_a_pass_is_recorded_over_all_tokens() {
        let model = TinyModel::new();
        let (predictor, gates) = (predictor(&model), gates(&model));
        let tokens = tokens(&predictor);
        let samples = inputs(&tokens);
        let mut together = GateActivity::new();
        let gated = predictor.predict(&samples, Some((&gates, &mut together))).unwrap();
        assert_ne!(gated, predictor.predict(&samples, None).unwrap());
        let mut mean = vec![0.0; gates.n_layers()];
        for (sample, count) in samples.iter().zip([21.0, 3.0, 71.0]) {
            let mut own = GateActivity::new();
            predictor.predict(&[*sample], Some((&gates, &mut own))).unwrap();
            for (mean, activity) in mean.iter_mut().zip(own.activity()) {
                *mean += activity * count / 95.0;
            }
        }
        assert!(relative(together.activity(), &mean) < 1e-6);
        let before = together.clone();
        assert_eq!(predictor.predict(&[], Some((&gates, &mut together))).unwrap(), []);
        assert_eq!(together, before, "no samples are no pass");
    }

    #[test]
    fn what_does_not_fit_is_an_error() {
        let model = TinyModel::new();
        let predictor = predictor(&model);
        let query = vec![0.0; 32];
        let refused =
            |visual, query| predictor.predict(&[PredictorInput { visual, query }], None).unwrap_err().to_string();
        assert!(refused(None, &query[1..]).contains("query tokens: 31 numbers are no rows of 32"));
        assert!(refused(Some(&query), &query).contains("visual tokens: 32 numbers are no rows of 48"));
        assert!(refused(None, &[]).contains("neither visual tokens nor a query"));
        assert!(predictor.embed(&query[1..]).unwrap_err().to_string().contains("expected 32"));
        let other = gates(&TinyModel::new().set("/predictor/n_layers", 3));
        let sample = PredictorInput { visual: None, query: &query };
        let error = predictor.predict(&[sample], Some((&other, &mut GateActivity::new()))).unwrap_err();
        assert!(error.to_string().contains("the gates are for 3 layers"), "{error}");
    }
}
