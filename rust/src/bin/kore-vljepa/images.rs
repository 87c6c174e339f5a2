//! Which image files a command is about.

use std::path::PathBuf;

use kore_vljepa::image::IMAGE_SUFFIXES;
use kore_vljepa::vljepa::{ImageEmbeddings, Mamba3Jepa, OnBadImage, Options};

use crate::args::at_least_one_and_at_most;
use crate::output::{Failure, failure, print_warning, progress, shown, without_dots};
use crate::survey::Survey;

/// More images at once than are of use; they take memory.
const MAX_BATCH: usize = 1 << 16;

/// Which images.
#[derive(clap::Args)]
pub(crate) struct ImageArgs {
    /// Image files.
    #[arg(long, value_name = "PATH", num_args = 0..)]
    pub(crate) images: Vec<PathBuf>,
    /// A folder; every image in it and in the folders under it is taken.
    #[arg(long, value_name = "PATH")]
    image_dir: Option<PathBuf>,
    /// Images computed at once.
    #[arg(long, value_name = "INT", default_value_t = 32, allow_negative_numbers = true)]
    batch_size: i64,
    /// An unreadable image is an error, or is left out with a warning.
    #[arg(long, value_enum, default_value = "error")]
    on_bad_sample: OnBadSample,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum OnBadSample {
    Error,
    Skip,
}

impl ImageArgs {
    /// How a model is opened for these images; refuses impossible settings.
    pub(crate) fn options(&self) -> Result<Options, Failure> {
        Ok(Mamba3Jepa::options().batch_size(at_least_one_and_at_most("batch-size", self.batch_size, MAX_BATCH)?))
    }

    /// Whether any image is asked for.
    pub(crate) fn are_given(&self) -> bool {
        !self.images.is_empty() || self.image_dir.is_some()
    }

    /// The given files, then every image under the folder, sorted by path; an error if there is none.
    pub(crate) fn find(&self) -> Result<Vec<PathBuf>, Failure> {
        let mut found: Vec<PathBuf> = self.images.iter().map(|path| without_dots(path)).collect();
        if let Some(folder) = &self.image_dir {
            let name = shown(folder);
            if !folder.is_dir() {
                return Err(failure(format!("--image-dir {name}: there is no such folder")));
            }
            let inside = Survey::of(folder)?;
            let unread = inside.unread();
            if inside.images.is_empty() {
                let seen = if unread.is_empty() { unread } else { format!(", but {unread}") };
                return Err(failure(format!(
                    "--image-dir {name}: no image in it ({}){seen}",
                    IMAGE_SUFFIXES.join(", ")
                )));
            }
            if !unread.is_empty() {
                print_warning(&format!("{name}: not read: {unread}"));
            }
            found.extend(inside.images);
        }
        if found.is_empty() {
            return Err(failure("no images: give --images or --image-dir"));
        }
        Ok(found)
    }

    /// Predicted embeddings of `paths`, all asked the same question; `None`: the model's prompt.
    pub(crate) fn embed(
        &self,
        model: &Mamba3Jepa,
        paths: &[PathBuf],
        question: Option<&str>,
    ) -> Result<ImageEmbeddings, Failure> {
        let on_bad = match self.on_bad_sample {
            OnBadSample::Error => OnBadImage::Stop,
            OnBadSample::Skip => OnBadImage::Skip,
        };
        Ok(model.embed_images(paths, question, on_bad, &mut progress("images"))?)
    }
}
