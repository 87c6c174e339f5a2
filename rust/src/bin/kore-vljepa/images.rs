//! Which image files a command is about.

use std::fs;
use std::path::{Path, PathBuf};

use clap::ArgAction;
use kore_vljepa::image::IMAGE_SUFFIXES;
use kore_vljepa::vljepa::{ImageEmbeddings, Mamba3Jepa, OnBadImage, Options};

use crate::args::at_least_one;
use crate::output::{Failure, failure, progress, shown, without_dots};

/// Which images.
#[derive(clap::Args)]
pub(crate) struct ImageArgs {
    /// Image files.
    #[arg(long, value_name = "PATH", num_args = 0.., action = ArgAction::Set)]
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
        Ok(Mamba3Jepa::options().batch_size(at_least_one("batch-size", self.batch_size)?))
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
            let inside = images_under(folder);
            if inside.is_empty() {
                return Err(failure(format!("--image-dir {name}: no image in it ({})", IMAGE_SUFFIXES.join(", "))));
            }
            found.extend(inside);
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

/// Every image file in a folder and in those under it that is not hidden, sorted by path. Links to folders are not
/// followed, and folders that cannot be read are passed over.
fn images_under(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut folders = vec![folder.to_path_buf()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
            let path = entry.path();
            if entry.file_name().as_encoded_bytes().starts_with(b".") {
                continue;
            }
            match entry.file_type() {
                Ok(kind) if kind.is_dir() => folders.push(path),
                Ok(_) if is_image(&path) && !path.is_dir() => found.push(without_dots(&path)),
                _ => {}
            }
        }
    }
    found.sort();
    found
}

fn is_image(path: &Path) -> bool {
    let suffix = path.extension().map(|suffix| format!(".{}", suffix.to_string_lossy().to_lowercase()));
    suffix.is_some_and(|suffix| IMAGE_SUFFIXES.contains(&suffix.as_str()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_are_found_under_folders_and_sorted() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path();
        fs::create_dir_all(root.join("b/deep.png")).unwrap();
        fs::create_dir(root.join(".hidden")).unwrap();
        let shown = ["c.png", "b/z.JPG", "b/a.webp", "b/notes.txt", "b-a.jpeg", "b/deep.png/x.png", "d.jfif", "e.GIF"];
        for name in shown.into_iter().chain([".png", "b/._a.webp", ".hidden/a.png"]) {
            fs::write(root.join(name), "").unwrap();
        }
        let expected = ["b/a.webp", "b/deep.png/x.png", "b/z.JPG", "b-a.jpeg", "c.png", "d.jfif", "e.GIF"];
        assert_eq!(images_under(root), expected.map(|name| root.join(name)));
    }
}
