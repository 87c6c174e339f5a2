//! NumPy's `.npy` files, as far as vectors and tables of numbers need them.
//!
//! The format: <https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html>.

use std::fs::File;
use std::io::{self, BufReader, Read};
use std::path::Path;

use half::f16;

use crate::error::Error;
use crate::files::write_whole;

const MAGIC: &[u8; 6] = b"\x93NUMPY";
/// NumPy itself reads no longer header from a file it does not trust.
const MAX_HEADER: usize = 10_000;
/// No vector that a model takes is longer; a header can promise anything.
const MAX_NUMBERS: usize = 1 << 24;
const ALIGNMENT: usize = 64;

/// Writes rows of `cols` numbers as an array (N, `cols`) of float32, whole or not at all.
///
/// # Errors
/// [`Error::Input`] if the numbers do not fill whole rows, [`Error::File`] if the file cannot be written.
pub fn write_npy(path: &Path, numbers: &[f32], cols: usize) -> Result<(), Error> {
    if cols == 0 || !numbers.len().is_multiple_of(cols) {
        return Err(Error::Input(format!("{} numbers do not fill rows of {cols}", numbers.len())));
    }
    let rows = numbers.len() / cols;
    let mut header = format!("{{'descr': '<f4', 'fortran_order': False, 'shape': ({rows}, {cols}), }}");
    let before = MAGIC.len() + 2 + size_of::<u16>();
    let padding = (before + header.len() + 1).next_multiple_of(ALIGNMENT) - (before + header.len() + 1);
    header.push_str(&" ".repeat(padding));
    header.push('\n');
    let length = u16::try_from(header.len()).map_err(|_| Error::Input("a shape of impossible length".into()))?;
    write_whole(path, |out| {
        out.write_all(MAGIC)?;
        out.write_all(&[1, 0])?;
        out.write_all(&length.to_le_bytes())?;
        out.write_all(header.as_bytes())?;
        numbers.iter().try_for_each(|number| out.write_all(&number.to_le_bytes()))
    })
}

/// Reads an array with one axis, of any integer or floating-point type up to 64 bits and either byte order.
///
/// # Errors
/// [`Error::File`] if the file cannot be read or holds anything else.
pub fn read_npy_vector(path: &Path) -> Result<Vec<f64>, Error> {
    let problem = |reason: String| Error::File { path: path.to_path_buf(), reason };
    let file = File::open(path).map_err(|error| problem(format!("cannot read it: {error}")))?;
    read_vector(&mut BufReader::new(file)).map_err(problem)
}

fn read_vector(file: &mut impl Read) -> Result<Vec<f64>, String> {
    let header = Header::parse(&read_header(file)?)?;
    let &[len] = &header.shape[..] else {
        return Err(format!("an array with {} axes, expected one row of numbers", header.shape.len()));
    };
    if len > MAX_NUMBERS {
        return Err(format!("{len} numbers are more than any model takes"));
    }
    let kind = Kind::parse(&header.descr)?;
    let size = len * kind.size;
    let mut bytes = Vec::new();
    file.take(size as u64).read_to_end(&mut bytes).map_err(|error| format!("cannot read it: {error}"))?;
    if bytes.len() < size {
        return Err(format!("cut short: {len} numbers take {size} bytes, it has {}", bytes.len()));
    }
    bytes.chunks_exact(kind.size).map(|word| kind.number(word)).collect()
}

/// The header's text.
fn read_header(file: &mut impl Read) -> Result<String, String> {
    let mut bytes = |n: usize| -> Result<Vec<u8>, String> {
        let mut read = vec![0; n];
        file.read_exact(&mut read).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => "not a .npy file, or cut short".to_owned(),
            _ => format!("cannot read it: {error}"),
        })?;
        Ok(read)
    };
    if bytes(MAGIC.len())? != MAGIC {
        return Err("not a .npy file".into());
    }
    let length = match bytes(2)?[..] {
        [1, 0] => bytes(2)?.iter().rev().fold(0, |n, &byte| n << 8 | usize::from(byte)),
        [2 | 3, 0] => bytes(4)?.iter().rev().fold(0, |n, &byte| n << 8 | usize::from(byte)),
        [major, minor] => return Err(format!("version {major}.{minor} of .npy is not known")),
        _ => return Err("not a .npy file".into()),
    };
    if length > MAX_HEADER {
        return Err(format!("a .npy header of {length} bytes"));
    }
    // Latin-1 up to version 2, then UTF-8: the headers of arrays of numbers are ASCII in all of them
    String::from_utf8(bytes(length)?).map_err(|_| "a .npy header that is no text".into())
}

