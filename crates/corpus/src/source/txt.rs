//! Plain text files.

use std::io::BufRead;

use super::lines::Lines;
use super::{Document, TxtSplit, file_name};
use crate::{Error, Result};

/// The documents of a plain text file. A document's id is `<file name>:<first line>`.
pub(super) struct TxtDocuments<R> {
    lines: Lines<R>,
    split: TxtSplit,
    limit: usize,
}

impl<R: BufRead> TxtDocuments<R> {
    /// Divides `lines` by `split`; a document longer than `limit` bytes is an error.
    pub(super) fn new(lines: Lines<R>, split: TxtSplit, limit: usize) -> Self {
        Self { lines, split, limit }
    }

    fn next_document(&mut self) -> Result<Option<Document>> {
        let mut text = String::new();
        let mut first = 0;
        while let Some((number, line)) = self.lines.next_line()? {
            let blank = line.trim().is_empty();
            if blank && text.is_empty() && self.split != TxtSplit::File {
                continue;
            }
            if blank && self.split == TxtSplit::Paragraph {
                break;
            }
            if text.is_empty() {
                first = number;
            }
            text.push_str(line);
            if text.len() > self.limit {
                return Err(Error::TooLong {
                    url: self.lines.url().to_owned(),
                    line: number,
                    limit: self.limit,
                });
            }
            if self.split == TxtSplit::Line {
                break;
            }
        }
        if text.is_empty() {
            return Ok(None);
        }
        if self.split != TxtSplit::File {
            text.truncate(text.trim_end_matches(['\r', '\n']).len());
        }
        let id = format!("{}:{first}", file_name(self.lines.url()));
        Ok(Some(Document { id, label: None, text }))
    }
}

impl<R: BufRead> Iterator for TxtDocuments<R> {
    type Item = Result<Document>;

    fn next(&mut self) -> Option<Self::Item> {
        self.next_document().transpose()
    }
}
