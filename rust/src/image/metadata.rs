//! What an image file says beside its pixels: the orientation is read from it, the rest is kept from the decoder.
//!
//! Decoders refuse good pictures for damaged or oversized EXIF, text or colour profiles, none of which is needed here,
//! and what a decoder does not see cannot make it allocate. Nothing in this module fails: what cannot be read is left
//! to the decoder. The rules are those of the Python side's `data/metadata.py`.

use std::borrow::Cow;
use std::io::Cursor;

use super::orientation::orientation;

const PNG_SIGNATURE: &[u8] = b"\x89PNG\r\n\x1a\n";
/// An empty chunk of pixels: a PNG decoder reads what stands before it.
pub(super) const NO_PIXELS: &[u8] = b"\0\0\0\0IDAT\x35\xaf\x06\x1e";
/// Bytes of an inflated text; a longer one is not read.
const MAX_TEXT: usize = 1 << 20;
const XMP_SEGMENT: &[u8] = b"http://ns.adobe.com/xap/1.0/\0";
const XMP_TEXT: &[u8] = b"XML:com.adobe.xmp";
const EXIF_TEXT: &[u8] = b"Raw profile type exif";

/// A file taken apart.
pub(super) struct Split<'a> {
    /// The bytes to hand to a decoder.
    pub(super) pixels: Cow<'a, [u8]>,
    /// EXIF's orientation, 1 (upright) to 8.
    pub(super) orientation: u8,
}

/// Takes metadata out of a JPEG or PNG and reads the orientation of these and of WebP; other files are left alone.
pub(super) fn split(data: &[u8]) -> Split<'_> {
    if data.starts_with(PNG_SIGNATURE) {
        split_png(data)
    } else if data.starts_with(b"\xff\xd8\xff") {
        split_jpeg(data)
    } else {
        let (exif, xmp) = webp_metadata(data);
        Split { pixels: Cow::Borrowed(data), orientation: orientation(exif, xmp) }
    }
}

/// A chunk or segment: where it lies, what it is, what it holds.
pub(super) struct Part<'a, K> {
    pub(super) start: usize,
    pub(super) kind: K,
    pub(super) body: &'a [u8],
    pub(super) end: usize,
}

/// The chunks of a PNG in their order. The last may be cut short: then its body ends where the file does.
pub(super) fn png_chunks(data: &[u8]) -> impl Iterator<Item = Part<'_, &[u8]>> {
    let mut start = PNG_SIGNATURE.len();
    std::iter::from_fn(move || {
        let (length, rest) = data.get(start..)?.split_first_chunk()?;
        let (kind, rest) = rest.split_at_checked(4)?;
        let length = usize::try_from(u32::from_be_bytes(*length)).ok()?;
        let end = start.checked_add(12)?.checked_add(length)?;
        let part = Part { start, kind, body: &rest[..length.min(rest.len())], end };
        start = end;
        Some(part)
    })
}

fn split_png(data: &[u8]) -> Split<'_> {
    let mut kept = PNG_SIGNATURE.to_vec();
    let (mut exif, mut xmp, mut profile) = (None, None, None);
    let mut pixel_chunks = PixelChunks::default();
    let mut ended = false;
    let mut at = PNG_SIGNATURE.len();
    for Part { kind, body, end, .. } in png_chunks(data).take_while(|chunk| chunk.end <= data.len()) {
        if pixel_chunks.take(kind, body) {
            kept.extend_from_slice(&data[at..end]);
        }
        match kind {
            b"IEND" => ended = true,
            b"eXIf" => exif = Some(Cow::Borrowed(body)),
            b"tEXt" | b"zTXt" | b"iTXt" => {
                // of several the last counts, and only that is inflated
                match body.split(|byte| *byte == 0).next() {
                    Some(XMP_TEXT) => xmp = Some(&data[at..end]),
                    Some(EXIF_TEXT) => profile = Some(&data[at..end]),
                    _ => {}
                }
            }
            _ => {}
        }
        at = end;
        if ended {
            break;
        }
    }
    if !ended {
        kept.extend_from_slice(&data[at..]); // cut short: the decoder says so
    }
    let exif = exif.or_else(|| profile.and_then(png_text).and_then(|text| raw_profile(&text)).map(Cow::Owned));
    let xmp = xmp.and_then(png_text);
    Split { pixels: Cow::Owned(kept), orientation: orientation(exif.as_deref(), xmp.as_deref()) }
}

/// Which chunks of a PNG its pixels are made of. Of several headers, palettes and transparent colours the first counts,
/// if it stands where it should: before the pixels, and a transparent colour after the palette it belongs to.
#[derive(Default)]
struct PixelChunks {
    colour: Option<u8>,
    has_palette: bool,
    has_key: bool,
    has_pixels: bool,
}

impl PixelChunks {
    fn take(&mut self, kind: &[u8], body: &[u8]) -> bool {
        match kind {
            b"IHDR" if self.colour.is_none() => {
                self.colour = body.get(9).copied();
                true
            }
            b"PLTE" if self.colour == Some(3) && !self.has_pixels => !std::mem::replace(&mut self.has_palette, true),
            b"tRNS" if !self.has_key && !self.has_pixels => {
                self.has_key = match self.colour {
                    Some(0) => body.len() >= 2, // one that is too short is no colour
                    Some(2) => body.len() >= 6,
                    Some(3) => self.has_palette,
                    _ => false,
                };
                self.has_key
            }
            b"IDAT" => {
                self.has_pixels = true;
                true
            }
            b"IEND" => true,
            _ => false,
        }
    }
}

