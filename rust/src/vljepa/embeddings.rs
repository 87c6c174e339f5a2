//! What needs no training for its task: find an image by a text, and tell classes apart by their names.
//!
//! Letters: N images, L labels, E embedding width.

use std::path::{Path, PathBuf};

use rayon::prelude::*;

use super::{Image, Mamba3Jepa, Progress};
use crate::error::Error;
use crate::nearest::{cosines, nearest, shares};
use crate::texts::{distinct, strip};

/// What to do with an image that cannot be read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnBadImage {
    /// Stop with its error.
    #[default]
    Stop,
    /// Leave it out, and say so.
    Skip,
}

/// N image files and their predicted embeddings.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ImageEmbeddings {
    /// The files.
    pub paths: Vec<PathBuf>,
    /// (N, E), of unit length.
    pub embeddings: Vec<f32>,
}

impl Mamba3Jepa {
    /// Predicted embeddings of image files, all asked the same question; `None`: the model's prompt.
    ///
    /// # Errors
    /// [`Error::Image`]: an image cannot be read. [`Error::Input`]: an empty question, no image, or, with
    /// [`OnBadImage::Skip`], none that can be read. [`Error::Absent`]: the model has no X-Encoder. [`Error::NotFinite`]:
    /// the weights are damaged.
    pub fn embed_images(
        &self,
        paths: &[impl AsRef<Path> + Sync],
        question: Option<&str>,
        on_bad: OnBadImage,
        progress: Progress<'_>,
    ) -> Result<ImageEmbeddings, Error> {
        let paths: Vec<&Path> = paths.iter().map(AsRef::as_ref).collect();
        self.pool.install(|| self.look_at_files(&paths, question, on_bad, progress))
    }

    fn look_at_files(
        &self,
        paths: &[&Path],
        question: Option<&str>,
        on_bad: OnBadImage,
        progress: Progress<'_>,
    ) -> Result<ImageEmbeddings, Error> {
        let encoder = self.demand_x_encoder()?;
        let question = question.unwrap_or(&self.config().query_prompt);
        let ids = self.encode(&[question], self.config().max_query_tokens, "question")?;
        let mut found = ImageEmbeddings::default();
        let (mut bad, mut done, total) = (Vec::new(), 0, paths.len());
        for paths in paths.chunks(self.batch_size) {
            let pixels: Vec<Result<Vec<f32>, Error>> =
                paths.par_iter().map(|path| self.pixels(Image::File(path))).collect();
            let mut visual = Vec::with_capacity(paths.len());
            for (path, pixels) in paths.iter().zip(pixels) {
                match pixels {
                    Ok(pixels) => {
                        visual.push(self.see(encoder, &pixels)?);
                        found.paths.push(path.to_path_buf());
                    }
                    Err(error) if on_bad == OnBadImage::Skip => bad.push(error),
                    Err(error) => return Err(error),
                }
            }
            let visual: Vec<Option<&[f32]>> = visual.iter().map(|tokens| Some(tokens.as_slice())).collect();
            if !visual.is_empty() {
                let observed = self.predict(&visual, &vec![ids[0].clone(); visual.len()])?;
                found.embeddings.extend(observed.into_iter().flat_map(|observation| observation.embedding));
            }
            done += paths.len();
            progress(done, total);
        }
        if let Some(first) = bad.first() {
            self.warn(&format!("{} of {total} images left out, the first: {first}", bad.len()));
        }
        if found.paths.is_empty() {
            let why = if bad.is_empty() { "no images: give at least one" } else { "none of the images can be read" };
            return Err(Error::Input(why.into()));
        }
        Ok(found)
    }

    /// The `top` images whose predicted embeddings are nearest to the target embedding of `text`, with their cosines,
    /// nearest first. The images should have been asked the model's prompt.
    ///
    /// ```no_run
    /// use kore_vljepa::vljepa::{Mamba3Jepa, OnBadImage};
    ///
    /// # fn main() -> Result<(), kore_vljepa::Error> {
    /// let model = Mamba3Jepa::from_dir("weights/")?;
    /// let images = model.embed_images(&["a.png", "b.png"], None, OnBadImage::Stop, &mut |_, _| {})?;
    /// for (path, cosine) in model.search("a red circle", &images, 5)? {
    ///     println!("{cosine:.3}  {}", path.display());
    /// }
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`Error::Input`]: an empty text, or images with embeddings of another model. [`Error::NotFinite`]: the weights are
    /// damaged.
    pub fn search<'n>(
        &self,
        text: &str,
        images: &'n ImageEmbeddings,
        top: usize,
    ) -> Result<Vec<(&'n Path, f32)>, Error> {
        self.check_width(images)?;
        let query = self.embed_text(&[text])?.concat();
        let found = nearest(&query, &images.embeddings, top);
        Ok(found.into_iter().map(|(place, cosine)| (images.paths[place].as_path(), cosine)).collect())
    }

    /// For each image every label with its probability, most probable first: a softmax over the labels of
    /// cosine / `temperature`. In `template`, `{}` stands for the label; [`Mamba3Jepa::class_defaults`] has both.
    ///
    /// # Errors
    /// [`Error::Input`]: fewer than two different labels, an empty one, a temperature that is not finite and above 0, a
    /// template without one `{}`, or images with embeddings of another model. [`Error::NotFinite`]: the weights are
    /// damaged.
    pub fn classify(
        &self,
        images: &ImageEmbeddings,
        labels: &[impl AsRef<str>],
        template: &str,
        temperature: f32,
    ) -> Result<Vec<Vec<(String, f32)>>, Error> {
        self.check_width(images)?;
        let labels = distinct(labels.iter().map(|label| strip(label.as_ref())));
        if labels.len() < 2 || labels.contains(&"") {
            return Err(Error::Input(format!(
                "expected at least two different labels, none of them empty, found {labels:?}"
            )));
        }
        if !(temperature > 0.0 && temperature.is_finite()) {
            return Err(Error::Input(format!("temperature is {temperature:?}, it must be finite and above 0")));
        }
        if template.matches("{}").count() != 1 {
            return Err(Error::Input(format!(
                "the template is {template:?}, it must contain {{}} once, for the label"
            )));
        }
        let texts: Vec<String> = labels.iter().map(|label| template.replace("{}", label)).collect();
        let gallery = self.embed_text(&texts)?.concat();
        let ranked = images.embeddings.chunks_exact(self.config().embed_dim).map(|embedding| {
            let shares = shares(&cosines(embedding, &gallery), temperature);
            let mut ranked: Vec<(String, f32)> = labels.iter().map(|&label| label.to_owned()).zip(shares).collect();
            ranked.sort_by(|(_, a), (_, b)| b.total_cmp(a));
            ranked
        });
        Ok(ranked.collect())
    }

    fn check_width(&self, images: &ImageEmbeddings) -> Result<(), Error> {
        let width = self.config().embed_dim;
        if images.paths.is_empty() || images.paths.len().checked_mul(width) != Some(images.embeddings.len()) {
            return Err(Error::Input(format!(
                "{} images with {} numbers: expected at least one, and {width} numbers each",
                images.paths.len(),
                images.embeddings.len()
            )));
        }
        if !images.embeddings.iter().all(|x| x.is_finite()) {
            return Err(Error::Input("an embedding of an image has a number that is not finite".into()));
        }
        Ok(())
    }
}
