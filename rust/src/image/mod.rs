//! Image files to pixels, the same as on the Python side: decoded with care, turned upright, laid over white, the
//! centre square resized as Pillow does it.
//!
//! All formats but JPEG give Python's pixels exactly; [`decode`] states the bound for JPEG.

mod bmp;
mod gif;
mod jpeg;
mod metadata;
mod orientation;
mod png;
mod resize;
mod webp;

use std::io::Read;
use std::path::Path;

use ::image::{ColorType, ImageDecoder};

use crate::error::Error;
use crate::files::{open_file, path_text};

/// The most pixels a picture may have: its RGB stays under 256 MiB. Decoding takes about 8 bytes a pixel at its peak (CMYK
/// included), and up to 13 for a PNG of 16 bits.
pub const MAX_PIXELS: usize = 89_478_485;
/// The most pixels a side may have; longer rows are too long for the Python side, however few they are.
pub const MAX_SIDE: usize = 1 << 24;
/// The most bytes a file may have; more than [`MAX_PIXELS`] take in any format.
pub const MAX_BYTES: usize = 1 << 30;
/// The suffixes, in lower case, of the files that a folder of images is searched for.
pub const IMAGE_SUFFIXES: [&str; 9] = [".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".gif", ".bmp"];

/// A decoded picture: upright, without transparency.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Picture {
    width: usize,
    height: usize,
    rgb: Vec<u8>,
}

/// Reads and decodes one image file.
///
/// # Errors
///
/// [`Error::Image`], which names the file: it is missing or cannot be read, or what [`decode`] refuses.
pub fn load_image(path: impl AsRef<Path>) -> Result<Picture, Error> {
    let path = path.as_ref();
    let failed = |reason: String| Error::Image { name: path_text(path), reason };
    let file = open_file(path).map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound => failed("there is no such image file".to_owned()),
        _ => failed(format!("cannot be read: {error}")),
    })?;
    let mut data = Vec::new();
    let limit = MAX_BYTES as u64 + 1; // usize is at most 64 bits
    file.take(limit).read_to_end(&mut data).map_err(|error| failed(format!("cannot be read: {error}")))?;
    decode_bytes(&data).map_err(failed)
}

/// Decodes the bytes of one image file: JPEG, PNG, WebP, GIF or BMP, told apart by their content.
///
/// - Of an animation it is the first frame.
/// - The orientation in EXIF or XMP is applied where it can be read; other metadata is not looked at, so that damage in
///   it costs nothing.
/// - Transparency is laid over white: an alpha channel, a palette's alpha, a PNG's transparent colour (`tRNS`).
/// - Samples of 16 bits keep their upper 8.
///
/// PNG, WebP and GIF give the pixels that Pillow gives; so does BMP, but for 16 bits a pixel, where a sample may be off
/// by 1. JPEG decoders round differently: against libjpeg-turbo a sample is off by at most 4 of 255, and by less than 0.4
/// on average over a picture (0.01 to 0.12 where colours are stored in full or at half the resolution both ways, 0.2
/// where they are at half the resolution in one; measured on smooth pictures and noise at qualities 30 to 100). Pictures
/// of colours at half the resolution that are less than 5 pixels wide are off by more.
///
/// # Errors
///
/// [`Error::Image`]: not an image, damaged or cut short, more than [`MAX_PIXELS`] pixels, [`MAX_SIDE`] a side or [`MAX_BYTES`] bytes. The
/// size is checked before memory is taken for it.
pub fn decode(data: &[u8]) -> Result<Picture, Error> {
    decode_bytes(data).map_err(|reason| Error::Image { name: "image".to_owned(), reason })
}

impl Picture {
    /// A picture from its pixels: `rgb` is (height, width, 3), red, green and blue of each pixel, row by row.
    ///
    /// # Errors
    /// [`Error::Image`]: a side is 0, or `rgb` has not three bytes a pixel.
    pub fn new(width: usize, height: usize, rgb: Vec<u8>) -> Result<Picture, Error> {
        let bytes = width.checked_mul(height).and_then(|pixels| pixels.checked_mul(3));
        if bytes == Some(0) || bytes != Some(rgb.len()) {
            let reason = format!(
                "{} bytes are no picture of {width} x {height}; expected three a pixel, of at least one pixel",
                rgb.len()
            );
            return Err(Error::Image { name: "picture".to_owned(), reason });
        }
        Ok(Picture { width, height, rgb })
    }

    /// Pixels in a row, at least 1.
    #[must_use]
    pub fn width(&self) -> usize {
        self.width
    }

    /// Rows, at least 1.
    #[must_use]
    pub fn height(&self) -> usize {
        self.height
    }

    /// (height, width, 3): red, green and blue of each pixel, row by row.
    #[must_use]
    pub fn rgb(&self) -> &[u8] {
        &self.rgb
    }

    /// [`Picture::rgb`] without a copy.
    #[must_use]
    pub fn into_rgb(self) -> Vec<u8> {
        self.rgb
    }

