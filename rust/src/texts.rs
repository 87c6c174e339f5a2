//! Text as Python's `str` methods see it, so that both halves of the project take the same text for the same.

use std::collections::HashSet;
use std::fs::File;
use std::hash::Hash;
use std::io::Read;
use std::path::Path;
use std::sync::LazyLock;

use tokenizers::utils::SysRegex;

use crate::error::Error;

/// Larger lists of texts are refused.
const MAX_FILE: u64 = 1 << 30;

static LETTER: LazyLock<SysRegex> = LazyLock::new(|| SysRegex::new(r"\p{L}").expect("a class that every version has"));

static UNPRINTABLE: LazyLock<SysRegex> =
    LazyLock::new(|| SysRegex::new(r"[\p{C}\p{Z}]").expect("classes that every version has"));

/// `text` without white space at both ends, as Python's `str.strip()` takes it away: U+001C to U+001F go too.
pub fn strip(text: &str) -> &str {
    text.trim_matches(is_space)
}

/// Of equal items the first, in their order.
pub fn distinct<T: Clone + Eq + Hash>(items: impl IntoIterator<Item = T>) -> Vec<T> {
    let mut seen = HashSet::new();
    items.into_iter().filter(|item| seen.insert(item.clone())).collect()
}

/// The text of a file of another program: UTF-8, or UTF-16 and UTF-32 by their byte-order mark, as PowerShell's `>` and
/// Windows' editors write them, which is no part of it. JSON in UTF-16 is known without a mark.
///
/// # Errors
/// What it was read as, and the byte at which it is none.
pub(crate) fn decoded(bytes: &[u8]) -> Result<String, String> {
    let wide = |mark: usize, size: usize, little: bool| {
        let encoding = format!("UTF-{}-{}", 8 * size, if little { "LE" } else { "BE" });
        from_wide(&bytes[mark..], size, little).map_err(|at| format!("not {encoding} text (at byte {at})"))
    };
    match bytes {
        [0xff, 0xfe, 0, 0, ..] => wide(4, 4, true), // before UTF-16, whose mark this begins with
        [0, 0, 0xfe, 0xff, ..] => wide(4, 4, false),
        [0xff, 0xfe, ..] => wide(2, 2, true),
        [0xfe, 0xff, ..] => wide(2, 2, false),
        [b'{' | b'[', 0, ..] => wide(0, 2, true),
        [0, b'{' | b'[', ..] => wide(0, 2, false),
        _ => {
            let text = std::str::from_utf8(bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes));
            text.map(String::from).map_err(|error| format!("not UTF-8 text (at byte {})", error.valid_up_to()))
        }
    }
}

/// The text of units of `size` bytes, or the byte at which it is none.
fn from_wide(bytes: &[u8], size: usize, little: bool) -> Result<String, usize> {
    let unit = |bytes: &[u8]| {
        let add = |sum: u32, byte: &u8| sum << 8 | u32::from(*byte);
        if little { bytes.iter().rev().fold(0, add) } else { bytes.iter().fold(0, add) }
    };
    let units = bytes.chunks_exact(size);
    let is_whole = units.remainder().is_empty();
    let mut text = String::with_capacity(bytes.len());
    if size == 4 {
        for (index, unit) in units.map(unit).enumerate() {
            text.push(char::from_u32(unit).ok_or(size * index)?);
        }
    } else {
        let mut at = 0;
        for character in char::decode_utf16(units.map(|bytes| unit(bytes) as u16)) {
            let character = character.map_err(|_| at)?;
            at += size * character.len_utf16();
            text.push(character);
        }
    }
    if is_whole { Ok(text) } else { Err(bytes.len() / size * size) }
}

/// The different lines of a file in UTF-8, or in UTF-16 with its mark, stripped, without empty ones, in their order;
/// `what` is what a line is, for messages, such as "answer".
///
/// # Errors
/// [`Error::File`]: the file is missing, not such text, or has no line with text.
pub fn read_lines(path: impl AsRef<Path>, what: &str) -> Result<Vec<String>, Error> {
    let path = path.as_ref();
    let failed = |reason: String| Error::File { path: path.to_path_buf(), reason };
    let unreadable =
        |error: std::io::Error| failed(format!("cannot read it: {error}; expected a text file, one {what} a line"));
    let mut bytes = Vec::new();
    let file = File::open(path).map_err(unreadable)?;
    file.take(MAX_FILE + 1).read_to_end(&mut bytes).map_err(unreadable)?;
    if bytes.len() as u64 > MAX_FILE {
        return Err(failed(format!("more bytes than a list of texts may have ({MAX_FILE})")));
    }
    let text = decoded(&bytes).map_err(|reason| failed(format!("{reason}; expected one {what} a line")))?;
    let lines = lines(&text);
    if lines.is_empty() {
        return Err(failed(format!("the file has no text; expected one {what} a line")));
    }
    Ok(lines)
}

