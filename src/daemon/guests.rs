use std::collections::HashMap;
use std::fmt;
use std::io;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use rustix::event::epoll;

use crate::guest::domain_name;
use crate::sys::seccomp::Listener;

/// How many calls of one guest may be worked on at a time, so that no guest takes all threads.
const AT_A_TIME: u32 = 4;

/// A registered QEMU.
pub struct Guest {
    number: u64,
    pid: u32,
    listener: Listener,
    domain: OnceLock<Option<String>>,
    in_work: Mutex<InWork>,
}

#[derive(Default)]
struct InWork {
    calls: u32,
    paused: bool,
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

    /// The name of its domain, for people to read. Known as soon as the wrapper has become QEMU.
    pub fn domain(&self) -> Option<&str> {
        self.domain.get_or_init(|| domain_name(self.pid)).as_deref()
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
pub struct Guests {
    epoll: rustix::fd::OwnedFd,
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
    /// No guests yet.
    ///
    /// # Errors
    /// Those of epoll_create1(2).
    pub fn new() -> io::Result<Self> {
        Ok(Guests { epoll: epoll::create(epoll::CreateFlags::CLOEXEC)?, all: Mutex::default() })
    }

    /// Adds the guest of process `pid`.
    ///
    /// # Errors
    /// Those of epoll_ctl(2).
    pub fn add(&self, pid: u32, listener: Listener) -> io::Result<Arc<Guest>> {
        listener.prefer_same_cpu();
        let mut all = self.all();
        let number = all.next_number;
        all.next_number += 1;
        let guest = Arc::new(Guest { number, pid, listener, domain: OnceLock::new(), in_work: Mutex::default() });
        let data = epoll::EventData::new_u64(number);
        all.guests.insert(number, Arc::clone(&guest));
        if let Err(error) = epoll::add(&self.epoll, guest.listener.as_fd(), data, epoll::EventFlags::IN) {
            all.guests.remove(&number);
            return Err(error.into());
        }
        Ok(guest)
    }

    /// Forgets a guest that has ended.
    pub fn remove(&self, guest: &Guest) {
        // The descriptor is about to be closed, which would take it out as well.
        let _ = epoll::delete(&self.epoll, guest.listener.as_fd());
        self.all().guests.remove(&guest.number);
    }

    /// The guests there are.
    pub fn list(&self) -> Vec<Arc<Guest>> {
        let mut guests: Vec<_> = self.all().guests.values().cloned().collect();
        guests.sort_by_key(|guest| guest.number);
        guests
    }

    /// Waits until something happens to a guest.
    ///
    /// # Errors
    /// Those of epoll_wait(2).
    pub fn wait(&self) -> io::Result<Vec<Event>> {
        let mut buffer = [epoll::Event { flags: epoll::EventFlags::empty(), data: epoll::EventData::new_u64(0) }; 32];
        let count = loop {
            match epoll::wait(&self.epoll, buffer.as_mut_slice(), None) {
                Err(rustix::io::Errno::INTR) => continue,
                outcome => break outcome?,
            }
        };
        let all = self.all();
        let happened = buffer[..count].iter().filter_map(|event| {
            // A guest that was removed meanwhile has no events any more.
            let guest = Arc::clone(all.guests.get(&event.data.u64())?);
            let flags = event.flags;
            match flags.contains(epoll::EventFlags::IN) {
                true => Some(Event::Call(guest)),
                false => Some(Event::End(guest)),
            }
        });
        Ok(happened.collect())
    }

    /// Counts one more call of `guest` in work. At its limit no further calls are received.
    pub fn work_begins(&self, guest: &Guest) {
        let mut in_work = guest.in_work.lock().unwrap_or_else(PoisonError::into_inner);
        in_work.calls += 1;
        if in_work.calls >= AT_A_TIME && !in_work.paused {
            in_work.paused = true;
            self.listen(guest, epoll::EventFlags::empty());
        }
    }

    /// Counts one call of `guest` less in work.
    pub fn work_ends(&self, guest: &Guest) {
        let mut in_work = guest.in_work.lock().unwrap_or_else(PoisonError::into_inner);
        in_work.calls -= 1;
        if in_work.paused {
            in_work.paused = false;
            self.listen(guest, epoll::EventFlags::IN);
        }
    }

    fn listen(&self, guest: &Guest, flags: epoll::EventFlags) {
        let data = epoll::EventData::new_u64(guest.number);
        // It fails for a guest that was removed meanwhile, which nobody listens to any more.
        let _ = epoll::modify(&self.epoll, guest.listener.as_fd(), data, flags);
    }

    fn all(&self) -> MutexGuard<'_, Registered> {
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
