//! The Y-Encoder: a Mamba-3 text encoder, and the token embedding that questions share with it.
//!
//! Letters: L tokens, D model width, E embedding width, V vocabulary.

use crate::config::Mamba3JepaConfig;
use crate::error::{Error, LoadError};
use crate::linalg::{Linear, Matrix};
use crate::loader::{Fields, Weights};
use crate::mamba3::Mamba3Backbone;
use crate::pooling;

/// Text -> Mamba-3 backbone -> mean over the tokens -> linear projection -> unit length.
pub struct Mamba3TextEncoder {
    config: Mamba3JepaConfig,
    embedding: Matrix,
    pub(crate) backbone: Mamba3Backbone,
    projection: Linear,
}

impl Mamba3TextEncoder {
    /// Reads `y_encoder.safetensors`.
    ///
    /// # Errors
    /// [`LoadError`] if the file holds another component, a tensor is missing, unknown or of another shape or type.
    pub fn from_weights(weights: &Weights) -> Result<Mamba3TextEncoder, LoadError> {
        let (mut fields, config) = Fields::open(weights, "y_encoder")?;
        let width = config.y_encoder.d_model();
        let encoder = Mamba3TextEncoder {
            embedding: fields.matrix("embedding.weight", config.vocab_size, width)?,
            backbone: Mamba3Backbone::from_fields(&mut fields, &config.y_encoder)?,
            projection: fields.linear("projection", config.embed_dim, width)?,
            config,
        };
        fields.finish()?;
        Ok(encoder)
    }

    /// The configuration in the file's header.
    pub fn config(&self) -> &Mamba3JepaConfig {
        &self.config
    }

    /// Token ids (L) to token embeddings (L, D), row after row.
    ///
    /// # Errors
    /// [`Error::Input`] for an id that is not in the vocabulary.
    pub fn embed_tokens(&self, ids: &[u32]) -> Result<Vec<f32>, Error> {
        let mut tokens = vec![0.0; ids.len() * self.embedding.cols()];
        look_up(&self.embedding, ids, &mut tokens)?;
        Ok(tokens)
    }

    /// Texts as token ids, bos and eos included, to one embedding (E) of unit length each: what the text alone would give.
    ///
    /// # Errors
    /// [`Error::Input`] for an id that is not in the vocabulary, or a text without tokens; [`Error::NotFinite`] if the
    /// weights are damaged.
    pub fn encode<T: AsRef<[u32]>>(&self, texts: &[T]) -> Result<Vec<Vec<f32>>, Error> {
        pooling::embed(&self.projection, &self.pool(texts)?)
    }

    /// The mean states (B, D) of texts.
    ///
    /// # Errors
    /// As for [`encode`](Self::encode).
    pub(crate) fn pool<T: AsRef<[u32]>>(&self, texts: &[T]) -> Result<Vec<f32>, Error> {
        let lengths: Vec<usize> = texts.iter().map(|ids| ids.as_ref().len()).collect();
        if lengths.contains(&0) {
            return Err(Error::Input("a text has no tokens, not even bos and eos".into()));
        }
        let width = self.embedding.cols();
        let mut x = vec![0.0; lengths.iter().sum::<usize>() * width];
        let mut rest = &mut x[..];
        for ids in texts {
            let (rows, others) = rest.split_at_mut(ids.as_ref().len() * width);
            look_up(&self.embedding, ids.as_ref(), rows)?;
            rest = others;
        }
        self.backbone.forward(&mut x, &lengths, None, &mut ());
        Ok(pooling::means(&x, &lengths, width))
    }
}

/// The rows of `embedding` (V, D) that `ids` (L) name, into `tokens` (L, D).
///
/// # Errors
/// [`Error::Input`] for an id that is not in the vocabulary.
pub(crate) fn look_up(embedding: &Matrix, ids: &[u32], tokens: &mut [f32]) -> Result<(), Error> {
    for (&id, row) in ids.iter().zip(tokens.chunks_exact_mut(embedding.cols())) {
        let index = usize::try_from(id).ok().filter(|&index| index < embedding.rows());
        let index = index.ok_or_else(|| {
            Error::Input(format!("token id {id} is not in the vocabulary of {} tokens", embedding.rows()))
        })?;
        embedding.row(index, row);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{TinyModel, relative};
    use half::{bf16, f16};

    fn encoder(bytes: &[u8]) -> Mamba3TextEncoder {
        Mamba3TextEncoder::from_weights(&Weights::from_bytes("y_encoder", bytes).unwrap()).unwrap()
    }

    #[test]
    fn a_text_is_the_same_alone_and_beside_others() {
        for (name, model) in TinyModel::variants() {
            let encoder = encoder(&model.component("y_encoder"));
            let texts: Vec<Vec<u32>> = vec![vec![1, 40, 2], (1..130).collect(), vec![1, 2], vec![1, 258, 258, 2]];
            let together = encoder.encode(&texts).unwrap();
            for (text, found) in texts.iter().zip(&together) {
                let alone = encoder.encode(&[text]).unwrap().remove(0);
                assert!(relative(found, &alone) < 3e-6, "{name}");
                assert!((found.iter().map(|x| x * x).sum::<f32>() - 1.0).abs() < 1e-5, "{name}");
            }
            assert!(relative(&together[0], &together[1]) > 0.01, "{name}: different texts differ");
            assert_eq!(encoder.encode::<Vec<u32>>(&[]).unwrap(), Vec::<Vec<f32>>::new());
        }
    }

    #[test]
    fn weights_of_16_bits_are_the_numbers_they_were_rounded_to() {
        type Round = fn(f32) -> f32;
        let to_f16: Round = |x| f16::from_f32(x).to_f32();
        let to_bf16: Round = |x| bf16::from_f32(x).to_f32();
        for (dtype, round) in [("float16", to_f16), ("bfloat16", to_bf16)] {
            let narrow = encoder(&TinyModel::new().dtype(dtype).component("y_encoder"));
            let wide = encoder(&TinyModel::new().component_with("y_encoder", |key, numbers| {
                let matrices = ["in_proj", "out_proj", "embedding", "projection"];
                if key.ends_with(".weight") && matrices.iter().any(|name| key.contains(name)) {
                    numbers.iter_mut().for_each(|x| *x = round(*x));
                }
            }));
            for text in [vec![1, 7, 2], (1..80).collect()] {
                let (narrow, wide) = (narrow.encode(&[&text]).unwrap(), wide.encode(&[&text]).unwrap());
                assert!(relative(&narrow[0], &wide[0]) < 3e-6, "{dtype}");
            }
        }
    }

    #[test]
    fn what_does_not_fit_is_an_error() {
        let encoder = encoder(&TinyModel::new().component("y_encoder"));
        for ids in [vec![259], vec![1, u32::MAX]] {
            let error = encoder.encode(&[&ids]).unwrap_err().to_string();
            assert!(error.contains("not in the vocabulary of 259 tokens"), "{error}");
            assert!(encoder.embed_tokens(&ids).is_err());
        }
        assert!(encoder.encode(&[vec![1, 2], vec![]]).unwrap_err().to_string().contains("no tokens"));
        let rows = encoder.embed_tokens(&[3, 5, 3]).unwrap();
        assert!(rows[..32] == rows[64..] && rows[..32] != rows[32..64]);
    }
}
