//! The whole model of an exported folder: questions about images in, answers out.
//!
//! Letters: B samples, N visual tokens of an image, D width of the predictor, E embedding width, K length of a knowledge
//! vector.

mod answerer;
mod averages;
mod confusion;
mod embeddings;
mod folder;
mod golden;
mod manifest;
mod observe;
mod open;
mod options;
mod recall;
mod sample;

use std::path::Path;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use rayon::ThreadPool;

pub use crate::recursion::Signal;
pub use answerer::{Answer, Answerer, AnswererOptions, Inject, Knowledge, Turn};
pub use confusion::Confusion;
pub use embeddings::{Classified, Found, ImageEmbeddings, OnBadImage};
pub use options::{MAX_THREADS, Options, Progress};
pub use recall::Recalled;
pub use sample::{Image, Observation, Sample};

use crate::angn::{AdaptiveNeuralGate, GateActivity};
use crate::config::Mamba3JepaConfig;
use crate::error::Error;
use crate::generate::{self, Generated, GenerationConfig};
use crate::loader::Weights;
use crate::memory::{encoder_digest, observer_digest};
use crate::predictor::Mamba3Predictor;
use crate::recursion::Recursion;
use crate::tokenizer::Tokenizer;
use crate::vit::VisionEncoder;
use crate::y_decoder::Mamba3Decoder;
use crate::y_encoder::Mamba3TextEncoder;
use manifest::Manifest;
use options::Warn;

/// A trained model: X-Encoder, predictor and Y-Encoder, and where its phase has them gates, Y-Decoder and recursion.
///
/// Every method that computes enters the model's own thread pool once. All but the moving average of the gates stays as
/// it is, so that a model can be shared between threads.
///
/// ```no_run
/// use kore_vljepa::vljepa::{Mamba3Jepa, Sample};
///
/// # fn main() -> Result<(), kore_vljepa::Error> {
/// let model = Mamba3Jepa::from_dir("weights/")?;
/// let answer = model.ask(Sample::file("photo.jpg").asking("What color is the circle?"))?;
/// println!("{} (confidence {:.3})", answer.text, answer.confidence);
/// # Ok(())
/// # }
/// ```
pub struct Mamba3Jepa {
    manifest: Manifest,
    tokenizer: Tokenizer,
    x_encoder: Option<VisionEncoder>,
    predictor: Mamba3Predictor,
    y_encoder: Mamba3TextEncoder,
    gates: Option<AdaptiveNeuralGate>,
    y_decoder: Option<Mamba3Decoder>,
    recursion: Option<Recursion>,
    /// Of the gates over the passes so far.
    activity: Mutex<GateActivity>,
    /// `y_encoder.safetensors`, which shares its bytes with `y_encoder`.
    y_encoder_weights: Weights,
    encoder_digest: OnceLock<String>,
    /// `predictor.safetensors`, and `angn.safetensors` if there is one: they share their bytes with the parts.
    observer_weights: Vec<Weights>,
    observer_digest: OnceLock<String>,
    /// Embeddings of the known answers, (G, E).
    known: OnceLock<Vec<f32>>,
    warn: Option<Warn>,
    /// Samples in one pass.
    batch_size: usize,
    pool: ThreadPool,
}

impl Mamba3Jepa {
    /// Opens a folder that `mamba3-jepa export` wrote, with one thread for each core.
    ///
    /// Every file is read whole, and must have the size and the SHA-256 that `config.json` lists; every tensor must be
    /// the one that the configuration asks for. Without `x_encoder.safetensors` only questions without image can be
    /// asked, unless [`Options::x_encoder`] names another.
    ///
    /// # Errors
    /// [`Error::Load`], which names the file and the key: a file is missing, damaged, changed, of another phase, version
    /// or model, or a tensor is missing, unknown, misshapen or of another type.
    pub fn from_dir(folder: impl AsRef<Path>) -> Result<Mamba3Jepa, Error> {
        Self::options().open(folder)
    }

