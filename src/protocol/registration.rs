//! How a wrapper hands its listener to the daemon: one message with the byte [`HELLO`] and one
//! descriptor, answered with the byte [`WELCOME`] once the listener is safe even from a restart of
//! the daemon. Until then the wrapper executes nothing.

use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
};

use crate::sys::seccomp::Listener;

/// The wrapper's message; the number is the version of this protocol.
pub const HELLO: u8 = 1;
/// The daemon's answer.
pub const WELCOME: u8 = 1;

/// The wrapper's side: hands `listener` over and waits for the daemon's welcome.
///
/// # Errors
/// Those of the socket, time-outs among them; `UnexpectedEof` when the daemon hung up instead.
pub fn hand_over(stream: &UnixStream, listener: &Listener) -> io::Result<()> {
    let descriptors = [listener.as_fd()];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    ancillary.push(SendAncillaryMessage::ScmRights(&descriptors));
    rustix::net::sendmsg(stream, &[IoSlice::new(&[HELLO])], &mut ancillary, SendFlags::NOSIGNAL)?;

    let mut answer = [0];
    (&*stream).read_exact(&mut answer)?;
    match answer {
        [WELCOME] => Ok(()),
        [other] => Err(io::Error::other(format!("volcryptd answered {other}: its version does not fit the wrapper's"))),
    }
}

/// The daemon's side: takes the listener that a wrapper sends.
///
/// # Errors
/// Those of the socket; `InvalidData` or `InvalidInput` when what came is no listener.
pub fn take_over(stream: &UnixStream) -> io::Result<Listener> {
    let mut byte = [0];
    let mut descriptors = receive_with_descriptors(stream, &mut byte)?.1;
    match (byte, descriptors.pop(), descriptors.is_empty()) {
        ([HELLO], Some(descriptor), true) => Listener::from_descriptor(descriptor),
        _ => Err(io::Error::new(io::ErrorKind::InvalidData, "the message is not that of a wrapper")),
    }
}

/// The daemon's welcome.
///
/// # Errors
/// Those of the socket.
pub fn welcome(stream: &UnixStream) -> io::Result<()> {
    (&*stream).write_all(&[WELCOME])
}

/// Receives bytes and the descriptors (three at most) that come with them, close-on-exec.
///
/// # Errors
/// Those of recvmsg(2).
pub fn receive_with_descriptors(stream: &UnixStream, buffer: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(3))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let received =
        rustix::net::recvmsg(stream, &mut [IoSliceMut::new(buffer)], &mut ancillary, RecvFlags::CMSG_CLOEXEC)?;
    let descriptors = ancillary
        .drain()
        .filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(descriptors) => Some(descriptors),
            _ => None,
        })
        .flatten()
        .collect();
    Ok((received.bytes, descriptors))
}
