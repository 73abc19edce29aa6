//! Waiting for a signal on a thread of its own: signal(7), sigwait(3).

use std::io;
use std::mem::MaybeUninit;
use std::ptr;
use std::thread;

/// A signal that this process does not take in the usual way.
pub struct Signal {
    number: i32,
    set: libc::sigset_t,
}

impl Signal {
    /// SIGHUP, from now on for this thread and every thread that it starts.
    ///
    /// # Errors
    /// Those of pthread_sigmask(3).
    pub fn hangup() -> io::Result<Self> {
        Signal::blocked(libc::SIGHUP)
    }

    /// SIGTERM, likewise.
    ///
    /// # Errors
    /// Those of pthread_sigmask(3).
    pub fn termination() -> io::Result<Self> {
        Signal::blocked(libc::SIGTERM)
    }

    /// Blocks a signal, so that it can be waited for.
    fn blocked(number: i32) -> io::Result<Self> {
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

    /// Has the signal do to this process what it does by default.
    pub fn act(&self) {
        // SAFETY: the set is initialised and only read; neither call keeps the pointer or has another argument.
        unsafe {
            libc::pthread_sigmask(libc::SIG_UNBLOCK, &self.set, ptr::null_mut());
            libc::raise(self.number);
        }
    }
}

/// The signals by which a command is broken off: ^C, kill(1), and a terminal that goes away.
const ENDING: [i32; 3] = [libc::SIGINT, libc::SIGTERM, libc::SIGHUP];

/// Has `clean_up` run before this process ends by SIGINT, SIGTERM or SIGHUP. They are blocked for this thread and for those
/// that it starts from now on. One that is ignored, as with nohup(1), stays so.
///
/// # Errors
/// Those of sigaction(2), pthread_sigmask(3) and pthread_create(3).
pub fn before_ending(clean_up: impl FnOnce() + Send + 'static) -> io::Result<()> {
    let mut ending = Vec::new();
    for number in ENDING {
        // One that is blocked arrives, ignored or not.
        if !is_ignored(number)? {
            ending.push(number);
        }
    }
    if ending.is_empty() {
        return Ok(());
    }
    let mut set = MaybeUninit::uninit();
    // SAFETY: sigemptyset initialises the set, sigaddset changes one that is initialised.
    let set = unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        let mut set = set.assume_init();
        for number in ending {
            libc::sigaddset(&mut set, number);
        }
        set
    };
    change_mask(libc::SIG_BLOCK, &set)?;
    let wait = move || {
        let mut number = 0;
        // SAFETY: the set is initialised, and the number is this function's own.
        unsafe { libc::sigwait(&set, &mut number) };
        clean_up();
        // Whoever started the process sees by which signal it ended.
        let unblocked = change_mask(libc::SIG_UNBLOCK, &set);
        // SAFETY: it takes no memory of ours.
        unblocked.map(|()| unsafe { libc::raise(number) }).ok();
        std::process::exit(128 + number);
    };
    thread::Builder::new().name("signals".to_owned()).spawn(wait).map(drop)
}

/// Whether this process ignores a signal.
fn is_ignored(number: i32) -> io::Result<bool> {
    let mut action = MaybeUninit::<libc::sigaction>::uninit();
    // SAFETY: nothing is changed, and sigaction initialises what it has succeeded to write to.
    match unsafe { libc::sigaction(number, ptr::null(), action.as_mut_ptr()) } {
        // SAFETY: it has succeeded.
        0 => Ok(unsafe { action.assume_init() }.sa_sigaction == libc::SIG_IGN),
        _ => Err(io::Error::last_os_error()),
    }
}

fn change_mask(how: i32, set: &libc::sigset_t) -> io::Result<()> {
    // SAFETY: the set is initialised, and pthread_sigmask does not keep the pointer.
    match unsafe { libc::pthread_sigmask(how, set, ptr::null_mut()) } {
        0 => Ok(()),
        error => Err(io::Error::from_raw_os_error(error)),
    }
}