/// What the header's Python dictionary says.
#[derive(Debug, PartialEq)]
struct Header {
    descr: String,
    shape: Vec<usize>,
}

impl Header {
    /// Reads `{'descr': '<f4', 'fortran_order': False, 'shape': (3,), }`, the keys in any order.
    fn parse(text: &str) -> Result<Header, String> {
        let mut rest = Cursor(text.trim());
        let (mut descr, mut shape, mut order) = (None, None, false);
        rest.expect('{')?;
        while !rest.take('}') {
            let key = rest.string()?;
            rest.expect(':')?;
            match key {
                "descr" => descr = Some(rest.string()?.to_owned()),
                "fortran_order" => {
                    rest.word("True").or_else(|_| rest.word("False"))?; // one axis has one order
                    order = true;
                }
                "shape" => shape = Some(rest.sizes()?),
                other => return Err(format!("a .npy header with the key {other:?}")),
            }
            if !rest.take(',') {
                rest.expect('}')?;
                break;
            }
        }
        match (descr, shape, order, rest.0) {
            (Some(descr), Some(shape), true, "") => Ok(Header { descr, shape }),
            _ => Err("a .npy header that does not say type, order and shape".into()),
        }
    }
}

/// The rest of a header.
struct Cursor<'a>(&'a str);

impl<'a> Cursor<'a> {
    fn take(&mut self, expected: char) -> bool {
        let found = self.0.strip_prefix(expected);
        self.0 = found.unwrap_or(self.0).trim_start();
        found.is_some()
    }

    fn expect(&mut self, expected: char) -> Result<(), String> {
        if self.take(expected) { Ok(()) } else { Err(format!("a .npy header without {expected:?} where it should be")) }
    }

    fn word(&mut self, expected: &str) -> Result<(), String> {
        let rest = self.0.strip_prefix(expected).ok_or("a .npy header whose order is neither True nor False")?;
        self.0 = rest.trim_start();
        Ok(())
    }

    fn string(&mut self) -> Result<&'a str, String> {
        let quote = if self.0.starts_with('"') { '"' } else { '\'' };
        let inside = self.0.strip_prefix(quote);
        let (string, rest) =
            inside.and_then(|rest| rest.split_once(quote)).ok_or("an array of records, or a damaged .npy header")?;
        self.0 = rest.trim_start();
        Ok(string)
    }

    fn sizes(&mut self) -> Result<Vec<usize>, String> {
        let mut sizes = Vec::new();
        self.expect('(')?;
        while !self.take(')') {
            let digits = self.0.find(|c: char| !c.is_ascii_digit()).unwrap_or(self.0.len());
            let (number, rest) = self.0.split_at(digits);
            sizes.push(number.parse().map_err(|_| "a .npy header with an impossible shape")?);
            self.0 = rest.trim_start();
            self.take('L'); // as Python 2 wrote long integers
            if !self.take(',') {
                self.expect(')')?;
                break;
            }
        }
        Ok(sizes)
    }
}

/// A type of numbers: `<f4`, `>i8`, `|u1`.
struct Kind {
    big_endian: bool,
    letter: char,
    size: usize,
}

impl Kind {
    fn parse(descr: &str) -> Result<Kind, String> {
        let unknown = || format!("numbers of type {descr:?}, expected integers or floating-point numbers");
        let mut letters = descr.chars();
        let big_endian = match letters.next() {
            Some('<' | '|') => false,
            Some('>') => true,
            Some('=') => cfg!(target_endian = "big"),
            _ => return Err(unknown()),
        };
        let letter = letters.next().ok_or_else(unknown)?;
        let size = letters.as_str().parse().map_err(|_| unknown())?;
        match (letter, size) {
            ('f', 2 | 4 | 8) | ('i' | 'u', 1 | 2 | 4 | 8) => Ok(Kind { big_endian, letter, size }),
            _ => Err(unknown()),
        }
    }

