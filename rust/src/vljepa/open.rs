//! Opening a folder.

use std::path::Path;
use std::sync::{Mutex, OnceLock};

use rayon::prelude::*;
use rayon::{ThreadPool, ThreadPoolBuilder};

use super::folder;
use super::manifest::Manifest;
use super::{MAX_THREADS, Mamba3Jepa, Options};
use crate::angn::{AdaptiveNeuralGate, GateActivity};
use crate::config::VisionConfig;
use crate::error::{Error, LoadError};
use crate::files::path_text;
use crate::linalg::check_instruction_set;
use crate::loader::{Weights, load_safetensors};
use crate::predictor::Mamba3Predictor;
use crate::recursion::Recursion;
use crate::tokenizer::Tokenizer;
use crate::vit::VisionEncoder;
use crate::y_decoder::Mamba3Decoder;
use crate::y_encoder::Mamba3TextEncoder;

/// What can be read by itself.
#[derive(Clone, Copy)]
enum Part {
    Tokenizer,
    Component(&'static str),
    /// One that is not the folder's.
    GivenXEncoder,
}

/// The parts, as far as they have been read.
#[derive(Default)]
struct Read {
    tokenizer: Option<Tokenizer>,
    x_encoder: Option<VisionEncoder>,
    predictor: Option<(Mamba3Predictor, Weights)>,
    y_encoder: Option<(Mamba3TextEncoder, Weights)>,
    gates: Option<(AdaptiveNeuralGate, Weights)>,
    y_decoder: Option<Mamba3Decoder>,
    recursion: Option<Recursion>,
}

impl Mamba3Jepa {
    pub(super) fn open(folder: &Path, options: Options) -> Result<Mamba3Jepa, Error> {
        check_instruction_set().map_err(Error::Input)?;
        let manifest = Manifest::read(folder)?;
        if let (Some(warn), Some(warning)) = (&options.warn, manifest.warning()) {
            warn(&warning);
        }
        let pool = pool(options.threads)?;
        let parts = parts(&manifest, options.x_encoder.is_some());
        let read = pool.install(|| read_all(folder, &manifest, &parts, options.x_encoder.as_deref()))?;
        let missing = |what: &str| Error::Absent(format!("{}: it has no {what}", path_text(folder)));
        let (y_encoder, y_encoder_weights) = read.y_encoder.ok_or_else(|| missing("Y-Encoder"))?;
        let (predictor, predictor_weights) = read.predictor.ok_or_else(|| missing("predictor"))?;
        let (gates, gate_weights) = read.gates.unzip();
        Ok(Mamba3Jepa {
            tokenizer: read.tokenizer.ok_or_else(|| missing("tokenizer"))?,
            x_encoder: read.x_encoder,
            predictor,
            y_encoder,
            activity: Mutex::new(GateActivity::new()),
            gates,
            y_decoder: read.y_decoder,
            recursion: read.recursion,
            y_encoder_weights,
            encoder_digest: OnceLock::new(),
            observer_weights: [predictor_weights].into_iter().chain(gate_weights).collect(),
            observer_digest: OnceLock::new(),
            known: OnceLock::new(),
            warn: options.warn,
            batch_size: options.batch_size,
            pool,
            manifest,
        })
    }
}

fn pool(threads: Option<usize>) -> Result<ThreadPool, Error> {
    if let Some(wrong) = threads.filter(|n| !(1..=MAX_THREADS).contains(n)) {
        return Err(Error::Input(format!("{wrong} threads: expected between 1 and {MAX_THREADS}")));
    }
    let threads = threads.unwrap_or(0); // which is one for each core
    let named = ThreadPoolBuilder::new().num_threads(threads).thread_name(|i| format!("kore-vljepa-{i}"));
    named.build().map_err(|error| Error::Input(format!("cannot start {threads} threads: {error}")))
}

/// The parts of a folder, the largest file first, so that the threads end together.
fn parts(manifest: &Manifest, has_x_encoder: bool) -> Vec<Part> {
    let known = ["predictor", "y_encoder", "angn", "y_decoder", "recursion", "x_encoder"];
    let mut components: Vec<(u64, &'static str)> = known
        .into_iter()
        .filter(|&name| !(name == "x_encoder" && has_x_encoder))
        .filter_map(|name| Some((manifest.files.get(name)?.bytes, name)))
        .collect();
    components.sort_by_key(|&(bytes, _)| std::cmp::Reverse(bytes));
    let given = has_x_encoder.then_some(Part::GivenXEncoder);
    let components = components.into_iter().map(|(_, name)| Part::Component(name));
    given.into_iter().chain(components).chain([Part::Tokenizer]).collect()
}

fn read_all(folder: &Path, manifest: &Manifest, parts: &[Part], x_encoder: Option<&Path>) -> Result<Read, Error> {
    // `with_max_len`: one part to a task, in this order
    let read: Vec<Result<Read, Error>> =
        parts.par_iter().with_max_len(1).map(|&part| read_part(folder, manifest, part, x_encoder)).collect();
    let mut all = Read::default();
    for part in read {
        let part = part?;
        all = Read {
            tokenizer: all.tokenizer.or(part.tokenizer),
            x_encoder: all.x_encoder.or(part.x_encoder),
            predictor: all.predictor.or(part.predictor),
            y_encoder: all.y_encoder.or(part.y_encoder),
            gates: all.gates.or(part.gates),
            y_decoder: all.y_decoder.or(part.y_decoder),
            recursion: all.recursion.or(part.recursion),
        };
    }
    Ok(all)
}

fn read_part(folder: &Path, manifest: &Manifest, part: Part, x_encoder: Option<&Path>) -> Result<Read, Error> {
    let mut read = Read::default();
    match part {
        Part::Tokenizer => read.tokenizer = Some(folder::tokenizer(folder, manifest)?),
        Part::GivenXEncoder => {
            read.x_encoder = x_encoder.map(|path| given_x_encoder(path, &manifest.config.vision)).transpose()?;
        }
        Part::Component(name) => {
            let weights = folder::component(folder, name, manifest)?;
            match name {
                "predictor" => read.predictor = Some((Mamba3Predictor::from_weights(&weights)?, weights)),
                "angn" => read.gates = Some((AdaptiveNeuralGate::from_weights(&weights)?, weights)),
                "y_decoder" => read.y_decoder = Some(Mamba3Decoder::from_weights(&weights)?),
                "recursion" => read.recursion = Some(Recursion::from_weights(&weights)?),
                "x_encoder" => read.x_encoder = Some(VisionEncoder::from_weights(&weights)?),
                _ => read.y_encoder = Some((Mamba3TextEncoder::from_weights(&weights)?, weights)),
            }
        }
    }
    Ok(read)
}

/// The X-Encoder at `path`, if its visual tokens are what the predictor was trained with.
fn given_x_encoder(path: &Path, expected: &VisionConfig) -> Result<VisionEncoder, LoadError> {
    let encoder = if path.is_dir() {
        VisionEncoder::from_transformers_dir(path)?
    } else {
        VisionEncoder::from_weights(&load_safetensors(path)?)?
    };
    // where its weights come from does not matter here
    let found = VisionConfig { pretrained: expected.pretrained, ..encoder.config().clone() };
    if found != *expected {
        return Err(LoadError::Mismatch {
            path: path.to_path_buf(),
            reason: format!("this X-Encoder is {found:?}, the model's configuration says {expected:?}"),
        });
    }
    Ok(encoder)
}
