//! `kore-vljepa search`: images by a text.

use std::path::PathBuf;

use kore_vljepa::files::{demand_writable, path_text};
use kore_vljepa::vljepa::Found;
use serde::Serialize;

use crate::args::{ModelArgs, at_least_one};
use crate::confusion::{Judged, confusion_cell, confusion_line};
use crate::contact_sheet::write_contact_sheet;
use crate::images::ImageArgs;
use crate::output::{Failure, Table, failure, print, print_json, printable};

/// Rank the images of a folder by how well they show what a text says.
#[derive(clap::Args)]
pub(crate) struct Search {
    /// What the image should show.
    #[arg(value_name = "TEXT", allow_negative_numbers = true)]
    text: Option<String>,
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    images: ImageArgs,
    /// Show this many images, best first.
    #[arg(long, value_name = "INT", default_value_t = 5, allow_negative_numbers = true)]
    top: i64,
    /// Write a picture of the images found to this PNG file.
    #[arg(long, value_name = "PATH")]
    contact_sheet: Option<PathBuf>,
    /// Print JSON.
    #[arg(long, overrides_with = "json")]
    json: bool,
}

#[derive(Serialize)]
struct Results<'a> {
    text: &'a str,
    images_searched: usize,
    results: Vec<Hit>,
    threshold: Option<f64>,
}

#[derive(Serialize)]
struct Hit {
    image: String,
    cosine: f64,
    #[serde(flatten)]
    judged: Judged,
}

impl Search {
    pub(crate) fn run(mut self) -> Result<(), Failure> {
        let text = self.take_text()?;
        let top = at_least_one("top", self.top)?;
        let options = self.images.options()?;
        demand_writable(&self.contact_sheet)?;
        let paths = self.images.find()?;
        let model = self.model.open_with(options)?;
        let images = self.images.embed(&model, &paths, None)?;
        let found = model.search(&text, &images, top)?;
        if let Some(path) = &self.contact_sheet {
            write_contact_sheet(path, &text, &found)?;
        }
        if self.json {
            let hit = |found: &Found<'_>| Hit {
                image: path_text(found.path),
                cosine: found.cosine.into(),
                judged: found.confusion.into(),
            };
            return print_json(&Results {
                text: &text,
                images_searched: images.paths.len(),
                results: found.iter().map(hit).collect(),
                threshold: model.recursion().map(|recursion| recursion.confusion_probe.threshold.into()),
            });
        }
        let line = confusion_line(found.iter().map(|found| found.confusion));
        let columns = if line.is_some() { 3 } else { 2 };
        let mut table = Table::new(["image", "cosine", "confusion"].into_iter().take(columns));
        for Found { path, cosine, confusion } in found {
            let row = [path_text(path), format!("{cosine:.3}"), confusion_cell(confusion)];
            table.row(row.into_iter().take(columns));
        }
        let heading = format!("{}   ({} images)", printable(&text), images.paths.len());
        print(format!("{heading}\n\n{table}\n{}", line.unwrap_or_default()).trim_end())
    }

    /// The text. After `--images` it is the last word, which is no image then: `--images a.png b.png "a red circle"`.
    fn take_text(&mut self) -> Result<String, Failure> {
        if let Some(text) = self.text.take() {
            return Ok(text);
        }
        let is_last = |word: &PathBuf| std::env::args_os().next_back().is_some_and(|last| last == *word);
        let word = self.images.images.pop_if(|word| is_last(word)).map(|word| word.into_os_string().into_string());
        match word {
            Some(Ok(text)) => Ok(text),
            Some(Err(_)) => Err(failure("the text to search for is not UTF-8")),
            None => Err(failure("nothing to search for: give a text, such as \"a red circle\"")),
        }
    }
}
