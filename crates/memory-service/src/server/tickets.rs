use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use rand::Rng;
use sha2::{Digest, Sha256};
use tonic::Status;

use crate::security::Caller;

/// A random number that opens one connection to the bulk port.
pub(crate) type Ticket = [u8; 32];

/// Seconds in which a ticket must be used.
const LIFETIME: Duration = Duration::from_secs(30);
/// Most tickets that are out at once.
const MAX: usize = 4096;

struct Issued {
    caller: Caller,
    life: u64,
    at: Instant,
}

/// The tickets that are out. They are kept as hashes, so that looking one up tells nothing about it by
/// the time it takes.
#[derive(Default)]
pub(crate) struct Tickets(Mutex<HashMap<[u8; 32], Issued>>);

impl Tickets {
    /// A ticket for a caller, good for one life of the shard's blocks. Fails when too many are out.
    pub(crate) fn issue(&self, caller: Caller, life: u64) -> Result<Ticket, Status> {
        let mut ticket = Ticket::default();
        rand::rng().fill_bytes(&mut ticket);
        let at = Instant::now();
        let mut out = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        out.retain(|_, issued| at.duration_since(issued.at) < LIFETIME);
        if out.len() >= MAX {
            return Err(Status::resource_exhausted(format!("{MAX} bulk streams are being opened")));
        }
        out.insert(Sha256::digest(ticket).into(), Issued { caller, life, at });
        Ok(ticket)
    }

    /// Whose ticket it is, and for which life: the first time, and not too late.
    pub(crate) fn redeem(&self, ticket: &Ticket) -> Option<(Caller, u64)> {
        let hash: [u8; 32] = Sha256::digest(ticket).into();
        let issued = self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(&hash)?;
        (issued.at.elapsed() < LIFETIME).then_some((issued.caller, issued.life))
    }
}
