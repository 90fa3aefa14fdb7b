//! The card of a bank of memory that is handed over.

use std::collections::BTreeMap;

const TEMPLATE: &str = include_str!("model_card.md");

/// The names of all places of the card; model_card.md says what each is.
pub fn card_places() -> Vec<&'static str> {
    places(TEMPLATE.split("<!--").next().unwrap_or(TEMPLATE))
}

/// The model card with a value in each of its places, by name; model_card.md says what each is.
///
/// # Errors
/// The names of places without a value, and of values without a place.
pub fn model_card(values: &BTreeMap<String, String>) -> Result<String, String> {
    // The comment that explains the places is not part of the card.
    let template = TEMPLATE.split("<!--").next().unwrap_or(TEMPLATE).trim_end();
    // What stands between the first two lines of dashes is YAML.
    let rest = template.strip_prefix("---\n").unwrap_or(template);
    let (head, body) = rest.split_once("\n---\n").unwrap_or(("", rest));
    let mut missing = vec![];
    let head = filled(
        head,
        |key| {
            let value = values.get(key)?;
            let is_number = key.ends_with("_ppl") && value.parse::<f64>().is_ok();
            // A JSON string is one of YAML, too.
            Some(if is_number { value.clone() } else { serde_json::Value::from(value.as_str()).to_string() })
        },
        &mut missing,
    );
    let body = filled(body, |key| values.get(key).cloned(), &mut missing);
    let places = card_places();
    let unknown: Vec<&str> = values.keys().map(String::as_str).filter(|key| !places.contains(key)).collect();
    match (missing.is_empty(), unknown.is_empty()) {
        (true, true) => Ok(format!("---\n{head}\n---\n{body}\n")),
        (false, _) => Err(format!("nothing is known of {}", missing.join(", "))),
        (true, false) => Err(format!("expected places of the card, found {}", unknown.join(", "))),
    }
}

/// The text with every place `{name}` replaced; names without a value are added to `missing`.
fn filled(text: &str, value: impl Fn(&str) -> Option<String>, missing: &mut Vec<String>) -> String {
    let mut out = String::with_capacity(text.len() * 2);
    let mut rest = text;
    while let Some((before, key, after)) = next_place(rest) {
        out.push_str(before);
        match value(key) {
            Some(value) => out.push_str(&value),
            None if missing.iter().any(|known| known == key) => {}
            None => missing.push(key.into()),
        }
        rest = after;
    }
    out + rest
}

/// What is before the first place, its name, and what is after it.
fn next_place(text: &str) -> Option<(&str, &str, &str)> {
    let is_name = |name: &str| !name.is_empty() && name.chars().all(|c| c.is_ascii_lowercase() || c == '_');
    text.match_indices('{').find_map(|(at, _)| {
        let (name, after) = text[at + 1..].split_once('}')?;
        is_name(name).then_some((&text[..at], name, after))
    })
}

/// The names of the places of a text.
fn places(text: &str) -> Vec<&str> {
    let (mut names, mut rest) = (vec![], text);
    while let Some((_, name, after)) = next_place(rest) {
        names.push(name);
        rest = after;
    }
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values() -> BTreeMap<String, String> {
        card_places().into_iter().map(|key| (key.to_string(), format!("<{key}>"))).collect()
    }

    #[test]
    fn every_place_is_filled_and_the_explanation_left_out() {
        let mut values = values();
        values.insert("learned_ppl".into(), "31.25".into());
        values.insert("name".into(), "a \"bank\"".into());
        let card = model_card(&values).unwrap();
        assert!(card.starts_with("---\nlicense: \"<license>\"\n"), "{card}");
        assert!(card.contains("value: 31.25\n") && card.contains("- name: \"a \\\"bank\\\"\"\n"), "{card}");
        assert!(card.contains("# a \"bank\"\n"), "{card}");
        assert!(!card.contains("<!--") && places(&card).is_empty(), "{card}");
    }

    #[test]
    fn what_is_missing_or_unknown_is_named() {
        let mut values = values();
        values.remove("seed");
        values.remove("kind");
        assert_eq!(model_card(&values).unwrap_err(), "nothing is known of kind, seed");
        let mut values = self::values();
        values.insert("colour".into(), "blue".into());
        assert_eq!(model_card(&values).unwrap_err(), "expected places of the card, found colour");
    }
}
