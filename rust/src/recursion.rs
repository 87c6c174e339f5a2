//! Recursion on the predictor's pooled state: notice confusion, inject knowledge, look again.
//!
//! Letters: D width of the pooled state, K length of a knowledge vector.

use crate::config::{CONFUSION_PROBE_LAYER_NORM_EPS, Mamba3JepaConfig};
use crate::error::{Error, LoadError};
use crate::generate::Doubt;
use crate::linalg::{Linear, Matrix, math, norm};
use crate::loader::{Fields, Weights};
use crate::pooling::demand_finite;

/// The memory floor that lets every text through: the lowest cosine there is.
const NO_FLOOR: f32 = -1.0;

/// What phase 3 trains.
pub struct Recursion {
    config: Mamba3JepaConfig,
    /// Notices confusion.
    pub confusion_probe: ConfusionMonitor,
    /// Injects knowledge.
    pub injector: StateInjector,
    /// The memory's nearest text is injected when its cosine to the predicted embedding is at least this; -1 lets every
    /// text through.
    pub memory_floor: f32,
}

/// Pooled state -> probability that the model does not know: LayerNorm, then a perceptron with one hidden layer, which
/// may be told the decoder's doubt in its own answer too.
pub struct ConfusionMonitor {
    norm_weight: Vec<f32>,
    norm_bias: Vec<f32>,
    hidden: Linear,
    linear: Linear,
    /// Score from which on the model counts as confused.
    pub threshold: f32,
    /// Divides the logit: above 1 it makes scores less certain.
    pub temperature: f32,
    ema_decay: f32,
    hears_answer: bool,
}

/// h' = h + W k: knowledge added to the pooled state.
pub struct StateInjector {
    projection: Matrix,
}

impl Recursion {
    /// Reads `recursion.safetensors`.
    ///
    /// # Errors
    /// [`LoadError`] if the file holds another component, a tensor is missing, unknown or of another shape or type, or
    /// threshold, temperature or memory floor is a number that cannot be used.
    pub fn from_weights(weights: &Weights) -> Result<Recursion, LoadError> {
        let (mut fields, config) = Fields::open(weights, "recursion")?;
        let (width, hidden) = (config.predictor.d_model(), config.recursion.hidden_dim);
        let doubts = if config.recursion.hears_answer { size_of::<Doubt>() / size_of::<f32>() } else { 0 };
        let threshold = fields.scalar("confusion_probe.threshold", "a finite number", f32::is_finite)?;
        let is_divisor = |x: f32| x.is_finite() && x > 0.0;
        let temperature = fields.scalar("confusion_probe.temperature", "a finite number above 0", is_divisor)?;
        let memory_floor = match fields.version_at_least(2) {
            true => fields.scalar("memory_floor", "a finite number", f32::is_finite)?,
            false => NO_FLOOR,
        };
        let confusion_probe = ConfusionMonitor {
            norm_weight: fields.vector("confusion_probe.norm.weight", &[width])?,
            norm_bias: fields.vector("confusion_probe.norm.bias", &[width])?,
            hidden: fields.linear("confusion_probe.hidden", hidden, width + doubts)?,
            linear: fields.linear("confusion_probe.linear", 1, hidden)?,
            threshold,
            temperature,
            ema_decay: config.recursion.ema_decay as f32,
            hears_answer: config.recursion.hears_answer,
        };
        let projection = fields.matrix("injector.projection.weight", width, config.knowledge_dim())?;
        fields.finish()?;
        Ok(Recursion { config, confusion_probe, injector: StateInjector { projection }, memory_floor })
    }

    /// The configuration in the file's header.
    pub fn config(&self) -> &Mamba3JepaConfig {
        &self.config
    }
}

impl ConfusionMonitor {
    /// Whether it is told the doubt in the answer: then [`ConfusionMonitor::score`] needs it.
    pub fn hears_answer(&self) -> bool {
        self.hears_answer
    }

    /// P(confused), in [0, 1], of a pooled state (D) and of what the decoder answers greedily from it, if the monitor
    /// hears that: sigmoid(logit / temperature).
    ///
    /// # Errors
    /// [`Error::Input`] if `pooled` has another length, or `doubt` is missing or too much; [`Error::NotFinite`] if the
    /// score is not a number.
    pub fn score(&self, pooled: &[f32], doubt: Option<Doubt>) -> Result<f32, Error> {
        if doubt.is_some() != self.hears_answer {
            let (is, was) = if self.hears_answer { ("hears", "no") } else { ("does not hear", "a") };
            return Err(Error::Input(format!("the confusion monitor {is} the answer, but {was} doubt was given")));
        }
        let score = math::sigmoid(self.logit(&self.normed(pooled)?, doubt) / self.temperature);
        demand_finite(&[score], "the score of confusion")?;
        Ok(score)
    }

    /// Moving average of the scores over the turns of a conversation; with `previous` `None` the score starts it.
    pub fn smooth(&self, score: f32, previous: Option<f32>) -> f32 {
        previous.map_or(score, |previous| self.ema_decay * previous + (1.0 - self.ema_decay) * score)
    }

    /// LayerNorm of a pooled state (D).
    pub(crate) fn normed(&self, pooled: &[f32]) -> Result<Vec<f32>, Error> {
        check_pooled(pooled, self.norm_weight.len())?;
        let mut normed = vec![0.0; pooled.len()];
        norm::layer_norm(pooled, &self.norm_weight, &self.norm_bias, CONFUSION_PROBE_LAYER_NORM_EPS, &mut normed);
        Ok(normed)
    }

