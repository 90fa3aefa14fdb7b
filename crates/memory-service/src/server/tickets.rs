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

/// The tickets that are out. They are kept as hashes, so that looking one up tells nothing about it by
/// the time it takes.
#[derive(Default)]
pub(crate) struct Tickets(Mutex<HashMap<[u8; 32], (Caller, Instant)>>);

impl Tickets {
    /// A ticket for a caller. Fails when too many are out.
    pub(crate) fn issue(&self, caller: Caller) -> Result<Ticket, Status> {
        let mut ticket = Ticket::default();
        rand::rng().fill_bytes(&mut ticket);
        let now = Instant::now();
        let mut out = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        out.retain(|_, (_, issued)| now.duration_since(*issued) < LIFETIME);
        if out.len() >= MAX {
            return Err(Status::resource_exhausted(format!("{MAX} bulk streams are being opened")));
        }
        out.insert(Sha256::digest(ticket).into(), (caller, now));
        Ok(ticket)
    }

    /// Whose ticket it is: the first time, and not too late.
    pub(crate) fn redeem(&self, ticket: &Ticket) -> Option<Caller> {
        let hash: [u8; 32] = Sha256::digest(ticket).into();
        let (caller, issued) = self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(&hash)?;
        (issued.elapsed() < LIFETIME).then_some(caller)
    }
}
