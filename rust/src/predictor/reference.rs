//! One sample's prediction written out plainly, in f64, from the weights as the files have them: what the tests hold the
//! predictor against.

use std::collections::BTreeMap;

use super::{Prediction, PredictorInput};
use crate::config::Mamba3JepaConfig;
use crate::loader::Weights;
use crate::mamba3::sequential::{Reference as Layer, rms_norm, sigmoid, times};
use crate::testing::TinyModel;

/// The weights of predictor and gates under their names in the files.
pub(super) struct Reference {
    order: String,
    pooling: String,
    config: Mamba3JepaConfig,
    weights: BTreeMap<String, Vec<f64>>,
    layers: Vec<Layer>,
    /// None, or one for each layer.
    reverse_layers: Vec<Layer>,
}

/// The states of one part, and whether it is the question.
struct Part {
    is_question: bool,
    rows: Vec<Vec<f64>>,
}

impl Reference {
    pub(super) fn new(model: &TinyModel) -> Reference {
        let [predictor, gates] = ["predictor", "angn"].map(|name| Weights::from_bytes(name, &model.component(name)));
        let (predictor, gates) = (predictor.unwrap(), gates.unwrap());
        let config = predictor.config().unwrap();
        let said = |key: &str| model.config["predictor"][key].as_str().unwrap().to_owned();
        let layer = |kind, i| Layer::new(&config.predictor.layer, &predictor, &format!("predictor.{kind}.{i}."));
        let layers = |kind| (0..config.predictor.n_layers).map(|i| layer(kind, i)).collect::<Vec<_>>();
        let reverse = model.config["predictor"]["bidirectional"] == serde_json::json!(true);
        let numbers = |weights: &Weights, key: &str| weights.to_f32(key).unwrap().into_iter().map(f64::from).collect();
        let keys = |weights: &Weights| -> Vec<(String, Vec<f64>)> {
            weights.tensors().keys().map(|key| (key.clone(), numbers(weights, key))).collect()
        };
        Reference {
            order: said("order"),
            pooling: said("pooling"),
            weights: keys(&predictor).into_iter().chain(keys(&gates)).collect(),
            layers: layers("layers"),
            reverse_layers: if reverse { layers("reverse_layers") } else { Vec::new() },
            config,
        }
    }

    pub(super) fn predict(&self, sample: &PredictorInput<'_>, gated: bool) -> Prediction {
        let mut parts = self.parts(sample);
        let lengths: Vec<usize> = parts.iter().map(|part| part.rows.len()).collect();
        let mut h: Vec<Vec<f64>> = parts.iter_mut().flat_map(|part| part.rows.drain(..)).collect();
        for i in 0..self.layers.len() {
            if gated {
                h = h.iter().map(|row| self.gated(i, row)).collect();
            }
            let norm = &self.weights[&format!("predictor.norms.{i}.weight")];
            let mut u: Vec<Vec<f64>> = h.iter().map(|row| rms_norm(row, norm)).collect();
            let mut added = self.mixed(&self.layers[i], &u);
            if let Some(reverse) = self.reverse_layers.get(i) {
                u.reverse();
                let from_right = self.mixed(reverse, &u).into_iter().rev();
                added = added.iter().zip(from_right).map(|(a, b)| sum(a, &b)).collect();
            }
            h = h.iter().zip(&added).map(|(h, added)| sum(h, added)).collect();
        }
        let norm = &self.weights["predictor.final_norm.weight"];
        let mut states = h.iter().map(|row| rms_norm(row, norm));
        for (part, length) in parts.iter_mut().zip(lengths) {
            part.rows = states.by_ref().take(length).collect();
        }
        let pooled = self.pooled(&parts);
        let embedding = self.linear("pred_head", &pooled);
        let length = embedding.iter().map(|x| x * x).sum::<f64>().sqrt();
        let narrow = |numbers: &[f64], by: f64| numbers.iter().map(|x| (x / by) as f32).collect();
        Prediction { embedding: narrow(&embedding, length), pooled: narrow(&pooled, 1.0) }
    }

    /// The projected tokens of the parts that a sample has, first to last.
    fn parts(&self, sample: &PredictorInput<'_>) -> Vec<Part> {
        let rows = |name: &str, tokens: &[f32], width: usize| -> Vec<Vec<f64>> {
            tokens.chunks_exact(width).map(|row| self.linear(name, &wide(row))).collect()
        };
        let (visual, query) = (self.config.vision.hidden_size, self.config.y_encoder.d_model());
        let part = |name: &str| match name {
            "question" => Part { is_question: true, rows: rows("query_proj", sample.query, query) },
            _ => Part { is_question: false, rows: rows("vision_proj", sample.visual.unwrap_or(&[]), visual) },
        };
        self.order.split('_').map(part).filter(|part| !part.rows.is_empty()).collect()
    }

    fn pooled(&self, parts: &[Part]) -> Vec<f64> {
        let all: Vec<&[f64]> = parts.iter().flat_map(|part| &part.rows).map(Vec::as_slice).collect();
        let of_part = |part: &Part| mean(&part.rows.iter().map(Vec::as_slice).collect::<Vec<_>>());
        match self.pooling.as_str() {
            "all" => mean(&all),
            "attention" => {
                let score = &self.weights["predictor.pool_score.weight"];
                let weights: Vec<f64> = all.iter().map(|row| times(score, row)[0].exp()).collect();
                let weighted = |(row, weight): (&&[f64], &f64)| row.iter().map(|x| x * weight).collect::<Vec<_>>();
                let rows: Vec<Vec<f64>> = all.iter().zip(&weights).map(weighted).collect();
                let sums = rows.iter().skip(1).fold(rows[0].clone(), |total, row| sum(&total, row));
                sums.iter().map(|x| x / weights.iter().sum::<f64>()).collect()
            }
            "question" => of_part(parts.iter().rfind(|part| part.is_question).unwrap()),
            _ => mean(&all[all.len() - 1..]),
        }
    }

    fn gated(&self, layer: usize, row: &[f64]) -> Vec<f64> {
        let [weight, bias] = ["weight", "bias"].map(|kind| &self.weights[&format!("angn.gates.{layer}.{kind}")]);
        row.iter().zip(weight).zip(bias).map(|((h, weight), bias)| h * sigmoid(weight * h + bias)).collect()
    }

    fn mixed(&self, layer: &Layer, rows: &[Vec<f64>]) -> Vec<Vec<f64>> {
        let u: Vec<f32> = rows.iter().flatten().map(|&x| x as f32).collect();
        layer.run(&u).0.chunks_exact(self.config.predictor.d_model()).map(<[f64]>::to_vec).collect()
    }

    fn linear(&self, name: &str, x: &[f64]) -> Vec<f64> {
        let [weight, bias] = ["weight", "bias"].map(|kind| &self.weights[&format!("predictor.{name}.{kind}")]);
        sum(&times(weight, x), bias)
    }
}

fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&x| f64::from(x)).collect()
}

fn sum(a: &[f64], b: &[f64]) -> Vec<f64> {
    a.iter().zip(b).map(|(a, b)| a + b).collect()
}

fn mean(rows: &[&[f64]]) -> Vec<f64> {
    let total = rows.iter().skip(1).fold(rows[0].to_vec(), |total, row| sum(&total, row));
    total.iter().map(|x| x / rows.len() as f64).collect()
}
