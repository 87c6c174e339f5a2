//! Where in a JSON text something is wrong.

/// What is wrong with `json`, after the key where it is: `vision.depth: invalid type: string "2", expected usize`.
pub(crate) fn reason(json: &str, error: &serde_json::Error) -> String {
    let text = error.to_string();
    let text = text.rsplit_once(" at line ").map_or(text.as_str(), |(text, _)| text);
    let before: usize = json.split_inclusive('\n').take(error.line().saturating_sub(1)).map(str::len).sum();
    let end = before.saturating_add(error.column()).min(json.len());
    let mut open = open_at(&json.as_bytes()[..end]);
    if text.starts_with("unknown field") {
        open.pop(); // the last key before it
    }
    let keys: Vec<String> = open.into_iter().flatten().collect();
    if keys.is_empty() { text.to_owned() } else { format!("{}: {text}", keys.join(".")) }
}

/// The objects and lists that are open at the end of `json`, outermost first, each with its last key.
fn open_at(json: &[u8]) -> Vec<Option<String>> {
    let mut open: Vec<Option<String>> = Vec::new();
    let mut text = String::new();
    let mut bytes = json.iter();
    while let Some(byte) = bytes.next() {
        match byte {
            b'"' => text = string(&mut bytes),
            b':' => {
                if let Some(key) = open.last_mut() {
                    *key = Some(std::mem::take(&mut text));
                }
            }
            b'{' | b'[' => open.push(None),
            b'}' | b']' => drop(open.pop()),
            _ => {}
        }
    }
    open
}

/// What lies before the closing quote; escapes stay as they are.
fn string(bytes: &mut std::slice::Iter<'_, u8>) -> String {
    let mut text = Vec::new();
    while let Some(&byte) = bytes.next() {
        match byte {
            b'"' => break,
            b'\\' => text.extend(std::iter::once(byte).chain(bytes.next().copied())),
            _ => text.push(byte),
        }
    }
    String::from_utf8_lossy(&text).into_owned()
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    #[expect(dead_code, reason = "only read")]
    struct Outer {
        first: Inner,
        list: Vec<u8>,
        second: Inner,
    }

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    #[expect(dead_code, reason = "only read")]
    struct Inner {
        a: usize,
        b: String,
    }

    #[track_caller]
    fn assert_reason(json: &str, expected: &str) {
        let error = serde_json::from_str::<Outer>(json).expect_err("damaged");
        assert_eq!(reason(json, &error), expected);
    }

    #[test]
    fn the_key_is_named() {
        let good = r#"{"first": {"a": 1, "b": "x\"}: {"}, "list": [1, 2], "second": {"a": 2, "b": "y"}}"#;
        serde_json::from_str::<Outer>(good).expect("nothing is wrong");
        let change = |from: &str, to: &str| good.replacen(from, to, 1);
        assert_reason(&change("\"a\": 2", "\"a\": \"2\""), "second.a: invalid type: string \"2\", expected usize");
        assert_reason(&change("\"a\": 1", "\"a\": -1"), "first.a: invalid value: integer `-1`, expected usize");
        assert_reason(&change("[1, 2]", "[1, 300]"), "list: invalid value: integer `300`, expected u8");
        assert_reason(&change("\"y\"", "null"), "second.b: invalid type: null, expected a string");
        assert_reason(&change("\"a\": 2, ", ""), "second: missing field `a`");
        assert_reason(&change("\"list\": [1, 2], ", ""), "missing field `list`");
        assert_reason(&change("\"a\": 2", "\"c\": 2"), "second: unknown field `c`, expected `a` or `b`");
        assert_reason(&change("\"y\"", "\"y\", \"c\": 2"), "second: unknown field `c`, expected `a` or `b`");
        assert_reason(&change("{\"a\": 2, \"b\": \"y\"}", "{}"), "second: missing field `a`");
        let lines = change("\"a\": 2", "\n\"a\":\n\n null").replace(", ", ",\n");
        assert_reason(&lines, "second.a: invalid type: null, expected usize");
        assert_reason("", "EOF while parsing a value");
        assert_reason(&good[..30], "first.b: EOF while parsing a string");
    }
}
