use std::collections::HashMap;
use std::fmt;
use std::io;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use rustix::event::{PollFd, PollFlags, Timespec, epoll};

use super::turns::Turns;
use crate::audit::{Asker, Role};
use crate::guest::{Domains, start_time};
use crate::sys::seccomp::Listener;

/// How many calls of one guest may be worked on at a time, so that no guest takes all threads. A call whose storage
/// does not answer keeps its thread. QEMU opens its disks one after the other.
const AT_A_TIME: usize = 12;
/// How many more may look up what else libvirt has given to the guest. That may be on a dead file server, which has
/// nothing to do with what the others ask for.
const LOOKUPS_AT_A_TIME: usize = 4;

/// A registered QEMU.
pub struct Guest {
    number: u64,
    pid: u32,
    /// When that process started: its number may be another one's later.
    started: Option<u64>,
    listener: Arc<Listener>,
    domains: Arc<dyn Domains>,
    name: OnceLock<String>,
    work: Arc<Turns>,
    lookups: Arc<Turns>,
    has_volumes: AtomicBool,
}

impl Guest {
    /// The process that registered.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Where its calls arrive.
    pub fn listener(&self) -> &Listener {
        &self.listener
    }

    /// The name of its domain, for people to read. It is libvirt's word: what QEMU says of itself stands in
    /// QEMU's memory, and reading that can take as long as QEMU likes.
    pub fn domain(&self) -> Option<&str> {
        if self.name.get().is_none()
            && let Ok(Some(domain)) = self.domains.of(self.pid)
        {
            return Some(self.name.get_or_init(|| domain.name));
        }
        self.name.get().map(String::as_str)
    }

    /// The guest as the one who asks for something, whatever domain it may be.
    pub fn asker(&self) -> Asker {
        Asker { pid: Some(self.pid), by: Role::Guest, ..Asker::default() }
    }

    /// Whether it may have a protected volume open: one was given to it at some time.
    pub fn may_have_volumes(&self) -> bool {
        self.has_volumes.load(Ordering::Acquire)
    }

    /// Notes that it is given a protected volume, or may have been.
    pub fn takes_volume(&self) {
        self.has_volumes.store(true, Ordering::Release);
    }

    /// Whether a process that can make calls is left.
    fn lives(&self) -> bool {
        let mut listener = [PollFd::new(&self.listener, PollFlags::IN)];
        let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
        let looked = rustix::event::poll(&mut listener, Some(&at_once));
        looked.is_err() || !listener[0].revents().contains(PollFlags::HUP)
    }

    /// The turns of its calls.
    pub fn work(&self) -> &Arc<Turns> {
        &self.work
    }

    /// The turns of those of its calls for which something has to be looked up that they do not ask for themselves.
    pub fn lookups(&self) -> &Arc<Turns> {
        &self.lookups
    }

    /// Has `call`, which has its answer, wait for no turn any more.
    pub fn give_up(&self, call: u64) {
        self.work.give_up(call);
        self.lookups.give_up(call);
    }
}

/// `domain NAME (pid N)`.
impl fmt::Display for Guest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.domain() {
            Some(name) => write!(f, "domain {name} (pid {})", self.pid),
            None => write!(f, "pid {}", self.pid),
        }
    }
}

/// All registered QEMUs, and the one place where their calls are waited for.
///
/// A guest is armed for one event at a time ([`Guests::wait`]), so that no two threads ever receive for the
/// same one: with nothing left to receive, the second would wait until the guest makes another call.
pub struct Guests {
    epoll: rustix::fd::OwnedFd,
    domains: Arc<dyn Domains>,
    all: Mutex<Registered>,
}

#[derive(Default)]
struct Registered {
    guests: HashMap<u64, Arc<Guest>>,
    next_number: u64,
}

/// What happened to a guest.
pub enum Event {
    /// At least one call waits to be received.
    Call(Arc<Guest>),
    /// Its last process has ended.
    End(Arc<Guest>),
}

impl Guests {
    /// No guests yet; `domains` knows which domains they are.
    ///
    /// # Errors
    /// Those of epoll_create1(2).
    pub fn new(domains: Arc<dyn Domains>) -> io::Result<Self> {
        Ok(Guests { epoll: epoll::create(epoll::CreateFlags::CLOEXEC)?, domains, all: Mutex::default() })
    }

