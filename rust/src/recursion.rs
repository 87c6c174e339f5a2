//! Recursion on the predictor's pooled state: notice confusion, inject knowledge, look again.
//!
//! Letters: D width of the pooled state, K length of a knowledge vector, E embedding width, R width of the retriever,
//! T tools.

use serde::Serialize;

use crate::config::{CONFUSION_PROBE_LAYER_NORM_EPS, Mamba3JepaConfig};
use crate::episodes::EpisodeFinder;
use crate::error::{Error, LoadError};
use crate::generate::{Doubt, surest_doubt};
use crate::linalg::{Linear, Matrix, math, norm};
use crate::loader::{Fields, Weights};
use crate::pooling::demand_finite;

/// The memory floor that lets every text through: the lowest cosine there is.
const NO_FLOOR: f32 = -1.0;

/// Added to the mean square of knowledge and of what the retriever reads: of an embedding of unit length the mean square
/// is one over its length.
const RMS_EPS: f32 = 1e-12;

/// A shorter output of the retriever is divided by this, as PyTorch's `normalize` does.
const NORMALIZE_EPS: f32 = 1e-12;

/// What phase 3 trains.
pub struct Recursion {
    config: Mamba3JepaConfig,
    /// Notices confusion.
    pub confusion_probe: ConfusionMonitor,
    /// Injects knowledge.
    pub injector: StateInjector,
    /// Judges whether what was told answers what was asked; `None`: everything is taken for an answer.
    pub knowledge_probe: Option<KnowledgeProbe>,
    /// Chooses among tools; `None`: the model knows none.
    pub tool_selector: Option<ToolSelector>,
    /// Finds the texts of a memory that answer a question; `None`: the predicted embedding looks for them.
    pub retriever: Option<KnowledgeRetriever>,
    /// The memory's nearest text is injected when its cosine is at least this: its retriever's vector's to the question's
    /// or, without a retriever, its embedding's to the predicted one; -1 lets every text through.
    pub memory_floor: f32,
    /// Finds the episodes of a memory; `None`: the model was trained without.
    pub episodes: Option<EpisodeFinder>,
}

/// Pooled state -> probability that the model does not know: LayerNorm, then a perceptron with one hidden layer, which
/// may be told the decoder's doubt in its own answer too.
pub struct ConfusionMonitor {
    norm: LayerNorm,
    hidden: Linear,
    linear: Linear,
    /// Score from which on the model counts as confused.
    pub threshold: f32,
    /// Divides the logit: above 1 it makes scores less certain.
    pub temperature: f32,
    ema_decay: f32,
    hears_answer: bool,
}

/// What tells of confusion.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Signal {
    /// The pooled state: this picture and question are not like those that the model knows.
    State,
    /// The decoder's doubt in its own answer: had it been sure, the model would not count as confused.
    Answer,
    /// Only the turns before, where those with a question are judged together.
    Before,
}

/// h' = h + W k: knowledge added to the pooled state.
///
/// Where the configuration says `injector_sees_state`, h' = h + W k + V silu(U [LayerNorm(h); k / rms(k)] + b): what a
/// sentence adds then depends on what was asked.
pub struct StateInjector {
    projection: Matrix,
    seen: Option<SeenState>,
}

/// What an injector that sees the state adds.
struct SeenState {
    norm: LayerNorm,
    hidden: Linear,
    output: Matrix,
}

/// Pooled state and what was told -> whether that answers what was asked: a perceptron with one hidden layer.
///
/// What is false answers too: who is confused cannot know better.
pub struct KnowledgeProbe(Perceptron);

/// Pooled state -> which of T tools to call: a perceptron with one hidden layer.
pub struct ToolSelector(Perceptron);

/// linear(silu(hidden([LayerNorm(h); more]))).
struct Perceptron {
    norm: LayerNorm,
    hidden: Linear,
    linear: Linear,
}

/// Finds the texts of a memory that answer a question: two perceptrons, whose outputs are compared by cosine.
pub struct KnowledgeRetriever {
    /// Y-Encoder embeddings of questions to what looks up.
    pub question: RetrieverTower,
    /// Y-Encoder embeddings of texts to what is looked up.
    pub text: RetrieverTower,
}

/// One half of a [`KnowledgeRetriever`]: an embedding, of root mean square 1, through a perceptron with one hidden layer to
/// a unit vector.
pub struct RetrieverTower {
    hidden: Linear,
    output: Linear,
}

