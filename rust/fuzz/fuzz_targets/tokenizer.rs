//! Any bytes as a tokenizer, or a tokenizer, damaged, and what was accepted on a text.

#![no_main]

mod common;

use std::sync::{LazyLock, Once};

use common::{byte_tokenizer, damaged};
use kore_vljepa::tokenizer::Tokenizer;
use libfuzzer_sys::fuzz_target;

static QUIET: Once = Once::new();
static WHOLE: LazyLock<String> = LazyLock::new(|| byte_tokenizer().to_string());

fuzz_target!(|bytes: &[u8]| {
    // The `tokenizers` library panics on some tokenizers made of odd parts, which this crate answers with an error. The
    // fuzzer's own hook would end the process before that.
    QUIET.call_once(|| std::panic::set_hook(Box::new(|_| {})));
    let json = match bytes {
        [0, cut, changes @ ..] => damaged(WHOLE.as_bytes(), *cut, changes),
        other => other.to_vec(),
    };
    let Ok(tokenizer) = Tokenizer::from_bytes("tokenizer.json", &json) else { return };
    for said in ["", "what colour is the circle?", "<eos> \u{1F642} \u{5D0}\u{5D1}"] {
        if let Ok(encoded) = tokenizer.encode(said, 16) {
            let _ = tokenizer.decode(&encoded.ids);
        }
        let _ = tokenizer.unlearned(said);
    }
});
