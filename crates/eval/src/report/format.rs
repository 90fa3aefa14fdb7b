//! Numbers and text as a reader sees them.

/// Stands for a number that there is not.
pub(super) const ABSENT: &str = "–";
/// Narrow no-break space, between a number and its unit.
const THIN: char = '\u{202f}';

/// `text` fit for HTML and XML, in an element or between quotes. Characters that XML forbids become U+FFFD.
pub(super) fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            '\n' | '\t' => out.push(c),
            '\u{fffe}' | '\u{ffff}' => out.push('\u{fffd}'),
            c if c.is_control() => out.push('\u{fffd}'),
            c => out.push(c),
        }
    }
    out
}

/// At most `n` characters of `text`, the last of them "…" where some are left off.
pub(super) fn shorten(text: &str, n: usize) -> String {
    match text.char_indices().nth(n) {
        None => text.to_string(),
        Some(_) => text.chars().take(n.saturating_sub(1)).chain(['…']).collect(),
    }
}

/// `value` with `digits` decimals and a true minus sign.
pub(super) fn decimal(value: f64, digits: usize) -> String {
    if !value.is_finite() {
        return ABSENT.into();
    }
    let text = format!("{value:.digits$}");
    match text.strip_prefix('-') {
        Some(zero) if zero.bytes().all(|b| matches!(b, b'0' | b'.')) => zero.into(),
        Some(rest) => format!("−{rest}"),
        None => text,
    }
}

/// A share from 0 to 1 in percent, without the sign.
pub(super) fn percent(share: f64, digits: usize) -> String {
    decimal(share * 100.0, digits)
}

/// A share for a sentence: "41 %", and "3.2 %" where a whole number would be too coarse.
pub(super) fn spoken_percent(share: f64) -> String {
    let text = percent(share, usize::from(share < 0.0995));
    format!("{}{THIN}%", text.strip_suffix(".0").unwrap_or(&text))
}

/// A perplexity, at about four figures.
pub(super) fn perplexity(value: f64) -> String {
    match value {
        v if !v.is_finite() => ABSENT.into(),
        v if v < 99.995 => decimal(v, 2),
        v if v < 999.95 => decimal(v, 1),
        v => compact(v),
    }
}

/// Three significant figures and a unit: 18,278,400 is "18.3 M".
pub(super) fn compact(value: f64) -> String {
    if !value.is_finite() {
        return ABSENT.into();
    }
    let units = [(1e12, 'T'), (1e9, 'B'), (1e6, 'M'), (1e3, 'k')];
    // 999,600 rounds to 1,000 k, which is 1 M.
    let Some(&(size, unit)) = units.iter().find(|(size, _)| value.abs() >= size * 0.9995) else {
        return trimmed(value);
    };
    match value.abs() / size < 1e6 {
        true => format!("{}{THIN}{unit}", trimmed(value / size)),
        false => format!("{value:.2e}"),
    }
}

/// Three significant figures at most, without trailing zeros.
fn trimmed(value: f64) -> String {
    let digits = match value.abs() {
        v if v < 9.995 => 2,
        v if v < 99.95 => 1,
        _ => 0,
    };
    let text = decimal(value, digits);
    match text.contains('.') {
        true => text.trim_end_matches('0').trim_end_matches('.').to_string(),
        false => text,
    }
}

/// A whole number with commas between its thousands.
pub fn count(value: u64) -> String {
    let digits = value.to_string();
    let mut out = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

/// "1 book", "2 books".
pub(super) fn plural(n: u64, noun: &str) -> String {
    format!("{} {noun}{}", count(n), if n == 1 { "" } else { "s" })
}

/// "a", "a and b", "a, b and c".
pub(super) fn sentence_list(items: &[String]) -> String {
    match items {
        [] => String::new(),
        [one] => one.clone(),
        [rest @ .., last] => format!("{} and {last}", rest.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn markup_is_escaped_and_what_xml_forbids_is_replaced() {
        assert_eq!(escape("<a b='1' c=\"2\">&\n"), "&lt;a b=&#39;1&#39; c=&quot;2&quot;&gt;&amp;\n");
        assert_eq!(escape("x\0y\u{1b}z\u{ffff}é"), "x\u{fffd}y\u{fffd}z\u{fffd}é");
    }

    #[test]
    fn numbers_read_well() {
        assert_eq!(decimal(-0.001, 2), "0.00");
        assert_eq!(decimal(-1.5, 1), "−1.5");
        assert_eq!(decimal(f64::NAN, 1), "–");
        assert_eq!(compact(18_278_400.0), "18.3\u{202f}M");
        assert_eq!(compact(999_600.0), "1\u{202f}M");
        assert_eq!(compact(2_500.0), "2.5\u{202f}k");
        assert_eq!(compact(0.0), "0");
        assert_eq!(compact(100.0), "100");
        assert_eq!(compact(1e300), "1.00e300");
        assert_eq!(perplexity(14.234), "14.23");
        assert_eq!(perplexity(f64::INFINITY), "–");
        assert_eq!(spoken_percent(0.412), "41\u{202f}%");
        assert_eq!(spoken_percent(0.032), "3.2\u{202f}%");
        assert_eq!(spoken_percent(0.0), "0\u{202f}%");
        assert_eq!(count(0), "0");
        assert_eq!(count(1_234_567), "1,234,567");
        assert_eq!(count(123), "123");
    }

    #[test]
    fn text_is_cut_between_characters() {
        assert_eq!(shorten("größer", 6), "größer");
        assert_eq!(shorten("größer", 4), "grö…");
        assert_eq!(sentence_list(&["a".into(), "b".into(), "c".into()]), "a, b and c");
    }
}
