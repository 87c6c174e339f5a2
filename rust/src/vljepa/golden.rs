//! Holding a model against the golden files of its export.

use std::path::Path;

use super::{Mamba3Jepa, Progress};
use crate::error::Error;
use crate::verify::{Models, Report, recompute};

impl Mamba3Jepa {
    /// Recomputes every tensor of every golden file in the folder `golden`, which `mamba3-jepa export --golden` writes
    /// beside the weights. `progress` counts files.
    ///
    /// # Errors
    /// [`Error::Load`] if the folder has no golden files, one is missing, damaged or does not belong to the model, or has a
    /// tensor that is missing or unknown; [`Error::Input`], [`Error::Image`] or [`Error::NotFinite`] if its inputs do not
    /// fit the model, or the model's outputs are of no use.
    pub fn verify(&self, golden: impl AsRef<Path>, progress: Progress<'_>) -> Result<Report, Error> {
        let models = Models {
            tokenizer: &self.tokenizer,
            x_encoder: self.x_encoder.as_ref(),
            normalization: (self.manifest.image.mean, self.manifest.image.std),
            predictor: &self.predictor,
            y_encoder: &self.y_encoder,
            gates: self.gates.as_ref(),
            y_decoder: self.y_decoder.as_ref(),
            recursion: self.recursion.as_ref(),
        };
        let golden = golden.as_ref();
        self.pool.install(|| recompute(&models, golden, progress))
    }
}