struct LayerNorm {
    weight: Vec<f32>,
    bias: Vec<f32>,
}

impl Recursion {
    /// Reads `recursion.safetensors`.
    ///
    /// # Errors
    /// [`LoadError`] if the file holds another component, a tensor is missing, unknown or of another shape or type, or
    /// threshold, temperature or a floor is a number that cannot be used.
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
            norm: LayerNorm::read(&mut fields, "confusion_probe.norm", width)?,
            hidden: fields.linear("confusion_probe.hidden", hidden, width + doubts)?,
            linear: fields.linear("confusion_probe.linear", 1, hidden)?,
            threshold,
            temperature,
            ema_decay: config.recursion.ema_decay as f32,
            hears_answer: config.recursion.hears_answer,
        };
        let injector = StateInjector::read(&mut fields, &config)?;
        let knowledge = config.knowledge_dim();
        let knowledge_probe = match config.recursion.weighs_knowledge {
            true => Some(KnowledgeProbe(Perceptron::read(&mut fields, "knowledge_probe", &config, knowledge, 1)?)),
            false => None,
        };
        let tool_selector = match config.recursion.tools.len() {
            0 => None,
            tools => Some(ToolSelector(Perceptron::read(&mut fields, "tool_selector", &config, 0, tools)?)),
        };
        let retriever = match config.recursion.retriever_dim {
            0 => None,
            _ => Some(KnowledgeRetriever {
                question: RetrieverTower::read(&mut fields, "retriever.question", &config)?,
                text: RetrieverTower::read(&mut fields, "retriever.text", &config)?,
            }),
        };
        let episodes = match config.recursion.episodes {
            false => None,
            true => Some(EpisodeFinder::read(&mut fields, &config)?),
        };
        fields.finish()?;
        Ok(Recursion {
            config,
            confusion_probe,
            injector,
            knowledge_probe,
            tool_selector,
            retriever,
            memory_floor,
            episodes,
        })
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

    /// Moving average of the scores over the turns of a question; with `previous` `None` the score starts it.
    pub fn smooth(&self, score: f32, previous: Option<f32>) -> f32 {
        previous.map_or(score, |previous| self.ema_decay * previous + (1.0 - self.ema_decay) * score)
    }

    /// What tells of confusion at a pooled state (D) that counts as confused: the answer, if the surest there is in its
    /// place would not leave the score over the threshold.
    ///
    /// # Errors
    /// [`Error::Input`] if `pooled` has another length; [`Error::NotFinite`] if the score is not a number.
    pub fn signal(&self, pooled: &[f32]) -> Result<Signal, Error> {
        check_pooled(pooled, self.norm.weight.len())?;
        if self.hears_answer && self.score(pooled, Some(surest_doubt()))? <= self.threshold {
            return Ok(Signal::Answer);
        }
        Ok(Signal::State)
    }

    /// LayerNorm of a pooled state (D).
    pub(crate) fn normed(&self, pooled: &[f32]) -> Result<Vec<f32>, Error> {
        check_pooled(pooled, self.norm.weight.len())?;
        Ok(self.norm.apply(pooled))
    }

    /// The logit of confusion from a normed state (D), and doubt if there is.
    pub(crate) fn logit(&self, normed: &[f32], doubt: Option<Doubt>) -> f32 {
        let known = [normed, doubt.as_ref().map_or(&[], |doubt| &doubt[..])].concat();
        let mut logit = [0.0];
        self.linear.apply(&activated(&self.hidden, &known), &mut logit);
        logit[0]
    }
}

impl StateInjector {
    fn read(fields: &mut Fields<'_>, config: &Mamba3JepaConfig) -> Result<StateInjector, LoadError> {
        let (width, hidden, knowledge) =
            (config.predictor.d_model(), config.recursion.hidden_dim, config.knowledge_dim());
        let projection = fields.matrix("injector.projection.weight", width, knowledge)?;
        let seen = match config.recursion.injector_sees_state {
            false => None,
            true => Some(SeenState {
                norm: LayerNorm::read(fields, "injector.norm", width)?,
                hidden: fields.linear("injector.hidden", hidden, width + knowledge)?,
                output: fields.matrix("injector.output.weight", width, hidden)?,
            }),
        };
        Ok(StateInjector { projection, seen })
    }

