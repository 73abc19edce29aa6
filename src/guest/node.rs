use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, ResolveFlags, StatVfsMountFlags, StatxFlags};
use rustix::io::Errno;

use super::{Credentials, OpenRequest};
use crate::volume::DeviceNumber;

/// `TMPFS_MAGIC` of `linux/magic.h`; devtmpfs reports the same. libvirt makes a guest's nodes on
/// one of the two. No unprivileged process can make a device node on either, while a file system it
/// serves itself (FUSE) could show any number and owner.
const TMPFS_MAGIC: i64 = 0x0102_1994;

/// What is at the place that a call wants to open.
#[derive(Debug)]
pub enum Located {
    /// No block device, or nothing at all: volcrypt has no say in it.
    NotABlockDevice,
    /// A block device.
    BlockDevice(BlockNode),
    /// It cannot be told what is there; the call must not go through.
    Unknown(io::Error),
    /// It cannot be told without waiting for a disk or a network.
    WouldWait,
}

/// A block device's node as the caller sees it.
#[derive(Debug)]
pub struct BlockNode {
    /// The device.
    pub device: DeviceNumber,
    /// Whether the caller itself may open the node so. Only what libvirt gave to a guest has the
    /// guest's owner.
    pub permitted: bool,
}

/// Finds what `request` of thread `tid` would open, in that thread's own mount namespace and root.
/// With `wait` false, nothing that is not in the kernel's caches is asked for.
pub fn locate(tid: u32, request: &OpenRequest, wait: bool) -> Located {
    match open_node(tid, request, wait) {
        Ok(node) => examine(tid, request, &node).unwrap_or_else(|error| Located::Unknown(error.into())),
        // The kernel says the same to the caller.
        Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::NAMETOOLONG | Errno::ACCESS | Errno::BADF) => {
            Located::NotABlockDevice
        }
        Err(Errno::AGAIN) => Located::WouldWait,
        Err(error) => Located::Unknown(error.into()),
    }
}

/// A handle on the place, made without opening what is there.
fn open_node(tid: u32, request: &OpenRequest, wait: bool) -> rustix::io::Result<OwnedFd> {
    let handle = OFlags::PATH | OFlags::CLOEXEC;
    let path = own_proc(tid, absolute(tid, request)?);
    let root = rustix::fs::open(format!("/proc/{tid}/root"), handle | OFlags::DIRECTORY, Mode::empty())?;
    let mut resolve = ResolveFlags::IN_ROOT;
    if !wait {
        resolve |= ResolveFlags::CACHED;
    }
    match rustix::fs::openat2(&root, path.as_os_str(), handle, Mode::empty(), resolve) {
        // A magic link of proc(5), which no lookup below a root follows. /proc is the same for both
        // processes, so it can be followed from here: /dev/fd/N and the like lead to it.
        Err(Errno::XDEV) if wait => rustix::fs::open(magic_path(tid, &path), handle, Mode::empty()),
        Err(Errno::XDEV) => Err(Errno::AGAIN),
        outcome => outcome,
    }
}

/// The path of the request, relative ones completed.
fn absolute(tid: u32, request: &OpenRequest) -> rustix::io::Result<OsString> {
    let path = OsString::from_vec(request.path.clone());
    if path.is_empty() {
        return Err(Errno::NOENT);
    }
    if path.as_bytes().starts_with(b"/") {
        return Ok(path);
    }
    let base = match request.directory {
        Some(descriptor) => format!("/proc/{tid}/fd/{descriptor}"),
        None => format!("/proc/{tid}/cwd"),
    };
    let mut absolute = rustix::fs::readlink(base, Vec::new()).map_err(|_| Errno::BADF)?.into_bytes();
    absolute.push(b'/');
    absolute.extend_from_slice(path.as_bytes());
    Ok(OsString::from_vec(absolute))
}

/// `/proc/self` and `/proc/thread-self` mean the caller, not the daemon.
fn own_proc(tid: u32, path: OsString) -> OsString {
    let bytes = path.as_bytes();
    for own in [b"/proc/self/".as_slice(), b"/proc/thread-self/"] {
        if let Some(rest) = bytes.strip_prefix(own) {
            let mut replaced = format!("/proc/{tid}/").into_bytes();
            replaced.extend_from_slice(rest);
            return OsString::from_vec(replaced);
        }
    }
    path
}

