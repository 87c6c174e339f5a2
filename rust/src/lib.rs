//! Inference for Mamba3-JEPA, a vision-language model that predicts the *embedding* of the answer from an image and a
//! question, with Mamba-3 state-space layers where others put Transformers.

pub mod config;
pub mod error;
pub mod linalg;
pub mod loader;

pub use error::{Error, LoadError};
