//! The forward pass: samples to predicted embeddings, texts to target embeddings.

use std::iter::zip;

use rayon::prelude::*;

use super::{Image, Mamba3Jepa, Observation, Progress, Sample};
use crate::angn::{AdaptiveNeuralGate, GateActivity};
use crate::episodes::picture_key;
use crate::error::Error;
use crate::files::path_text;
use crate::image::{load_image, normalize};
use crate::pooling::grid_means;
use crate::predictor::PredictorInput;
use crate::texts::strip;
use crate::vit::{PixelShape, VisionEncoder};

/// Texts in one pass of the Y-Encoder.
const TEXTS: usize = 64;

/// Visual tokens of different images, and for each sample which of them are its own.
struct Seen {
    tokens: Vec<Vec<f32>>,
    places: Vec<Option<usize>>,
}

impl Seen {
    /// For each sample its visual tokens (N, vision width).
    fn by_sample(&self) -> Vec<Option<&[f32]>> {
        self.places.iter().map(|place| place.map(|i| self.tokens[i].as_slice())).collect()
    }
}

impl Mamba3Jepa {
    /// What the predictor makes of B samples, in passes of [`Options::batch_size`](super::Options::batch_size); each result
    /// is the same alone and among others.
    ///
    /// # Errors
    /// [`Error::Input`]: no sample, or an empty question. [`Error::Image`]: an image that cannot be read.
    /// [`Error::Absent`]: a sample has an image, but the model no X-Encoder. [`Error::NotFinite`]: the weights are damaged.
    pub fn observe(&self, samples: &[Sample<'_>]) -> Result<Vec<Observation>, Error> {
        self.observe_with(samples, &mut |_, _| {})
    }

    /// [`Mamba3Jepa::observe`] that says how many samples are done.
    ///
    /// # Errors
    /// As there.
    pub fn observe_with(&self, samples: &[Sample<'_>], progress: Progress<'_>) -> Result<Vec<Observation>, Error> {
        self.pool.install(|| self.look(samples, progress))
    }

    /// Predicted embeddings (E,), of unit length, of B samples: the embeddings of [`Mamba3Jepa::observe`].
    ///
    /// # Errors
    /// As there.
    pub fn embed(&self, samples: &[Sample<'_>]) -> Result<Vec<Vec<f32>>, Error> {
        Ok(self.observe(samples)?.into_iter().map(|observation| observation.embedding).collect())
    }

    /// Target embeddings (E,), of unit length, of answers or captions.
    ///
    /// # Errors
    /// [`Error::Input`]: no text, or an empty one. [`Error::NotFinite`]: the weights are damaged.
    pub fn embed_text(&self, texts: &[impl AsRef<str> + Sync]) -> Result<Vec<Vec<f32>>, Error> {
        self.embed_text_with(texts, &mut |_, _| {})
    }

    /// [`Mamba3Jepa::embed_text`] that says how many texts are done.
    ///
    /// # Errors
    /// As there.
    pub fn embed_text_with(
        &self,
        texts: &[impl AsRef<str> + Sync],
        progress: Progress<'_>,
    ) -> Result<Vec<Vec<f32>>, Error> {
        let texts: Vec<&str> = texts.iter().map(AsRef::as_ref).collect();
        self.pool.install(|| self.read_texts(&texts, progress))
    }

    /// [`Mamba3Jepa::embed_text_with`] on the current pool.
    pub(super) fn read_texts(&self, texts: &[&str], progress: Progress<'_>) -> Result<Vec<Vec<f32>>, Error> {
        let ids = self.encode(texts, self.config().max_answer_tokens, "text")?;
        let mut embeddings = Vec::with_capacity(ids.len());
        for ids in ids.chunks(TEXTS) {
            embeddings.extend(self.y_encoder.encode(ids)?);
            progress(embeddings.len(), texts.len());
        }
        Ok(embeddings)
    }

    /// [`Mamba3Jepa::observe_with`] on the current pool.
    pub(super) fn look(&self, samples: &[Sample<'_>], progress: Progress<'_>) -> Result<Vec<Observation>, Error> {
        let prompt = self.config().query_prompt.as_str();
        let questions: Vec<&str> = samples.iter().map(|sample| sample.question.unwrap_or(prompt)).collect();
        let ids = self.encode(&questions, self.config().max_query_tokens, "question")?;
        let mut observations = Vec::with_capacity(samples.len());
        for (samples, ids) in zip(samples.chunks(self.batch_size), ids.chunks(self.batch_size)) {
            let images: Vec<Option<Image<'_>>> = samples.iter().map(|sample| sample.image).collect();
            let seen = self.see_all(&images)?;
            observations.extend(self.predict(&seen.by_sample(), ids)?);
            progress(observations.len(), questions.len());
        }
        Ok(observations)
    }

    /// One pass: the predictor's view of samples, given their visual tokens (N, vision width) and questions.
    pub(super) fn predict(&self, visual: &[Option<&[f32]>], ids: &[Vec<u32>]) -> Result<Vec<Observation>, Error> {
        let queries = ids.iter().map(|ids| self.y_encoder.embed_tokens(ids)).collect::<Result<Vec<_>, _>>()?;
        let inputs: Vec<PredictorInput<'_>> =
            zip(visual, &queries).map(|(&visual, query)| PredictorInput { visual, query }).collect();
        // The pass is recorded by itself first: whoever holds the lock must not wait for the pool, where another call that
        // wants the lock may run on the same thread.
        let mut pass = GateActivity::new();
        let predictions = self.predictor.predict(&inputs, self.gates.as_ref().map(|gates| (gates, &mut pass)))?;
        if let Some(gates) = &self.gates {
            self.record(&pass, gates);
        }
        let width = self.config().vision.hidden_size;
        let observed = zip(predictions, visual).map(|(prediction, &tokens)| Observation {
            embedding: prediction.embedding,
            pooled: prediction.pooled,
            picture: picture_key(tokens, width),
        });
        Ok(observed.collect())
    }

    fn record(&self, pass: &GateActivity, gates: &AdaptiveNeuralGate) {
        let mut activity = self.activity();
        let was_due = activity.context_reset_due();
        activity.follow(pass, gates);
        let is_due = activity.context_reset_due();
        drop(activity);
        if is_due && !was_due {
            self.warn("the gates' activity fell under the context reset threshold: reset the context");
        }
    }

    /// The visual tokens of some samples' images; equal images are looked at once.
    fn see_all(&self, images: &[Option<Image<'_>>]) -> Result<Seen, Error> {
        let mut different: Vec<Image<'_>> = Vec::new();
        let mut places = Vec::with_capacity(images.len());
        for image in images {
            places.push(image.map(|image| {
                different.iter().position(|other| image.is_same(*other)).unwrap_or_else(|| {
                    different.push(image);
                    different.len() - 1
                })
            }));
        }
        if different.is_empty() {
            return Ok(Seen { tokens: Vec::new(), places });
        }
        let encoder = self.demand_x_encoder()?;
        let pixels = different.par_iter().map(|&image| self.pixels(image)).collect::<Result<Vec<_>, _>>()?;
        let tokens = pixels.iter().map(|pixels| self.see(encoder, pixels)).collect::<Result<_, _>>()?;
        Ok(Seen { tokens, places })
    }

    /// The visual tokens (N, vision width) of normalised pixels (3, S, S), as the predictor reads them.
    pub(super) fn see(&self, encoder: &VisionEncoder, pixels: &[f32]) -> Result<Vec<f32>, Error> {
        let (vision, pool) = (&self.config().vision, self.config().predictor.visual_pool);
        let size = vision.image_size;
        let tokens = encoder.encode(pixels, PixelShape::Image { height: size, width: size })?;
        Ok(grid_means(tokens, vision.hidden_size, vision.side(), pool))
    }

    /// Normalised pixels (3, S, S) of an image.
    pub(super) fn pixels(&self, image: Image<'_>) -> Result<Vec<f32>, Error> {
        let size = self.config().vision.image_size;
        let pixels = match image {
            Image::File(path) => load_image(path)?.to_pixels(size),
            Image::Picture(picture) => picture.to_pixels(size),
        };
        Ok(normalize(&pixels, self.manifest.image.mean, self.manifest.image.std))
    }

    pub(super) fn demand_x_encoder(&self) -> Result<&VisionEncoder, Error> {
        self.x_encoder.as_ref().ok_or_else(|| {
            let folder = self.manifest.path.parent().unwrap_or(&self.manifest.path);
            Error::Absent(format!(
                "{}: it holds no x_encoder.safetensors, so that it cannot look at images: open it with an X-Encoder \
                 (--x-encoder, a transformers folder of V-JEPA 2), or export with --x-encoder",
                path_text(folder)
            ))
        })
    }

    /// Ids of texts, each cut to `max_tokens`; `kind` names them in messages.
    pub(super) fn encode(&self, texts: &[&str], max_tokens: usize, kind: &str) -> Result<Vec<Vec<u32>>, Error> {
        if texts.is_empty() {
            return Err(Error::Input(format!("expected at least one {kind}, found none")));
        }
        if let Some(i) = texts.iter().position(|text| strip(text).is_empty()) {
            return Err(Error::Input(format!("{kind} {i} is empty: {:?}", texts[i])));
        }
        let mut cut = 0;
        let mut ids = Vec::with_capacity(texts.len());
        for text in texts {
            let encoded = self.tokenizer.encode(text, max_tokens)?;
            cut += usize::from(encoded.truncated);
            ids.push(encoded.ids);
        }
        if cut > 0 {
            let total = texts.len();
            self.warn(&format!("{cut} of {total} {kind}s are longer than {max_tokens} tokens and were cut"));
        }
        Ok(ids)
    }
}
