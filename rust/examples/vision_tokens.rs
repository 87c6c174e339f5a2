//! V-JEPA 2 alone: pixels to visual tokens.
//!
//! `cargo run --release --example vision_tokens -- MODEL PIXELS.safetensors TOKENS.safetensors`
//!
//! MODEL is a `transformers` folder or an exported `x_encoder.safetensors`. Each tensor of PIXELS is an image (3, H, W) or
//! a clip (T, 3, H, W), normalised; TOKENS receives (N, D) under the same name.

use std::error::Error;
use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;

use kore_vljepa::loader::load_safetensors;
use kore_vljepa::vit::{PixelShape, VisionEncoder};
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
    let [model, pixels, out] = arguments.as_slice() else {
        return Err("expected three arguments: MODEL PIXELS.safetensors TOKENS.safetensors".into());
    };
    let encoder = if Path::new(model).is_dir() {
        VisionEncoder::from_transformers_dir(model)?
    } else {
        VisionEncoder::from_weights(&load_safetensors(model)?)?
    };
    let width = encoder.config().hidden_size;
    let pixels = load_safetensors(pixels)?;
    let mut results = Vec::new();
    for (name, info) in pixels.tensors() {
        let shape = match *info.shape.as_slice() {
            [3, height, width] => PixelShape::Image { height, width },
            [frames, 3, height, width] => PixelShape::Clip { frames, height, width },
            _ => return Err(format!("{name}: expected (3, H, W) or (T, 3, H, W), found {:?}", info.shape).into()),
        };
        let numbers = pixels.to_f32(name)?;
        let start = Instant::now();
        let tokens = encoder.encode(&numbers, shape)?;
        println!("{name}: {} tokens in {:.3} s", tokens.len() / width, start.elapsed().as_secs_f64());
        results.push((name, vec![tokens.len() / width, width], tokens));
    }
    let bytes: Vec<Vec<u8>> =
        results.iter().map(|(_, _, tokens)| tokens.iter().flat_map(|x| x.to_le_bytes()).collect()).collect();
    let views = results.iter().zip(&bytes).map(|((name, shape, _), bytes)| {
        TensorView::new(Dtype::F32, shape.clone(), bytes).map(|view| (name.as_str(), view))
    });
    std::fs::write(out, safetensors::serialize(views.collect::<Result<Vec<_>, _>>()?, None)?)?;
    Ok(())
}
