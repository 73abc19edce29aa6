//! Answers the opens of the guests.
//!
//! A few threads receive the calls of all guests. They answer at once what can be told from the kernel's
//! caches to be no block device, which is nearly everything. The rest goes to the pool: it may take
//! a disk, a database or a key server.
//!
//! Even to learn what a call asks for can take as long as its guest likes: the path is read from the guest's
//! memory, and a page of that may be in the hands of another process (userfaultfd(2), FUSE). So each guest
//! can hold up one of these threads, and whenever that was the last one another is started.

mod decision;

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use super::broker::Broker;
use super::deadlines::{Deadline, Deadlines};
use super::guests::{Event, Guest, Guests};
use super::pool::Pool;
use super::receivers::{Receivers, Relief};
use super::turns::Turns;
use crate::guest::{Located, OpenRequest, locate};
use crate::sys::seccomp::Notification;

/// How long nothing is received for a guest when the system is short of what that takes.
const RECEIVE_AGAIN: Duration = Duration::from_millis(100);

/// What the threads of the server share.
pub struct Server {
    broker: Arc<Broker>,
    guests: Arc<Guests>,
    deadlines: Arc<Deadlines>,
    receivers: Receivers,
    pool: Pool,
    open_deadline: Duration,
}

/// An open that is to be decided on.
struct Open {
    guest: Arc<Guest>,
    call: Notification,
    request: OpenRequest,
    /// Refuses it when it takes too long.
    _deadline: Deadline,
}

/// Where a thread says that it cannot receive any more.
type Failed = mpsc::Sender<io::Error>;

impl Server {
    /// A server that refuses what is not decided within `open_deadline`.
    pub fn new(broker: Arc<Broker>, guests: Arc<Guests>, pool: Pool, open_deadline: Duration) -> Arc<Self> {
        let (deadlines, receivers) = (Arc::default(), Receivers::default());
        Arc::new(Server { broker, guests, deadlines, receivers, pool, open_deadline })
    }

    /// Serves until receiving itself fails.
    ///
    /// # Errors
    /// When the kernel will not let this process wait for events, or start a thread.
    pub fn serve(self: &Arc<Self>) -> io::Result<()> {
        let deadlines = Arc::clone(&self.deadlines);
        std::thread::Builder::new()
            .name("deadlines".to_owned())
            .stack_size(256 << 10)
            .spawn(move || deadlines.keep())?;
        let (fail, failed) = mpsc::channel();
        // Two, lest the first call has to wait until a thread is started.
        self.start_receiver(&fail)?;
        self.start_receiver(&fail)?;
        // `fail` is here: that all threads have ended is no way for this to end.
        failed.recv().map_or(Ok(()), Err)
    }

    fn start_receiver(self: &Arc<Self>, fail: &Failed) -> io::Result<()> {
        let (server, fail) = (Arc::clone(self), fail.clone());
        self.receivers.start(move || server.receive_calls(&fail))
    }

    fn receive_calls(self: &Arc<Self>, fail: &Failed) {
        loop {
            let event = match self.guests.wait() {
                Ok(event) => event,
                Err(error) => {
                    // If that is not heard, it was said before.
                    let _ = fail.send(error);
                    return;
                }
            };
            let relief = self.receivers.has_come(|| self.start_receiver(fail));
            // A panic was told of, and costs the guest this call only: that has its deadline.
            let _ = catch_unwind(AssertUnwindSafe(|| self.take(event, relief)));
            if !self.receivers.may_wait() {
                return;
            }
        }
    }

    fn take(self: &Arc<Self>, event: Event, relief: Relief) {
        match event {
            Event::Call(guest) => {
                let _rearm = Rearm(&self.guests, &guest);
                self.receive(&guest, relief);
            }
            Event::End(guest) => {
                tracing::info!(pid = guest.pid(), "process {} has ended", guest.pid());
                self.guests.remove(&guest);
            }
        }
    }

    fn receive(self: &Arc<Self>, guest: &Arc<Guest>, relief: Relief) {
        match guest.listener().receive() {
            Ok(Some(call)) if relief == Relief::Waiting => self.answer(guest, call),
            // To read what it asks for could leave every guest without an answer.
            Ok(Some(call)) => settle(guest.listener().refuse(call.id, libc::EAGAIN)),
            Ok(None) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                tracing::error!(pid = guest.pid(), "a call of {guest} waits longer: {error}");
                std::thread::sleep(RECEIVE_AGAIN);
            }
            Err(error) => {
                tracing::error!(
                    pid = guest.pid(),
                    "the calls of {guest} cannot be received any more: {error}; run 'systemctl restart volcryptd' if it is to \
                     open anything again"
                );
                self.guests.remove(guest);
            }
        }
    }

    fn answer(self: &Arc<Self>, guest: &Arc<Guest>, call: Notification) {
        let deadline = self.deadlines.add(Instant::now() + self.open_deadline, guest, call.id);
        let request = match OpenRequest::read(&call) {
            Ok(request) => request,
            Err(error) => {
                let errno = error.raw_os_error().unwrap_or(libc::EACCES);
                // A thread that is gone needs no answer.
                if guest.listener().refuse(call.id, errno).is_ok() {
                    tracing::error!(
                        pid = guest.pid(),
                        errno,
                        "an open of {guest} was refused because its arguments cannot be read: {error}"
                    );
                }
                return;
            }
        };
        let may_copy = request.writes() && guest.may_have_volumes();
        if let Located::NoVolume = locate(call.tid, &request, false)
            && !may_copy
        {
            return settle(guest.listener().let_through(call.id));
        }
        let open = Open { guest: Arc::clone(guest), call, request, _deadline: deadline };
        self.at_its_turn(guest.work(), open, Server::decide);
    }

    /// Has `work` done for `open` on a thread of the pool.
    fn at_its_turn(
        self: &Arc<Self>,
        turns: &Arc<Turns>,
        open: Open,
        work: impl FnOnce(&Arc<Self>, Open) + Send + 'static,
    ) {
        let (server, guest, call) = (Arc::clone(self), Arc::clone(&open.guest), open.call.id);
        let path = open.request.path.clone();
        if !turns.run(&self.pool, call, move || work(&server, open)) {
            tracing::error!(
                pid = guest.pid(),
                "{guest} was refused {:?} with ETIMEDOUT: too many earlier opens of it still wait for storage",
                String::from_utf8_lossy(&path)
            );
            settle(guest.listener().refuse(call, libc::ETIMEDOUT));
        }
    }
}

/// Has the next call of a guest reported when this one was dealt with, also when that panicked.
struct Rearm<'a>(&'a Guests, &'a Guest);

impl Drop for Rearm<'_> {
    fn drop(&mut self) {
        self.0.rearm(self.1);
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
