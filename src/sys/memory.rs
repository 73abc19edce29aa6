//! Memory that must not leave the machine's RAM, and the memory of another process.

use std::io;
use std::ptr::NonNull;

use rustix::mm::{Advice, MapFlags, MlockAllFlags, ProtFlags};

/// An anonymous mapping of its own for a secret: locked into RAM, left out of core dumps and not
/// inherited by a child. It is wiped when dropped. There is no `Debug` and no `Clone` on purpose.
pub struct SecretPages {
    start: NonNull<u8>,
    length: usize,
    mapped: usize,
}

impl SecretPages {
    /// `length` zero bytes.
    ///
    /// # Errors
    /// Those of mmap(2), mlock(2) and madvise(2): no memory, or more than `RLIMIT_MEMLOCK`.
    pub fn new(length: usize) -> io::Result<Self> {
        let page = rustix::param::page_size();
        let mapped = length.max(1).next_multiple_of(page);
        // SAFETY: an anonymous private mapping at an address of the kernel's choice aliases nothing.
        let address = unsafe {
            rustix::mm::mmap_anonymous(
                std::ptr::null_mut(),
                mapped,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE,
            )
        }?;
        let start = NonNull::new(address.cast::<u8>()).ok_or(io::ErrorKind::OutOfMemory)?;
        let pages = SecretPages { start, length, mapped };
        // SAFETY: the range is the mapping made above, which `pages` owns.
        unsafe {
            rustix::mm::mlock(address, mapped)?;
            rustix::mm::madvise(address, mapped, Advice::LinuxDontDump)?;
            rustix::mm::madvise(address, mapped, Advice::LinuxWipeOnFork)?;
        }
        Ok(pages)
    }

    /// The secret.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: `start` points to `mapped >= length` initialised bytes owned by `self`.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.length) }
    }

    /// The secret, to be filled in.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `bytes`, and `self` is borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.length) }
    }
}

impl Drop for SecretPages {
    fn drop(&mut self) {
        use zeroize::Zeroize;
        self.bytes_mut().zeroize();
        // SAFETY: the range is the mapping made in `new`; nothing refers to it after this drop.
        // A failure would leave wiped pages mapped, which harms nobody.
        let _ = unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), self.mapped) };
    }
}

// SAFETY: the pages are owned memory without interior mutability; sharing follows the borrow rules.
unsafe impl Send for SecretPages {}
// SAFETY: as above.
unsafe impl Sync for SecretPages {}

/// Locks every page this process touches from now on into RAM, so that no secret reaches swap.
///
/// # Errors
/// Those of mlockall(2).
pub fn lock_all() -> io::Result<()> {
    rustix::mm::mlockall(MlockAllFlags::CURRENT | MlockAllFlags::FUTURE | MlockAllFlags::ONFAULT)?;
    Ok(())
}

/// Reads as much of `buffer` as can be read at `address` in the memory of thread `tid`.
///
/// # Errors
/// `EFAULT` when the memory is not there, `ESRCH` when the thread is gone, `EPERM` without the right
/// to trace it: process_vm_readv(2).
pub fn read(tid: u32, address: u64, buffer: &mut [u8]) -> io::Result<usize> {
    let local = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    let remote = libc::iovec { iov_base: address as *mut libc::c_void, iov_len: buffer.len() };
    // SAFETY: `local` describes `buffer`, borrowed exclusively; `remote` is only looked at in the
    // other process.
    let read = unsafe { libc::process_vm_readv(tid as libc::pid_t, &local, 1, &remote, 1, 0) };
    usize::try_from(read).map_err(|_| io::Error::last_os_error())
}

/// Reads a NUL-terminated string of at most `limit` bytes at `address` in the memory of thread `tid`.
///
/// # Errors
/// Those of [`read`], and `ENAMETOOLONG` when no NUL comes within `limit`.
pub fn read_c_string(tid: u32, address: u64, limit: usize) -> io::Result<Vec<u8>> {
    let fault = || io::Error::from_raw_os_error(libc::EFAULT);
    let mut text = Vec::new();
    let mut chunk = [0_u8; 256];
    while text.len() <= limit {
        let at = address.checked_add(text.len() as u64).ok_or_else(fault)?;
        // Never reach across a page: the string may end right before one that is not mapped.
        let wanted = chunk.len().min(4096 - (at % 4096) as usize);
        let length = read(tid, at, &mut chunk[..wanted])?;
        match chunk[..length].iter().position(|&byte| byte == 0) {
            Some(end) => {
                text.extend_from_slice(&chunk[..end]);
                return Ok(text);
            }
            None if length == 0 => return Err(fault()),
            None => text.extend_from_slice(&chunk[..length]),
        }
    }
    Err(io::Error::from_raw_os_error(libc::ENAMETOOLONG))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secret_pages_hold_what_is_written() {
        let mut pages = SecretPages::new(64).unwrap();
        assert_eq!(pages.bytes(), [0; 64]);
        pages.bytes_mut().fill(7);
        assert_eq!(pages.bytes(), [7; 64]);
    }

    #[test]
    fn a_string_is_read_up_to_its_end_and_no_further_than_the_limit() {
        let text = std::ffi::CString::new("x".repeat(5000)).unwrap();
        let address = text.as_ptr() as u64;
        let own = std::process::id();
        assert_eq!(read_c_string(own, address, 8192).unwrap(), text.as_bytes());
        let error = read_c_string(own, address, 100).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENAMETOOLONG));
        let error = read_c_string(own, 0, 100).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EFAULT));
    }
}
