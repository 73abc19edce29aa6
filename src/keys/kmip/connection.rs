//! A TLS connection to a KMIP server, every step of which has a deadline.

use std::fmt;
use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream, ToSocketAddrs};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ClientConnection, StreamOwned};
use zeroize::Zeroizing;

use super::message::{Answer, Failure, Request, VERSIONS, Version, tag};
use super::ttlv::{HEADER, Malformed, message_length};
use crate::keys::tls;

/// Why a server gave no answer.
#[derive(Debug)]
pub enum Trouble {
    /// Nobody answered, or not in time, or the connection broke off.
    Io(io::Error),
    /// The TLS handshake failed.
    Tls(String),
    /// The server broke the TLS connection off with an alert: it does not want this host, or its certificate.
    TurnedAway(String),
    /// What TLS takes on this side is not right: one sentence.
    Local(String),
    /// What the server said is no KMIP.
    Malformed(Malformed),
    /// The server said no.
    Refused(Failure),
    /// The server speaks none of the versions since this one, which what is asked for takes.
    Older(Version),
    /// The server does not wrap keys as it is to, or this host cannot unwrap them: one sentence.
    Unwrapped(String),
}

impl From<io::Error> for Trouble {
    fn from(error: io::Error) -> Self {
        // rustls hands its own errors on as those of reading and writing.
        match error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()) {
            Some(alert @ rustls::Error::AlertReceived(_)) => Trouble::TurnedAway(tls::fault(alert)),
            Some(tls) => Trouble::Tls(tls::fault(tls)),
            None => Trouble::Io(error),
        }
    }
}

impl From<Malformed> for Trouble {
    fn from(malformed: Malformed) -> Self {
        Trouble::Malformed(malformed)
    }
}

/// In words, for whoever looks after the servers.
impl fmt::Display for Trouble {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Trouble::Io(error) if error.kind() == io::ErrorKind::TimedOut => f.write_str("it did not answer in time"),
            Trouble::Io(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                f.write_str("it broke off the connection")
            }
            Trouble::Io(error) => write!(f, "{error}"),
            Trouble::Tls(fault) | Trouble::TurnedAway(fault) => write!(f, "no TLS connection ({fault})"),
            Trouble::Older(version) => write!(f, "it speaks no KMIP {version} or newer"),
            Trouble::Local(sentence) | Trouble::Unwrapped(sentence) => f.write_str(sentence),
            Trouble::Malformed(what) => write!(f, "its answer makes no sense ({what})"),
            Trouble::Refused(failure) => write!(f, "it refuses (reason {}: {})", failure.reason, failure.message),
        }
    }
}

/// A connection to one server.
pub struct Connection {
    stream: StreamOwned<ClientConnection, Timed>,
    version: Version,
}

impl Connection {
    /// Connects to `server`, `HOST:PORT`, and agrees on a version of the protocol up to `newest`, until `deadline`.
    ///
    /// # Errors
    /// [`Trouble`].
    pub fn open(server: &str, client: &Arc<ClientConfig>, newest: Version, deadline: Instant) -> Result<Self, Trouble> {
        let (host, _) = split_address(server).ok_or_else(|| Trouble::Tls(format!("{server:?} is no HOST:PORT")))?;
        let name = ServerName::try_from(host.to_owned()).map_err(|error| Trouble::Tls(error.to_string()))?;
        let socket = connect(server, deadline)?;
        socket.set_nodelay(true)?;
        let session =
            ClientConnection::new(Arc::clone(client), name).map_err(|error| Trouble::Tls(tls::fault(&error)))?;
        let stream = StreamOwned::new(session, Timed { socket, deadline });
        let mut connection = Connection { stream, version: newest };
        connection.agree(newest)?;
        Ok(connection)
    }

    /// Finds the newest version up to `newest` that both sides speak. A server that does not know the question, which
    /// is one of KMIP 1.1, or the version it is asked in, speaks an older one.
    fn agree(&mut self, newest: Version) -> Result<(), Trouble> {
        let deadline = self.stream.sock.deadline;
        for version in asked_in(newest) {
            self.version = version;
            match self.ask(&Request::discover_versions(newest), deadline) {
                Ok(answer) => {
                    let theirs = answer.versions()?;
                    let mut ours = VERSIONS.into_iter().filter(|ours| *ours <= newest);
                    self.version = ours.find(|ours| theirs.contains(ours)).ok_or(NO_COMMON_VERSION)?;
                    return Ok(());
                }
                Err(Trouble::Refused(failure)) if failure.reason != Failure::AUTHENTICATION_NOT_SUCCESSFUL => {}
                Err(trouble) => return Err(trouble),
            }
        }
        self.version = Version::OLDEST;
        Ok(())
    }

