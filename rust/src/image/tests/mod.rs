//! Pictures whose pixels are known, files that must be refused, and damage.

mod files;
mod metadata;
mod png;
mod resize;

use ::png::{BitDepth, ColorType, Encoder, chunk::ChunkType};
use proptest::prelude::*;

use super::*;

/// A picture in which no two pixels are likely to be alike.
fn noise(width: usize, height: usize) -> Picture {
    let mut state = 1_u32;
    let rgb = std::iter::repeat_with(|| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    });
    Picture { width, height, rgb: rgb.take(3 * width * height).collect() }
}

struct Extra<'a> {
    palette: &'a [u8],
    key: &'a [u8],
    chunks: &'a [(&'a [u8; 4], &'a [u8])],
}

const NOTHING: Extra<'_> = Extra { palette: &[], key: &[], chunks: &[] };

fn png_with(size: (u32, u32), colour: ColorType, depth: BitDepth, samples: &[u8], extra: &Extra<'_>) -> Vec<u8> {
    let mut file = Vec::new();
    let mut encoder = Encoder::new(&mut file, size.0, size.1);
    encoder.set_color(colour);
    encoder.set_depth(depth);
    if !extra.palette.is_empty() {
        encoder.set_palette(extra.palette);
    }
    if !extra.key.is_empty() {
        encoder.set_trns(extra.key);
    }
    let mut writer = encoder.write_header().unwrap();
    for (kind, body) in extra.chunks {
        writer.write_chunk(ChunkType(**kind), body).unwrap();
    }
    writer.write_image_data(samples).unwrap();
    drop(writer);
    file
}

fn png(size: (u32, u32), colour: ColorType, depth: BitDepth, samples: &[u8]) -> Vec<u8> {
    png_with(size, colour, depth, samples, &NOTHING)
}

fn rgb_png(picture: &Picture, chunks: &[(&[u8; 4], &[u8])]) -> Vec<u8> {
    let size = (picture.width as u32, picture.height as u32);
    png_with(size, ColorType::Rgb, BitDepth::Eight, &picture.rgb, &Extra { chunks, ..NOTHING })
}

/// One chunk of a PNG, with its checksum.
fn chunk(kind: &[u8; 4], body: &[u8]) -> Vec<u8> {
    let plain = png((1, 1), ColorType::Grayscale, BitDepth::Eight, &[0]);
    let extra = Extra { chunks: &[(kind, body)], ..NOTHING };
    let with = png_with((1, 1), ColorType::Grayscale, BitDepth::Eight, &[0], &extra);
    with[33..33 + with.len() - plain.len()].to_vec()
}

/// The pixels of the first row.
fn row(file: &[u8]) -> Vec<[u8; 3]> {
    let picture = decode(file).unwrap();
    picture.rgb[..3 * picture.width].as_chunks::<3>().0.to_vec()
}

fn greys(file: &[u8]) -> Vec<u8> {
    row(file)
        .into_iter()
        .map(|[red, green, blue]| {
            assert!(red == green && green == blue);
            red
        })
        .collect()
}

#[test]
fn grey_png_of_every_depth_with_and_without_a_transparent_value() {
    use BitDepth::*;
    for (depth, samples, key, expected) in [
        (One, [0x50].as_slice(), [].as_slice(), [0, 255, 0, 255]),
        (One, &[0x50], &[0, 0], [255, 255, 255, 255]),
        (Two, &[0x1b], &[], [0, 85, 170, 255]),
        (Two, &[0x1b], &[0, 2], [0, 85, 255, 255]),
        (Four, &[0x1b, 0xf0], &[], [17, 187, 255, 0]),
        (Four, &[0x1b, 0xf0], &[0, 1], [255, 187, 255, 0]),
        (Eight, &[1, 7, 8, 9], &[], [1, 7, 8, 9]),
        (Eight, &[1, 7, 8, 9], &[0, 7], [1, 255, 8, 9]),
        (Sixteen, &[0x10, 0, 0x10, 1, 0xff, 0xff, 0, 3], &[], [16, 16, 255, 0]),
        (Sixteen, &[0x10, 0, 0x10, 1, 0xff, 0xff, 0, 3], &[0x10, 1], [16, 255, 255, 0]),
    ] {
        let file = png_with((4, 1), ColorType::Grayscale, depth, samples, &Extra { key, ..NOTHING });
        assert_eq!(greys(&file), expected, "{depth:?} {key:?}");
    }
}

