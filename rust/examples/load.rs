//! The first lines of the README, and what comes after them: the files one by one, up to a predicted embedding.
//!
//! `cargo run --release --example load -- weights "what color is the circle?"`

use std::error::Error;
use std::path::PathBuf;

use kore_vljepa::angn::{AdaptiveNeuralGate, GateActivity};
use kore_vljepa::loader::load_safetensors;
use kore_vljepa::predictor::{Mamba3Predictor, Prediction, PredictorInput};
use kore_vljepa::tokenizer::Tokenizer;
use kore_vljepa::y_encoder::Mamba3TextEncoder;

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let folder = PathBuf::from(arguments.next().unwrap_or_else(|| "weights".into()));
    let question = arguments.next().unwrap_or_else(|| "what color is the circle?".into());

    let weights = load_safetensors(folder.join("predictor.safetensors"))?;
    let predictor = Mamba3Predictor::from_weights(&weights)?;
    println!("{}: {} tensors, {} bytes", weights.path().display(), weights.tensors().len(), weights.len_bytes());

    // A question's tokens enter the predictor through the Y-Encoder's table.
    let encoder = Mamba3TextEncoder::from_weights(&load_safetensors(folder.join("y_encoder.safetensors"))?)?;
    let tokenizer = Tokenizer::from_file(folder.join("tokenizer.json"))?;
    let ids = tokenizer.encode(&question, predictor.config().max_query_tokens)?.ids;
    let query = encoder.embed_tokens(&ids)?;
    let sample = PredictorInput { visual: None, query: &query };

    let predicted = if predictor.config().angn.enabled {
        let gates = AdaptiveNeuralGate::from_weights(&load_safetensors(folder.join("angn.safetensors"))?)?;
        let mut activity = GateActivity::new();
        let predicted = predictor.predict(&[sample], Some((&gates, &mut activity)))?;
        println!("gates: {:.3?} open, by layer", activity.activity());
        predicted
    } else {
        predictor.predict(&[sample], None)?
    };
    for Prediction { embedding, pooled } in predicted {
        println!("{question:?} without a picture: {} numbers, read from a state of {}", embedding.len(), pooled.len());
        // What a text is compared by: the cosine of its own embedding.
        for text in ["red", "yes"] {
            let ids = tokenizer.encode(text, encoder.config().max_answer_tokens)?.ids;
            let target = encoder.encode(&[ids])?.remove(0);
            let cosine: f32 = embedding.iter().zip(&target).map(|(a, b)| a * b).sum();
            println!("{cosine:6.3}  {text}");
        }
    }
    Ok(())
}
