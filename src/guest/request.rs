use std::io;

use rustix::fs::{OFlags, ResolveFlags};
use rustix::io::Errno;

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
    /// Whether that directory is the root of the lookup: `RESOLVE_IN_ROOT` of openat2(2).
    pub in_root: bool,
    /// The path.
    pub path: Vec<u8>,
    /// The flags of open(2).
    pub flags: OFlags,
}

impl OpenRequest {
    /// Reads what `call` asks for.
    ///
    /// # Errors
    /// The errno that the call deserves: `EFAULT` and `ENAMETOOLONG` for a path that cannot be read,
    /// `EINVAL` for an openat2(2) that is too short. It is answered and never left to the kernel, which
    /// might be able to read what the daemon was not.
    pub fn read(call: &Notification) -> io::Result<Self> {
        let [first, second, third, fourth, ..] = call.arguments;
        let plain = ResolveFlags::empty();
        let (directory, path, flags, resolve) = match call.number {
            libc::SYS_open => (libc::AT_FDCWD, first, second, plain),
            libc::SYS_creat => (libc::AT_FDCWD, first, (libc::O_CREAT | libc::O_WRONLY | libc::O_TRUNC) as u64, plain),
            libc::SYS_openat => (first as i32, second, third, plain),
            libc::SYS_openat2 => {
                let (flags, resolve) = read_how(call.tid, third, fourth)?;
                (first as i32, second, flags, resolve)
            }
            number => return Err(io::Error::other(format!("system call {number} opens no file"))),
        };
        let path = memory::read_c_string(call.tid, path, PATH_LIMIT)?;
        Ok(OpenRequest {
            directory: (directory != libc::AT_FDCWD).then_some(directory),
            in_root: resolve.contains(ResolveFlags::IN_ROOT),
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

    /// What the kernel would say if a device is there: the call asks for a directory, or for a new file.
    pub fn excludes_devices(&self) -> Option<Errno> {
        let wants = |flags| self.flags.contains(flags) && !self.is_path_only();
        match () {
            () if wants(OFlags::CREATE | OFlags::EXCL) => Some(Errno::EXIST),
            () if wants(OFlags::DIRECTORY) => Some(Errno::NOTDIR),
            () => None,
        }
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

/// What the `struct open_how` (openat2(2)) at `address` says: `flags`, `mode` and `resolve`, of 64 bits each.
fn read_how(tid: u32, address: u64, size: u64) -> io::Result<(u64, ResolveFlags)> {
    if size < 24 {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    let mut how = [0; 24];
    match memory::read(tid, address, &mut how)? {
        24 => {
            let words = std::array::from_fn(|word| std::array::from_fn(|byte| how[word * 8 + byte]));
            let [flags, _mode, resolve] = words.map(u64::from_ne_bytes);
            Ok((flags, ResolveFlags::from_bits_retain(resolve)))
        }
        _ => Err(io::Error::from_raw_os_error(libc::EFAULT)),
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
            let path = path.to_bytes().to_vec();
            assert_eq!(request, OpenRequest { directory: None, in_root: false, path, flags });
            assert!(request.writes());
        }
    }

    #[test]
    fn a_directory_that_is_the_root_is_told_from_one_that_is_not() {
        for (resolve, in_root) in [(ResolveFlags::IN_ROOT, true), (ResolveFlags::BENEATH, false)] {
            let how = [0, 0, resolve.bits()];
            let arguments = [7, address(c"/sda"), how.as_ptr() as u64, 24, 0, 0];
            let request = OpenRequest::read(&call(libc::SYS_openat2, arguments)).unwrap();
            assert_eq!((request.directory, request.in_root), (Some(7), in_root));
        }
    }

    #[test]
    fn what_cannot_be_read_gets_the_errno_of_the_kernel() {
        let long = std::ffi::CString::new("x".repeat(5000)).unwrap();
        let at = libc::AT_FDCWD as u64;
        let small_how = [at, address(c"/dev/sda"), address(c""), 8, 0, 0];
        for (number, arguments, errno) in [
            (libc::SYS_openat, [at, 0, 0, 0, 0, 0], libc::EFAULT),
            (libc::SYS_openat, [at, address(&long), 0, 0, 0, 0], libc::ENAMETOOLONG),
            (libc::SYS_openat2, small_how, libc::EINVAL),
            (libc::SYS_openat2, [at, address(c"/dev/sda"), 0, 24, 0, 0], libc::EFAULT),
        ] {
            let error = OpenRequest::read(&call(number, arguments)).unwrap_err();
            assert_eq!(error.raw_os_error(), Some(errno));
        }
    }

    #[test]
    fn flags_that_would_create_or_cut_a_file_never_reach_a_device() {
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::TRUNC | OFlags::DIRECT | OFlags::CLOEXEC;
        let request = OpenRequest { directory: None, in_root: false, path: b"/dev/sda".to_vec(), flags };
        assert_eq!(request.device_flags(), OFlags::RDWR | OFlags::DIRECT);
    }
}
