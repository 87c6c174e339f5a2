//! How a model is opened.

use std::path::{Path, PathBuf};

use super::Mamba3Jepa;
use crate::error::Error;

/// Called with how much is done and how much there is, on long work; on any thread, one call at a time.
pub type Progress<'a> = &'a mut (dyn FnMut(usize, usize) + Send);

/// Is told what the user should know: that a text was cut, that the context should be reset.
pub(super) type Warn = Box<dyn Fn(&str) + Send + Sync>;

/// More threads are a mistake, and take long to start.
pub const MAX_THREADS: usize = 1024;

/// What can be chosen when a folder is opened; see [`Mamba3Jepa::options`].
pub struct Options {
    pub(super) threads: Option<usize>,
    pub(super) batch_size: usize,
    pub(super) x_encoder: Option<PathBuf>,
    pub(super) warn: Option<Warn>,
}

impl Default for Options {
    fn default() -> Options {
        Options { threads: None, batch_size: 32, x_encoder: None, warn: None }
    }
}

impl Options {
    /// Threads to compute with, 1 to [`MAX_THREADS`]; by default one for each core. The results do not depend on it.
    #[must_use]
    pub fn threads(mut self, n: usize) -> Options {
        self.threads = Some(n);
        self
    }

    /// Samples in one pass, 32 by default: more take more memory. The results do not depend on it, but the moving average
    /// of the gates counts passes.
    #[must_use]
    pub fn batch_size(mut self, n: usize) -> Options {
        self.batch_size = n.max(1);
        self
    }

    /// Where the X-Encoder is, in place of the folder's own `x_encoder.safetensors`: a folder of `transformers` with
    /// V-JEPA 2, or the `x_encoder.safetensors` of another export.
    #[must_use]
    pub fn x_encoder(mut self, path: impl Into<PathBuf>) -> Options {
        self.x_encoder = Some(path.into());
        self
    }

    /// Who is told what the user should know. By default nobody.
    #[must_use]
    pub fn on_warning(mut self, warn: impl Fn(&str) + Send + Sync + 'static) -> Options {
        self.warn = Some(Box::new(warn));
        self
    }

    /// Opens the exported folder `folder`.
    ///
    /// # Errors
    /// See [`Mamba3Jepa::from_dir`]; also [`Error::Load`] if the X-Encoder chosen here cannot be used, and [`Error::Input`]
    /// for a number of threads that is not between 1 and [`MAX_THREADS`], or if the environment variable `KORE_VLJEPA_SIMD`
    /// names instructions that this processor does not have.
    pub fn open(self, folder: impl AsRef<Path>) -> Result<Mamba3Jepa, Error> {
        Mamba3Jepa::open(folder.as_ref(), self)
    }
}
