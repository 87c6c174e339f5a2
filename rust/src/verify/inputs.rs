//! The golden files of what comes before embeddings: pictures, texts, pixels.

use std::collections::BTreeMap;

use serde::Deserialize;

use crate::config::Mamba3JepaConfig;
use crate::error::Error;
use crate::image;
use crate::pooling::grid_means;
use crate::tokenizer::Tokenizer;
use crate::vit::{PixelShape, VisionEncoder};

use super::golden::Golden;

/// What the header says of a picture.
#[derive(Deserialize)]
struct PictureInfo {
    lossy: bool,
}

/// Encoded pictures to pixels of side `size`.
pub(super) fn images(golden: &mut Golden, size: usize) -> Result<(), Error> {
    let pictures: BTreeMap<String, PictureInfo> = serde_json::from_str(golden.metadata("images")?)
        .map_err(|error| golden.mismatch(&format!("its metadata's images cannot be read: {error}")))?;
    for (name, info) in pictures {
        let file = golden.input_bytes(&format!("image.{name}.file"))?;
        let pixels = image::decode(&file)?.to_pixels(size);
        let key = format!("image.{name}.pixels");
        match info.lossy {
            true => golden.check_pixels(&key, &pixels)?,
            false => golden.check_bytes(&key, &pixels)?,
        }
    }
    Ok(())
}

/// Texts to token ids, cut at the model's limits and whole.
pub(super) fn tokens(golden: &mut Golden, tokenizer: &Tokenizer, config: &Mamba3JepaConfig) -> Result<(), Error> {
    let texts: Vec<String> = serde_json::from_str(golden.metadata("texts")?)
        .map_err(|error| golden.mismatch(&format!("its metadata's texts cannot be read: {error}")))?;
    for (i, text) in texts.iter().enumerate() {
        for (name, limit) in
            [("ids", config.max_answer_tokens), ("query_ids", config.max_query_tokens), ("all_ids", text.len() + 2)]
        {
            golden.check_ids(&format!("{name}.{i}"), &tokenizer.encode(text, limit)?.ids)?;
        }
    }
    Ok(())
}

/// A picture, normalised by `mean` and `std` of its colours, and a clip to visual tokens; those of the picture as the
/// predictor reads them, too, where it does not read each by itself.
pub(super) fn x_encoder(
    golden: &mut Golden,
    encoder: &VisionEncoder,
    (mean, std): ([f32; 3], [f32; 3]),
    config: &Mamba3JepaConfig,
) -> Result<(), Error> {
    let side = |golden: &Golden, key: &str, axis| golden.size(key, axis);
    let shape = PixelShape::Image { height: side(golden, "pixels", 2)?, width: side(golden, "pixels", 3)? };
    let picture = golden.input_bytes("image_u8")?;
    golden.check("pixels", &image::normalize(&picture, mean, std))?;
    let pixels = golden.input("pixels")?;
    let tokens = encoder.encode(&pixels, shape)?;
    golden.check("visual_tokens", &tokens)?;
    if golden.has("pooled_visual_tokens") {
        let (vision, pool) = (&config.vision, config.predictor.visual_pool);
        golden.check("pooled_visual_tokens", &grid_means(tokens, vision.hidden_size, vision.side(), pool))?;
    }
    if golden.has("clip") {
        let shape = PixelShape::Clip {
            frames: side(golden, "clip", 1)?,
            height: side(golden, "clip", 3)?,
            width: side(golden, "clip", 4)?,
        };
        let clip = golden.input("clip")?;
        golden.check("clip_visual_tokens", &encoder.encode(&clip, shape)?)?;
    }
    Ok(())
}
