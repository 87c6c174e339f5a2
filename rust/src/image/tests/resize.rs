//! The resize against a slow one in 64-bit integers that looks at the whole picture, one output at a time.

use super::super::Picture;
use super::noise;

/// Weights of one output pixel over a whole axis, 2^22 to the unit, rounded half away from zero.
fn weights(length: usize, side: usize, size: usize, output: usize) -> Vec<i64> {
    let scale = side as f64 / size as f64;
    let width = scale.max(1.0);
    let centre = (length - side) as f64 / 2.0 + (output as f64 + 0.5) * scale;
    let (first, end) = ((centre - 2.0 * width + 0.5).max(0.0).floor(), (centre + 2.0 * width + 0.5).floor());
    let raw: Vec<f64> = (0..length)
        .map(|i| {
            let x = ((i as f64 + 0.5 - centre) / width).abs();
            if (i as f64) < first || i as f64 >= end {
                0.0
            } else if x < 1.0 {
                1.5 * x.powi(3) - 2.5 * x.powi(2) + 1.0
            } else if x < 2.0 {
                -0.5 * x.powi(3) + 2.5 * x.powi(2) - 4.0 * x + 2.0
            } else {
                0.0
            }
        })
        .collect();
    let sum: f64 = raw.iter().sum();
    raw.iter().map(|weight| (weight / sum * f64::from(1 << 22)).round() as i64).collect()
}

fn weighted(samples: impl Iterator<Item = u8>, weights: &[i64]) -> u8 {
    let sum: i64 = samples.zip(weights).map(|(sample, weight)| i64::from(sample) * weight).sum();
    ((sum + (1 << 21)) >> 22).clamp(0, 255) as u8
}

/// Planar, as `to_pixels`.
fn reference(picture: &Picture, size: usize) -> Vec<u8> {
    let (width, height, side) = (picture.width, picture.height, picture.width.min(picture.height));
    let mut pixels = Vec::new();
    for channel in 0..3 {
        let at = |x: usize, y: usize| picture.rgb[3 * (y * width + x) + channel];
        let columns: Vec<Vec<u8>> = (0..size)
            .map(|output| {
                let weights = weights(width, side, size, output);
                (0..height).map(|y| weighted((0..width).map(|x| at(x, y)), &weights)).collect()
            })
            .collect();
        for output in 0..size {
            let weights = weights(height, side, size, output);
            pixels.extend(columns.iter().map(|column| weighted(column.iter().copied(), &weights)));
        }
    }
    pixels
}

#[test]
fn it_is_the_slow_one_at_awkward_shapes() {
    for (width, height) in
        [(1, 1), (1, 7), (9, 1), (2, 3), (33, 20), (20, 33), (17, 120), (121, 40), (64, 65), (31, 32)]
    {
        let picture = noise(width, height);
        for size in [1, 2, 17, 32, 41] {
            let different =
                picture.to_pixels(size).iter().zip(reference(&picture, size)).filter(|(a, b)| **a != *b).count();
            assert_eq!(different, 0, "{width} x {height} to {size}");
        }
    }
}

#[test]
fn half_the_size_of_a_ramp_is_a_ramp() {
    let rgb = (0..8).flat_map(|_| (0..16).flat_map(|x| [x * 10, 7, 255])).collect();
    let pixels = Picture { width: 16, height: 8, rgb }.to_pixels(4);
    // the square starts at column 4; an output lies between two columns, in the middle of a straight line
    assert_eq!(pixels[..4], [45, 65, 85, 105]);
    assert_eq!((&pixels[16..32], &pixels[32..48]), ([7; 16].as_slice(), [255; 16].as_slice()));
}

#[test]
fn a_picture_of_the_size_is_only_taken_apart() {
    let picture = noise(5, 5);
    let pixels = picture.to_pixels(5);
    for (place, rgb) in picture.rgb.chunks_exact(3).enumerate() {
        assert_eq!(rgb, [pixels[place], pixels[25 + place], pixels[50 + place]]);
    }
}

#[test]
fn a_very_long_picture_is_cheap() {
    let picture = Picture { width: 20_000_001, height: 1, rgb: [9, 8, 7].repeat(20_000_001) };
    let pixels = picture.to_pixels(64);
    assert!(pixels.chunks_exact(64 * 64).zip([9, 8, 7]).all(|(plane, value)| plane.iter().all(|byte| *byte == value)));
}