/// What [`read_lines`] makes of a file's text.
fn lines(text: &str) -> Vec<String> {
    let lines = text.split(is_line_end).map(strip).filter(|line| !line.is_empty());
    distinct(lines).into_iter().map(String::from).collect()
}

/// Whether `character` is a letter: Unicode's category L, as Python's `str.isalpha`.
pub(crate) fn is_letter(character: char) -> bool {
    if character.is_ascii() { character.is_ascii_alphabetic() } else { is_in(&LETTER, character) }
}

/// Whether `character` can be seen, as Python's `str.isprintable`; of white space only the ASCII space can.
pub fn is_printable(character: char) -> bool {
    if character.is_ascii() { !character.is_ascii_control() } else { !is_in(&UNPRINTABLE, character) }
}

fn is_in(class: &SysRegex, character: char) -> bool {
    class.find_iter(character.encode_utf8(&mut [0; 4])).next().is_some()
}

/// White space, as Python has it.
pub fn is_space(character: char) -> bool {
    character.is_whitespace() || matches!(character, '\u{1C}'..='\u{1F}')
}

/// Where `str.splitlines` cuts. It takes `\r\n` for one end; two give an empty line more, which is left out anyway.
pub(crate) fn is_line_end(character: char) -> bool {
    matches!(
        character,
        '\n' | '\r' | '\u{0B}' | '\u{0C}' | '\u{1C}' | '\u{1D}' | '\u{1E}' | '\u{85}' | '\u{2028}' | '\u{2029}'
    )
}

/// The number as Python's messages have it: `nan`, `inf`, `1e+39`, `0.5`.
pub fn number_text(number: f64) -> String {
    let text = format!("{number:?}").to_lowercase();
    match text.split_once('e') {
        Some((digits, power)) if !power.starts_with('-') => format!("{digits}e+{power}"),
        _ => text,
    }
}

