use std::collections::HashMap;
use std::fmt;
use std::io;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use rustix::event::epoll;

use crate::audit::{Asker, Role};
use crate::guest::{domain_name, domain_uuid};
use crate::sys::seccomp::Listener;

/// How many calls of one guest may be worked on at a time, so that no guest takes all threads. QEMU opens
/// its disks one after the other.
const AT_A_TIME: u32 = 16;

/// A registered QEMU.
pub struct Guest {
    number: u64,
    pid: u32,
    listener: Listener,
    domain: OnceLock<Option<String>>,
    domain_uuid: OnceLock<Option<String>>,
    in_work: AtomicU32,
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

    /// The guest as the one who asks for something.
    pub fn asker(&self) -> Asker {
        Asker {
            domain: self.domain().map(str::to_owned),
            domain_uuid: self.domain_uuid.get_or_init(|| domain_uuid(self.pid)).clone(),
            pid: Some(self.pid),
            by: Role::Guest,
            ..Asker::default()
        }
    }

    /// Counts one more call in work until the returned value is dropped; `None` when there are as many
    /// as there may be.
    pub fn begin_work(self: &Arc<Self>) -> Option<Work> {
        // Only the one thread that receives calls counts up.
        match self.in_work.load(Ordering::Relaxed) < AT_A_TIME {
            true => {
                self.in_work.fetch_add(1, Ordering::Relaxed);
                Some(Work(Arc::clone(self)))
            }
            false => None,
        }
    }
}

/// A call that is worked on. It counts until it is dropped, also when working on it panicked.
pub struct Work(Arc<Guest>);

impl Work {
    /// Whose call it is.
    pub fn guest(&self) -> &Guest {
        &self.0
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        self.0.in_work.fetch_sub(1, Ordering::Relaxed);
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
        let guest = Arc::new(Guest {
            number,
            pid,
            listener,
            domain: OnceLock::new(),
            domain_uuid: OnceLock::new(),
            in_work: AtomicU32::new(0),
        });
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

    fn all(&self) -> MutexGuard<'_, Registered> {
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
