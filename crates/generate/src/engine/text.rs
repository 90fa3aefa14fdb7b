/// The text of a completion on its way out: what may become a stop text is held back until it has, or cannot.
pub(super) struct StopText {
    stops: Vec<String>,
    held: String,
}

/// What a piece of text lets go.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Shown {
    /// Text that belongs to the completion whatever follows.
    pub(super) text: String,
    /// The stop text that ends it here.
    pub(super) stop: Option<String>,
}

impl StopText {
    pub(super) fn new(stops: Vec<String>) -> Self {
        Self { stops, held: String::new() }
    }

    /// Appends a piece. The stop text that is whole first ends the completion before it, the longest of several; so
    /// it does not matter how the text is cut into pieces.
    pub(super) fn push(&mut self, piece: &str) -> Shown {
        if self.stops.is_empty() {
            return Shown { text: piece.to_owned(), stop: None };
        }
        self.held.push_str(piece);
        let places = self.stops.iter().filter_map(|stop| {
            let first = self.held.find(stop.as_str())?;
            Some((first + stop.len(), first, stop))
        });
        if let Some((_, first, stop)) = places.min() {
            let stop = stop.clone();
            self.held.truncate(first);
            return Shown { text: std::mem::take(&mut self.held), stop: Some(stop) };
        }
        let waits = self.stops.iter().map(|stop| begun(&self.held, stop)).max().unwrap_or(0);
        let held = self.held.split_off(self.held.len() - waits);
        Shown { text: std::mem::replace(&mut self.held, held), stop: None }
    }

    /// What was held back, when nothing more comes.
    pub(super) fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

/// Bytes of the longest end of `text` that `stop` begins with.
fn begun(text: &str, stop: &str) -> usize {
    let ends = stop.char_indices().map(|(end, _)| end).rev();
    ends.filter(|&end| end <= text.len()).find(|&end| text.ends_with(&stop[..end])).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use rand::{Rng, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    use super::*;

    fn shown(stops: &[&str], pieces: &[&str]) -> (Vec<String>, String, Option<String>) {
        let mut text = StopText::new(stops.iter().map(ToString::to_string).collect());
        let mut texts = vec![];
        for piece in pieces {
            let Shown { text, stop } = text.push(piece);
            texts.push(text);
            if stop.is_some() {
                return (texts, String::new(), stop);
            }
        }
        (texts, text.finish(), None)
    }

    #[test]
    fn what_may_become_a_stop_text_waits() {
        let (texts, rest, stop) = shown(&["\n\nQ:", "END"], &["a", "b\n", "\nQ", "x E", "N", "E", "ND c"]);
        assert_eq!((texts.concat().as_str(), rest.as_str()), ("ab\n\nQx EN", ""));
        assert_eq!(texts, ["a", "b", "", "\n\nQx ", "", "EN", ""]);
        assert_eq!(stop.as_deref(), Some("END"));
        let (texts, rest, stop) = shown(&["END"], &["the E", "N"]);
        assert_eq!((texts.concat().as_str(), rest.as_str(), stop), ("the ", "EN", None));
        assert_eq!(shown(&[], &["a", "b"]).0, ["a", "b"]);
    }

    #[test]
    fn any_split_of_a_text_gives_the_same_completion() {
        let mut random = ChaCha8Rng::seed_from_u64(1);
        let mut below = |n: usize| random.next_u32() as usize % n;
        let letters = ["a", "b", "é", "€"];
        for _ in 0..3_000 {
            let mut word = |most: usize| -> String { (0..=below(most)).map(|_| letters[below(4)]).collect() };
            let (whole, stops) = (word(24), [word(4), word(3)]);
            let ends: Vec<usize> = (1..whole.len()).filter(|&i| whole.is_char_boundary(i)).collect();
            let cuts = ends.into_iter().filter(|_| below(3) == 0);
            let mut pieces = vec![];
            let mut from = 0;
            for cut in cuts.chain([whole.len()]) {
                pieces.push(&whole[from..cut]);
                from = cut;
            }
            let (texts, rest, stop) = shown(&[&stops[0], &stops[1]], &pieces);
            let ends = stops.iter().filter_map(|stop| Some((whole.find(stop.as_str())?, stop)));
            let first = ends.map(|(first, stop)| (first + stop.len(), first)).min();
            let expected = first.map_or(whole.as_str(), |(_, first)| &whole[..first]);
            assert_eq!(texts.concat() + &rest, expected, "{stops:?} in {pieces:?}");
            assert_eq!(stop.is_some(), first.is_some());
            for end in 0..texts.len() {
                let (given, read) = (texts[..=end].concat(), pieces[..=end].concat());
                assert!(read.starts_with(&given) && expected.starts_with(&given));
            }
        }
    }
}
