//! Where the parts of a sample stand in its sequence, and which of its positions are pooled.

use std::ops::Range;

use crate::config::{Order, Part, Pooling};

/// The parts that a sample has, first to last, each with its rows among those of all samples.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Layout {
    /// The sample's own rows.
    rows: Range<usize>,
    parts: Vec<(Part, Range<usize>)>,
}

impl Layout {
    /// Of a sample of so many visual and question tokens, whose rows begin at `start`. A part of no tokens is none.
    pub(crate) fn new(order: Order, start: usize, visual: usize, question: usize) -> Layout {
        let mut end = start;
        let parts = order.parts().iter().map(|&part| {
            let begin = end;
            end += match part {
                Part::Visual => visual,
                Part::Question => question,
            };
            (part, begin..end)
        });
        let parts = parts.filter(|(_, rows)| !rows.is_empty()).collect();
        Layout { rows: start..end, parts }
    }

    /// The rows of the sample.
    pub(crate) fn rows(&self) -> Range<usize> {
        self.rows.clone()
    }

    /// The parts, first to last.
    pub(crate) fn parts(&self) -> &[(Part, Range<usize>)] {
        &self.parts
    }

    /// The spans of rows whose means, weighted ones with [`Pooling::Attention`], are averaged to the pooled state; none if
    /// the sample has no such rows.
    pub(crate) fn pooled(&self, pooling: Pooling) -> Vec<Range<usize>> {
        let Range { start, end } = self.rows;
        match pooling {
            Pooling::All | Pooling::Attention => Vec::from_iter((start < end).then_some(start..end)),
            Pooling::Parts => self.parts.iter().map(|(_, rows)| rows.clone()).collect(),
            Pooling::Question => {
                let last = self.parts.iter().rfind(|(part, _)| *part == Part::Question);
                last.map(|(_, rows)| rows.clone()).into_iter().collect()
            }
            Pooling::Last => Vec::from_iter((start < end).then(|| end - 1..end)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_stand_in_order_and_what_is_missing_leaves_no_gap() {
        use Part::{Question, Visual};
        let parts = |order, visual, question| Layout::new(order, 10, visual, question).parts;
        assert_eq!(parts(Order::VisualQuestion, 4, 3), [(Visual, 10..14), (Question, 14..17)]);
        assert_eq!(parts(Order::QuestionVisual, 4, 3), [(Question, 10..13), (Visual, 13..17)]);
        let twice = [(Question, 10..13), (Visual, 13..17), (Question, 17..20)];
        assert_eq!(parts(Order::QuestionVisualQuestion, 4, 3), twice);
        assert_eq!(parts(Order::QuestionVisualQuestion, 0, 3), [(Question, 10..13), (Question, 13..16)]);
        assert_eq!(parts(Order::VisualQuestionVisual, 0, 3), [(Question, 10..13)]);
        assert_eq!(Layout::new(Order::VisualQuestionVisual, 10, 4, 3).rows(), 10..21);
    }

    #[test]
    fn what_is_pooled_is_what_the_name_says() {
        let pooled = |order, visual, pooling| -> Vec<(usize, usize)> {
            let spans = Layout::new(order, 5, visual, 3).pooled(pooling);
            spans.into_iter().map(|span| (span.start, span.end)).collect()
        };
        assert_eq!(pooled(Order::QuestionVisual, 4, Pooling::All), [(5, 12)]);
        assert_eq!(pooled(Order::QuestionVisual, 4, Pooling::Attention), [(5, 12)]);
        assert_eq!(pooled(Order::QuestionVisual, 4, Pooling::Parts), [(5, 8), (8, 12)]);
        assert_eq!(pooled(Order::QuestionVisual, 4, Pooling::Question), [(5, 8)]);
        assert_eq!(pooled(Order::QuestionVisual, 4, Pooling::Last), [(11, 12)]);
        assert_eq!(pooled(Order::QuestionVisualQuestion, 4, Pooling::Question), [(12, 15)]);
        assert_eq!(pooled(Order::QuestionVisualQuestion, 0, Pooling::Parts), [(5, 8), (8, 11)]);
        assert_eq!(pooled(Order::VisualQuestionVisual, 4, Pooling::Question), [(9, 12)]);
        assert_eq!(pooled(Order::VisualQuestionVisual, 0, Pooling::Parts), [(5, 8)]);
        assert!(Layout::new(Order::VisualQuestion, 5, 4, 0).pooled(Pooling::Question).is_empty());
        for pooling in [Pooling::All, Pooling::Parts, Pooling::Attention, Pooling::Question, Pooling::Last] {
            assert!(Layout::new(Order::QuestionVisualQuestion, 5, 0, 0).pooled(pooling).is_empty());
        }
    }
}
