//! The first frame of a GIF, on its canvas.

use std::borrow::Cow;
use std::io::Cursor;

use gif::{ColorOutput, DecodeOptions, MemoryLimit};

use super::{Canvas, WHITE};

pub(super) fn decode(data: &[u8]) -> Result<Canvas, String> {
    let mut options = DecodeOptions::new();
    options.set_color_output(ColorOutput::Indexed);
    options.set_memory_limit(MemoryLimit::Unlimited); // the canvas is checked below, before memory is taken for it
    options.allow_unknown_blocks(true);
    let mut decoder = options.read_info(Cursor::new(with_palette(data))).map_err(|error| error.to_string())?;
    let screen = [decoder.width(), decoder.height()].map(u32::from);
    let frame = decoder.next_frame_info().map_err(|error| error.to_string())?.ok_or("it has no frame")?;
    let [left, top, width, height] = [frame.left, frame.top, frame.width, frame.height].map(u32::from);
    let transparent = frame.transparent;
    // a frame that is larger than the screen makes it larger
    let mut canvas = Canvas::new(screen[0].max(left + width), screen[1].max(top + height))?;

    let colours = colours(decoder.palette().unwrap_or_default(), transparent);
    let [left, top, width, height] = [left, top, width, height].map(|side| side as usize); // 16 bits each
    let mut indices = vec![0; width * height];
    decoder.read_into_buffer(&mut indices).map_err(|error| error.to_string())?;

    let around = colours[usize::from(transparent.unwrap_or(0))];
    canvas.rgb.chunks_exact_mut(3).for_each(|pixel| pixel.copy_from_slice(&around));
    for (row, indices) in canvas.rows_mut().skip(top).zip(indices.chunks_exact(width.max(1))) {
        for (pixel, index) in row.chunks_exact_mut(3).skip(left).zip(indices) {
            pixel.copy_from_slice(&colours[usize::from(*index)]);
        }
    }
    Ok(canvas)
}

/// The decoder wants a palette; a file without one is shades of grey.
fn with_palette(data: &[u8]) -> Cow<'_, [u8]> {
    const FLAGS: usize = 10;
    const HAS_256_COLOURS: u8 = 0x87;
    match data.split_at_checked(13) {
        Some((header, rest)) if header[FLAGS] & 0x80 == 0 => {
            let greys = (0..=255).flat_map(|grey| [grey; 3]);
            let mut data: Vec<u8> = header.iter().copied().chain(greys).chain(rest.iter().copied()).collect();
            data[FLAGS] |= HAS_256_COLOURS;
            Cow::Owned(data)
        }
        _ => Cow::Borrowed(data),
    }
}

/// RGB over white for each index: those of the palette, then black. A palette that is, as far as it goes, the grey of its
/// index is that to the end.
fn colours(palette: &[u8], transparent: Option<u8>) -> [[u8; 3]; 256] {
    let grey: [[u8; 3]; 256] = std::array::from_fn(|index| [index as u8; 3]); // below 256
    let (palette, _) = palette.as_chunks::<3>();
    let mut colours = if grey.starts_with(palette) { grey } else { [[0; 3]; 256] };
    for (colour, entry) in colours.iter_mut().zip(palette) {
        *colour = *entry;
    }
    if let Some(index) = transparent {
        colours[usize::from(index)] = WHITE;
    }
    colours
}
