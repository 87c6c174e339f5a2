//! The Y-Decoder alone: an embedding and the tokens of a text to the logits of each next token.
//!
//! `cargo run --release --example decoder_logits -- y_decoder.safetensors TEXTS.safetensors LOGITS.safetensors`
//!
//! TEXTS holds token ids (B, L) int64 as `ids` and embeddings (B, E) as `embedding`; LOGITS receives (B, L, V) as `logits`.

use std::error::Error;
use std::process::ExitCode;

use kore_vljepa::loader::load_safetensors;
use kore_vljepa::y_decoder::Mamba3Decoder;
use safetensors::{Dtype, tensor::TensorView};

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [model, texts, out] = arguments.as_slice() else {
        return Err("expected three arguments: y_decoder.safetensors TEXTS.safetensors LOGITS.safetensors".into());
    };
    let decoder = Mamba3Decoder::from_weights(&load_safetensors(model)?)?;
    let texts = load_safetensors(texts)?;
    let ids = texts.to_i64("ids")?;
    let embeddings = texts.to_f32("embedding")?;
    let (width, vocabulary) = (decoder.config().embed_dim, decoder.config().vocab_size);
    let batch = embeddings.len() / width;
    if batch == 0 || batch * width != embeddings.len() || ids.len() % batch != 0 || ids.is_empty() {
        return Err(format!("{} token ids for embeddings of {} numbers", ids.len(), embeddings.len()).into());
    }
    let length = ids.len() / batch;
    let ids = ids.iter().map(|&id| u32::try_from(id)).collect::<Result<Vec<_>, _>>()?;
    let mut logits = Vec::new();
    for (embedding, ids) in embeddings.chunks(width).zip(ids.chunks(length)) {
        logits.extend(decoder.logits(embedding, ids)?);
    }
    let bytes: Vec<u8> = logits.iter().flat_map(|x| x.to_le_bytes()).collect();
    let view = TensorView::new(Dtype::F32, vec![batch, length, vocabulary], &bytes)?;
    std::fs::write(out, safetensors::serialize([("logits", view)], None)?)?;
    Ok(())
}
