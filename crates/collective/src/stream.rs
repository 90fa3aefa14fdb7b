//! A connection to another worker, in the clear or in TLS, and greetings over it.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustls::pki_types::ServerName;
use rustls::{ClientConnection, Connection, ServerConnection};
use serde::{Serialize, de::DeserializeOwned};

use crate::TlsConfigs;

/// Longest greeting.
const MAX_GREETING: usize = 1 << 20;
/// Bytes of TLS that are read at once.
const RECORDS: usize = 1 << 16;

/// Which side of a connection one is on.
#[derive(Copy, Clone, PartialEq, Eq)]
pub(crate) enum Side {
    Accepts,
    Connects,
}

/// One handle to a connection. One may read while another writes: what they share, the state of TLS, is held
/// only to seal and to open what is in memory, never while the network is waited for. One handle at most may
/// write, since records have an order.
pub(crate) struct Stream {
    tcp: TcpStream,
    session: Option<Arc<Mutex<Connection>>>,
    /// What was read and is not opened yet, from `at` on.
    sealed: Vec<u8>,
    at: usize,
}

impl Stream {
    /// A connection after its handshake, if it has one, which has to be over at `until`.
    ///
    /// # Errors
    /// When the other side is not let in, or does not let in this one; [`refusal`] tells these apart.
    pub(crate) fn open(
        tcp: TcpStream,
        tls: Option<&TlsConfigs>,
        (side, until): (Side, Instant),
    ) -> io::Result<Self> {
        let Some(TlsConfigs { server, client }) = tls else {
            return Ok(Self { tcp, session: None, sealed: vec![], at: 0 });
        };
        let mut session = match side {
            Side::Accepts => ServerConnection::new(Arc::clone(server)).map(Connection::from),
            Side::Connects => {
                let name = ServerName::from(tcp.peer_addr()?.ip());
                ClientConnection::new(Arc::clone(client), name).map(Connection::from)
            }
        }
        .map_err(invalid)?;
        let mut timed = Timed { tcp: &tcp, until };
        while session.is_handshaking() {
            session.complete_io(&mut timed)?;
        }
        Ok(Self { tcp, session: Some(Arc::new(Mutex::new(session))), sealed: vec![], at: 0 })
    }

    pub(crate) fn tcp(&self) -> &TcpStream {
        &self.tcp
    }

    /// Another handle, for another thread. What this one has read and not opened stays with it.
    pub(crate) fn try_clone(&self) -> io::Result<Self> {
        Ok(Self { tcp: self.tcp.try_clone()?, session: self.session.clone(), sealed: vec![], at: 0 })
    }

    /// Nothing more is sent.
    pub(crate) fn finish(&mut self) -> io::Result<()> {
        if let Some(session) = &self.session {
            let sealed = {
                let mut session = lock(session);
                session.send_close_notify();
                records(&mut session)?
            };
            self.tcp.write_all(&sealed)?;
        }
        self.tcp.shutdown(Shutdown::Write)
    }

    /// Sends a greeting.
    pub(crate) fn greet(&mut self, greeting: &impl Serialize) -> io::Result<()> {
        let text = serde_json::to_vec(greeting)?;
        self.write_all(&[&(text.len() as u32).to_le_bytes(), text.as_slice()].concat())
    }

    /// Receives one, which has to be here at `until`.
    pub(crate) fn greeting<T: DeserializeOwned>(&mut self, until: Instant) -> io::Result<T> {
        let mut n_bytes = [0; 4];
        self.fill(&mut n_bytes, until)?;
        let n_bytes = u32::from_le_bytes(n_bytes) as usize;
        if n_bytes > MAX_GREETING {
            return Err(invalid(format!("a greeting of {n_bytes} bytes, expected at most {MAX_GREETING}")));
        }
        let mut text = vec![0; n_bytes];
        self.fill(&mut text, until)?;
        Ok(serde_json::from_slice(&text)?)
    }

    fn fill(&mut self, mut rest: &mut [u8], until: Instant) -> io::Result<()> {
        while !rest.is_empty() {
            self.tcp.set_read_timeout(Some(left(until)?))?;
            match self.read(rest)? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                n => rest = &mut rest[n..],
            }
        }
        Ok(())
    }
}

impl Read for Stream {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let Some(session) = &self.session else { return self.tcp.read(out) };
        loop {
            {
                let mut session = lock(session);
                match session.reader().read(out) {
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    // Without a word, as when a process is killed: an end before the last frame is seen as one.
                    Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(0),
                    opened => return opened,
                }
                // It takes a part at a time.
                if let Some(mut rest) = self.sealed.get(self.at..).filter(|rest| !rest.is_empty()) {
                    self.at += session.read_tls(&mut rest)?;
                    session.process_new_packets().map_err(invalid)?;
                    continue;
                }
            }
            self.sealed.resize(RECORDS, 0);
            let n = self.tcp.read(&mut self.sealed).inspect_err(|_| self.sealed.clear())?;
            self.sealed.truncate(n);
            self.at = 0;
            if n == 0 {
                lock(session).read_tls(&mut io::empty())?;
            }
        }
    }
}

impl Write for Stream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let Some(session) = &self.session else { return self.tcp.write(bytes) };
        let (n, sealed) = {
            let mut session = lock(session);
            (session.writer().write(bytes)?, records(&mut session)?)
        };
        self.tcp.write_all(&sealed)?;
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.tcp.flush()
    }
}

/// What the peer of a failed handshake or greeting did not accept, or what of its own was not accepted: trying
/// again would not help before someone's files change. `None` for anything else.
pub(crate) fn refusal(error: &io::Error) -> Option<String> {
    let reason = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>())?;
    match reason {
        rustls::Error::AlertReceived(_) => {
            Some(format!("this worker's certificate is not accepted there ({reason})"))
        }
        rustls::Error::InvalidCertificate(_)
        | rustls::Error::Other(_)
        | rustls::Error::NoCertificatesPresented => {
            Some(format!("the certificate there is not accepted here ({reason})"))
        }
        _ => None,
    }
}

pub(crate) fn invalid(reason: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, reason)
}

/// A session is whole between its calls, whatever became of a thread that held it.
fn lock(session: &Mutex<Connection>) -> MutexGuard<'_, Connection> {
    session.lock().unwrap_or_else(PoisonError::into_inner)
}

/// All that is to be sent.
fn records(session: &mut Connection) -> io::Result<Vec<u8>> {
    let mut sealed = vec![];
    while session.wants_write() {
        session.write_tls(&mut sealed)?;
    }
    Ok(sealed)
}

/// The time until a moment; an error when it is over.
fn left(until: Instant) -> io::Result<Duration> {
    let left = until.saturating_duration_since(Instant::now());
    if left.is_zero() { Err(io::ErrorKind::TimedOut.into()) } else { Ok(left) }
}

/// A connection whose every byte has to come before a moment, also of one who sends them one by one.
struct Timed<'a> {
    tcp: &'a TcpStream,
    until: Instant,
}

impl Read for Timed<'_> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        self.tcp.set_read_timeout(Some(left(self.until)?))?;
        (&mut &*self.tcp).read(out)
    }
}

impl Write for Timed<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.tcp.set_write_timeout(Some(left(self.until)?))?;
        (&mut &*self.tcp).write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
