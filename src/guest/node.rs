use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, ResolveFlags, StatVfsMountFlags, StatxFlags};
use rustix::io::Errno;

use super::OpenRequest;
use super::process::{file_system_user, may_open};
use crate::volume::DeviceNumber;

/// `TMPFS_MAGIC` of `linux/magic.h`; devtmpfs reports the same. libvirt makes a guest's nodes on
/// one of the two. No unprivileged process can make a device node on either, while a file system it
/// serves itself (FUSE) could show any number and owner.
const TMPFS_MAGIC: i64 = 0x0102_1994;

/// How often a lookup is repeated that something renamed or mounted elsewhere on the host got in the
/// way of: openat2(2) says `EAGAIN` then, for any path with `..` in it, as udev's links have.
const LOOKUPS: usize = 100;

/// What is at the place that a call wants to open.
#[derive(Debug)]
pub enum Located {
    /// No device that holds or reaches a volume, or nothing at all: volcrypt has no say in it.
    NoVolume,
    /// A device that holds or reaches a volume.
    Device(Node),
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
    match open_node(tid, request, wait) {
        Ok(handle) => examine(tid, request, &handle, wait).unwrap_or_else(|error| Located::Unknown(error.into())),
        // The kernel says the same to the caller.
        Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::NAMETOOLONG | Errno::ACCESS | Errno::BADF) => {
            Located::NoVolume
        }
        Err(Errno::AGAIN) if !wait => Located::WouldWait,
        Err(error) => Located::Unknown(error.into()),
    }
}

/// A handle on a place, made without opening what is there.
struct Handle {
    node: OwnedFd,
    /// Whether the way there may have left the caller's mount namespace.
    crossed: bool,
}

fn open_node(tid: u32, request: &OpenRequest, wait: bool) -> rustix::io::Result<Handle> {
    let handle = OFlags::PATH | OFlags::CLOEXEC;
    let path = as_the_caller(tid, &absolute(tid, request)?);
    let root = rustix::fs::open(format!("/proc/{tid}/root"), handle | OFlags::DIRECTORY, Mode::empty())?;
    let (resolve, lookups) = match wait {
        true => (ResolveFlags::IN_ROOT, LOOKUPS),
        false => (ResolveFlags::IN_ROOT | ResolveFlags::CACHED, 1),
    };
    let lookup = || rustix::fs::openat2(&root, path.as_os_str(), handle, Mode::empty(), resolve);
    let tried = (0..lookups).map(|_| lookup()).find(|outcome| !matches!(outcome, Err(Errno::AGAIN)));
    match tried.unwrap_or(Err(Errno::AGAIN)) {
        // A magic link of proc(5), which no lookup below a root follows. /proc is the same for both
        // processes, so it can be followed from here. It is followed with the daemon's rights, and may
        // lead to another process's files.
        Err(Errno::XDEV) if wait => {
            let node = rustix::fs::open(from_here(tid, &path), handle, Mode::empty())?;
            Ok(Handle { node, crossed: true })
        }
        Err(Errno::XDEV) => Err(Errno::AGAIN),
        outcome => Ok(Handle { node: outcome?, crossed: false }),
    }
}

/// The path of the request, relative ones completed.
fn absolute(tid: u32, request: &OpenRequest) -> rustix::io::Result<Vec<u8>> {
    let path = &request.path;
    if path.is_empty() {
        return Err(Errno::NOENT);
    }
    if path.starts_with(b"/") {
        return Ok(path.clone());
    }
    let base = match request.directory {
        Some(descriptor) => format!("/proc/{tid}/fd/{descriptor}"),
        None => format!("/proc/{tid}/cwd"),
    };
    let mut absolute = rustix::fs::readlink(base, Vec::new()).map_err(|_| Errno::BADF)?.into_bytes();
    absolute.push(b'/');
    absolute.extend_from_slice(path);
    Ok(absolute)
}

/// The path with what means the caller itself (`/proc/self`, `/dev/fd`, `/dev/stdin`) put so that it means
/// the caller when the daemon looks it up.
fn as_the_caller(tid: u32, path: &[u8]) -> OsString {
    let mut names: Vec<&[u8]> = path.split(|&byte| byte == b'/').filter(|name| !matches!(*name, b"" | b".")).collect();
    // What ends in a slash has to be a directory; that stays to be said.
    if path.ends_with(b"/") || path.ends_with(b"/.") {
        names.push(b"");
    }
    let thread = tid.to_string();
    let thread = thread.as_bytes();
    let mut replaced: Vec<&[u8]> = match names.as_slice() {
        [b"proc", b"self" | b"thread-self", ..] => vec![b"proc", thread],
        [b"dev", b"fd", ..] => vec![b"proc", thread, b"fd"],
        [b"dev", b"stdin"] => vec![b"proc", thread, b"fd", b"0"],
        [b"dev", b"stdout"] => vec![b"proc", thread, b"fd", b"1"],
        [b"dev", b"stderr"] => vec![b"proc", thread, b"fd", b"2"],
        _ => Vec::new(),
    };
    let rest = if replaced.is_empty() { 0 } else { 2 };
    replaced.extend(names.iter().skip(rest));
    let mut whole = Vec::with_capacity(path.len() + 16);
    for name in replaced {
        whole.push(b'/');
        whole.extend_from_slice(name);
    }
    if whole.is_empty() {
        whole.push(b'/');
    }
    OsString::from_vec(whole)
}

