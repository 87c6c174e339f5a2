//! PNG in every mode, as the Python side sees it: samples of 16 bits keep their upper 8, transparency is laid over
//! white.
//!
//! The `png` crate reads the header. It drops what follows the last row, the checksum of all pixels among it, and wants
//! a whole file; so pixels are inflated here.

use std::io::Cursor;

use fdeflate::Decompressor;
use png::{BitDepth, ColorType, DecodeOptions, Decoder, Info, Limits};

use super::metadata::{NO_PIXELS, Part, png_chunks};
use super::{Canvas, MAX_BYTES, blend};

/// How far back what is inflated may refer to.
const WINDOW: usize = 1 << 15;

pub(super) fn decode(data: &[u8]) -> Result<Canvas, String> {
    let (info, mut canvas) = header(data)?;
    let painter = Painter::new(&info)?;
    let passes = passes(&info);
    let size = passes.iter().fold(0_usize, |size, pass| size.saturating_add(pass.rows.saturating_mul(pass.line)));
    let mut rows = inflate(data, size)?;
    let mut rest = &mut rows[..];
    let above_the_first = vec![0; info.raw_row_length()];
    let mut pixels = vec![0; 3 * canvas.width];
    for pass in passes {
        let lines;
        (lines, rest) = rest.split_at_mut(pass.rows * pass.line);
        let mut above = &above_the_first[..pass.line - 1];
        let places = canvas.rows_mut().skip(pass.first_y).step_by(pass.step_y);
        for (line, row) in lines.chunks_exact_mut(pass.line).zip(places) {
            let Some((filter, samples)) = line.split_first_mut() else { break };
            undo_filter(*filter, info.bytes_per_pixel(), samples, above)?;
            if pass.step_x == 1 {
                painter.paint(samples, row);
            } else {
                let pixels = &mut pixels[..3 * pass.columns];
                painter.paint(samples, pixels);
                let places = row.chunks_exact_mut(3).skip(pass.first_x).step_by(pass.step_x);
                places.zip(pixels.chunks_exact(3)).for_each(|(place, pixel)| place.copy_from_slice(pixel));
            }
            above = samples;
        }
    }
    Ok(canvas)
}

/// What stands before the pixels, and room for them.
fn header(data: &[u8]) -> Result<(Info<'static>, Canvas), String> {
    let pixels = pixel_chunks(data).next().ok_or("it has no pixels")?;
    let mut options = DecodeOptions::default();
    options.set_skip_ancillary_crc_failures(false);
    let mut decoder = Decoder::new_with_options(Cursor::new([&data[..pixels.start], NO_PIXELS].concat()), options);
    decoder.set_limits(Limits { bytes: MAX_BYTES });
    let size = decoder.read_header_info().map_err(|error| error.to_string())?;
    let canvas = Canvas::new(size.width, size.height)?;
    let reader = decoder.read_info().map_err(|error| error.to_string())?;
    Ok((reader.info().clone(), canvas))
}

/// The chunks with the pixels; no others are between them.
fn pixel_chunks(data: &[u8]) -> impl Iterator<Item = Part<'_, &[u8]>> {
    png_chunks(data).filter(|chunk| chunk.kind == b"IDAT")
}

/// The first `size` bytes of what the pixel chunks hold. More are accepted, and so is a missing checksum.
fn inflate(data: &[u8], size: usize) -> Result<Vec<u8>, String> {
    let limit = size.saturating_mul(2).saturating_add(1 << 16); // what has no end is not pixels
    let mut inflate = Decompressor::new();
    let mut bytes = vec![0; size.saturating_add(4 * WINDOW)]; // what is too much goes around in the end of it
    let (mut filled, mut total) = (0, 0);
    for chunk in pixel_chunks(data) {
        let mut body = chunk.body;
        while total <= limit {
            let (read, written) = inflate
                .read(body, &mut bytes, filled, false)
                .map_err(|error| format!("its pixels are damaged ({error:?})"))?;
            body = &body[read..];
            filled += written;
            total += written;
            if filled < bytes.len() {
                break; // all of the chunk is read
            }
            bytes.copy_within(filled - WINDOW.., size);
            filled = size + WINDOW;
        }
    }
    if total < size {
        return Err(format!("its pixels are damaged ({total} bytes of {size} are there)"));
    }
    bytes.truncate(size);
    Ok(bytes)
}

