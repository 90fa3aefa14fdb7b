use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError};
use std::time::{Duration, Instant};

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

/// Has frames sent to one other worker, beside what the caller does; what goes wrong shows in what arrives.
pub(crate) trait Sending: Send {
    fn send(&mut self, frame: Frame);
    /// Lets the other hear that this one is at work.
    fn is_alive(&mut self);
}

/// A connection to one other worker.
pub(crate) struct Link {
    out: Box<dyn Sending>,
    arriving: Receiver<io::Result<Frame>>,
    /// What has been looked at before it was asked for.
    early: VecDeque<io::Result<Frame>>,
    /// Since `began`, when something of a message came last, in milliseconds.
    heard: Arc<AtomicU64>,
    began: Instant,
}

impl Link {
    /// `heard` is kept up by whoever feeds `arriving`, for messages that take long.
    pub(crate) fn new(
        out: Box<dyn Sending>,
        arriving: Receiver<io::Result<Frame>>,
        (heard, began): (Arc<AtomicU64>, Instant),
    ) -> Self {
        Self { out, arriving, early: VecDeque::new(), heard, began }
    }

    /// The next frame; an error of the kind `TimedOut` when nothing came for longer than `patience`.
    fn receive(&mut self, patience: Duration) -> io::Result<Frame> {
        if let Some(frame) = self.early.pop_front() {
            return frame;
        }
        let asked = self.began.elapsed();
        loop {
            let heard = Duration::from_millis(self.heard.load(Ordering::Relaxed)).max(asked);
            let left = (heard + patience).saturating_sub(self.began.elapsed());
            if left.is_zero() {
                return Err(io::ErrorKind::TimedOut.into());
            }
            match self.arriving.recv_timeout(left) {
                Ok(frame) => return frame,
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return Err(ended()),
            }
        }
    }

    /// Whether the other has given up or is gone, as far as has been heard, without waiting.
    fn is_over(&mut self) -> bool {
        loop {
            match self.arriving.try_recv() {
                Ok(frame) => self.early.push_back(frame),
                Err(TryRecvError::Empty) => break,
                Err(TryRecvError::Disconnected) => {
                    if self.early.iter().all(|frame| frame.is_ok()) {
                        self.early.push_back(Err(ended()));
                    }
                    break;
                }
            }
        }
        let is_end = |frame: &io::Result<Frame>| !matches!(frame, Ok(Frame::Message(..)));
        match self.early.iter().position(is_end) {
            // The messages before it will not be asked for.
            Some(end) => {
                self.early.drain(..end);
                true
            }
            None => false,
        }
    }
}

fn ended() -> io::Error {
    io::Error::other("its thread ended")
}

/// A worker's connections to all others; one thread owns them. After an error they are of no more use.
pub struct Mesh {
    rank: usize,
    /// By rank; `None` for its own.
    links: Vec<Option<Link>>,
    patience: Duration,
    is_over: bool,
    /// When the others last heard that this one is at work.
    told: Instant,
}

impl Mesh {
    pub(crate) fn new(rank: usize, links: Vec<Option<Link>>, patience: Duration) -> Self {
        Self { rank, links, patience, is_over: false, told: Instant::now() }
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
                link.out.send(Frame::Message(call.clone(), message.clone()));
            }
        }
        let mut received = messages;
        for (rank, slot) in received.iter_mut().enumerate() {
            match self.receive(rank, call) {
                Ok(Some(message)) => *slot = message,
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

    /// Fails when another worker has given up or is gone, without waiting: for who waits for something else,
    /// which may never come then. The others learn that this one is at work, and do not call it late.
    ///
    /// # Errors
    /// As [`Mesh::exchange`].
    pub fn check(&mut self, call: &Call) -> Result<()> {
        if self.told.elapsed() > self.patience / 4 {
            self.told = Instant::now();
            self.links.iter_mut().flatten().for_each(|link| link.out.is_alive());
        }
        for rank in 0..self.links.len() {
            if self.links[rank].as_mut().is_some_and(Link::is_over)
                && let Err(error) = self.receive(rank, call)
            {
                self.give_up(&error.to_string(), !error.is_transient());
                return Err(error);
            }
        }
        Ok(())
    }

    /// Tells the others why this worker goes no further, and whether that is final: that it would not help
    /// to go on from the last checkpoint.
    pub fn give_up(&mut self, reason: &str, is_final: bool) {
        if !std::mem::replace(&mut self.is_over, true) {
            let frame = Frame::GiveUp { reason: reason.to_owned(), is_final };
            self.links.iter_mut().flatten().for_each(|link| link.out.send(frame.clone()));
        }
    }

    /// The message of one rank; `None` from this one.
    fn receive(&mut self, rank: usize, call: &Call) -> Result<Option<Bytes>> {
        let Some(link) = &mut self.links[rank] else { return Ok(None) };
        let (waiting, call) = (self.rank, call.clone());
        match link.receive(self.patience) {
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
