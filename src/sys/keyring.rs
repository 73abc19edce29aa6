//! `logon` keys in the calling thread's keyring: keyrings(7), add_key(2), keyctl(2).
//!
//! A `logon` key can be used by the kernel (dm-crypt finds it by its description) and can never be
//! read back by user space.

use std::ffi::CString;
use std::io;
use std::marker::PhantomData;

/// A key in the keyring of the thread that added it. Dropping it revokes and unlinks it.
pub struct ThreadKey {
    serial: libc::c_long,
    /// The keyring belongs to one thread, so the handle may not travel to another.
    _not_send: PhantomData<*const ()>,
}

impl ThreadKey {
    /// Adds `payload` as a `logon` key with `description` (`service:name`) to this thread's keyring.
    ///
    /// # Errors
    /// Those of add_key(2): `EDQUOT`, `ENOMEM`, or `EINVAL` for a description without a colon.
    pub fn add(description: &str, payload: &[u8]) -> io::Result<Self> {
        let description = CString::new(description).map_err(|_| io::ErrorKind::InvalidInput)?;
        // SAFETY: both strings end in NUL and the payload's length is its own; the kernel copies.
        let serial = unsafe {
            libc::syscall(
                libc::SYS_add_key,
                c"logon".as_ptr(),
                description.as_ptr(),
                payload.as_ptr(),
                payload.len(),
                libc::KEY_SPEC_THREAD_KEYRING,
            )
        };
        match serial {
            -1 => Err(io::Error::last_os_error()),
            serial => Ok(ThreadKey { serial, _not_send: PhantomData }),
        }
    }
}

impl Drop for ThreadKey {
    fn drop(&mut self) {
        // SAFETY: keyctl takes plain numbers for these two operations. Should either fail, the key
        // still goes away with the thread's keyring.
        unsafe {
            libc::syscall(libc::SYS_keyctl, libc::KEYCTL_REVOKE, self.serial);
            libc::syscall(libc::SYS_keyctl, libc::KEYCTL_UNLINK, self.serial, libc::KEY_SPEC_THREAD_KEYRING);
        }
    }
}
