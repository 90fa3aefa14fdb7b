use cluster_tree::ClusterPath;

use crate::Sequence;

/// A target that is not scored: padding.
pub const IGNORE: u32 = u32::MAX;

/// Sequences side by side, padded to the longest: the input of one forward pass.
///
/// B sequences of T positions, row-major [B, T].
#[derive(Clone, Debug, Default)]
pub struct Batch {
    /// Token ids; padding repeats the last token.
    pub tokens: Vec<u32>,
    /// The position where each token's document begins, as attention's first visible key.
    pub starts: Vec<u32>,
    /// The next token of each position, [`IGNORE`] on padding.
    pub targets: Vec<u32>,
    /// Document index of each position (of the token that is read, not of the one predicted).
    pub documents: Vec<u32>,
    /// One path a sequence.
    pub paths: Vec<ClusterPath>,
    /// Positions per sequence, T.
    pub len: usize,
}

impl Batch {
    /// Lays out `sequences`, each of at least 2 tokens, ordered by path so that sequences that share a
    /// memory block stand together. The token before a document's continuation predicts nothing: what
    /// follows it in its own document is elsewhere.
    pub fn new(mut sequences: Vec<Sequence>, eot: u32) -> Self {
        sequences.sort_by(|a, b| a.path.cmp(&b.path));
        let len = sequences.iter().map(|s| s.tokens.len().saturating_sub(1)).max().unwrap_or(0);
        let mut batch = Self { len, ..Self::default() };
        for sequence in sequences {
            batch.add(&sequence, eot);
            batch.paths.push(sequence.path);
        }
        batch
    }

    fn add(&mut self, sequence: &Sequence, eot: u32) {
        let n = sequence.tokens.len() - 1;
        let (mut piece, last) = (0, sequence.tokens[n]);
        for position in 0..self.len {
            while sequence.doc_starts.get(piece + 1).is_some_and(|&next| next as usize <= position) {
                piece += 1;
            }
            self.tokens.push(if position < n { sequence.tokens[position] } else { last });
            let next_begins = sequence.doc_starts.get(piece + 1) == Some(&(position as u32 + 1));
            self.targets.push(match sequence.tokens.get(position + 1) {
                Some(&next) if !next_begins || next == eot => next,
                _ => IGNORE,
            });
            self.starts.push(sequence.doc_starts[piece]);
            self.documents.push(sequence.documents[piece]);
        }
    }

    /// Sequences, B.
    pub fn n_sequences(&self) -> usize {
        self.paths.len()
    }

    /// Targets that are scored.
    pub fn n_scored(&self) -> usize {
        self.targets.iter().filter(|&&target| target != IGNORE).count()
    }

    /// The sequences whose path is taken, in order, padded as they are.
    pub fn only(&self, takes: impl Fn(&ClusterPath) -> bool) -> Self {
        let mut batch = Self { len: self.len, ..Self::default() };
        for (i, path) in self.paths.iter().enumerate().filter(|(_, path)| takes(path)) {
            let range = i * self.len..(i + 1) * self.len;
            batch.tokens.extend(&self.tokens[range.clone()]);
            batch.starts.extend(&self.starts[range.clone()]);
            batch.targets.extend(&self.targets[range.clone()]);
            batch.documents.extend(&self.documents[range]);
            batch.paths.push(path.clone());
        }
        batch
    }

    /// The batch in parts of at most `n_sequences`, in order.
    pub fn split(&self, n_sequences: usize) -> impl Iterator<Item = Batch> + '_ {
        let tokens = n_sequences * self.len;
        self.paths.chunks(n_sequences).enumerate().map(move |(i, paths)| {
            let range = i * tokens..i * tokens + paths.len() * self.len;
            Batch {
                tokens: self.tokens[range.clone()].to_vec(),
                starts: self.starts[range.clone()].to_vec(),
                targets: self.targets[range.clone()].to_vec(),
                documents: self.documents[range].to_vec(),
                paths: paths.to_vec(),
                len: self.len,
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sequence(leaf: u32, tokens: &[u32], doc_starts: &[u32]) -> Sequence {
        Sequence {
            path: ClusterPath::new(vec![leaf]).unwrap(),
            tokens: tokens.to_vec(),
            doc_starts: doc_starts.to_vec(),
            documents: (0..doc_starts.len() as u32).map(|i| leaf * 10 + i).collect(),
        }
    }

    #[test]
    fn sequences_are_ordered_by_path_padded_and_split() {
        let batch = Batch::new(
            vec![
                sequence(7, &[0, 1, 2], &[0]),
                sequence(3, &[0, 5, 0, 6, 7], &[0, 2]),
                sequence(7, &[0, 8, 9, 0], &[0, 3]),
            ],
            0,
        );
        assert_eq!((batch.len, batch.n_sequences(), batch.n_scored()), (4, 3, 9));
        assert_eq!(batch.paths.iter().map(|p| p.leaf().index).collect::<Vec<_>>(), [3, 7, 7]);
        assert_eq!(batch.tokens[..8], [0, 5, 0, 6, 0, 1, 2, 2]);
        assert_eq!(batch.targets[..8], [5, 0, 6, 7, 1, 2, IGNORE, IGNORE]);
        assert_eq!(batch.starts[..8], [0, 0, 2, 2, 0, 0, 0, 0]);
        assert_eq!(batch.documents[..4], [30, 30, 31, 31]);
        let parts: Vec<Batch> = batch.split(2).collect();
        assert_eq!(parts.len(), 2);
        assert_eq!(parts[1].tokens, batch.tokens[8..]);
        assert_eq!(parts.iter().map(Batch::n_scored).sum::<usize>(), 9);
        let only = batch.only(|path| path.leaf().index == 7);
        assert_eq!((only.n_sequences(), only.len), (2, 4));
        assert_eq!((&only.tokens[..], &only.targets[..]), (&batch.tokens[4..], &batch.targets[4..]));
        assert_eq!((&only.starts[..], &only.documents[..]), (&batch.starts[4..], &batch.documents[4..]));
    }

    #[test]
    fn nothing_predicts_the_continuation_of_another_document() {
        let batch = Batch::new(vec![sequence(1, &[0, 5, 6, 7, 0, 8], &[0, 2, 4])], 0);
        assert_eq!(batch.targets, [5, IGNORE, 7, 0, 8]);
        assert_eq!(batch.starts, [0, 0, 2, 2, 4]);
    }
}
