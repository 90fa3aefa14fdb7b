//! Lines of bounded length.

use std::io::{BufRead, Read};

use crate::{Error, Result};

/// The lines of a UTF-8 stream, numbered from 1, each with its terminator.
pub(super) struct Lines<R> {
    reader: R,
    url: String,
    number: u64,
    limit: usize,
    buffer: Vec<u8>,
}

impl<R: BufRead> Lines<R> {
    /// The lines of `reader`, the content of `url`; one longer than `limit` bytes is an error.
    pub(super) fn new(reader: R, url: &str, limit: usize) -> Self {
        Self { reader, url: url.to_owned(), number: 0, limit, buffer: Vec::new() }
    }

    /// The file.
    pub(super) fn url(&self) -> &str {
        &self.url
    }

    /// The next line and its number; `None` at the end of the file.
    pub(super) fn next_line(&mut self) -> Result<Option<(u64, &str)>> {
        self.buffer.clear();
        self.number += 1;
        let line = self.number;
        let mut bounded = (&mut self.reader).take(self.limit as u64 + 1);
        bounded
            .read_until(b'\n', &mut self.buffer)
            .map_err(|source| Error::reading(&self.url, line, source))?;
        if self.buffer.is_empty() {
            return Ok(None);
        }
        if self.buffer.len() > self.limit {
            return Err(Error::TooLong { url: self.url.clone(), line, limit: self.limit });
        }
        match std::str::from_utf8(&self.buffer) {
            Ok(text) => Ok(Some((line, text))),
            Err(e) => Err(Error::Utf8 { url: self.url.clone(), record: line, byte: e.valid_up_to() }),
        }
    }
}