    /// Choices to open a folder with.
    ///
    /// ```no_run
    /// use kore_vljepa::vljepa::Mamba3Jepa;
    ///
    /// # fn main() -> Result<(), kore_vljepa::Error> {
    /// let model = Mamba3Jepa::options().threads(2).x_encoder("vjepa2-vitl-fpc64-256").open("weights/")?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn options() -> Options {
        Options::default()
    }

    /// All sizes.
    pub fn config(&self) -> &Mamba3JepaConfig {
        &self.manifest.config
    }

    /// The phase that trained it last: 1, 2 (Y-Decoder) or 3 (recursion).
    pub fn phase(&self) -> u32 {
        self.manifest.phase
    }

    /// Type of its large tensors: float32, float16 or bfloat16.
    pub fn dtype(&self) -> &str {
        &self.manifest.dtype
    }

    /// The answers it was trained with, among which [`Answer::nearest`] looks by default.
    pub fn known_answers(&self) -> &[String] {
        &self.manifest.answers
    }

    /// Temperature and template that [`Mamba3Jepa::classify`] has by default.
    pub fn class_defaults(&self) -> (f32, &str) {
        (self.manifest.classify.temperature, &self.manifest.classify.template)
    }

    /// Text to ids and back.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// Whether it can look at images.
    pub fn has_x_encoder(&self) -> bool {
        self.x_encoder.is_some()
    }

    /// The confusion monitor, the state injector and what else there is for knowledge and tools, of a model of phase 3.
    pub fn recursion(&self) -> Option<&Recursion> {
        self.recursion.as_ref()
    }

    /// How open the gates have been; its moving average counts passes of [`Options::batch_size`] samples. `None` without gates.
    pub fn gate_activity(&self) -> Option<GateActivity> {
        self.gates.is_some().then(|| self.activity().clone())
    }

    /// Forgets the moving average of the gates: the next pass starts a new one.
    pub fn reset_context(&self) {
        self.activity().reset();
    }

    /// SHA-256 in hex of everything that a text's embedding depends on; a saved memory has it too.
    pub fn encoder_digest(&self) -> String {
        let compute = || encoder_digest(self.config(), &self.manifest.tokenizer.sha256, &self.y_encoder_weights);
        self.encoder_digest.get_or_init(compute).clone()
    }

    /// SHA-256 in hex of everything that a pooled state depends on but what is seen and asked, and the frozen X-Encoder's
    /// weights; a saved memory that holds episodes has it too.
    pub fn observer_digest(&self) -> String {
        let compute = || observer_digest(self.config(), &self.encoder_digest(), &self.observer_weights);
        self.observer_digest.get_or_init(compute).clone()
    }

    /// Lets the Y-Decoder speak each of B embeddings (E,), as [`Observation::embedding`] is one; the tokens of an answer
    /// do not depend on the others. [`Tokenizer::decode`] gives their text.
    ///
    /// # Errors
    /// [`Error::Absent`] without Y-Decoder, [`Error::Input`] for a wrong setting or length, [`Error::NotFinite`].
    pub fn generate(&self, embeddings: &[&[f32]], config: &GenerationConfig) -> Result<Vec<Generated>, Error> {
        self.pool.install(|| self.speak(embeddings, config, 0))
    }

    /// [`Mamba3Jepa::generate`] on the current pool; `first_row`: number of the first sample, for sampling.
    fn speak(&self, embeddings: &[&[f32]], config: &GenerationConfig, first_row: u64) -> Result<Vec<Generated>, Error> {
        let Some(decoder) = &self.y_decoder else {
            return Err(Error::Absent("the model has no Y-Decoder yet: phase 2 trains it".into()));
        };
        config.check_choice(self.config().vocab_size)?;
        let expected = self.config().embed_dim;
        if let Some(wrong) = embeddings.iter().find(|embedding| embedding.len() != expected) {
            return Err(Error::Input(format!("an embedding of length {}, expected {expected}", wrong.len())));
        }
        let request = generate::Request {
            bos_id: self.tokenizer.bos_id(),
            eos_id: self.tokenizer.eos_id(),
            config,
            max_tokens: self.manifest.max_tokens,
            first_row,
        };
        generate::generate(decoder, embeddings, request)
    }

    fn activity(&self) -> MutexGuard<'_, GateActivity> {
        // What a panic elsewhere left behind is a record of the last passes still.
        self.activity.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn warn(&self, warning: &str) {
        if let Some(warn) = &self.warn {
            warn(warning);
        }
    }
}

#[cfg(test)]
mod tests;
