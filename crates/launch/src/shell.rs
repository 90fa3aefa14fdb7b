/// A text as one word of a shell's command line, whatever it holds.
pub(crate) fn word(text: &str) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "/._-+=:,@%".contains(c);
    match !text.is_empty() && text.chars().all(is_plain) {
        true => text.to_owned(),
        // Nothing but its end means anything between single quotes.
        false => format!("'{}'", text.replace('\'', r"'\''")),
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn a_shell_reads_every_word_as_it_was() {
        let parts =
            ["", " ", "'", "\"", "$HOME", "`id`", "\\", "\n", "a", "ü", "*", "~", "!", ";", "#", "-n"];
        let mut words: Vec<String> = vec![];
        for a in parts {
            for b in parts {
                words.extend(parts.map(|c| format!("{a}{b}{c}")));
            }
        }
        for shell in ["sh", "bash"] {
            let line: Vec<String> = words.iter().map(|text| word(text)).collect();
            let script = format!("printf '%s\\0' {}", line.join(" "));
            let output = Command::new(shell).arg("-c").arg(script).output().unwrap();
            let read: Vec<&str> =
                std::str::from_utf8(&output.stdout).unwrap().split_terminator('\0').collect();
            assert_eq!(read, words);
        }
        assert_eq!((word("/opt/a-b_1.0"), word("a b")), ("/opt/a-b_1.0".into(), "'a b'".into()));
    }
}
