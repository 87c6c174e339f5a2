//! One golden file, of which every tensor must be asked for.

use std::collections::BTreeSet;
use std::path::Path;

use crate::error::LoadError;
use crate::loader::{FORMAT_VERSIONS, Weights, load_safetensors};
use crate::mamba3::trace::Traced;

use super::{ComponentReport, Difference};

/// What golden files call themselves.
const FORMAT: &str = "mamba3-jepa-golden";
/// Largest difference of a tensor in float32, as a share of its length.
const BOUND: f64 = 1e-4;
/// Mean difference of the pixels of a lossy picture, as `image::decode` states it, over 255.
const LOSSY_MEAN_BOUND: f64 = 0.4 / 255.0;
/// Largest difference of such a pixel: what `image::decode` states, and a little for what resizing makes of it.
const LOSSY_BOUND: f64 = 6.0 / 255.0;

/// The tensors of one golden file: inputs, and what must come out of them.
pub(super) struct Golden {
    name: String,
    weights: Weights,
    left: BTreeSet<String>,
    inputs: usize,
    compared: usize,
    differences: Vec<Difference>,
}

impl Golden {
    /// Opens `{name}.safetensors` in a folder of golden files.
    ///
    /// # Errors
    /// [`LoadError`] if there is no such file, it is damaged, or not the golden file of this component.
    pub(super) fn open(folder: &Path, name: &str) -> Result<Golden, LoadError> {
        let weights = load_safetensors(folder.join(format!("{name}.safetensors")))?;
        let said = |key: &str| weights.metadata().get(key).map_or("none", String::as_str);
        let (format, version, component) = (said("format"), said("format_version"), said("component"));
        if format != FORMAT || !FORMAT_VERSIONS.contains(&version) || component != name {
            return Err(LoadError::Mismatch {
                path: weights.path().to_path_buf(),
                reason: format!(
                    "format {format:?} version {version} of {component:?}: expected {FORMAT:?} version {} of {name:?}; \
                     export again with --golden",
                    FORMAT_VERSIONS.join(" or ")
                ),
            });
        }
        let left = weights.tensors().keys().cloned().collect();
        Ok(Golden { name: name.into(), weights, left, inputs: 0, compared: 0, differences: Vec::new() })
    }

    /// What the header says under `key`.
    pub(super) fn metadata(&self, key: &str) -> Result<&str, LoadError> {
        let said = self.weights.metadata().get(key).map(String::as_str);
        said.ok_or_else(|| self.mismatch(&format!("its metadata have no {key}; export again with --golden")))
    }

    /// Whether the file has a tensor.
    pub(super) fn has(&self, key: &str) -> bool {
        self.weights.tensors().contains_key(key)
    }

    /// The size of a tensor's dimension `axis`.
    pub(super) fn size(&self, key: &str, axis: usize) -> Result<usize, LoadError> {
        let shape = self.weights.tensors().get(key).map(|info| &info.shape);
        let size = shape.and_then(|shape| shape.get(axis)).copied();
        size.ok_or_else(|| self.mismatch(&format!("{key}: missing, or without a dimension {axis}")))
    }

    /// A tensor that is read, not compared.
    pub(super) fn input(&mut self, key: &str) -> Result<Vec<f32>, LoadError> {
        let numbers = self.weights.to_f32(key)?;
        self.mark_input(key);
        Ok(numbers)
    }

    /// A mask that is read, not compared.
    pub(super) fn input_mask(&mut self, key: &str) -> Result<Vec<bool>, LoadError> {
        Ok(self.input_bytes(key)?.into_iter().map(|x| x != 0).collect())
    }

    /// Bytes that are read, not compared.
    pub(super) fn input_bytes(&mut self, key: &str) -> Result<Vec<u8>, LoadError> {
        let bytes = self.weights.to_u8(key)?;
        self.mark_input(key);
        Ok(bytes)
    }

    /// Token ids that are read, not compared.
    pub(super) fn input_ids(&mut self, key: &str) -> Result<Vec<u32>, LoadError> {
        let ids = self.ids(key)?;
        self.mark_input(key);
        Ok(ids)
    }

    /// Compares numbers: the length of their difference over the length of what the file has.
    pub(super) fn check(&mut self, key: &str, found: &[f32]) -> Result<(), LoadError> {
        let expected = self.expected(key, found.len())?;
        self.record(key, relative(found, &expected, |a, b| a - b), BOUND);
        Ok(())
    }

    /// Compares angles, on the circle.
    pub(super) fn check_angles(&mut self, key: &str, found: &[f32]) -> Result<(), LoadError> {
        let expected = self.expected(key, found.len())?;
        self.record(key, relative(found, &expected, |a, b| 2.0 * ((a - b) / 2.0).sin()), BOUND);
        Ok(())
    }

    /// Compares logarithms of probabilities, as probabilities: near 0 a logarithm of f32 numbers has no relative
    /// precision.
    pub(super) fn check_log_probs(&mut self, key: &str, found: &[f32]) -> Result<(), LoadError> {
        let probabilities = |logs: &[f32]| logs.iter().map(|log| log.exp()).collect::<Vec<_>>();
        let expected = probabilities(&self.expected(key, found.len())?);
        self.record(key, relative(&probabilities(found), &expected, |a, b| a - b), BOUND);
        Ok(())
    }