    /// A pooled state (D) and a knowledge vector (K) to the pooled state with the knowledge (D).
    ///
    /// # Errors
    /// [`Error::Input`] if one of them has another length; [`Error::NotFinite`] if the sum is not finite.
    pub fn inject(&self, pooled: &[f32], knowledge: &[f32]) -> Result<Vec<f32>, Error> {
        check_pooled(pooled, self.projection.rows())?;
        check_knowledge(knowledge, self.projection.cols())?;
        let mut injected = pooled.to_vec();
        let mut added = vec![0.0; pooled.len()];
        self.projection.apply(knowledge, &mut added);
        add(&mut injected, &added);
        if let Some(SeenState { norm, hidden, output }) = &self.seen {
            let both = [norm.apply(pooled), root_mean_square_normed(knowledge)].concat();
            output.apply(&activated(hidden, &both), &mut added);
            add(&mut injected, &added);
        }
        demand_finite(&injected, "a pooled state with knowledge")?;
        Ok(injected)
    }
}

impl KnowledgeProbe {
    /// P(knowledge (K) answers what was asked), in [0, 1]; `pooled` (D) is the state before it was told.
    ///
    /// # Errors
    /// [`Error::Input`] if one of them has another length; [`Error::NotFinite`] if the probability is not a number.
    pub fn score(&self, pooled: &[f32], knowledge: &[f32]) -> Result<f32, Error> {
        let width = self.0.norm.weight.len();
        check_pooled(pooled, width)?;
        check_knowledge(knowledge, self.0.hidden.weight.cols() - width)?;
        let score = math::sigmoid(self.0.apply(pooled, &root_mean_square_normed(knowledge))[0]);
        demand_finite(&[score], "the probability that knowledge answers")?;
        Ok(score)
    }
}

impl ToolSelector {
    /// The probabilities (T) of the tools at a pooled state (D), in the order of the configuration's `recursion.tools`.
    ///
    /// # Errors
    /// [`Error::Input`] if `pooled` has another length; [`Error::NotFinite`] if a probability is not a number.
    pub fn score(&self, pooled: &[f32]) -> Result<Vec<f32>, Error> {
        check_pooled(pooled, self.0.norm.weight.len())?;
        let probabilities = softmax(&self.0.apply(pooled, &[]));
        demand_finite(&probabilities, "the choice of a tool")?;
        Ok(probabilities)
    }
}

impl Perceptron {
    /// `more` numbers come behind the pooled state.
    fn read(
        fields: &mut Fields<'_>,
        name: &str,
        config: &Mamba3JepaConfig,
        more: usize,
        outputs: usize,
    ) -> Result<Perceptron, LoadError> {
        let (width, hidden) = (config.predictor.d_model(), config.recursion.hidden_dim);
        Ok(Perceptron {
            norm: LayerNorm::read(fields, &format!("{name}.norm"), width)?,
            hidden: fields.linear(&format!("{name}.hidden"), hidden, width + more)?,
            linear: fields.linear(&format!("{name}.linear"), outputs, hidden)?,
        })
    }

    fn apply(&self, pooled: &[f32], more: &[f32]) -> Vec<f32> {
        let mut logits = vec![0.0; self.linear.bias.len()];
        self.linear.apply(&activated(&self.hidden, &[&self.norm.apply(pooled), more].concat()), &mut logits);
        logits
    }
}

impl RetrieverTower {
    fn read(fields: &mut Fields<'_>, name: &str, config: &Mamba3JepaConfig) -> Result<RetrieverTower, LoadError> {
        let hidden = config.recursion.hidden_dim;
        Ok(RetrieverTower {
            hidden: fields.linear(&format!("{name}.hidden"), hidden, config.embed_dim)?,
            output: fields.linear(&format!("{name}.output"), config.recursion.retriever_dim, hidden)?,
        })
    }

    /// The unit vector (R,) of an embedding (E,) that the Y-Encoder made.
    ///
    /// # Errors
    /// [`Error::Input`] if `embedding` has another length; [`Error::NotFinite`] if the vector is not finite.
    pub fn apply(&self, embedding: &[f32]) -> Result<Vec<f32>, Error> {
        let expected = self.hidden.weight.cols();
        if embedding.len() != expected {
            let found = embedding.len();
            return Err(Error::Input(format!("an embedding of length {found}, but the retriever takes {expected}")));
        }
        let mut vector = vec![0.0; self.output.bias.len()];
        self.output.apply(&activated(&self.hidden, &root_mean_square_normed(embedding)), &mut vector);
        let length = vector.iter().map(|x| x * x).sum::<f32>().sqrt().max(NORMALIZE_EPS);
        vector.iter_mut().for_each(|x| *x /= length);
        demand_finite(&vector, "what the retriever makes of an embedding")?;
        Ok(vector)
    }
}

