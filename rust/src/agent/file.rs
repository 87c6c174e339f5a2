//! The JSON file that names tools.

use std::collections::HashSet;
use std::fmt;
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::de::{Deserialize, DeserializeOwned, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};

use super::{CommandTool, ToolRegistry};
use crate::error::Error;
use crate::files::system_text;
use crate::texts::decoded;

/// Bytes that are read at most; a longer file does not end as JSON does.
const MAX_FILE: u64 = 1 << 24;

const KEYS: [&str; 4] = ["command", "entry_point", "timeout", "max_output"];
const DEFAULT_TIMEOUT: f64 = 10.0;
const LONGEST_TIMEOUT: f64 = 86_400.0;
const DEFAULT_OUTPUT: u64 = 65_536;
const LARGEST_OUTPUT: u64 = 1 << 30;

/// A tool as the file names it.
struct Entry {
    command: Option<Vec<String>>,
    entry_point: Option<String>,
    /// Seconds.
    timeout: f64,
    /// Bytes.
    max_output: u64,
}

/// The tools that a JSON file names, as `mamba3-jepa agent` reads it; commands run in its folder.
///
/// ```json
/// {"tools": {"calculator": {"command": ["python3", "calculator.py", "{question}"], "timeout": 5, "max_output": 1000}}}
/// ```
///
/// # Errors
/// [`Error::File`]: the file cannot be read, or an entry is not a command; names the file and the field.
pub fn read_tools(path: impl AsRef<Path>) -> Result<ToolRegistry, Error> {
    let path = path.as_ref();
    let failed = |reason: String| Error::File { path: path.to_path_buf(), reason };
    let mut bytes = Vec::new();
    let read = File::open(path).and_then(|file| file.take(MAX_FILE).read_to_end(&mut bytes));
    let folder = read.and_then(|_| Ok(fs::canonicalize(path)?.parent().map(PathBuf::from).unwrap_or_default()));
    let folder = folder.map_err(|error| failed(format!("cannot read the tools: {}", system_text(&error))))?;
    let text = decoded(&bytes).map_err(&failed)?;
    let not_json = |error| failed(format!("not JSON: {error}"));
    let value = serde_json::from_str(&text).map_err(not_json)?;
    if let Twice(Some(name)) = serde_json::from_str(&text).map_err(not_json)? {
        return Err(failed(format!("the name \"{name}\" comes twice in one object; rename or remove one of them")));
    }
    let entries =
        entries(&value).map_err(|reason| failed(format!("{reason}; see examples/tools/tools.json for an example")))?;
    let mut registry = ToolRegistry::new();
    for (name, entry) in entries {
        let command = match (entry.command, entry.entry_point) {
            (Some(command), None) => command,
            (None, Some(_)) => {
                return Err(failed(format!(
                    "tools.{name}.entry_point: Python functions run in Python; give a command"
                )));
            }
            _ => return Err(failed(format!("tools.{name}: expected either \"command\" or \"entry_point\""))),
        };
        let tool = CommandTool {
            command,
            folder: folder.clone(),
            timeout: Duration::from_secs_f64(entry.timeout),
            max_output: usize::try_from(entry.max_output).unwrap_or(usize::MAX),
        };
        registry.add(name, tool).map_err(|error| failed(error.to_string()))?;
    }
    Ok(registry)
}

/// The entries in their order, or which field is wrong, and how.
fn entries(value: &Value) -> Result<Vec<(&str, Entry)>, String> {
    let file = object("the file", value)?;
    only(file, &["tools"], "")?;
    let tools = file.get("tools").ok_or("tools: missing")?;
    object("tools", tools)?.iter().map(|(name, value)| Ok((name.as_str(), entry(name, value)?))).collect()
}

fn entry(name: &str, value: &Value) -> Result<Entry, String> {
    let place = format!("tools.{name}");
    let fields = object(&place, value)?;
    only(fields, &KEYS, &format!("{place}."))?;
    let entry = Entry {
        command: field(fields, &place, "command")?.flatten(),
        entry_point: field(fields, &place, "entry_point")?.flatten(),
        timeout: field(fields, &place, "timeout")?.unwrap_or(DEFAULT_TIMEOUT),
        max_output: field(fields, &place, "max_output")?.unwrap_or(DEFAULT_OUTPUT),
    };
    if entry.command.as_ref().is_some_and(Vec::is_empty) {
        return Err(format!("{place}.command: expected a program, and its arguments"));
    }
    if let Some(argument) = entry.command.iter().flatten().position(|argument| argument.contains('\0')) {
        return Err(format!("{place}.command.{argument}: a program can be given no zero character"));
    }
    if !(entry.timeout > 0.0 && entry.timeout <= LONGEST_TIMEOUT) {
        return Err(format!("{place}.timeout: must be greater than 0 and at most {LONGEST_TIMEOUT}"));
    }
    if !(1..=LARGEST_OUTPUT).contains(&entry.max_output) {
        return Err(format!("{place}.max_output: must be at least 1 and at most {LARGEST_OUTPUT}"));
    }
    Ok(entry)
}