    /// Adds the guest of process `pid`.
    ///
    /// # Errors
    /// Those of epoll_ctl(2).
    pub fn add(&self, pid: u32, listener: Listener) -> io::Result<Arc<Guest>> {
        listener.prefer_same_cpu();
        let listener = Arc::new(listener);
        let turns = |at_a_time| {
            let listener = Arc::clone(&listener);
            Turns::new(at_a_time, move |call| listener.is_waiting(call))
        };
        let (work, lookups) = (turns(AT_A_TIME), turns(LOOKUPS_AT_A_TIME));
        let mut all = self.all();
        let number = all.next_number;
        all.next_number += 1;
        let guest = Arc::new(Guest {
            number,
            pid,
            started: start_time(pid).ok(),
            listener,
            domains: Arc::clone(&self.domains),
            name: OnceLock::new(),
            work,
            lookups,
            has_volumes: AtomicBool::new(false),
        });
        all.guests.insert(number, Arc::clone(&guest));
        if let Err(error) = epoll::add(&self.epoll, guest.listener.as_fd(), guest.data(), ONE_CALL) {
            all.guests.remove(&number);
            return Err(error.into());
        }
        Ok(guest)
    }

    /// Has the next event of `guest` reported, after the last one was dealt with.
    pub fn rearm(&self, guest: &Guest) {
        match epoll::modify(&self.epoll, guest.listener.as_fd(), guest.data(), ONE_CALL) {
            // It was removed.
            Ok(()) | Err(rustix::io::Errno::NOENT) => {}
            Err(error) => tracing::error!(pid = guest.pid, "the calls of {guest} are not waited for any more: {error}"),
        }
    }

    /// Forgets a guest that has ended.
    pub fn remove(&self, guest: &Guest) {
        // The descriptor is about to be closed, which would take it out as well.
        let _ = epoll::delete(&self.epoll, guest.listener.as_fd());
        self.all().guests.remove(&guest.number);
    }

    /// Whether process `pid` has registered and lives. A wrapped QEMU has one listener and can make no other.
    pub fn has(&self, pid: u32) -> bool {
        let started = start_time(pid).ok();
        let same: Vec<_> =
            self.all().guests.values().filter(|guest| guest.pid == pid && guest.started == started).cloned().collect();
        same.iter().any(|guest| guest.lives())
    }

    /// How many guests there are.
    pub fn count(&self) -> usize {
        self.all().guests.len()
    }

    /// The guests there are.
    pub fn list(&self) -> Vec<Arc<Guest>> {
        let mut guests: Vec<_> = self.all().guests.values().cloned().collect();
        guests.sort_by_key(|guest| guest.number);
        guests
    }

    /// Waits until something happens to a guest. Nothing more is reported of that one until it is
    /// [rearmed](Self::rearm).
    ///
    /// # Errors
    /// Those of epoll_wait(2).
    pub fn wait(&self) -> io::Result<Event> {
        // One event only: another guest's must not wait for this one.
        let mut event = [epoll::Event { flags: epoll::EventFlags::empty(), data: epoll::EventData::new_u64(0) }];
        loop {
            match epoll::wait(&self.epoll, event.as_mut_slice(), None) {
                Ok(0) | Err(rustix::io::Errno::INTR) => continue,
                outcome => outcome?,
            };
            let [epoll::Event { flags, data }] = event;
            // A guest that was removed meanwhile has no events any more.
            let guest = self.all().guests.get(&data.u64()).cloned();
            match guest {
                Some(guest) if flags.contains(epoll::EventFlags::IN) => return Ok(Event::Call(guest)),
                Some(guest) if flags.contains(epoll::EventFlags::HUP) => return Ok(Event::End(guest)),
                // The kernel could not look, for a signal was pending: seccomp_notify_poll says EPOLLERR then.
                Some(guest) => self.rearm(&guest),
                None => {}
            }
        }
    }

    fn all(&self) -> MutexGuard<'_, Registered> {
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A call, or the end, which is always reported; and then nothing until the guest is armed anew.
const ONE_CALL: epoll::EventFlags = epoll::EventFlags::IN.union(epoll::EventFlags::ONESHOT);

impl Guest {
    fn data(&self) -> epoll::EventData {
        epoll::EventData::new_u64(self.number)
    }
}
