//! Seccomp user notification: seccomp(2), seccomp_unotify(2).
//!
//! The wrapper installs a filter that stops every call which opens a file and hands its listener to
//! the daemon; the daemon receives each stopped call and answers it.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::time::Duration;

use libc::{sock_filter, sock_fprog};

use super::alarm;

/// `AUDIT_ARCH_X86_64` of `linux/audit.h`: `EM_X86_64`, 64 bits, little-endian.
const ARCHITECTURE: u32 = 0xc000_003e;
/// Set in the number of a system call of the x32 ABI.
const X32_BIT: u32 = 0x4000_0000;

/// How long receiving a call that has been announced may take. It takes no time at all unless somebody else has
/// received the call meanwhile: the ioctl then waits for the next one, and knows no `O_NONBLOCK`.
const RECEIVE_LIMIT: Duration = Duration::from_millis(100);

// Offsets in `struct seccomp_data`.
const OFFSET_NUMBER: u32 = 0;
const OFFSET_ARCHITECTURE: u32 = 4;

const LOAD: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
const JUMP_EQUAL: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
const JUMP_AT_LEAST: u16 = (libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K) as u16;
const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;

const fn instruction(code: u16, jt: u8, jf: u8, k: u32) -> sock_filter {
    sock_filter { code, jt, jf, k }
}

/// What stops: `open`, `creat`, `openat` and `openat2`. Every call of another architecture or of the
/// x32 ABI, which could open files under numbers of its own, gets `ENOSYS`; QEMU makes none.
const FILTER: [sock_filter; 11] = [
    instruction(LOAD, 0, 0, OFFSET_ARCHITECTURE),
    instruction(JUMP_EQUAL, 0, 7, ARCHITECTURE),
    instruction(LOAD, 0, 0, OFFSET_NUMBER),
    instruction(JUMP_AT_LEAST, 5, 0, X32_BIT),
    instruction(JUMP_EQUAL, 5, 0, libc::SYS_openat as u32),
    instruction(JUMP_EQUAL, 4, 0, libc::SYS_open as u32),
    instruction(JUMP_EQUAL, 3, 0, libc::SYS_openat2 as u32),
    instruction(JUMP_EQUAL, 2, 0, libc::SYS_creat as u32),
    instruction(RETURN, 0, 0, libc::SECCOMP_RET_ALLOW),
    instruction(RETURN, 0, 0, libc::SECCOMP_RET_ERRNO | libc::ENOSYS as u32),
    instruction(RETURN, 0, 0, libc::SECCOMP_RET_USER_NOTIF),
];

/// Installs the filter for this thread and everything it executes, and gives up new privileges for
/// good (`PR_SET_NO_NEW_PRIVS`). The listener is close-on-exec.
///
/// `SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV` is left out on purpose: with it, a call that a daemon
/// received and did not live to answer could not be interrupted any more, and would wait for ever
/// (see [`crate::sys::trace::interrupt`]).
///
/// # Errors
/// Those of prctl(2) and seccomp(2): `EBUSY` when a filter with a listener is installed already.
pub fn install_filter() -> io::Result<Listener> {
    rustix::thread::set_no_new_privs(true)?;
    let mut filter = FILTER;
    let program = sock_fprog { len: filter.len() as u16, filter: filter.as_mut_ptr() };
    // SAFETY: `program` points to `len` instructions, which the kernel copies and checks.
    let listener = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            libc::SECCOMP_FILTER_FLAG_NEW_LISTENER,
            &program,
        )
    };
    match RawFd::try_from(listener) {
        // SAFETY: the call succeeded, so the descriptor is new and nobody else's.
        Ok(listener) if listener >= 0 => Ok(Listener(unsafe { OwnedFd::from_raw_fd(listener) })),
        _ => Err(io::Error::last_os_error()),
    }
}