/// The text of a whole text chunk. The PNG decoder inflates it, from a file made for the purpose.
fn png_text(chunk: &[u8]) -> Option<Vec<u8>> {
    const HEADER: &[u8] = b"\0\0\0\x0dIHDR\0\0\0\x01\0\0\0\x01\x08\0\0\0\0\x3a\x7e\x9b\x55";
    let file = Cursor::new([PNG_SIGNATURE, HEADER, chunk, NO_PIXELS].concat());
    let decoder = png::Decoder::new_with_limits(file, png::Limits { bytes: 4 * MAX_TEXT });
    let info = decoder.read_info().ok()?;
    let info = info.info();
    let text = if let Some(text) = info.uncompressed_latin1_text.first() {
        text.text.clone()
    } else if let Some(text) = info.compressed_latin1_text.first() {
        let mut text = text.clone();
        text.decompress_text_with_limit(MAX_TEXT).ok()?;
        text.get_text().ok()?
    } else {
        let mut text = info.utf8_text.first()?.clone();
        text.decompress_text_with_limit(MAX_TEXT).ok()?;
        text.get_text().ok()?
    };
    Some(text.into_bytes())
}

/// ImageMagick's form: an empty line, the kind, the length, then hexadecimal digits over many lines.
fn raw_profile(text: &[u8]) -> Option<Vec<u8>> {
    let lines = text.split(|byte| *byte == b'\n').skip(3);
    let digits: Option<Vec<u8>> = lines
        .flatten()
        .filter(|byte| !byte.is_ascii_whitespace())
        .map(|byte| char::from(*byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok()))
        .collect();
    let digits = digits?;
    (digits.len() % 2 == 0).then(|| digits.chunks_exact(2).map(|pair| pair[0] << 4 | pair[1]).collect())
}

/// The segment at `at`, or `None` where the scan starts, or something that has no length.
fn jpeg_segment(data: &[u8], at: usize) -> Option<Part<'_, u8>> {
    let &[0xff, kind, high, low] = data.get(at..at + 4)? else { return None };
    let length = usize::from(u16::from_be_bytes([high, low]));
    let end = at + 2 + length;
    let has_length = !matches!(kind, 0x00 | 0x01 | 0xd0..=0xd7 | 0xd9 | 0xda);
    (has_length && length >= 2 && end <= data.len()).then(|| Part { start: at, kind, body: &data[at + 4..end], end })
}

fn split_jpeg(data: &[u8]) -> Split<'_> {
    let mut kept = data[..2].to_vec();
    let mut exif: Option<Vec<u8>> = None;
    let mut xmp = None;
    let mut at = 2;
    loop {
        while data.get(at..at + 2) == Some(b"\xff\xff") {
            at += 1; // fill bytes
        }
        let Some(Part { kind, body, end, .. }) = jpeg_segment(data, at) else { break };
        if kind == 0xe1 && body.starts_with(b"Exif\0\0") {
            // EXIF over 64 KiB goes on in the next segment
            let exif = exif.get_or_insert_default();
            exif.extend_from_slice(if exif.is_empty() { body } else { &body[6..] });
        } else if kind == 0xe1 && body.starts_with(XMP_SEGMENT) {
            xmp = Some(body);
        } else if !is_jpeg_metadata(kind, body) {
            kept.extend_from_slice(&data[at..end]);
        }
        at = end;
    }
    kept.extend_from_slice(&data[at..]);
    Split { pixels: Cow::Owned(kept), orientation: orientation(exif.as_deref(), xmp) }
}

/// Application segments and comments, but for the two that say how colours are stored.
fn is_jpeg_metadata(kind: u8, body: &[u8]) -> bool {
    match kind {
        0xe0 if body.starts_with(b"JFIF\0") => body.len() < 14,
        0xee if body.starts_with(b"Adobe") => body.len() < 12,
        0xe0..=0xef | 0xfe => true,
        _ => false,
    }
}

/// EXIF and XMP of a WebP file, where its header announces them.
fn webp_metadata(data: &[u8]) -> (Option<&[u8]>, Option<&[u8]>) {
    let flags = match (data.get(..4), data.get(8..16), data.get(20)) {
        (Some(b"RIFF"), Some(b"WEBPVP8X"), Some(flags)) => *flags,
        _ => 0,
    };
    let (mut exif, mut xmp) = (None, None);
    for (kind, body) in riff_chunks(data.get(12..).unwrap_or_default()) {
        match kind {
            b"EXIF" if flags & 0x08 != 0 => exif = exif.or(Some(body)),
            b"XMP " if flags & 0x04 != 0 => xmp = xmp.or(Some(body)),
            _ => {}
        }
    }
    (exif, xmp)
}

/// Kind and content of each RIFF chunk, up to one that is not whole.
pub(super) fn riff_chunks(data: &[u8]) -> impl Iterator<Item = (&[u8], &[u8])> {
    let mut at = 0;
    std::iter::from_fn(move || {
        let chunk = riff_chunk(data, at)?;
        at += 8 + chunk.1.len().next_multiple_of(2);
        Some(chunk)
    })
}

fn riff_chunk(data: &[u8], at: usize) -> Option<(&[u8], &[u8])> {
    let length = usize::try_from(u32::from_le_bytes(data.get(at + 4..at + 8)?.try_into().ok()?)).ok()?;
    Some((&data[at..at + 4], data.get(at + 8..(at + 8).checked_add(length)?)?))
}
