//! What the encoder looks at: the shape of an image or a clip, and its cutting into patches.

use rayon::prelude::*;

use crate::config::{VisionConfig, VisionKind};
use crate::error::Error;

/// Colour channels.
pub(super) const CHANNELS: usize = 3;

/// The shape of pixels. Sides in pixels, multiples of the patch; frames a multiple of the tubelet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PixelShape {
    /// (3, H, W). V-JEPA 2 sees an image as a clip of one tubelet of equal frames, V-JEPA 2.1 has a branch for images.
    Image {
        /// H.
        height: usize,
        /// W.
        width: usize,
    },
    /// (T, 3, H, W). A clip of one frame is an image to V-JEPA 2.1.
    Clip {
        /// T.
        frames: usize,
        /// H.
        height: usize,
        /// W.
        width: usize,
    },
}

/// The visual tokens of an input: so many in time, so many rows, so many columns, in this order.
#[derive(Clone, Copy)]
pub(super) struct Grid {
    /// Whether the branch for images makes them.
    pub(super) of_image_branch: bool,
    /// Frames in a token.
    pub(super) tubelet: usize,
    pub(super) time: usize,
    pub(super) rows: usize,
    pub(super) columns: usize,
}

impl Grid {
    /// The grid of pixels of this shape.
    ///
    /// # Errors
    /// [`Error::Input`] if a side is no multiple of the patch, the frames are none of the tubelet, or `len` is not the
    /// number of pixels in `shape`.
    pub(super) fn new(config: &VisionConfig, shape: PixelShape, len: usize) -> Result<Grid, Error> {
        let (frames, height, width, found) = match shape {
            PixelShape::Image { height, width } => (1, height, width, format!("({CHANNELS}, {height}, {width})")),
            PixelShape::Clip { frames, height, width } => {
                (frames, height, width, format!("({frames}, {CHANNELS}, {height}, {width})"))
            }
        };
        let invalid = |expected: String| Err(Error::Input(format!("X-Encoder: {expected}, found {found}")));
        let of_image_branch = config.kind == VisionKind::Vjepa21 && frames == 1;
        let (patch, tubelet) = (config.patch_size, if of_image_branch { 1 } else { config.tubelet_size });
        if height == 0 || width == 0 || !height.is_multiple_of(patch) || !width.is_multiple_of(patch) {
            return invalid(format!("height and width must be multiples of the patch {patch}"));
        }
        let time = match shape {
            PixelShape::Image { .. } => 1,
            PixelShape::Clip { .. } if frames > 0 && frames.is_multiple_of(tubelet) => frames / tubelet,
            PixelShape::Clip { .. } => return invalid(format!("the number of frames must be a multiple of {tubelet}")),
        };
        let expected = [CHANNELS, height, width].iter().try_fold(frames, |n, &size| n.checked_mul(size));
        if expected != Some(len) {
            return invalid(format!("{len} numbers do not fill the shape"));
        }
        Ok(Grid { of_image_branch, tubelet, time, rows: height / patch, columns: width / patch })
    }

    /// Tokens N.
    pub(super) fn tokens(self) -> usize {
        self.time * self.rows * self.columns
    }

    /// Time, row and column of a token.
    pub(super) fn position(self, token: usize) -> [usize; 3] {
        [token / self.columns / self.rows, token / self.columns % self.rows, token % self.columns]
    }
}

/// Numbers in a patch: (3, tubelet, patch, patch).
pub(super) fn patch_len(tubelet: usize, patch: usize) -> usize {
    // Where this overflows, no tensor of such a shape can be in a file, and loading fails for that.
    [tubelet, patch, patch].iter().fold(CHANNELS, |n, &size| n.saturating_mul(size))
}

/// Cuts pixels of `shape` into one row (3, tubelet, patch, patch) per token, from the token `first` on: out (n, patch_len).
pub(super) fn cut_patches(
    config: &VisionConfig,
    pixels: &[f32],
    shape: PixelShape,
    grid: Grid,
    first: usize,
    out: &mut [f32],
) {
    let (patch, tubelet) = (config.patch_size, grid.tubelet);
    let (height, width) = (grid.rows * patch, grid.columns * patch);
    // The frames of an image are all the same one.
    let frame_stride = if matches!(shape, PixelShape::Image { .. }) { 0 } else { CHANNELS * height * width };
    out.par_chunks_mut(patch_len(tubelet, patch)).enumerate().for_each(|(index, out)| {
        let [time, row, column] = grid.position(first + index);
        for (line, out) in out.chunks_exact_mut(patch).enumerate() {
            let y = row * patch + line % patch;
            let frame = time * tubelet + line / patch % tubelet;
            let channel = line / (patch * tubelet);
            let start = frame * frame_stride + (channel * height + y) * width + column * patch;
            out.copy_from_slice(&pixels[start..start + patch]);
        }
    });
}