    /// Compares what a trace gives under `{prefix}.{name}`.
    pub(super) fn check_traced(&mut self, prefix: &str, traced: &Traced) -> Result<(), LoadError> {
        for (name, numbers) in traced {
            let key = format!("{prefix}.{name}");
            match name.ends_with("theta") {
                true => self.check_angles(&key, numbers)?,
                false => self.check(&key, numbers)?,
            }
        }
        Ok(())
    }

    /// Compares ids, which must be the same: the difference is the share of those that are not.
    pub(super) fn check_ids(&mut self, key: &str, found: &[u32]) -> Result<(), LoadError> {
        let expected = self.ids(key)?;
        self.record(key, share(found, &expected), 0.0);
        Ok(())
    }

    /// Compares bytes, which must be the same.
    pub(super) fn check_bytes(&mut self, key: &str, found: &[u8]) -> Result<(), LoadError> {
        let expected = self.weights.to_u8(key)?;
        self.record(key, share(found, &expected), 0.0);
        Ok(())
    }

    /// Compares pixels of a lossy format, which decoders round differently: the mean and the largest difference, as shares
    /// of 255.
    pub(super) fn check_pixels(&mut self, key: &str, found: &[u8]) -> Result<(), LoadError> {
        let expected = self.weights.to_u8(key)?;
        if expected.len() != found.len() {
            return Err(self.wrong_size(key, found.len(), expected.len()));
        }
        let differences = || found.iter().zip(&expected).map(|(a, b)| a.abs_diff(*b));
        let mean = differences().map(u64::from).sum::<u64>() as f64 / found.len().max(1) as f64;
        self.record(key, mean / 255.0, LOSSY_MEAN_BOUND);
        self.record(key, f64::from(differences().max().unwrap_or(0)) / 255.0, LOSSY_BOUND);
        Ok(())
    }

    /// The report on the file.
    ///
    /// # Errors
    /// [`LoadError::UnknownKey`] for a tensor that nothing asked for.
    pub(super) fn finish(self) -> Result<ComponentReport, LoadError> {
        if let Some(key) = self.left.first() {
            return Err(LoadError::UnknownKey {
                path: self.weights.path().to_path_buf(),
                key: key.clone(),
                more: self.left.len() - 1,
            });
        }
        let worst = self.differences.into_iter().max_by(|a, b| a.severity().total_cmp(&b.severity()));
        Ok(ComponentReport { component: self.name, compared: self.compared, inputs: self.inputs, worst })
    }

    /// That the file is not what it should be.
    pub(super) fn mismatch(&self, reason: &str) -> LoadError {
        LoadError::Mismatch { path: self.weights.path().to_path_buf(), reason: reason.into() }
    }

    fn ids(&self, key: &str) -> Result<Vec<u32>, LoadError> {
        let ids = self.weights.to_i64(key)?.into_iter().map(u32::try_from).collect::<Result<_, _>>();
        ids.map_err(|_| self.mismatch(&format!("{key}: it has a number that is no token id")))
    }

    fn expected(&self, key: &str, found: usize) -> Result<Vec<f32>, LoadError> {
        let expected = self.weights.to_f32(key)?;
        match expected.len() == found {
            true => Ok(expected),
            false => Err(self.wrong_size(key, found, expected.len())),
        }
    }

    fn wrong_size(&self, key: &str, computed: usize, found: usize) -> LoadError {
        self.mismatch(&format!(
            "{key}: {found} numbers, but this model computes {computed}; export again with --golden"
        ))
    }

    fn mark_input(&mut self, key: &str) {
        self.inputs += usize::from(self.left.remove(key));
    }

    fn record(&mut self, key: &str, value: f64, bound: f64) {
        self.compared += usize::from(self.left.remove(key));
        self.differences.push(Difference { tensor: key.into(), value, bound });
    }
}

/// Length of the difference over length of what is expected; the plain length of the difference where that is zero.
fn relative(found: &[f32], expected: &[f32], difference: impl Fn(f64, f64) -> f64) -> f64 {
    let pairs = || found.iter().zip(expected).map(|(&a, &b)| (f64::from(a), f64::from(b)));
    let off = pairs().map(|(a, b)| difference(a, b).powi(2)).sum::<f64>().sqrt();
    let length = pairs().map(|(_, b)| b * b).sum::<f64>().sqrt();
    if length > 0.0 { off / length } else { off }
}

