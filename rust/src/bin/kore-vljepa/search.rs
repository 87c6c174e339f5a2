//! `kore-vljepa search`: images by a text.

use std::path::PathBuf;

use kore_vljepa::files::path_text;
use serde::Serialize;

use crate::args::{ModelArgs, at_least_one};
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
struct Found<'a> {
    text: &'a str,
    images_searched: usize,
    results: Vec<Hit>,
}

#[derive(Serialize)]
struct Hit {
    image: String,
    cosine: f64,
}

impl Search {
    pub(crate) fn run(mut self) -> Result<(), Failure> {
        let text = self.take_text()?;
        let top = at_least_one("top", self.top)?;
        let options = self.images.options()?;
        let paths = self.images.find()?;
        let model = self.model.open_with(options)?;
        let images = self.images.embed(&model, &paths, None)?;
        let found = model.search(&text, &images, top)?;
        if let Some(path) = &self.contact_sheet {
            write_contact_sheet(path, &text, &found)?;
        }
        if self.json {
            let results =
                found.iter().map(|&(image, cosine)| Hit { image: path_text(image), cosine: cosine.into() }).collect();
            return print_json(&Found { text: &text, images_searched: images.paths.len(), results });
        }
        let mut table = Table::new(["image", "cosine"]);
        for (image, cosine) in found {
            table.row([path_text(image), format!("{cosine:.3}")]);
        }
        let heading = format!("{}   ({} images)", printable(&text), images.paths.len());
        print(format!("{heading}\n\n{table}").trim_end())
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
