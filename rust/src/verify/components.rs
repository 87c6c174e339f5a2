//! The golden files of the components that read embeddings and tokens.

use std::path::Path;

use crate::angn::{AdaptiveNeuralGate, GateActivity};
use crate::config::EpisodeKey;
use crate::episodes::picture_key;
use crate::error::Error;
use crate::generate::{GenerationConfig, Method, Request, generate};
use crate::mamba3::trace::Recorder;
use crate::mamba3::{LayerHook, Mamba3Backbone};
use crate::predictor::Mamba3Predictor;
use crate::recursion::{KnowledgeRetriever, Recursion};
use crate::tokenizer::Tokenizer;
use crate::vit::VisionEncoder;
use crate::y_decoder::Mamba3Decoder;
use crate::y_encoder::Mamba3TextEncoder;

use super::ComponentReport;
use super::golden::Golden;
use super::inputs;
use super::samples::{Padded, Samples};

/// Tokens of a sequence whose inside the files show.
const TRACED: usize = 4;

/// The parts of an exported model.
pub(crate) struct Models<'a> {
    pub(crate) tokenizer: &'a Tokenizer,
    pub(crate) x_encoder: Option<&'a VisionEncoder>,
    /// Mean and standard deviation by which pixels are normalised.
    pub(crate) normalization: ([f32; 3], [f32; 3]),
    pub(crate) predictor: &'a Mamba3Predictor,
    pub(crate) y_encoder: &'a Mamba3TextEncoder,
    pub(crate) gates: Option<&'a AdaptiveNeuralGate>,
    pub(crate) y_decoder: Option<&'a Mamba3Decoder>,
    pub(crate) recursion: Option<&'a Recursion>,
}

