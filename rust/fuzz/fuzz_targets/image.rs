//! Any bytes as a picture, down to the pixels the model sees.

#![no_main]

use kore_vljepa::image::decode;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(picture) = decode(bytes) {
        assert_eq!(picture.to_pixels(16).len(), 3 * 16 * 16);
    }
});
