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

    /// The rows whose mean, a weighted one with [`Pooling::Attention`], is the pooled state; none if the sample has no such.
    pub(crate) fn pooled(&self, pooling: Pooling) -> Range<usize> {
        let Range { start, end } = self.rows;
        match pooling {
            Pooling::All | Pooling::Attention => start..end,
            Pooling::Question => {
                let last = self.parts.iter().rfind(|(part, _)| *part == Part::Question);
                last.map_or(end..end, |(_, rows)| rows.clone())
            }
            Pooling::Last => start.max(end.saturating_sub(1))..end,
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
        assert_eq!(Layout::new(Order::QuestionVisualQuestion, 10, 4, 3).rows(), 10..20);
    }

    #[test]
    fn what_is_pooled_is_what_the_name_says() {
        let pooled = |order, visual, pooling| Layout::new(order, 5, visual, 3).pooled(pooling);
        assert_eq!(pooled(Order::QuestionVisual, 4, Pooling::All), 5..12);
        assert_eq!(pooled(Order::QuestionVisual, 4, Pooling::Attention), 5..12);
        assert_eq!(pooled(Order::QuestionVisual, 4, Pooling::Question), 5..8);
        assert_eq!(pooled(Order::QuestionVisual, 4, Pooling::Last), 11..12);
        assert_eq!(pooled(Order::QuestionVisualQuestion, 4, Pooling::Question), 12..15);
        assert_eq!(pooled(Order::QuestionVisualQuestion, 0, Pooling::Question), 8..11);
        assert!(Layout::new(Order::VisualQuestion, 5, 4, 0).pooled(Pooling::Question).is_empty());
        for pooling in [Pooling::All, Pooling::Attention, Pooling::Question, Pooling::Last] {
            for start in [0, 5] {
                assert!(Layout::new(Order::QuestionVisualQuestion, start, 0, 0).pooled(pooling).is_empty());
            }
        }
    }
}
