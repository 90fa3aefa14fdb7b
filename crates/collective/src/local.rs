use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::time::{Duration, Instant};

use crate::Mesh;
use crate::mesh::{Frame, Link, Sending};

/// The meshes of workers that are threads of this process, by rank. `patience` is how long one may be
/// waited for.
pub fn local(world_size: usize, patience: Duration) -> Vec<Mesh> {
    let nobody = || (0..world_size).map(|_| None).collect();
    let mut links: Vec<Vec<Option<Link>>> = (0..world_size).map(|_| nobody()).collect();
    let pairs = (0..world_size).flat_map(|high| (0..high).map(move |low| (high, low)));
    for (high, low) in pairs {
        let (to_low, at_low) = channel();
        let (to_high, at_high) = channel();
        let (began, low_heard, high_heard) = (Instant::now(), Arc::default(), Arc::default());
        let out = |frames, heard: &Arc<AtomicU64>| Box::new(Out { frames, heard: Arc::clone(heard), began });
        links[high][low] =
            Some(Link::new(out(to_low, &low_heard), at_high, (Arc::clone(&high_heard), began)));
        links[low][high] = Some(Link::new(out(to_high, &high_heard), at_low, (low_heard, began)));
    }
    links.into_iter().enumerate().map(|(rank, links)| Mesh::new(rank, links, patience)).collect()
}

/// To another thread. One is at most a call ahead of the other, which bounds what waits.
struct Out {
    frames: Sender<io::Result<Frame>>,
    /// When the other heard of this one last, in milliseconds since `began`.
    heard: Arc<AtomicU64>,
    began: Instant,
}

impl Sending for Out {
    fn send(&mut self, frame: Frame) {
        // The other end is gone: so is what it sends.
        let _ = self.frames.send(Ok(frame));
    }

    fn is_alive(&mut self) {
        self.heard.store(self.began.elapsed().as_millis() as u64, Ordering::Relaxed);
    }
}
