use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use rustix::fs::{AtFlags, FileType, Mode, OFlags, ResolveFlags, StatVfsMountFlags, StatxFlags};
use rustix::io::Errno;

use super::OpenRequest;
use super::lookup::{self, End, HANDLE};
use super::process::{file_system_user, may_open};
use crate::sys::credentials::with_rights_of;
use crate::volume::DeviceNumber;

/// `TMPFS_MAGIC` of `linux/magic.h`; devtmpfs reports the same. libvirt makes a guest's nodes on
/// one of the two. No unprivileged process can make a device node on either, while a file system it
/// serves itself (FUSE) could show any number and owner.
const TMPFS_MAGIC: i64 = 0x0102_1994;

/// What is at the place that a call wants to open.
#[derive(Debug)]
pub enum Located {
    /// No device that holds or reaches a volume, or nothing at all: volcrypt has no say in it.
    NoVolume,
    /// A device that holds or reaches a volume.
    Device(Node),
    /// Nothing that the caller could open; the call gets this errno. It is not left to the kernel, which might still
    /// find something.
    Refused(Errno),
    /// It cannot be told what is there; the call must not go through.
    Unknown(io::Error),
    /// There is a device, or it cannot be told what there is, and to learn more could mean to wait: for a disk, for
    /// a network, or for a file system that the caller itself serves.
    WouldWait,
}

/// A device's node as the caller sees it.
#[derive(Debug)]
pub struct Node {
    /// The block device.
    pub device: DeviceNumber,
    /// Whether the caller itself may open the node so. Only what libvirt gave to a guest has the
    /// guest's owner.
    pub permitted: bool,
    /// Whether it is no block device itself but passes SCSI commands to one: /dev/sgN and the like.
    pub passes_commands: bool,
}

/// Finds what `request` of thread `tid` would open, in that thread's own mount namespace and root.
/// With `wait` false, nothing that is not in the kernel's caches is asked for: no file system is, which the
/// caller itself may serve.
pub fn locate(tid: u32, request: &OpenRequest, wait: bool) -> Located {
    // Linux 7.2 opens a descriptor anew by an empty path, if it is asked to (O_EMPTYPATH).
    if request.path.is_empty() {
        return Located::Refused(Errno::NOENT);
    }
    let origin = match origin(tid, request) {
        Ok(origin) => origin,
        Err(_) if !wait => return Located::WouldWait,
        Err(error @ (Errno::BADF | Errno::NOTDIR | Errno::ACCESS)) => return Located::Refused(error),
        Err(error) => return Located::Unknown(error.into()),
    };
    let found = match wait {
        true => look_up(tid, &origin, request),
        false => known(&origin, request),
    };
    match found {
        Ok(node) => examine(tid, request, &node, wait).unwrap_or_else(|error| Located::Unknown(error.into())),
        Err(Errno::NOENT | Errno::NOTDIR) => Located::NoVolume,
        Err(_) if !wait => Located::WouldWait,
        Err(error @ (Errno::LOOP | Errno::NAMETOOLONG | Errno::ACCESS)) => Located::Refused(error),
        Err(error) => Located::Unknown(error.into()),
    }
}

/// Where the lookup of a request begins.
pub(super) struct Origin {
    root: OwnedFd,
    /// Where a relative path starts; `None` for the root.
    start: Option<OwnedFd>,
}

pub(super) fn origin(tid: u32, request: &OpenRequest) -> rustix::io::Result<Origin> {
    let directory = |path: String| rustix::fs::open(path, HANDLE | OFlags::DIRECTORY, Mode::empty());
    let start = || match request.directory {
        Some(descriptor) => directory(format!("/proc/{tid}/fd/{descriptor}")).map_err(|error| match error {
            Errno::NOENT => Errno::BADF,
            error => error,
        }),
        None => directory(format!("/proc/{tid}/cwd")),
    };
    let root = match request.in_root {
        true => start()?,
        false => directory(format!("/proc/{tid}/root"))?,
    };
    let is_relative = !request.in_root && !request.path.starts_with(b"/");
    Ok(Origin { root, start: is_relative.then(start).transpose()? })
}

