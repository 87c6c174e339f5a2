//! JPEG: baseline and progressive, grey, colour and four inks, through the `jpeg-decoder` crate.
//!
//! That one because its chroma is interpolated as libjpeg does it, at the edges too, and because (in its portable form)
//! it gives the same pixels on every machine.

use std::io::ErrorKind;

use jpeg_decoder::{Decoder, Error, PixelFormat};

use super::Canvas;

pub(super) fn decode(data: &[u8]) -> Result<Canvas, String> {
    let mut decoder = Decoder::new(data);
    decoder.read_info().map_err(reason)?;
    let info = decoder.info().ok_or("its header is missing")?;
    let mut canvas = Canvas::new(info.width.into(), info.height.into())?;
    let samples = decoder.decode().map_err(reason)?;
    if info.pixel_format == PixelFormat::RGB24 && samples.len() == canvas.rgb.len() {
        canvas.rgb = samples;
        return Ok(canvas);
    }
    let pixels = canvas.rgb.chunks_exact_mut(3);
    match info.pixel_format {
        PixelFormat::L8 => pixels.zip(samples).for_each(|(pixel, grey)| pixel.fill(grey)),
        PixelFormat::CMYK32 => pixels.zip(samples.chunks_exact(4)).for_each(|(pixel, inks)| {
            pixel.copy_from_slice(&[inks[0], inks[1], inks[2]].map(|ink| without_ink(ink, inks[3])));
        }),
        format => return Err(format!("its samples are of an unusual kind ({format:?})")),
    }
    Ok(canvas)
}

fn reason(error: Error) -> String {
    match error {
        Error::Io(cause) if cause.kind() == ErrorKind::UnexpectedEof => "it is cut short".to_owned(),
        error => error.to_string(),
    }
}

/// The light that is left behind an ink and black, by the integer rule of Pillow's `cmyk2rgb`.
fn without_ink(ink: u8, black: u8) -> u8 {
    let light = 255 - black;
    let product = u32::from(ink) * u32::from(light) + 128;
    let absorbed = ((product >> 8) + product) >> 8; // rounded division by 255, at most `light`
    light.saturating_sub(u8::try_from(absorbed).unwrap_or(u8::MAX))
}
