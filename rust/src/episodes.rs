//! How near an episode of a memory, a picture and a question seen before, is to what is asked now.
//!
//! Letters: P episodes, D width of the pooled state, E embedding width.

use crate::error::{Error, LoadError};
use crate::loader::Fields;
use crate::nearest::cosines;
use crate::pooling::demand_finite;

/// The floor that no score reaches: the model has learned to recall no episode.
const SHUT: f32 = 2.0;

/// Finds episodes by the pooled state, which depends on picture and question, and by the question alone.
pub struct EpisodeFinder {
    /// How much the pooled states count, in [0, 1]; the rest is the questions'.
    pub blend: f32,
    /// The nearest episode is recalled if its score is at least this; at 2 none is.
    pub floor: f32,
    /// Taken from pooled states before they are compared, (D).
    state_mean: Vec<f32>,
}

impl EpisodeFinder {
    /// Reads the tensors of a recursion with pooled states of `width`.
    pub(crate) fn read(fields: &mut Fields<'_>, width: usize) -> Result<EpisodeFinder, LoadError> {
        Ok(EpisodeFinder {
            blend: fields.scalar("episode_blend", "a finite number", f32::is_finite)?,
            floor: fields.scalar("episode_floor", "a finite number", f32::is_finite)?,
            state_mean: fields.vector("state_mean", &[width])?,
        })
    }

    /// Whether an episode can be near enough: none is where validation had nothing to learn from.
    pub fn recalls(&self) -> bool {
        self.floor < SHUT
    }

    /// blend * cos(pooled - mean, state - mean) + (1 - blend) * cos(asked, question) with each of P episodes: (P).
    ///
    /// `pooled`: (D); `asked`: (E), the question by the Y-Encoder; `states`: (P, D) and `questions`: (P, E) of the episodes.
    ///
    /// # Errors
    /// [`Error::Input`] if a length does not fit; [`Error::NotFinite`] if a score is not finite.
    pub fn scores(&self, pooled: &[f32], asked: &[f32], states: &[f32], questions: &[f32]) -> Result<Vec<f32>, Error> {
        let width = self.state_mean.len();
        let episodes = states.len() / width.max(1);
        if pooled.len() != width || states.len() != episodes * width || questions.len() != episodes * asked.len() {
            return Err(Error::Input(format!(
                "a pooled state of length {} and a question of {}, but {} and {} numbers of episodes: expected {width}",
                pooled.len(),
                asked.len(),
                states.len(),
                questions.len()
            )));
        }
        let centred = |state: &[f32]| state.iter().zip(&self.state_mean).map(|(x, mean)| x - mean).collect::<Vec<_>>();
        let states = states.chunks_exact(width.max(1)).map(centred).collect::<Vec<_>>().concat();
        let seen = cosines(&centred(pooled), &states);
        let said = cosines(asked, questions);
        let scores: Vec<f32> =
            seen.iter().zip(said).map(|(seen, said)| self.blend * seen + (1.0 - self.blend) * said).collect();
        demand_finite(&scores, "the score of an episode")?;
        Ok(scores)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::loader::Weights;
    use crate::recursion::Recursion;
    use crate::testing::TinyModel;

    #[test]
    fn the_score_is_its_formula() {
        let finder = EpisodeFinder { blend: 0.25, floor: 0.5, state_mean: vec![1.0, 0.0, -1.0] };
        // 3 - 1, 4, -1 + 1: along (1, 2, 0) / sqrt 5; the episodes are at (0, 1, 0) and (2, 0, 0)
        let scores =
            finder.scores(&[3.0, 4.0, -1.0], &[0.6, 0.8], &[1.0, 5.0, -1.0, 3.0, 0.0, -1.0], &[0.0, 1.0, 1.0, 0.0]);
        let root = 5.0_f32.sqrt();
        let expected = [0.25 * 2.0 / root + 0.75 * 0.8, 0.25 / root + 0.75 * 0.6];
        assert!(scores.unwrap().iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-6));
        assert!(finder.scores(&[0.0; 3], &[1.0], &[], &[]).unwrap().is_empty());
        for (pooled, states) in [(&[0.0; 2][..], &[0.0; 3][..]), (&[0.0; 3], &[0.0; 4]), (&[0.0; 3], &[0.0; 6])] {
            assert!(matches!(finder.scores(pooled, &[1.0], states, &[1.0]), Err(Error::Input(_))));
        }
        assert!(matches!(finder.scores(&[f32::NAN; 3], &[1.0], &[1.0; 3], &[1.0]), Err(Error::NotFinite(_))));
    }

    #[test]
    fn it_is_read_where_the_configuration_has_it() {
        let read = |model: &TinyModel, floor: f32| {
            let bytes = model.component_with("recursion", |key, numbers| {
                if key == "recursion.episode_floor" {
                    numbers[0] = floor;
                }
            });
            Recursion::from_weights(&Weights::from_bytes("recursion", &bytes).unwrap())
        };
        assert!(read(&TinyModel::new(), 0.0).unwrap().episodes.is_none());
        let model = TinyModel::new().recursion("episodes", true);
        let finder = read(&model, 0.75).unwrap().episodes.unwrap();
        assert_eq!((finder.blend, finder.floor, finder.recalls(), finder.state_mean.len()), (0.5, 0.75, true, 32));
        assert!(!read(&model, 2.0).unwrap().episodes.unwrap().recalls());
        let error = read(&model, f32::INFINITY).err().unwrap().to_string();
        assert!(error.contains("recursion.episode_floor: inf, expected a finite number"), "{error}");
    }
}
