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
#[derive(Clone)]
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Random, TinyModel, relative};

    fn decoder(model: &TinyModel) -> Mamba3Decoder {
        let weights = Weights::from_bytes("y_decoder", &model.component("y_decoder")).unwrap();
        Mamba3Decoder::from_weights(&weights).unwrap()
    }

    fn embeddings() -> [Vec<f32>; 3] {
        [1, 2, 3].map(|seed| Random::new(seed).normals(24))
    }

    #[test]
    fn steps_give_the_logits_of_the_whole() {
        for (name, model) in TinyModel::variants() {
            let decoder = decoder(&model);
            let ids: Vec<u32> = (1..90).collect();
            let [embedding, ..] = embeddings();
            let whole = decoder.logits(&embedding, &ids).unwrap();
            let mut state = decoder.prefill(&[&embedding]).unwrap();
            for (&id, expected) in ids.iter().zip(whole.chunks_exact(259)) {
                let logits = decoder.step(&[id], &mut state).unwrap();
                assert!(relative(logits, expected) < 1e-5, "{name}: after token {id}");
            }
        }
    }

    #[test]
    fn an_answer_is_the_same_alone_and_beside_others_that_come_and_go() {
        let decoder = decoder(&TinyModel::new());
        let embeddings = embeddings();
        let rows: Vec<&[f32]> = embeddings.iter().map(Vec::as_slice).collect();
        let mut state = decoder.prefill(&rows).unwrap();
        decoder.step(&[1, 1, 1], &mut state).unwrap();
        decoder.select(&mut state, &[2, 0, 0, 1]).unwrap();
        decoder.step(&[10, 11, 12, 13], &mut state).unwrap();
        decoder.select(&mut state, &[1, 3]).unwrap();
        let found = decoder.step(&[20, 21], &mut state).unwrap().to_vec();
        for (logits, (embedding, said)) in found.chunks_exact(259).zip([(0, [1, 11, 20]), (1, [1, 13, 21])]) {
            let alone = decoder.logits(rows[embedding], &said).unwrap();
            assert!(relative(logits, &alone[2 * 259..]) < 3e-6);
        }
        decoder.select(&mut state, &[]).unwrap();
        assert!(state.is_empty() && decoder.step(&[], &mut state).unwrap().is_empty());
    }

    #[test]
    fn what_does_not_fit_is_an_error_and_changes_nothing() {
        let decoder = decoder(&TinyModel::new());
        let [embedding, ..] = embeddings();
        assert!(decoder.prefill(&[&embedding[1..]]).err().unwrap().to_string().contains("expected 24"));
        let mut state = decoder.prefill(&[&embedding, &embedding]).unwrap();
        assert!(decoder.step(&[1], &mut state).unwrap_err().to_string().contains("1 token ids for 2 answers"));
        assert!(decoder.step(&[1, 259], &mut state).unwrap_err().to_string().contains("vocabulary"));
        assert!(decoder.select(&mut state, &[0, 2]).unwrap_err().to_string().contains("row 2"));
        let other = self::decoder(&TinyModel::new().layer("d_state", 8));
        assert!(other.step(&[1, 1], &mut state).unwrap_err().to_string().contains("another decoder"));
        let logits = decoder.step(&[1, 1], &mut state).unwrap();
        assert!(relative(&logits[..259], &decoder.logits(&embedding, &[1]).unwrap()) < 1e-5);
    }
}
