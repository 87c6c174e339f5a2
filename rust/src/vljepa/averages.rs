//! The moving averages of confusion that an `Answerer` keeps.

use std::collections::HashMap;

/// Questions whose average is kept, so that an answerer which serves for ever stays as large as it is; in Python too.
const KEPT: usize = 1024;

/// The moving average of each question's confusion; of more than `KEPT` questions, those that were asked last.
#[derive(Clone, Default)]
pub(super) struct Averages {
    by_question: HashMap<String, (u64, f32)>, // when it was asked, and the average
    turns: u64,
}

impl Averages {
    pub(super) fn get(&self, question: &str) -> Option<f32> {
        self.by_question.get(question).map(|&(_, average)| average)
    }

    pub(super) fn set(&mut self, question: &str, average: f32) {
        self.turns += 1;
        self.by_question.insert(question.to_owned(), (self.turns, average));
        if self.by_question.len() > KEPT {
            let first = self.by_question.values().map(|&(turn, _)| turn).min();
            self.by_question.retain(|_, &mut (turn, _)| Some(turn) != first);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn those_asked_longest_ago_are_forgotten() {
        let mut averages = Averages::default();
        for i in 0..KEPT {
            averages.set(&i.to_string(), 0.5);
        }
        averages.set("0", 0.25); // asked again: now it is the last
        averages.set("new", 0.75);
        assert_eq!(averages.by_question.len(), KEPT);
        assert_eq!((averages.get("0"), averages.get("1"), averages.get("2")), (Some(0.25), None, Some(0.5)));
        assert_eq!(averages.get("new"), Some(0.75));
    }
}
