//! A whole exported folder, one of whose files is damaged.
//!
//! `KORE_VLJEPA_FOLDER` names a small export to start from. The first byte chooses the file, the second whether it is
//! cut short, the others where it is changed and to what. `config.json` then gets the digest of the damaged file, so
//! that it is not the digest by which the damage is found.

#![no_main]

use std::path::PathBuf;
use std::sync::LazyLock;

use kore_vljepa::vljepa::Mamba3Jepa;
use libfuzzer_sys::fuzz_target;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

const CONFIG: &str = "config.json";

static FILES: LazyLock<Vec<(String, Vec<u8>)>> = LazyLock::new(|| {
    let folder = PathBuf::from(std::env::var_os("KORE_VLJEPA_FOLDER").expect("KORE_VLJEPA_FOLDER names an export"));
    let mut files: Vec<_> = std::fs::read_dir(folder)
        .expect("the folder can be read")
        .filter_map(|entry| {
            let path = entry.ok()?.path();
            Some((path.file_name()?.to_str()?.to_owned(), std::fs::read(&path).ok()?))
        })
        .collect();
    files.sort();
    files
});

fn damaged(whole: &[u8], cut: u8, changes: &[u8]) -> Vec<u8> {
    let mut bytes = whole.to_vec();
    for change in changes.chunks_exact(3) {
        // most of a file is weights, which may be anything: the beginning is changed as often as the rest
        let span = if change[0] & 1 == 0 { bytes.len() } else { bytes.len().min(1 << 12) };
        let place = usize::from(u16::from_le_bytes([change[0], change[1]])) * span / (1 << 16);
        if let Some(byte) = bytes.get_mut(place) {
            *byte = change[2];
        }
    }
    if cut < 32 {
        bytes.truncate(bytes.len() * usize::from(cut) / 32);
    }
    bytes
}

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
    let _ = Mamba3Jepa::from_dir(folder.path());
});