impl LayerNorm {
    fn read(fields: &mut Fields<'_>, name: &str, width: usize) -> Result<LayerNorm, LoadError> {
        let weight = fields.vector(&format!("{name}.weight"), &[width])?;
        Ok(LayerNorm { weight, bias: fields.vector(&format!("{name}.bias"), &[width])? })
    }

    fn apply(&self, x: &[f32]) -> Vec<f32> {
        let mut normed = vec![0.0; x.len()];
        norm::layer_norm(x, &self.weight, &self.bias, CONFUSION_PROBE_LAYER_NORM_EPS, &mut normed);
        normed
    }
}

/// silu(hidden(x)).
fn activated(hidden: &Linear, x: &[f32]) -> Vec<f32> {
    let mut activated = vec![0.0; hidden.bias.len()];
    hidden.apply(x, &mut activated);
    activated.iter_mut().for_each(|x| *x = math::silu(*x));
    activated
}

/// x with elements of root mean square 1; zeros stay zeros.
fn root_mean_square_normed(x: &[f32]) -> Vec<f32> {
    let mut normed = vec![0.0; x.len()];
    norm::rms_norm(x, &vec![1.0; x.len()], RMS_EPS, &mut normed);
    normed
}

fn add(to: &mut [f32], added: &[f32]) {
    to.iter_mut().zip(added).for_each(|(to, added)| *to += added);
}

fn softmax(logits: &[f32]) -> Vec<f32> {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let powers: Vec<f32> = logits.iter().map(|logit| (logit - largest).exp()).collect();
    let sum: f32 = powers.iter().sum();
    powers.iter().map(|power| power / sum).collect()
}

