//! A picture of what was found: a card for each image, with its rank, its name and its cosine, and where the model is
//! confused with that.

use std::path::Path;

use font8x8::{BASIC_FONTS, BOX_FONTS, GREEK_FONTS, HIRAGANA_FONTS, LATIN_FONTS, UnicodeFonts};
use image::imageops::{FilterType, overlay, resize};
use image::{Rgb, RgbImage};
use kore_vljepa::files::{path_text, write_whole};
use kore_vljepa::image::{Picture, load_image};
use kore_vljepa::vljepa::Found;

use crate::output::{Failure, failure};

const MAX_CARDS: usize = 24;
const MAX_COLUMNS: usize = 4;

// in pixels
const PICTURE: u32 = 288;
const PAD: u32 = 12;
const GAP: u32 = 16;
const CARD: u32 = PICTURE + 2 * PAD;
const SCALE: u32 = 2; // of the letters, which are 8 x 8
const LETTER: u32 = 8 * SCALE;
const LINE: u32 = LETTER + 8;
const LINES: usize = 2; // of the name
const LETTERS: usize = (PICTURE / LETTER) as usize; // in a line
const CARD_HEIGHT: u32 = PICTURE + 3 * PAD + LINE * (1 + LINES as u32);
const HEADING: u32 = LINE + GAP;

const PAGE: Rgb<u8> = Rgb([0xee, 0xf0, 0xf3]);
const PAPER: Rgb<u8> = Rgb([0xff, 0xff, 0xff]);
const EMPTY: Rgb<u8> = Rgb([0xe1, 0xe4, 0xe8]);
const INK: Rgb<u8> = Rgb([0x1f, 0x23, 0x28]);
const FAINT: Rgb<u8> = Rgb([0x6a, 0x73, 0x7d]);

