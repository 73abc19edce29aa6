//! Takes the listeners of wrapped QEMUs.
//!
//! Every process of QEMU's user can connect, and say nothing. So one thread waits for what all of them say, and
//! only a process that has sent a listener takes a thread of the pool.

use std::collections::HashSet;
use std::io;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;

use super::arrivals::{Arrival, Arrivals, MESSAGE_DEADLINE};
use super::guests::Guests;
use super::pool::Pool;
use super::refused::{Refused, Whose};
use super::service_manager;
use crate::guest::open_block_devices;
use crate::protocol::registration;
use crate::sys::seccomp::Listener;
use crate::sys::trace;

/// How many guests there may be; systemd's fd store holds as many (`FileDescriptorStoreMax=`).
const MOST_GUESTS: usize = 4096;
/// How many may be on their way into the fd store at a time.
const MOST_UNFINISHED: usize = 256;
/// How long a thread may take to be interrupted.
const INTERRUPT_DEADLINE: Duration = Duration::from_secs(1);
/// Enough for two system calls and a message.
const INTERRUPT_STACK: usize = 128 << 10;

/// Takes wrappers' connections and registers them.
pub struct Registrar {
    guests: Arc<Guests>,
    users: Vec<u32>,
    unfinished: Mutex<HashSet<u32>>,
    refused: Refused,
}

impl Registrar {
    /// A registrar that takes listeners from processes of `users` only.
    pub fn new(guests: Arc<Guests>, users: Vec<u32>) -> Arc<Self> {
        Arc::new(Registrar { guests, users, unfinished: Mutex::default(), refused: Refused::default() })
    }

    /// Takes up the guests of an earlier daemon. A call that the earlier one received and did not
    /// answer is lost to this one, so every waiting open is interrupted: it then arrives again.
    pub fn take_up(&self, earlier: Vec<(u32, Listener)>) {
        for (pid, listener) in earlier {
            match self.guests.add(pid, listener) {
                Ok(guest) => {
                    // The earlier daemon knew what it had given it.
                    if open_block_devices(pid).map_or(true, |devices| !devices.is_empty()) {
                        guest.takes_volume();
                    }
                    tracing::info!(pid, "process {pid} goes on with this daemon");
                    interrupt_all(pid, opening_threads(pid), |tid| trace::interrupt(tid, INTERRUPT_DEADLINE));
                }
                Err(error) => tracing::error!(pid, "the listener of process {pid} cannot be used: {error}"),
            }
        }
    }

    /// Serves `socket` for ever.
    pub fn serve(self: Arc<Self>, socket: &UnixListener, pool: &Pool) -> ! {
        let mut arrivals = Arrivals::default();
        loop {
            if let Err(error) = self.serve_once(socket, &mut arrivals, pool) {
                tracing::error!("no wrapper can be taken: {error}");
                std::thread::sleep(Duration::from_millis(100));
            }
        }
    }

    /// Waits until somebody connects, says something or was silent for too long.
    fn serve_once(self: &Arc<Self>, socket: &UnixListener, arrivals: &mut Arrivals, pool: &Pool) -> io::Result<()> {
        let mut waiting = vec![PollFd::new(socket, PollFlags::IN)];
        waiting.extend(arrivals.list().iter().map(|arrival| PollFd::new(&arrival.stream, PollFlags::IN)));
        let left = arrivals.next_late().map(|late| late.saturating_duration_since(Instant::now()));
        // A moment more, so that it is late then.
        let left = left.and_then(|left| Timespec::try_from(left + Duration::from_millis(1)).ok());
        match rustix::event::poll(&mut waiting, left.as_ref()) {
            Ok(_) => {}
            Err(Errno::INTR) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
        let happened: Vec<bool> = waiting.iter().map(|waiting| !waiting.revents().is_empty()).collect();
        // Who has said something is never in the way of who connects.
        for arrival in arrivals.take(&happened[1..]) {
            let pid = arrival.pid;
            self.begin(arrival, pool).unwrap_or_else(|error| self.say_refused(Whose::Qemus, pid, &error));
        }
        for late in arrivals.take_late(Instant::now()) {
            self.say_refused(Whose::Qemus, late.pid, &io::ErrorKind::TimedOut.into());
        }
        if happened[0] {
            let (stream, _) = socket.accept()?;
            if let Some((surplus, why)) = self.admit(stream).and_then(|arrival| arrivals.add(arrival)) {
                self.say_refused(Whose::Qemus, surplus.pid, &io::Error::other(why));
            }
        }
        Ok(())
    }

    /// Lets a process in that may register.
    fn admit(&self, stream: UnixStream) -> Option<Arrival> {
        let peer = rustix::net::sockopt::socket_peercred(&stream).ok()?;
        let (pid, uid) = (peer.pid.as_raw_nonzero().get() as u32, peer.uid.as_raw());
        if uid != 0 && !self.users.contains(&uid) {
            let sentence = format!("a process of user {uid} is no QEMU's: see qemu_users in the configuration");
            self.say_refused(Whose::Strangers, pid, &io::Error::new(io::ErrorKind::PermissionDenied, sentence));
            return None;
        }
        Some(Arrival::new(stream, pid))
    }

    /// Takes what a process has sent, and has the rest done by the pool: systemd may take its time.
    fn begin(self: &Arc<Self>, arrival: Arrival, pool: &Pool) -> io::Result<()> {
        let began = Instant::now();
        let Arrival { stream, pid, .. } = arrival;
        stream.set_write_timeout(Some(MESSAGE_DEADLINE))?;
        let listener = registration::take_over(&stream)?;
        if self.guests.count() >= MOST_GUESTS {
            return Err(io::Error::other(format!("there are {MOST_GUESTS} guests already")));
        }
        if self.guests.has(pid) || !self.begin_unfinished(pid)? {
            let sentence = "it has registered already, and a wrapped QEMU can do so only once";
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, sentence));
        }
        let unfinished = Unfinished(Arc::clone(self), pid);
        pool.run(move || {
            let Unfinished(registrar, pid) = &unfinished;
            match registrar.finish(&stream, *pid, listener) {
                Ok(()) => {
                    tracing::info!(pid, micros = began.elapsed().as_micros() as u64, "registered process {pid}")
                }
                Err(error) => registrar.say_refused(Whose::Qemus, *pid, &error),
            }
        });
        Ok(())
    }

    fn finish(&self, stream: &UnixStream, pid: u32, listener: Listener) -> io::Result<()> {
        service_manager::keep_listener(pid, &listener)?;
        let guest = self.guests.add(pid, listener)?;
        registration::welcome(stream).inspect_err(|_| self.guests.remove(&guest))
    }

    /// Whether `pid` is not on its way already; it is from now on.
    fn begin_unfinished(&self, pid: u32) -> io::Result<bool> {
        let mut unfinished = self.unfinished();
        match unfinished.len() < MOST_UNFINISHED {
            true => Ok(unfinished.insert(pid)),
            false => {
                Err(io::Error::other(format!("{MOST_UNFINISHED} others wait for systemd to keep their listeners")))
            }
        }
    }

    fn say_refused(&self, whose: Whose, pid: u32, error: &io::Error) {
        if let Some(left_out) = self.refused.count(whose, pid, Instant::now()) {
            tracing::error!(pid, "process {pid} was not registered: {error}{left_out}");
        }
    }

    fn unfinished(&self) -> MutexGuard<'_, HashSet<u32>> {
        self.unfinished.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A process whose registration is not finished until this is dropped.
