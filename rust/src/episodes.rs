//! How near an episode of a memory, a picture and a question seen before, is to what is asked now.
//!
//! Letters: P episodes, N visual tokens, V vision width, S length of the key, E embedding width.

use crate::config::{EpisodeKey, Mamba3JepaConfig};
use crate::error::{Error, LoadError};
use crate::loader::Fields;
use crate::nearest::cosines;
use crate::pooling::demand_finite;
use crate::vljepa::Observation;

/// The floor that no score reaches: the model has learned to recall no episode.
const SHUT: f32 = 2.0;

/// A picture is known by its quarters.
pub(crate) const PICTURE_CELLS: usize = 4;

/// What pictures look like, be they dark or pale: of N visual tokens (N, V) of a square picture, row by row, the mean of
/// each quarter, less the mean of the four, a quarter after the other, row by row: (4 V). Of an odd number of rows the
/// middle one is in both halves, and so with columns. Zeros where there is no picture, or its grid is not square.
pub fn picture_key(tokens: Option<&[f32]>, width: usize) -> Vec<f32> {
    let tokens = tokens.unwrap_or_default();
    let side = (tokens.len() / width.max(1)).isqrt();
    let mut key = vec![0.0; PICTURE_CELLS * width];
    if side == 0 || tokens.len() != side * side * width {
        return key;
    }
    let halves = [0..side.div_ceil(2), side / 2..side];
    for (cell, quarter) in key.chunks_mut(width).enumerate() {
        let (rows, columns) = (&halves[cell / 2], &halves[cell % 2]);
        for row in rows.clone() {
            for token in tokens[(row * side + columns.start) * width..].chunks(width).take(columns.len()) {
                quarter.iter_mut().zip(token).for_each(|(sum, x)| *sum += x);
            }
        }
        let count = (rows.len() * columns.len()) as f32;
        quarter.iter_mut().for_each(|sum| *sum /= count);
    }
    for place in 0..width {
        let mean = (0..PICTURE_CELLS).map(|cell| key[cell * width + place]).sum::<f32>() / PICTURE_CELLS as f32;
        (0..PICTURE_CELLS).for_each(|cell| key[cell * width + place] -= mean);
    }
    key
}

/// Finds episodes by what is seen, and by the question.
pub struct EpisodeFinder {
    /// How much what is seen counts, in [0, 1]; the rest is the questions'.
    pub blend: f32,
    /// The nearest episode is recalled if its score is at least this; at 2 none is.
    pub floor: f32,
    /// Taken from what is seen before it is compared, (S).
    mean: Vec<f32>,
    key: EpisodeKey,
}

impl EpisodeFinder {
    pub(crate) fn read(fields: &mut Fields<'_>, config: &Mamba3JepaConfig) -> Result<EpisodeFinder, LoadError> {
        let key = config.recursion.episode_key;
        let mean = match key {
            EpisodeKey::State => "state_mean",
            EpisodeKey::Picture => "picture_mean",
        };
        Ok(EpisodeFinder {
            blend: fields.scalar("episode_blend", "a finite number", f32::is_finite)?,
            floor: fields.scalar("episode_floor", "a finite number", f32::is_finite)?,
            mean: fields.vector(mean, &[config.episode_dim()])?,
            key,
        })
    }

    /// Whether an episode can be near enough: none is where validation had nothing to learn from.
    pub fn recalls(&self) -> bool {
        self.floor < SHUT
    }

    /// What an episode of an observation is found by, (S).
    pub fn seen<'o>(&self, observation: &'o Observation) -> &'o [f32] {
        match self.key {
            EpisodeKey::State => &observation.pooled,
            EpisodeKey::Picture => &observation.picture,
        }
    }

    /// blend * cos(seen - mean, key - mean) + (1 - blend) * cos(asked, question) with each of P episodes: (P).
    ///
    /// `seen`: (S), see [`EpisodeFinder::seen`]; `asked`: (E), the question by the Y-Encoder; `keys`: (P, S) and
    /// `questions`: (P, E) of the episodes.
    ///
    /// # Errors
    /// [`Error::Input`] if a length does not fit; [`Error::NotFinite`] if a score is not finite.
    pub fn scores(&self, seen: &[f32], asked: &[f32], keys: &[f32], questions: &[f32]) -> Result<Vec<f32>, Error> {
        let width = self.mean.len();
        let episodes = keys.len() / width.max(1);
        if seen.len() != width || keys.len() != episodes * width || questions.len() != episodes * asked.len() {
            return Err(Error::Input(format!(
                "what is seen has length {} and the question {}, but {} and {} numbers of episodes: expected {width}",
                seen.len(),
                asked.len(),
                keys.len(),
                questions.len()
            )));
        }
        let centred = |seen: &[f32]| seen.iter().zip(&self.mean).map(|(x, mean)| x - mean).collect::<Vec<_>>();
        let keys = keys.chunks_exact(width.max(1)).map(centred).collect::<Vec<_>>().concat();
        let seen = cosines(&centred(seen), &keys);
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
        let finder = EpisodeFinder { blend: 0.25, floor: 0.5, mean: vec![1.0, 0.0, -1.0], key: EpisodeKey::State };
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
    fn a_picture_is_its_quarters_less_their_mean() {
        // one number a token, 3 x 3: the middle row and column are in both halves
        let tokens = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0];
        assert_eq!(picture_key(Some(&tokens), 1), [-2.0, -1.0, 1.0, 2.0]);
        // two numbers a token, 2 x 2
        let tokens = [1.0, 8.0, 2.0, 8.0, 3.0, 8.0, 6.0, 4.0];
        assert_eq!(picture_key(Some(&tokens), 2), [-2.0, 1.0, -1.0, 1.0, 0.0, 1.0, 3.0, -3.0]);
        for (tokens, width) in [(None, 2), (Some(&[5.0, 6.0][..]), 2), (Some(&[][..]), 2), (Some(&[1.0; 6]), 2)] {
            assert_eq!(picture_key(tokens, width), [0.0; 8], "nothing to see");
        }
        assert_eq!(picture_key(Some(&[1.0; 4]), 1), [0.0; 4]);
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
        assert_eq!((finder.blend, finder.floor, finder.recalls(), finder.mean.len()), (0.5, 0.75, true, 32));
        let observation = Observation { embedding: vec![0.0], pooled: vec![1.0], picture: vec![2.0] };
        assert_eq!(finder.seen(&observation), [1.0]);
        let by_picture = TinyModel::new().recursion("episodes", true).recursion("episode_key", "picture");
        let width = by_picture.config["vision"]["hidden_size"].as_u64().unwrap() as usize;
        let finder = read(&by_picture, 0.75).unwrap().episodes.unwrap();
        assert_eq!((finder.mean.len(), finder.seen(&observation)), (4 * width, &[2.0][..]));
        assert!(!read(&model, 2.0).unwrap().episodes.unwrap().recalls());
        let error = read(&model, f32::INFINITY).err().unwrap().to_string();
        assert!(error.contains("recursion.episode_floor: inf, expected a finite number"), "{error}");
    }
}