/// Share of the places, over the longer of both, where they differ.
fn share<T: PartialEq>(found: &[T], expected: &[T]) -> f64 {
    let longer = found.len().max(expected.len());
    let same = found.iter().zip(expected).filter(|(a, b)| a == b).count();
    (longer - same) as f64 / longer.max(1) as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use safetensors::Dtype;
    use safetensors::tensor::TensorView;

    /// A golden file of floats, angles, ids and bytes; `left` is one that no test asks for.
    fn golden(folder: &Path) -> Golden {
        let floats: Vec<u8> = [3.0_f32, 4.0].iter().flat_map(|x| x.to_le_bytes()).collect();
        let ids: Vec<u8> = [7_i64, 8, 9].iter().flat_map(|x| x.to_le_bytes()).collect();
        let views = [
            ("floats", Dtype::F32, vec![2], floats.as_slice()),
            ("angles", Dtype::F32, vec![2], &floats),
            ("ids", Dtype::I64, vec![3], &ids),
            ("bytes", Dtype::U8, vec![4], &[0, 100, 200, 255]),
            ("left", Dtype::U8, vec![1], &[0]),
        ];
        let views = views.map(|(key, dtype, shape, bytes)| (key, TensorView::new(dtype, shape, bytes).unwrap()));
        let metadata = [("format", FORMAT), ("format_version", "2"), ("component", "part"), ("said", "yes")];
        let metadata = metadata.map(|(key, value)| (key.to_owned(), value.to_owned())).into_iter().collect();
        std::fs::write(folder.join("part.safetensors"), safetensors::serialize(views, Some(metadata)).unwrap())
            .unwrap();
        std::fs::copy(folder.join("part.safetensors"), folder.join("other.safetensors")).unwrap();
        Golden::open(folder, "part").unwrap()
    }

    /// The difference that a check of `golden` records last.
    fn difference(golden: &Golden) -> f64 {
        golden.differences.last().unwrap().value
    }

    #[test]
    fn differences_are_relative_on_the_circle_or_shares() {
        let folder = tempfile::tempdir().unwrap();
        let mut golden = golden(folder.path());
        golden.check("floats", &[3.0, 4.5]).unwrap();
        assert!((difference(&golden) - 0.1).abs() < 1e-9);
        let turn = std::f32::consts::TAU;
        golden.check_angles("angles", &[3.0 - turn, 4.0 + turn]).unwrap();
        assert!(difference(&golden) < 1e-6);
        golden.check_angles("angles", &[3.0, 4.0 + 0.5 * turn]).unwrap();
        assert!((difference(&golden) - 0.4).abs() < 1e-6);
        golden.check_ids("ids", &[7, 0, 9]).unwrap();
        assert!((difference(&golden) - 1.0 / 3.0).abs() < 1e-9);
        golden.check_ids("ids", &[7, 8]).unwrap();
        assert!((difference(&golden) - 1.0 / 3.0).abs() < 1e-9);
        golden.check_bytes("bytes", &[0, 100, 200, 255]).unwrap();
        assert_eq!(difference(&golden), 0.0);
        golden.check_pixels("bytes", &[0, 102, 200, 255]).unwrap();
        assert!((difference(&golden) - 2.0 / 255.0).abs() < 1e-9);
        golden.input_mask("left").unwrap();
        let report = golden.finish().unwrap();
        assert_eq!((report.compared, report.inputs), (4, 1));
        assert!(!report.is_within_bound());
        assert_eq!(report.worst.unwrap().value, 1.0 / 3.0, "ids have no room at all");
    }

    #[test]
    fn log_probabilities_are_compared_as_probabilities() {
        let folder = tempfile::tempdir().unwrap();
        let mut golden = golden(folder.path());
        golden.check_log_probs("floats", &[3.0, 4.0 + 1e-6]).unwrap();
        assert!(difference(&golden) < 2e-6);
        golden.check_log_probs("floats", &[3.0, 4.0 + 0.01]).unwrap();
        // e^4 grows by 1 %, and is nearly all of the length
        assert!((difference(&golden) - 0.01005 * 0.938).abs() < 2e-4, "{}", difference(&golden));
    }

    #[test]
    fn numbers_that_are_not_numbers_are_no_match() {
        let folder = tempfile::tempdir().unwrap();
        let mut golden = golden(folder.path());
        golden.check("floats", &[3.0, f32::NAN]).unwrap();
        golden.check("angles", &[3.0, 4.0]).unwrap();
        golden.input_ids("ids").unwrap();
        golden.input_bytes("bytes").unwrap();
        golden.input_bytes("left").unwrap();
        let report = golden.finish().unwrap();
        assert!(!report.is_within_bound() && report.worst.unwrap().value.is_nan());
    }

    #[test]
    fn what_is_missing_left_over_or_of_another_size_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let mut golden = golden(folder.path());
        assert!(matches!(golden.check("none", &[0.0]), Err(LoadError::MissingKey { .. })));
        assert!(golden.check("floats", &[3.0]).unwrap_err().to_string().contains("floats: 2 numbers"));
        assert!(golden.metadata("more").unwrap_err().to_string().contains("no more"));
        for key in ["floats", "angles"] {
            golden.check(key, &[3.0, 4.0]).unwrap();
        }
        golden.input_ids("ids").unwrap();
        golden.input_bytes("bytes").unwrap();
        let error = golden.finish().unwrap_err();
        assert!(matches!(&error, LoadError::UnknownKey { key, more: 0, .. } if key == "left"), "{error}");
        let error = Golden::open(folder.path(), "other").err().unwrap();
        assert!(matches!(error, LoadError::Mismatch { .. }), "{error}");
    }
}
