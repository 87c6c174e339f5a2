//! Norms over the last dimension.

/// x / sqrt(mean(x²) + eps) * weight for every row of x (T, D), into out (T, D).
pub(crate) fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let dim = weight.len();
    for (x, out) in x.chunks_exact(dim).zip(out.chunks_exact_mut(dim)) {
        let scale = 1.0 / (x.iter().map(|x| x * x).sum::<f32>() / dim as f32 + eps).sqrt();
        for ((out, x), weight) in out.iter_mut().zip(x).zip(weight) {
            *out = x * scale * weight;
        }
    }
}

/// (x - mean) / sqrt(variance + eps) * weight + bias for every row of x (T, D), into out (T, D).
pub(crate) fn layer_norm(x: &[f32], weight: &[f32], bias: &[f32], eps: f32, out: &mut [f32]) {
    let dim = weight.len();
    for (x, out) in x.chunks_exact(dim).zip(out.chunks_exact_mut(dim)) {
        let mean = x.iter().sum::<f32>() / dim as f32;
        let variance = x.iter().map(|x| (x - mean) * (x - mean)).sum::<f32>() / dim as f32;
        let scale = 1.0 / (variance + eps).sqrt();
        for (((out, x), weight), bias) in out.iter_mut().zip(x).zip(weight).zip(bias) {
            *out = (x - mean) * scale * weight + bias;
        }
    }
}

/// x divided by max(its length, eps), in place.
pub(crate) fn l2_normalize(x: &mut [f32], eps: f32) {
    let length = x.iter().map(|x| x * x).sum::<f32>().sqrt().max(eps);
    for x in x {
        *x /= length;
    }
}
