//! Where an orientation is found, and what no damage may cost.

use proptest::prelude::*;

use super::super::metadata::split;
use super::super::{Picture, decode};
use super::{chunk, files, noise, png, rgb_png};

/// A TIFF structure with one directory of (tag, type, count, value).
fn tiff(little: bool, entries: &[(u16, u16, u32, [u8; 4])]) -> Vec<u8> {
    let two = |value: u16| if little { value.to_le_bytes() } else { value.to_be_bytes() };
    let four = |value: u32| if little { value.to_le_bytes() } else { value.to_be_bytes() };
    let mut bytes = if little { b"II*\0".to_vec() } else { b"MM\0*".to_vec() };
    bytes.extend(four(8));
    bytes.extend(two(entries.len() as u16));
    for (tag, kind, count, value) in entries {
        bytes.extend([two(*tag), two(*kind)].concat());
        bytes.extend(four(*count));
        bytes.extend(value);
    }
    bytes.extend([0; 4]);
    bytes
}

fn turned(little: bool, value: u8) -> Vec<u8> {
    let value = if little { [value, 0, 0, 0] } else { [0, value, 0, 0] };
    tiff(little, &[(0x0100, 2, 4, *b"abc\0"), (0x0112, 3, 1, value)])
}

fn jpeg(segments: &[(u8, &[u8])]) -> Vec<u8> {
    let mut file = files::JPEG[..2].to_vec();
    for (marker, body) in segments {
        file.extend([0xff, *marker]);
        file.extend((body.len() as u16 + 2).to_be_bytes());
        file.extend(*body);
    }
    [&file, &files::JPEG[2..]].concat()
}

fn webp(flags: u8, chunks: &[(&[u8; 4], &[u8])]) -> Vec<u8> {
    let header = [flags, 0, 0, 0, 19, 0, 0, 11, 0, 0];
    let all = [(b"VP8X", header.as_slice()), (b"VP8 ", &files::LOSSY_WEBP[20..])];
    let mut body = b"WEBP".to_vec();
    for (kind, content) in all.into_iter().chain(chunks.iter().copied()) {
        body.extend(kind);
        body.extend((content.len() as u32).to_le_bytes());
        body.extend(content);
        body.extend(vec![0; content.len() % 2]);
    }
    [b"RIFF".as_slice(), &(body.len() as u32).to_le_bytes(), &body].concat()
}

fn exif(body: &[u8]) -> Vec<u8> {
    [b"Exif\0\0", body].concat()
}

const XMP: &[u8] = b"http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation=\"6\"/>";

#[test]
fn every_orientation_of_every_format() {
    let upright = noise(3, 2);
    let at = |x: usize, y: usize| &upright.rgb[3 * (3 * y + x)..][..3];
    // where the corner at the top left of the picture upright lies in the file
    let corners = [(0, 0), (2, 0), (2, 1), (0, 1), (0, 0), (0, 1), (2, 1), (2, 0)];
    for (value, corner) in (1..=8).zip(corners) {
        for little in [false, true] {
            let body = turned(little, value);
            assert_eq!(split(&jpeg(&[(0xe1, &exif(&body))])).orientation, value);
            assert_eq!(split(&webp(8, &[(b"EXIF", &body)])).orientation, value);
            let picture = decode(&rgb_png(&upright, &[(b"eXIf", &body)])).unwrap();
            assert_eq!((picture.width, picture.height), if value < 5 { (3, 2) } else { (2, 3) });
            assert_eq!(&picture.rgb[..3], at(corner.0, corner.1), "{value}");
        }
    }
    // 6: the camera was turned; a quarter turn clockwise shows the picture
    let clockwise = decode(&rgb_png(&upright, &[(b"eXIf", &turned(true, 6))])).unwrap();
    let expected = [at(0, 1), at(0, 0), at(1, 1), at(1, 0), at(2, 1), at(2, 0)].concat();
    assert_eq!(clockwise, Picture { width: 2, height: 3, rgb: expected });
}

#[test]
fn other_places_of_the_orientation() {
    let body = turned(true, 6);
    let picture = noise(3, 2);
    let raw: String = exif(&body).iter().map(|byte| format!("{byte:02x}\n")).collect();
    let raw = format!("\nexif\n{:8}\n{raw}", body.len() + 6);
    let profile = [b"Raw profile type exif\0", raw.as_bytes()].concat();
    let xmp = &XMP[29..];
    let text = [b"XML:com.adobe.xmp\0\0\0\0\0".as_slice(), xmp].concat();
    for file in [
        jpeg(&[(0xe1, XMP)]),
        jpeg(&[(0xe1, XMP), (0xe1, &exif(&tiff(true, &[])))]),
        jpeg(&[(0xe1, &exif(&exif(&body)))]),
        jpeg(&[(0xe1, &exif(&body[..15])), (0xe1, &exif(&body[15..]))]),
        jpeg(&[(0xe1, &exif(&tiff(false, &[(0x0112, 4, 1, [0, 0, 0, 6])])))]),
        rgb_png(&picture, &[(b"tEXt", &profile)]),
        rgb_png(&picture, &[(b"iTXt", &text)]),
        webp(4, &[(b"XMP ", xmp)]),
        webp(4, &[(b"XMP ", b"<x tiff:Orientation='6'/>")]),
        webp(12, &[(b"junk", b"odd"), (b"EXIF", &body), (b"XMP ", b"tiff:Orientation>3")]),
    ] {
        assert_eq!(split(&file).orientation, 6);
        assert!(decode(&file).is_ok());
    }
    // deflated texts are written by the encoder
    let mut file = Vec::new();
    let mut encoder = ::png::Encoder::new(&mut file, 1, 1);
    encoder.add_ztxt_chunk("Raw profile type exif".to_owned(), raw).unwrap();
    encoder.write_header().unwrap().write_image_data(&[0]).unwrap();
    assert_eq!(split(&file).orientation, 6);
}

