//! The samples that the golden files of the predictor and its gates are about.

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

    pub(super) fn padded_length(&self) -> usize {
        self.visual_count + self.query_count
    }

    /// For each sample: whether it has a picture, its visual tokens, its query tokens and which of them count.
    fn iter(&self) -> impl Iterator<Item = (bool, &[f32], &[f32], &[bool])> {
        let queries = self.query_tokens.chunks_exact(self.query_count * self.query_width);
        (self.has_image.iter().copied())
            .zip(self.visual_tokens.chunks_exact(self.visual_count * self.visual_width))
            .zip(queries.zip(self.query_mask.chunks_exact(self.query_count)))
            .map(|((has_image, visual), (query, mask))| (has_image, visual, query, mask))
    }

    /// The samples without padding.
    pub(super) fn inputs(&self) -> Vec<PredictorInput<'_>> {
        self.iter()
            .map(|(has_image, visual, query, mask)| PredictorInput {
                visual: has_image.then_some(visual),
                query: &query[..mask.iter().filter(|&&valid| valid).count() * self.query_width],
            })
            .collect()
    }

    /// The projected tokens (B, Nv + Nq, D), [visual ; query] with a picture, [query ; unused] without, and which count.
    pub(super) fn padded(&self, predictor: &Mamba3Predictor) -> (Vec<f32>, Vec<u8>) {
        let width = predictor.config().predictor.d_model();
        let (mut tokens, mut mask) = (Vec::new(), Vec::new());
        for (has_image, visual, query, query_mask) in self.iter() {
            let mut visual_rows = vec![0.0; self.visual_count * width];
            let mut query_rows = vec![0.0; self.query_count * width];
            predictor.vision_proj.apply(visual, &mut visual_rows);
            predictor.query_proj.apply(query, &mut query_rows);
            let visual_mask = vec![u8::from(has_image); self.visual_count];
            let query_mask = query_mask.iter().copied().map(u8::from).collect();
            let (first, second) = match has_image {
                true => ((visual_rows, visual_mask), (query_rows, query_mask)),
                false => ((query_rows, query_mask), (visual_rows, visual_mask)),
            };
            for (rows, counts) in [first, second] {
                tokens.extend(rows);
                mask.extend(counts);
            }
        }
        (tokens, mask)
    }
}
