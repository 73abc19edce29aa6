//! Answers the opens of the guests.
//!
//! One thread receives the calls of all guests. It answers at once what it can tell from the kernel's
//! caches to be no block device, which is nearly everything. The rest goes to the pool: it may take
//! a disk, a database or a key server.

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::fs::OFlags;

use super::broker::{Broker, Verdict};
use super::deadlines::Deadlines;
use super::guests::{Event, Guest, Guests};
use super::pool::Pool;
use crate::guest::{BlockNode, Located, Malformed, OpenRequest, locate};
use crate::refusal::Refusal;
use crate::sys::seccomp::Notification;

/// What the threads of the server share.
pub struct Server {
    broker: Arc<Broker>,
    guests: Arc<Guests>,
    deadlines: Arc<Deadlines>,
    pool: Pool,
    open_deadline: Duration,
}

impl Server {
    /// A server that refuses what is not decided within `open_deadline`.
    pub fn new(broker: Arc<Broker>, guests: Arc<Guests>, pool: Pool, open_deadline: Duration) -> Arc<Self> {
        Arc::new(Server { broker, guests, deadlines: Arc::default(), pool, open_deadline })
    }

    /// Serves until receiving itself fails.
    ///
    /// # Errors
    /// When the kernel will not let this process wait for events, or start a thread.
    pub fn serve(self: &Arc<Self>) -> io::Result<()> {
        let deadlines = Arc::clone(&self.deadlines);
        std::thread::Builder::new().name("deadlines".to_owned()).spawn(move || deadlines.keep())?;
        loop {
            for event in self.guests.wait()? {
                match event {
                    Event::Call(guest) => self.receive(&guest),
                    Event::End(guest) => {
                        tracing::info!(pid = guest.pid(), "{guest} has ended");
                        self.guests.remove(&guest);
                    }
                }
            }
        }
    }

    fn receive(self: &Arc<Self>, guest: &Arc<Guest>) {
        match guest.listener().receive() {
            Ok(Some(call)) => self.answer(guest, call),
            Ok(None) => {}
            Err(error) => {
                tracing::error!(pid = guest.pid(), "the calls of {guest} cannot be received any more: {error}");
                self.guests.remove(guest);
            }
        }
    }

    fn answer(self: &Arc<Self>, guest: &Arc<Guest>, call: Notification) {
        let due = Instant::now() + self.open_deadline;
        let request = match OpenRequest::read(&call) {
            Ok(request) => request,
            Err(Malformed::ForTheKernel) => return settle(guest.listener().let_through(call.id)),
            Err(Malformed::Unreadable(error)) => {
                // A thread that is gone needs no answer; any other gets its refusal.
                tracing::debug!(pid = guest.pid(), "a call of {guest} cannot be read: {error}");
                return settle(guest.listener().refuse(call.id, libc::EACCES));
            }
        };
        if let Located::NotABlockDevice = locate(call.tid, &request, false) {
            return settle(guest.listener().let_through(call.id));
        }
        self.deadlines.add(due, guest, call.id);
        self.guests.work_begins(guest);
        let (server, guest) = (Arc::clone(self), Arc::clone(guest));
        self.pool.run(move || {
            let work = Work { guests: &server.guests, guest: &guest };
            server.decide(work.guest, &call, &request);
        });
    }

    fn decide(&self, guest: &Guest, call: &Notification, request: &OpenRequest) {
        let listener = guest.listener();
        let path = String::from_utf8_lossy(&request.path);
        let node = match locate(call.tid, request, true) {
            Located::NotABlockDevice => return settle(listener.let_through(call.id)),
            Located::BlockDevice(node) => node,
            Located::WouldWait => return settle(listener.refuse(call.id, libc::EAGAIN)),
            Located::Unknown(error) => {
                tracing::error!(pid = guest.pid(), "it cannot be told what {path:?} is for {guest}: {error}");
                return settle(listener.refuse(call.id, error.raw_os_error().unwrap_or(libc::EACCES)));
            }
        };
        // What was read of the thread's files means nothing if it was another thread's by then.
        if !listener.is_waiting(call.id) {
            return;
        }
        match self.judge(&node, request) {
            Ok(Verdict::LetThrough) => settle(listener.let_through(call.id)),
            Ok(Verdict::Mapping(volume, mapping)) => {
                let close_on_exec = request.flags.contains(OFlags::CLOEXEC);
                match listener.inject(call.id, mapping.as_fd(), close_on_exec) {
                    Ok(()) => tracing::info!(
                        pid = guest.pid(), volume = %volume, path = %path,
                        "{guest} got the mapping of volume {volume} for {path:?}"
                    ),
                    // Closing it removes the mapping again.
                    Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {}
                    Err(error) => {
                        tracing::error!(pid = guest.pid(), volume = %volume, "{guest} could not take the mapping of volume {volume}: {error}");
                        settle(listener.refuse(call.id, error.raw_os_error().unwrap_or(libc::EIO)));
                    }
                }
            }
            Err(refusal) => {
                let errno = refusal.errno();
                if listener.refuse(call.id, errno).is_ok() {
                    tracing::error!(pid = guest.pid(), path = %path, errno, "{guest} was refused {path:?}: {refusal}");
                }
            }
        }
    }

    fn judge(&self, node: &BlockNode, request: &OpenRequest) -> Result<Verdict, Refusal> {
        // A mere handle reads and writes nothing, and opening it for real comes by here again.
        if request.is_path_only() {
            return Ok(Verdict::LetThrough);
        }
        self.broker.open(node.device, node.permitted, request.device_flags())
    }
}

/// Counts a call out of work, also when working on it panicked.
struct Work<'a> {
    guests: &'a Guests,
    guest: &'a Guest,
}

impl Drop for Work<'_> {
    fn drop(&mut self) {
        self.guests.work_ends(self.guest);
    }
}

/// The call may have gone away, or been refused at its deadline; that is no news.
fn settle(answered: io::Result<()>) {
    if let Err(error) = answered
        && error.raw_os_error() != Some(libc::ENOENT)
    {
        tracing::error!("a call could not be answered: {error}");
    }
}
