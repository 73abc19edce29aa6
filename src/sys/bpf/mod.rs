//! bpf(2) as far as the guard needs it: one kind of map, one kind of program, and the folder in which
//! both can be found again.
//!
//! Sources: linux/bpf.h (the numbers and the members of `union bpf_attr`), and the kernel's
//! Documentation/userspace-api/ebpf and Documentation/bpf/prog_cgroup_*.

mod map;
mod program;

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

pub use map::{Key, Map};
pub use program::{Instruction, Program, attach, attached, detach};

const OBJ_PIN: libc::c_long = 6;
const OBJ_GET: libc::c_long = 7;
const OBJ_GET_INFO_BY_FD: libc::c_long = 15;

/// Makes a map or a program outlive its users, at `path` in a BPF file system.
///
/// # Errors
/// `EEXIST`, or `EPERM` where there is no BPF file system.
pub fn pin(object: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let path = CString::new(path.as_os_str().as_bytes()).map_err(|_| io::ErrorKind::InvalidInput)?;
    let attributes = Pin { path: path.as_ptr() as u64, object: object.as_raw_fd() as u32, flags: 0 };
    // SAFETY: the path ends in NUL.
    unsafe { call(OBJ_PIN, &attributes) }.map(drop)
}

#[repr(C)]
struct Pin {
    path: u64,
    object: u32,
    flags: u32,
}

/// The kernel keeps fifteen bytes of a name.
fn short_name(name: &str) -> [u8; 16] {
    let mut bytes = [0; 16];
    let length = name.len().min(15);
    bytes[..length].copy_from_slice(&name.as_bytes()[..length]);
    bytes
}

/// The object pinned at `path`, if it is of the kind that its descriptor's link names.
fn pinned(path: &Path, kind: &[u8]) -> io::Result<OwnedFd> {
    let path = CString::new(path.as_os_str().as_bytes()).map_err(|_| io::ErrorKind::InvalidInput)?;
    let attributes = Pin { path: path.as_ptr() as u64, object: 0, flags: 0 };
    // SAFETY: the path ends in NUL.
    let object = unsafe { new_descriptor(OBJ_GET, &attributes) }?;
    let name = rustix::fs::readlink(format!("/proc/self/fd/{}", object.as_raw_fd()), Vec::new())?;
    match name.as_bytes() == kind {
        true => Ok(object),
        false => Err(io::Error::new(io::ErrorKind::InvalidData, "another kind of object is pinned there")),
    }
}

/// Has the kernel describe a map or a program.
///
/// # Safety
/// `T` is a head of the struct that the kernel writes for this kind of object, and every pointer in it
/// leads to as many items as the member for their number says.
unsafe fn describe<T>(object: BorrowedFd<'_>, information: &mut T) -> io::Result<()> {
    #[repr(C)]
    struct Attributes {
        object: u32,
        length: u32,
        information: u64,
    }
    let mut attributes = Attributes {
        object: object.as_raw_fd() as u32,
        length: size_of::<T>() as u32,
        information: (information as *mut T) as u64,
    };
    // SAFETY: the kernel writes no more than the struct is long, and that length into the attributes; the
    // rest is the caller's promise.
    unsafe { call_mut(OBJ_GET_INFO_BY_FD, &mut attributes) }.map(drop)
}

/// A command that makes a descriptor, which is close-on-exec.
///
/// # Safety
/// As for [`call`], and the command's result is a new descriptor.
unsafe fn new_descriptor<T>(command: libc::c_long, attributes: &T) -> io::Result<OwnedFd> {
    // SAFETY: the caller's promise.
    let descriptor = unsafe { call(command, attributes) }?;
    // SAFETY: the descriptor is new and nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor as RawFd) })
}

/// A command that only reads its attributes.
///
/// # Safety
/// As for [`call_mut`]; the kernel does not write into `attributes` for this command.
unsafe fn call<T>(command: libc::c_long, attributes: &T) -> io::Result<libc::c_long> {
    // SAFETY: the caller's promise.
    unsafe { syscall(command, attributes, size_of::<T>()) }
}

/// A command that also writes into its attributes.
///
/// # Safety
/// `T` begins like the kernel's `union bpf_attr` for this command, without padding of the compiler's, and
/// every pointer in it leads to what the command expects there.
unsafe fn call_mut<T>(command: libc::c_long, attributes: &mut T) -> io::Result<libc::c_long> {
    // SAFETY: the caller's promise.
    unsafe { syscall(command, attributes, size_of::<T>()) }
}

unsafe fn syscall<T>(command: libc::c_long, attributes: *const T, size: usize) -> io::Result<libc::c_long> {
    // SAFETY: the attributes are `size` bytes long; the rest is the caller's promise.
    match unsafe { libc::syscall(libc::SYS_bpf, command, attributes, size) } {
        -1 => Err(io::Error::last_os_error()),
        result => Ok(result),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_cut_to_what_the_kernel_keeps() {
        assert_eq!(size_of::<Pin>(), 16);
        assert_eq!(&short_name("guard"), b"guard\0\0\0\0\0\0\0\0\0\0\0");
        assert_eq!(&short_name("a_name_that_is_too_long"), b"a_name_that_is_\0");
    }
}
