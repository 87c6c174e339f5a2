//! How a picture was held when it was taken: read from EXIF or XMP, undone on pixels. Nothing here fails: what cannot
//! be read is no orientation.

/// EXIF's tag of the orientation.
const TAG: u16 = 0x0112;
/// What XMP's value stands behind: an attribute or an element.
const XMP_NAMES: [&[u8]; 3] = [b"tiff:Orientation=\"", b"tiff:Orientation='", b"tiff:Orientation>"];

/// The orientation, 1 (upright) to 8: EXIF decides, and XMP where EXIF says nothing.
pub(super) fn orientation(exif: Option<&[u8]>, xmp: Option<&[u8]>) -> u8 {
    let said = exif.and_then(from_exif).or_else(|| xmp.and_then(from_xmp));
    said.and_then(|value| u8::try_from(value).ok()).filter(|value| (1..=8).contains(value)).unwrap_or(1)
}

/// The tag's value in the first directory of a TIFF structure, behind up to two `Exif\0\0` (some writers put it twice).
fn from_exif(exif: &[u8]) -> Option<u32> {
    const HEADER: &[u8] = b"Exif\0\0";
    let exif = exif.strip_prefix(HEADER).unwrap_or(exif);
    let tiff = Tiff::new(exif.strip_prefix(HEADER).unwrap_or(exif))?;
    let directory = usize::try_from(tiff.u32(4)?).ok()?;
    let entries = tiff.u16(directory)?;
    (0..usize::from(entries))
        .map_while(|entry| directory.checked_add(2 + 12 * entry))
        .find_map(|at| tiff.orientation(at))
}

struct Tiff<'a> {
    bytes: &'a [u8],
    little: bool,
}

impl<'a> Tiff<'a> {
    fn new(bytes: &'a [u8]) -> Option<Self> {
        let little = match bytes.get(..2)? {
            b"II" => true,
            b"MM" => false,
            _ => return None,
        };
        matches!(bytes.get(2..4)?, b"*\0" | b"\0*").then_some(Self { bytes, little })
    }

    /// The value of the directory entry at `at` if it is a readable orientation: one whole number of any of TIFF's
    /// types (signed ones are read as unsigned, which is the same for what is valid).
    fn orientation(&self, at: usize) -> Option<u32> {
        let value = at.checked_add(8)?;
        if self.u16(at)? != TAG || self.u32(at.checked_add(4)?)? != 1 {
            return None;
        }
        self.u32(value)?; // an entry always has four bytes of value
        match self.u16(at.checked_add(2)?)? {
            1 | 6 => self.bytes.get(value).copied().map(u32::from),
            3 | 8 => self.u16(value).map(u32::from),
            4 | 9 => self.u32(value),
            _ => None,
        }
    }

    fn take<const N: usize>(&self, at: usize) -> Option<[u8; N]> {
        self.bytes.get(at..at.checked_add(N)?)?.try_into().ok()
    }

    fn u16(&self, at: usize) -> Option<u16> {
        let bytes = self.take(at)?;
        Some(if self.little { u16::from_le_bytes(bytes) } else { u16::from_be_bytes(bytes) })
    }

    fn u32(&self, at: usize) -> Option<u32> {
        let bytes = self.take(at)?;
        Some(if self.little { u32::from_le_bytes(bytes) } else { u32::from_be_bytes(bytes) })
    }
}

/// The digit behind the first `tiff:Orientation`.
fn from_xmp(xmp: &[u8]) -> Option<u32> {
    (0..xmp.len()).find_map(|at| {
        let digit = XMP_NAMES.iter().find_map(|name| xmp[at..].strip_prefix(*name))?.first()?;
        digit.is_ascii_digit().then(|| u32::from(digit - b'0'))
    })
}

/// Turns interleaved RGB pixels upright; returns width, height and pixels.
pub(super) fn upright(orientation: u8, width: usize, height: usize, rgb: Vec<u8>) -> (usize, usize, Vec<u8>) {
    // where the pixel that comes to (x, y) is now: columns or rows counted from the far end, axes exchanged
    let (exchanged, far_column, far_row) = match orientation {
        2 => (false, true, false),
        3 => (false, true, true),
        4 => (false, false, true),
        5 => (true, false, false),
        6 => (true, false, true),
        7 => (true, true, true),
        8 => (true, true, false),
        _ => return (width, height, rgb),
    };
    let (new_width, new_height) = if exchanged { (height, width) } else { (width, height) };
    let mut turned = Vec::with_capacity(rgb.len());
    for y in 0..new_height {
        for x in 0..new_width {
            let (column, row) = if exchanged { (y, x) } else { (x, y) };
            let column = if far_column { width - 1 - column } else { column };
            let row = if far_row { height - 1 - row } else { row };
            let at = 3 * (row * width + column);
            turned.extend_from_slice(&rgb[at..at + 3]);
        }
    }
    (new_width, new_height, turned)
}
