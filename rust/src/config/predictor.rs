//! The configuration of the predictor: its backbone, what it reads in which order, and what of it is pooled.

use serde::{Deserialize, Serialize};

use super::{BackboneConfig, Mamba3Config, is_default};

/// What the predictor reads, first to last. Unless it is bidirectional, a state knows only what stands before it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Order {
    /// The picture, then the question; so it was before there was a choice.
    #[default]
    VisualQuestion,
    /// The question, then the picture.
    QuestionVisual,
    /// The question, the picture, and the question again.
    QuestionVisualQuestion,
}

/// One of the things that the predictor reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// The visual tokens; a sample without a picture has none.
    Visual,
    /// The tokens of the question.
    Question,
}

impl Order {
    /// What is read, first to last.
    pub fn parts(self) -> &'static [Part] {
        match self {
            Order::VisualQuestion => &[Part::Visual, Part::Question],
            Order::QuestionVisual => &[Part::Question, Part::Visual],
            Order::QuestionVisualQuestion => &[Part::Question, Part::Visual, Part::Question],
        }
    }

    /// How often a part is read.
    pub fn count(self, part: Part) -> usize {
        self.parts().iter().filter(|&&read| read == part).count()
    }
}

/// Of which positions the pooled state is the mean.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Pooling {
    /// Of all; so it was before there was a choice.
    #[default]
    All,
    /// Of all, with learned weights.
    Attention,
    /// Of the last question.
    Question,
    /// Of the last position alone.
    Last,
}

/// The predictor: a [`BackboneConfig`], in which order it reads picture and question, and how their states are pooled.
///
/// Files leave out what is as it was before there was a choice.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PredictorConfig {
    /// [`BackboneConfig::n_layers`].
    pub n_layers: usize,
    /// [`BackboneConfig::layer`].
    pub layer: Mamba3Config,
    /// [`BackboneConfig::mlp_dim`].
    #[serde(default, skip_serializing_if = "is_default")]
    pub mlp_dim: usize,
    /// What it reads, first to last.
    #[serde(default, skip_serializing_if = "is_default")]
    pub order: Order,
    /// Of which positions the pooled state is the mean.
    #[serde(default, skip_serializing_if = "is_default")]
    pub pooling: Pooling,
    /// Whether every layer has a second one, with weights of its own, that reads from the right.
    #[serde(default, skip_serializing_if = "is_default")]
    pub bidirectional: bool,
    /// It reads the mean of so many by so many neighbouring visual tokens as one; 1: each by itself.
    #[serde(default = "one", skip_serializing_if = "is_one")]
    pub visual_pool: usize,
}

fn one() -> usize {
    1
}

fn is_one(pool: &usize) -> bool {
    *pool == one()
}

impl PredictorConfig {
    /// Width D of the residual stream.
    pub fn d_model(&self) -> usize {
        self.layer.d_model
    }

    /// The stack of layers that read from the left.
    pub fn backbone(&self) -> BackboneConfig {
        BackboneConfig { n_layers: self.n_layers, layer: self.layer.clone(), mlp_dim: self.mlp_dim }
    }

    pub(super) fn check(&self) -> Result<(), String> {
        self.backbone().check("predictor")?;
        if self.pooling == Pooling::Question && self.order == Order::QuestionVisual && !self.bidirectional {
            return Err("predictor: with order question_visual, pooling question would never see the picture".into());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use serde_json::{Value, json};

    use super::*;
    use crate::config::Mamba3JepaConfig;
    use crate::testing::TinyModel;

    fn read(changes: &[(&str, Value)]) -> Result<PredictorConfig, String> {
        let model = changes.iter().fold(TinyModel::new(), |model, (key, value)| model.predictor(key, value.clone()));
        let read = Mamba3JepaConfig::from_json(&model.config.to_string(), Path::new("config.json"));
        read.map(|config| config.predictor).map_err(|error| error.to_string())
    }

    #[test]
    fn what_a_file_leaves_out_is_as_it_was() {
        let before = read(&[]).unwrap();
        let chosen = (before.order, before.pooling, before.bidirectional, before.visual_pool);
        assert_eq!(chosen, (Order::VisualQuestion, Pooling::All, false, 1));
        let said = [
            ("order", json!("visual_question")),
            ("pooling", json!("all")),
            ("bidirectional", json!(false)),
            ("visual_pool", json!(1)),
        ];
        assert_eq!(read(&said), Ok(before.clone()));
        assert_eq!(serde_json::to_value(before).unwrap(), TinyModel::new().config["predictor"]);
    }

    #[test]
    fn every_choice_is_read_and_written() {
        for order in ["visual_question", "question_visual", "question_visual_question"] {
            for pooling in ["all", "attention", "question", "last"] {
                let chosen = [("order", json!(order)), ("pooling", json!(pooling)), ("bidirectional", json!(true))];
                let config = read(&chosen).unwrap();
                let names: Vec<_> = (config.order.parts().iter())
                    .map(|part| if *part == Part::Visual { "visual" } else { "question" })
                    .collect();
                assert_eq!(names.join("_"), order);
                let written = serde_json::to_value(&config).unwrap();
                let default = |key: &str| if key == "order" { "visual_question" } else { "all" };
                for (key, value) in [("order", order), ("pooling", pooling)] {
                    assert_eq!(written.get(key), (value != default(key)).then(|| json!(value)).as_ref());
                }
                assert_eq!(serde_json::from_value::<PredictorConfig>(written).unwrap(), config);
            }
        }
    }

    #[test]
    fn what_is_no_choice_is_refused_and_named() {
        for (key, value, reason) in [
            ("order", json!("question"), "predictor.order: unknown variant `question`"),
            ("pooling", json!("mean"), "predictor.pooling: unknown variant `mean`"),
            ("pooling", json!(null), "predictor.pooling: "),
            ("bidirectional", json!(1), "predictor.bidirectional: invalid type: integer `1`, expected a boolean"),
            ("direction", json!(true), "predictor: unknown field `direction`"),
        ] {
            let message = read(&[(key, value)]).unwrap_err();
            assert!(message.contains(reason), "{message}");
        }
        let model = TinyModel::new();
        for name in ["y_encoder", "y_decoder"] {
            let mut config = model.config.clone();
            config[name]["bidirectional"] = json!(true);
            let error = Mamba3JepaConfig::from_json(&config.to_string(), Path::new("config.json")).unwrap_err();
            assert!(error.to_string().contains(&format!("{name}: unknown field `bidirectional`")), "{error}");
        }
    }

    #[test]
    fn a_prediction_that_never_sees_the_picture_is_refused() {
        let chosen = [("order", json!("question_visual")), ("pooling", json!("question"))];
        let message = read(&chosen).unwrap_err();
        assert!(
            message.contains("predictor: with order question_visual, pooling question would never see"),
            "{message}"
        );
        let seen = [chosen.as_slice(), &[("bidirectional", json!(true))]].concat();
        assert!(read(&seen).is_ok());
    }
}
