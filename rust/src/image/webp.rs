//! WebP through the `image` crate.

use std::io::Cursor;

use image::ImageDecoder;
use image::codecs::webp::WebPDecoder;

use super::metadata::riff_chunks;
use super::{Canvas, paint};

pub(super) fn decode(data: &[u8]) -> Result<Canvas, String> {
    let data = announced(data)?;
    let decoder = WebPDecoder::new(Cursor::new(data)).map_err(|error| error.to_string())?;
    if !frames_fit(data.get(12..).unwrap_or_default(), decoder.dimensions()) {
        return Err("a frame is not of the size that was announced, or lies within another".to_owned());
    }
    paint(decoder)
}

/// The file as far as its header says that it goes; all of it must be there.
fn announced(data: &[u8]) -> Result<&[u8], String> {
    let size = data.get(4..8).and_then(|size| size.try_into().ok()).map(u32::from_le_bytes);
    let size = size.and_then(|size| usize::try_from(size).ok()).ok_or("it has no size")?;
    let end = size.checked_add(8).filter(|end| (20..=data.len()).contains(end));
    let end =
        end.ok_or_else(|| format!("it is cut short: of {size} bytes {} are there", data.len().saturating_sub(8)))?;
    Ok(&data[..end])
}

/// Whether each frame among these chunks has the size that the canvas, or the animation's frame around it, has.
///
/// The decoder takes memory for what a frame says of itself, and relies on both being the same. A frame of an animation
/// holds no other.
fn frames_fit(chunks: &[u8], canvas: (u32, u32)) -> bool {
    riff_chunks(chunks).all(|(kind, body)| match kind {
        b"ANMF" => {
            let side = |at| u24(body, at).map(|side| side + 1);
            side(6).zip(side(9)).is_some_and(|size| {
                let inner = body.get(16..).unwrap_or_default();
                riff_chunks(inner).all(|(kind, body)| kind != b"ANMF" && frame_fits(kind, body, size))
            })
        }
        _ => frame_fits(kind, body, canvas),
    })
}

fn frame_fits(kind: &[u8], body: &[u8], size: (u32, u32)) -> bool {
    match kind {
        b"VP8 " => vp8_size(body) == Some(size),
        b"VP8L" => vp8l_size(body) == Some(size),
        _ => true,
    }
}

/// Width and height in the header of a lossy frame: a key frame's start code, then 14 bits of each.
fn vp8_size(frame: &[u8]) -> Option<(u32, u32)> {
    let &[0x9d, 0x01, 0x2a, w0, w1, h0, h1] = frame.get(3..10)? else { return None };
    let side = |low, high| u32::from(u16::from_le_bytes([low, high]) & 0x3fff);
    Some((side(w0, w1), side(h0, h1)))
}

/// Width and height in the header of a lossless frame: 14 bits of each, less one.
fn vp8l_size(frame: &[u8]) -> Option<(u32, u32)> {
    let &[0x2f, b0, b1, b2, b3] = frame.get(..5)? else { return None };
    let bits = u32::from_le_bytes([b0, b1, b2, b3]);
    Some(((bits & 0x3fff) + 1, ((bits >> 14) & 0x3fff) + 1))
}

fn u24(bytes: &[u8], at: usize) -> Option<u32> {
    let &[b0, b1, b2] = bytes.get(at..at + 3)? else { return None };
    Some(u32::from_le_bytes([b0, b1, b2, 0]))
}