/// A part of the rows, in the order of the file: what is not interlaced is one pass.
struct Pass {
    first_x: usize,
    first_y: usize,
    step_x: usize,
    step_y: usize,
    columns: usize,
    rows: usize,
    /// Bytes of a row, the first of which names its filter.
    line: usize,
}

/// The passes that have pixels.
fn passes(info: &Info<'_>) -> Vec<Pass> {
    // first column and row, distance of columns and rows in Adam7
    const INTERLACED: [[u32; 4]; 7] =
        [[0, 0, 8, 8], [4, 0, 8, 8], [0, 4, 4, 8], [2, 0, 4, 4], [0, 2, 2, 4], [1, 0, 2, 2], [0, 1, 1, 2]];
    let passes = if info.interlaced { &INTERLACED[..] } else { &[[0, 0, 1, 1]] };
    let passes = passes.iter().map(|&[first_x, first_y, step_x, step_y]| {
        let columns = info.width.saturating_sub(first_x).div_ceil(step_x);
        let rows = info.height.saturating_sub(first_y).div_ceil(step_y);
        Pass {
            first_x: first_x as usize,
            first_y: first_y as usize,
            step_x: step_x as usize,
            step_y: step_y as usize,
            columns: columns as usize,
            rows: rows as usize,
            line: info.raw_row_length_from_width(columns),
        }
    });
    passes.filter(|pass| pass.columns > 0 && pass.rows > 0).collect()
}

/// A row as it was before it was filtered; `above` is the row above it, `step` the bytes of a pixel, at least 1.
fn undo_filter(filter: u8, step: usize, row: &mut [u8], above: &[u8]) -> Result<(), String> {
    match filter {
        0 => {}
        1 => {
            for place in step..row.len() {
                row[place] = row[place].wrapping_add(row[place - step]);
            }
        }
        2 => row.iter_mut().zip(above).for_each(|(sample, above)| *sample = sample.wrapping_add(*above)),
        3 => {
            for (place, above) in above.iter().enumerate() {
                let left = if place < step { 0 } else { row[place - step] };
                row[place] = row[place].wrapping_add(left.midpoint(*above));
            }
        }
        4 => {
            for place in 0..row.len() {
                let (left, corner) = if place < step { (0, 0) } else { (row[place - step], above[place - step]) };
                row[place] = row[place].wrapping_add(paeth(left, above[place], corner));
            }
        }
        _ => return Err(format!("its pixels are damaged (a row has filter {filter})")),
    }
    Ok(())
}

/// Which of its neighbours a sample is predicted to be.
fn paeth(left: u8, above: u8, corner: u8) -> u8 {
    let [a, b, c] = [left, above, corner].map(i16::from);
    let (to_left, to_above, to_corner) = ((b - c).abs(), (a - c).abs(), (a + b - 2 * c).abs());
    if to_left <= to_above && to_left <= to_corner {
        left
    } else if to_above <= to_corner {
        above
    } else {
        corner
    }
}

/// Turns rows of samples as they lie in the file into RGB.
struct Painter {
    colour: ColorType,
    depth: BitDepth,
    /// RGB over white for each index; black is the colour where the file's palette ends.
    palette: Vec<[u8; 3]>,
    /// The transparent grey or colour, in the file's range; 16-bit colour keeps its upper 8 bits, as Pillow's does.
    key: Option<[u16; 3]>,
}

