//! Following a path step by step as the kernel does for another thread.
//!
//! No single call does that: what is relative starts at a descriptor of that thread and is not kept below it, a path
//! that is put together anew is longer than the one the thread gave and costs more links, and `/proc/self` means
//! whoever looks.

use std::ffi::OsStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;

use rustix::fs::{AtFlags, FileType, Mode, OFlags, ResolveFlags, Statx, StatxFlags};
use rustix::io::Errno;

use super::process::process_of;

/// How many links the kernel follows on one path, `MAXSYMLINKS` of `linux/namei.h`.
const LINKS: usize = 40;

/// The shortest path that is too long for the kernel, in bytes: `PATH_MAX` of `linux/limits.h` counts a NUL.
const TOO_LONG: usize = 4096;

/// `PROC_SUPER_MAGIC` of `linux/magic.h`.
const PROC_MAGIC: i64 = 0x9fa0;

/// Opening with these gives a handle on a place and leaves alone what is there.
pub const HANDLE: OFlags = OFlags::PATH.union(OFlags::CLOEXEC);

/// Where a path ends.
pub enum End {
    /// A handle on what is there, made without opening it.
    Place(OwnedFd),
    /// Nothing is there, and it could be made: the folder, and the name in it.
    Nothing(OwnedFd, Vec<u8>),
}

/// Follows `path` as thread `tid` would, whose root directory is `root`, from `start`. With `no_link`, not if there
/// is a link where it ends.
///
/// # Errors
/// Those of path_resolution(7), and `EPERM` when the path leads through a /proc that is for other processes than
/// the daemon's.
pub fn follow(
    tid: u32,
    root: BorrowedFd<'_>,
    start: BorrowedFd<'_>,
    path: &[u8],
    no_link: bool,
) -> rustix::io::Result<End> {
    if path.is_empty() {
        return Err(Errno::NOENT);
    }
    if path.len() >= TOO_LONG {
        return Err(Errno::NAMETOOLONG);
    }
    let here = rustix::io::fcntl_dupfd_cloexec(start, 0)?;
    let mut walk = Walk { root, here, left: Vec::new() };
    let mut links = 0;
    walk.turn_to(path)?;
    while let Some(name) = walk.left.pop() {
        let here = walk.here.as_fd();
        if name == b".." && is_same(here, root)? {
            continue;
        }
        let step = match step(here, &name, walk.left.is_empty()) {
            Err(Errno::NOENT) if walk.left.is_empty() => return Ok(End::Nothing(walk.here, name)),
            step => step?,
        };
        match step {
            Step::Place(next) => walk.here = next,
            Step::Link(_) if links == LINKS || (no_link && walk.left.is_empty()) => return Err(Errno::LOOP),
            Step::Link(link) => {
                links += 1;
                match target(tid, here, &name, link.as_fd())? {
                    Target::Path(path) => walk.turn_to(&path)?,
                    Target::Place(place) => walk.here = place,
                }
            }
        }
    }
    Ok(End::Place(walk.here))
}

struct Walk<'a> {
    root: BorrowedFd<'a>,
    here: OwnedFd,
    /// The names that are still to come, the next one last.
    left: Vec<Vec<u8>>,
}

impl Walk<'_> {
    fn turn_to(&mut self, path: &[u8]) -> rustix::io::Result<()> {
        // The kernel takes an empty link for none, and no file system but one that a process serves has any.
        if path.is_empty() {
            return Err(Errno::PERM);
        }
        if path.starts_with(b"/") {
            self.here = rustix::io::fcntl_dupfd_cloexec(self.root, 0)?;
        }
        // What ends in a slash has to be a directory.
        if path.ends_with(b"/") {
            self.left.push(b".".to_vec());
        }
        self.left.extend(path.rsplit(|&byte| byte == b'/').filter(|name| !name.is_empty()).map(<[u8]>::to_vec));
        Ok(())
    }
}

enum Step {
    Place(OwnedFd),
    Link(OwnedFd),
}

fn step(here: BorrowedFd<'_>, name: &[u8], last: bool) -> rustix::io::Result<Step> {
    let open = |flags| rustix::fs::openat(here, name, HANDLE | OFlags::NOFOLLOW | flags, Mode::empty());
    if !last {
        // Asked for as a directory, a file system is mounted there that is mounted at need, as it is for the caller.
        match open(OFlags::DIRECTORY) {
            Ok(next) => return Ok(Step::Place(next)),
            Err(Errno::NOTDIR | Errno::LOOP) => {}
            Err(error) => return Err(error),
        }
    }
    let next = open(OFlags::empty())?;
    match FileType::from_raw_mode(status(next.as_fd(), StatxFlags::TYPE)?.stx_mode.into()) {
        FileType::Symlink => Ok(Step::Link(next)),
        _ => Ok(Step::Place(next)),
    }
}

enum Target {
    Path(Vec<u8>),
    /// Where a magic link of proc(5) leads. It is followed with the daemon's rights, and may lead to another
    /// process's files.
    Place(OwnedFd),
}

fn target(tid: u32, here: BorrowedFd<'_>, name: &[u8], link: BorrowedFd<'_>) -> rustix::io::Result<Target> {
    let text = || rustix::fs::readlinkat(link, c"", Vec::new()).map(|text| text.into_bytes());
    if rustix::fs::fstatfs(link)?.f_type as i64 != PROC_MAGIC {
        return text().map(Target::Path);
    }
    let (name, is_self) = (OsStr::from_bytes(name), name == b"self");
    if is_self || name == "thread-self" {
        // In a /proc of other processes the numbers are others.
        let own = std::process::id().to_string();
        if !text().is_ok_and(|text| text.split(|&byte| byte == b'/').next() == Some(own.as_bytes())) {
            return Err(Errno::PERM);
        }
        let process = process_of(tid).map_err(|_| Errno::SRCH)?;
        let path = if is_self { process.to_string() } else { format!("{process}/task/{tid}") };
        return Ok(Target::Path(path.into_bytes()));
    }
    match rustix::fs::openat2(here, name, HANDLE, Mode::empty(), ResolveFlags::NO_MAGICLINKS) {
        Err(Errno::LOOP) => rustix::fs::openat(here, name, HANDLE, Mode::empty()).map(Target::Place),
        _ => text().map(Target::Path),
    }
}

fn is_same(one: BorrowedFd<'_>, other: BorrowedFd<'_>) -> rustix::io::Result<bool> {
    let place = |handle| {
        let status = status(handle, StatxFlags::INO | StatxFlags::MNT_ID)?;
        rustix::io::Result::Ok((status.stx_mnt_id, status.stx_dev_major, status.stx_dev_minor, status.stx_ino))
    };
    Ok(place(one)? == place(other)?)
}

/// What the kernel knows already is enough: neither a type nor a number ever changes, and asking a dead NFS server
/// would hang.
fn status(handle: BorrowedFd<'_>, wanted: StatxFlags) -> rustix::io::Result<Statx> {
    rustix::fs::statx(handle, c"", AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC, wanted)
}
