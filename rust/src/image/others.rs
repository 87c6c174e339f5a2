//! WebP and BMP through the `image` crate.

use std::io::Cursor;

use image::codecs::bmp::BmpDecoder;
use image::codecs::webp::WebPDecoder;
use image::{ColorType, ImageDecoder};

use super::{Canvas, blend};

pub(super) fn decode_webp(data: &[u8]) -> Result<Canvas, String> {
    paint(WebPDecoder::new(Cursor::new(data)).map_err(|error| error.to_string())?)
}

pub(super) fn decode_bmp(data: &[u8]) -> Result<Canvas, String> {
    paint(BmpDecoder::new(Cursor::new(data)).map_err(|error| error.to_string())?)
}

fn paint(decoder: impl ImageDecoder) -> Result<Canvas, String> {
    let (width, height) = decoder.dimensions();
    let mut canvas = Canvas::new(width, height)?;
    let colour = decoder.color_type();
    if colour == ColorType::Rgb8 {
        decoder.read_image(&mut canvas.rgb).map_err(|error| error.to_string())?;
        return Ok(canvas);
    }
    let size = usize::try_from(decoder.total_bytes()).map_err(|_| "its size overflows")?;
    let mut samples = vec![0; size];
    decoder.read_image(&mut samples).map_err(|error| error.to_string())?;
    let pixels = canvas.rgb.chunks_exact_mut(3);
    match colour {
        ColorType::L8 => pixels.zip(samples).for_each(|(pixel, grey)| pixel.fill(grey)),
        ColorType::Rgba8 => pixels.zip(samples.chunks_exact(4)).for_each(|(pixel, rgba)| {
            pixel.copy_from_slice(&blend([rgba[0], rgba[1], rgba[2]], rgba[3]));
        }),
        other => return Err(format!("its colours are of an unusual kind ({other:?})")),
    }
    Ok(canvas)
}