fn check_knowledge(knowledge: &[f32], expected: usize) -> Result<(), Error> {
    match knowledge.len() == expected {
        true => Ok(()),
        false => Err(Error::Input(format!(
            "knowledge vector of length {}, but this model takes {expected} (its knowledge_dim): embed a text with the \
             model's own Y-Encoder, or train with that --knowledge-dim",
            knowledge.len()
        ))),
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

    /// What is read of a model, and its tensors by their names.
    fn read(model: &TinyModel) -> (Recursion, impl Fn(&str) -> Vec<f32> + use<>) {
        let weights = Weights::from_bytes("recursion", &model.component("recursion")).unwrap();
        let recursion = Recursion::from_weights(&weights).unwrap();
        (recursion, move |name: &str| weights.to_f32(&format!("recursion.{name}")).unwrap())
    }

    fn product(rows: &[f32], x: &[f32]) -> Vec<f32> {
        rows.chunks_exact(x.len()).map(|row| row.iter().zip(x).map(|(a, b)| a * b).sum()).collect()
    }

    fn sum(a: &[f32], b: &[f32]) -> Vec<f32> {
        a.iter().zip(b).map(|(a, b)| a + b).collect()
    }

    /// LayerNorm by its formula.
    fn normed(x: &[f32], weight: &[f32], bias: &[f32]) -> Vec<f32> {
        let n = x.len() as f32;
        let mean = x.iter().sum::<f32>() / n;
        let variance = x.iter().map(|x| (x - mean).powi(2)).sum::<f32>() / n;
        (0..x.len()).map(|i| (x[i] - mean) / (variance + 1e-5).sqrt() * weight[i] + bias[i]).collect()
    }

    /// x by its root mean square.
    fn scaled(x: &[f32]) -> Vec<f32> {
        let square = x.iter().map(|x| x * x).sum::<f32>() / x.len() as f32;
        x.iter().map(|x| x / (square + 1e-12).sqrt()).collect()
    }

    /// silu(W x + b).
    fn hidden(weight: &[f32], bias: &[f32], x: &[f32]) -> Vec<f32> {
        sum(&product(weight, x), bias).iter().map(|x| x / (1.0 + (-x).exp())).collect()
    }

    fn assert_close(found: &[f32], expected: &[f32]) {
        assert_eq!(found.len(), expected.len());
        assert!(found.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-5), "{found:?}\n{expected:?}");
    }

    #[test]
    fn the_score_is_its_formula() {
        for (model, doubt) in
            [(TinyModel::new(), None), (TinyModel::new().recursion("hears_answer", true), Some([-2.0, 0.7]))]
        {
            let (Recursion { confusion_probe: probe, .. }, read) = read(&model);
            let read = |name: &str| read(&format!("confusion_probe.{name}"));
            let pooled = Random::new(1).normals(32);
            let mut known = normed(&pooled, &read("norm.weight"), &read("norm.bias"));
            known.extend(doubt.iter().flatten());
            let hidden = hidden(&read("hidden.weight"), &read("hidden.bias"), &known);
            let logit = product(&read("linear.weight"), &hidden)[0] + read("linear.bias")[0];
            let expected = 1.0 / (1.0 + (-logit / 1.7).exp());
            assert!((probe.score(&pooled, doubt).unwrap() - expected).abs() < 1e-6);
            assert_eq!((probe.threshold, probe.temperature), (0.5, 1.7));
            let other = if doubt.is_none() { Some([0.0, 0.0]) } else { None };
            assert!(probe.score(&pooled, other).is_err());
        }
    }

    #[test]
    fn the_smoothed_score_starts_with_the_first() {
        let (Recursion { confusion_probe: probe, .. }, _) = read(&TinyModel::new().set("/recursion/ema_decay", 0.75));
        assert_eq!(probe.smooth(0.5, None), 0.5);
        assert_eq!(probe.smooth(1.0, Some(0.5)), 0.625);
    }

    #[test]
    fn the_signal_is_the_answer_where_a_sure_one_would_calm() {
        let pooled = Random::new(4).normals(32);
        let (Recursion { confusion_probe: mut probe, .. }, _) = read(&TinyModel::new().recursion("hears_answer", true));
        let sure = probe.score(&pooled, Some([1e-5_f32.ln(); 2])).unwrap();
        for (threshold, signal) in
            [(sure.next_up(), Signal::Answer), (sure, Signal::Answer), (sure.next_down(), Signal::State)]
        {
            probe.threshold = threshold;
            assert_eq!(probe.signal(&pooled).unwrap(), signal);
        }
        let (Recursion { confusion_probe: deaf, .. }, _) = read(&TinyModel::new());
        assert_eq!(deaf.signal(&pooled).unwrap(), Signal::State);
        assert!(probe.signal(&pooled[1..]).is_err() && deaf.signal(&pooled[1..]).is_err());
        assert_eq!(serde_json::to_string(&[Signal::State, Signal::Answer]).unwrap(), r#"["state","answer"]"#);
    }

    #[test]
    fn knowledge_is_added_through_its_projection() {
        for model in [TinyModel::new(), TinyModel::new().set("/recursion/knowledge_dim", 7)] {
            let (Recursion { injector, .. }, read) = read(&model);
            let projection = read("injector.projection.weight");
            let length = projection.len() / 32;
            let (pooled, knowledge) = (Random::new(2).normals(32), Random::new(3).normals(length));
            let injected = injector.inject(&pooled, &knowledge).unwrap();
            assert_close(&injected, &sum(&pooled, &product(&projection, &knowledge)));
            let error = injector.inject(&pooled, &knowledge[1..]).unwrap_err().to_string();
            assert!(error.contains(&format!("this model takes {length} (its knowledge_dim)")), "{error}");
            assert!(injector.inject(&pooled[1..], &knowledge).is_err());
        }
    }

    #[test]
    fn what_knowledge_adds_may_depend_on_the_state() {
        for model in [TinyModel::new(), TinyModel::new().set("/recursion/knowledge_dim", 7)] {
            let (Recursion { injector, .. }, read) = read(&model.recursion("injector_sees_state", true));
            let read = |name: &str| read(&format!("injector.{name}"));
            let projection = read("projection.weight");
            let length = projection.len() / 32;
            for knowledge in [Random::new(3).normals(length), vec![0.0; length]] {
                let pooled = Random::new(2).normals(32);
                let state = normed(&pooled, &read("norm.weight"), &read("norm.bias"));
                let both = [state, scaled(&knowledge)].concat();
                let hidden = hidden(&read("hidden.weight"), &read("hidden.bias"), &both);
                let added = sum(&product(&projection, &knowledge), &product(&read("output.weight"), &hidden));
                assert_close(&injector.inject(&pooled, &knowledge).unwrap(), &sum(&pooled, &added));
            }
        }
    }

    #[test]
    fn what_was_told_is_weighed() {
        assert!(read(&TinyModel::new()).0.knowledge_probe.is_none());
        for model in [TinyModel::new(), TinyModel::new().set("/recursion/knowledge_dim", 7)] {
            let (Recursion { knowledge_probe, .. }, read) = read(&model.recursion("weighs_knowledge", true));
            let probe = knowledge_probe.unwrap();
            let read = |name: &str| read(&format!("knowledge_probe.{name}"));
            let length = read("hidden.weight").len() / 40 - 32;
            let pooled = Random::new(2).normals(32);
            for knowledge in [Random::new(3).normals(length), vec![0.0; length]] {
                let state = normed(&pooled, &read("norm.weight"), &read("norm.bias"));
                let both = [state, scaled(&knowledge)].concat();
                let hidden = hidden(&read("hidden.weight"), &read("hidden.bias"), &both);
                let logit = product(&read("linear.weight"), &hidden)[0] + read("linear.bias")[0];
                assert_close(&[probe.score(&pooled, &knowledge).unwrap()], &[1.0 / (1.0 + (-logit).exp())]);
            }
            let error = probe.score(&pooled, &vec![0.0; length + 1]).unwrap_err().to_string();
            assert!(error.contains(&format!("this model takes {length} (its knowledge_dim)")), "{error}");
            assert!(probe.score(&pooled[1..], &vec![0.0; length]).is_err());
            assert!(matches!(probe.score(&[f32::NAN; 32], &vec![0.0; length]), Err(Error::NotFinite(_))));
        }
    }

    #[test]
    fn the_selector_gives_each_tool_a_probability() {
        assert!(read(&TinyModel::new()).0.tool_selector.is_none());
        let model = TinyModel::new().recursion("tools", serde_json::json!(["memory", "calculator", "x"]));
        let (Recursion { tool_selector, .. }, read) = read(&model);
        let selector = tool_selector.unwrap();
        let read = |name: &str| read(&format!("tool_selector.{name}"));
        let pooled = Random::new(2).normals(32);
        let state = normed(&pooled, &read("norm.weight"), &read("norm.bias"));
        let hidden = hidden(&read("hidden.weight"), &read("hidden.bias"), &state);
        let logits = sum(&product(&read("linear.weight"), &hidden), &read("linear.bias"));
        let total: f32 = logits.iter().map(|logit| logit.exp()).sum();
        let expected: Vec<f32> = logits.iter().map(|logit| logit.exp() / total).collect();
        assert_close(&selector.score(&pooled).unwrap(), &expected);
        assert!(expected[0] != expected[1] && expected.len() == 3);
        assert!(matches!(selector.score(&pooled[1..]), Err(Error::Input(_))));
        assert!(matches!(selector.score(&[f32::NAN; 32]), Err(Error::NotFinite(_))));
    }

    #[test]
    fn the_retriever_makes_unit_vectors() {
        assert!(read(&TinyModel::new()).0.retriever.is_none());
        let (Recursion { retriever, .. }, read) = read(&TinyModel::new().recursion("retriever_dim", 9));
        let retriever = retriever.unwrap();
        for (name, tower) in [("question", &retriever.question), ("text", &retriever.text)] {
            let read = |part: &str| read(&format!("retriever.{name}.{part}"));
            for embedding in [Random::new(5).normals(24), vec![0.0; 24]] {
                let hidden = hidden(&read("hidden.weight"), &read("hidden.bias"), &scaled(&embedding));
                let output = sum(&product(&read("output.weight"), &hidden), &read("output.bias"));
                let length = output.iter().map(|x| x * x).sum::<f32>().sqrt();
                let expected: Vec<f32> = output.iter().map(|x| x / length).collect();
                assert_close(&tower.apply(&embedding).unwrap(), &expected);
            }
            let error = tower.apply(&[0.0; 23]).unwrap_err().to_string();
            assert_eq!(error, "an embedding of length 23, but the retriever takes 24");
            assert!(matches!(tower.apply(&[f32::NAN; 24]), Err(Error::NotFinite(_))));
        }
    }
}
