use std::fmt;
use std::io;
use std::time::Duration;

use bytes::Bytes;

use crate::{Error, Result};

/// What a worker does with the others: named in messages, and the same on all of them at a time.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Call {
    /// Such as `gradients`.
    pub what: String,
    /// The step.
    pub step: u64,
}

impl Call {
    /// A call in a step.
    pub fn new(what: &str, step: u64) -> Self {
        Self { what: what.to_owned(), step }
    }
}

impl fmt::Display for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of step {}", self.what, self.step)
    }
}

/// What goes from one worker to another.
#[derive(Clone, Debug)]
pub(crate) enum Frame {
    /// A message of a call.
    Message(Call, Bytes),
    /// The last one: why nothing more comes.
    GiveUp { reason: String, is_final: bool },
}

/// A connection to one other worker.
pub(crate) trait Link: Send {
    /// Has a frame sent beside what the caller does; what goes wrong shows in `receive`.
    fn send(&mut self, frame: Frame);
    /// Waits for the next frame; an error of the kind `TimedOut` when nothing came for too long.
    fn receive(&mut self) -> io::Result<Frame>;
}

/// A worker's connections to all others; one thread owns them. After an error they are of no more use.
pub struct Mesh {
    rank: usize,
    /// By rank; `None` for its own.
    links: Vec<Option<Box<dyn Link>>>,
    patience: Duration,
    is_over: bool,
}

impl Mesh {
    pub(crate) fn new(rank: usize, links: Vec<Option<Box<dyn Link>>>, patience: Duration) -> Self {
        Self { rank, links, patience, is_over: false }
    }

    /// Of a job of one worker.
    pub fn alone() -> Self {
        Self::new(0, vec![None], Duration::ZERO)
    }

    /// This worker's place among all, from 0.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// Workers.
    pub fn world_size(&self) -> usize {
        self.links.len()
    }

    /// Sends `messages[r]` to rank r and returns what each rank has sent to this one. All ranks make the
    /// same calls in the same order.
    ///
    /// # Errors
    /// When another rank is late, gone, or in another call: every rank learns of it, with the rank that it
    /// began with.
    pub fn exchange(&mut self, call: &Call, messages: Vec<Bytes>) -> Result<Vec<Bytes>> {
        debug_assert_eq!(messages.len(), self.world_size());
        for (link, message) in self.links.iter_mut().zip(&messages) {
            if let Some(link) = link {
                link.send(Frame::Message(call.clone(), message.clone()));
            }
        }
        let mut received = messages;
        for rank in 0..self.links.len() {
            match self.receive(rank, call) {
                Ok(Some(message)) => received[rank] = message,
                Ok(None) => {}
                Err(error) => {
                    self.give_up(&error.to_string(), !error.is_transient());
                    return Err(error);
                }
            }
        }
        Ok(received)
    }

    /// Sends the same to all, and returns what each rank has sent.
    ///
    /// # Errors
    /// As [`Mesh::exchange`].
    pub fn all_gather(&mut self, call: &Call, mine: Bytes) -> Result<Vec<Bytes>> {
        self.exchange(call, vec![mine; self.world_size()])
    }

    /// Waits until all are here.
    ///
    /// # Errors
    /// As [`Mesh::exchange`].
    pub fn barrier(&mut self, call: &Call) -> Result<()> {
        self.all_gather(call, Bytes::new()).map(|_| ())
    }

    /// Tells the others why this worker goes no further, and whether that is final: that it would not help
    /// to go on from the last checkpoint.
    pub fn give_up(&mut self, reason: &str, is_final: bool) {
        if !std::mem::replace(&mut self.is_over, true) {
            let frame = Frame::GiveUp { reason: reason.to_owned(), is_final };
            self.links.iter_mut().flatten().for_each(|link| link.send(frame.clone()));
        }
    }

    /// The message of one rank; `None` from this one.
    fn receive(&mut self, rank: usize, call: &Call) -> Result<Option<Bytes>> {
        let Some(link) = &mut self.links[rank] else { return Ok(None) };
        let (waiting, call) = (self.rank, call.clone());
        match link.receive() {
            Ok(Frame::Message(found, message)) if found == call => Ok(Some(message)),
            Ok(Frame::Message(found, _)) => Err(Error::OutOfStep { rank, waiting, expected: call, found }),
            Ok(Frame::GiveUp { reason, is_final }) => Err(Error::GaveUp { rank, reason, is_final }),
            Err(error) if matches!(error.kind(), io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock) => {
                Err(Error::Late { rank, waiting, seconds: self.patience.as_secs(), call })
            }
            Err(error) => Err(Error::Gone { rank, waiting, reason: error.to_string(), call }),
        }
    }
}
