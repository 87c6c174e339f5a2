//! The parts of a model by themselves, to be timed one by one.

use std::fs;
use std::path::{Path, PathBuf};

use kore_vljepa::LoadError;
use kore_vljepa::angn::{AdaptiveNeuralGate, GateActivity};
use kore_vljepa::config::Mamba3JepaConfig;
use kore_vljepa::loader::{Weights, load_safetensors};
use kore_vljepa::predictor::{Mamba3Predictor, PredictorInput};
use kore_vljepa::vit::{PixelShape, VisionEncoder};
use kore_vljepa::y_decoder::{DecoderState, Mamba3Decoder};

use crate::output::{Failure, failure, shown};

/// The files that are read when a folder is opened.
pub(super) fn files(folder: &Path, x_encoder: Option<&Path>) -> Result<Vec<PathBuf>, Failure> {
    let mut files = safetensors_in(folder)?;
    match x_encoder {
        None => {}
        Some(given) => {
            files.retain(|file| file.file_name().is_some_and(|name| name != "x_encoder.safetensors"));
            files.extend(if given.is_dir() { safetensors_in(given)? } else { vec![given.to_path_buf()] });
        }
    }
    Ok(files)
}

fn safetensors_in(folder: &Path) -> Result<Vec<PathBuf>, Failure> {
    let unreadable = |error| failure(format!("{}: cannot be read: {error}", shown(folder)));
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).map_err(unreadable)? {
        let path = entry.map_err(unreadable)?.path();
        if path.extension().is_some_and(|suffix| suffix == "safetensors") {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

/// The component's file, if it was exported.
fn component(folder: &Path, name: &str) -> Result<Option<Weights>, LoadError> {
    let path = folder.join(format!("{name}.safetensors"));
    path.is_file().then(|| load_safetensors(path)).transpose()
}

/// The predictor, with the gates where there are any.
pub(super) struct Predictor {
    predictor: Mamba3Predictor,
    gates: Option<(AdaptiveNeuralGate, GateActivity)>,
}

impl Predictor {
    pub(super) fn load(folder: &Path) -> Result<Predictor, Failure> {
        let gates = component(folder, "angn")?.map(|weights| AdaptiveNeuralGate::from_weights(&weights)).transpose()?;
        Ok(Predictor {
            predictor: Mamba3Predictor::from_weights(&load_safetensors(folder.join("predictor.safetensors"))?)?,
            gates: gates.map(|gates| (gates, GateActivity::new())),
        })
    }

    pub(super) fn config(&self) -> &Mamba3JepaConfig {
        self.predictor.config()
    }

    /// Reads visual tokens (N, vision width) and a question (M, width of the Y-Encoder).
    pub(super) fn predict(&mut self, visual: &[f32], query: &[f32]) -> Result<(), Failure> {
        let gates = self.gates.as_mut().map(|(gates, activity)| (&*gates, activity));
        self.predictor.predict(&[PredictorInput { visual: Some(visual), query }], gates)?;
        Ok(())
    }
}

/// What is timed by itself; a part that was not exported is `None`.
pub(super) struct Parts {
    pub(super) config: Mamba3JepaConfig,
    pub(super) predictor: Predictor,
    x_encoder: Option<VisionEncoder>,
    decoder: Option<Mamba3Decoder>,
}

impl Parts {
    pub(super) fn load(folder: &Path, x_encoder: Option<&Path>) -> Result<Parts, Failure> {
        let x_encoder = match x_encoder {
            Some(path) if path.is_dir() => Some(VisionEncoder::from_transformers_dir(path)?),
            Some(path) => Some(VisionEncoder::from_weights(&load_safetensors(path)?)?),
            None => component(folder, "x_encoder")?.map(|weights| VisionEncoder::from_weights(&weights)).transpose()?,
        };
        let predictor = Predictor::load(folder)?;
        let decoder =
            component(folder, "y_decoder")?.map(|weights| Mamba3Decoder::from_weights(&weights)).transpose()?;
        Ok(Parts { config: predictor.config().clone(), predictor, x_encoder, decoder })
    }

    /// Visual tokens of one image.
    pub(super) fn visual_tokens(&self) -> usize {
        self.config.visual_tokens()
    }

    pub(super) fn has_x_encoder(&self) -> bool {
        self.x_encoder.is_some()
    }

    /// The X-Encoder looks at one image (3, size, size).
    pub(super) fn look(&self, pixels: &[f32]) -> Result<(), Failure> {
        let size = self.config.vision.image_size;
        if let Some(encoder) = &self.x_encoder {
            encoder.encode(pixels, PixelShape::Image { height: size, width: size })?;
        }
        Ok(())
    }

    /// The decoder's states from which the windows of `window` tokens around `early` and `late` begin, with the token
    /// that comes next in each.
    pub(super) fn speak(&self, embedding: &[f32], starts: [usize; 2]) -> Result<Option<[Spoken; 2]>, Failure> {
        let Some(decoder) = &self.decoder else { return Ok(None) };
        let mut spoken = Spoken { state: decoder.prefill(&[embedding])?, id: 0 };
        spoken.speak(decoder, starts[0])?;
        let early = spoken.clone();
        spoken.speak(decoder, starts[1] - starts[0])?;
        Ok(Some([early, spoken]))
    }

    /// Speaks `window` tokens more after `start`.
    pub(super) fn speak_on(&self, start: &mut Spoken, window: usize) -> Result<(), Failure> {
        match &self.decoder {
            Some(decoder) => start.speak(decoder, window),
            None => Ok(()),
        }
    }
}

/// Where a decoder is in a text: its state, and the token it hears next.
#[derive(Clone)]
pub(super) struct Spoken {
    state: DecoderState,
    id: u32,
}

impl Spoken {
    /// Greedily `tokens` more.
    fn speak(&mut self, decoder: &Mamba3Decoder, tokens: usize) -> Result<(), Failure> {
        for _ in 0..tokens {
            let logits = decoder.step(&[self.id], &mut self.state)?;
            let best = (0..).zip(logits.iter()).max_by(|(_, a), (_, b)| a.total_cmp(b));
            self.id = best.map_or(0, |(id, _)| id);
        }
        Ok(())
    }
}