/// A system call that waits for an answer.
#[derive(Clone, Copy, Debug)]
pub struct Notification {
    /// Names the call in answers to it.
    pub id: u64,
    /// The thread that made the call, in the daemon's pid namespace; 0 when it is not visible there.
    pub tid: u32,
    /// The number of the call.
    pub number: i64,
    /// Its arguments.
    pub arguments: [u64; 6],
}

/// The descriptor on which stopped calls arrive.
#[derive(Debug)]
pub struct Listener(OwnedFd);

impl Listener {
    /// Takes over a descriptor that came from a wrapper or from the service manager.
    ///
    /// # Errors
    /// `InvalidInput` when it is no seccomp listener.
    pub fn from_descriptor(descriptor: OwnedFd) -> io::Result<Self> {
        let name = rustix::fs::readlink(format!("/proc/self/fd/{}", descriptor.as_raw_fd()), Vec::new())?;
        match name.as_bytes() {
            b"anon_inode:seccomp notify" => Ok(Listener(descriptor)),
            _ => Err(io::Error::new(io::ErrorKind::InvalidInput, "the descriptor is no seccomp listener")),
        }
    }

    /// Asks the kernel to hand each call over on the caller's own CPU (Linux 6.6). Both sides always
    /// wait for each other, so that saves an interrupt to another CPU each way.
    pub fn prefer_same_cpu(&self) {
        // SECCOMP_IOCTL_NOTIF_SET_FLAGS with SECCOMP_USER_NOTIF_FD_SYNC_WAKE_UP, newer than the libc
        // crate. An older kernel says EINVAL and nothing is lost.
        // SAFETY: the call takes a plain number.
        unsafe { libc::ioctl(self.0.as_raw_fd(), request::<u64>(WRITE, 4), 1_u64) };
    }

    /// Receives one call, which has been announced. `None` when it went away meanwhile: the thread was killed or
    /// interrupted.
    ///
    /// # Errors
    /// Those of the ioctl other than `ENOENT`; `TimedOut` when a call was announced and somebody else has received
    /// it. Whoever installs the filter can keep a descriptor of the listener, and would have the daemon wait.
    /// `WouldBlock` when there is no timer for that now: nothing was received, and it can be tried again.
    pub fn receive(&self) -> io::Result<Option<Notification>> {
        // SAFETY: all-zero bytes are a valid value of this plain C struct, and what the kernel wants.
        let mut raw: libc::seccomp_notif = unsafe { std::mem::zeroed() };
        let received = alarm::interrupt_after(RECEIVE_LIMIT, || {
            // SAFETY: the request's number carries the size of the struct that `raw` is.
            match unsafe { libc::ioctl(self.0.as_raw_fd(), request::<libc::seccomp_notif>(READ | WRITE, 0), &mut raw) }
            {
                0 => Ok(()),
                _ => Err(io::Error::last_os_error()),
            }
        });
        let received = received.map_err(|error| {
            io::Error::new(io::ErrorKind::WouldBlock, format!("the kernel gives no timer to receive it with ({error})"))
        })?;
        match received {
            Ok(()) => Ok(Some(Notification {
                id: raw.id,
                tid: raw.pid,
                number: i64::from(raw.data.nr),
                arguments: raw.data.args,
            })),
            Err(error) => match error.raw_os_error() {
                Some(libc::ENOENT) => Ok(None),
                Some(libc::EINTR) => Err(io::Error::new(io::ErrorKind::TimedOut, "another process receives them")),
                _ => Err(error),
            },
        }
    }

    /// Whether the call still waits. What was read of its thread before counts only if it does.
    pub fn is_waiting(&self, id: u64) -> bool {
        // SAFETY: the request's number carries the size of the u64 that `id` is.
        unsafe { libc::ioctl(self.0.as_raw_fd(), request::<u64>(WRITE, 2), &id) == 0 }
    }

