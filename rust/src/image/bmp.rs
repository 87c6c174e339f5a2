//! BMP through the `image` crate.

use std::io::Cursor;

use image::codecs::bmp::BmpDecoder;

use super::{Canvas, paint};

pub(super) fn decode(data: &[u8]) -> Result<Canvas, String> {
    paint(BmpDecoder::new(Cursor::new(data)).map_err(|error| error.to_string())?)
}
