//! Whether this build computes what Python computed: the golden files of an export, recomputed from its weights.

mod components;
mod golden;
mod inputs;
mod samples;

use std::fs;
use std::path::Path;

use crate::error::{Error, LoadError};
use crate::vljepa::{Mamba3Jepa, Progress};

pub(crate) use components::Models;

/// Every golden file, in the order in which they are verified.
const NAMES: [&str; 8] = ["images", "tokens", "x_encoder", "predictor", "y_encoder", "angn", "y_decoder", "recursion"];

/// How far a recomputed tensor is from the one in the golden file.
#[derive(Clone, Debug, PartialEq)]
pub struct Difference {
    /// Its key.
    pub tensor: String,
    /// For numbers, the length of the difference over the length of the golden tensor (angles on the circle); for ids and
    /// exact pixels, the share of them that differ; for pixels of lossy formats, the mean or the largest difference over
    /// 255, whichever is the worse.
    pub value: f64,
    /// The largest `value` that counts as the same.
    pub bound: f64,
}

impl Difference {
    /// Whether it is too large, or not a number.
    pub fn exceeds(&self) -> bool {
        self.value.is_nan() || self.value > self.bound
    }

    /// What makes one difference worse than another of another kind.
    fn severity(&self) -> f64 {
        match self.value {
            0.0 => 0.0,
            value if value.is_nan() => f64::INFINITY,
            value => value / self.bound,
        }
    }
}

/// What came of one golden file.
#[derive(Clone, Debug, PartialEq)]
pub struct ComponentReport {
    /// The file's name without `.safetensors`: a component, `images` or `tokens`.
    pub component: String,
    /// Tensors that were recomputed and compared.
    pub compared: usize,
    /// Tensors that were the inputs.
    pub inputs: usize,
    /// The worst of the compared ones.
    pub worst: Option<Difference>,
}

impl ComponentReport {
    /// Whether every tensor is within its bound.
    pub fn is_within_bound(&self) -> bool {
        self.worst.as_ref().is_none_or(|worst| !worst.exceeds())
    }
}

/// What came of all golden files.
#[derive(Clone, Debug, PartialEq)]
pub struct Report {
    /// One for each file that was verified.
    pub components: Vec<ComponentReport>,
    /// Golden files whose component the model does not have: the X-Encoder's, mostly.
    pub skipped: Vec<String>,
}

impl Report {
    /// Whether every tensor of every file is within its bound.
    pub fn is_within_bound(&self) -> bool {
        self.components.iter().all(ComponentReport::is_within_bound)
    }
}

/// Opens an exported folder and recomputes the golden files in `{folder}/golden`.
///
/// ```no_run
/// # fn main() -> Result<(), kore_vljepa::Error> {
/// let report = kore_vljepa::verify::verify("weights/")?;
/// assert!(report.is_within_bound());
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// As for [`Mamba3Jepa::from_dir`] and [`Mamba3Jepa::verify`].
pub fn verify(folder: impl AsRef<Path>) -> Result<Report, Error> {
    let folder = folder.as_ref();
    Mamba3Jepa::from_dir(folder)?.verify(folder.join("golden"), &mut |_, _| ())
}

/// Recomputes every tensor of every golden file in the folder `golden`, on the current thread pool.
pub(crate) fn recompute(models: &Models<'_>, golden: &Path, progress: Progress<'_>) -> Result<Report, Error> {
    let found = golden_names(golden)?;
    // one that should be there and is not is missed when it is opened
    let names: Vec<&str> =
        NAMES.into_iter().filter(|&name| models.has(name) || found.iter().any(|found| found == name)).collect();
    let mut report = Report { components: Vec::new(), skipped: Vec::new() };
    for (done, &name) in names.iter().enumerate() {
        progress(done, names.len());
        match models.verify(name, golden)? {
            Some(component) => report.components.push(component),
            None => report.skipped.push(name.into()),
        }
    }
    progress(names.len(), names.len());
    Ok(report)
}

/// The golden files in a folder, without `.safetensors`.
fn golden_names(golden: &Path) -> Result<Vec<String>, LoadError> {
    let unreadable = |source| LoadError::Read { path: golden.to_path_buf(), source };
    let mismatch = |path: &Path, reason: String| LoadError::Mismatch { path: path.to_path_buf(), reason };
    let mut names = Vec::new();
    for entry in fs::read_dir(golden).map_err(unreadable)? {
        let path = entry.map_err(unreadable)?.path();
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let Some(name) = name.strip_suffix(".safetensors") else { continue };
        if !NAMES.contains(&name) {
            return Err(mismatch(&path, format!("not a golden file that is known: they are {}", NAMES.join(", "))));
        }
        names.push(name.to_owned());
    }
    match names.is_empty() {
        true => Err(mismatch(golden, "it has no golden files; export with --golden".into())),
        false => Ok(names),
    }
}
