//! `kore-vljepa verify`: whether this build computes what Python computed.

use std::path::PathBuf;
use std::process::ExitCode;

use kore_vljepa::verify::Report;
use kore_vljepa::vljepa::Options;
use serde::Serialize;

use crate::args::open_folder;
use crate::output::{Failure, Table, print, print_json, progress, shown};

/// What `verify` returns when a difference is above its bound.
const DIFFERENT: u8 = 1;

/// Recompute the golden files of an export (`mamba3-jepa export --golden`) and compare.
///
/// Exit status 1 if a tensor differs by more than its bound.
#[derive(clap::Args)]
pub(crate) struct Verify {
    /// The exported folder; its golden files are in golden/.
    #[arg(value_name = "DIR")]
    folder: PathBuf,
    /// Threads to compute with; default: one for each core. The results do not depend on it.
    #[arg(long, value_name = "INT", allow_negative_numbers = true)]
    threads: Option<i64>,
    /// The X-Encoder, where the export has none: a transformers folder with V-JEPA 2, or an export's x_encoder.safetensors.
    #[arg(long, value_name = "PATH")]
    x_encoder: Option<PathBuf>,
    /// Print JSON.
    #[arg(long, overrides_with = "json")]
    json: bool,
}

#[derive(Serialize)]
struct Verified<'a> {
    folder: String,
    within_bounds: bool,
    components: Vec<Component<'a>>,
    skipped: &'a [String],
}

#[derive(Serialize)]
struct Component<'a> {
    component: &'a str,
    tensors: usize,
    inputs: usize,
    worst_tensor: Option<&'a str>,
    difference: Option<f64>,
    bound: Option<f64>,
    within_bounds: bool,
}

impl Verify {
    pub(crate) fn run(&self) -> Result<ExitCode, Failure> {
        let model = open_folder(&self.folder, self.threads, self.x_encoder.as_deref(), Options::default())?;
        let report = model.verify(self.folder.join("golden"), &mut progress("golden files"))?;
        if self.json {
            print_json(&self.values(&report))?;
        } else {
            print(&self.text(&report))?;
        }
        Ok(if report.is_within_bound() { ExitCode::SUCCESS } else { DIFFERENT.into() })
    }

    fn values<'a>(&self, report: &'a Report) -> Verified<'a> {
        let components = report.components.iter().map(|found| Component {
            component: &found.component,
            tensors: found.compared,
            inputs: found.inputs,
            worst_tensor: found.worst.as_ref().map(|worst| worst.tensor.as_str()),
            difference: found.worst.as_ref().map(|worst| worst.value),
            bound: found.worst.as_ref().map(|worst| worst.bound),
            within_bounds: found.is_within_bound(),
        });
        Verified {
            folder: shown(&self.folder),
            within_bounds: report.is_within_bound(),
            components: components.collect(),
            skipped: &report.skipped,
        }
    }

    fn text(&self, report: &Report) -> String {
        let mut table = Table::new(["component", "tensors", "worst tensor", "difference", "bound", ""]);
        for found in &report.components {
            let verdict = if found.is_within_bound() { "" } else { "ABOVE" };
            let (tensor, value, bound) = match &found.worst {
                Some(worst) => (worst.tensor.as_str(), short(worst.value), short(worst.bound)),
                None => ("", String::new(), String::new()),
            };
            table.row([found.component.as_str(), &found.compared.to_string(), tensor, &value, &bound, verdict]);
        }
        let skipped = match &report.skipped[..] {
            [] => String::new(),
            names => format!("\nnot verified, because the model lacks it: {}", names.join(", ")),
        };
        let verdict =
            if report.is_within_bound() { "every tensor is within its bound" } else { "there are differences" };
        format!("{table}\n{}: {verdict}{skipped}", shown(&self.folder))
    }
}

/// Two digits are enough for what is nearly nothing.
fn short(value: f64) -> String {
    if value == 0.0 { "0".into() } else { format!("{value:.1e}") }
}