/// Where a path that crosses a magic link is followed from the daemon's side.
fn magic_path(tid: u32, path: &OsStr) -> OsString {
    let bytes = path.as_bytes();
    let standard = match bytes {
        b"/dev/stdin" => Some(0),
        b"/dev/stdout" => Some(1),
        b"/dev/stderr" => Some(2),
        _ => None,
    };
    match (standard, bytes.strip_prefix(b"/dev/fd/")) {
        (Some(descriptor), _) => format!("/proc/{tid}/fd/{descriptor}").into(),
        (_, Some(rest)) => {
            let mut replaced = format!("/proc/{tid}/fd/").into_bytes();
            replaced.extend_from_slice(rest);
            OsString::from_vec(replaced)
        }
        _ if bytes.starts_with(b"/proc/") => path.to_owned(),
        _ => {
            let mut below_root = format!("/proc/{tid}/root").into_bytes();
            below_root.extend_from_slice(bytes);
            OsString::from_vec(below_root)
        }
    }
}

fn examine(tid: u32, request: &OpenRequest, node: &OwnedFd) -> rustix::io::Result<Located> {
    // What the kernel knows already is enough: a type never changes, and asking a dead NFS server
    // would hang.
    let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
    let status =
        rustix::fs::statx(node, c"", flags, StatxFlags::TYPE | StatxFlags::MODE | StatxFlags::UID | StatxFlags::GID)?;
    if FileType::from_raw_mode(status.stx_mode.into()) != FileType::BlockDevice {
        return Ok(Located::NotABlockDevice);
    }
    let device = DeviceNumber { major: status.stx_rdev_major, minor: status.stx_rdev_minor };
    let on_tmpfs = rustix::fs::fstatfs(node)?.f_type as i64 == TMPFS_MAGIC;
    let nodev = rustix::fs::fstatvfs(node)?.f_flag.contains(StatVfsMountFlags::NODEV);
    let owned = Credentials::of_thread(tid).is_ok_and(|credentials| {
        let mode = u32::from(status.stx_mode);
        credentials.may_open(status.stx_uid, status.stx_gid, mode, request.reads(), request.writes())
    });
    Ok(Located::BlockDevice(BlockNode { device, permitted: on_tmpfs && !nodev && owned }))
}

/// The target of a path in the daemon's own view; used for paths that operators and libvirt give.
///
/// # Errors
/// Those of stat(2), and `ENOTBLK` when it is no block device.
pub fn block_device_at(path: &std::path::Path) -> io::Result<DeviceNumber> {
    use std::os::unix::fs::{FileTypeExt, MetadataExt};
    let metadata = fs::metadata(path)?;
    match metadata.file_type().is_block_device() {
        true => Ok(DeviceNumber::from_raw(metadata.rdev())),
        false => Err(io::Error::from_raw_os_error(libc::ENOTBLK)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(path: &str) -> OpenRequest {
        OpenRequest { directory: None, path: path.as_bytes().to_vec(), flags: OFlags::RDONLY }
    }

    fn own(path: &str) -> Located {
        locate(std::process::id(), &request(path), true)
    }

    #[test]
    fn files_and_nothing_are_no_block_devices() {
        for path in ["/", "/etc/passwd", "/nowhere/at/all", "/etc/passwd/x", "", "/dev/null", "Cargo.toml"] {
            assert!(matches!(own(path), Located::NotABlockDevice), "{path}: {:?}", own(path));
        }
    }

    #[test]
    fn a_relative_path_starts_at_the_callers_descriptor() {
        let directory = fs::File::open("/etc").unwrap();
        let mut wanted = request("passwd");
        wanted.directory = Some(std::os::fd::AsRawFd::as_raw_fd(&directory));
        let node = open_node(std::process::id(), &wanted, true).unwrap();
        let name =
            rustix::fs::readlink(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&node)), Vec::new());
        assert_eq!(name.unwrap().as_bytes(), b"/etc/passwd");
    }

    #[test]
    fn magic_links_are_followed_in_the_callers_name() {
        let opened = fs::File::open("/etc/passwd").unwrap();
        let number = std::os::fd::AsRawFd::as_raw_fd(&opened);
        for path in
            [format!("/proc/self/fd/{number}"), format!("/dev/fd/{number}"), "/proc/self/root/etc/passwd".into()]
        {
            let node =
                open_node(std::process::id(), &request(&path), true).unwrap_or_else(|error| panic!("{path}: {error}"));
            let link = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&node));
            assert_eq!(rustix::fs::readlink(link, Vec::new()).unwrap().as_bytes(), b"/etc/passwd", "{path}");
            assert!(matches!(locate(std::process::id(), &request(&path), false), Located::WouldWait), "{path}");
        }
    }
}
