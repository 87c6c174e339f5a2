//! What `classify` and `search` print of a model's confusion by images.

use kore_vljepa::vljepa::{Confusion, Signal};
use serde::Serialize;

/// The keys of one image, as JSON has them.
#[derive(Serialize)]
pub(crate) struct Judged {
    confusion: Option<f64>,
    confused: Option<bool>,
    signal: Option<Signal>,
}

impl From<Option<Confusion>> for Judged {
    fn from(confusion: Option<Confusion>) -> Judged {
        Judged {
            confusion: confusion.map(|confusion| confusion.score.into()),
            confused: confusion.map(|confusion| confusion.is_confused()),
            signal: confusion.and_then(|confusion| confusion.signal()),
        }
    }
}

/// The cell of one image in a table.
pub(crate) fn confusion_cell(confusion: Option<Confusion>) -> String {
    confusion.map_or_else(String::new, |confusion| {
        format!("{}{:.3}", if confusion.is_confused() { "not sure " } else { "" }, confusion.score)
    })
}

/// A line about all images in a table; `None` without recursion.
pub(crate) fn confusion_line(confusions: impl IntoIterator<Item = Option<Confusion>>) -> Option<String> {
    let known: Vec<Confusion> = confusions.into_iter().flatten().collect();
    let threshold = known.first()?.threshold;
    let count = known.iter().filter(|confusion| confusion.is_confused()).count();
    Some(format!("confused about {count} of the {} shown (confusion over the threshold {threshold:.3})", known.len()))
}
