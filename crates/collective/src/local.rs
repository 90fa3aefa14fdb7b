use std::io;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::Duration;

use crate::Mesh;
use crate::mesh::{Frame, Link};

/// The meshes of workers that are threads of this process, by rank. `patience` is how long one may be
/// waited for.
pub fn local(world_size: usize, patience: Duration) -> Vec<Mesh> {
    let mut links: Vec<Vec<Option<Box<dyn Link>>>> =
        (0..world_size).map(|_| (0..world_size).map(|_| None).collect()).collect();
    for high in 0..world_size {
        for low in 0..high {
            let (to_low, at_low) = channel();
            let (to_high, at_high) = channel();
            links[high][low] = Some(Box::new(Channels { out: to_low, arriving: at_high, patience }));
            links[low][high] = Some(Box::new(Channels { out: to_high, arriving: at_low, patience }));
        }
    }
    links.into_iter().enumerate().map(|(rank, links)| Mesh::new(rank, links, patience)).collect()
}

/// Both ways between two threads. One is at most a call ahead of the other, which bounds what waits.
struct Channels {
    out: Sender<Frame>,
    arriving: Receiver<Frame>,
    patience: Duration,
}

impl Link for Channels {
    fn send(&mut self, frame: Frame) {
        // The other end is gone: so is what it sends.
        let _ = self.out.send(frame);
    }

    fn receive(&mut self) -> io::Result<Frame> {
        self.arriving.recv_timeout(self.patience).map_err(|error| match error {
            RecvTimeoutError::Timeout => io::ErrorKind::TimedOut.into(),
            RecvTimeoutError::Disconnected => io::Error::other("its thread ended"),
        })
    }
}
