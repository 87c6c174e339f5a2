//! A whole exported folder, one of whose files is damaged, asked a question if it opens.
//!
//! The first byte chooses the file, the second whether it is cut short, the others where it is changed and to what.
//! `config.json` then gets the digest of the damaged file, so that it is not the digest by which the damage is found.

#![no_main]

mod common;

use std::sync::{LazyLock, Once};

use common::{TinyModel, damaged};
use kore_vljepa::vljepa::{Mamba3Jepa, Sample};
use libfuzzer_sys::fuzz_target;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

const CONFIG: &str = "config.json";

static QUIET: Once = Once::new();
static FILES: LazyLock<Vec<(String, Vec<u8>)>> = LazyLock::new(|| {
    let folder = tempfile::tempdir().expect("a temporary folder");
    TinyModel::new().write(folder.path());
    let mut files: Vec<_> = std::fs::read_dir(folder.path())
        .expect("the folder can be read")
        .filter_map(|entry| {
            let path = entry.ok()?.path();
            Some((path.file_name()?.to_str()?.to_owned(), std::fs::read(&path).ok()?))
        })
        .collect();
    files.sort();
    files
});

/// `config.json` with the size and digest of a damaged file.
fn redigested(config: &[u8], name: &str, bytes: &[u8]) -> Vec<u8> {
    let mut values: Value = serde_json::from_slice(config).expect("the export's config.json is JSON");
    let digest: String = Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect();
    let entry = json!({"bytes": bytes.len(), "sha256": digest});
    if name == "tokenizer.json" {
        values["tokenizer"] = entry;
    } else {
        values["files"][name] = entry;
    }
    values.to_string().into_bytes()
}

fuzz_target!(|bytes: &[u8]| {
    // see the target `tokenizer`
    QUIET.call_once(|| std::panic::set_hook(Box::new(|_| {})));
    let [choice, cut, changes @ ..] = bytes else { return };
    let folder = tempfile::tempdir().expect("a temporary folder");
    let (chosen, whole) = &FILES[usize::from(*choice) % FILES.len()];
    let changed = damaged(whole, *cut, changes);
    for (name, whole) in FILES.iter() {
        let content = match name {
            name if name == chosen => changed.clone(),
            name if name == CONFIG => redigested(whole, chosen, &changed),
            _ => whole.clone(),
        };
        std::fs::write(folder.path().join(name), content).expect("a file can be written");
    }
    if let Ok(model) = Mamba3Jepa::options().threads(1).open(folder.path()) {
        let _ = model.ask(Sample::question("what color is it?"));
    }
});
