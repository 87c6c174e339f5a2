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
    /// [`Error::Input`] for an id that is not in the vocabulary, or a text without tokens.
    pub fn encode<T: AsRef<[u32]>>(&self, texts: &[T]) -> Result<Vec<Vec<f32>>, Error> {
        Ok(pooling::embed(&self.projection, &self.pool(texts)?))
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
