use serde_json::Value;

/// Manifests as people and `kubectl` read them: YAML documents, one after the other.
pub fn to_yaml(manifests: &[Value]) -> String {
    manifests.iter().map(|manifest| format!("---\n{}", block(manifest, 0))).collect()
}

/// A value as lines that begin with `indent` blanks.
fn block(value: &Value, indent: usize) -> String {
    let blanks = " ".repeat(indent);
    match value {
        Value::Object(map) => map
            .iter()
            .map(|(key, value)| format!("{blanks}{}:{}", text(key), after_key(value, indent)))
            .collect(),
        // The first line of an item has a dash for two of its blanks.
        Value::Array(items) => {
            items.iter().map(|item| format!("{blanks}- {}", &block(item, indent + 2)[indent + 2..])).collect()
        }
        Value::String(string) => format!("{blanks}{}\n", text(string)),
        other => format!("{blanks}{other}\n"),
    }
}

fn after_key(value: &Value, indent: usize) -> String {
    match value {
        Value::Object(map) if !map.is_empty() => format!("\n{}", block(value, indent + 2)),
        Value::Array(items) if !items.is_empty() => format!("\n{}", block(value, indent)),
        Value::Object(_) | Value::Array(_) => format!(" {value}\n"),
        Value::String(string) if is_literal(string) => {
            let blanks = " ".repeat(indent + 2);
            let lines = string.lines().map(|line| match line {
                "" => "\n".to_owned(),
                line => format!("{blanks}{line}\n"),
            });
            format!(" |\n{}", lines.collect::<String>())
        }
        scalar => format!(" {}", block(scalar, 0)),
    }
}

/// Whether a text can stand line by line as it is: the first line says how deep, and one newline ends it.
fn is_literal(string: &str) -> bool {
    let ends = string.ends_with('\n') && !string.ends_with("\n\n");
    let begins = !string.starts_with([' ', '\n']);
    ends && begins && string.chars().all(|c| c == '\n' || !c.is_control())
}

/// A text without quotes where no reader takes it for anything else, as JSON where one might.
fn text(string: &str) -> String {
    const OTHER: [&str; 9] = ["y", "n", "yes", "no", "on", "off", "true", "false", "null"];
    let is_plain = string.starts_with(|c: char| c.is_ascii_alphabetic() || c == '/')
        && string.chars().all(|c| c.is_ascii_alphanumeric() || "_./-".contains(c))
        && !OTHER.contains(&string.to_lowercase().as_str());
    if is_plain { string.to_owned() } else { Value::from(string).to_string() }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn values_are_yaml() {
        let value = json!({
            "kind": "ConfigMap",
            "data": { "run.toml": "[run]\ndir = \"x\"\n\n[corpus]\n" },
            "empty": {},
            "none": [],
            "size": 3,
            "yes": "on",
            "list": ["a", "/a/b", 1, { "name": "b", "values": [75] }, ["c"]],
            "quoted": ["", "1", "a: b", "- c", "#", "x\ny", "ü", "a\"b", "True", "1e3", "~"],
        });
        let expected = r##"---
kind: ConfigMap
data:
  run.toml: |
    [run]
    dir = "x"

    [corpus]
empty: {}
none: []
size: 3
"yes": "on"
list:
- a
- /a/b
- 1
- name: b
  values:
  - 75
- - c
quoted:
- ""
- "1"
- "a: b"
- "- c"
- "#"
- "x\ny"
- "ü"
- "a\"b"
- "True"
- "1e3"
- "~"
"##;
        assert_eq!(to_yaml(&[value]), expected);
    }

    #[test]
    fn a_text_that_is_no_plain_block_is_quoted() {
        for string in ["a\nb", "a\n\n", " a\n", "\na\n", "a\tb\n", "a\r\n"] {
            let yaml = to_yaml(&[json!({ "a": string })]);
            assert_eq!(yaml, format!("---\na: {}\n", json!(string)));
        }
    }
}