/// What the kernel's caches alone tell, and the caller would be told as well.
fn known(Origin { root, start }: &Origin, request: &OpenRequest) -> rustix::io::Result<OwnedFd> {
    let path = OsStr::from_bytes(&request.path);
    let look = |from: &OwnedFd, how| rustix::fs::openat2(from, path, HANDLE, Mode::empty(), ResolveFlags::CACHED | how);
    match start {
        // It could lead up to the caller's root, where the kernel would stop.
        Some(_) if request.path.split(|&byte| byte == b'/').any(|name| name == b"..") => Err(Errno::AGAIN),
        Some(start) => look(start, ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS),
        None => match look(root, ResolveFlags::IN_ROOT) {
            Ok(node) if is_on_a_disk(&node) => Ok(node),
            // Links of proc(5) mean the daemon here, which may have a file or nothing where the caller has a device.
            Ok(_) | Err(Errno::NOENT | Errno::NOTDIR) => look(root, ResolveFlags::IN_ROOT | ResolveFlags::NO_SYMLINKS),
            refused => refused,
        },
    }
}

/// Whether a file system on a block device has the place; proc(5) is none. Devices without a driver have the
/// major number 0 (Documentation/admin-guide/devices.txt).
fn is_on_a_disk(node: &OwnedFd) -> bool {
    let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
    rustix::fs::statx(node, c"", flags, StatxFlags::TYPE).is_ok_and(|status| status.stx_dev_major != 0)
}

fn look_up(tid: u32, origin: &Origin, request: &OpenRequest) -> rustix::io::Result<OwnedFd> {
    match end(tid, origin, request)? {
        End::Place(node) => Ok(node),
        End::Nothing(..) => Err(Errno::NOENT),
    }
}

/// Where the path of `request` ends.
pub(super) fn end(tid: u32, Origin { root, start }: &Origin, request: &OpenRequest) -> rustix::io::Result<End> {
    let start = start.as_ref().unwrap_or(root);
    let no_link = request.flags.contains(OFlags::NOFOLLOW) && !request.is_path_only();
    let follow = || lookup::follow(tid, root.as_fd(), start.as_fd(), &request.path, no_link);
    match follow() {
        // What is cached of an NFS server's folder is not valid any more. For a whole path the kernel asks the server.
        Err(Errno::STALE) => {
            let path = OsStr::from_bytes(&request.path);
            let _ = rustix::fs::openat2(start, path, HANDLE, Mode::empty(), ResolveFlags::IN_ROOT);
            follow()
        }
        // Root may do less than a user where a server says so (NFS with root_squash).
        Err(Errno::ACCESS) => {
            let user = file_system_user(tid).map_err(|_| Errno::ACCESS)?;
            with_rights_of(&user, follow).unwrap_or(Err(Errno::ACCESS))
        }
        found => found,
    }
}

/// Where `path` ends as thread `tid` sees it: what others keep in /tmp or /home may be something else for the daemon.
///
/// # Errors
/// Those of path_resolution(7), and `ESRCH` when the thread is gone.
pub(super) fn look_as(tid: u32, path: &Path) -> rustix::io::Result<End> {
    let path = path.as_os_str().as_bytes().to_vec();
    let request = OpenRequest { directory: None, in_root: false, path, flags: OFlags::PATH };
    let origin = origin(tid, &request).map_err(|error| match error {
        Errno::NOENT => Errno::SRCH,
        error => error,
    })?;
    end(tid, &origin, &request)
}

