//! What the model is asked, and what it makes of it.

use std::path::Path;

use crate::image::Picture;

/// An image to look at.
#[derive(Clone, Copy, Debug)]
pub enum Image<'a> {
    /// A file: PNG, JPEG, WebP, GIF or BMP.
    File(&'a Path),
    /// A decoded picture.
    Picture(&'a Picture),
}

impl Image<'_> {
    /// Whether both are one file, or one picture in memory: then its visual tokens are computed once.
    pub(super) fn is_same(self, other: Image<'_>) -> bool {
        match (self, other) {
            (Image::File(a), Image::File(b)) => a == b,
            (Image::Picture(a), Image::Picture(b)) => std::ptr::eq(a, b),
            _ => false,
        }
    }
}

/// One question about an image, about no image, or an image with no question.
///
/// ```
/// use kore_vljepa::vljepa::Sample;
///
/// let with_both = Sample::file("photo.jpg").asking("What color is the circle?");
/// let described = Sample::file("photo.jpg"); // asked the model's prompt, such as "Describe the image."
/// let without_image = Sample::question("What color is the sky?");
/// # let _ = (with_both, described, without_image);
/// ```
#[derive(Clone, Copy, Debug, Default)]
pub struct Sample<'a> {
    /// What to look at, if anything.
    pub image: Option<Image<'a>>,
    /// What to ask; `None`: the model's own prompt.
    pub question: Option<&'a str>,
}

impl<'a> Sample<'a> {
    /// The image in a file.
    pub fn file(path: &'a (impl AsRef<Path> + ?Sized)) -> Sample<'a> {
        Sample { image: Some(Image::File(path.as_ref())), question: None }
    }

    /// An image in memory.
    pub fn picture(picture: &'a Picture) -> Sample<'a> {
        Sample { image: Some(Image::Picture(picture)), question: None }
    }

    /// A question without image.
    pub fn question(question: &'a str) -> Sample<'a> {
        Sample { image: None, question: Some(question) }
    }

    /// The same image with this question.
    #[must_use]
    pub fn asking(self, question: &'a str) -> Sample<'a> {
        Sample { question: Some(question), ..self }
    }
}

/// What the predictor makes of a sample.
#[derive(Clone, Debug, PartialEq)]
pub struct Observation {
    /// The predicted embedding of the answer, (E,), of unit length.
    pub embedding: Vec<f32>,
    /// The pooled state it was read from, (D,).
    pub pooled: Vec<f32>,
    /// What the picture looks like, (4 V,); see [`picture_key`](crate::episodes::picture_key).
    pub picture: Vec<f32>,
}
