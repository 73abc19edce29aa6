//! Takes the listeners of wrapped QEMUs.

use std::io;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::guests::Guests;
use super::pool::Pool;
use super::service_manager;
use crate::protocol::registration;
use crate::sys::seccomp::Listener;
use crate::sys::trace;

/// How long a wrapper may take for its one message.
const MESSAGE_DEADLINE: Duration = Duration::from_secs(5);
/// How many guests there may be; systemd's fd store holds as many (`FileDescriptorStoreMax=`).
const MOST_GUESTS: usize = 4096;
/// How long a thread may take to be interrupted.
const INTERRUPT_DEADLINE: Duration = Duration::from_secs(1);

/// Takes wrappers' connections and registers them.
pub struct Registrar {
    guests: Arc<Guests>,
    users: Vec<u32>,
}

impl Registrar {
    /// A registrar that takes listeners from processes of `users` only.
    pub fn new(guests: Arc<Guests>, users: Vec<u32>) -> Arc<Self> {
        Arc::new(Registrar { guests, users })
    }

    /// Takes up the guests of an earlier daemon. A call that the earlier one received and did not
    /// answer is lost to this one, so every waiting open is interrupted: it then arrives again.
    pub fn take_up(&self, earlier: Vec<(u32, Listener)>) {
        let mut waiting = Vec::new();
        for (pid, listener) in earlier {
            match self.guests.add(pid, listener) {
                Ok(_) => {
                    tracing::info!(pid, "process {pid} goes on with this daemon");
                    waiting.extend(opening_threads(pid));
                }
                Err(error) => tracing::error!(pid, "the listener of process {pid} cannot be used: {error}"),
            }
        }
        // Tracing ends with the thread that began it, whatever happens.
        let interrupting = std::thread::Builder::new().name("interrupt".to_owned()).spawn(move || {
            for tid in waiting {
                match trace::interrupt(tid, INTERRUPT_DEADLINE) {
                    Ok(()) => tracing::info!(tid, "thread {tid} asks again for what it wants to open"),
                    Err(error) => {
                        tracing::warn!(tid, "thread {tid} waits in an open and cannot be interrupted: {error}")
                    }
                }
            }
        });
        if let Err(error) = interrupting {
            tracing::error!("waiting opens are not interrupted: {error}");
        }
    }

    /// Serves `socket` for ever.
    pub fn serve(self: Arc<Self>, socket: &UnixListener, pool: &Pool) -> ! {
        loop {
            match socket.accept() {
                Ok((stream, _)) => {
                    let registrar = Arc::clone(&self);
                    pool.run(move || registrar.register(&stream));
                }
                Err(error) => {
                    tracing::error!("no wrapper can be taken: {error}");
                    std::thread::sleep(Duration::from_millis(100));
                }
            }
        }
    }

    fn register(&self, stream: &UnixStream) {
        match self.try_register(stream) {
            Ok(()) => {}
            Err(error) => tracing::error!("a process was not registered: {error}"),
        }
    }

    fn try_register(&self, stream: &UnixStream) -> io::Result<()> {
        let began = Instant::now();
        let peer = rustix::net::sockopt::socket_peercred(stream)?;
        let (pid, uid) = (peer.pid.as_raw_nonzero().get() as u32, peer.uid.as_raw());
        if uid != 0 && !self.users.contains(&uid) {
            let sentence = format!("process {pid} of user {uid} is no QEMU's: see qemu_users in the configuration");
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, sentence));
        }
        if self.guests.count() >= MOST_GUESTS {
            return Err(io::Error::other(format!("there are {MOST_GUESTS} guests already")));
        }
        stream.set_read_timeout(Some(MESSAGE_DEADLINE))?;
        stream.set_write_timeout(Some(MESSAGE_DEADLINE))?;
        let listener = registration::take_over(stream)?;
        if self.guests.has(pid) {
            let sentence = format!("process {pid} has registered already, and a wrapped QEMU can do so only once");
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, sentence));
        }
        service_manager::keep_listener(pid, &listener)?;
        let guest = self.guests.add(pid, listener)?;
        if let Err(error) = registration::welcome(stream) {
            self.guests.remove(&guest);
            return Err(error);
        }
        tracing::info!(pid, micros = began.elapsed().as_micros() as u64, "registered process {pid}");
        Ok(())
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