fn examine(tid: u32, request: &OpenRequest, node: &OwnedFd, wait: bool) -> rustix::io::Result<Located> {
    // What the kernel knows already is enough: a type never changes, and asking a dead NFS server
    // would hang.
    let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
    let wanted = StatxFlags::TYPE | StatxFlags::MODE | StatxFlags::UID | StatxFlags::MNT_ID;
    let status = rustix::fs::statx(node, c"", flags, wanted)?;
    let number = DeviceNumber { major: status.stx_rdev_major, minor: status.stx_rdev_minor };
    let (device, passes_commands) = match FileType::from_raw_mode(status.stx_mode.into()) {
        FileType::BlockDevice => (number, false),
        FileType::CharacterDevice => match block_device_behind(number) {
            Some(device) => (device, true),
            None => return Ok(Located::NoVolume),
        },
        _ => return Ok(Located::NoVolume),
    };
    if !wait {
        return Ok(Located::WouldWait);
    }
    if let Some(errno) = request.excludes_devices() {
        return Ok(Located::Refused(errno));
    }
    let on_tmpfs = rustix::fs::fstatfs(node)?.f_type as i64 == TMPFS_MAGIC;
    let nodev = rustix::fs::fstatvfs(node)?.f_flag.contains(StatVfsMountFlags::NODEV);
    let owned = file_system_user(tid).is_ok_and(|user| {
        may_open(user.user, status.stx_uid, u32::from(status.stx_mode), request.reads(), request.writes())
    });
    // A path may lead into another guest's mounts, by a descriptor of a directory there.
    let own_mount = has_mount(tid, status.stx_mnt_id).unwrap_or(false);
    Ok(Located::Device(Node { device, permitted: on_tmpfs && !nodev && owned && own_mount, passes_commands }))
}

/// Whether the mount namespace of thread `tid` has the mount with this number: proc_pid_mountinfo(5).
fn has_mount(tid: u32, mount: u64) -> io::Result<bool> {
    let mounts = fs::read(format!("/proc/{tid}/mountinfo"))?;
    let number = format!("{mount} ");
    Ok(mounts.split(|&byte| byte == b'\n').any(|line| line.starts_with(number.as_bytes())))
}

/// The disk that a character device passes SCSI commands to: sg and bsg have it beside them in sysfs.
fn block_device_behind(number: DeviceNumber) -> Option<DeviceNumber> {
    let disks = fs::read_dir(format!("/sys/dev/char/{number}/device/block")).ok()?;
    let disk = disks.flatten().next()?;
    DeviceNumber::parse(fs::read_to_string(disk.path().join("dev")).ok()?.trim_end())
}

/// The target of a path in the daemon's own view; used for paths that operators and libvirt give.
///
/// # Errors
/// Those of stat(2), and `ENOTBLK` when it is no block device.
pub fn block_device_at(path: &Path) -> io::Result<DeviceNumber> {
    use std::os::unix::fs::{FileTypeExt, MetadataExt};
    let metadata = fs::metadata(path)?;
    match metadata.file_type().is_block_device() {
        true => Ok(DeviceNumber::from_raw(metadata.rdev())),
        false => Err(io::Error::from_raw_os_error(libc::ENOTBLK)),
    }
}

/// The same as thread `tid` sees it.
///
/// # Errors
/// Those of [`block_device_at`], and `ESRCH` when the thread is gone.
pub fn block_device_seen_by(tid: u32, path: &Path) -> io::Result<DeviceNumber> {
    let End::Place(place) = look_as(tid, path)? else { return Err(Errno::NOENT.into()) };
    let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
    let status = rustix::fs::statx(&place, c"", flags, StatxFlags::TYPE)?;
    match FileType::from_raw_mode(status.stx_mode.into()) {
        FileType::BlockDevice => Ok(DeviceNumber { major: status.stx_rdev_major, minor: status.stx_rdev_minor }),
        _ => Err(Errno::NOTBLK.into()),
    }
}

/// Whether an error of [`block_device_at`] says that there is a file of another kind, or nothing.
pub fn is_no_device(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOTBLK | libc::ENOENT | libc::ENOTDIR))
}

#[cfg(test)]
mod tests;
