//! Sums of arrays that lie on GPUs, by NCCL. Unlike those over the workers' own connections their order is NCCL's
//! and depends on how many GPUs there are; the same ones repeat the same bits.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::Duration;

use bytes::Bytes;
use cudarc::driver::{CudaSlice, CudaStream};
use cudarc::nccl::safe::{Comm, Id, ReduceOp, group_end, group_start};

use crate::{Call, Error, Mesh, Result};

/// Between two looks at what the GPU has done.
const LOOK: Duration = Duration::from_micros(50);

/// What sums are enqueued with, on the stream beside the computation's.
pub struct Group<'a>(&'a Comm);

impl Group<'_> {
    /// Replaces an array by its sum over all workers, once the computation that is enqueued has written it.
    ///
    /// # Errors
    /// With NCCL's words.
    pub fn sum(&self, array: &mut CudaSlice<f32>) -> std::result::Result<(), String> {
        self.0.all_reduce_in_place(array, &ReduceOp::Sum).map(drop).map_err(|error| format!("{error:?}"))
    }
}

type Enqueue = Box<dyn FnOnce(&Group) -> std::result::Result<(), String> + Send>;

enum Work {
    Enqueue(Enqueue),
    /// Waits until all that is enqueued has been done.
    Finish,
}

/// The connections of a worker's GPU to those of all others. A thread owns them, so that whoever waits for it
/// notices when another worker is gone, for which NCCL itself would wait for ever.
pub struct Nccl {
    work: Sender<Work>,
    done: Receiver<std::result::Result<(), String>>,
    /// Tells the thread to wait no longer.
    is_over: Arc<AtomicBool>,
}

impl Nccl {
    /// Connects the GPUs of all workers; `compute` is the stream that arrays are written on.
    ///
    /// # Errors
    /// When NCCL is not there or fails, and when another worker is late or gone.
    pub fn join(mesh: &mut Mesh, compute: Arc<CudaStream>) -> Result<Self> {
        let call = Call::new("nccl", 0);
        let mine = match mesh.rank() {
            0 => new_id(&call)?,
            _ => Bytes::new(),
        };
        let told = mesh.all_gather(&call, mine)?;
        let id = bytemuck::pod_collect_to_vec::<u8, std::ffi::c_char>(&told[0]);
        let (found, place) = (id.len(), (mesh.rank(), mesh.world_size()));
        let Ok(id) = id.try_into() else {
            return Err(Error::Length { rank: 0, call, expected: 128, found });
        };
        let (work, asked) = channel();
        let (tell, done) = channel();
        let is_over = Arc::<AtomicBool>::default();
        let owner = Owner { compute, asked, tell, is_over: Arc::clone(&is_over) };
        std::thread::Builder::new()
            .name("nccl".into())
            .spawn(move || owner.run(Id::uninit(id), place))
            .map_err(|error| failed(&call, error))?;
        let mut joined = Self { work, done, is_over };
        joined.wait(mesh, &call)?;
        Ok(joined)
    }

    /// Has sums enqueued behind what is computed now, several as one.
    pub fn enqueue(&mut self, sums: impl FnOnce(&Group) -> std::result::Result<(), String> + Send + 'static) {
        // That its thread has ended is told by `finish`.
        let _ = self.work.send(Work::Enqueue(Box::new(sums)));
    }

    /// Waits until all sums are made, of this worker and all others.
    ///
    /// # Errors
    /// When one could not be made, and when another worker is late or gone.
    pub fn finish(&mut self, mesh: &mut Mesh, call: &Call) -> Result<()> {
        let _ = self.work.send(Work::Finish);
        self.wait(mesh, call)
    }

    fn wait(&mut self, mesh: &mut Mesh, call: &Call) -> Result<()> {
        loop {
            match self.done.recv_timeout(LOOK) {
                Ok(done) => return done.map_err(|reason| failed(call, reason)),
                Err(RecvTimeoutError::Timeout) => mesh.check(call)?,
                Err(RecvTimeoutError::Disconnected) => return Err(failed(call, "its thread has ended")),
            }
        }
    }
}

impl Drop for Nccl {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::Relaxed);
    }
}

/// What the workers of a job know each other's GPUs by.
fn new_id(call: &Call) -> Result<Bytes> {
    // A library that cannot be loaded is a panic there.
    match std::thread::spawn(Id::new).join() {
        Ok(Ok(id)) => Ok(Bytes::copy_from_slice(bytemuck::cast_slice(id.internal()))),
        Ok(Err(error)) => Err(failed(call, format!("no id: {error:?}"))),
        Err(_) => Err(failed(call, "libnccl.so cannot be loaded")),
    }
}

fn failed(call: &Call, reason: impl ToString) -> Error {
    Error::Nccl { call: call.clone(), reason: reason.to_string() }
}

/// What the thread has.
struct Owner {
    compute: Arc<CudaStream>,
    asked: Receiver<Work>,
    tell: Sender<std::result::Result<(), String>>,
    is_over: Arc<AtomicBool>,
}

impl Owner {
    fn run(self, id: Id, (rank, world_size): (usize, usize)) {
        let made = || {
            let stream = self.compute.fork().map_err(|error| error.to_string())?;
            Comm::from_rank(stream, rank, world_size, id).map_err(|error| format!("{error:?}"))
        };
        let (comm, mut found) = match made() {
            Ok(comm) => (comm, Ok(())),
            Err(reason) => return drop(self.tell.send(Err(reason))),
        };
        let mut is_told = self.tell.send(Ok(())).is_ok();
        while is_told && let Ok(work) = self.asked.recv() {
            match work {
                Work::Enqueue(sums) => found = found.and_then(|()| self.enqueue(&comm, sums)),
                Work::Finish => {
                    let done = std::mem::replace(&mut found, Ok(())).and_then(|()| self.finish(&comm));
                    is_told = self.tell.send(done).is_ok();
                }
            }
        }
        // Dropped, the connections are given up even if a sum still waits for another GPU.
    }

    fn enqueue(&self, comm: &Comm, sums: Enqueue) -> std::result::Result<(), String> {
        comm.stream().join(&self.compute).map_err(|error| error.to_string())?;
        group_start().map_err(|error| format!("{error:?}"))?;
        let enqueued = sums(&Group(comm));
        let ended = group_end().map(drop).map_err(|error| format!("{error:?}"));
        enqueued.and(ended)
    }

    /// Until the stream has come to its end; the computation goes on behind it.
    fn finish(&self, comm: &Comm) -> std::result::Result<(), String> {
        let text = |error: cudarc::driver::DriverError| error.to_string();
        let event = comm.stream().record_event(None).map_err(text)?;
        self.compute.wait(&event).map_err(text)?;
        while !event.try_is_complete().map_err(text)? {
            if self.is_over.load(Ordering::Relaxed) {
                return Err("given up".into());
            }
            std::thread::park_timeout(LOOK);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_library_is_loaded_and_gives_ids() {
        let call = Call::new("nccl", 0);
        let [a, b] = [new_id(&call).unwrap(), new_id(&call).unwrap()];
        assert_eq!((a.len(), b.len()), (128, 128));
        assert_ne!(a, b);
    }
}