    /// Sends `request` and waits for its answer, until `deadline`. After an error other than
    /// [`Trouble::Refused`] the connection is of no use any more.
    ///
    /// # Errors
    /// [`Trouble`].
    pub fn ask(&mut self, request: &Request<'_>, deadline: Instant) -> Result<Answer, Trouble> {
        if self.version < request.since {
            return Err(Trouble::Older(request.since));
        }
        self.stream.sock.deadline = deadline;
        let sent = self.stream.write_all(&request.encode(self.version)).and_then(|()| self.stream.flush());
        if let Err(error) = sent {
            return Err(self.turned_away().unwrap_or_else(|| error.into()));
        }
        let mut header = [0; HEADER];
        self.stream.read_exact(&mut header)?;
        let length = message_length(header, tag::RESPONSE_MESSAGE, request.longest_answer)?;
        let mut message = Zeroizing::new(Vec::with_capacity(length.min(64 << 10)));
        message.extend_from_slice(&header);
        // The memory grows with what really comes, and never within an answer that holds a key.
        while message.len() < length {
            let start = message.len();
            let more = (length - start).min(64 << 10);
            message = grown(message, more);
            self.stream.read_exact(&mut message[start..])?;
        }
        let answer = Answer::new(message, self.version);
        match answer.outcome(request.operation)? {
            Ok(()) => Ok(answer),
            Err(failure) => Err(Trouble::Refused(failure)),
        }
    }
}

impl Connection {
    /// What the server said before it broke the connection off, if that was that it does not want this host. Who writes
    /// then hears only that nobody listens any more.
    fn turned_away(&mut self) -> Option<Trouble> {
        let StreamOwned { conn, sock } = &mut self.stream;
        while conn.read_tls(sock).is_ok_and(|count| count > 0) {
            if let Err(alert @ rustls::Error::AlertReceived(_)) = conn.process_new_packets() {
                return Some(Trouble::TurnedAway(tls::fault(&alert)));
            }
        }
        None
    }
}

const NO_COMMON_VERSION: Malformed = Malformed("it speaks no version of KMIP that this host may speak with it");

/// The versions in which a server is asked for those that it speaks, up to `newest`: those first that most servers
/// speak. An old one may take a 2 for something else than KMIP, and end the connection.
fn asked_in(newest: Version) -> impl Iterator<Item = Version> {
    let known = VERSIONS.into_iter().filter(move |version| (Version::WITH_DISCOVERY..=newest).contains(version));
    let (old, new): (Vec<_>, Vec<_>) = known.partition(|version| !version.has_tagged_attributes());
    old.into_iter().chain(new)
}

/// `bytes` with `more` zeros behind them; what had to be moved for it is wiped.
fn grown(mut bytes: Zeroizing<Vec<u8>>, more: usize) -> Zeroizing<Vec<u8>> {
    let length = bytes.len() + more;
    if bytes.capacity() < length {
        let mut larger = Zeroizing::new(Vec::with_capacity(length.max(bytes.capacity() * 2)));
        larger.extend_from_slice(&bytes);
        bytes = larger;
    }
    bytes.resize(length, 0);
    bytes
}

/// `HOST:PORT` or `[ADDRESS]:PORT`, taken apart.
pub fn split_address(server: &str) -> Option<(&str, u16)> {
    let (host, port) = server.rsplit_once(':')?;
    let host = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
    let port: u16 = port.parse().ok().filter(|&port| port > 0)?;
    ServerName::try_from(host).ok().map(|_| (host, port))
}

fn connect(server: &str, deadline: Instant) -> io::Result<TcpStream> {
    let mut failure = io::Error::other("its name has no address");
    let addresses = resolve(server, deadline)?;
    for (number, address) in addresses.iter().enumerate() {
        // One that nobody answers at leaves time for those after it. There are never more than fit.
        let share = left(deadline)? / (addresses.len() - number) as u32;
        match TcpStream::connect_timeout(address, share) {
            Ok(socket) => return Ok(socket),
            Err(error) => failure = error,
        }
    }
    Err(failure)
}

/// The addresses of a server. The system's resolver knows no deadline, so it works on a thread of its own.
fn resolve(server: &str, deadline: Instant) -> io::Result<Vec<SocketAddr>> {
    let (host, port) = split_address(server).ok_or(io::ErrorKind::InvalidInput)?;
    if let Ok(address) = host.parse::<IpAddr>() {
        return Ok(vec![SocketAddr::new(address, port)]);
    }
    let (report, reported) = mpsc::channel();
    let host = host.to_owned();
    std::thread::Builder::new().name("resolve".to_owned()).stack_size(256 << 10).spawn(move || {
        // Nobody listens any more if it took too long.
        let _ = report.send((host.as_str(), port).to_socket_addrs().map(Iterator::collect));
    })?;
    reported.recv_timeout(left(deadline)?).map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?
}

/// The time until `deadline`.
fn left(deadline: Instant) -> io::Result<Duration> {
    let left = deadline.saturating_duration_since(Instant::now());
    // A time-out of zero would mean none at all.
    if left.is_zero() { Err(io::ErrorKind::TimedOut.into()) } else { Ok(left) }
}

/// A socket on which everything together, and not each read by itself, has to be done by a deadline.
struct Timed {
    socket: TcpStream,
    deadline: Instant,
}

/// What a socket says when its time is over.
fn in_time<T>(outcome: io::Result<T>) -> io::Result<T> {
    outcome.map_err(|error| match error.kind() {
        io::ErrorKind::WouldBlock => io::ErrorKind::TimedOut.into(),
        _ => error,
    })
}

impl Read for Timed {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.socket.set_read_timeout(Some(left(self.deadline)?))?;
        in_time(self.socket.read(buffer))
    }
}

impl Write for Timed {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        self.socket.set_write_timeout(Some(left(self.deadline)?))?;
        in_time(self.socket.write(buffer))
    }

    fn flush(&mut self) -> io::Result<()> {
        self.socket.flush()
    }
}
