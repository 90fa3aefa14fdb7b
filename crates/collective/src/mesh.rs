use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError, channel};
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
    GiveUp { reason: String, cause: Option<String> },
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

    /// For how long nothing has been heard.
    fn silence(&self) -> Duration {
        self.began.elapsed().saturating_sub(Duration::from_millis(self.heard.load(Ordering::Relaxed)))
    }

    /// The next frame, if one comes before `limit` is over.
    fn receive(&mut self, limit: Duration) -> io::Result<Option<Frame>> {
        if let Some(frame) = self.early.pop_front() {
            return frame.map(Some);
        }
        match self.arriving.recv_timeout(limit) {
            Ok(frame) => frame.map(Some),
            Err(RecvTimeoutError::Timeout) => Ok(None),
            Err(RecvTimeoutError::Disconnected) => Err(ended()),
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
    /// What is waited for beside the others, and since when.
    waits: Option<(Call, Instant)>,
}

impl Mesh {
    pub(crate) fn new(rank: usize, links: Vec<Option<Link>>, patience: Duration) -> Self {
        Self { rank, links, patience, is_over: false, told: Instant::now(), waits: None }
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
        self.waits = None;
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
                Err(error) => return Err(self.fail(error)),
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

    /// Fails when another worker has given up, is gone or is silent for too long, without waiting: for who
    /// waits for something else, which may never come then, and asks again and again. The others learn that
    /// this one is at work, and do not call it late.
    ///
    /// # Errors
    /// As [`Mesh::exchange`].
    pub fn check(&mut self, call: &Call) -> Result<()> {
        self.tell();
        let since = match self.waits.take() {
            Some((before, since)) if before == *call => since,
            _ => Instant::now(),
        };
        self.waits = Some((call.clone(), since));
        for rank in 0..self.links.len() {
            let Some(link) = &mut self.links[rank] else { continue };
            let (is_over, silence) = (link.is_over(), link.silence().min(since.elapsed()));
            let found = match is_over {
                true => self.receive(rank, call).map(drop),
                false if silence > self.patience => Err(self.late(rank, call)),
                false => Ok(()),
            };
            found.map_err(|error| self.fail(error))?;
        }
        Ok(())
    }

    /// Does what only this worker does and may take longer than the others' patience: they hear that it is
    /// at work.
    pub fn at_work<T>(&mut self, work: impl FnOnce() -> T) -> T {
        if self.world_size() == 1 {
            return work();
        }
        // The others have had other things to do meanwhile.
        self.waits = None;
        std::thread::scope(|scope| {
            let (working, is_done) = channel::<()>();
            let every = self.patience / 8;
            scope.spawn(move || {
                while is_done.recv_timeout(every) == Err(RecvTimeoutError::Timeout) {
                    self.tell();
                }
            });
            let done = work();
            drop(working);
            done
        })
    }

    /// Lets the others hear that this one is at work, if they have not lately.
    fn tell(&mut self) {
        if self.told.elapsed() > self.patience / 4 {
            self.told = Instant::now();
            self.links.iter_mut().flatten().for_each(|link| link.out.is_alive());
        }
    }

    /// The others learn why this one goes no further.
    fn fail(&mut self, error: Error) -> Error {
        self.give_up(&error.to_string(), error.cause());
        error
    }

    /// Tells the others why this worker goes no further, and who is the cause: that may be there again when all
    /// go on from the last checkpoint. Without a cause it would not help to.
    pub fn give_up(&mut self, reason: &str, cause: Option<String>) {
        if !std::mem::replace(&mut self.is_over, true) {
            let frame = Frame::GiveUp { reason: reason.to_owned(), cause };
            self.links.iter_mut().flatten().for_each(|link| link.out.send(frame.clone()));
        }
    }

    /// The message of one rank; `None` from this one.
    fn receive(&mut self, rank: usize, call: &Call) -> Result<Option<Bytes>> {
        let (asked, waiting) = (Instant::now(), self.rank);
        loop {
            let Some(link) = &mut self.links[rank] else { return Ok(None) };
            match link.receive(self.patience / 8) {
                Ok(Some(Frame::Message(found, message))) if found == *call => return Ok(Some(message)),
                Ok(Some(Frame::Message(found, _))) => {
                    return Err(Error::OutOfStep { rank, waiting, expected: call.clone(), found });
                }
                Ok(Some(Frame::GiveUp { reason, cause })) => {
                    return Err(Error::GaveUp { rank, reason, cause });
                }
                Ok(None) if link.silence().min(asked.elapsed()) > self.patience => {
                    return Err(self.late(rank, call));
                }
                // The others may wait for this one in turn.
                Ok(None) => self.tell(),
                Err(error) => {
                    let reason = error.to_string();
                    return Err(Error::Gone { rank, waiting, reason, call: call.clone() });
                }
            }
        }
    }

    fn late(&self, rank: usize, call: &Call) -> Error {
        Error::Late { rank, waiting: self.rank, seconds: self.patience.as_secs(), call: call.clone() }
    }
}