/// A name that comes twice in one object of JSON: of two tools one would be lost unsaid.
struct Twice(Option<String>);

impl<'de> Deserialize<'de> for Twice {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(FindTwice)
    }
}

struct FindTwice;

impl<'de> Visitor<'de> for FindTwice {
    type Value = Twice;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("JSON")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Twice, A::Error> {
        let (mut names, mut twice) = (HashSet::new(), None);
        while let Some((name, Twice(inside))) = map.next_entry::<String, Twice>()? {
            twice = twice.or(inside).or_else(|| names.contains(&name).then(|| name.clone()));
            names.insert(name);
        }
        Ok(Twice(twice))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut values: A) -> Result<Twice, A::Error> {
        let mut twice = None;
        while let Some(Twice(inside)) = values.next_element()? {
            twice = twice.or(inside);
        }
        Ok(Twice(twice))
    }

    fn visit_bool<E>(self, _: bool) -> Result<Twice, E> {
        Ok(Twice(None))
    }

    fn visit_i64<E>(self, _: i64) -> Result<Twice, E> {
        Ok(Twice(None))
    }

    fn visit_u64<E>(self, _: u64) -> Result<Twice, E> {
        Ok(Twice(None))
    }

    fn visit_f64<E>(self, _: f64) -> Result<Twice, E> {
        Ok(Twice(None))
    }

    fn visit_str<E>(self, _: &str) -> Result<Twice, E> {
        Ok(Twice(None))
    }

    fn visit_unit<E>(self) -> Result<Twice, E> {
        Ok(Twice(None))
    }
}

fn object<'v>(place: &str, value: &'v Value) -> Result<&'v Map<String, Value>, String> {
    value.as_object().ok_or_else(|| format!("{place}: expected an object"))
}

fn only(fields: &Map<String, Value>, known: &[&str], prefix: &str) -> Result<(), String> {
    match fields.keys().find(|key| !known.contains(&key.as_str())) {
        None => Ok(()),
        Some(key) => Err(format!("{prefix}{key}: not known here; expected {}", known.join(", "))),
    }
}

