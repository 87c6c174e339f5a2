//! What the pixels of a PNG must be: the same cases as in the Python side's `test_png.py`.

use super::*;

const SIGNATURE: &[u8] = b"\x89PNG\r\n\x1a\n";
/// Width, height, bits of a sample, colour type, interlaced.
const MODES: [(u32, u32, u8, u8, bool); 8] = [
    (40, 30, 8, 2, false),
    (200, 200, 8, 2, false), // more than is inflated at once
    (41, 30, 1, 0, false),
    (7, 5, 16, 6, false),
    (40, 30, 8, 2, true),
    (1, 1, 8, 2, true),
    (3, 2, 4, 0, true), // passes without pixels
    (1, 5, 16, 4, true),
];

/// A file of one mode, in parts that can be damaged.
struct Parts {
    header: Vec<u8>,
    /// All rows, each with its filter.
    rows: Vec<Vec<u8>>,
}

impl Parts {
    fn new((width, height, depth, colour, interlaced): (u32, u32, u8, u8, bool)) -> Parts {
        let sizes = [width.to_be_bytes(), height.to_be_bytes()].concat();
        let header = chunk(b"IHDR", &[&sizes, &[depth, colour, 0, 0, u8::from(interlaced)][..]].concat());
        let channels = [1, 0, 3, 1, 2, 0, 4][usize::from(colour)];
        let passes: &[[u32; 4]] = match interlaced {
            true => &[[0, 0, 8, 8], [4, 0, 8, 8], [0, 4, 4, 8], [2, 0, 4, 4], [0, 2, 2, 4], [1, 0, 2, 2], [0, 1, 1, 2]],
            false => &[[0, 0, 1, 1]],
        };
        let mut noise = noise(500, 500).rgb.into_iter();
        let mut rows = Vec::new();
        for [first_x, first_y, step_x, step_y] in passes {
            let columns = (*first_x..width).step_by(*step_x as usize).count();
            let line = (columns * usize::from(depth) * channels).div_ceil(8);
            for _ in (*first_y..height).step_by(*step_y as usize).filter(|_| columns > 0) {
                let filter = noise.next().unwrap() % 5;
                rows.push(std::iter::once(filter).chain(noise.by_ref().take(line)).collect());
            }
        }
        Parts { header, rows }
    }

    fn file(&self, bodies: &[&[u8]]) -> Vec<u8> {
        let pixels: Vec<u8> = bodies.iter().flat_map(|body| chunk(b"IDAT", body)).collect();
        [SIGNATURE, &self.header, &pixels, &chunk(b"IEND", b"")].concat()
    }
}

fn deflated(rows: &[Vec<u8>]) -> Vec<u8> {
    fdeflate::compress_to_vec(&rows.concat())
}

/// `bytes` with one bit of the byte at `from_end` turned over.
fn flipped(bytes: &[u8], from_end: usize) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    let place = bytes.len() - from_end;
    bytes[place] ^= 1;
    bytes
}

#[test]
fn what_no_pixel_needs_may_be_damaged_or_missing() {
    for mode in MODES {
        let parts = Parts::new(mode);
        let good = deflated(&parts.rows);
        let file = parts.file(&[&good]);
        let expected = decode(&file).unwrap();
        let end = good.len();
        let more = deflated(&[parts.rows.clone(), parts.rows.clone()].concat());
        let checksum_of_the_chunk = file.len() - 12 - 1;
        let mut wrong_checksum = file.clone();
        wrong_checksum[checksum_of_the_chunk] ^= 1;
        for (what, file) in [
            ("no checksum", parts.file(&[&good[..end - 4]])),
            ("half a checksum", parts.file(&[&good[..end - 2]])),
            ("a chunk for each byte", parts.file(&good.chunks(1).collect::<Vec<_>>())),
            ("empty chunks", parts.file(&[b"", &good, b""])),
            ("bytes after the end", parts.file(&[&good, b"junk"])),
            ("more rows", parts.file(&[&more])),
            ("no end", file[..file.len() - 12].to_vec()),
            ("cut in the chunk's checksum", file[..file.len() - 14].to_vec()),
            ("cut in the pixels' checksum", file[..file.len() - 18].to_vec()),
            ("the chunk's checksum", wrong_checksum),
            ("a text cut short", [&file[..file.len() - 12], &chunk(b"tEXt", b"Comment\0red")[..15]].concat()),
            ("stray bytes", [&file[..file.len() - 12], &[7; 9][..]].concat()),
        ] {
            assert!(decode(&file).unwrap() == expected, "{mode:?}: {what}");
        }
    }
}

