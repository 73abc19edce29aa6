//! systemd: what it passes on at start, and what it keeps while the daemon is away.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::pipe::PipeFlags;
use sd_notify::NotifyState;

use crate::sys::inherited;
use crate::sys::seccomp::Listener;

/// The names (`FileDescriptorName=`) of the socket units' descriptors.
const WRAPPER: &str = "wrapper";
const CONTROL: &str = "control";
/// The names of stored listeners: `guest-<pid>`.
const GUEST_PREFIX: &str = "guest-";

/// How long systemd may take to confirm what it was given.
const BARRIER_DEADLINE: Duration = Duration::from_secs(5);

/// What the service manager passed on.
#[derive(Default)]
pub struct Inherited {
    /// The socket for wrappers.
    pub wrapper: Option<UnixListener>,
    /// The socket for hook and operators.
    pub control: Option<UnixListener>,
    /// The listeners of the guests that an earlier daemon had, with their process ids.
    pub guests: Vec<(u32, Listener)>,
}

impl Inherited {
    /// Takes it all; nothing when no service manager started this process.
    ///
    /// # Errors
    /// When the protocol of sd_listen_fds(3) is broken.
    pub fn take() -> io::Result<Self> {
        let mut taken = Inherited::default();
        for (descriptor, name) in inherited::take_descriptors()? {
            match name.as_str() {
                WRAPPER => taken.wrapper = Some(UnixListener::from(descriptor)),
                CONTROL => taken.control = Some(UnixListener::from(descriptor)),
                other => match (parse_guest(other), Listener::from_descriptor(descriptor)) {
                    (Some(pid), Ok(listener)) => taken.guests.push((pid, listener)),
                    (_, Err(error)) => tracing::warn!("the stored descriptor {other:?} is not used: {error}"),
                    (None, Ok(_)) => tracing::warn!("the stored listener {other:?} has no process id and is not used"),
                },
            }
        }
        Ok(taken)
    }
}

fn parse_guest(name: &str) -> Option<u32> {
    name.strip_prefix(GUEST_PREFIX)?.parse().ok()
}

/// Has systemd keep the listener of guest `pid` until its last process has ended, whatever becomes
/// of this daemon. It is kept when this returns.
///
/// # Errors
/// When systemd does not confirm in time. Without a service manager nothing is kept, and that is
/// no error.
pub fn keep_listener(pid: u32, listener: &Listener) -> io::Result<()> {
    if std::env::var_os("NOTIFY_SOCKET").is_none() {
        return Ok(());
    }
    let name = format!("{GUEST_PREFIX}{pid}");
    sd_notify::notify_with_fds(&[NotifyState::FdStore, NotifyState::FdName(&name)], &[listener.as_fd()])?;
    barrier()
}

/// Waits until systemd has worked on everything it was sent: sd_notify_barrier(3).
fn barrier() -> io::Result<()> {
    let (closed_by_systemd, sent) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
    sd_notify::notify_with_fds(&[NotifyState::Custom("BARRIER=1")], &[sent.as_fd()])?;
    drop::<OwnedFd>(sent);
    let timeout = Timespec { tv_sec: BARRIER_DEADLINE.as_secs() as i64, tv_nsec: 0 };
    match rustix::event::poll(&mut [PollFd::new(&closed_by_systemd, PollFlags::IN)], Some(&timeout))? {
        0 => Err(io::ErrorKind::TimedOut.into()),
        _ => Ok(()),
    }
}

/// Tells systemd that sockets are served, and what `systemctl status` shall show.
pub fn ready(status: &str) {
    if let Err(error) = sd_notify::notify(&[NotifyState::Ready, NotifyState::Status(status)]) {
        tracing::warn!("the service manager could not be told that volcryptd is ready: {error}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stored_listener_is_named_after_its_process() {
        assert_eq!(parse_guest("guest-4711"), Some(4711));
        for other in ["wrapper", "guest-", "guest-x", "guest--1", "stored"] {
            assert_eq!(parse_guest(other), None);
        }
    }
}
