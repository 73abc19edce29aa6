use std::io;

use rustix::fs::OFlags;

use crate::sys::memory;
use crate::sys::seccomp::Notification;

/// Linux's `PATH_MAX`, in bytes.
const PATH_LIMIT: usize = 4096;

/// What a stopped call wants to open.
///
/// It is read from the memory of a process that may change it at any time. The answer is therefore
/// always a descriptor that the daemon opened itself, or no descriptor.
#[derive(Debug, PartialEq, Eq)]
pub struct OpenRequest {
    /// The directory a relative path starts at, as a descriptor of the caller; `None` for its
    /// working directory.
    pub directory: Option<i32>,
    /// The path.
    pub path: Vec<u8>,
    /// The flags of open(2).
    pub flags: OFlags,
}

/// Why a call could not be read.
#[derive(Debug)]
pub enum Malformed {
    /// The kernel would refuse it as well, so let it.
    ForTheKernel,
    /// It could not be read although it may be in order.
    Unreadable(io::Error),
}

impl OpenRequest {
    /// Reads what `call` asks for.
    ///
    /// # Errors
    /// [`Malformed`].
    pub fn read(call: &Notification) -> Result<Self, Malformed> {
        let [first, second, third, fourth, ..] = call.arguments;
        let (directory, path, flags) = match call.number {
            libc::SYS_open => (libc::AT_FDCWD, first, second),
            libc::SYS_creat => (libc::AT_FDCWD, first, (libc::O_CREAT | libc::O_WRONLY | libc::O_TRUNC) as u64),
            libc::SYS_openat => (first as i32, second, third),
            libc::SYS_openat2 => (first as i32, second, read_how_flags(call.tid, third, fourth)?),
            number => {
                let error = io::Error::other(format!("system call {number} opens no file"));
                return Err(Malformed::Unreadable(error));
            }
        };
        let path = memory::read_c_string(call.tid, path, PATH_LIMIT).map_err(malformed)?;
        Ok(OpenRequest {
            directory: (directory != libc::AT_FDCWD).then_some(directory),
            path,
            flags: OFlags::from_bits_retain(flags as u32),
        })
    }

    /// Whether it asks to read.
    pub fn reads(&self) -> bool {
        self.access_mode() != libc::O_WRONLY as u32
    }

    /// Whether it asks to write.
    pub fn writes(&self) -> bool {
        self.access_mode() != libc::O_RDONLY as u32
    }

    /// Whether it asks for a mere handle on the path, with which nothing can be read or written.
    pub fn is_path_only(&self) -> bool {
        self.flags.contains(OFlags::PATH)
    }

    /// The flags that make sense for a block device that is there already.
    pub fn device_flags(&self) -> OFlags {
        let kept = OFlags::DIRECT | OFlags::SYNC | OFlags::DSYNC | OFlags::NONBLOCK | OFlags::EXCL | OFlags::NOATIME;
        let access = OFlags::from_bits_retain(self.access_mode());
        let wanted = access | (self.flags & kept);
        // Without O_CREAT, O_EXCL claims the device; with it, it asks for a new file.
        if self.flags.contains(OFlags::CREATE) { wanted - OFlags::EXCL } else { wanted }
    }

    fn access_mode(&self) -> u32 {
        self.flags.bits() & libc::O_ACCMODE as u32
    }
}

/// The flags in the `struct open_how` (openat2(2)) at `address`.
fn read_how_flags(tid: u32, address: u64, size: u64) -> Result<u64, Malformed> {
    let mut flags = [0; 8];
    if size < 24 {
        return Err(Malformed::ForTheKernel);
    }
    match memory::read(tid, address, &mut flags).map_err(malformed)? {
        8 => Ok(u64::from_ne_bytes(flags)),
        _ => Err(Malformed::ForTheKernel),
    }
}

fn malformed(error: io::Error) -> Malformed {
    match error.raw_os_error() {
        Some(libc::EFAULT | libc::ENAMETOOLONG) => Malformed::ForTheKernel,
        _ => Malformed::Unreadable(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call(number: i64, arguments: [u64; 6]) -> Notification {
        Notification { id: 1, tid: std::process::id(), number, arguments }
    }

    fn address(path: &std::ffi::CStr) -> u64 {
        path.as_ptr() as u64
    }

    #[test]
    fn the_four_calls_are_read_from_memory() {
        let path = c"/dev/sda";
        let how = [libc::O_RDWR as u64, 0, 0];
        let at = libc::AT_FDCWD as u64;
        let cases = [
            (libc::SYS_open, [address(path), libc::O_RDWR as u64, 0, 0, 0, 0], libc::O_RDWR),
            (libc::SYS_openat, [at, address(path), libc::O_RDWR as u64, 0, 0, 0], libc::O_RDWR),
            (libc::SYS_openat2, [at, address(path), how.as_ptr() as u64, 24, 0, 0], libc::O_RDWR),
            (libc::SYS_creat, [address(path), 0, 0, 0, 0, 0], libc::O_CREAT | libc::O_WRONLY | libc::O_TRUNC),
        ];
        for (number, arguments, flags) in cases {
            let request = OpenRequest::read(&call(number, arguments)).unwrap();
            let flags = OFlags::from_bits_retain(flags as u32);
            assert_eq!(request, OpenRequest { directory: None, path: path.to_bytes().to_vec(), flags });
            assert!(request.writes());
        }
    }

    #[test]
    fn what_the_kernel_refuses_is_left_to_it() {
        let long = std::ffi::CString::new("x".repeat(5000)).unwrap();
        let at = libc::AT_FDCWD as u64;
        for arguments in [[at, 0, 0, 0, 0, 0], [at, address(&long), 0, 0, 0, 0]] {
            let outcome = OpenRequest::read(&call(libc::SYS_openat, arguments));
            assert!(matches!(outcome, Err(Malformed::ForTheKernel)), "{outcome:?}");
        }
        let small_how = [at, address(c"/dev/sda"), address(c""), 8, 0, 0];
        assert!(matches!(OpenRequest::read(&call(libc::SYS_openat2, small_how)), Err(Malformed::ForTheKernel)));
    }

    #[test]
    fn flags_that_would_create_or_cut_a_file_never_reach_a_device() {
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::TRUNC | OFlags::DIRECT | OFlags::CLOEXEC;
        let request = OpenRequest { directory: None, path: b"/dev/sda".to_vec(), flags };
        assert_eq!(request.device_flags(), OFlags::RDWR | OFlags::DIRECT);
    }
}