#[test]
fn damaged_and_missing_pixels_are_refused() {
    for mode in MODES {
        let parts = Parts::new(mode);
        let (good, whole) = (deflated(&parts.rows), parts.rows.concat());
        let end = good.len();
        let more = deflated(&[parts.rows.clone(), parts.rows.clone()].concat());
        for (what, file) in [
            ("checksum", parts.file(&[&flipped(&good, 1)])),
            ("checksum in a chunk of its own", parts.file(&[&good[..end - 4], &flipped(&good, 1)[end - 4..]])),
            ("checksum after more rows", parts.file(&[&flipped(&more, 1)])),
            ("a row less", parts.file(&[&deflated(&parts.rows[1..])])),
            ("half of the rows", parts.file(&[&deflated(&parts.rows[..parts.rows.len() / 2])])),
            ("a byte less", parts.file(&[&fdeflate::compress_to_vec(&whole[1..])])),
            ("no bytes", parts.file(&[&fdeflate::compress_to_vec(&[])])),
            ("nothing", parts.file(&[b""])),
            ("an unknown filter", parts.file(&[&fdeflate::compress_to_vec(&[&[5], &whole[1..]].concat())])),
        ] {
            let message = reason(&file);
            assert!(message.contains("its pixels are damaged ("), "{mode:?}: {what}: {message}");
        }
        assert!(reason(&parts.file(&[])).contains("it has no pixels"));
        let mut header = parts.file(&[&good]);
        header[32] ^= 1;
        assert!(reason(&header).contains("CRC error"));
    }
}

#[test]
fn chunks_in_the_wrong_place_do_not_count() {
    let samples = [1, 1, 0, 2];
    let palette = [9, 8, 7, 200, 0, 0, 0, 100, 0];
    let header = |colour| chunk(b"IHDR", &[0, 0, 0, 4, 0, 0, 0, 1, 8, colour, 0, 0, 0]);
    let pixels = |samples: &[u8]| fdeflate::compress_to_vec(&[&[0], samples].concat());
    let (colours, key) = (chunk(b"PLTE", &palette), chunk(b"tRNS", &[255, 0]));
    let body = pixels(&samples);
    let data = chunk(b"IDAT", &body);
    let plain = [[200, 0, 0], [200, 0, 0], [9, 8, 7], [0, 100, 0]];
    let other = chunk(b"PLTE", &[0; 9]);
    let file = |chunks: &[&[u8]]| [SIGNATURE, &header(3), &chunks.concat(), &chunk(b"IEND", b"")].concat();
    assert_eq!(row(&file(&[&colours, &data])), plain);
    assert_eq!(row(&file(&[&colours, &key, &data]))[..3], [[255; 3], [255; 3], [9, 8, 7]]);
    assert_eq!(row(&file(&[&key, &colours, &data])), plain);
    assert_eq!(row(&file(&[&colours, &data, &key])), plain);
    assert_eq!(row(&file(&[&colours, &other, &data, &other])), plain);
    assert_eq!(row(&file(&[&colours, &chunk(b"tRNS", &[255]), &key, &data])), plain);
    assert_eq!(row(&file(&[&colours, &header(0), &data])), plain);
    let (first, second) = body.split_at(5);
    let between = [&colours[..], &chunk(b"IDAT", first), &other, &chunk(b"IDAT", second)];
    assert_eq!(row(&file(&between)), plain);
    // their checksums count
    assert!(reason(&file(&[&flipped(&colours, 1), &data])).contains("CRC error"));
    assert!(reason(&file(&[&colours, &flipped(&key, 1), &data])).contains("CRC error"));
    let key = flipped(&chunk(b"tRNS", &[0, 1]), 1);
    assert!(reason(&[SIGNATURE, &header(0), &key, &data].concat()).contains("CRC error"));
}

#[test]
fn transparency_reaches_beyond_the_palette() {
    // 4 x 1, two bits of index: 0, 1, 2, 3; one colour, three alphas
    let header = chunk(b"IHDR", &[0, 0, 0, 4, 0, 0, 0, 1, 2, 3, 0, 0, 0]);
    let pixels = chunk(b"IDAT", &fdeflate::compress_to_vec(&[0, 0b0001_1011]));
    let file = |alphas: &[u8]| {
        let chunks = [chunk(b"PLTE", &[200, 100, 0]), chunk(b"tRNS", alphas)].concat();
        [SIGNATURE, &header, &chunks, &pixels, &chunk(b"IEND", b"")].concat()
    };
    assert_eq!(decode(&file(&[255, 0, 204])).unwrap().rgb, [200, 100, 0, 255, 255, 255, 51, 51, 51, 0, 0, 0]);
    // more than there can be indices is no transparency
    assert_eq!(decode(&file(&[9; 257])).unwrap().rgb, [200, 100, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
}
