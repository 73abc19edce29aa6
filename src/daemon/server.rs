//! Answers the opens of the guests.
//!
//! A few threads receive the calls of all guests. They answer at once what can be told from the kernel's
//! caches to be no block device, which is nearly everything. The rest goes to the pool: it may take
//! a disk, a database or a key server.
//!
//! Even to learn what a call asks for can take as long as its guest likes: the path is read from the guest's
//! memory, and a page of that may be in the hands of another process (userfaultfd(2), FUSE). So each guest
//! can hold up one of these threads, and whenever that was the last one another is started.

use std::io;
use std::os::fd::AsFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use rustix::fs::OFlags;
use rustix::io::Errno;

use super::auditing::with_source;
use super::broker::{self, Broker, Verdict};
use super::deadlines::Deadlines;
use super::guests::{Event, Guest, Guests};
use super::pool::Pool;
use super::receivers::{Receivers, Relief};
use crate::audit::Kind;
use crate::domain::Requester;
use crate::guest::{Located, Node, OpenRequest, Written, locate, written_file};
use crate::refusal::{Reason, Refusal};
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
        let Some(work) = guest.begin_work() else {
            tracing::error!(
                pid = guest.pid(),
                "{guest} was refused {:?} with ETIMEDOUT: too many earlier opens of it still wait for storage",
                String::from_utf8_lossy(&request.path)
            );
            return settle(guest.listener().refuse(call.id, libc::ETIMEDOUT));
        };
        let server = Arc::clone(self);
        self.pool.run(move || {
            let _deadline = deadline;
            server.decide(work.guest(), &call, &request);
        });
    }

    fn decide(&self, guest: &Guest, call: &Notification, request: &OpenRequest) {
        let listener = guest.listener();
        let node = match locate(call.tid, request, true) {
            Located::NoVolume if guest.may_have_volumes() => return self.decide_file(guest, call, request),
            Located::NoVolume => return settle(listener.let_through(call.id)),
            Located::Refused(errno) => {
                if errno == Errno::ACCESS {
                    let path = String::from_utf8_lossy(&request.path);
                    tracing::error!(
                        pid = guest.pid(),
                        "{guest} was refused {path:?}: neither root nor its own user may look there (a FUSE file system needs \
                         the option allow_other)"
                    );
                }
                return settle(listener.refuse(call.id, errno.raw_os_error()));
            }
            Located::WouldWait => return settle(listener.refuse(call.id, libc::EAGAIN)),
            Located::Device(node) => node,
            Located::Unknown(error) => return refuse_unknown(guest, call, request, &error),
        };
        // What was read of the thread's files means nothing if it was another thread's by then.
        if !listener.is_waiting(call.id) {
            return;
        }
        let requester = self.broker.guest(call.tid);
        match guest.asker().ask(|| self.judge(guest, &requester, &node, request)) {
            Ok(Verdict::LetThrough) => settle(listener.let_through(call.id)),
            // Where a volume is concerned it counts which domain asks.
            outcome => {
                let asker = guest.asker().known_as(requester.facts());
                asker.ask(|| self.carry_out(outcome, guest, call, request));
            }
        }
    }

    /// Decides on what is no device, for a guest that may have a protected volume.
    fn decide_file(&self, guest: &Guest, call: &Notification, request: &OpenRequest) {
        let listener = guest.listener();
        let file = match written_file(call.tid, request) {
            Ok(Some(file)) => file,
            Ok(None) => return settle(listener.let_through(call.id)),
            Err(error) => return refuse_unknown(guest, call, request, &error),
        };
        if !listener.is_waiting(call.id) {
            return;
        }
        let requester = self.broker.guest(call.tid);
        match guest.asker().ask(|| self.broker.check_written(Written::File(&file), &requester)) {
            Ok(()) => settle(listener.let_through(call.id)),
            Err(refusal) => {
                let asker = guest.asker().known_as(requester.facts());
                asker.ask(|| self.carry_out(Err(refusal), guest, call, request));
            }
        }
    }

    /// Answers the call as it was judged.
    fn carry_out(&self, outcome: Result<Verdict, Refusal>, guest: &Guest, call: &Notification, request: &OpenRequest) {
        let listener = guest.listener();
        let path = String::from_utf8_lossy(&request.path);
        match outcome.and_then(|verdict| self.record(verdict, guest, call, &path)) {
            Ok(Verdict::LetThrough) => settle(listener.let_through(call.id)),
            Ok(Verdict::OnMapping) => {
                guest.takes_volume();
                settle(listener.let_through(call.id));
            }
            Ok(Verdict::Mapping(volume, mapping, _)) => {
                guest.takes_volume();
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
                self.broker.merge_audit_soon();
            }
            Err(refusal) => {
                let errno = refusal.errno();
                if listener.refuse(call.id, errno).is_ok() {
                    tracing::error!(pid = guest.pid(), path = %path, errno, "{guest} was refused {path:?}: {refusal}");
                }
                self.broker.record_refusal(&refusal);
            }
        }
    }

    /// Lets a mapping be handed out once that is recorded, so that no use of a key is missing in the log.
    fn record(&self, verdict: Verdict, guest: &Guest, call: &Notification, path: &str) -> Result<Verdict, Refusal> {
        if let Verdict::Mapping(volume, _, cached_since) = &verdict {
            if !guest.listener().is_waiting(call.id) {
                let sentence = format!("the open of volume {volume} was given up before its mapping was ready");
                return Err(Refusal::new(Reason::TimedOut, sentence).of(volume));
            }
            let detail = with_source(&format!("opened as {path}"), *cached_since);
            self.broker.record_use(Kind::KeyUsed, volume, &detail)?;
        }
        Ok(verdict)
    }

    fn judge(
        &self,
        guest: &Guest,
        requester: &broker::Guest<'_>,
        node: &Node,
        request: &OpenRequest,
    ) -> Result<Verdict, Refusal> {
        // A mere handle reads and writes nothing, and opening it for real comes by here again.
        if request.is_path_only() {
            return Ok(Verdict::LetThrough);
        }
        if node.passes_commands {
            return self.broker.pass_commands(node.device, requester);
        }
        let verdict = self.broker.open(node.device, node.permitted, request.device_flags(), requester)?;
        if matches!(verdict, Verdict::LetThrough) && request.writes() && guest.may_have_volumes() {
            self.broker.check_written(Written::Device(node.device), requester)?;
        }
        Ok(verdict)
    }
}

fn refuse_unknown(guest: &Guest, call: &Notification, request: &OpenRequest, error: &io::Error) {
    let path = String::from_utf8_lossy(&request.path);
    tracing::error!(pid = guest.pid(), "it cannot be told what {path:?} is for {guest}: {error}");
    settle(guest.listener().refuse(call.id, error.raw_os_error().unwrap_or(libc::EACCES)));
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
