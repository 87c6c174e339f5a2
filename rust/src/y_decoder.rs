//! The Y-Decoder: a Mamba-3 language model that speaks an embedding.
//!
//! Letters: B sequences, L tokens, P prefix tokens, D model width, E embedding width, V vocabulary.

use crate::config::{BackboneConfig, Mamba3JepaConfig};
use crate::error::{Error, LoadError};
use crate::linalg::{Linear, Matrix};
use crate::loader::{Fields, Weights};
use crate::mamba3::{BackboneState, Mamba3Backbone, StepBuffers};
use crate::y_encoder::look_up;

/// [prefix read from the embedding ; answer tokens] -> Mamba-3 backbone -> next-token logits.
pub struct Mamba3Decoder {
    config: Mamba3JepaConfig,
    embed_to_prefix: Linear,
    embedding: Matrix,
    pub(crate) backbone: Mamba3Backbone,
    lm_head: Matrix,
}

/// Where a decoder is in B answers, and the memory its steps work in. Its size does not depend on how many tokens there
/// were.
pub struct DecoderState {
    config: BackboneConfig,
    sequences: Vec<BackboneState>,
    /// (B, D) and (B, V).
    x: Vec<f32>,
    logits: Vec<f32>,
    buffers: StepBuffers,
}

impl DecoderState {
    /// How many sequences B there are.
    pub fn len(&self) -> usize {
        self.sequences.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.sequences.is_empty()
    }

    pub(crate) fn sequences(&self) -> &[BackboneState] {
        &self.sequences
    }
}

impl Mamba3Decoder {
    /// Reads `y_decoder.safetensors`.
    ///
    /// # Errors
    /// [`LoadError`] if the file holds another component, a tensor is missing, unknown or of another shape or type.
    pub fn from_weights(weights: &Weights) -> Result<Mamba3Decoder, LoadError> {
        let (mut fields, config) = Fields::open(weights, "y_decoder")?;
        let width = config.y_decoder.d_model();
        let decoder = Mamba3Decoder {
            embed_to_prefix: fields.linear("embed_to_prefix", config.prefix_tokens * width, config.embed_dim)?,
            embedding: fields.matrix("embedding.weight", config.vocab_size, width)?,
            backbone: Mamba3Backbone::from_fields(&mut fields, &config.y_decoder)?,
            lm_head: fields.matrix("lm_head.weight", config.vocab_size, width)?,
            config,
        };
        fields.finish()?;
        Ok(decoder)
    }

    /// The configuration in the file's header.
    pub fn config(&self) -> &Mamba3JepaConfig {
        &self.config
    }

    /// The states of B answers after the prefix that speaks their embeddings (E); [`step`](Self::step) with bos comes
    /// next.
    ///
    /// # Errors
    /// [`Error::Input`] if an embedding has another length.
    pub fn prefill(&self, embeddings: &[&[f32]]) -> Result<DecoderState, Error> {
        let batch = embeddings.len();
        let mut x = Vec::with_capacity(batch * self.embed_to_prefix.weight.rows());
        for embedding in embeddings {
            x.extend(self.prefix(embedding)?);
        }
        let mut sequences = vec![BackboneState::new(&self.config.y_decoder); batch];
        let lengths = vec![self.config.prefix_tokens; batch];
        self.backbone.forward(&mut x, &lengths, Some(&mut sequences), &mut ());
        Ok(DecoderState {
            config: self.config.y_decoder.clone(),
            sequences,
            x: vec![0.0; batch * self.embedding.cols()],
            logits: vec![0.0; batch * self.lm_head.rows()],
            buffers: StepBuffers::new(&self.config.y_decoder.layer, batch),
        })
    }

    /// Reads one token of each of the B answers; returns the logits (B, V) of the next ones, which lie in `state`.
    ///
    /// Time and memory do not depend on how many tokens there were, and nothing is allocated.
    ///
    /// # Errors
    /// [`Error::Input`] for an id that is not in the vocabulary, another number of ids than answers, or the state of another
    /// decoder; the state has not changed then.
    pub fn step<'a>(&self, ids: &[u32], state: &'a mut DecoderState) -> Result<&'a mut [f32], Error> {
        if ids.len() != state.len() {
            return Err(Error::Input(format!("{} token ids for {} answers", ids.len(), state.len())));
        }
        self.check(state)?;
        let DecoderState { sequences, x, logits, buffers, .. } = state;
        look_up(&self.embedding, ids, x)?;
        self.backbone.step(x, sequences, buffers, &mut ());
        self.lm_head.apply(x, logits);
        Ok(logits)
    }

    /// Keeps the answers that `rows` names, in its order; one may be named several times. For beams, and for answers that
    /// are finished.
    ///
    /// # Errors
    /// [`Error::Input`] for a row that is not there, or the state of another decoder; the state has not changed then.
    pub fn select(&self, state: &mut DecoderState, rows: &[usize]) -> Result<(), Error> {
        if let Some(row) = rows.iter().find(|&&row| row >= state.len()) {
            return Err(Error::Input(format!("row {row} of a state of {} answers", state.len())));
        }
        self.check(state)?;
        state.sequences = rows.iter().map(|&row| state.sequences[row].clone()).collect();
        state.x.resize(rows.len() * self.embedding.cols(), 0.0);
        state.logits.resize(rows.len() * self.lm_head.rows(), 0.0);
        state.buffers.resize(&self.config.y_decoder.layer, rows.len());
        Ok(())
    }

    /// Teacher forcing: logits (L, V), of which row t predicts the token after `ids[t]`, for an embedding (E) and the ids
    /// (L) of an answer that starts with bos.
    ///
    /// # Errors
    /// [`Error::Input`] if the embedding has another length, or for an id that is not in the vocabulary.
    pub fn logits(&self, embedding: &[f32], ids: &[u32]) -> Result<Vec<f32>, Error> {
        let width = self.embedding.cols();
        let mut x = self.prefix(embedding)?;
        let prefix = x.len();
        x.resize(prefix + ids.len() * width, 0.0);
        look_up(&self.embedding, ids, &mut x[prefix..])?;
        self.backbone.forward(&mut x, &[self.config.prefix_tokens + ids.len()], None, &mut ());
        let mut logits = vec![0.0; ids.len() * self.lm_head.rows()];
        self.lm_head.apply(&x[prefix..], &mut logits);
        Ok(logits)
    }

    /// Token ids (L) to token embeddings (L, D).
    pub(crate) fn embed_tokens(&self, ids: &[u32]) -> Result<Vec<f32>, Error> {
        let mut tokens = vec![0.0; ids.len() * self.embedding.cols()];
        look_up(&self.embedding, ids, &mut tokens)?;
        Ok(tokens)
    }

    /// The prefix tokens (P, D) that speak an embedding (E).
    pub(crate) fn prefix(&self, embedding: &[f32]) -> Result<Vec<f32>, Error> {
        let expected = self.embed_to_prefix.weight.cols();
        if embedding.len() != expected {
            return Err(Error::Input(format!("an embedding of length {}: expected {expected}", embedding.len())));
        }
        let mut prefix = vec![0.0; self.embed_to_prefix.weight.rows()];
        self.embed_to_prefix.apply(embedding, &mut prefix);
        Ok(prefix)
    }

    fn check(&self, state: &DecoderState) -> Result<(), Error> {
        match state.config == self.config.y_decoder && state.logits.len() == state.len() * self.lm_head.rows() {
            true => Ok(()),
            false => Err(Error::Input("the state of another decoder".into())),
        }
    }
}