#[test]
fn what_cannot_be_read_is_no_orientation() {
    let huge = [b"II*\0".as_slice(), &u32::MAX.to_le_bytes()].concat();
    for body in [
        b"".as_slice(),
        b"garbage!",
        b"II*\0",
        &huge,
        &turned(true, 6)[..30],
        &turned(true, 0),
        &turned(true, 9),
        &tiff(true, &[(0x0112, 3, 2, [6, 0, 6, 0])]),
        &tiff(true, &[(0x0112, 2, 2, *b"6\0\0\0")]),
    ] {
        for file in
            [jpeg(&[(0xe1, &exif(body))]), rgb_png(&noise(3, 2), &[(b"eXIf", body)]), webp(8, &[(b"EXIF", body)])]
        {
            assert_eq!(split(&file).orientation, 1);
            assert!(decode(&file).is_ok());
        }
    }
    assert_eq!(split(&webp(0, &[(b"EXIF", &turned(true, 6))])).orientation, 1); // the header does not announce it
    assert_eq!(split(&jpeg(&[(0xe1, XMP), (0xe1, &exif(&turned(true, 77)))])).orientation, 1); // EXIF decides
}

#[test]
fn damaged_metadata_costs_nothing() {
    let plain = decode(files::JPEG).unwrap();
    for segment in [
        (0xe0, b"JFIF\0".as_slice()),
        (0xe2, b"ICC_PROFILE\0"),
        (0xed, b"Photoshop 3.0\x008BIM\x04\x04"),
        (0xee, b"Adobe"),
        (0xfe, b""),
    ] {
        assert_eq!(decode(&jpeg(&[segment])).unwrap(), plain);
    }
    let picture = noise(3, 2);
    for damage in [
        chunk(b"iCCP", b"name\0\x01junk"),
        chunk(b"gAMA", b""),
        chunk(b"acTL", b""),
        chunk(b"fcTL", b"\0\0\0\x07"),
        chunk(b"zTXt", b"Raw profile type exif\0\0junk"),
        chunk(b"iTXt", b"XML:com.adobe.xmp"),
        [&chunk(b"tEXt", b"Comment\0hello")[..21], b"\0\0\0\x01"].concat(), // a wrong checksum
    ] {
        let mut file = rgb_png(&picture, &[]);
        file.splice(33..33, damage);
        assert_eq!(decode(&file).unwrap(), picture);
    }
}

#[test]
fn frames_in_frames_are_refused_at_any_depth() {
    const DEPTH: u32 = 200_000;
    let mut nested = Vec::new();
    for inside in (0..DEPTH).rev() {
        nested.extend([b"ANMF".as_slice(), &(16 + 24 * inside).to_le_bytes(), &[0; 16]].concat());
    }
    let file = webp(0, &[(b"ANMF", &nested[8..])]);
    assert!(decode(&file).unwrap_err().to_string().contains("lies within another"));
}

#[test]
fn exif_of_many_segments_is_put_together() {
    let start = exif(&turned(true, 6));
    let segments: Vec<(u8, &[u8])> =
        std::iter::once((0xe1, start.as_slice())).chain(vec![(0xe1, b"Exif\0\0".as_slice()); 400_000]).collect();
    assert_eq!(split(&jpeg(&segments)).orientation, 6);
}

#[test]
fn of_many_texts_the_last_counts() {
    let text = |value: u8| [b"XML:com.adobe.xmp\0\0\0\0\0tiff:Orientation>".as_slice(), &[b'0' + value]].concat();
    let (first, last) = (text(3), text(6));
    assert_eq!(split(&rgb_png(&noise(3, 2), &[(b"iTXt", &first), (b"iTXt", &last)])).orientation, 6);
}

#[test]
fn a_file_without_metadata_is_handed_on_as_it_is() {
    for file in [
        png((1, 1), ::png::ColorType::Grayscale, ::png::BitDepth::Eight, &[0]),
        files::JPEG.to_vec(),
        files::LOSSY_WEBP.to_vec(),
        b"\xff\xd8\xff\xe1".to_vec(),
        b"\x89PNG\r\n\x1a\n".to_vec(),
        b"RIFF\0\0\0\0WEBPVP8X".to_vec(),
        Vec::new(),
    ] {
        assert_eq!(split(&file).pixels, file);
    }
}

proptest! {
    #[test]
    fn any_bytes_behind_a_signature_are_taken_apart(
        start in prop::sample::select(vec![
            b"\x89PNG\r\n\x1a\n".as_slice(), b"\xff\xd8\xff\xe1\0\x20Exif\0\0II*\0", b"RIFF\0\0\0\0WEBPVP8X\0\0\0\0\x0c",
        ]),
        rest in prop::collection::vec(any::<u8>(), 0..200),
    ) {
        let file = [start, &rest].concat();
        prop_assert!((1..=8).contains(&split(&file).orientation));
    }
}