    /// The number in `size` bytes.
    fn number(&self, word: &[u8]) -> Result<f64, String> {
        let join = |bits: u64, &byte: &u8| bits << 8 | u64::from(byte);
        let bits = if self.big_endian { word.iter().fold(0, join) } else { word.iter().rev().fold(0, join) };
        // `bits` has no more than `size` bytes, so narrowing it to that size loses nothing
        Ok(match (self.letter, self.size) {
            ('f', 2) => f16::from_bits(bits as u16).to_f64(),
            ('f', 4) => f64::from(f32::from_bits(bits as u32)),
            ('f', 8) => f64::from_bits(bits),
            ('i', 1) => f64::from(bits as u8 as i8),
            ('i', 2) => f64::from(bits as u16 as i16),
            ('i', 4) => f64::from(bits as u32 as i32),
            ('i', _) => bits as i64 as f64,
            _ => bits as f64,
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A file as NumPy writes it, with any header and data.
    fn file(version: u8, header: &str, data: &[u8]) -> Vec<u8> {
        let mut bytes = [MAGIC.as_slice(), &[version, 0]].concat();
        match version {
            1 => bytes.extend(u16::try_from(header.len()).unwrap().to_le_bytes()),
            _ => bytes.extend(u32::try_from(header.len()).unwrap().to_le_bytes()),
        }
        [bytes, header.as_bytes().to_vec(), data.to_vec()].concat()
    }

    fn vector(version: u8, descr: &str, len: usize, data: &[u8]) -> Result<Vec<f64>, String> {
        let header = format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': ({len},), }}   \n");
        read_vector(&mut file(version, &header, data).as_slice())
    }

    #[test]
    fn every_type_in_both_byte_orders() {
        assert_eq!(vector(1, "<f2", 2, &[0x00, 0x3c, 0x00, 0xc1]).unwrap(), [1.0, -2.5]);
        assert_eq!(vector(2, ">f2", 1, &[0xc1, 0x00]).unwrap(), [-2.5]);
        assert_eq!(vector(3, "<f4", 1, &(-0.1_f32).to_le_bytes()).unwrap(), [f64::from(-0.1_f32)]);
        assert_eq!(vector(1, ">f4", 1, &0.1_f32.to_be_bytes()).unwrap(), [f64::from(0.1_f32)]);
        assert_eq!(vector(1, "<f8", 1, &0.1_f64.to_le_bytes()).unwrap(), [0.1]);
        assert_eq!(vector(1, ">f8", 1, &0.1_f64.to_be_bytes()).unwrap(), [0.1]);
        assert_eq!(vector(1, "|i1", 2, &[0xff, 0x7f]).unwrap(), [-1.0, 127.0]);
        assert_eq!(vector(1, "|u1", 1, &[0xff]).unwrap(), [255.0]);
        assert_eq!(vector(1, "<i2", 1, &(-300_i16).to_le_bytes()).unwrap(), [-300.0]);
        assert_eq!(vector(1, ">u2", 1, &50_000_u16.to_be_bytes()).unwrap(), [50_000.0]);
        assert_eq!(vector(1, ">i4", 1, &(-70_000_i32).to_be_bytes()).unwrap(), [-70_000.0]);
        assert_eq!(vector(1, "<u4", 1, &4_000_000_000_u32.to_le_bytes()).unwrap(), [4e9]);
        assert_eq!(vector(1, "<i8", 1, &(-(1_i64 << 40)).to_le_bytes()).unwrap(), [-((1_u64 << 40) as f64)]);
        assert_eq!(vector(1, ">u8", 1, &u64::MAX.to_be_bytes()).unwrap(), [u64::MAX as f64]);
        assert_eq!(vector(1, "<f4", 0, &[]).unwrap(), [0.0; 0]);
        assert!(vector(1, "<f4", 1, &f32::NAN.to_le_bytes()).unwrap()[0].is_nan());
    }

    #[test]
    fn headers_as_others_write_them() {
        for header in [
            "{'shape':(2,),'fortran_order':True,'descr':'|u1'}",
            "{\"descr\": \"|u1\", \"fortran_order\": False, \"shape\": (2L,), }\n",
            "{ 'descr' : '|u1' , 'fortran_order' : False , 'shape' : ( 2 , ) }",
        ] {
            assert_eq!(read_vector(&mut file(1, header, &[3, 4, 99]).as_slice()).unwrap(), [3.0, 4.0], "{header}");
        }
    }

    #[test]
    fn what_is_no_vector() {
        for (header, message) in [
            ("{'descr': '<f4', 'fortran_order': False, 'shape': (1, 2), }", "2 axes"),
            ("{'descr': '<f4', 'fortran_order': False, 'shape': (), }", "0 axes"),
            ("{'descr': '<c8', 'fortran_order': False, 'shape': (1,), }", "type \"<c8\""),
            ("{'descr': '|b1', 'fortran_order': False, 'shape': (1,), }", "type \"|b1\""),
            ("{'descr': '|O', 'fortran_order': False, 'shape': (1,), }", "type \"|O\""),
            ("{'descr': '<f16', 'fortran_order': False, 'shape': (1,), }", "type \"<f16\""),
            ("{'descr': [('x', '<f4')], 'fortran_order': False, 'shape': (1,), }", "records"),
            ("{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999999999999,), }", "impossible shape"),
            ("{'descr': '<f4', 'fortran_order': False, 'shape': (18446744073709551615,), }", "more than any model"),
            ("{'descr': '<f4', 'fortran_order': False, 'shape': (-1,), }", "impossible shape"),
            ("{'descr': '<f4', 'fortran_order': Maybe, 'shape': (1,), }", "neither True nor False"),
            ("{'descr': '<f4', 'shape': (1,), }", "does not say"),
            ("{'descr': '<f4', 'fortran_order': False, 'shape': (1,), } more", "does not say"),
            ("{'surprise': '<f4'}", "surprise"),
            ("{", "records, or a damaged"),
            ("", "without '{'"),
            (
                "{'descr': '<f4', 'fortran_order': False, 'shape': (3,), }",
                "cut short: 3 numbers take 12 bytes, it has 8",
            ),
        ] {
            let found = read_vector(&mut file(1, header, &[0; 8]).as_slice()).unwrap_err();
            assert!(found.contains(message), "{header}: {found}");
        }
        for bytes in [&b""[..], b"\x93NUM", b"not numpy at all", b"\x93NUMPY\x01\x00\xff", b"\x93NUMPY\x09\x00\x10\x00"]
        {
            assert!(read_vector(&mut { bytes }).is_err());
        }
        assert!(read_vector(&mut file(2, &" ".repeat(MAX_HEADER + 1), &[]).as_slice()).is_err());
    }

    #[test]
    fn a_table_as_it_is_written() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("table.npy");
        write_npy(&path, &[1.0, 2.0, 3.0, 4.0, 5.0, 6.5], 3).unwrap();
        let bytes = std::fs::read(&path).unwrap();
        assert_eq!(bytes.len() % ALIGNMENT, 24);
        let text = read_header(&mut bytes.as_slice()).unwrap();
        assert_eq!(Header::parse(&text).unwrap(), Header { descr: "<f4".into(), shape: vec![2, 3] });
        assert!(text.ends_with('\n'));
        assert_eq!(bytes[bytes.len() - 4..], 6.5_f32.to_le_bytes());
        assert!(read_npy_vector(&path).unwrap_err().to_string().contains("2 axes"));
        write_npy(&path, &[], 3).unwrap();
        for (numbers, cols) in [(&[1.0][..], 2), (&[1.0], 0)] {
            assert!(write_npy(&path, numbers, cols).is_err());
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_answered(header in ".{0,60}", version in 0_u8..5, data in prop::collection::vec(any::<u8>(), 0..20)) {
            let _ = read_vector(&mut file(version, &header, &data).as_slice());
        }

        #[test]
        fn a_damaged_file_is_answered(at in 0_usize..80, byte in any::<u8>()) {
            let mut bytes = file(1, "{'descr': '<f4', 'fortran_order': False, 'shape': (3,), }  ", &[0; 12]);
            let at = at.min(bytes.len() - 1);
            bytes[at] = byte;
            let _ = read_vector(&mut bytes.as_slice());
        }
    }
}
