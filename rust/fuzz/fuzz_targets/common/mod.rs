//! Whole files, and damage to them: from whole ones the fuzzer gets further than from nothing.
#![allow(dead_code, unused_imports, reason = "each target uses another part of it")]

#[path = "../../../tests/common/mod.rs"]
mod tiny;

pub(crate) use tiny::{TinyModel, byte_tokenizer};

/// `whole` with `changes`, three bytes each (where, twice, and to what), cut short if `cut` is small.
pub(crate) fn damaged(whole: &[u8], cut: u8, changes: &[u8]) -> Vec<u8> {
    let mut bytes = whole.to_vec();
    for change in changes.chunks_exact(3) {
        // most of a file is weights, which may be anything: its beginning is changed as often as the rest
        let span = if change[0] & 1 == 0 { bytes.len() } else { bytes.len().min(1 << 13) };
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
