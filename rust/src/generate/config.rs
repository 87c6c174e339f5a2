//! How the Y-Decoder chooses its tokens.

use crate::error::Error;
use crate::texts::number_text;

/// The largest count that a setting may have; more would not be more.
pub const LARGEST: usize = 1_000_000_000;
/// The most beams: each is a sequence with a state of its own.
pub const MAX_BEAMS: usize = 1_000;
/// The most tokens of one sequence.
pub const MAX_TOKENS: usize = 1_000_000;
/// What a search remembers: beams by tokens.
const LARGEST_SEARCH: usize = 10_000_000;

/// How the next token is chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Method {
    /// The most probable token each time.
    #[default]
    Greedy,
    /// Drawn by its probability.
    Sample,
    /// A search for the most probable answer.
    Beam,
}

impl Method {
    fn name(self) -> &'static str {
        match self {
            Method::Greedy => "greedy",
            Method::Sample => "sample",
            Method::Beam => "beam",
        }
    }
}

/// Settings of generation. A setting that only one method reads must have its default under the others, where it would
/// silently do nothing.
#[derive(Clone, Debug, PartialEq)]
pub struct GenerationConfig {
    /// How the next token is chosen.
    pub method: Method,
    /// Sample: divides the logits; below 1 the probable tokens get more probable, 0 is greedy.
    pub temperature: f64,
    /// Sample: draw from the k most probable tokens only.
    pub top_k: Option<usize>,
    /// Sample: draw from the fewest most probable tokens that have this probability together.
    pub top_p: Option<f64>,
    /// Beam: unfinished answers kept at a time.
    pub beams: usize,
    /// Beam: an answer's log-probability is divided by its number of tokens to this power; 0 prefers the most probable
    /// answer, 1 the one with the best mean.
    pub length_penalty: f64,
    /// Stop after this many tokens, the end mark included; `None`: as long as the model's longest answers.
    pub max_tokens: Option<usize>,
    /// Sample: the same seed draws the same answers.
    pub seed: u64,
}

impl Default for GenerationConfig {
    fn default() -> Self {
        GenerationConfig {
            method: Method::Greedy,
            temperature: 1.0,
            top_k: None,
            top_p: None,
            beams: 4,
            length_penalty: 0.0,
            max_tokens: None,
            seed: 0,
        }
    }
}

impl GenerationConfig {
    /// Whether every setting is possible, and has an effect where it is set.
    ///
    /// # Errors
    /// [`Error::Input`] names the setting.
    pub fn check(&self) -> Result<(), Error> {
        let demand = |name: &str, value: String, is_right: bool, rule: &str| match is_right {
            true => Ok(()),
            false => Err(Error::Input(format!("generation: {name} is {value}, it must be {rule}"))),
        };
        let temperature = self.temperature;
        let is_right = temperature.is_finite() && temperature >= 0.0;
        demand("temperature", number_text(temperature), is_right, "finite and at least 0")?;
        if let Some(top_p) = self.top_p {
            let is_share = (0.0..=1.0).contains(&top_p);
            demand("top_p", number_text(top_p), is_share, "at least 0 and at most 1")?;
            demand("top_p", number_text(top_p), top_p > 0.0, "greater than 0")?;
        }
        for (name, count, most) in [
            ("top_k", self.top_k, LARGEST),
            ("beams", Some(self.beams), MAX_BEAMS),
            ("max_tokens", self.max_tokens, MAX_TOKENS),
        ] {
            let count = count.unwrap_or(1);
            let rule = format!("at least 1 and at most {most}");
            demand(name, count.to_string(), (1..=most).contains(&count), &rule)?;
        }
        let penalty = self.length_penalty;
        demand("length_penalty", number_text(penalty), penalty.is_finite(), "finite")?;
        self.check_effects()?;
        match self.max_tokens {
            Some(tokens) if self.width().saturating_mul(tokens) > LARGEST_SEARCH => Err(Error::Input(format!(
                "generation: beams is {} and max_tokens {tokens}; a search remembers their product, which must be at most \
                 {LARGEST_SEARCH}",
                self.beams
            ))),
            _ => Ok(()),
        }
    }

    /// Whether there are as many tokens to choose from as the settings ask for.
    ///
    /// # Errors
    /// [`Error::Input`] names the setting, its value and the number of tokens.
    pub(crate) fn check_choice(&self, n_tokens: usize) -> Result<(), Error> {
        for (name, value) in [("top_k", self.top_k.unwrap_or(1)), ("beams", self.width())] {
            if value > n_tokens {
                return Err(Error::Input(format!(
                    "generation: {name} is {value}, but the model has only {n_tokens} tokens to choose from"
                )));
            }
        }
        Ok(())
    }

