use crate::{Result, Tokenizer};

/// Tokens of a window whose text is not certain, from which on it is cut, and at which it is given up to be.
const LONG_WINDOW: usize = 8;
const LONGEST_WINDOW: usize = 32;

/// The text of tokens that come one at a time, with work for each that does not grow with their number.
///
/// What [`push`](TextStream::push) and [`finish`](TextStream::finish) return is together what [`Tokenizer::decode`]
/// makes of all tokens, for tokenizers whose tokens are bytes; others may spell bytes that are no UTF-8 otherwise.
#[derive(Clone, Debug, Default)]
pub struct TextStream {
    /// The tokens whose text is not certain yet, behind one that only serves them as context.
    window: Vec<u32>,
    /// Bytes of the window's text that were returned, or are the context's.
    n_given: usize,
}

impl TextStream {
    /// A stream of what follows the token `last`, whose text is not returned again.
    ///
    /// # Errors
    /// On an id that the vocabulary does not have.
    pub fn behind(tokenizer: &Tokenizer, last: Option<u32>) -> Result<Self> {
        match last.filter(|_| tokenizer.joins()) {
            None => Ok(Self::default()),
            Some(last) => Ok(Self { window: vec![last], n_given: tokenizer.decode(&[last])?.len() }),
        }
    }

    /// Appends a token and returns the text that has become certain: what may be the beginning of a character waits
    /// for its end.
    ///
    /// # Errors
    /// On an id that the vocabulary does not have.
    pub fn push(&mut self, tokenizer: &Tokenizer, token: u32) -> Result<String> {
        self.window.push(token);
        let text = tokenizer.decode(&self.window)?;
        // Of bytes that are no character, only the last run can still become one.
        let waits = if text.ends_with(char::REPLACEMENT_CHARACTER) && self.window.len() < LONGEST_WINDOW {
            char::REPLACEMENT_CHARACTER.len_utf8()
        } else {
            0
        };
        let end = (text.len() - waits).max(self.n_given.min(text.len()));
        // A decoder that changes text it has made before cannot have it back: the change is lost.
        let certain = text.get(self.n_given..end).unwrap_or_default().to_owned();
        self.n_given = end;
        if waits == 0 {
            self.window = vec![token];
            self.n_given = tokenizer.decode(&self.window)?.len();
        } else if self.window.len() > LONG_WINDOW {
            self.cut(tokenizer, &text)?;
        }
        Ok(certain)
    }

    /// The text that still waits, as it is without more tokens. The stream is then as new.
    ///
    /// # Errors
    /// None that [`push`](TextStream::push) has not returned.
    pub fn finish(&mut self, tokenizer: &Tokenizer) -> Result<String> {
        let text = tokenizer.decode(&self.window)?;
        let rest = text.get(self.n_given..).unwrap_or_default().to_owned();
        *self = Self::default();
        Ok(rest)
    }

    /// Takes the tokens off the window's front whose text has been returned, where the text of both parts is that of
    /// the whole: there no character is cut.
    fn cut(&mut self, tokenizer: &Tokenizer, text: &str) -> Result<()> {
        for n in (1..self.window.len()).rev() {
            let (front, back) = (tokenizer.decode(&self.window[..n])?, tokenizer.decode(&self.window[n..])?);
            if front.len() <= self.n_given && text.strip_prefix(&front) == Some(&back) {
                self.window.drain(..n);
                self.n_given -= front.len();
                break;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use rand::{Rng, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    use super::*;

    fn tokenizer() -> Tokenizer {
        let texts = ["the cat sat on the mat", "naïve façade: 東京 🦀 東京 🦀"];
        Tokenizer::train(texts.iter().cycle().take(20).map(|text| Ok((*text).to_owned())), 300, 1 << 20)
            .unwrap()
    }

    fn streamed(tokenizer: &Tokenizer, tokens: &[u32]) -> (Vec<String>, usize) {
        let (mut stream, mut longest) = (TextStream::default(), 0);
        let mut pieces: Vec<String> = tokens
            .iter()
            .map(|&token| {
                let piece = stream.push(tokenizer, token).unwrap();
                longest = longest.max(stream.window.len());
                piece
            })
            .collect();
        pieces.push(stream.finish(tokenizer).unwrap());
        (pieces, longest)
    }

    #[test]
    fn pieces_are_the_text_of_all_tokens_whatever_they_are() {
        let tokenizer = tokenizer();
        let mut random = ChaCha8Rng::seed_from_u64(3);
        let crab = tokenizer.encode("a 🦀東").unwrap();
        for case in 0..400 {
            let n = random.next_u32() as usize % 60;
            // Any bytes, bytes that begin or go on with characters, and characters between them.
            let mut tokens: Vec<u32> = vec![];
            while tokens.len() < n {
                match random.next_u32() % 4 {
                    0 if case % 2 == 0 => tokens.extend(&crab),
                    1 => tokens.push(crab[random.next_u32() as usize % crab.len()]),
                    _ => tokens.push(1 + random.next_u32() % (tokenizer.vocab_size() as u32 - 1)),
                }
            }
            let (pieces, longest) = streamed(&tokenizer, &tokens);
            assert_eq!(pieces.concat(), tokenizer.decode(&tokens).unwrap(), "{tokens:?}");
            assert!(longest <= LONG_WINDOW + 1, "a window of {longest} tokens");
        }
    }

    #[test]
    fn half_a_character_waits_for_its_end() {
        let tokenizer = tokenizer();
        let byte = |byte: u8| {
            let ids = 1..tokenizer.vocab_size() as u32;
            // The 256 bytes stand alone in the vocabulary, in an order of their own.
            let spelled =
                |id: &u32| byte.is_ascii() && tokenizer.decode(&[*id]).unwrap().as_bytes() == [byte];
            ids.clone().find(spelled)
        };
        let crab = tokenizer.encode("é€").unwrap();
        let (pieces, _) = streamed(&tokenizer, &crab);
        assert_eq!(pieces.concat(), "é€");
        assert!(pieces.iter().all(|piece| !piece.contains('\u{fffd}')), "{pieces:?}");
        let (pieces, _) = streamed(&tokenizer, &crab[..crab.len() - 1]);
        assert_eq!(pieces.concat(), "é\u{fffd}", "what never ends is told at the end");
        assert_eq!(pieces.last().unwrap(), "\u{fffd}");
        let plain = [byte(b'a').unwrap(), byte(b'!').unwrap()];
        assert_eq!(streamed(&tokenizer, &plain).0, ["a", "!", ""]);
        assert!(TextStream::default().push(&tokenizer, 9999).is_err());
    }
}
