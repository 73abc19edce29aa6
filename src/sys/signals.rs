//! Waiting for a signal on a thread of its own: signal(7), sigwait(3).

use std::io;
use std::mem::MaybeUninit;
use std::ptr;

/// A signal that this process does not take in the usual way.
pub struct Signal {
    number: i32,
    set: libc::sigset_t,
}

impl Signal {
    /// Blocks SIGHUP for this thread and for every thread that it starts from now on, so that it can be
    /// waited for.
    ///
    /// # Errors
    /// Those of pthread_sigmask(3).
    pub fn hangup() -> io::Result<Self> {
        let number = libc::SIGHUP;
        let mut set = MaybeUninit::uninit();
        // SAFETY: sigemptyset initialises the set, sigaddset changes one that is initialised, and
        // pthread_sigmask reads it; none keeps the pointer.
        let (set, outcome) = unsafe {
            libc::sigemptyset(set.as_mut_ptr());
            let mut set = set.assume_init();
            libc::sigaddset(&mut set, number);
            (set, libc::pthread_sigmask(libc::SIG_BLOCK, &set, ptr::null_mut()))
        };
        match outcome {
            0 => Ok(Signal { number, set }),
            error => Err(io::Error::from_raw_os_error(error)),
        }
    }

    /// Waits until the signal arrives.
    pub fn wait(&self) {
        let mut number = 0;
        while number != self.number {
            // SAFETY: the set is initialised, and the number is this function's own.
            unsafe { libc::sigwait(&self.set, &mut number) };
        }
    }
}
