//! How the Y-Decoder chooses its tokens.

use crate::error::Error;

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
        let wrong = |name: &str, value: String, rule: &str| {
            Err(Error::Input(format!("generation: {name} is {value}, it must be {rule}")))
        };
        if !(0.0..f64::INFINITY).contains(&self.temperature) {
            return wrong("temperature", format!("{:?}", self.temperature), "at least 0");
        }
        if self.top_k == Some(0) {
            return wrong("top_k", "0".into(), "at least 1");
        }
        if let Some(top_p) = self.top_p.filter(|top_p| !(*top_p > 0.0 && *top_p <= 1.0)) {
            return wrong("top_p", format!("{top_p:?}"), "above 0 and at most 1");
        }
        if self.beams == 0 {
            return wrong("beams", "0".into(), "at least 1");
        }
        if !self.length_penalty.is_finite() {
            return wrong("length_penalty", format!("{:?}", self.length_penalty), "a number");
        }
        if self.max_tokens == Some(0) {
            return wrong("max_tokens", "0".into(), "at least 1");
        }
        self.check_effects()
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
        assert_eq!(message(|c| c.temperature = -1.0), "generation: temperature is -1.0, it must be at least 0");
        assert_eq!(message(|c| c.temperature = f64::NAN), "generation: temperature is NaN, it must be at least 0");
        assert_eq!(message(|c| c.top_k = Some(0)), "generation: top_k is 0, it must be at least 1");
        assert_eq!(message(|c| c.top_p = Some(1.5)), "generation: top_p is 1.5, it must be above 0 and at most 1");
        assert_eq!(message(|c| c.beams = 0), "generation: beams is 0, it must be at least 1");
        assert_eq!(message(|c| c.max_tokens = Some(0)), "generation: max_tokens is 0, it must be at least 1");
        assert_eq!(
            message(|c| c.length_penalty = f64::INFINITY),
            "generation: length_penalty is inf, it must be a number"
        );
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