#[test]
fn colour_png_with_a_transparent_colour() {
    let samples = [1, 2, 3, 9, 9, 9, 1, 2, 4];
    let file =
        png_with((3, 1), ColorType::Rgb, BitDepth::Eight, &samples, &Extra { key: &[0, 1, 0, 2, 0, 3], ..NOTHING });
    assert_eq!(row(&file), [[255; 3], [9; 3], [1, 2, 4]]);
    // of 16 bits the upper 8 are compared
    let wide = samples.iter().flat_map(|sample| [*sample, 77]).collect::<Vec<u8>>();
    let file =
        png_with((3, 1), ColorType::Rgb, BitDepth::Sixteen, &wide, &Extra { key: &[1, 0, 2, 0, 3, 0], ..NOTHING });
    assert_eq!(row(&file), [[255; 3], [9; 3], [1, 2, 4]]);
    // a key that is too short is none
    let file = png_with(
        (3, 1),
        ColorType::Rgb,
        BitDepth::Eight,
        &samples,
        &Extra { chunks: &[(b"tRNS", &[0, 1])], ..NOTHING },
    );
    assert_eq!(row(&file), [[1, 2, 3], [9; 3], [1, 2, 4]]);
}

#[test]
fn palette_png_over_white() {
    let palette = [200, 0, 0, 0, 100, 0, 0, 0, 50];
    for (depth, samples) in [(BitDepth::Two, [0x1b].as_slice()), (BitDepth::Eight, &[0, 1, 2, 3])] {
        let file = png_with((4, 1), ColorType::Indexed, depth, samples, &Extra { palette: &palette, ..NOTHING });
        assert_eq!(row(&file), [[200, 0, 0], [0, 100, 0], [0, 0, 50], [0; 3]]); // black behind the palette's end
        let extra = Extra { palette: &palette, key: &[0, 128], ..NOTHING };
        let file = png_with((4, 1), ColorType::Indexed, depth, samples, &extra);
        assert_eq!(row(&file), [[255; 3], [127, 177, 127], [0, 0, 50], [0; 3]]);
    }
}

#[test]
fn alpha_is_laid_over_white() {
    let samples = [200, 0, 9, 0, 200, 0, 9, 255, 200, 0, 9, 128, 200, 0, 9, 1];
    let file = png((4, 1), ColorType::Rgba, BitDepth::Eight, &samples);
    let expected = [[255; 3], [200, 0, 9], [227, 127, 132], [255, 254, 254]];
    assert_eq!(row(&file), expected);
    let wide: Vec<u8> = samples.iter().flat_map(|sample| [*sample, 200]).collect();
    assert_eq!(row(&png((4, 1), ColorType::Rgba, BitDepth::Sixteen, &wide)), expected);
    let file = png((3, 1), ColorType::GrayscaleAlpha, BitDepth::Eight, &[200, 0, 200, 255, 0, 128]);
    assert_eq!(greys(&file), [255, 200, 127]);
    let file = png((2, 1), ColorType::GrayscaleAlpha, BitDepth::Sixteen, &[200, 9, 255, 0, 0, 9, 128, 9]);
    assert_eq!(greys(&file), [200, 127]);
}

#[test]
fn blending_rounds_the_exact_value() {
    for sample in 0..=255_u8 {
        for alpha in 0..=255_u8 {
            let exact = (f64::from(sample) * f64::from(alpha) + 255.0 * (255.0 - f64::from(alpha))) / 255.0;
            assert_eq!(blend([sample; 3], alpha), [exact.round() as u8; 3], "{sample} {alpha}");
        }
    }
}

#[test]
fn interlaced_png() {
    let picture = decode(files::INTERLACED_PNG).unwrap();
    let samples: Vec<u8> = (0..45).map(|place| place * 5).collect();
    assert_eq!(picture, Picture { width: 5, height: 3, rgb: samples });
}

/// What Pillow makes of the JPEG and WebP files: four pixels, and the sum of each channel over all 240.
#[test]
fn lossy_files_are_within_the_stated_bound_of_pillow() {
    type Known = ([[u8; 3]; 4], [u32; 3]);
    const JPEG: Known = ([[0, 5, 241], [114, 101, 145], [245, 213, 44], [232, 8, 107]], [29618, 26521, 32340]);
    const GREY: Known = ([[30; 3], [110; 3], [203; 3], [86; 3]], [28111; 3]);
    const CMYK: Known = ([[1, 0, 254], [116, 100, 142], [245, 217, 19], [245, 0, 104]], [29592, 26220, 32436]);
    const WEBP: Known = ([[0, 6, 234], [110, 102, 135], [248, 213, 50], [237, 8, 115]], [29926, 26453, 32719]);
    for (file, (pixels, sums), bound) in [
        (files::JPEG, JPEG, 4),
        (files::PROGRESSIVE_JPEG, JPEG, 4),
        (files::GREY_JPEG, GREY, 1),
        (files::CMYK_JPEG, CMYK, 1),
        (files::LOSSY_WEBP, WEBP, 0),
    ] {
        let picture = decode(file).unwrap();
        assert_eq!((picture.width, picture.height), (20, 12));
        for ((x, y), expected) in [(0, 0), (9, 5), (19, 11), (19, 0)].into_iter().zip(pixels) {
            let found = &picture.rgb[3 * (20 * y + x)..][..3];
            let close = found.iter().zip(expected).all(|(found, expected)| found.abs_diff(expected) <= bound);
            assert!(close, "at {x}, {y}: {found:?}, expected {expected:?}");
        }
        for (channel, expected) in sums.into_iter().enumerate() {
            let sum: u32 = picture.rgb.iter().skip(channel).step_by(3).copied().map(u32::from).sum();
            assert!(
                sum.abs_diff(expected) <= 240 * u32::from(bound) / 10,
                "channel {channel}: {sum}, expected {expected}"
            );
        }
    }
}

