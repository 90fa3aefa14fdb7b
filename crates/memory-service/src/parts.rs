use std::collections::VecDeque;
use std::io::IoSlice;

use bytes::{Buf, Bytes};

/// Bytes in several places, written with one call to the system.
pub(crate) struct Parts(VecDeque<Bytes>);

impl Parts {
    pub(crate) fn new(parts: impl Iterator<Item = Bytes>) -> Self {
        Self(parts.filter(|part| !part.is_empty()).collect())
    }
}

impl Buf for Parts {
    fn remaining(&self) -> usize {
        self.0.iter().map(Bytes::len).sum()
    }

    fn chunk(&self) -> &[u8] {
        self.0.front().map_or(&[], |part| part)
    }

    fn chunks_vectored<'a>(&'a self, to: &mut [IoSlice<'a>]) -> usize {
        let n = to.len().min(self.0.len());
        to.iter_mut().zip(&self.0).for_each(|(to, part)| *to = IoSlice::new(part));
        n
    }

    fn advance(&mut self, mut n_bytes: usize) {
        while n_bytes > 0 {
            let first = &mut self.0[0];
            let n = n_bytes.min(first.len());
            first.advance(n);
            n_bytes -= n;
            if first.is_empty() {
                self.0.pop_front();
            }
        }
    }
}
