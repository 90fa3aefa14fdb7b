/// Longest label of a DNS name (RFC 1035).
pub(super) const MAX_LABEL: usize = 63;

/// Whether a text is a label of a DNS name that begins with a letter (RFC 1035, section 2.3.1), as names of
/// services and of all that becomes one must be.
pub(super) fn is_label(text: &str) -> bool {
    text.starts_with(|c: char| c.is_ascii_lowercase()) && is_part_of_host(text)
}

/// Whether a text is a DNS name, of labels that may begin with a digit (RFC 1123), as other names must be.
pub(super) fn is_name(text: &str) -> bool {
    text.len() <= 253 && text.split('.').all(is_part_of_host)
}

pub(super) fn is_part_of_host(text: &str) -> bool {
    let inside = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    (1..=MAX_LABEL).contains(&text.len())
        && text.chars().all(inside)
        && !text.starts_with('-')
        && !text.ends_with('-')
}

/// Whether a text may be the value of a label.
pub(super) fn is_label_value(text: &str) -> bool {
    let ends = |c: char| c.is_ascii_alphanumeric();
    let is_inside = text.chars().all(|c| ends(c) || "-_.".contains(c));
    text.is_empty()
        || (text.len() <= MAX_LABEL && is_inside && text.starts_with(ends) && text.ends_with(ends))
}

/// Whether a text may be the key of a label: a name, perhaps after a DNS name and `/`.
pub(super) fn is_label_key(text: &str) -> bool {
    match text.split_once('/') {
        Some((prefix, name)) => is_name(prefix) && !name.is_empty() && is_label_value(name),
        None => !text.is_empty() && is_label_value(text),
    }
}

/// Whether a text may be the name of a port: letters, digits and `-`, 15 at most, a letter among them (RFC 6335,
/// section 5.1).
pub(super) fn is_port_name(text: &str) -> bool {
    text.len() <= 15
        && is_part_of_host(text)
        && !text.contains("--")
        && text.contains(|c: char| c.is_ascii_lowercase())
}

/// Whether a text may be the name of a variable.
pub(super) fn is_variable(text: &str) -> bool {
    let inside = |c: char| c.is_ascii_alphanumeric() || c == '_';
    !text.is_empty() && text.chars().all(inside) && !text.starts_with(|c: char| c.is_ascii_digit())
}

/// A quantity such as `500m`, `1.5`, `64Gi` or `2e3`, as a number; `None` if it is none, or is not above 0.
pub(super) fn quantity(text: &str) -> Option<f64> {
    const SUFFIXES: [(&str, f64); 15] = [
        ("Ki", 1024.0),
        ("Mi", 1_048_576.0),
        ("Gi", 1_073_741_824.0),
        ("Ti", 1_099_511_627_776.0),
        ("Pi", 1_125_899_906_842_624.0),
        ("Ei", 1_152_921_504_606_846_976.0),
        ("n", 1e-9),
        ("u", 1e-6),
        ("m", 1e-3),
        ("k", 1e3),
        ("M", 1e6),
        ("G", 1e9),
        ("T", 1e12),
        ("P", 1e15),
        ("E", 1e18),
    ];
    let suffix = SUFFIXES.into_iter().find_map(|(suffix, factor)| Some((text.strip_suffix(suffix)?, factor)));
    let (digits, factor) = suffix.unwrap_or((text, 1.0));
    let is_number = digits.starts_with(|c: char| c.is_ascii_digit() || c == '.')
        && digits.chars().all(|c| c.is_ascii_digit() || ".eE+-".contains(c));
    // An exponent is a suffix too, and there is one at most.
    if !is_number || (factor != 1.0 && digits.contains(['e', 'E'])) {
        return None;
    }
    digits.parse::<f64>().ok().map(|number| number * factor).filter(|number| *number > 0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_follow_their_rules() {
        let long = "a".repeat(64);
        type Case<'a> = (fn(&str) -> bool, &'a [&'a str], &'a [&'a str]);
        let table: [Case; 6] = [
            (is_label, &["a", "a-1", &long[1..]], &["", "1a", "A", "a.b", "a_b", "-a", "a-", "ä", &long]),
            (is_name, &["1a", "a.b-c.1"], &["", "a..b", ".a", "a_b", "A"]),
            (is_label_value, &["", "A_b.c-1"], &["-a", "a-", "a/b", "a b", &long]),
            (is_label_key, &["a", "kueue.x-k8s.io/queue-name", "A_b"], &["", "a/", "/a", "A.b/c", "a/b/c"]),
            (
                is_port_name,
                &["http", "grpc-2", "1a"],
                &["", "12", "a--b", "sixteen-letters-", "a234567890123456"],
            ),
            (is_variable, &["_A", "a1"], &["", "1a", "a-b", "a.b"]),
        ];
        for (i, (rule, good, bad)) in table.into_iter().enumerate() {
            for text in good {
                assert!(rule(text), "{i}: {text}");
            }
            for text in bad {
                assert!(!rule(text), "{i}: {text}");
            }
        }
    }

    #[test]
    fn quantities_are_numbers_with_a_suffix() {
        for (text, expected) in [
            ("8", 8.0),
            ("500m", 0.5),
            ("1.5", 1.5),
            ("64Gi", 68_719_476_736.0),
            ("2e3", 2000.0),
            ("1E", 1e18),
            (".5k", 500.0),
        ] {
            assert_eq!(quantity(text), Some(expected), "{text}");
        }
        for text in ["", "0", "-1", "64GB", "64 Gi", "Gi", "1e3k", "inf", "nan", "1..2", "8cores", "+1"] {
            assert_eq!(quantity(text), None, "{text}");
        }
    }
}
