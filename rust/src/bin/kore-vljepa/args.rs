//! Arguments that several commands share.

use std::ffi::OsString;

use crate::output::{Failure, failure};

/// The arguments with hyphens in the names of flags: `--image_dir` is `--image-dir`.
pub(crate) fn with_hyphens(arguments: impl IntoIterator<Item = OsString>) -> Vec<OsString> {
    let mut flags_end = false;
    arguments
        .into_iter()
        .map(|argument| {
            flags_end |= argument == "--";
            match argument.to_str() {
                Some(text) if text.starts_with("--") && !flags_end => {
                    let (name, value) = text.split_at(text.find('=').unwrap_or(text.len()));
                    (name.replace('_', "-") + value).into()
                }
                _ => argument,
            }
        })
        .collect()
}

/// Refuses a place to compute other than the CPU.
pub(crate) fn check_device(device: &str) -> Result<(), Failure> {
    match device {
        "cpu" => Ok(()),
        _ => Err(failure(format!("--device {device}: not available here; this program computes on the cpu"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn underscores_in_names_of_flags_only() {
        let given = ["x", "--image_dir", "a_b", "--on_bad_sample=a_b", "-x_y", "--", "--a_b"].map(OsString::from);
        let expected = ["x", "--image-dir", "a_b", "--on-bad-sample=a_b", "-x_y", "--", "--a_b"].map(OsString::from);
        assert_eq!(with_hyphens(given), expected);
    }
}
