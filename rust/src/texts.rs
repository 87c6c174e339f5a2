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

/// The different lines of a UTF-8 file, stripped, without empty ones, in their order; `what` is what a line is, for
/// messages, such as "answer".
///
/// # Errors
/// [`Error::File`]: the file is missing, not UTF-8, or has no line with text.
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
    let text = String::from_utf8(bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        failed(format!("not UTF-8 text (at byte {at}); expected one {what} a line"))
    })?;
    let lines = lines(&text);
    if lines.is_empty() {
        return Err(failed(format!("the file has no text; expected one {what} a line")));
    }
    Ok(lines)
}

/// What [`read_lines`] makes of a file's text.
fn lines(text: &str) -> Vec<String> {
    let text = text.strip_prefix('\u{FEFF}').unwrap_or(text);
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

fn is_space(character: char) -> bool {
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
        let text = "\u{feff}red\r\n  blue \u{0b}red\u{0c}a\u{1c}b\u{1d}c\u{1e}d\u{85}e\u{2028}f\u{2029}g\u{1f}h\n\n";
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
