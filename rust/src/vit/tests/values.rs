//! What it computes.

use super::{clip, config, config_21, encoder, exported, image, model, pixels, tensors};
use crate::config::{VisionConfig, VisionKind};
use crate::error::Error;
use crate::testing::TinyModel;
use crate::vit::reference::Reference;
use crate::vit::{PixelShape, VisionEncoder};

/// What the reference makes of random pixels: (N, D).
fn expected(model: &TinyModel, config: &VisionConfig, shape: PixelShape) -> Vec<f64> {
    let wide = |x: &[f32]| x.iter().copied().map(f64::from).collect::<Vec<_>>();
    let tensors = tensors(model).iter().map(|(name, (_, numbers))| (name.clone(), wide(numbers))).collect();
    let reference = Reference { config: config.clone(), tensors };
    let pixels = pixels(shape);
    match shape {
        PixelShape::Image { height, width } => {
            let frames = if config.kind == VisionKind::Vjepa21 { 1 } else { config.tubelet_size };
            reference.encode(&wide(&pixels.repeat(frames)), frames, height, width)
        }
        PixelShape::Clip { frames, height, width } => reference.encode(&wide(&pixels), frames, height, width),
    }
}

/// Demands that the encoder of `model` gives what the reference gives.
fn assert_equals_reference(model: &TinyModel, config: &VisionConfig, shape: PixelShape) {
    let encoder = VisionEncoder::from_weights(&exported(model)).expect("valid weights");
    let found = encoder.encode(&pixels(shape), shape).expect("a valid input");
    let expected = expected(model, config, shape);
    assert_eq!(found.len(), expected.len());
    let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
    let difference = norm(&mut found.iter().zip(&expected).map(|(&a, b)| f64::from(a) - b));
    let relative = difference / norm(&mut expected.iter().copied());
    assert!(relative < 3e-6, "{config:?}, {shape:?}: relative difference {relative:e}");
}

#[test]
fn equals_the_reference_at_awkward_sizes() {
    for (config, shape) in [
        // head size 8: a part of 2 numbers for each axis, 2 left over
        (config(16, 2, 2, 4, 2), image(4, 4)),
        (config(16, 2, 2, 4, 2), image(8, 20)),
        // 12: nothing left over
        (config(36, 3, 1, 2, 2), clip(2, 6, 2)),
        // 20: parts with an odd number of angles; three tubelets
        (config(20, 1, 2, 2, 2), clip(6, 4, 6)),
        // 7: an odd size; tubelets of one and three frames
        (config(21, 3, 2, 3, 1), clip(5, 3, 9)),
        (config(21, 3, 1, 1, 3), clip(9, 2, 5)),
        // 4: too small to rotate
        (config(8, 2, 2, 2, 2), image(6, 4)),
        // more tokens than one block of queries, and of keys
        (config(24, 2, 2, 1, 2), image(17, 19)),
        (config(24, 2, 1, 1, 1), clip(5, 16, 8)),
    ] {
        assert_equals_reference(&model(&config), &config, shape);
    }
}

#[test]
fn v_jepa_2_1_equals_the_reference_at_awkward_sizes() {
    for (config, shape) in [
        (config_21(16, 2, 2, 4, 2), image(4, 4)),
        (config_21(36, 3, 2, 4, 2), image(8, 20)),
        // a single row, a single column
        (config_21(21, 3, 2, 4, 2), image(4, 28)),
        (config_21(36, 3, 1, 2, 2), clip(2, 6, 2)),
        (config_21(20, 1, 2, 2, 2), clip(6, 4, 6)),
        // a clip of one frame is an image, also where a token of a clip has one frame
        (config_21(36, 3, 1, 3, 2), clip(1, 6, 9)),
        (config_21(36, 3, 1, 3, 1), clip(1, 6, 9)),
        (config_21(21, 3, 2, 3, 1), clip(5, 3, 9)),
        (config_21(8, 2, 2, 2, 2), image(6, 4)),
        (config_21(24, 2, 2, 1, 2), image(17, 19)),
    ] {
        assert_equals_reference(&model(&config), &config, shape);
    }
}

#[test]
fn weights_of_16_bits_are_computed_in_32() {
    for config in [config(32, 2, 2, 4, 2), config_21(32, 2, 2, 4, 2)] {
        for dtype in ["float16", "bfloat16"] {
            assert_equals_reference(&model(&config).dtype(dtype), &config, image(20, 12));
        }
    }
}

#[test]
fn the_result_does_not_depend_on_the_number_of_threads() {
    let encoder = encoder(&config(48, 3, 2, 2, 2));
    let shape = clip(4, 26, 22);
    let on = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a pool");
        pool.install(|| encoder.encode(&pixels(shape), shape)).expect("a valid input")
    };
    let one = on(1);
    assert_eq!(one, on(2));
    assert_eq!(one, on(5));
}

#[test]
fn an_image_is_a_clip_of_equal_frames() {
    let encoder = encoder(&config(16, 2, 2, 4, 2));
    let pixels = pixels(image(8, 12));
    let tokens = encoder.encode(&pixels, image(8, 12)).expect("valid");
    assert_eq!(tokens, encoder.encode(&pixels.repeat(2), clip(2, 8, 12)).expect("valid"));
    assert_eq!(tokens.len(), 2 * 3 * 16);
}

#[test]
fn an_image_has_a_branch_of_its_own_in_v_jepa_2_1() {
    let encoder = encoder(&config_21(16, 2, 2, 4, 2));
    let pixels = pixels(image(8, 12));
    let tokens = encoder.encode(&pixels, image(8, 12)).expect("valid");
    assert_eq!(tokens, encoder.encode(&pixels, clip(1, 8, 12)).expect("valid"));
    let clip_tokens = encoder.encode(&pixels.repeat(2), clip(2, 8, 12)).expect("valid");
    assert_eq!(tokens.len(), clip_tokens.len());
    assert!(tokens.iter().zip(&clip_tokens).any(|(image, clip)| (image - clip).abs() > 1e-2));
}

#[test]
fn pixels_of_another_shape_are_refused() {
    let encoder = encoder(&config(16, 2, 1, 4, 2));
    for (len, shape, message) in [
        (3 * 6 * 8, image(6, 8), "height and width must be multiples of the patch 4, found (3, 6, 8)"),
        (0, image(0, 8), "multiples of the patch 4, found (3, 0, 8)"),
        (3 * 8 * 8 - 1, image(8, 8), "191 numbers do not fill the shape, found (3, 8, 8)"),
        (3 * 3 * 8 * 8, clip(3, 8, 8), "the number of frames must be a multiple of 2, found (3, 3, 8, 8)"),
        (0, clip(0, 8, 8), "the number of frames must be a multiple of 2"),
        (0, image(1 << 40, 1 << 40), "0 numbers do not fill the shape"),
    ] {
        match encoder.encode(&vec![0.0; len], shape) {
            Err(Error::Input(text)) => assert!(text.contains(message), "{text}"),
            other => panic!("{shape:?}: {other:?}"),
        }
    }
}
