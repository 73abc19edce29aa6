//! Several servers that hold the same keys, and the connections to them.

use std::cell::Cell;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::KmipConfig;
use super::connection::{Connection, Trouble};
use super::message::{Answer, Request};
use crate::keys::tls::{self, FileIdentity};

/// How many connections are kept for later.
const KEPT: usize = 4;
/// How long an idle connection is kept: less than firewalls and servers remember one.
const KEPT_FOR: Duration = Duration::from_secs(30);

/// The servers.
pub struct Client {
    config: KmipConfig,
    /// Which server answered last.
    preferred: AtomicUsize,
    idle: Mutex<Vec<Idle>>,
}

struct Idle {
    server: usize,
    since: Instant,
    /// The certificates that it was opened with.
    identity: Identity,
    connection: Connection,
}

/// What tells whether certificates or key were replaced.
type Identity = [FileIdentity; 3];

impl Client {
    /// A client of the servers in `config`. Nothing is connected yet.
    pub fn new(config: KmipConfig) -> Self {
        Client { config, preferred: AtomicUsize::new(0), idle: Mutex::default() }
    }

    /// What it works by.
    pub fn config(&self) -> &KmipConfig {
        &self.config
    }

    /// The servers, in the order in which they are to be asked.
    pub fn order(&self) -> impl Iterator<Item = usize> {
        let (first, count) = (self.preferred.load(Ordering::Relaxed), self.config.servers.len());
        (0..count).map(move |turn| (first + turn) % count)
    }

    /// Notes which server answered.
    pub fn prefer(&self, server: usize) {
        self.preferred.store(server, Ordering::Relaxed);
    }

    /// A conversation with one server, which has to be over by `until`.
    pub fn talk(&self, server: usize, until: Instant) -> Talk<'_> {
        Talk { client: self, server, until: Cell::new(until) }
    }

    /// The connections to `server` that may be used again, the newest last.
    fn take(&self, server: usize, identity: &Identity) -> Option<Connection> {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        idle.retain(|kept| kept.identity == *identity && kept.since.elapsed() < KEPT_FOR);
        let place = idle.iter().rposition(|kept| kept.server == server)?;
        Some(idle.remove(place).connection)
    }

    fn keep(&self, server: usize, identity: Identity, connection: Connection) {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        if idle.len() == KEPT {
            // The oldest may be to a server that is gone.
            idle.remove(0);
        }
        idle.push(Idle { server, since: Instant::now(), identity, connection });
    }

    fn forget(&self, server: usize) {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner).retain(|kept| kept.server != server);
    }

    fn identity(&self) -> Identity {
        let KmipConfig { ca, certificate, key, .. } = &self.config;
        [ca, certificate, key].map(|path| tls::file_identity(path))
    }
}

/// A conversation with one server.
pub struct Talk<'a> {
    client: &'a Client,
    server: usize,
    until: Cell<Instant>,
}

impl Talk<'_> {
    /// The server's name.
    pub fn name(&self) -> &str {
        &self.client.config.servers[self.server]
    }

    /// What the servers are asked by.
    pub fn config(&self) -> &KmipConfig {
        self.client.config()
    }

    /// Gives the conversation more time, for a wait that is not to cost it any.
    pub fn extend(&self, time: Duration) {
        self.until.set(self.until.get() + time);
    }

    /// Gives what is asked next the whole time again that there is for one key.
    pub fn renew(&self) {
        self.until.set(Instant::now() + self.client.config.deadline);
    }

    /// The same, with `most` for what is left to ask.
    pub fn within(&self, most: Duration) -> Self {
        let until = self.until.get().min(Instant::now() + most);
        Talk { client: self.client, server: self.server, until: Cell::new(until) }
    }

    /// Has the server answer `request`. It may get it twice: every request can be repeated.
    ///
    /// # Errors
    /// [`Trouble`].
    pub fn ask(&self, request: &Request<'_>) -> Result<Answer, Trouble> {
        let (client, until) = (self.client, self.until.get());
        let identity = client.identity();
        if let Some(mut connection) = client.take(self.server, &identity) {
            // Somebody between may have forgotten it without a word. Then a new one has time enough.
            let left = until.saturating_duration_since(Instant::now());
            match connection.ask(request, Instant::now() + left / 3) {
                Err(Trouble::Io(_)) => client.forget(self.server),
                outcome => return self.done(identity, connection, outcome),
            }
        }
        let KmipConfig { ca, certificate, key, .. } = &client.config;
        let tls = tls::mutual_client(ca, certificate, key, "the KMIP client").map_err(Trouble::Local)?;
        let mut connection = Connection::open(self.name(), &tls, client.config.newest_version, until)?;
        let outcome = connection.ask(request, until);
        self.done(identity, connection, outcome)
    }

    fn done(
        &self,
        identity: Identity,
        connection: Connection,
        outcome: Result<Answer, Trouble>,
    ) -> Result<Answer, Trouble> {
        if let Ok(_) | Err(Trouble::Refused(_)) = outcome {
            self.client.keep(self.server, identity, connection);
        }
        outcome
    }
}
