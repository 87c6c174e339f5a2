//! Inference for Mamba3-JEPA, a vision-language model that predicts the *embedding* of the answer from an image and a
//! question, with Mamba-3 state-space layers where others put Transformers.

// Only the kernels in `linalg` and `loader::load_mmap` are allowed it, each with a reason.
#![deny(unsafe_code)]

pub mod agent;
pub mod angn;
pub mod config;
pub mod episodes;
pub mod error;
pub mod files;
pub mod generate;
mod hex;
pub mod image;
mod json;
#[allow(unsafe_code, reason = "kernels for vector instructions")]
pub mod linalg;
pub mod loader;
mod mamba3;
pub mod memory;
mod nearest;
pub mod npy;
mod pooling;
pub mod predictor;
pub mod recursion;
pub mod texts;
pub mod tokenizer;
pub mod verify;
pub mod vit;
pub mod vljepa;
pub mod y_decoder;
pub mod y_encoder;

pub use error::{Error, LoadError};

/// The code of the README compiles.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
pub struct ReadmeTests;

#[cfg(test)]
#[path = "../tests/common/mod.rs"]
mod testing;
