//! Interrupting a system call of another process without a signal: ptrace(2).

use std::io;
use std::time::{Duration, Instant};

/// Interrupts the system call in which thread `tid` waits; the kernel starts it again at once. A call
/// that was handed to a daemon which then died is thereby handed to its successor.
///
/// Attaching lasts until the calling thread ends at the latest, so call this on a thread of its own.
///
/// # Errors
/// Those of ptrace(2): `ESRCH` when the thread is gone, `EPERM` when it may not be traced; `TimedOut`
/// when it does not stop, because it waits for a device and cannot be interrupted.
pub fn interrupt(tid: u32, deadline: Duration) -> io::Result<()> {
    let none = std::ptr::null_mut::<libc::c_void>();
    let thread = tid as libc::pid_t;
    // SAFETY: this request takes no pointers.
    check(unsafe { libc::ptrace(libc::PTRACE_SEIZE, thread, none, none) })?;
    // SAFETY: this request takes no pointers.
    check(unsafe { libc::ptrace(libc::PTRACE_INTERRUPT, thread, none, none) })?;
    let end = Instant::now() + deadline;
    let mut status = 0;
    loop {
        // SAFETY: the status is written to a local variable.
        match unsafe { libc::waitpid(thread, &mut status, libc::WNOHANG | libc::__WALL) } {
            0 if Instant::now() > end => return Err(io::ErrorKind::TimedOut.into()),
            0 => std::thread::sleep(Duration::from_millis(1)),
            -1 => return Err(io::Error::last_os_error()),
            _ => break,
        }
    }
    // A signal that arrived at the same time stopped the thread before it was delivered; it is handed
    // on. PTRACE_EVENT_STOP is the stop that was asked for.
    let signal = match status >> 16 {
        0 if libc::WIFSTOPPED(status) => libc::WSTOPSIG(status),
        _ => 0,
    };
    let signal = std::ptr::without_provenance_mut::<libc::c_void>(signal as usize);
    // SAFETY: this request takes the number of a signal in the place of a pointer.
    check(unsafe { libc::ptrace(libc::PTRACE_DETACH, thread, none, signal) })
}

fn check(result: libc::c_long) -> io::Result<()> {
    match result {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}
