//! PNG in every mode, as the Python side sees it: samples of 16 bits keep their upper 8, transparency is laid over
//! white.

use std::io::Cursor;

use png::{BitDepth, ColorType, Decoder, Info, Limits, Transformations};

use super::{Canvas, MAX_BYTES, blend};

pub(super) fn decode(data: &[u8]) -> Result<Canvas, String> {
    let mut decoder = Decoder::new_with_limits(Cursor::new(data), Limits { bytes: MAX_BYTES });
    decoder.set_transformations(Transformations::IDENTITY);
    let header = decoder.read_header_info().map_err(|error| error.to_string())?;
    let mut canvas = Canvas::new(header.width, header.height)?;
    let mut reader = decoder.read_info().map_err(|error| error.to_string())?;
    let info = reader.info().clone();
    let painter = Painter::new(&info)?;
    if info.interlaced {
        let size = reader.output_buffer_size().ok_or("its size overflows")?;
        let mut samples = vec![0; size];
        reader.next_frame(&mut samples).map_err(|error| error.to_string())?;
        let line = reader.output_line_size(info.width).ok_or("its size overflows")?;
        for (samples, row) in samples.chunks_exact(line).zip(canvas.rows_mut()) {
            painter.paint(samples, row);
        }
    } else {
        for row in canvas.rows_mut() {
            let samples = reader.next_row().map_err(|error| error.to_string())?.ok_or("a row is missing")?;
            painter.paint(samples.data(), row);
        }
    }
    Ok(canvas)
}

/// Turns rows of samples as they lie in the file into RGB.
struct Painter {
    colour: ColorType,
    depth: BitDepth,
    /// RGB over white for each index; black where the file's palette ends.
    palette: Vec<[u8; 3]>,
    /// The transparent grey or colour, in the file's range; 16-bit colour keeps its upper 8 bits, as Pillow's does.
    key: Option<[u16; 3]>,
}

impl Painter {
    fn new(info: &Info<'_>) -> Result<Self, String> {
        let transparency = info.trns.as_deref().unwrap_or_default();
        let mut palette = Vec::new();
        if info.color_type == ColorType::Indexed {
            let colours = info.palette.as_deref().ok_or("its palette is missing")?;
            let alphas = transparency.iter().copied().chain(std::iter::repeat(255));
            palette
                .extend(colours.chunks_exact(3).zip(alphas).map(|(rgb, alpha)| blend([rgb[0], rgb[1], rgb[2]], alpha)));
            palette.resize(256, [0; 3]);
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
