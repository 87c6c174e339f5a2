//! What lies in a folder of images.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use kore_vljepa::image::IMAGE_SUFFIXES;

use crate::output::{Failure, failure, shown, without_dots};

/// The visible files in a folder and in those under it that are not hidden, by the names of the files. Links to folders
/// are not followed.
#[derive(Default)]
pub(crate) struct Survey {
    /// Sorted by path.
    pub(crate) images: Vec<PathBuf>,
    /// What looks like images and is not read: how many there are, by suffix.
    unread: BTreeMap<String, usize>,
}

impl Survey {
    /// Looks at every name.
    ///
    /// # Errors
    /// A folder cannot be read.
    pub(crate) fn of(root: &Path) -> Result<Survey, Failure> {
        let mut survey = Survey::default();
        let mut folders = vec![root.to_path_buf()];
        while let Some(folder) = folders.pop() {
            let unreadable = |error| failure(format!("{}: cannot read the folder: {error}", shown(&folder)));
            for entry in fs::read_dir(&folder).map_err(unreadable)? {
                let entry = entry.map_err(unreadable)?;
                let path = entry.path();
                match entry.file_type() {
                    _ if entry.file_name().as_encoded_bytes().starts_with(b".") => {}
                    Ok(kind) if kind.is_dir() => folders.push(path),
                    Ok(_) if !path.is_dir() => survey.add(&path),
                    _ => {}
                }
            }
        }
        survey.images.sort();
        Ok(survey)
    }

    fn add(&mut self, path: &Path) {
        let suffix = suffix_of(path);
        if IMAGE_SUFFIXES.contains(&suffix.as_str()) {
            self.images.push(without_dots(path));
        } else if advice(&suffix).is_some() {
            *self.unread.entry(suffix).or_default() += 1;
        }
    }

    /// What looks like images and is not read, the most frequent first: "3 .tif, 1 .heic (no decoder ...); 2 .zip (unpack
    /// them)"; empty if there is none.
    pub(crate) fn unread(&self) -> String {
        let mut by_count: Vec<_> = self.unread.iter().collect();
        by_count.sort_by_key(|&(_, &count)| Reverse(count)); // of equal ones the first by name
        let mut by_advice: Vec<(&str, Vec<String>)> = Vec::new();
        for (suffix, count) in by_count {
            let advice = advice(suffix).unwrap_or_default();
            let counted = format!("{count} {suffix}");
            match by_advice.iter_mut().find(|(known, _)| *known == advice) {
                Some((_, counts)) => counts.push(counted),
                None => by_advice.push((advice, vec![counted])),
            }
        }
        let parts: Vec<String> =
            by_advice.iter().map(|(advice, counts)| format!("{} ({advice})", counts.join(", "))).collect();
        parts.join("; ")
    }
}

/// Suffixes of what may hold images and is not read, with the cure; as Python has them.
const ADVICE: [(&str, &str); 5] = [
    (
        ".tif .tiff .heic .heif .avif .jxl .jp2 .j2k .ico .tga .pbm .pgm .ppm .pnm .psd .svg .dib .exr",
        "no decoder for them: convert them to JPEG or PNG",
    ),
    (".hdr .dng .cr2 .cr3 .nef .arw .raw", "no decoder for them: convert them to JPEG or PNG"),
    (
        ".tar.gz .tgz .tar.bz2 .tbz .tbz2 .tar.xz .txz .tar.zst .tzst .tar.lz4 .tar.z",
        "samples are read by position, which compression hides: unpack them to .tar",
    ),
    (".zip .7z .rar .gz .bz2 .xz .zst", "unpack them"),
    (".mp4 .m4v .mov .mkv .webm .avi .mpg .mpeg", "samples are single images"),
];

/// What can be done with files of this suffix.
fn advice(suffix: &str) -> Option<&'static str> {
    ADVICE.iter().find(|(suffixes, _)| suffixes.split(' ').any(|each| each == suffix)).map(|(_, advice)| *advice)
}

/// The suffix that says what a file is, in lower case: `.jpg`, `.tar.gz`; empty if there is none.
fn suffix_of(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default().to_string_lossy().to_lowercase();
    let (stem, last) = split_suffix(&name);
    let double = format!("{}{last}", split_suffix(stem).1);
    if advice(&double).is_some() { double } else { last.to_owned() }
}

/// A name and its last suffix, as Python splits them: the dots at the beginning belong to the name.
fn split_suffix(name: &str) -> (&str, &str) {
    let dots = name.len() - name.trim_start_matches('.').len();
    name.split_at(name[dots..].rfind('.').map_or(name.len(), |at| dots + at))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_are_found_under_folders_and_sorted() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path();
        fs::create_dir_all(root.join("b/deep.png")).unwrap();
        fs::create_dir(root.join(".hidden")).unwrap();
        let shown = ["c.png", "b/z.JPG", "b/a.webp", "b/notes.txt", "b-a.jpeg", "b/deep.png/x.png", "d.jfif", "e.GIF"];
        for name in shown.into_iter().chain([".png", "b/._a.webp", ".hidden/a.png"]) {
            fs::write(root.join(name), "").unwrap();
        }
        let expected = ["b/a.webp", "b/deep.png/x.png", "b/z.JPG", "b-a.jpeg", "c.png", "d.jfif", "e.GIF"];
        assert_eq!(Survey::of(root).unwrap().images, expected.map(|name| root.join(name)));
    }

    #[test]
    fn what_looks_like_images_is_counted() {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir_all(folder.path().join("b/.hidden")).unwrap();
        let names =
            "a.tif b/c.TIF d.heic e.zip b/f.tar.gz g.x.zip .h.tif b/.hidden/i.tif j.json k.tar l .tif m.png b/n.gz";
        for name in names.split(' ') {
            fs::write(folder.path().join(name), "").unwrap();
        }
        let survey = Survey::of(folder.path()).unwrap();
        assert_eq!(survey.images, [folder.path().join("m.png")]);
        assert_eq!(
            survey.unread(),
            "2 .tif, 1 .heic (no decoder for them: convert them to JPEG or PNG); 2 .zip, 1 .gz (unpack them); \
             1 .tar.gz (samples are read by position, which compression hides: unpack them to .tar)"
        );
        assert_eq!(Survey::default().unread(), "");
    }

    #[test]
    fn suffixes_are_pythons() {
        for (name, suffix) in [
            ("a.JPG", ".jpg"),
            ("a.b.tar.GZ", ".tar.gz"),
            ("a.tar.gz.txt", ".txt"),
            ("a", ""),
            ("..a", ""),
            ("..a.gz", ".gz"),
            ("a.", "."),
            ("tar.gz", ".gz"),
            ("\u{fc}.png", ".png"),
        ] {
            assert_eq!(suffix_of(Path::new(name)), suffix, "{name}");
        }
    }
}
