//! Several servers that hold the same keys, of which the first that answers is asked.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::KmipConfig;
use super::connection::{Connection, Trouble, tls};
use super::message::{Answer, Failure, Request};

/// How many connections are kept for later. Servers close idle ones at their leisure.
const KEPT: usize = 4;

/// Asks the servers.
pub struct Client {
    config: KmipConfig,
    /// Which server answered last.
    preferred: AtomicUsize,
    idle: Mutex<Vec<Idle>>,
}

struct Idle {
    server: usize,
    /// The certificates that it was opened with.
    identity: Identity,
    connection: Connection,
}

/// What tells whether certificates or key were replaced: inode, size and time of change of each file.
type Identity = Vec<Option<(u64, u64, i64, i64)>>;

/// Why no server gave an answer.
#[derive(Debug)]
pub enum NoAnswer {
    /// A server said no.
    Refused(Failure),
    /// What a server said is no KMIP, and no other one answered. The server and what is wrong.
    Malformed(String),
    /// No server could be reached, or none of them in time: each with the reason.
    Unreachable(String),
    /// The certificates or the private key of this side are not right: one sentence.
    Local(String),
}

impl Client {
    /// A client of the servers in `config`. Nothing is connected yet.
    pub fn new(config: KmipConfig) -> Self {
        Client { config, preferred: AtomicUsize::new(0), idle: Mutex::default() }
    }

    /// What it works by.
    pub fn config(&self) -> &KmipConfig {
        &self.config
    }

    /// Has a server answer `request`.
    ///
    /// # Errors
    /// [`NoAnswer`].
    pub fn ask(&self, request: &Request) -> Result<Answer, NoAnswer> {
        let deadline = Instant::now() + self.config.deadline;
        let count = self.config.servers.len();
        let first = self.preferred.load(Ordering::Relaxed);
        let (mut reasons, mut malformed) = (Vec::new(), false);
        for turn in 0..count {
            let server = (first + turn) % count;
            // One that does not answer leaves time for those after it.
            let until = Instant::now() + share(deadline, count - turn);
            match self.ask_one(server, request, until) {
                Ok(answer) => {
                    self.preferred.store(server, Ordering::Relaxed);
                    return Ok(answer);
                }
                Err(Trouble::Refused(failure)) => {
                    self.preferred.store(server, Ordering::Relaxed);
                    return Err(NoAnswer::Refused(failure));
                }
                Err(Trouble::Local(sentence)) => return Err(NoAnswer::Local(sentence)),
                Err(trouble) => {
                    let name = &self.config.servers[server];
                    tracing::warn!(server = %name, "KMIP server {name}: {}", describe(&trouble));
                    malformed |= matches!(trouble, Trouble::Malformed(_));
                    reasons.push(format!("{name}: {}", describe(&trouble)));
                }
            }
        }
        self.preferred.store((first + 1) % count, Ordering::Relaxed);
        let reasons = reasons.join("; ");
        Err(if malformed { NoAnswer::Malformed(reasons) } else { NoAnswer::Unreachable(reasons) })
    }

    fn ask_one(&self, server: usize, request: &Request, until: Instant) -> Result<Answer, Trouble> {
        let identity = self.identity();
        while let Some(mut connection) = self.take(server, &identity) {
            match connection.ask(request, until) {
                // The server has closed it meanwhile. Whether it still did what was asked is not known; every
                // request can be repeated.
                Err(Trouble::Io(error)) if error.kind() != std::io::ErrorKind::TimedOut => {}
                outcome => return self.keep(server, identity, connection, outcome),
            }
        }
        let tls = tls(&self.config).map_err(Trouble::Local)?;
        let mut connection = Connection::open(&self.config.servers[server], &tls, until)?;
        let outcome = connection.ask(request, until);
        self.keep(server, identity, connection, outcome)
    }

    fn take(&self, server: usize, identity: &Identity) -> Option<Connection> {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        idle.retain(|kept| kept.identity == *identity);
        let place = idle.iter().position(|kept| kept.server == server)?;
        Some(idle.swap_remove(place).connection)
    }

    fn keep(
        &self,
        server: usize,
        identity: Identity,
        connection: Connection,
        outcome: Result<Answer, Trouble>,
    ) -> Result<Answer, Trouble> {
        if let Ok(_) | Err(Trouble::Refused(_)) = outcome {
            let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
            if idle.len() < KEPT {
                idle.push(Idle { server, identity, connection });
            }
        }
        outcome
    }

    fn identity(&self) -> Identity {
        let KmipConfig { ca, certificate, key, .. } = &self.config;
        let of = |path| {
            let metadata = fs::metadata(path).ok()?;
            Some((metadata.ino(), metadata.size(), metadata.ctime(), metadata.ctime_nsec()))
        };
        vec![of(ca), of(certificate), of(key)]
    }
}

/// What one of `servers` that are left may take of the time until `deadline`.
fn share(deadline: Instant, servers: usize) -> Duration {
    // There are never more servers than fit.
    deadline.saturating_duration_since(Instant::now()) / servers as u32
}

fn describe(trouble: &Trouble) -> String {
    match trouble {
        Trouble::Io(error) if error.kind() == std::io::ErrorKind::TimedOut => "it did not answer in time".to_owned(),
        Trouble::Io(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => {
            "it broke off the connection".to_owned()
        }
        Trouble::Io(error) => error.to_string(),
        Trouble::Tls(sentence) | Trouble::Local(sentence) => format!("no TLS connection ({sentence})"),
        Trouble::Malformed(what) => format!("its answer makes no sense ({what})"),
        // Not reached by the callers here, which hand a refusal on.
        Trouble::Refused(failure) => failure.message.clone(),
    }
}
