//! A deadline for a system call that has none of its own: timer_create(2), signal(7).

use std::cell::OnceCell;
use std::io;
use std::mem::MaybeUninit;
use std::ptr;
use std::time::Duration;

/// It has no other use in this process.
const SIGNAL: i32 = libc::SIGALRM;

thread_local! {
    static TIMER: OnceCell<Timer> = const { OnceCell::new() };
}

/// Runs `call`. A system call in which it still waits after `limit` fails with `EINTR`, and so does every later one
/// that waits as long.
///
/// # Errors
/// Those of timer_create(2), before anything is called.
pub fn interrupt_after<R>(limit: Duration, call: impl FnOnce() -> R) -> io::Result<R> {
    TIMER.with(|cell| {
        let timer = match cell.get() {
            Some(timer) => timer,
            None => {
                let timer = Timer::new()?;
                cell.get_or_init(|| timer)
            }
        };
        // Again and again: the first time may come before the thread waits.
        timer.set(limit)?;
        let _disarm = Disarm(timer);
        Ok(call())
    })
}

/// Sends the signal to the thread that made it.
struct Timer(libc::timer_t);

impl Timer {
    fn new() -> io::Result<Self> {
        extern "C" fn nothing(_: i32) {}

        let handler: extern "C" fn(i32) = nothing;
        let mut set = MaybeUninit::uninit();
        // SAFETY: all-zero bytes are a valid value of the struct, and sigemptyset initialises the set in it. The
        // handler does nothing, so it is safe at any moment. Without SA_RESTART an interrupted call fails.
        let outcome = unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            libc::sigemptyset(set.as_mut_ptr());
            action.sa_mask = set.assume_init();
            action.sa_sigaction = handler as *const () as libc::sighandler_t;
            libc::sigaction(SIGNAL, &action, ptr::null_mut())
        };
        check(outcome)?;

        let mut timer = MaybeUninit::uninit();
        // SAFETY: all-zero bytes are a valid value of the struct; the kernel reads it and writes the timer's id.
        let outcome = unsafe {
            let mut event: libc::sigevent = std::mem::zeroed();
            event.sigev_notify = libc::SIGEV_THREAD_ID;
            event.sigev_signo = SIGNAL;
            event.sigev_notify_thread_id = libc::gettid();
            libc::timer_create(libc::CLOCK_MONOTONIC, &mut event, timer.as_mut_ptr())
        };
        check(outcome)?;
        // SAFETY: the call succeeded, so the id was written.
        Ok(Timer(unsafe { timer.assume_init() }))
    }

    /// Sends the signal every `period` from now on; never if that is zero.
    fn set(&self, period: Duration) -> io::Result<()> {
        let period = libc::timespec {
            tv_sec: period.as_secs() as libc::time_t,
            tv_nsec: libc::c_long::from(period.subsec_nanos()),
        };
        let times = libc::itimerspec { it_interval: period, it_value: period };
        // SAFETY: the timer exists as long as `self`; the times are read, and the former ones not asked for.
        check(unsafe { libc::timer_settime(self.0, 0, &times, ptr::null_mut()) })
    }
}

impl Drop for Timer {
    fn drop(&mut self) {
        // SAFETY: the timer was made in `new` and is used no more.
        unsafe { libc::timer_delete(self.0) };
    }
}

/// Stops the timer, also when the call has panicked.
struct Disarm<'a>(&'a Timer);

impl Drop for Disarm<'_> {
    fn drop(&mut self) {
        // It cannot fail for a timer that was set.
        let _ = self.0.set(Duration::ZERO);
    }
}

fn check(outcome: i32) -> io::Result<()> {
    match outcome {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::unix::net::UnixStream;
    use std::time::Instant;

    use super::*;

    #[test]
    fn a_call_that_waits_is_interrupted_and_a_later_one_is_not() {
        let began = Instant::now();
        let (mut waiting, peer) = UnixStream::pair().unwrap();
        let read = |waiting: &mut UnixStream| waiting.read(&mut [0]).map_err(|error| error.kind());
        for _ in 0..2 {
            let outcome = interrupt_after(Duration::from_millis(20), || read(&mut waiting)).unwrap();
            assert_eq!(outcome, Err(io::ErrorKind::Interrupted));
        }
        assert!((Duration::from_millis(40)..Duration::from_secs(60)).contains(&began.elapsed()));

        let closes = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(100));
            drop(peer);
        });
        assert_eq!(interrupt_after(Duration::from_millis(20), || 7).unwrap(), 7);
        assert_eq!(read(&mut waiting), Ok(0));
        closes.join().unwrap();
    }

    #[test]
    fn only_the_thread_that_asked_is_interrupted() {
        let (mut waiting, peer) = UnixStream::pair().unwrap();
        let other = std::thread::spawn(move || waiting.read(&mut [0]).map_err(|error| error.kind()));
        let sleep = || rustix::thread::nanosleep(&rustix::thread::Timespec { tv_sec: 10, tv_nsec: 0 });
        let slept = interrupt_after(Duration::from_millis(20), sleep).unwrap();
        assert!(matches!(slept, rustix::thread::NanosleepRelativeResult::Interrupted(_)));
        drop(peer);
        assert_eq!(other.join().unwrap(), Ok(0));
    }
}