    /// Samples to go on with together where `batch_size` sequences are to be in memory; at least one.
    pub(crate) fn samples_at_once(&self, batch_size: usize) -> usize {
        (batch_size / self.width().max(1)).max(1)
    }

    /// Sequences that one sample takes at a time.
    fn width(&self) -> usize {
        if self.method == Method::Beam { self.beams } else { 1 }
    }

    fn check_effects(&self) -> Result<(), Error> {
        let default = Self::default();
        for (name, method, is_set) in [
            ("temperature", Method::Sample, self.temperature != default.temperature),
            ("top_k", Method::Sample, self.top_k.is_some()),
            ("top_p", Method::Sample, self.top_p.is_some()),
            ("beams", Method::Beam, self.beams != default.beams),
            ("length_penalty", Method::Beam, self.length_penalty != default.length_penalty),
        ] {
            if is_set && self.method != method {
                let (used, needed) = (self.method.name(), method.name());
                return Err(Error::Input(format!(
                    "generation: {name} has no effect with {used}; choose method {needed}"
                )));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(change: impl FnOnce(&mut GenerationConfig)) -> String {
        let mut config = GenerationConfig::default();
        change(&mut config);
        config.check().expect_err("a wrong setting").to_string()
    }

    #[test]
    fn says_which_setting_is_wrong() {
        GenerationConfig::default().check().expect("the defaults are right");
        let said = |text: &str| format!("generation: {text}");
        let counted = |most: usize| format!("it must be at least 1 and at most {most}");
        for (value, text) in [(-1.0, "-1.0"), (f64::NAN, "nan"), (f64::INFINITY, "inf")] {
            let expected = said(&format!("temperature is {text}, it must be finite and at least 0"));
            assert_eq!(message(|c| c.temperature = value), expected);
        }
        for value in [0, LARGEST + 1] {
            assert_eq!(
                message(|c| c.top_k = Some(value)),
                said(&format!("top_k is {value}, {}", counted(1_000_000_000)))
            );
        }
        for value in [0, 1_001] {
            assert_eq!(message(|c| c.beams = value), said(&format!("beams is {value}, {}", counted(1_000))));
        }
        for value in [0, 1_000_001] {
            let expected = said(&format!("max_tokens is {value}, {}", counted(1_000_000)));
            assert_eq!(message(|c| c.max_tokens = Some(value)), expected);
        }
        assert_eq!(message(|c| c.top_p = Some(1.5)), said("top_p is 1.5, it must be at least 0 and at most 1"));
        assert_eq!(message(|c| c.top_p = Some(f64::NAN)), said("top_p is nan, it must be at least 0 and at most 1"));
        assert_eq!(message(|c| c.top_p = Some(0.0)), said("top_p is 0.0, it must be greater than 0"));
        assert_eq!(message(|c| c.length_penalty = f64::INFINITY), said("length_penalty is inf, it must be finite"));
    }

    #[test]
    fn a_search_has_its_limits() {
        let beam = |beams, max_tokens| GenerationConfig {
            method: Method::Beam,
            beams,
            max_tokens: Some(max_tokens),
            ..Default::default()
        };
        beam(1_000, 10_000).check().expect("as many as there may be");
        let error = beam(1_000, 10_001).check().expect_err("too many").to_string();
        let expected = "generation: beams is 1000 and max_tokens 10001; a search remembers their product, which must be at \
                        most 10000000";
        assert_eq!(error, expected);
        GenerationConfig { max_tokens: Some(1_000_000), ..Default::default() }.check().expect("one sequence each");
        let message = |config: GenerationConfig| config.check_choice(8).expect_err("too many").to_string();
        let only = "but the model has only 8 tokens to choose from";
        assert_eq!(message(beam(9, 1)), format!("generation: beams is 9, {only}"));
        let sample = GenerationConfig { method: Method::Sample, top_k: Some(9), ..Default::default() };
        assert_eq!(message(sample), format!("generation: top_k is 9, {only}"));
        beam(8, 1).check_choice(8).expect("a beam for each token");
        GenerationConfig::default().check_choice(1).expect("one is enough for greedy");
        assert_eq!([32, 3, 1].map(|size| beam(8, 1).samples_at_once(size)), [4, 1, 1]);
        assert_eq!(GenerationConfig::default().samples_at_once(32), 32);
    }

    #[test]
    fn a_setting_without_effect_is_an_error() {
        assert_eq!(message(|c| c.top_k = Some(3)), "generation: top_k has no effect with greedy; choose method sample");
        assert_eq!(
            message(|c| (c.method, c.beams) = (Method::Sample, 2)),
            "generation: beams has no effect with sample; choose method beam"
        );
        let config = GenerationConfig { method: Method::Beam, beams: 1, length_penalty: 1.0, ..Default::default() };
        config.check().expect("beam's own settings");
    }
}
