//! Changing a saved memory in its file: what is added, and what is removed.

use std::path::Path;

use super::lock::FileLock;
use super::{Entry, KnowledgeMemory};
use crate::error::Error;
use crate::files::path_text;
use crate::vljepa::Mamba3Jepa;

/// How much was added and changed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// Facts and episodes that were not there.
    pub added: usize,
    /// Episodes that have a new answer.
    pub changed: usize,
}

impl KnowledgeMemory {
    /// Puts all that this memory of `model` holds into the one at `path`, which is made if need be; equal entries are not
    /// doubled. Returns what changed, and what is there now.
    ///
    /// # Errors
    /// As for [`KnowledgeMemory::load`] and [`KnowledgeMemory::save`]; [`Error::File`] if another command has been changing
    /// the file for seconds.
    pub fn add_to(&self, model: &Mamba3Jepa, path: impl AsRef<Path>) -> Result<(Changes, KnowledgeMemory), Error> {
        let path = path.as_ref();
        let _lock = FileLock::take(path)?;
        let (changes, memory) = match path.exists() {
            true => {
                let mut memory = Self::load(model, path)?;
                (memory.join(self), memory)
            }
            false => (Changes { added: self.len(), changed: 0 }, self.clone()),
        };
        memory.save(path)?;
        Ok((changes, memory))
    }

    /// Takes the entries that `is_meant` out of the memory at `path`; `numbers` are demanded to be there. Returns what was
    /// removed, and what is left.
    ///
    /// # Errors
    /// As for [`KnowledgeMemory::read`] and [`KnowledgeMemory::save`]; [`Error::File`] if there is no such entry, or another
    /// command has been changing the file for seconds. The file is unchanged then.
    pub fn remove_from(
        path: impl AsRef<Path>,
        numbers: &[i64],
        text: Option<&str>,
    ) -> Result<(Vec<Entry>, KnowledgeMemory), Error> {
        let path = path.as_ref();
        let failed = |reason: String| Error::File { path: path.to_path_buf(), reason };
        let _lock = FileLock::take(path)?;
        let memory = Self::read(path)?;
        let (name, there) = (path_text(path), memory.len());
        let place = |&number: &i64| usize::try_from(number).ok().filter(|number| (1..=there).contains(number));
        if let Some(missing) = numbers.iter().find(|number| place(number).is_none()) {
            return Err(failed(format!(
                "there is no entry {missing}: it has {there}; memory list {name} gives their numbers"
            )));
        }
        let numbers: Vec<usize> = numbers.iter().filter_map(place).collect();
        let is_meant = |entry: &Entry| numbers.contains(&entry.number) || text == Some(entry.text.as_str());
        let (removed, left): (Vec<Entry>, Vec<Entry>) = memory.entries().into_iter().partition(is_meant);
        if removed.is_empty() {
            let text = text.unwrap_or_default();
            return Err(failed(format!("there is no entry with the text {text:?}; memory list {name} shows all")));
        }
        let left = memory.only(&left.iter().map(|entry| entry.number - 1).collect::<Vec<_>>());
        left.save(path)?;
        Ok((removed, left))
    }
}
