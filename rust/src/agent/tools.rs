//! Tools that an agent may call, by their names.

use std::fmt::{self, Debug, Formatter};
use std::path::Path;

use crate::config::{LONGEST_TOOL_NAME, MEMORY_TOOL};
use crate::error::Error;
use crate::texts::strip;

/// A tool failed; the text says how. The agent goes on without it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct ToolError(pub String);

/// What a tool is asked.
#[derive(Clone, Copy, Debug)]
pub struct ToolRequest<'a> {
    /// `None` where the image is to be described.
    pub question: Option<&'a str>,
    /// Its absolute path; `None` without image, or where it lies in no file.
    pub image: Option<&'a Path>,
}

/// Anything that answers a question about an image in words; closures are tools too.
pub trait Tool: Send + Sync {
    /// The result; empty if there is none.
    ///
    /// # Errors
    /// [`ToolError`]: it failed.
    fn call(&self, request: &ToolRequest<'_>) -> Result<String, ToolError>;
}

impl<F> Tool for F
where
    F: Fn(&ToolRequest<'_>) -> Result<String, ToolError> + Send + Sync,
{
    fn call(&self, request: &ToolRequest<'_>) -> Result<String, ToolError> {
        self(request)
    }
}

/// Tools by name, in their order. "memory" is the agent's own and cannot be named.
#[derive(Default)]
pub struct ToolRegistry {
    tools: Vec<(String, Box<dyn Tool>)>,
}

impl ToolRegistry {
    /// No tools.
    pub fn new() -> ToolRegistry {
        ToolRegistry::default()
    }

    /// Adds a tool behind the others.
    ///
    /// # Errors
    /// [`Error::Input`]: the name is empty, too long, taken, or "memory".
    pub fn add(&mut self, name: impl Into<String>, tool: impl Tool + 'static) -> Result<(), Error> {
        let name = name.into();
        if strip(&name).is_empty() || name.chars().count() > LONGEST_TOOL_NAME {
            return Err(Error::Input(format!("tool {name:?}: a name has 1 to {LONGEST_TOOL_NAME} characters")));
        }
        if name == MEMORY_TOOL {
            return Err(Error::Input(format!(
                "tool \"{name}\": that is the memory, which is built in (--memory); choose another name"
            )));
        }
        if self.get(&name).is_some() {
            return Err(Error::Input(format!("tool \"{name}\": there is one of that name already")));
        }
        self.tools.push((name, Box::new(tool)));
        Ok(())
    }

    /// The tool of that name.
    pub fn get(&self, name: &str) -> Option<&dyn Tool> {
        self.tools.iter().find(|(other, _)| other == name).map(|(_, tool)| tool.as_ref())
    }

    /// The names in their order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tools.iter().map(|(name, _)| name.as_str())
    }
}

impl Debug for ToolRegistry {
    fn fmt(&self, out: &mut Formatter<'_>) -> fmt::Result {
        out.debug_list().entries(self.names()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn silent(_: &ToolRequest<'_>) -> Result<String, ToolError> {
        Ok(String::new())
    }

    #[test]
    fn a_name_is_taken_once_and_not_the_memory_s() {
        let mut registry = ToolRegistry::new();
        let mut add = |name: &str| registry.add(name, silent).map_err(|error| error.to_string());
        assert_eq!((add("b"), add("a"), add(&"ö".repeat(64))), (Ok(()), Ok(()), Ok(())));
        for (name, message) in [
            ("a", "tool \"a\": there is one of that name already"),
            ("memory", "tool \"memory\": that is the memory, which is built in (--memory); choose another name"),
            ("", "tool \"\": a name has 1 to 64 characters"),
            (" \u{1c}", "a name has 1 to 64 characters"),
            (&"a".repeat(65), "a name has 1 to 64 characters"),
        ] {
            let refused = add(name).unwrap_err();
            assert!(refused.ends_with(message), "{refused}");
        }
        assert_eq!(registry.names().take(2).collect::<Vec<_>>(), ["b", "a"]);
        assert!(registry.get("a").is_some() && registry.get("memory").is_none());
    }
}
