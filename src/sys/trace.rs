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
    loop {
        // SAFETY: the status is not asked for, so no pointer is written to.
        match unsafe { libc::waitpid(thread, std::ptr::null_mut(), libc::WNOHANG | libc::__WALL) } {
            0 if Instant::now() > end => return Err(io::ErrorKind::TimedOut.into()),
            0 => std::thread::sleep(Duration::from_millis(1)),
            -1 => return Err(io::Error::last_os_error()),
            _ => break,
        }
    }
    // SAFETY: this request takes no pointers.
    check(unsafe { libc::ptrace(libc::PTRACE_DETACH, thread, none, none) })
}

fn check(result: libc::c_long) -> io::Result<()> {
    match result {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}