    /// Lets the kernel carry out the call as it stands.
    ///
    /// # Errors
    /// `ENOENT` when it went away.
    pub fn let_through(&self, id: u64) -> io::Result<()> {
        self.answer(libc::seccomp_notif_resp {
            id,
            val: 0,
            error: 0,
            flags: libc::SECCOMP_USER_NOTIF_FLAG_CONTINUE as u32,
        })
    }

    /// Makes the call fail with `errno`.
    ///
    /// # Errors
    /// `ENOENT` when it went away or was answered.
    pub fn refuse(&self, id: u64, errno: i32) -> io::Result<()> {
        self.answer(libc::seccomp_notif_resp { id, val: 0, error: -errno, flags: 0 })
    }

    fn answer(&self, response: libc::seccomp_notif_resp) -> io::Result<()> {
        // SAFETY: the request's number carries the size of the struct that `response` is.
        let result =
            unsafe { libc::ioctl(self.0.as_raw_fd(), request::<libc::seccomp_notif_resp>(READ | WRITE, 1), &response) };
        match result {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Puts a duplicate of `file` into the caller's table and returns its number from the call, in
    /// one step (`SECCOMP_ADDFD_FLAG_SEND`, Linux 5.14).
    ///
    /// # Errors
    /// `ENOENT` when the call went away or was answered, `EMFILE` when the caller's table is full.
    pub fn inject(&self, id: u64, file: BorrowedFd<'_>, close_on_exec: bool) -> io::Result<()> {
        let addition = libc::seccomp_notif_addfd {
            id,
            flags: libc::SECCOMP_ADDFD_FLAG_SEND as u32,
            srcfd: file.as_raw_fd() as u32,
            newfd: 0,
            newfd_flags: if close_on_exec { libc::O_CLOEXEC as u32 } else { 0 },
        };
        // SAFETY: the request's number carries the size of the struct that `addition` is.
        let result =
            unsafe { libc::ioctl(self.0.as_raw_fd(), request::<libc::seccomp_notif_addfd>(WRITE, 3), &addition) };
        match result {
            -1 => Err(io::Error::last_os_error()),
            _ => Ok(()),
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

const WRITE: u64 = 1;
const READ: u64 = 2;

/// The number of a seccomp ioctl whose argument is a `T`: `asm-generic/ioctl.h`, magic `!`.
const fn request<T>(direction: u64, number: u64) -> libc::Ioctl {
    (direction << 30 | (size_of::<T>() as u64) << 16 | (b'!' as u64) << 8 | number) as libc::Ioctl
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn request_numbers_are_those_of_the_kernel_headers() {
        assert_eq!(request::<libc::seccomp_notif>(READ | WRITE, 0), 0xc050_2100);
        assert_eq!(request::<libc::seccomp_notif_resp>(READ | WRITE, 1), 0xc018_2101);
        assert_eq!(request::<u64>(WRITE, 2), 0x4008_2102);
        assert_eq!(request::<libc::seccomp_notif_addfd>(WRITE, 3), 0x4018_2103);
        assert_eq!(request::<u64>(WRITE, 4), 0x4008_2104);
    }

    #[test]
    fn only_a_listener_is_taken_for_one() {
        let file = std::fs::File::open("/dev/null").unwrap();
        let error = Listener::from_descriptor(file.into()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
    }

    #[test]
    fn a_call_that_another_has_received_is_not_waited_for() {
        let (send, receive) = std::sync::mpsc::channel();
        let (keep, kept) = std::sync::mpsc::channel::<()>();
        let guest = std::thread::spawn(move || {
            send.send(install_filter().unwrap()).unwrap();
            let _ = kept.recv();
        });
        let listener = receive.recv().unwrap();
        let (send, receive) = std::sync::mpsc::channel();
        std::thread::spawn(move || send.send(listener.receive().map_err(|error| error.kind())));
        let received = receive.recv_timeout(Duration::from_secs(60)).expect("receiving has to end");
        assert_eq!(received.unwrap_err(), io::ErrorKind::TimedOut);
        drop(keep);
        guest.join().unwrap();
    }
}