fn field<T: DeserializeOwned>(fields: &Map<String, Value>, place: &str, key: &str) -> Result<Option<T>, String> {
    let value = fields.get(key).map(T::deserialize).transpose();
    value.map_err(|error| format!("{place}.{key}: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(content: &str) -> String {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tools.json");
        fs::write(&path, content).unwrap();
        let message = read_tools(&path).unwrap_err().to_string();
        message.strip_prefix(&format!("{}: ", path.display())).unwrap().to_owned()
    }

    #[test]
    fn a_bad_file_of_tools_is_refused() {
        for (content, message) in [
            ("{", "not JSON: "),
            ("", "not JSON: "),
            (r#"{"tools": {"a": {"command": ["x"], "timeout": NaN}}}"#, "not JSON: "),
            ("[]", "the file: expected an object"),
            ("{}", "tools: missing"),
            (r#"{"tools": [{}]}"#, "tools: expected an object"),
            (
                r#"{"tools": {}, "version": 1}"#,
                "version: not known here; expected tools; see examples/tools/tools.json",
            ),
            (r#"{"tools": {"a": ["x"]}}"#, "tools.a: expected an object"),
            (r#"{"tools": {"a": {}}}"#, r#"tools.a: expected either "command" or "entry_point""#),
            (r#"{"tools": {"a": {"command": null}}}"#, r#"tools.a: expected either "command" or "entry_point""#),
            (r#"{"tools": {"a": {"command": ["x"], "entry_point": "m:f"}}}"#, "tools.a: expected either"),
            (
                r#"{"tools": {"a": {"entry_point": "m:f"}}}"#,
                "tools.a.entry_point: Python functions run in Python; give a command",
            ),
            (r#"{"tools": {"a": {"entry_point": 3}}}"#, "tools.a.entry_point: invalid type: integer `3`"),
            (r#"{"tools": {"a": {"command": []}}}"#, "tools.a.command: expected a program"),
            (
                r#"{"tools": {"a": {"command": ["x", "a\u0000b"]}}}"#,
                "tools.a.command.1: a program can be given no zero character",
            ),
            (r#"{"tools": {"a": {"command": "x y"}}}"#, "tools.a.command: invalid type: string \"x y\""),
            (r#"{"tools": {"a": {"command": ["x", 3]}}}"#, "tools.a.command: invalid type: integer `3`"),
            (r#"{"tools": {"a": {"command": ["x"], "timeout": 0}}}"#, "tools.a.timeout: must be greater than 0 and at"),
            (r#"{"tools": {"a": {"command": ["x"], "timeout": 86400.5}}}"#, "tools.a.timeout: must be"),
            (r#"{"tools": {"a": {"command": ["x"], "timeout": true}}}"#, "tools.a.timeout: invalid type: boolean"),
            (r#"{"tools": {"a": {"command": ["x"], "timeout": null}}}"#, "tools.a.timeout: invalid type: null"),
            (r#"{"tools": {"a": {"command": ["x"], "max_output": -1}}}"#, "tools.a.max_output: invalid value"),
            (r#"{"tools": {"a": {"command": ["x"], "max_output": 0}}}"#, "tools.a.max_output: must be at least 1"),
            (r#"{"tools": {"a": {"command": ["x"], "max_output": 7.0}}}"#, "tools.a.max_output: invalid type: float"),
            (r#"{"tools": {"a": {"command": ["x"], "max_output": 1073741825}}}"#, "and at most 1073741824"),
            (
                r#"{"tools": {"a": {"command": ["x"], "shell": true}}}"#,
                "tools.a.shell: not known here; expected command,",
            ),
            (
                r#"{"tools": {"a": {"command": ["x"]}, "b": {"command": ["x"]}, "a": {"command": ["y"]}}}"#,
                "the name \"a\" comes twice in one object; rename or remove one of them",
            ),
            (
                r#"{"tools": {"a": {"command": ["x"], "timeout": 1, "timeout": 2.5}}}"#,
                "the name \"timeout\" comes twice",
            ),
            (r#"{"tools": {"memory": {"command": ["x"]}}}"#, "tool \"memory\": that is the memory, which is built in"),
            (r#"{"tools": {"": {"command": ["x"]}}}"#, "tool \"\": a name has 1 to 64 characters"),
        ] {
            let found = refused(content);
            assert!(found.contains(message) && !found.contains('\n'), "{content}: {found}");
        }
        let folder = tempfile::tempdir().unwrap();
        let missing = read_tools(folder.path().join("nowhere.json")).unwrap_err().to_string();
        assert!(
            missing.contains("nowhere.json: cannot read the tools: ") && !missing.contains("os error"),
            "{missing}"
        );
        let no_file = read_tools(folder.path()).unwrap_err().to_string();
        assert!(no_file.contains(": cannot read the tools: "), "{no_file}");
    }

    #[test]
    fn a_file_of_tools_is_read_in_its_order() {
        let content = r#"{"tools": {"b": {"command": ["x", "{question}"], "timeout": 2}, "a": {"command": ["y"], "max_output": 7,
            "entry_point": null}}}"#;
        let read = entries(&serde_json::from_str(content).unwrap()).map(|entries| {
            let values =
                |(name, entry): (&str, Entry)| (name.to_owned(), entry.command, entry.timeout, entry.max_output);
            entries.into_iter().map(values).collect::<Vec<_>>()
        });
        let command = |words: &[&str]| Some(words.iter().map(|&word| word.to_owned()).collect());
        let b = ("b".to_owned(), command(&["x", "{question}"]), 2.0, 65_536);
        assert_eq!(read.unwrap(), [b, ("a".to_owned(), command(&["y"]), 10.0, 7)]);
    }

    #[cfg(unix)]
    #[test]
    fn commands_run_in_the_folder_of_the_file_itself() {
        use crate::agent::ToolRequest;

        let folder = tempfile::tempdir().unwrap();
        let home = fs::canonicalize(folder.path()).unwrap().join("home");
        fs::create_dir(&home).unwrap();
        fs::write(home.join("tools.json"), "\u{feff}{\"tools\": {\"place\": {\"command\": [\"pwd\"]}}}").unwrap();
        std::os::unix::fs::symlink("home/tools.json", folder.path().join("link.json")).unwrap();
        for name in ["home/tools.json", "link.json"] {
            let registry = read_tools(folder.path().join(name)).unwrap();
            let said = registry.get("place").unwrap().call(&ToolRequest { question: None, image: None });
            assert_eq!(said.as_deref(), Ok(home.to_str().unwrap()));
        }
    }
}