    /// The logit of confusion from a normed state (D), and doubt if there is.
    pub(crate) fn logit(&self, normed: &[f32], doubt: Option<Doubt>) -> f32 {
        let known = [normed, doubt.as_ref().map_or(&[], |doubt| &doubt[..])].concat();
        let mut hidden = vec![0.0; self.hidden.bias.len()];
        self.hidden.apply(&known, &mut hidden);
        for x in &mut hidden {
            *x = math::silu(*x);
        }
        let mut logit = [0.0];
        self.linear.apply(&hidden, &mut logit);
        logit[0]
    }
}

impl StateInjector {
    /// A pooled state (D) and a knowledge vector (K) to the pooled state with the knowledge (D).
    ///
    /// # Errors
    /// [`Error::Input`] if one of them has another length; [`Error::NotFinite`] if the sum is not finite.
    pub fn inject(&self, pooled: &[f32], knowledge: &[f32]) -> Result<Vec<f32>, Error> {
        check_pooled(pooled, self.projection.rows())?;
        if knowledge.len() != self.projection.cols() {
            return Err(Error::Input(format!(
                "knowledge vector of length {}, but this model takes {} (its knowledge_dim): embed a text with the \
                 model's own Y-Encoder, or train with that --knowledge-dim",
                knowledge.len(),
                self.projection.cols()
            )));
        }
        let mut injected = vec![0.0; pooled.len()];
        self.projection.apply(knowledge, &mut injected);
        for (injected, pooled) in injected.iter_mut().zip(pooled) {
            *injected += pooled;
        }
        demand_finite(&injected, "a pooled state with knowledge")?;
        Ok(injected)
    }
}

fn check_pooled(pooled: &[f32], width: usize) -> Result<(), Error> {
    match pooled.len() == width {
        true => Ok(()),
        false => Err(Error::Input(format!("a pooled state of length {}: expected {width}", pooled.len()))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Random, TinyModel};

    fn recursion(model: &TinyModel) -> Recursion {
        Recursion::from_weights(&Weights::from_bytes("recursion", &model.component("recursion")).unwrap()).unwrap()
    }

    #[test]
    fn the_score_is_its_formula() {
        let model = TinyModel::new();
        let probe = recursion(&model).confusion_probe;
        let weights = Weights::from_bytes("recursion", &model.component("recursion")).unwrap();
        let read = |name: &str| weights.to_f32(&format!("recursion.confusion_probe.{name}")).unwrap();
        let pooled = Random::new(1).normals(32);
        let mean = pooled.iter().sum::<f32>() / 32.0;
        let variance = pooled.iter().map(|x| (x - mean).powi(2)).sum::<f32>() / 32.0;
        let (weight, bias) = (read("norm.weight"), read("norm.bias"));
        let normed: Vec<f32> =
            (0..32).map(|i| (pooled[i] - mean) / (variance + 1e-5).sqrt() * weight[i] + bias[i]).collect();
        let product = |rows: &[f32], x: &[f32]| -> Vec<f32> {
            rows.chunks_exact(x.len()).map(|row| row.iter().zip(x).map(|(a, b)| a * b).sum()).collect()
        };
        let hidden: Vec<f32> = product(&read("hidden.weight"), &normed)
            .iter()
            .zip(read("hidden.bias"))
            .map(|(x, bias)| (x + bias) / (1.0 + (-(x + bias)).exp()))
            .collect();
        let logit = product(&read("linear.weight"), &hidden)[0] + read("linear.bias")[0];
        let expected = 1.0 / (1.0 + (-logit / 1.7).exp());
        assert!((probe.score(&pooled, None).unwrap() - expected).abs() < 1e-6);
        assert_eq!((probe.threshold, probe.temperature), (0.5, 1.7));
    }

    #[test]
    fn the_smoothed_score_starts_with_the_first() {
        let probe = recursion(&TinyModel::new().set("/recursion/ema_decay", 0.75)).confusion_probe;
        assert_eq!(probe.smooth(0.5, None), 0.5);
        assert_eq!(probe.smooth(1.0, Some(0.5)), 0.625);
    }

    #[test]
    fn knowledge_is_added_through_its_projection() {
        for model in [TinyModel::new(), TinyModel::new().set("/recursion/knowledge_dim", 7)] {
            let injector = recursion(&model).injector;
            let weights = Weights::from_bytes("recursion", &model.component("recursion")).unwrap();
            let projection = weights.to_f32("recursion.injector.projection.weight").unwrap();
            let length = projection.len() / 32;
            let (pooled, knowledge) = (Random::new(2).normals(32), Random::new(3).normals(length));
            let injected = injector.inject(&pooled, &knowledge).unwrap();
            for ((injected, pooled), row) in injected.iter().zip(&pooled).zip(projection.chunks_exact(length)) {
                let added: f32 = row.iter().zip(&knowledge).map(|(a, b)| a * b).sum();
                assert!((injected - pooled - added).abs() < 1e-5);
            }
            let error = injector.inject(&pooled, &knowledge[1..]).unwrap_err().to_string();
            assert!(error.contains(&format!("this model takes {length} (its knowledge_dim)")), "{error}");
            assert!(injector.inject(&pooled[1..], &knowledge).is_err());
        }
    }
}
