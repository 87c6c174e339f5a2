//! `kore-vljepa classify`: labels for images.

use kore_vljepa::files::path_text;
use kore_vljepa::texts::number_text;
use kore_vljepa::vljepa::Classified;
use serde::Serialize;

use crate::args::{ModelArgs, at_least_one, texts_or_file};
use crate::confusion::{Judged, confusion_cell, confusion_line};
use crate::images::ImageArgs;
use crate::output::{Failure, Table, failure, print, print_json};

/// Choose among labels for images, without training for them (zero-shot).
#[derive(clap::Args)]
pub(crate) struct Classify {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    images: ImageArgs,
    /// Labels, or one text file with a label a line.
    #[arg(long, value_name = "TEXT", num_args = 0.., required = true, allow_negative_numbers = true)]
    labels: Vec<String>,
    /// The text that stands for a label, such as "a photo of a {}"; default: the model's, which is {}.
    #[arg(long, value_name = "STR")]
    template: Option<String>,
    /// The question that the labels answer; default: the prompt for describing an image.
    #[arg(long, value_name = "TEXT", allow_negative_numbers = true)]
    question: Option<String>,
    /// Cosines are divided by it before they become probabilities; the order does not depend on it. Default: the
    /// model's, which is 0.07.
    #[arg(long, value_name = "FLOAT", allow_negative_numbers = true)]
    temperature: Option<f64>,
    /// Show this many labels for each image, best first.
    #[arg(long, value_name = "INT", default_value_t = 5, allow_negative_numbers = true)]
    top: i64,
    /// Print JSON.
    #[arg(long, overrides_with = "json")]
    json: bool,
}

#[derive(Serialize)]
struct Labelled<'a> {
    image: String,
    labels: Vec<Share<'a>>,
    threshold: Option<f64>,
    #[serde(flatten)]
    judged: Judged,
}

#[derive(Serialize)]
struct Share<'a> {
    label: &'a str,
    probability: f64,
}

impl Classify {
    pub(crate) fn run(&self) -> Result<(), Failure> {
        let top = self.check()?;
        let options = self.images.options()?;
        let labels = texts_or_file(&self.labels, "label", "labels")?;
        let paths = self.images.find()?;
        let model = self.model.open_with(options)?;
        let images = self.images.embed(&model, &paths, self.question.as_deref())?;
        let (temperature, template) = model.class_defaults();
        let temperature = self.temperature.map_or(temperature, |given| given as f32);
        let template = self.template.as_deref().unwrap_or(template);
        let mut classified = model.classify(&images, &labels, template, temperature)?;
        classified.iter_mut().for_each(|image| image.labels.truncate(top));
        if self.json {
            return print_json(&classified.iter().map(labelled).collect::<Vec<_>>());
        }
        print(&shown(&classified))
    }

    /// Refuses impossible settings; returns how many labels to show.
    fn check(&self) -> Result<usize, Failure> {
        let top = at_least_one("top", self.top)?;
        if let Some(given) = self.temperature {
            let wrong = |rule: &str| Err(failure(format!("--temperature {}: {rule}", number_text(given))));
            let is_positive = |x: f64| x > 0.0 && x.is_finite();
            if !is_positive(given) {
                return wrong("must be finite and greater than 0");
            }
            if !is_positive((given as f32).into()) {
                return wrong("must be finite and greater than 0, in float32"); // it divides float32 cosines
            }
        }
        if let Some(template) = self.template.as_deref().filter(|given| given.matches("{}").count() != 1) {
            return Err(failure(format!("--template {template:?}: must contain {{}} once, where the label goes")));
        }
        Ok(top)
    }
}

fn labelled<'a>(image: &'a Classified<'_>) -> Labelled<'a> {
    Labelled {
        image: path_text(image.path),
        labels: image.labels.iter().map(|(label, share)| Share { label, probability: (*share).into() }).collect(),
        threshold: image.confusion.map(|confusion| confusion.threshold.into()),
        judged: image.confusion.into(),
    }
}

/// A row for each label, in which what is said of the image stands beside the best; and a line about all images.
fn shown(classified: &[Classified<'_>]) -> String {
    let line = confusion_line(classified.iter().map(|image| image.confusion));
    let columns = if line.is_some() { 4 } else { 3 };
    let mut table = Table::new(["image", "label", "probability", "confusion"].into_iter().take(columns));
    for image in classified {
        let (mut path, mut doubt) = (path_text(image.path), confusion_cell(image.confusion));
        for (label, probability) in &image.labels {
            let row =
                [std::mem::take(&mut path), label.clone(), format!("{probability:.3}"), std::mem::take(&mut doubt)];
            table.row(row.into_iter().take(columns));
        }
    }
    format!("{table}\n{}", line.unwrap_or_default()).trim_end().to_owned()
}
