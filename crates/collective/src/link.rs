//! The two threads of a connection to another worker, and what frames look like on it.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use bytes::Bytes;

use crate::Call;
use crate::mesh::{Frame, Link, Sending};
use crate::stream::{Stream, invalid};

/// Frames that may wait to be sent.
const QUEUE: usize = 8;
/// A message may be as long as this: what is longer is no message.
const MAX_MESSAGE: u64 = 1 << 40;

/// Length of the call's name u16, step u64, bytes u64. Without a name the step says
/// that the sender gives up, and the payload why and by whose cause, or that it is at work.
const HEAD_BYTES: usize = 18;
const GIVES_UP: u64 = 1;
const ALIVE: u64 = 2;

/// A connection with a thread that sends on it and one that receives.
pub(crate) fn link(stream: Stream, patience: Duration) -> io::Result<Link> {
    let tcp = stream.tcp().try_clone()?;
    tcp.set_nodelay(true)?;
    tcp.set_read_timeout(None)?;
    // Of every single write: a long message may take longer, as long as it goes on.
    tcp.set_write_timeout(Some(patience))?;
    let (queue, frames) = sync_channel(QUEUE);
    let (arrived, arriving) = sync_channel(QUEUE);
    let out = stream.try_clone()?;
    let mut reader = Reader { stream, heard: Arc::default(), began: Instant::now() };
    let clock = (Arc::clone(&reader.heard), reader.began);
    let thread = |name: &str| std::thread::Builder::new().name(name.into());
    let sending = thread("send").spawn(move || send_all(out, frames))?;
    // It ends with the connection, or with the channel that is dropped after that.
    thread("receive").spawn(move || {
        loop {
            // Of one that is only alive the reader has noted all there is.
            let Some(frame) = reader.frame().transpose() else { continue };
            let is_last = frame.is_err();
            // Nobody takes it any more: the connection is closed.
            if arrived.send(frame).is_err() || is_last {
                break;
            }
        }
    })?;
    let threads = Threads { tcp, queue: Some(queue), sending: Some(sending) };
    Ok(Link::new(Box::new(threads), arriving, clock))
}

/// The owner's end of a connection.
struct Threads {
    tcp: TcpStream,
    /// `None` says that this worker is at work.
    queue: Option<SyncSender<Option<Frame>>>,
    sending: Option<JoinHandle<()>>,
}

impl Sending for Threads {
    fn send(&mut self, frame: Frame) {
        if let Some(queue) = &self.queue {
            let _ = queue.send(Some(frame));
        }
    }

    fn is_alive(&mut self) {
        if let Some(queue) = &self.queue {
            // What waits to be sent says as much.
            let _ = queue.try_send(None);
        }
    }
}

impl Drop for Threads {
    /// What is queued is still sent: the others may wait for it.
    fn drop(&mut self) {
        self.queue = None;
        if let Some(sending) = self.sending.take() {
            let _ = sending.join();
        }
        let _ = self.tcp.shutdown(Shutdown::Both);
    }
}

/// Takes frames off a connection, and notes when it last heard anything.
struct Reader {
    stream: Stream,
    heard: Arc<AtomicU64>,
    began: Instant,
}

impl Reader {
    /// `None` of one that says that the other is at work.
    fn frame(&mut self) -> io::Result<Option<Frame>> {
        let mut head = [0; HEAD_BYTES];
        self.fill(&mut head)?;
        let u64_at = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| head[at + i]));
        let (n_what, step, n_bytes) = (u16::from_le_bytes([head[0], head[1]]), u64_at(2), u64_at(10));
        if n_bytes > MAX_MESSAGE {
            return Err(invalid(format!("a message of {n_bytes} bytes, expected at most {MAX_MESSAGE}")));
        }
        let mut what = vec![0; usize::from(n_what)];
        self.fill(&mut what)?;
        let what = String::from_utf8(what).map_err(|error| invalid(error.to_string()))?;
        let mut payload = vec![0; n_bytes as usize];
        self.fill(&mut payload)?;
        Ok(match what.is_empty() {
            true if step == ALIVE => None,
            true => {
                let (reason, cause) = serde_json::from_slice(&payload)?;
                Some(Frame::GiveUp { reason, cause })
            }
            false => Some(Frame::Message(Call { what, step }, payload.into())),
        })
    }

    fn fill(&mut self, mut rest: &mut [u8]) -> io::Result<()> {
        while !rest.is_empty() {
            match self.stream.read(rest) {
                Ok(0) => {
                    return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the connection was closed"));
                }
                Ok(n) => {
                    self.heard.store(self.began.elapsed().as_millis() as u64, Ordering::Relaxed);
                    rest = &mut rest[n..];
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

fn send_all(mut stream: Stream, frames: Receiver<Option<Frame>>) {
    let mut send = |frame: Option<Frame>| {
        let (what, step, payload) = match frame {
            Some(Frame::Message(Call { what, step }, payload)) => (what, step, payload),
            Some(Frame::GiveUp { reason, cause }) => {
                (String::new(), GIVES_UP, serde_json::to_vec(&(reason, cause))?.into())
            }
            None => (String::new(), ALIVE, Bytes::new()),
        };
        let mut head = Vec::with_capacity(HEAD_BYTES + what.len());
        head.extend((what.len() as u16).to_le_bytes());
        head.extend(step.to_le_bytes());
        head.extend((payload.len() as u64).to_le_bytes());
        head.extend(what.as_bytes());
        stream.write_all(&head)?;
        stream.write_all(&payload)
    };
    // Who receives sees that the connection is broken.
    let _ = frames.into_iter().try_for_each(&mut send);
    let _ = stream.finish();
}
