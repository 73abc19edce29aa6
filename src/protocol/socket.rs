//! The two ends of a connection to the control socket.

use std::fmt;
use std::fs::File;
use std::io::{self, BufRead, BufReader, IoSlice, Read};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};

use super::control::{Reply, Request, Response};
use super::registration::receive_with_descriptors;

/// The longest message in bytes. A domain with a thousand disks needs about half a megabyte.
pub const MAX_MESSAGE: u64 = 16 << 20;

/// A connection to the control socket.
pub struct ControlClient {
    stream: UnixStream,
}

impl ControlClient {
    /// Connects to `socket`. Every later step may take `deadline` at most.
    ///
    /// # Errors
    /// [`CallError::Unreachable`].
    pub fn connect(socket: &Path, deadline: Duration) -> Result<Self, CallError> {
        let unreachable = |source| CallError::Unreachable { socket: socket.to_owned(), source };
        let stream = UnixStream::connect(socket).map_err(unreachable)?;
        stream.set_read_timeout(Some(deadline)).map_err(unreachable)?;
        stream.set_write_timeout(Some(deadline)).map_err(unreachable)?;
        Ok(ControlClient { stream })
    }

    /// Sends `request` and waits for what comes of it.
    ///
    /// # Errors
    /// [`CallError`].
    pub fn call(self, request: &Request) -> Result<Reply, CallError> {
        self.exchange(request, None, &mut |_, _| {})
    }

    /// As [`Self::call`]; meanwhile `listener` is told how much is done, and how much there is. The deadline begins anew
    /// each time.
    ///
    /// # Errors
    /// [`CallError`].
    pub fn call_and_listen(self, request: &Request, listener: &mut dyn FnMut(u64, u64)) -> Result<Reply, CallError> {
        self.exchange(request, None, listener)
    }

    /// As [`Self::call`], with a descriptor that the request is about.
    ///
    /// # Errors
    /// [`CallError`].
    pub fn call_with_file(self, request: &Request, file: &File) -> Result<Reply, CallError> {
        self.exchange(request, Some(file), &mut |_, _| {})
    }

    /// As [`Self::call`], and stays connected.
    ///
    /// # Errors
    /// [`CallError`].
    pub fn call_and_stay(self, request: &Request) -> Result<(Reply, Connection), CallError> {
        let reply = self.exchange(request, None, &mut |_, _| {})?;
        Ok((reply, Connection { stream: self.stream }))
    }

    fn exchange(
        &self,
        request: &Request,
        file: Option<&File>,
        listener: &mut dyn FnMut(u64, u64),
    ) -> Result<Reply, CallError> {
        let mut message = serde_json::to_vec(request).map_err(|error| CallError::Broken(error.into()))?;
        message.push(b'\n');
        self.send(&message, file).map_err(CallError::Broken)?;

        let mut answers = BufReader::new((&self.stream).take(MAX_MESSAGE));
        loop {
            let mut answer = String::new();
            answers.read_line(&mut answer).map_err(CallError::Broken)?;
            match serde_json::from_str(&answer) {
                Ok(Response::Working { done, total }) => {
                    answers.get_mut().set_limit(MAX_MESSAGE);
                    listener(done, total);
                }
                Ok(Response::Done(reply)) => return Ok(reply),
                Ok(Response::Refused { sentence, errno }) => return Err(CallError::Refused { sentence, errno }),
                Err(_) if answer.is_empty() => return Err(CallError::Broken(io::ErrorKind::UnexpectedEof.into())),
                Err(error) => return Err(CallError::Broken(error.into())),
            }
        }
    }

    fn send(&self, message: &[u8], file: Option<&File>) -> io::Result<()> {
        let descriptors: Vec<_> = file.iter().map(|file| file.as_fd()).collect();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !descriptors.is_empty() {
            ancillary.push(SendAncillaryMessage::ScmRights(&descriptors));
        }
        // The descriptor travels with the first bytes; the rest of a long message follows.
        let sent = rustix::net::sendmsg(&self.stream, &[IoSlice::new(message)], &mut ancillary, SendFlags::NOSIGNAL)?;
        io::Write::write_all(&mut &self.stream, &message[sent..])
    }
}

/// The connection of a client for which the daemon holds something. That ends when the connection does.
pub struct Connection {
    stream: UnixStream,
}

impl Connection {
    /// Ends it, and waits until the daemon holds nothing for it any more.
    pub fn end(self) {
        let mut left = Vec::new();
        // Whoever is gone holds nothing either.
        let _ = self.stream.shutdown(Shutdown::Write).and_then(|()| (&self.stream).read_to_end(&mut left));
    }
}

/// The daemon's side: one line from a client, and the file that came with it.
///
/// # Errors
/// Those of the socket, time-outs among them; `InvalidData` for a line that is cut off or longer than
/// [`MAX_MESSAGE`].
pub fn receive_request(stream: &UnixStream) -> io::Result<(Vec<u8>, Option<OwnedFd>)> {
    let mut message = Vec::new();
    let mut file = None;
    let mut buffer = vec![0; 64 << 10];
    loop {
        let (length, mut descriptors) = receive_with_descriptors(stream, &mut buffer)?;
        file = file.or_else(|| descriptors.pop());
        message.extend_from_slice(&buffer[..length]);
        if message.ends_with(b"\n") {
            return Ok((message, file));
        }
        if length == 0 || message.len() as u64 > MAX_MESSAGE {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "the request is cut off or too long"));
        }
    }
}

/// Why a call to the daemon gave no result.
#[derive(Debug)]
pub enum CallError {
    /// Nobody listens on the socket.
    Unreachable {
        /// The socket that was tried.
        socket: PathBuf,
        /// What connecting to it said.
        source: io::Error,
    },
    /// The daemon did not answer, or not in time, or what it said makes no sense.
    Broken(io::Error),
    /// The daemon answered no.
    Refused {
        /// What is wrong and what to do.
        sentence: String,
        /// The errno that an opener would get for the same reason.
        errno: i32,
    },
}

impl CallError {
    /// Whether nobody listens, as opposed to a daemon that says no or takes its time.
    pub fn is_daemon_down(&self) -> bool {
        matches!(self, CallError::Unreachable { .. })
    }
}

impl fmt::Display for CallError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            CallError::Unreachable { socket, source } => write!(
                f,
                "volcryptd cannot be reached on {} ({source}): run 'systemctl status volcryptd' to see why",
                socket.display()
            ),
            CallError::Broken(source) if source.kind() == io::ErrorKind::WouldBlock => {
                f.write_str("volcryptd did not answer in time: run 'journalctl -u volcryptd' to see why")
            }
            CallError::Broken(source) => {
                write!(f, "volcryptd broke off ({source}): run 'journalctl -u volcryptd' to see why")
            }
            CallError::Refused { sentence, .. } => f.write_str(sentence),
        }
    }
}

impl std::error::Error for CallError {}
