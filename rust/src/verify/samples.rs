//! The samples that the golden files of the predictor and its gates are about.

use crate::config::Part;
use crate::error::Error;
use crate::predictor::{Mamba3Predictor, PredictorInput};
use crate::y_encoder::Mamba3TextEncoder;

use super::golden::Golden;

/// The samples of the predictor's golden file: B of Nv visual tokens and Nq query tokens, padded.
pub(super) struct Samples {
    /// (B, Nv, width of the X-Encoder).
    visual_tokens: Vec<f32>,
    /// (B).
    has_image: Vec<bool>,
    /// (B, Nq).
    query_mask: Vec<bool>,
    /// (B, Nq, width of the Y-Encoder).
    pub(super) query_tokens: Vec<f32>,
    visual_count: usize,
    query_count: usize,
    visual_width: usize,
    query_width: usize,
}

/// Sequences of one length, padded on the right.
pub(super) struct Padded {
    /// (B, L, D).
    pub(super) tokens: Vec<f32>,
    /// L.
    pub(super) length: usize,
    /// (B) tokens of each that are no padding.
    pub(super) valid: Vec<usize>,
}

impl Padded {
    /// (B, L) which tokens are no padding.
    pub(super) fn mask(&self) -> Vec<u8> {
        self.valid.iter().flat_map(|&valid| (0..self.length).map(move |i| u8::from(i < valid))).collect()
    }
}

impl Samples {
    pub(super) fn read(golden: &mut Golden, encoder: &Mamba3TextEncoder) -> Result<Samples, Error> {
        let ids = golden.input_ids("query_ids")?;
        let config = encoder.config();
        let samples = Samples {
            visual_count: golden.size("visual_tokens", 1)?,
            query_count: golden.size("query_ids", 1)?,
            visual_tokens: golden.input("visual_tokens")?,
            has_image: golden.input_mask("has_image")?,
            query_mask: golden.input_mask("query_mask")?,
            query_tokens: encoder.embed_tokens(&ids)?,
            visual_width: config.vision.hidden_size,
            query_width: config.y_encoder.d_model(),
        };
        let count = samples.has_image.len();
        let fits = samples.visual_tokens.len() == count * samples.visual_count * samples.visual_width
            && samples.query_mask.len() == count * samples.query_count
            && ids.len() == samples.query_mask.len()
            && samples.visual_count * samples.query_count > 0;
        match fits {
            true => Ok(samples),
            false => Err(golden.mismatch("its samples do not fit together; export again with --golden").into()),
        }
    }

    /// For each sample: whether it has a picture, its visual tokens, its query tokens and how many of them count.
    fn iter(&self) -> impl Iterator<Item = (bool, &[f32], &[f32], usize)> {
        let queries = self.query_tokens.chunks_exact(self.query_count * self.query_width);
        let masks = self.query_mask.chunks_exact(self.query_count);
        (self.has_image.iter().copied())
            .zip(self.visual_tokens.chunks_exact(self.visual_count * self.visual_width))
            .zip(queries.zip(masks.map(|mask| mask.iter().filter(|&&valid| valid).count())))
            .map(|((has_image, visual), (query, valid))| (has_image, visual, query, valid))
    }

    /// The samples without padding.
    pub(super) fn inputs(&self) -> Vec<PredictorInput<'_>> {
        self.iter()
            .map(|(has_image, visual, query, valid)| PredictorInput {
                visual: has_image.then_some(visual),
                query: &query[..valid * self.query_width],
            })
            .collect()
    }

    /// The projected tokens in the predictor's order. What a sample lacks is padding on the right, wherever it would have
    /// stood: that of the queries first, then that of the pictures.
    pub(super) fn padded(&self, predictor: &Mamba3Predictor) -> Padded {
        let config = &predictor.config().predictor;
        let (order, width) = (config.order, config.d_model());
        let length = order.count(Part::Visual) * self.visual_count + order.count(Part::Question) * self.query_count;
        let mut padded = Padded { tokens: Vec::new(), length, valid: Vec::new() };
        let mut visual_rows = vec![0.0; self.visual_count * width];
        let mut query_rows = vec![0.0; self.query_count * width];
        for (has_image, visual, query, valid) in self.iter() {
            predictor.vision_proj.apply(visual, &mut visual_rows);
            predictor.query_proj.apply(query, &mut query_rows);
            let (question, question_padding) = query_rows.split_at(valid * width);
            let (picture, picture_padding) = visual_rows.split_at(if has_image { visual_rows.len() } else { 0 });
            let start = padded.tokens.len();
            for part in order.parts() {
                padded.tokens.extend_from_slice(match part {
                    Part::Visual => picture,
                    Part::Question => question,
                });
            }
            padded.valid.push((padded.tokens.len() - start) / width);
            for (part, padding) in [(Part::Question, question_padding), (Part::Visual, picture_padding)] {
                padded.tokens.extend(padding.repeat(order.count(part)));
            }
        }
        padded
    }
}
