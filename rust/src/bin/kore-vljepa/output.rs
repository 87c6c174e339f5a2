//! What the commands print. Nothing here panics when the reader of a pipe has gone.

use std::fmt::Display;
use std::io::{self, Write};
use std::path::{Component, Path, PathBuf};

use indicatif::{ProgressBar, ProgressFinish, ProgressStyle};
use kore_vljepa::files::{path_text, write_whole};
use kore_vljepa::texts::{is_printable, is_space};
use kore_vljepa::{Error, LoadError};
use serde::Serialize;

/// Why a command ends before its end.
#[derive(Debug)]
pub(crate) enum Failure {
    /// Something that the user can put right, in one line.
    User(String),
    /// Nobody reads what is printed any more.
    ClosedPipe,
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Failure::User(error.to_string())
    }
}

impl From<LoadError> for Failure {
    fn from(error: LoadError) -> Self {
        Failure::User(error.to_string())
    }
}

/// A failure that says `message`.
pub(crate) fn failure(message: impl Into<String>) -> Failure {
    Failure::User(message.into())
}

/// Writes `text` and a line end to the standard output.
pub(crate) fn print(text: &str) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    let written = out.write_all(text.as_bytes()).and_then(|()| out.write_all(b"\n")).and_then(|()| out.flush());
    written.map_err(|error| match error.kind() {
        io::ErrorKind::BrokenPipe => Failure::ClosedPipe,
        _ => failure(format!("cannot write to the standard output: {error}")),
    })
}

/// Writes values as JSON, for other programs to read.
pub(crate) fn print_json(values: &impl Serialize) -> Result<(), Failure> {
    print(&json(values)?)
}

/// The same into a file, whole or not at all.
pub(crate) fn write_json(path: &Path, values: &impl Serialize) -> Result<(), Failure> {
    let json = json(values)?;
    Ok(write_whole(path, |out| writeln!(out, "{json}"))?)
}

fn json(values: &impl Serialize) -> Result<String, Failure> {
    serde_json::to_string_pretty(values).map_err(|error| failure(format!("cannot make JSON: {error}")))
}

/// A bar with rate and time left for long work on so many things of this kind; only on a terminal. It goes when the work
/// is done.
pub(crate) fn progress(what: &'static str) -> impl FnMut(usize, usize) + Send {
    let style = ProgressStyle::with_template("{msg} {wide_bar} {pos}/{len}  {per_sec}, {eta} left");
    let bar = ProgressBar::new(0)
        .with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
        .with_message(what)
        .with_finish(ProgressFinish::AndClear);
    move |done, total| {
        bar.set_length(total as u64);
        bar.set_position(done as u64);
    }
}

/// Writes `error: message` to the standard error, in one line.
pub(crate) fn print_error(message: &str) {
    say("error: ", message);
}

/// Writes `WARNING message` to the standard error, in one line.
pub(crate) fn print_warning(message: &str) {
    say("WARNING ", message);
}

fn say(kind: &str, message: &str) {
    // if the standard error is closed there is nowhere left to say so
    let _ = writeln!(io::stderr(), "{kind}{}", printable(message));
}

/// The text in one line, without characters that would steer a terminal: an untrained decoder may say any byte.
pub(crate) fn printable(text: &str) -> String {
    text.chars()
        .map(|character| match character {
            _ if is_printable(character) => character,
            _ if is_space(character) => ' ',
            _ => char::REPLACEMENT_CHARACTER,
        })
        .collect()
}

/// The path as it is printed.
pub(crate) fn shown(path: &Path) -> String {
    path_text(without_dots(path))
}

/// The same path without `.` in it.
pub(crate) fn without_dots(path: &Path) -> PathBuf {
    let parts: PathBuf = path.components().filter(|&part| part != Component::CurDir).collect();
    if parts.as_os_str().is_empty() { ".".into() } else { parts }
}

/// The number with its thousands apart: 1,234,567.
pub(crate) fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let groups: Vec<&str> = (0..digits.len())
        .filter(|at| *at == 0 || (digits.len() - at).is_multiple_of(3))
        .map(|at| &digits[at..at + if at == 0 { (digits.len() - 1) % 3 + 1 } else { 3 }])
        .collect();
    groups.join(",")
}

/// A plain table. Of every cell only what is printable is shown.
pub(crate) struct Table {
    rows: Vec<Vec<String>>,
    right_from: usize,
}

impl Table {
    /// The first column to the left, the others to the right.
    pub(crate) fn new<T: Display>(columns: impl IntoIterator<Item = T>) -> Table {
        Table { rows: vec![cells(columns)], right_from: 1 }
    }

    /// All columns to the left.
    pub(crate) fn left<T: Display>(columns: impl IntoIterator<Item = T>) -> Table {
        Table { right_from: usize::MAX, ..Table::new(columns) }
    }

    /// Adds a row with as many cells as there are columns.
    pub(crate) fn row<T: Display>(&mut self, row: impl IntoIterator<Item = T>) {
        self.rows.push(cells(row));
    }
}

fn cells<T: Display>(row: impl IntoIterator<Item = T>) -> Vec<String> {
    row.into_iter().map(|cell| printable(&cell.to_string())).collect()
}

impl Display for Table {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let widths: Vec<usize> = (0..self.rows[0].len())
            .map(|column| self.rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0))
            .collect();
        for (number, row) in self.rows.iter().enumerate() {
            let mut line = String::new();
            for (column, (cell, &width)) in row.iter().zip(&widths).enumerate() {
                line += "  ";
                line += &if column < self.right_from { format!("{cell:<width$}") } else { format!("{cell:>width$}") };
            }
            writeln!(f, "{}", line.trim_end())?;
            if number == 0 {
                writeln!(f, " {}", "─".repeat(widths.iter().map(|width| width + 2).sum::<usize>()))?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_would_steer_a_terminal_is_not_printed() {
        assert_eq!(printable("red \u{1b}[2J circle\n\u{e9} 色\u{202e}"), "red \u{fffd}[2J circle \u{e9} 色\u{fffd}");
    }

    #[test]
    fn numbers_are_grouped() {
        for (number, text) in [(0, "0"), (999, "999"), (1_000, "1,000"), (12_345, "12,345"), (1_234_567, "1,234,567")] {
            assert_eq!(grouped(number), text);
        }
    }

    #[test]
    fn paths_are_shown_as_python_shows_them() {
        for (path, text) in [("./a//b/./c/", "a/b/c"), ("/a/../b", "/a/../b"), (".", "."), ("", ".")] {
            assert_eq!(shown(Path::new(path)), text);
        }
    }

    #[test]
    fn a_table_is_aligned() {
        let mut table = Table::new(["image", "cosine"]);
        table.row(["größe.png", "0.123"]);
        table.row(["b\u{1b}", "-0.5"]);
        let expected = "  image      cosine\n ───────────────────\n  größe.png   0.123\n  b\u{fffd}           -0.5\n";
        assert_eq!(table.to_string(), expected);
    }
}