struct Unfinished(Arc<Registrar>, u32);

impl Drop for Unfinished {
    fn drop(&mut self) {
        self.0.unfinished().remove(&self.1);
    }
}

/// Has the `waiting` threads of process `pid` interrupted, without waiting for that: a process can put it off as
/// long as it likes, and its neighbours' must not wait for it.
fn interrupt_all(pid: u32, waiting: Vec<u32>, interrupt: impl Fn(u32) -> io::Result<()> + Send + 'static) {
    if waiting.is_empty() {
        return;
    }
    // Tracing ends with the thread that began it, whatever happens.
    let interrupting =
        std::thread::Builder::new().name("interrupt".to_owned()).stack_size(INTERRUPT_STACK).spawn(move || {
            for tid in waiting {
                match interrupt(tid) {
                    Ok(()) => tracing::info!(tid, "thread {tid} asks again for what it wants to open"),
                    Err(error) => {
                        tracing::warn!(tid, "thread {tid} waits in an open and cannot be interrupted: {error}")
                    }
                }
            }
        });
    if let Err(error) = interrupting {
        tracing::error!(pid, "the waiting opens of process {pid} are not interrupted: {error}");
    }
}

/// The threads of `pid` that are inside a call which the wrapper's filter stops.
fn opening_threads(pid: u32) -> Vec<u32> {
    let Ok(threads) = std::fs::read_dir(format!("/proc/{pid}/task")) else { return Vec::new() };
    let numbers = threads.flatten().filter_map(|thread| thread.file_name().to_str()?.parse().ok());
    numbers.filter(|tid| is_opening(*tid).unwrap_or(false)).collect()
}

/// proc_pid_syscall(5): the number of the call comes first; a thread that runs says `running`.
fn is_opening(tid: u32) -> io::Result<bool> {
    let call = std::fs::read_to_string(format!("/proc/{tid}/syscall"))?;
    let number = call.split(' ').next().and_then(|number| number.parse::<i64>().ok());
    Ok(number
        .is_some_and(|number| [libc::SYS_open, libc::SYS_creat, libc::SYS_openat, libc::SYS_openat2].contains(&number)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::LibvirtState;
    use std::sync::mpsc;

    #[test]
    fn a_process_that_is_not_interrupted_keeps_no_other_from_it() {
        let (interrupted, told) = mpsc::channel();
        let (_never, forever) = mpsc::channel::<()>();
        std::thread::spawn(move || {
            interrupt_all(1, vec![11, 12], move |_| forever.recv().map_err(io::Error::other));
            interrupt_all(2, vec![21, 22], move |tid| interrupted.send(tid).map_err(io::Error::other));
        });
        let next = || told.recv_timeout(Duration::from_secs(60)).unwrap();
        assert_eq!([next(), next()], [21, 22]);
    }

    #[test]
    fn another_users_process_is_counted_as_a_strangers() {
        let guests = Guests::new(Arc::new(LibvirtState::system())).unwrap();
        let registrar = Registrar::new(Arc::new(guests), Vec::new());
        let connect = || {
            // Of this thread alone, and only root needs it.
            let nobody = rustix::process::Uid::from_raw(65534);
            let _ = rustix::thread::set_thread_res_uid(nobody, nobody, nobody);
            UnixStream::pair().unwrap()
        };
        let (stream, _peer) = std::thread::spawn(connect).join().unwrap();
        assert!(registrar.admit(stream).is_none());
        let count = |whose| registrar.refused.count(whose, std::process::id(), Instant::now());
        assert_eq!(count(Whose::Strangers), None);
        assert_eq!(count(Whose::Qemus), Some(String::new()));
    }
}