/// The number as Python's format `g` has it, with six digits: `0.5`, `10`, `1e-05`, `1.23457e+06`.
pub(crate) fn short_number(number: f64) -> String {
    const DIGITS: i32 = 6;
    let text = format!("{number:.5e}");
    let Some((digits, power)) = text.split_once('e') else { return text.to_lowercase() }; // not finite
    let without_zeros = |digits: &str| digits.trim_end_matches('0').trim_end_matches('.').to_owned();
    match power.parse::<i32>() {
        Ok(power @ -4..DIGITS) => {
            let places = usize::try_from(DIGITS - 1 - power).unwrap_or(0);
            let fixed = format!("{number:.places$}");
            if places == 0 { fixed } else { without_zeros(&fixed) }
        }
        Ok(power) => {
            let sign = if power < 0 { '-' } else { '+' };
            format!("{}e{sign}{:02}", without_zeros(digits), power.unsigned_abs())
        }
        Err(_) => text,
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn numbers_are_written_as_in_python() {
        let numbers = [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, 1e39, 1e-46, 0.5, -1.0, 0.0];
        let texts = ["nan", "inf", "-inf", "1e+39", "1e-46", "0.5", "-1.0", "0.0"];
        assert_eq!(numbers.map(number_text), texts);
    }

    #[test]
    fn short_numbers_are_written_as_in_python() {
        for (number, text) in [
            (0.0, "0"),
            (0.5, "0.5"),
            (10.0, "10"),
            (86_400.0, "86400"),
            (100_000.0, "100000"),
            (999_999.5, "1e+06"),
            (1_234_567.0, "1.23457e+06"),
            (1.0 / 3.0, "0.333333"),
            (0.000_1, "0.0001"),
            (0.000_099_999_99, "0.0001"),
            (1e-5, "1e-05"),
            (1.5e-300, "1.5e-300"),
            (-2.5, "-2.5"),
            (1e100, "1e+100"),
            (f64::INFINITY, "inf"),
            (f64::NAN, "nan"),
        ] {
            assert_eq!(short_number(number), text);
        }
    }

    #[test]
    fn strips_what_python_strips() {
        assert_eq!(strip("\u{1c}\u{1f} \u{a0}\u{3000}a b\u{85}\u{2029}\t"), "a b");
        assert_eq!(strip("\u{200b}x\u{feff}"), "\u{200b}x\u{feff}"); // zero width, but no white space
        assert_eq!(strip(" \n\u{1d}"), "");
    }

    #[test]
    fn cuts_lines_where_python_does_and_keeps_the_first_of_equal_ones() {
        let text = "red\r\n  blue \u{0b}red\u{0c}a\u{1c}b\u{1d}c\u{1e}d\u{85}e\u{2028}f\u{2029}g\u{1f}h\n\n";
        assert_eq!(lines(text), ["red", "blue", "a", "b", "c", "d", "e", "f", "g\u{1f}h"]);
    }

    #[test]
    fn a_file_without_text_is_an_error_that_names_it() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("answers.txt");
        let message = |path: &Path| read_lines(path, "answer").expect_err("no list").to_string();
        assert!(message(&path).contains("answers.txt: cannot read it: "), "{}", message(&path));
        fs::write(&path, " \n\u{1c}\n").expect("written");
        assert!(message(&path).ends_with("answers.txt: the file has no text; expected one answer a line"));
        fs::write(&path, b"red\n\xff").expect("written");
        assert!(message(&path).ends_with("not UTF-8 text (at byte 4); expected one answer a line"));
        fs::write(&path, "\u{feff}red\nblue\nred").expect("written");
        assert_eq!(read_lines(&path, "answer").expect("a list"), ["red", "blue"]);
    }

    /// Values from Python: `text.encode("utf-16")` and so on.
    #[test]
    fn text_of_other_programs_is_read_by_its_mark() {
        let utf16_le = b"\xff\xfea\0\xe9\0=\xd8\0\xde";
        let utf16_be = b"\xfe\xff\0a\0\xe9\xd8=\xde\0";
        let utf32_le = b"\xff\xfe\0\0a\0\0\0\xe9\0\0\0\0\xf6\x01\0";
        let utf32_be = b"\0\0\xfe\xff\0\0\0a\0\0\0\xe9\0\x01\xf6\0";
        for bytes in [&utf16_le[..], utf16_be, utf32_le, utf32_be, "\u{feff}aé😀".as_bytes(), "aé😀".as_bytes()] {
            assert_eq!(decoded(bytes).as_deref(), Ok("aé😀"), "{bytes:?}");
        }
        assert_eq!(decoded(b"{\0}\0").as_deref(), Ok("{}"));
        assert_eq!(decoded(b"\0[\0]").as_deref(), Ok("[]"));
        assert_eq!(decoded(b"").as_deref(), Ok(""));
        for (bytes, reason) in [
            (&b"a\xff"[..], "not UTF-8 text (at byte 1)"),
            (b"\xff\xfea\0b", "not UTF-16-LE text (at byte 2)"), // half a unit
            (b"\xff\xfea\0\0\xdc", "not UTF-16-LE text (at byte 2)"), // half a pair
            (b"\xff\xfe\0\0a\0\0\0\0\0\x11\0", "not UTF-32-LE text (at byte 4)"), // beyond Unicode
        ] {
            assert_eq!(decoded(bytes).unwrap_err(), reason, "{bytes:?}");
        }
    }

    #[test]
    fn what_cannot_be_seen_is_known() {
        assert!(['a', ' ', 'é', '日', '😀', '\u{301}'].into_iter().all(is_printable));
        let unseen =
            ['\0', '\n', '\u{7f}', '\u{9b}', '\u{a0}', '\u{ad}', '\u{200b}', '\u{202e}', '\u{2028}', '\u{10ffff}'];
        assert!(!unseen.into_iter().any(is_printable));
    }

    #[test]
    fn letters_are_category_l_only() {
        assert!(['a', 'Ж', '日', 'ª', 'ǅ', 'ʰ'].into_iter().all(is_letter));
        assert!(!['1', ' ', '\u{0940}', 'Ⅳ', '\u{0301}', '😀'].into_iter().any(is_letter));
    }
}