/// Writes the PNG `path`: the text, and under it the images found, best first, at most 24, four in a row.
pub(crate) fn write_contact_sheet(path: &Path, text: &str, found: &[Found<'_>]) -> Result<(), Failure> {
    let found = &found[..found.len().min(MAX_CARDS)];
    let columns = found.len().clamp(1, MAX_COLUMNS) as u32;
    let rows = found.len().div_ceil(MAX_COLUMNS) as u32;
    let width = 2 * GAP + columns * CARD + (columns - 1) * GAP;
    let mut sheet = RgbImage::from_pixel(width, GAP + HEADING + rows * (CARD_HEIGHT + GAP), PAGE);
    write(&mut sheet, GAP, GAP, &shortened(text, ((width - 2 * GAP) / LETTER) as usize), INK);
    for ((number, Found { path: image, cosine, confusion }), place) in (1..).zip(found).zip(0..) {
        let left = GAP + place % columns * (CARD + GAP);
        let top = GAP + HEADING + place / columns * (CARD_HEIGHT + GAP);
        fill(&mut sheet, (left, top), (CARD, CARD_HEIGHT), PAPER);
        draw_picture(&mut sheet, left + PAD, top + PAD, load_image(image)?)?;
        let mut line = top + PICTURE + 2 * PAD;
        let is_confused = confusion.is_some_and(|confusion| confusion.is_confused());
        write(&mut sheet, left + PAD, line, &format!("{number}.{}", if is_confused { " not sure" } else { "" }), INK);
        let cosine = format!("{cosine:.3}");
        write(&mut sheet, left + PAD + PICTURE - cosine.len() as u32 * LETTER, line, &cosine, FAINT);
        for piece in wrapped(&path_text(image.file_name().unwrap_or_default())) {
            line += LINE;
            write(&mut sheet, left + PAD, line, &piece, INK);
        }
    }
    Ok(write_whole(path, |out| {
        let mut encoder = png::Encoder::new(out, sheet.width(), sheet.height());
        encoder.set_color(png::ColorType::Rgb);
        encoder.write_header()?.write_image_data(&sheet)?;
        Ok(())
    })?)
}

/// The picture in the middle of a square of `PICTURE` pixels.
fn draw_picture(sheet: &mut RgbImage, left: u32, top: u32, picture: Picture) -> Result<(), Failure> {
    fill(sheet, (left, top), (PICTURE, PICTURE), EMPTY);
    let sizes = u32::try_from(picture.width()).ok().zip(u32::try_from(picture.height()).ok());
    let whole = sizes.and_then(|(width, height)| RgbImage::from_raw(width, height, picture.into_rgb()));
    let whole = whole.ok_or_else(|| failure("a picture whose pixels do not fill its size"))?;
    let (width, height) = whole.dimensions();
    let longest = width.max(height);
    let side = |length: u32| {
        u32::try_from(u64::from(length) * u64::from(PICTURE) / u64::from(longest)).unwrap_or(PICTURE).max(1)
    };
    // few pixels stay crisp when enlarged; many are averaged when shrunk
    let filter = if longest * 4 <= PICTURE { FilterType::Nearest } else { FilterType::Triangle };
    let fitted = resize(&whole, side(width), side(height), filter);
    let (x, y) = (left + (PICTURE - fitted.width()) / 2, top + (PICTURE - fitted.height()) / 2);
    overlay(sheet, &fitted, x.into(), y.into());
    Ok(())
}

fn fill(sheet: &mut RgbImage, (left, top): (u32, u32), (width, height): (u32, u32), colour: Rgb<u8>) {
    for y in top..top + height {
        for x in left..left + width {
            sheet.put_pixel(x, y, colour);
        }
    }
}

/// Writes one line; what does not fit on the sheet is left out.
fn write(sheet: &mut RgbImage, left: u32, top: u32, text: &str, colour: Rgb<u8>) {
    for (letter, x) in text.chars().zip((left..).step_by(LETTER as usize)) {
        for (row, bits) in (0..).zip(glyph(letter)) {
            for column in (0..8).filter(|column| bits >> column & 1 == 1) {
                let (x, y) = (x + column * SCALE, top + row * SCALE);
                if x + SCALE <= sheet.width() && y + SCALE <= sheet.height() {
                    fill(sheet, (x, y), (SCALE, SCALE), colour);
                }
            }
        }
    }
}

/// Eight rows of eight pixels, the lowest bit leftmost; a question mark for a letter the fonts lack.
fn glyph(letter: char) -> [u8; 8] {
    let fonts: [&dyn Fn(char) -> Option<[u8; 8]>; 5] = [
        &|letter| BASIC_FONTS.get(letter),
        &|letter| LATIN_FONTS.get(letter),
        &|letter| GREEK_FONTS.get(letter),
        &|letter| HIRAGANA_FONTS.get(letter),
        &|letter| BOX_FONTS.get(letter),
    ];
    fonts.iter().find_map(|font| font(letter)).or_else(|| BASIC_FONTS.get('?')).unwrap_or_default()
}

/// The text in lines that fit a card; the end of a long one is kept, where names differ.
fn wrapped(text: &str) -> Vec<String> {
    let letters: Vec<char> = text.chars().collect();
    let room = LETTERS * LINES;
    let letters = if letters.len() <= room {
        letters
    } else {
        ['.', '.'].into_iter().chain(letters[letters.len() - (room - 2)..].iter().copied()).collect()
    };
    letters.chunks(LETTERS).map(|line| line.iter().collect()).collect()
}

fn shortened(text: &str, room: usize) -> String {
    if text.chars().count() <= room {
        text.into()
    } else {
        text.chars().take(room.saturating_sub(2)).collect::<String>() + ".."
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::path::PathBuf;

    use kore_vljepa::vljepa::{Confusion, Signal};

    use super::*;

    #[test]
    fn a_sheet_shows_every_picture_with_its_name() {
        let folder = tempfile::tempdir().unwrap();
        let sizes = [(40, 20), (1, 900), (700, 3), (64, 64), (9, 9)];
        let paths: Vec<PathBuf> = sizes
            .iter()
            .map(|(width, height)| {
                let path = folder.path().join(format!("{width}x{height}, größe 色.png"));
                let rows = [200, 10, 10].repeat((width * height) as usize);
                let mut encoder = png::Encoder::new(File::create(&path).unwrap(), *width, *height);
                encoder.set_color(png::ColorType::Rgb);
                encoder.write_header().unwrap().write_image_data(&rows).unwrap();
                path
            })
            .collect();
        let judged = |score| Some(Confusion { score, threshold: 0.5, cause: Signal::State });
        let confusions = [judged(0.8), judged(0.5), None, judged(0.2), None];
        let found: Vec<Found<'_>> =
            paths.iter().zip(confusions).map(|(path, confusion)| Found { path, cosine: -0.25, confusion }).collect();
        let path = folder.path().join("new/sheet.png");
        write_contact_sheet(&path, &"a red circle ".repeat(40), &found).unwrap();
        let sheet = load_image(&path).unwrap();
        let (width, height) = (4 * (CARD + GAP) + GAP, GAP + HEADING + 2 * (CARD_HEIGHT + GAP));
        assert_eq!((sheet.width(), sheet.height()), (width as usize, height as usize));
        let sheet = RgbImage::from_raw(width, height, sheet.into_rgb()).unwrap();
        let has = |left: u32, top: u32, width: u32, height: u32, colour: [u8; 3]| {
            (left..left + width).any(|x| (top..top + height).any(|y| sheet.get_pixel(x, y).0 == colour))
        };
        for place in 0..5 {
            let (left, top) = (GAP + place % 4 * (CARD + GAP), GAP + HEADING + place / 4 * (CARD_HEIGHT + GAP));
            assert!(has(left + PAD, top + PAD, PICTURE, PICTURE, [200, 10, 10]), "picture {place}");
            let mark = has(left + PAD + 3 * LETTER, top + PICTURE + 2 * PAD, 8 * LETTER, LINE, INK.0);
            assert_eq!(mark, place == 0, "not sure of {place}");
            assert!(has(left + PAD, top + PICTURE + 2 * PAD, PICTURE, LINE, FAINT.0), "cosine {place}");
            assert!(has(left + PAD, top + PICTURE + 2 * PAD + LINE, PICTURE, LINE, INK.0), "name {place}");
        }
        assert!(write_contact_sheet(Path::new("/proc/nowhere/x.png"), "red", &found).is_err());
    }

    #[test]
    fn names_are_wrapped_and_long_ones_shortened() {
        assert_eq!(wrapped("red.png"), ["red.png"]);
        let lines = wrapped(&format!("{}é.png", "x".repeat(100)));
        assert_eq!((lines.len(), lines[0].chars().count(), lines[1].chars().count()), (LINES, LETTERS, LETTERS));
        assert!(lines[0].starts_with("..x") && lines[1].ends_with("é.png"));
        assert_eq!(shortened("abcdef", 5), "abc..");
    }
}
