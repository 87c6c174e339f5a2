//! `kore-vljepa inspect`: what a safetensors file holds, without reading its tensors.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};

use kore_vljepa::files::path_text;
use kore_vljepa::loader::read_header;
use serde::{Serialize, Serializer};
use serde_json::Value;

use crate::output::{Failure, Table, failure, grouped, print, print_json, shown};

const WIDEST: usize = 100; // of a value on the screen; --json shows it whole
const ZIP: &[u8] = b"PK\x03\x04"; // how a file of torch.save begins

/// Say what a safetensors file holds: metadata, tensors, counts.
#[derive(clap::Args)]
pub(crate) struct Inspect {
    /// Any safetensors file.
    #[arg(value_name = "PATH")]
    file: PathBuf,
    /// As in the other commands: cpu. A file is only read, nothing is computed.
    #[arg(long, value_name = "STR", default_value = "cpu")]
    device: String,
    /// Print everything as JSON.
    #[arg(long, overrides_with = "json")]
    json: bool,
}

/// What is found, in the order it is printed.
#[derive(Serialize)]
struct Found {
    file: String,
    bytes: u64,
    kind: &'static str,
    metadata: BTreeMap<String, Value>,
    tensors: Vec<Tensor>,
    #[serde(serialize_with = "as_map")]
    parameters: Vec<(String, u64)>,
}

#[derive(Serialize)]
struct Tensor {
    name: String,
    dtype: String,
    shape: Vec<usize>,
}

impl Inspect {
    pub(crate) fn run(&self) -> Result<(), Failure> {
        crate::args::check_device(&self.device)?;
        let mut found = inspect(&self.file)?;
        if self.json {
            return print_json(&found);
        }
        // golden files say what each tensor is
        let descriptions = match found.metadata.remove("tensors") {
            Some(Value::Object(descriptions)) => descriptions,
            Some(other) => {
                found.metadata.insert("tensors".into(), other);
                serde_json::Map::new()
            }
            None => serde_json::Map::new(),
        };
        let mut text = format!("{}: {}, {} bytes\n\n", found.file, found.kind, grouped(found.bytes));
        if !found.metadata.is_empty() {
            text += &metadata_table(&found.metadata);
        }
        let mut tensors = Table::left(["tensor", "dtype", "shape", if descriptions.is_empty() { "" } else { "what" }]);
        for Tensor { name, dtype, shape } in &found.tensors {
            let sizes: Vec<String> = shape.iter().map(usize::to_string).collect();
            let sizes = if sizes.is_empty() { "scalar".into() } else { sizes.join(" x ") };
            let what = descriptions.get(name).and_then(Value::as_str).unwrap_or("");
            tensors.row([name.as_str(), dtype, &sizes, what]);
        }
        text += &format!("{tensors}\n");
        let mut counts = Table::new(["component", "numbers"]);
        for (component, count) in &found.parameters {
            counts.row([component, &grouped(*count)]);
        }
        print(&(text + counts.to_string().trim_end()))
    }
}

fn inspect(path: &Path) -> Result<Found, Failure> {
    let file = shown(path);
    if path.is_dir() {
        return Err(failure(format!("{file} is a folder, {}: name a file", inside(path))));
    }
    if !path.exists() {
        return Err(failure(format!("{file}: there is no such file")));
    }
    if is_checkpoint(path) {
        return Err(failure(format!(
            "{file} is a checkpoint of the training: `mamba3-jepa inspect` (Python) reads it"
        )));
    }
    let header = read_header(path)?;
    let tensors: Vec<Tensor> = header
        .tensors
        .into_iter()
        .map(|(name, (dtype, shape))| Tensor { name, dtype: format!("{dtype:?}"), shape })
        .collect();
    let metadata = header.metadata.into_iter().map(|(key, value)| (key, parsed(value))).collect();
    let parameters = counts(&tensors);
    Ok(Found { file, bytes: header.bytes, kind: "safetensors", metadata, tensors, parameters })
}

/// What a folder holds, for the message that it is one.
fn inside(folder: &Path) -> String {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let is_weights = |path: &PathBuf| path.extension().is_some_and(|suffix| suffix == "safetensors" || suffix == "pt");
    let mut names: Vec<String> =
        entries.filter(|entry| is_weights(&entry.path())).map(|entry| path_text(entry.file_name())).collect();
    names.sort();
    if names.is_empty() {
        "and holds no checkpoint and no safetensors file".into()
    } else {
        format!("it holds {}", names.join(", "))
    }
}

fn is_checkpoint(path: &Path) -> bool {
    let mut start = [0; ZIP.len()];
    let is_zip = File::open(path).and_then(|mut file| file.read_exact(&mut start)).is_ok() && start == ZIP;
    is_zip || path.extension().is_some_and(|suffix| suffix == "pt")
}

/// How many numbers there are under each first part of a name, and in all.
fn counts(tensors: &[Tensor]) -> Vec<(String, u64)> {
    let mut counts: Vec<(String, u64)> = Vec::new();
    let mut total = 0;
    for tensor in tensors {
        let component = tensor.name.split('.').next().unwrap_or_default();
        let count = tensor.shape.iter().map(|&size| size as u64).product::<u64>();
        total += count;
        match counts.iter_mut().find(|(name, _)| name == component) {
            Some((_, sum)) => *sum += count,
            None => counts.push((component.into(), count)),
        }
    }
    counts.push(("total".into(), total));
    counts
}

/// Metadata values are texts; those that are JSON objects or lists are shown as such.
fn parsed(value: String) -> Value {
    match serde_json::from_str(&value) {
        Ok(parsed @ (Value::Object(_) | Value::Array(_))) => parsed,
        _ => Value::String(value),
    }
}

/// A table of nested values, each under its dotted name.
fn metadata_table(metadata: &BTreeMap<String, Value>) -> String {
    let mut table = Table::left(["metadata", ""]);
    for (key, value) in metadata {
        add_flattened(key, value, &mut table);
    }
    format!("{table}\n")
}

fn add_flattened(name: &str, value: &Value, table: &mut Table) {
    let text = match value {
        Value::Object(members) => {
            members.iter().for_each(|(key, value)| add_flattened(&format!("{name}.{key}"), value, table));
            return;
        }
        Value::String(text) => text.clone(),
        other => other.to_string(),
    };
    let length = text.chars().count();
    let short: String = text.chars().take(WIDEST).collect();
    table.row([
        name,
        &if length <= WIDEST { text } else { format!("{short}... ({} characters)", grouped(length as u64)) },
    ]);
}

fn as_map<S: Serializer>(pairs: &[(String, u64)], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_map(pairs.iter().map(|(key, value)| (key, value)))
}