impl Models<'_> {
    /// Whether the model has what a golden file is about.
    pub(super) fn has(&self, name: &str) -> bool {
        match name {
            "angn" => self.gates.is_some(),
            "y_decoder" => self.y_decoder.is_some(),
            "recursion" => self.recursion.is_some(),
            "x_encoder" => self.x_encoder.is_some(),
            _ => true,
        }
    }

    /// Recomputes the golden file `name` in a folder of them; `None` if the model has no such component.
    pub(super) fn verify(&self, name: &str, folder: &Path) -> Result<Option<ComponentReport>, Error> {
        let mut golden = Golden::open(folder, name)?;
        let (g, config) = (&mut golden, self.predictor.config());
        let done = match name {
            "images" => Some(inputs::images(g, config.vision.image_size)),
            "tokens" => Some(inputs::tokens(g, self.tokenizer, config)),
            "predictor" => Some(self.predictor(g)),
            "y_encoder" => Some(self.y_encoder(g)),
            "x_encoder" => self.x_encoder.map(|encoder| inputs::x_encoder(g, encoder, self.normalization, config)),
            "angn" => self.gates.map(|gates| self.angn(g, gates, folder)),
            "y_decoder" => self.y_decoder.map(|decoder| self.y_decoder(g, decoder)),
            "recursion" => self.recursion.map(|recursion| self.recursion(g, recursion)),
            _ => None,
        };
        done.transpose()?.map(|()| golden.finish().map_err(Error::from)).transpose()
    }

    fn predictor(&self, golden: &mut Golden) -> Result<(), Error> {
        let samples = Samples::read(golden, self.y_encoder)?;
        golden.check("query_tokens", &samples.query_tokens)?;
        let sequences = samples.padded(self.predictor);
        golden.check("sequence", &sequences.tokens)?;
        golden.check_bytes("mask", &sequences.mask())?;
        let mut activity = GateActivity::new();
        match self.gates {
            None => check_layers(golden, &self.predictor.backbone, sequences, &mut ())?,
            Some(gates) => {
                let mut hook = gates.hook(&mut activity);
                check_layers(golden, &self.predictor.backbone, sequences, &mut hook)?;
            }
        }
        let gates = self.gates.map(|gates| (gates, &mut activity));
        let predictions = self.predictor.predict(&samples.inputs(), gates)?;
        let (pooled, embeddings): (Vec<_>, Vec<_>) = predictions.into_iter().map(|p| (p.pooled, p.embedding)).unzip();
        golden.check("pooled", &pooled.concat())?;
        golden.check("embedding", &embeddings.concat())?;
        Ok(())
    }

    fn y_encoder(&self, golden: &mut Golden) -> Result<(), Error> {
        let encoder = self.y_encoder;
        let length = golden.size("ids", 1)?;
        let ids = golden.input_ids("ids")?;
        let mask = golden.input_mask("mask")?;
        if ids.len() != mask.len() {
            return Err(golden.mismatch("ids and mask do not fit together; export again with --golden").into());
        }
        let tokens = encoder.embed_tokens(&ids)?;
        golden.check("tokens", &tokens)?;
        let first = &tokens[..tokens.len().min(length * encoder.config().y_encoder.d_model())];
        golden.check_traced("step", &encoder.backbone.trace_steps(first))?;
        let texts = ids.chunks(length.max(1)).zip(mask.chunks(length.max(1)));
        let texts: Vec<Vec<u32>> = texts.map(|(ids, mask)| valid(ids, mask)).collect();
        let sequences = Padded { tokens, length, valid: texts.iter().map(Vec::len).collect() };
        check_layers(golden, &encoder.backbone, sequences, &mut ())?;
        golden.check("pooled", &encoder.pool(&texts)?)?;
        golden.check("embedding", &encoder.encode(&texts)?.concat())?;
        Ok(())
    }

    fn angn(&self, golden: &mut Golden, gates: &AdaptiveNeuralGate, folder: &Path) -> Result<(), Error> {
        for layer in 0..gates.n_layers() {
            let mut stream = golden.input(&format!("gates.{layer}.input"))?;
            gates.apply(layer, &mut stream);
            golden.check(&format!("gates.{layer}.output"), &stream)?;
        }
        // two passes over the samples of the predictor's file: both, then the first alone
        let samples = Samples::read(&mut Golden::open(folder, "predictor")?, self.y_encoder)?;
        let inputs = samples.inputs();
        let mut record = GateActivity::new();
        let (mut activity, mut ema, mut due) = (Vec::new(), Vec::new(), Vec::new());
        for count in [inputs.len(), 1] {
            self.predictor.predict(&inputs[..count.min(inputs.len())], Some((gates, &mut record)))?;
            activity.extend_from_slice(record.activity());
            ema.extend_from_slice(record.activity_ema());
            due.push(u8::from(record.context_reset_due()));
        }
        golden.check("activity", &activity)?;
        golden.check("activity_ema", &ema)?;
        golden.check_bytes("context_reset_due", &due)?;
        Ok(())
    }

    fn y_decoder(&self, golden: &mut Golden, decoder: &Mamba3Decoder) -> Result<(), Error> {
        let embed_dim = decoder.config().embed_dim;
        let embeddings = golden.input("embedding")?;
        let embeddings: Vec<&[f32]> = embeddings.chunks(embed_dim).collect();
        let prefixes = embeddings.iter().map(|embedding| decoder.prefix(embedding)).collect::<Result<Vec<_>, _>>()?;
        golden.check("prefix", &prefixes.concat())?;
        let ids = golden.input_ids("ids")?;
        let (Some(&first), Some(prefix)) = (embeddings.first(), prefixes.first()) else {
            return Err(golden.mismatch("embedding: it has no rows").into());
        };
        golden.check("logits", &decoder.logits(first, &ids)?)?;
        let mut state = decoder.prefill(&[first])?;
        for sequence in state.sequences() {
            golden.check_traced("prefill", &decoder.backbone.trace_state(sequence))?;
        }
        let mut stepped = Vec::new();
        for &id in &ids {
            stepped.extend_from_slice(decoder.step(&[id], &mut state)?);
        }
        golden.check("step.logits", &stepped)?;
        let mut whole = prefix.clone();
        whole.extend(decoder.embed_tokens(&ids)?);
        golden.check_traced("step", &decoder.backbone.trace_steps(&whole))?;
        check_layer0(golden, &decoder.backbone, &whole)?;
        self.answers(golden, decoder, &embeddings)
    }

    fn answers(&self, golden: &mut Golden, decoder: &Mamba3Decoder, embeddings: &[&[f32]]) -> Result<(), Error> {
        for (name, method) in [("greedy", Method::Greedy), ("beam", Method::Beam)] {
            let config = GenerationConfig { method, ..GenerationConfig::default() };
            let request = Request {
                bos_id: self.tokenizer.bos_id(),
                eos_id: self.tokenizer.eos_id(),
                config: &config,
                max_tokens: decoder.config().max_answer_tokens - 1,
                first_row: 0,
            };
            for (row, answer) in generate(decoder, embeddings, request)?.into_iter().enumerate() {
                golden.check_ids(&format!("{name}_ids.{row}"), &answer.ids)?;
                golden.check_log_probs(&format!("{name}_log_probs.{row}"), &answer.log_probs)?;
            }
        }
        Ok(())
    }

    fn recursion(&self, golden: &mut Golden, recursion: &Recursion) -> Result<(), Error> {
        let (monitor, injector) = (&recursion.confusion_probe, &recursion.injector);
        let config = recursion.config();
        let pooled = golden.input("pooled")?;
        let knowledge = golden.input("knowledge")?;
        let previous = golden.input("previous_score")?;
        let doubts = match monitor.hears_answer() {
            true => golden.input("doubt")?.as_chunks().0.iter().copied().map(Some).collect(),
            false => vec![None; previous.len()],
        };
        let (mut answers, mut tools) = (Vec::new(), Vec::new());
        let mut found: [Vec<f32>; 7] = Default::default();
        let [normed, logits, scores, smoothed, injected, embeddings, injected_embeddings] = &mut found;
        let rows = pooled.chunks(config.predictor.d_model()).zip(knowledge.chunks(config.knowledge_dim()));
        for (((pooled, knowledge), &previous), &doubt) in rows.zip(&previous).zip(&doubts) {
            let state = monitor.normed(pooled)?;
            logits.push(monitor.logit(&state, doubt));
            normed.extend(state);
            let score = monitor.score(pooled, doubt)?;
            scores.push(score);
            smoothed.push(monitor.smooth(score, Some(previous)));
            if let Some(probe) = &recursion.knowledge_probe {
                answers.push(probe.score(pooled, knowledge)?);
            }
            if let Some(selector) = &recursion.tool_selector {
                tools.extend(selector.score(pooled)?);
            }
            let with_knowledge = injector.inject(pooled, knowledge)?;
            embeddings.extend(self.predictor.embed(pooled)?);
            injected_embeddings.extend(self.predictor.embed(&with_knowledge)?);
            injected.extend(with_knowledge);
        }
        let names = ["normed", "logit", "score", "smoothed_score", "injected", "embedding", "embedding_injected"];
        for (name, numbers) in names.into_iter().zip(&found) {
            golden.check(name, numbers)?;
        }
        if let Some(finder) = &recursion.episodes {
            let (asked, told) = (golden.input("question_embedding")?, golden.input("text_embedding")?);
            let (seen, keys) = match config.recursion.episode_key {
                EpisodeKey::State => (pooled.clone(), golden.input("injected")?),
                EpisodeKey::Picture => {
                    let (tokens, has_image) = (golden.input("visual_tokens")?, golden.input_mask("has_image")?);
                    let width = config.vision.hidden_size;
                    let rows = tokens.chunks((tokens.len() / has_image.len().max(1)).max(1)).zip(&has_image);
                    let keys = rows.map(|(tokens, &has)| picture_key(has.then_some(tokens), width));
                    let keys = keys.collect::<Vec<_>>().concat();
                    golden.check("picture", &keys)?;
                    (keys.clone(), keys)
                }
            };
            let rows = seen.chunks(config.episode_dim()).zip(asked.chunks(config.embed_dim));
            let scores: Vec<_> =
                rows.map(|(seen, asked)| finder.scores(seen, asked, &keys, &told)).collect::<Result<_, _>>()?;
            golden.check("episode_scores", &scores.concat())?;
        }
        if recursion.knowledge_probe.is_some() {
            golden.check("knowledge_answers", &answers)?;
        }
        if recursion.tool_selector.is_some() {
            golden.check("tools", &tools)?;
        }
        let Some(KnowledgeRetriever { question, text }) = &recursion.retriever else { return Ok(()) };
        for (name, tower) in [("question", question), ("text", text)] {
            let embeddings = golden.input(&format!("{name}_embedding"))?;
            let vectors = embeddings.chunks(config.embed_dim).map(|embedding| tower.apply(embedding));
            golden.check(&format!("retriever_{name}"), &vectors.collect::<Result<Vec<_>, _>>()?.concat())?;
        }
        Ok(())
    }
}