#[test]
fn lossless_webp_and_bmp() {
    let picture = noise(5, 3);
    let alpha: Vec<u8> = picture.rgb.chunks_exact(3).flat_map(|rgb| [rgb[0], rgb[1], rgb[2], 255]).collect();
    let mut webp = Vec::new();
    ::image::codecs::webp::WebPEncoder::new_lossless(&mut webp)
        .encode(&alpha, 5, 3, ::image::ExtendedColorType::Rgba8)
        .unwrap();
    assert_eq!(decode(&webp).unwrap(), picture);
    let mut bmp = Vec::new();
    ::image::codecs::bmp::BmpEncoder::new(&mut bmp)
        .encode(&picture.rgb, 5, 3, ::image::ExtendedColorType::Rgb8)
        .unwrap();
    assert_eq!(decode(&bmp).unwrap(), picture);
}

/// A GIF of one frame of 2 x 1 pixels, indices 1 and 2, at (1, 0) on a screen of 4 x 1.
fn gif(palette: Option<&[u8]>, transparent: Option<u8>) -> Vec<u8> {
    let mut file = b"GIF89a\x04\0\x01\0".to_vec();
    file.extend([if palette.is_some() { 0x81 } else { 0 }, 0, 0]);
    file.extend(palette.unwrap_or_default());
    if let Some(index) = transparent {
        file.extend([b'!', 0xf9, 4, 1, 0, 0, index, 0]);
    }
    file.extend([b',', 1, 0, 0, 0, 2, 0, 1, 0, 0]);
    // clear (4), 1, 2, end (5): three bits each, lowest first
    file.extend([2, 2, 0b10_001_100, 0b1010, 0, b';']);
    file
}

#[test]
fn gif_on_its_canvas() {
    let palette = [9, 8, 7, 200, 0, 0, 0, 100, 0, 1, 1, 1];
    let (around, one, two) = ([9, 8, 7], [200, 0, 0], [0, 100, 0]);
    assert_eq!(row(&gif(Some(&palette), None)), [around, one, two, around]);
    assert_eq!(row(&gif(Some(&palette), Some(2))), [[255; 3], one, [255; 3], [255; 3]]);
    assert_eq!(row(&gif(None, None)), [[0; 3], [1; 3], [2; 3], [0; 3]]);
}

#[test]
fn normalize_is_float32_arithmetic() {
    let (mean, std) = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]);
    let pixels: Vec<u8> = (0..3).flat_map(|_| 0..=255).collect();
    let result = normalize(&pixels, mean, std);
    assert_eq!(result.len(), pixels.len());
    for (place, value) in result.iter().enumerate() {
        let exact = (f64::from(pixels[place]) / 255.0 - f64::from(mean[place / 256])) / f64::from(std[place / 256]);
        assert!((f64::from(*value) - exact).abs() < 1e-6);
    }
    // to the bit, as PyTorch computes them
    let known = [(0, 0xc0078bbd), (1, 0xc006732b), (300, 0xbfa1f8d3), (767, 0x4028f5c3)];
    for (place, bits) in known {
        assert_eq!(result[place].to_bits(), bits);
    }
    assert!(normalize(&[], mean, std).is_empty());
}

fn reason(file: &[u8]) -> String {
    let message = decode(file).unwrap_err().to_string();
    assert!(!message.contains('\n') && message.starts_with("image: "));
    message
}

#[test]
fn what_is_too_large_is_refused_before_memory_is_taken() {
    for (width, height) in [(60_000, 60_000), (89_478_486, 1), (1, (1 << 24) + 1), (u32::MAX >> 1, u32::MAX >> 1)] {
        let mut file = png((1, 1), ColorType::Rgb, BitDepth::Eight, &[0; 3]);
        let header = [width.to_be_bytes(), height.to_be_bytes()].concat();
        let header = chunk(b"IHDR", &[&header, &[8, 2, 0, 0, 0][..]].concat());
        file.splice(8..33, header);
        assert!(reason(&file).contains("too large to decode safely"));
    }
    let mut gif = gif(None, None);
    gif[6..10].fill(0xff);
    assert!(reason(&gif).contains("65535 x 65535 pixels"));
}

