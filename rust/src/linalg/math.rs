//! Elementwise functions.

/// 1 / (1 + e^-x), without overflow.
pub(crate) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}

/// x sigmoid(x).
pub(crate) fn silu(x: f32) -> f32 {
    x * sigmoid(x)
}

/// ln(1 + e^x); above 20 it is x, as in PyTorch.
pub(crate) fn softplus(x: f32) -> f32 {
    if x > 20.0 { x } else { x.exp().ln_1p() }
}