/// The ids of a padded text that count.
fn valid(ids: &[u32], mask: &[bool]) -> Vec<u32> {
    ids.iter().zip(mask).filter(|&(_, &valid)| valid).map(|(&id, _)| id).collect()
}

/// The inside of a pass over padded sequences, and of layer 0.
fn check_layers(
    golden: &mut Golden,
    backbone: &Mamba3Backbone,
    Padded { tokens: mut x, length, valid }: Padded,
    hook: &mut dyn LayerHook,
) -> Result<(), Error> {
    let mut recorder = Recorder::new(hook);
    backbone.forward_padded(&mut x, &vec![length; valid.len()], &valid, &mut recorder);
    for (layer, (input, mixed)) in recorder.inputs.iter().zip(&recorder.mixed).enumerate() {
        golden.check(&format!("layers.{layer}.input"), input)?;
        golden.check(&format!("layers.{layer}.mixer_output"), mixed)?;
    }
    for (layer, added) in recorder.of_mlps.iter().enumerate() {
        golden.check(&format!("layers.{layer}.mlp_output"), added)?;
    }
    golden.check("hidden", &x)?;
    let of_sample_0 = length * backbone.d_model();
    check_layer0(golden, backbone, recorder.inputs.first().map_or(&[], |all| &all[..of_sample_0.min(all.len())]))
}

/// Layer 0 on the first tokens of a residual stream (L, D).
fn check_layer0(golden: &mut Golden, backbone: &Mamba3Backbone, stream: &[f32]) -> Result<(), Error> {
    let first = &stream[..stream.len().min(TRACED * backbone.d_model())];
    Ok(golden.check_traced("layer0", &backbone.trace_layer0(first))?)
}