impl Painter {
    fn new(info: &Info<'_>) -> Result<Self, String> {
        const INDICES: usize = 256;
        let transparency = info.trns.as_deref().unwrap_or_default();
        let mut palette = Vec::new();
        if info.color_type == ColorType::Indexed {
            let colours = info.palette.as_deref().ok_or("its palette is missing")?;
            let alphas = transparency.iter().copied().chain(std::iter::repeat(255));
            let colours = colours.chunks_exact(3).map(|rgb| [rgb[0], rgb[1], rgb[2]]).chain(std::iter::repeat([0; 3]));
            palette.extend(colours.zip(alphas).take(INDICES).map(|(rgb, alpha)| blend(rgb, alpha)));
        }
        let wide = info.bit_depth == BitDepth::Sixteen;
        let key = match (info.color_type, transparency, wide) {
            (ColorType::Grayscale, &[high, low, ..], true) => Some([u16::from_be_bytes([high, low]); 3]),
            (ColorType::Grayscale, &[grey, ..], false) => Some([u16::from(grey) & mask(info.bit_depth); 3]),
            (ColorType::Rgb, &[red, _, green, _, blue, _, ..], true)
            | (ColorType::Rgb, &[red, green, blue, ..], false) => Some([red, green, blue].map(u16::from)),
            _ => None,
        };
        Ok(Self { colour: info.color_type, depth: info.bit_depth, palette, key })
    }

    fn paint(&self, samples: &[u8], row: &mut [u8]) {
        let wide = self.depth == BitDepth::Sixteen;
        let step = if wide { 2 } else { 1 };
        let pixels = row.chunks_exact_mut(3);
        match self.colour {
            ColorType::Grayscale if wide => {
                for (pixel, sample) in pixels.zip(samples.chunks_exact(2)) {
                    let whole = u16::from_be_bytes([sample[0], sample[1]]);
                    pixel.fill(if self.is_key([whole; 3]) { 255 } else { sample[0] });
                }
            }
            ColorType::Grayscale => {
                let scale = 255 / mask(self.depth);
                for (pixel, sample) in pixels.zip(unpack(samples, self.depth)) {
                    let sample = u16::from(sample);
                    let grey = if self.is_key([sample; 3]) { 255 } else { sample * scale };
                    pixel.fill(u8::try_from(grey).unwrap_or(255));
                }
            }
            ColorType::Indexed => {
                for (pixel, index) in pixels.zip(unpack(samples, self.depth)) {
                    pixel.copy_from_slice(&self.palette[usize::from(index)]);
                }
            }
            ColorType::GrayscaleAlpha => {
                for (pixel, sample) in pixels.zip(samples.chunks_exact(2 * step)) {
                    pixel.copy_from_slice(&blend([sample[0]; 3], sample[step]));
                }
            }
            ColorType::Rgb if self.key.is_none() && !wide => row.copy_from_slice(&samples[..row.len()]),
            ColorType::Rgb => {
                for (pixel, sample) in pixels.zip(samples.chunks_exact(3 * step)) {
                    let rgb = [sample[0], sample[step], sample[2 * step]];
                    pixel.copy_from_slice(if self.is_key(rgb.map(u16::from)) { &[255; 3] } else { &rgb });
                }
            }
            ColorType::Rgba => {
                for (pixel, sample) in pixels.zip(samples.chunks_exact(4 * step)) {
                    let rgb = [sample[0], sample[step], sample[2 * step]];
                    pixel.copy_from_slice(&blend(rgb, sample[3 * step]));
                }
            }
        }
    }

    fn is_key(&self, samples: [u16; 3]) -> bool {
        self.key == Some(samples)
    }
}

/// The largest sample of a depth up to 8.
fn mask(depth: BitDepth) -> u16 {
    match depth {
        BitDepth::One => 1,
        BitDepth::Two => 3,
        BitDepth::Four => 15,
        BitDepth::Eight | BitDepth::Sixteen => 255,
    }
}

/// Samples of 1, 2, 4 or 8 bits, the upper bits of a byte first.
fn unpack(bytes: &[u8], depth: BitDepth) -> impl Iterator<Item = u8> {
    let bits = match depth {
        BitDepth::One => 1,
        BitDepth::Two => 2,
        BitDepth::Four => 4,
        BitDepth::Eight | BitDepth::Sixteen => 8,
    };
    let mask = u8::MAX >> (8 - bits);
    bytes.iter().flat_map(move |byte| (0..8 / bits).rev().map(move |place| (byte >> (place * bits)) & mask))
}
