//! Several servers that hold the same keys, and the connections to them.

use std::cell::Cell;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustls::ClientConfig;

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
    /// What the certificates and the key came to when they could last be used.
    last_usable: Mutex<Option<Arc<ClientConfig>>>,
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
        Client { config, preferred: AtomicUsize::new(0), idle: Mutex::default(), last_usable: Mutex::default() }
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

    /// What a new connection shows and believes. While the files are being replaced, a new certificate stands beside the
    /// old key: until they can be used again, those that could be used before are.
    fn tls(&self) -> Result<Arc<ClientConfig>, Trouble> {
        let read = self.config.tls();
        let mut last = self.last_usable.lock().unwrap_or_else(PoisonError::into_inner);
        match (read, &*last) {
            (Ok(usable), _) => Ok(last.insert(usable).clone()),
            (Err(sentence), Some(usable)) => {
                tracing::warn!("the KMIP servers are shown the certificate that was read before: {sentence}");
                Ok(usable.clone())
            }
            (Err(sentence), None) => Err(Trouble::Local(sentence)),
        }
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
        let mut connection = Connection::open(self.name(), &client.tls()?, client.config.newest_version, until)?;
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