#[test]
fn what_is_no_image_or_cut_short_is_refused() {
    for file in [b"".as_slice(), b"this is not an image", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"II*\0\x08\0\0\0"] {
        assert!(reason(file).contains("not a readable image; expected a JPEG, PNG"));
    }
    for file in [files::JPEG, files::PROGRESSIVE_JPEG, files::LOSSY_WEBP, files::INTERLACED_PNG, &gif(None, None)] {
        for keep in [12, file.len() / 2, file.len() * 3 / 4] {
            assert!(reason(&file[..keep]).contains("expected a complete JPEG"), "{keep} bytes of {:?}", &file[..4]);
        }
    }
}

#[test]
fn a_webp_is_as_long_as_it_says() {
    let whole = files::LOSSY_WEBP.to_vec();
    let expected = decode(&whole).unwrap();
    assert_eq!(decode(&[&whole[..], b"more"].concat()).unwrap(), expected);
    for cut in 1..4 {
        assert!(reason(&whole[..whole.len() - cut]).contains("it is cut short"));
    }
    for size in [0, 11, whole.len() as u32 - 6, u32::MAX] {
        let mut file = whole.clone();
        file[4..8].copy_from_slice(&size.to_le_bytes());
        assert!(reason(&file).contains("it is cut short"), "{size}");
    }
}

#[test]
fn files_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let missing = folder.path().join("gone.jpg");
    let message = load_image(&missing).unwrap_err().to_string();
    assert_eq!(message, format!("{}: there is no such image file", missing.display()));
    let message = load_image(folder.path()).unwrap_err().to_string();
    assert!(message.contains("cannot be read"), "{message}");
    let path = folder.path().join("a.txt"); // the content decides, not the suffix
    std::fs::write(&path, files::JPEG).unwrap();
    assert_eq!(load_image(&path).unwrap(), decode(files::JPEG).unwrap());
    std::fs::write(&path, "text").unwrap();
    assert!(load_image(&path).unwrap_err().to_string().starts_with(&path.display().to_string()));
}

#[test]
fn a_webp_frame_of_another_size_is_refused() {
    // the frame's own width, 20, at the 26th byte
    let mut file = files::LOSSY_WEBP.to_vec();
    assert_eq!(file[26], 20);
    let frame = file.split_off(20);
    let header = [0, 0, 0, 0, 20, 0, 0, 11, 0, 0]; // a canvas of 21 x 12
    let chunks = [b"WEBPVP8X\x0a\0\0\0".as_slice(), &header, b"VP8 ", &(frame.len() as u32).to_le_bytes(), &frame];
    let body = chunks.concat();
    let file = [b"RIFF".as_slice(), &(body.len() as u32).to_le_bytes(), &body].concat();
    assert!(reason(&file).contains("a frame is not of the size that was announced"));
}

#[test]
fn a_picture_is_what_its_size_says() {
    assert_eq!(Picture::new(2, 1, vec![7; 6]).unwrap().rgb(), [7; 6]);
    for (width, height, bytes) in [(0, 0, 0), (0, 5, 0), (1, 1, 2), (2, 2, 13), (usize::MAX, 2, 6)] {
        let message = Picture::new(width, height, vec![0; bytes]).unwrap_err().to_string();
        assert!(message.contains("are no picture of"), "{message}");
    }
    assert!(noise(3, 2).to_pixels(0).is_empty());
}

#[test]
fn a_panic_of_a_decoder_is_an_error() {
    let result = guarded(|_| panic!("as decoders of others may"), b"");
    assert_eq!(result.err().as_deref(), Some("its decoder gave up"));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]
    #[test]
    fn no_damage_brings_it_down(
        which in 0..8_usize,
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        keep in any::<prop::sample::Index>(),
        cut in prop::bool::weighted(0.2),
    ) {
        let small = png_with((4, 1), ColorType::Indexed, BitDepth::Two, &[0x1b], &Extra { palette: &[1; 9], ..NOTHING });
        let gif = gif(Some(&[7; 12]), Some(2));
        let mut file = [
            files::JPEG, files::PROGRESSIVE_JPEG, files::GREY_JPEG, files::CMYK_JPEG, files::LOSSY_WEBP,
            files::INTERLACED_PNG, &small, &gif,
        ][which].to_vec();
        for (place, value) in changes {
            let place = place.index(file.len());
            file[place] = value;
        }
        if cut {
            file.truncate(keep.index(file.len()));
        }
        match decode(&file) {
            Ok(picture) => prop_assert_eq!(picture.rgb.len(), 3 * picture.width * picture.height),
            Err(error) => prop_assert!(!error.to_string().contains('\n')),
        }
    }
}
