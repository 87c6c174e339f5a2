use super::reference::Reference;
use super::*;
use crate::mamba3::{BackboneState, StepBuffers};
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

/// Every order with every pooling, read from the left and from both sides.
fn kinds() -> Vec<(String, TinyModel)> {
    let mut kinds = Vec::new();
    for order in ["visual_question", "question_visual", "question_visual_question"] {
        for pooling in ["all", "attention", "question", "last"] {
            for bidirectional in [false, true] {
                let name = format!("{order}, {pooling}, bidirectional {bidirectional}");
                let model = TinyModel::new().predictor("order", order).predictor("pooling", pooling);
                kinds.push((name, model.predictor("bidirectional", bidirectional)));
            }
        }
    }
    kinds.retain(|(name, _)| name != "question_visual, question, bidirectional false");
    kinds
}

#[test]
fn every_kind_alone_and_beside_others_is_what_it_says() {
    for (name, model) in kinds() {
        let (predictor, gates) = (predictor(&model), gates(&model));
        let reference = Reference::new(&model);
        let tokens = tokens(&predictor);
        let samples = inputs(&tokens);
        for gated in [false, true] {
            let mut activity = GateActivity::new();
            let mut predict =
                |samples: &[_]| predictor.predict(samples, gated.then_some((&gates, &mut activity))).unwrap();
            let together = predict(&samples);
            for (i, (sample, found)) in samples.iter().zip(&together).enumerate() {
                let expected = reference.predict(sample, gated);
                let what = format!("{name}, gated {gated}, sample {i}");
                assert!(relative(&found.pooled, &expected.pooled) < 5e-6, "{what}: pooled");
                assert!(relative(&found.embedding, &expected.embedding) < 5e-6, "{what}: embedding");
                let alone = predict(&[*sample]).remove(0);
                assert!(relative(&found.embedding, &alone.embedding) < 3e-6, "{what}: alone");
            }
        }
    }
}

#[test]
fn every_kind_differs_from_every_other() {
    let mut seen: Vec<(String, Vec<f32>)> = Vec::new();
    for (name, model) in kinds() {
        let predictor = predictor(&model);
        let tokens = tokens(&predictor);
        let embedding = predictor.predict(&inputs(&tokens)[..1], None).unwrap().remove(0).embedding;
        for (other, others) in &seen {
            assert!(relative(&embedding, others) > 1e-3, "{name} and {other} give the same");
        }
        seen.push((name, embedding));
    }
}

#[test]
fn padding_changes_nothing_before_it_from_whichever_side_it_is_read() {
    for (name, model) in TinyModel::variants() {
        let predictor = predictor(&model);
        let width = predictor.config.predictor.d_model();
        let (lengths, valid) = ([9, 70, 5], [4, 70, 0]);
        let mut packed = Vec::new();
        let mut padded = Random::new(9).normals(lengths.iter().sum::<usize>() * width);
        let starts = [0, 9, 79];
        for (start, valid) in starts.into_iter().zip(valid) {
            packed.extend_from_slice(&padded[start * width..(start + valid) * width]);
        }
        predictor.backbone.forward(&mut packed, &valid, None, &mut ());
        predictor.backbone.forward_padded(&mut padded, &lengths, &valid, &mut ());
        let mut kept = Vec::new();
        for (start, valid) in starts.into_iter().zip(valid) {
            kept.extend_from_slice(&padded[start * width..(start + valid) * width]);
        }
        assert!(relative(&kept, &packed) < 3e-6, "{name}");
    }
}

#[test]
#[should_panic(expected = "no state to go on from")]
fn a_bidirectional_backbone_keeps_no_state() {
    let predictor = predictor(&TinyModel::new().predictor("bidirectional", true));
    let config = predictor.config.predictor.backbone();
    let mut states = [BackboneState::new(&config)];
    predictor.backbone.forward(&mut vec![0.0; config.d_model()], &[1], Some(&mut states), &mut ());
}

#[test]
#[should_panic(expected = "no state to go on from")]
fn a_bidirectional_backbone_makes_no_step() {
    let predictor = predictor(&TinyModel::new().predictor("bidirectional", true));
    let config = predictor.config.predictor.backbone();
    let (mut states, mut buffers) = ([BackboneState::new(&config)], StepBuffers::new(&config.layer, 1));
    predictor.backbone.step(&mut vec![0.0; config.d_model()], &mut states, &mut buffers, &mut ());
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
    let refused = |visual, query| predictor.predict(&[PredictorInput { visual, query }], None).unwrap_err().to_string();
    assert!(refused(None, &query[1..]).contains("query tokens: 31 numbers are no rows of 32"));
    assert!(refused(Some(&query), &query).contains("visual tokens: 32 numbers are no rows of 48"));
    assert!(refused(None, &[]).contains("neither visual tokens nor a query"));
    let asked = self::predictor(&TinyModel::new().predictor("pooling", "question"));
    let visual = vec![0.0; 48];
    let error = asked.predict(&[PredictorInput { visual: Some(&visual), query: &[] }], None).unwrap_err().to_string();
    assert!(error.contains("no query, which is what is pooled"), "{error}");
    assert!(predictor.embed(&query[1..]).unwrap_err().to_string().contains("expected 32"));
    let other = gates(&TinyModel::new().set("/predictor/n_layers", 3));
    let sample = PredictorInput { visual: None, query: &query };
    let error = predictor.predict(&[sample], Some((&other, &mut GateActivity::new()))).unwrap_err();
    assert!(error.to_string().contains("the gates are for 3 layers"), "{error}");
}