/// Where a path that crosses a magic link is followed from the daemon's side.
fn from_here(tid: u32, path: &OsStr) -> OsString {
    if path.as_bytes().starts_with(b"/proc/") {
        return path.to_owned();
    }
    let mut below_root = format!("/proc/{tid}/root").into_bytes();
    below_root.extend_from_slice(path.as_bytes());
    OsString::from_vec(below_root)
}

fn examine(tid: u32, request: &OpenRequest, handle: &Handle, wait: bool) -> rustix::io::Result<Located> {
    let node = &handle.node;
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
    let on_tmpfs = rustix::fs::fstatfs(node)?.f_type as i64 == TMPFS_MAGIC;
    let nodev = rustix::fs::fstatvfs(node)?.f_flag.contains(StatVfsMountFlags::NODEV);
    let owned = file_system_user(tid).is_ok_and(|user| {
        may_open(user, status.stx_uid, u32::from(status.stx_mode), request.reads(), request.writes())
    });
    let own_mount = !handle.crossed || has_mount(tid, status.stx_mnt_id).unwrap_or(false);
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
pub fn block_device_at(path: &std::path::Path) -> io::Result<DeviceNumber> {
    use std::os::unix::fs::{FileTypeExt, MetadataExt};
    let metadata = fs::metadata(path)?;
    match metadata.file_type().is_block_device() {
        true => Ok(DeviceNumber::from_raw(metadata.rdev())),
        false => Err(io::Error::from_raw_os_error(libc::ENOTBLK)),
    }
}

/// Whether an error of [`block_device_at`] says that there is a file of another kind, or nothing.
pub fn is_no_device(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOTBLK | libc::ENOENT | libc::ENOTDIR))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

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
            assert!(matches!(own(path), Located::NoVolume), "{path}: {:?}", own(path));
        }
    }

    #[test]
    fn of_a_device_no_more_is_asked_than_the_kernel_knows() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("node");
        let number = rustix::fs::makedev(250, 99);
        rustix::fs::mknodat(rustix::fs::CWD, &path, FileType::BlockDevice, Mode::RUSR, number)
            .expect("run the tests as root");
        let path = path.to_str().unwrap();
        // Whose file system it is would have to be asked there.
        assert!(matches!(locate(std::process::id(), &request(path), false), Located::WouldWait));
        assert!(matches!(own(path), Located::Device(node) if node.device.minor == 99));
    }

    #[test]
    fn a_relative_path_starts_at_the_callers_descriptor() {
        let directory = fs::File::open("/etc").unwrap();
        let mut wanted = request("passwd");
        wanted.directory = Some(std::os::fd::AsRawFd::as_raw_fd(&directory));
        let node = open_node(std::process::id(), &wanted, true).unwrap().node;
        let name =
            rustix::fs::readlink(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&node)), Vec::new());
        assert_eq!(name.unwrap().as_bytes(), b"/etc/passwd");
    }

    #[test]
    fn what_means_the_caller_never_means_the_daemon() {
        for (path, meant) in [
            ("/proc/self/fd/3", "/proc/7/fd/3"),
            ("//proc/./thread-self/./root/x", "/proc/7/root/x"),
            ("/dev/fd/3", "/proc/7/fd/3"),
            ("/dev/fd/", "/proc/7/fd/"),
            ("/dev/stderr", "/proc/7/fd/2"),
            ("/dev/./sda/", "/dev/sda/"),
            ("/dev/sda/.", "/dev/sda/"),
            ("/a/../dev/fd/3", "/a/../dev/fd/3"),
            ("/proc/selfish/x", "/proc/selfish/x"),
            ("/", "/"),
        ] {
            assert_eq!(as_the_caller(7, path.as_bytes()), meant, "{path}");
        }
    }

    #[test]
    fn only_the_callers_own_mounts_count() {
        let own = std::process::id();
        let status = rustix::fs::statx(rustix::fs::CWD, c"/etc", AtFlags::empty(), StatxFlags::MNT_ID).unwrap();
        assert!(has_mount(own, status.stx_mnt_id).unwrap());
        assert!(!has_mount(own, 1 << 40).unwrap());
    }

    #[test]
    fn magic_links_are_followed_in_the_callers_name() {
        let opened = fs::File::open("/etc/passwd").unwrap();
        let number = std::os::fd::AsRawFd::as_raw_fd(&opened);
        for path in
            [format!("/proc/self/fd/{number}"), format!("/dev/fd/{number}"), "/proc/self/root/etc/passwd".into()]
        {
            let handle = open_node(std::process::id(), &request(&path), true);
            let Handle { node, crossed } = handle.unwrap_or_else(|error| panic!("{path}: {error}"));
            assert!(crossed, "{path}");
            let link = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&node));
            assert_eq!(rustix::fs::readlink(link, Vec::new()).unwrap().as_bytes(), b"/etc/passwd", "{path}");
            assert!(matches!(locate(std::process::id(), &request(&path), false), Located::WouldWait), "{path}");
        }
    }

    /// Paths that lead to the device in a folder, to nothing, and around. `link` is a link to the device, and `FD` stands
    /// for the number of a descriptor of the folder.
    fn path_of_pieces() -> impl Strategy<Value = Vec<u8>> {
        let pieces: Vec<&[u8]> = vec![
            b"..",
            b".",
            b"",
            b"dev",
            b"shm",
            b"proc",
            b"self",
            b"thread-self",
            b"root",
            b"cwd",
            b"fd",
            b"FD",
            b"volcrypt-hostile",
            b"link",
            b"null",
            b"a\nb",
            b"\xff\xfe",
            &[b'x'; 255],
            &[b'x'; 256],
        ];
        let pieces = prop::collection::vec(prop::sample::select(pieces), 0..6);
        let start = prop::sample::select(vec![
            "",
            "/",
            "/proc/self/fd/FD/",
            "/dev/fd/FD/",
            "/proc/self/root/dev/",
            "//dev/../",
        ]);
        let end = prop::sample::select(vec![
            "",
            "/link",
            "/volcrypt-hostile",
            "/a\nb/../link",
            "/volcrypt-hostile/",
            "/link/.",
        ]);
        let joined = (start, pieces, end)
            .prop_map(|(start, pieces, end)| [start.as_bytes(), &pieces.join(&b'/'), end.as_bytes()].concat());
        let long = (4080_usize..4100).prop_map(|length| b"/dev/../".iter().copied().cycle().take(length).collect());
        prop_oneof![8 => joined, 1 => long, 1 => prop::collection::vec(1_u8.., 0..300)]
    }

    fn put_number(path: &[u8], number: i32) -> Vec<u8> {
        let number = number.to_string();
        let piece = |piece: &[u8]| if piece == b"FD" { number.as_bytes().to_vec() } else { piece.to_vec() };
        path.split(|&byte| byte == b'/').map(piece).collect::<Vec<_>>().join(&b'/')
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(3000))]

        /// The kernel looks up what it is told; wherever it finds a block device one is found here as well.
        #[test]
        fn a_path_leads_where_it_leads_the_kernel(path in path_of_pieces()) {
            let folder = tempfile::tempdir_in("/dev/shm").unwrap();
            let node = folder.path().join("volcrypt-hostile");
            let device = DeviceNumber { major: 250, minor: 77 };
            let raw = rustix::fs::makedev(device.major, device.minor);
            rustix::fs::mknodat(rustix::fs::CWD, &node, FileType::BlockDevice, Mode::RUSR | Mode::WUSR, raw)
                .expect("run the tests as root");
            std::os::unix::fs::symlink(&node, folder.path().join("link")).unwrap();
            fs::create_dir(folder.path().join("a\nb")).unwrap();
            let directory = fs::File::open(folder.path()).unwrap();
            let number = std::os::fd::AsRawFd::as_raw_fd(&directory);
            let path = put_number(&path, number);
            let wanted = OpenRequest { directory: Some(number), path: path.clone(), flags: OFlags::RDONLY };

            let kernel = rustix::fs::statat(&directory, OsStr::from_bytes(&path), AtFlags::empty());
            let is_device = kernel.is_ok_and(|status| FileType::from_raw_mode(status.st_mode) == FileType::BlockDevice);
            let located = locate(std::process::id(), &wanted, true);
            match &located {
                Located::Device(node) => prop_assert!(is_device && node.device == device),
                Located::NoVolume | Located::Unknown(_) => prop_assert!(!is_device, "{located:?}"),
                Located::WouldWait => prop_assert!(false),
            }
            let cached = locate(std::process::id(), &wanted, false);
            prop_assert!(!is_device || !matches!(cached, Located::NoVolume), "{cached:?}");
        }
    }
}