    /// Shorter side resized to `size` (bicubic, antialiased), then the centre square; a picture of that size stays as
    /// it is.
    ///
    /// Only the centre square is resampled, so that a very long picture costs no more than a square one.
    ///
    /// Returns (3, size, size): planes of red, green and blue; nothing for a `size` of 0.
    #[must_use]
    pub fn to_pixels(&self, size: usize) -> Vec<u8> {
        if size == 0 {
            return Vec::new();
        }
        let resized;
        let square = if (self.width, self.height) == (size, size) {
            &self.rgb
        } else {
            resized = resize::centre_square(&self.rgb, self.width, self.height, size);
            &resized
        };
        (0..3).flat_map(|channel| square.iter().skip(channel).step_by(3).copied()).collect()
    }
}

/// Planes of bytes, (3, height, width), to `(byte / 255 - mean) / std`, in the same order and to the same bits as
/// Python's float32 arithmetic.
///
/// `mean` and `std` are those of red, green and blue. The three planes must be of equal length; what is left over of a
/// length that is not a multiple of three is not looked at.
#[must_use]
pub fn normalize(pixels: &[u8], mean: [f32; 3], std: [f32; 3]) -> Vec<f32> {
    let plane = (pixels.len() / 3).max(1);
    let planes = pixels.chunks_exact(plane).zip(mean).zip(std);
    planes
        .flat_map(|((plane, mean), std)| plane.iter().map(move |byte| (f32::from(*byte) / 255.0 - mean) / std))
        .collect()
}

/// The pixels of a picture while it is decoded.
struct Canvas {
    width: usize,
    height: usize,
    rgb: Vec<u8>,
}

impl Canvas {
    /// Checks the size before it takes memory.
    fn new(width: u32, height: u32) -> Result<Self, String> {
        let sides = usize::try_from(width).ok().zip(usize::try_from(height).ok());
        let pixels = sides.and_then(|(width, height)| width.checked_mul(height));
        match (sides, pixels) {
            (Some((width, height)), Some(pixels @ 1..=MAX_PIXELS)) if width.max(height) <= MAX_SIDE => {
                Ok(Self { width, height, rgb: vec![0; 3 * pixels] })
            }
            (_, Some(0)) => Err(format!("it has no pixels: {width} x {height}")),
            _ => Err(format!(
                "too large to decode safely: {width} x {height} pixels; at most {MAX_PIXELS} pixels are accepted, and {MAX_SIDE} a side: scale it down"
            )),
        }
    }

    fn rows_mut(&mut self) -> impl Iterator<Item = &mut [u8]> {
        self.rgb.chunks_exact_mut(3 * self.width)
    }
}

const FORMATS: &str = "JPEG, PNG, WEBP, GIF, BMP";

fn decode_bytes(data: &[u8]) -> Result<Picture, String> {
    if data.len() > MAX_BYTES {
        return Err(format!("more than {MAX_BYTES} bytes, which no picture of an accepted size has"));
    }
    let decoder: Decode = match data {
        [0x89, b'P', b'N', b'G', 0x0d, 0x0a, 0x1a, 0x0a, ..] => png::decode,
        [0xff, 0xd8, 0xff, ..] => jpeg::decode,
        [b'R', b'I', b'F', b'F', _, _, _, _, b'W', b'E', b'B', b'P', ..] => webp::decode,
        [b'G', b'I', b'F', b'8', b'7' | b'9', b'a', ..] => gif::decode,
        [b'B', b'M', ..] => bmp::decode,
        _ => return Err(format!("not a readable image; expected a {FORMATS} file")),
    };
    let split = metadata::split(data);
    let canvas = guarded(decoder, &split.pixels).map_err(|reason| {
        format!("not a readable image: {}; expected a complete {FORMATS} file", reason.replace('\n', " "))
    })?;
    let (width, height, rgb) = orientation::upright(split.orientation, canvas.width, canvas.height, canvas.rgb);
    Ok(Picture { width, height, rgb })
}

type Decode = fn(&[u8]) -> Result<Canvas, String>;

/// Decoders of others have panicked on damaged files before; that the file is damaged is all it means.
fn guarded(decode: Decode, data: &[u8]) -> Result<Canvas, String> {
    std::panic::catch_unwind(|| decode(data)).unwrap_or_else(|_| Err("its decoder gave up".to_owned()))
}

/// What a decoder of the `image` crate gives, over white.
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

const WHITE: [u8; 3] = [255; 3];

/// One colour over white by Pillow's `alpha_composite`: rounded, with 7 extra bits.
fn blend(rgb: [u8; 3], alpha: u8) -> [u8; 3] {
    const EXTRA_BITS: u32 = 7;
    let source = u32::from(alpha) << EXTRA_BITS;
    let white = (255 - u32::from(alpha)) << EXTRA_BITS;
    rgb.map(|sample| {
        let sum = u32::from(sample) * source + 255 * white + (0x80 << EXTRA_BITS);
        u8::try_from((((sum >> 8) + sum) >> 8) >> EXTRA_BITS).unwrap_or(255)
    })
}

#[cfg(test)]
mod tests;
