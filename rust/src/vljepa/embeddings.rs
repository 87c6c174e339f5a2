//! What needs no training for its task: find an image by a text, and tell classes apart by their names.
//!
//! Letters: N images, L labels, D width of the pooled state, E embedding width.

use std::path::{Path, PathBuf};

use rayon::prelude::*;

use super::{Confusion, Image, Mamba3Jepa, Progress};
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

/// N image files, their predicted embeddings and the states that these are read from.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ImageEmbeddings {
    /// The files.
    pub paths: Vec<PathBuf>,
    /// (N, E), of unit length.
    pub embeddings: Vec<f32>,
    /// (N, D), for the confusion monitor.
    pub pooled: Vec<f32>,
}

/// An image that a search found; see [`Mamba3Jepa::search`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Found<'n> {
    /// The file.
    pub path: &'n Path,
    /// Cosine of its predicted embedding with the target embedding of the text.
    pub cosine: f32,
    /// How confused the model is by what it was asked about the image; `None` without recursion.
    pub confusion: Option<Confusion>,
}

/// An image with its labels; see [`Mamba3Jepa::classify`].
#[derive(Clone, Debug, PartialEq)]
pub struct Classified<'n> {
    /// The file.
    pub path: &'n Path,
    /// Every label with its probability, most probable first.
    pub labels: Vec<(String, f32)>,
    /// How confused the model is by what it was asked about the image; `None` without recursion.
    pub confusion: Option<Confusion>,
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
                for observation in observed {
                    found.embeddings.extend(observation.embedding);
                    found.pooled.extend(observation.pooled);
                }
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

    /// The `top` images whose predicted embeddings are nearest to the target embedding of `text`, nearest first. The images
    /// should have been asked the model's prompt. Confusion moves no image, so that it is judged of these only.
    ///
    /// ```no_run
    /// use kore_vljepa::vljepa::{Mamba3Jepa, OnBadImage};
    ///
    /// # fn main() -> Result<(), kore_vljepa::Error> {
    /// let model = Mamba3Jepa::from_dir("weights/")?;
    /// let images = model.embed_images(&["a.png", "b.png"], None, OnBadImage::Stop, &mut |_, _| {})?;
    /// for found in model.search("a red circle", &images, 5)? {
    ///     let doubt = if found.confusion.is_some_and(|confusion| confusion.is_confused()) { "  not sure" } else { "" };
    ///     println!("{:.3}  {}{doubt}", found.cosine, found.path.display());
    /// }
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`Error::Input`]: an empty text, or images with embeddings or states of another model. [`Error::NotFinite`]: the
    /// weights are damaged.
    pub fn search<'n>(&self, text: &str, images: &'n ImageEmbeddings, top: usize) -> Result<Vec<Found<'n>>, Error> {
        self.check_widths(images)?;
        let (nearest, confusions) = self.pool.install(|| {
            let query = self.read_texts(&[text], &mut |_, _| {})?.concat();
            let nearest = nearest(&query, &images.embeddings, top);
            let confusions = self.confusions(images, nearest.iter().map(|&(place, _)| place))?;
            Ok::<_, Error>((nearest, confusions))
        })?;
        let found = nearest.into_iter().zip(confusions);
        Ok(found.map(|((place, cosine), confusion)| Found { path: &images.paths[place], cosine, confusion }).collect())
    }

    /// How confused the model is by what it was asked about these images. On the current pool.
    fn confusions(
        &self,
        images: &ImageEmbeddings,
        places: impl Iterator<Item = usize>,
    ) -> Result<Vec<Option<Confusion>>, Error> {
        let (width, state) = (self.config().embed_dim, self.config().predictor.d_model());
        let (embeddings, pooled): (Vec<&[f32]>, Vec<&[f32]>) =
            places.map(|i| (&images.embeddings[i * width..][..width], &images.pooled[i * state..][..state])).unzip();
        self.judge(&embeddings, &pooled)
    }

    /// Each image with every label and its probability: a softmax over the labels of cosine / `temperature`. In `template`,
    /// `{}` stands for the label; [`Mamba3Jepa::class_defaults`] has both.
    ///
    /// # Errors
    /// [`Error::Input`]: fewer than two different labels, an empty one, a temperature that is not finite and above 0, a
    /// template without one `{}`, or images with embeddings or states of another model. [`Error::NotFinite`]: the weights
    /// are damaged.
    pub fn classify<'n>(
        &self,
        images: &'n ImageEmbeddings,
        labels: &[impl AsRef<str>],
        template: &str,
        temperature: f32,
    ) -> Result<Vec<Classified<'n>>, Error> {
        self.check_widths(images)?;
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
        let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
        let (gallery, confusions) = self.pool.install(|| {
            let gallery = self.read_texts(&texts, &mut |_, _| {})?.concat();
            Ok::<_, Error>((gallery, self.confusions(images, 0..images.paths.len())?))
        })?;
        let embeddings = images.embeddings.chunks_exact(self.config().embed_dim);
        let classified = images.paths.iter().zip(embeddings).zip(confusions).map(|((path, embedding), confusion)| {
            let shares = shares(&cosines(embedding, &gallery), temperature);
            let mut ranked: Vec<(String, f32)> = labels.iter().map(|&label| label.to_owned()).zip(shares).collect();
            ranked.sort_by(|(_, a), (_, b)| b.total_cmp(a));
            Classified { path, labels: ranked, confusion }
        });
        Ok(classified.collect())
    }

    fn check_widths(&self, images: &ImageEmbeddings) -> Result<(), Error> {
        let (count, state) = (images.paths.len(), self.config().predictor.d_model());
        for (what, numbers, width) in
            [("embedding", &images.embeddings, self.config().embed_dim), ("state", &images.pooled, state)]
        {
            if count == 0 || count.checked_mul(width) != Some(numbers.len()) {
                return Err(Error::Input(format!(
                    "{count} images with {} numbers of {what}s: expected at least one, and {width} numbers each",
                    numbers.len()
                )));
            }
            if !numbers.iter().all(|x| x.is_finite()) {
                return Err(Error::Input(format!("the {what} of an image has a number that is not finite")));
            }
        }
        Ok(())
    }
}
