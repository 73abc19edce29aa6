use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;

use rustix::fs::{AtFlags, FileType, Mode, OFlags, ResolveFlags, StatVfsMountFlags, StatxFlags};
use rustix::io::Errno;

use super::OpenRequest;
use super::lookup::{self, HANDLE};
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
struct Origin {
    root: OwnedFd,
    /// Where a relative path starts; `None` for the root.
    start: Option<OwnedFd>,
}

fn origin(tid: u32, request: &OpenRequest) -> rustix::io::Result<Origin> {
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

fn look_up(tid: u32, Origin { root, start }: &Origin, request: &OpenRequest) -> rustix::io::Result<OwnedFd> {
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
    use std::os::unix::fs::symlink;
    use std::os::unix::process::CommandExt;

    use proptest::prelude::*;

    use super::*;
    use crate::sys::credentials::FileSystemUser;

    fn request(path: &str) -> OpenRequest {
        OpenRequest { directory: None, in_root: false, path: path.as_bytes().to_vec(), flags: OFlags::RDONLY }
    }

    fn own(path: &str) -> Located {
        locate(std::process::id(), &request(path), true)
    }

    #[test]
    fn files_and_nothing_are_no_block_devices() {
        for path in ["/", "/etc/passwd", "/nowhere/at/all", "/etc/passwd/x", "/dev/null", "Cargo.toml"] {
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
        let own = std::process::id();
        let node = look_up(own, &origin(own, &wanted).unwrap(), &wanted).unwrap();
        let name =
            rustix::fs::readlink(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&node)), Vec::new());
        assert_eq!(name.unwrap().as_bytes(), b"/etc/passwd");
    }

    /// A folder with the device `volcrypt-hostile` in it, and `link` to that.
    fn folder_with_device() -> (tempfile::TempDir, DeviceNumber) {
        let folder = tempfile::tempdir_in("/dev/shm").unwrap();
        let node = folder.path().join("volcrypt-hostile");
        let device = DeviceNumber { major: 250, minor: 77 };
        let raw = rustix::fs::makedev(device.major, device.minor);
        rustix::fs::mknodat(rustix::fs::CWD, &node, FileType::BlockDevice, Mode::RUSR | Mode::WUSR, raw)
            .expect("run the tests as root");
        symlink(&node, folder.path().join("link")).unwrap();
        (folder, device)
    }

    #[test]
    fn what_means_the_caller_never_means_the_daemon() {
        let (folder, device) = folder_with_device();
        // Its descriptor 0 is the folder; the daemon's is something else.
        let mut caller = std::process::Command::new("sleep");
        let mut caller = caller.arg("60").stdin(fs::File::open(folder.path()).unwrap()).spawn().unwrap();
        symlink("/proc/self/fd/0", folder.path().join("own")).unwrap();
        symlink("/proc/thread-self/fd/0/link", folder.path().join("thread")).unwrap();
        let shown = folder.path().to_str().unwrap();
        for (directory, path) in [
            (None, "/proc/self/fd/0/volcrypt-hostile".to_owned()),
            (None, "//proc/./thread-self/./fd/0/link".to_owned()),
            (None, "/proc/self/task/../root/proc/self/cwd/../../../proc/self/fd/0/link".to_owned()),
            (None, format!("/proc/self/task/{}/fd/0/link", caller.id())),
            (None, "/dev/fd/0/link".to_owned()),
            (None, "/dev/../dev/fd/0/link".to_owned()),
            (None, "/dev/stdin/link".to_owned()),
            (None, format!("{shown}/own/link")),
            (None, format!("{shown}/thread")),
            (Some(0), "own/own/link".to_owned()),
            (Some(0), "thread".to_owned()),
        ] {
            let wanted = OpenRequest { directory, ..request(&path) };
            let located = locate(caller.id(), &wanted, true);
            assert!(matches!(&located, Located::Device(node) if node.device == device), "{path}: {located:?}");
            let located = locate(caller.id(), &wanted, false);
            assert!(matches!(located, Located::WouldWait), "{path}: {located:?}");
        }
        caller.kill().unwrap();
        caller.wait().unwrap();
    }

    #[test]
    fn a_proc_of_other_processes_is_not_believed() {
        let (folder, _device) = folder_with_device();
        let mut unshare = std::process::Command::new("unshare");
        let mut unshare = unshare
            .args(["--pid", "--fork", "--kill-child", "--mount-proc", "sleep", "60"])
            .stdin(fs::File::open(folder.path()).unwrap())
            .spawn()
            .unwrap();
        let children = format!("/proc/{0}/task/{0}/children", unshare.id());
        let caller = (0..1000).find_map(|_| {
            std::thread::sleep(std::time::Duration::from_millis(10));
            let child: u32 = fs::read_to_string(&children).ok()?.trim().parse().ok()?;
            (fs::read_to_string(format!("/proc/{child}/comm")).ok()? == "sleep\n").then_some(child)
        });
        let caller = caller.expect("run the tests as root");
        for path in ["/proc/self/fd/0/link", "/dev/fd/0/link"] {
            let located = locate(caller, &request(path), false);
            assert!(matches!(located, Located::WouldWait), "{path}: {located:?}");
            let located = locate(caller, &request(path), true);
            assert!(matches!(located, Located::Unknown(_)), "{path}: {located:?}");
        }
        unshare.kill().unwrap();
        unshare.wait().unwrap();
    }

    #[test]
    fn a_directory_without_a_name_is_a_start_as_well() {
        let (folder, device) = folder_with_device();
        let gone = folder.path().join("gone");
        fs::create_dir(&gone).unwrap();
        let removed = fs::File::open(&gone).unwrap();
        fs::remove_dir(&gone).unwrap();
        let mut deep = fs::File::open(folder.path()).unwrap();
        let name = "x".repeat(200);
        for _ in 0..25 {
            rustix::fs::mkdirat(&deep, &name, Mode::RWXU).unwrap();
            deep = rustix::fs::openat(&deep, &name, OFlags::DIRECTORY, Mode::empty()).unwrap().into();
        }
        for (directory, path) in [(removed, "../link".to_owned()), (deep, "../".repeat(25) + "volcrypt-hostile")] {
            let number = Some(std::os::fd::AsRawFd::as_raw_fd(&directory));
            let wanted = OpenRequest { directory: number, ..request(&path) };
            let located = locate(std::process::id(), &wanted, true);
            assert!(matches!(&located, Located::Device(node) if node.device == device), "{path}: {located:?}");
            let located = locate(std::process::id(), &wanted, false);
            assert!(!matches!(located, Located::NoVolume), "{path}: {located:?}");
        }
    }

    #[test]
    fn a_directory_may_be_the_root() {
        let (folder, device) = folder_with_device();
        symlink("/../volcrypt-hostile", folder.path().join("up")).unwrap();
        let directory = fs::File::open(folder.path()).unwrap();
        let number = Some(std::os::fd::AsRawFd::as_raw_fd(&directory));
        for path in ["/volcrypt-hostile", "volcrypt-hostile", "up", "/../../up"] {
            let wanted = OpenRequest { directory: number, in_root: true, ..request(path) };
            let located = locate(std::process::id(), &wanted, true);
            assert!(matches!(&located, Located::Device(node) if node.device == device), "{path}: {located:?}");
            let located = locate(std::process::id(), &wanted, false);
            assert!(!matches!(located, Located::NoVolume), "{path}: {located:?}");
        }
    }

    /// The daemon's part is played by a thread without root's rights, as root has none on some file systems.
    #[test]
    fn where_the_daemon_may_not_go_the_callers_rights_count() {
        let (folder, device) = folder_with_device();
        let (owner, other) = (64055, 64058);
        std::os::unix::fs::chown(folder.path(), Some(owner), None).expect("run the tests as root");
        rustix::fs::chmod(folder.path(), Mode::RWXU).unwrap();
        let path = folder.path().join("link").to_str().unwrap().to_owned();
        let daemon = FileSystemUser { user: other, group: other, groups: Vec::new() };
        let located_by = |user| {
            let mut caller = std::process::Command::new("sleep").arg("60").uid(user).current_dir("/").spawn().unwrap();
            let located = with_rights_of(&daemon, || locate(caller.id(), &request(&path), true)).unwrap();
            caller.kill().unwrap();
            caller.wait().unwrap();
            located
        };
        let located = located_by(owner);
        assert!(matches!(&located, Located::Device(node) if node.device == device), "{located:?}");
        let located = located_by(other);
        assert!(matches!(located, Located::Refused(Errno::ACCESS)), "{located:?}");
    }

    #[test]
    fn what_the_kernel_would_refuse_is_refused_with_the_same_errno() {
        let folder = tempfile::tempdir().unwrap();
        symlink("loop", folder.path().join("loop")).unwrap();
        let folder = folder.path().to_str().unwrap();
        for (directory, path, errno) in [
            (None, format!("{folder}/loop"), Errno::LOOP),
            (None, format!("{folder}/{}", "x".repeat(256)), Errno::NAMETOOLONG),
            (Some(i32::MAX), "x".to_owned(), Errno::BADF),
        ] {
            let located = locate(std::process::id(), &OpenRequest { directory, ..request(&path) }, true);
            assert!(matches!(located, Located::Refused(error) if error == errno), "{path}: {located:?}");
        }
    }

    #[test]
    fn an_empty_path_is_never_left_to_the_kernel() {
        let (folder, _) = folder_with_device();
        let device = rustix::fs::open(folder.path().join("link"), HANDLE, Mode::empty()).unwrap();
        let directory = Some(std::os::fd::AsRawFd::as_raw_fd(&device));
        for directory in [directory, None] {
            for wait in [false, true] {
                let located = locate(std::process::id(), &OpenRequest { directory, ..request("") }, wait);
                assert!(matches!(located, Located::Refused(Errno::NOENT)), "{located:?}");
            }
        }
        // A device is no directory to start at, and what that means is not left to the kernel either.
        let located = locate(std::process::id(), &OpenRequest { directory, ..request("x") }, true);
        assert!(matches!(located, Located::Refused(Errno::NOTDIR)), "{located:?}");
    }

    #[test]
    fn flags_that_exclude_a_device_are_heeded() {
        let (folder, device) = folder_with_device();
        let shown = folder.path().to_str().unwrap();
        let located = |name: &str, flags| {
            locate(std::process::id(), &OpenRequest { flags, ..request(&format!("{shown}/{name}")) }, true)
        };
        for (name, flags, errno) in [
            ("link", OFlags::NOFOLLOW, Errno::LOOP),
            ("link", OFlags::CREATE | OFlags::EXCL, Errno::EXIST),
            ("volcrypt-hostile", OFlags::CREATE | OFlags::EXCL, Errno::EXIST),
            ("volcrypt-hostile", OFlags::DIRECTORY, Errno::NOTDIR),
        ] {
            let located = located(name, flags);
            assert!(matches!(located, Located::Refused(error) if error == errno), "{name} {flags:?}: {located:?}");
        }
        for (name, flags) in [
            ("volcrypt-hostile", OFlags::NOFOLLOW),
            ("volcrypt-hostile", OFlags::CREATE),
            ("link", OFlags::EXCL),
            ("link", OFlags::NOFOLLOW | OFlags::PATH),
        ] {
            let located = located(name, flags);
            assert!(
                matches!(&located, Located::Device(node) if node.device == device),
                "{name} {flags:?}: {located:?}"
            );
        }
    }

    /// It has another guest's directory open, which no mount of its own leads to.
    #[test]
    fn no_descriptor_leads_to_a_node_that_another_guest_was_given() {
        let mut other = std::process::Command::new("unshare")
            .args(["--mount", "--propagation", "private", "sh", "-c"])
            .arg("mount -t tmpfs tmpfs /mnt && mknod /mnt/volcrypt-hostile b 250 77 && echo ready && read line")
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let mut ready = [0; 6];
        io::Read::read_exact(other.stdout.as_mut().unwrap(), &mut ready).expect("run the tests as root");
        let directory = fs::File::open(format!("/proc/{}/root/mnt", other.id())).unwrap();
        let directory = Some(std::os::fd::AsRawFd::as_raw_fd(&directory));
        let permitted = |caller, directory, in_root, path: &str| match locate(
            caller,
            &OpenRequest { directory, in_root, ..request(path) },
            true,
        ) {
            Located::Device(node) => node.permitted,
            located => panic!("{path}: {located:?}"),
        };
        let own = std::process::id();
        for in_root in [false, true] {
            assert!(!permitted(own, directory, in_root, "volcrypt-hostile"));
        }
        assert!(!permitted(own, directory, true, "/volcrypt-hostile"));
        assert!(permitted(other.id(), None, false, "/mnt/volcrypt-hostile"));
        drop(other.stdin.take());
        other.wait().unwrap();
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
            let (own, wanted) = (std::process::id(), request(&path));
            let found = look_up(own, &origin(own, &wanted).unwrap(), &wanted);
            let node = found.unwrap_or_else(|error| panic!("{path}: {error}"));
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
        prop_oneof![6 => joined, 1 => long, 1 => long_ways_to_the_device(), 1 => chains_of_links(), 1 => prop::collection::vec(1_u8.., 0..300)]
    }

    /// Paths of about the length that the kernel takes, which end at the device.
    fn long_ways_to_the_device() -> impl Strategy<Value = Vec<u8>> {
        let start = prop::sample::select(vec!["", "/dev/fd/FD/", "/proc/self/fd/FD/", "/proc/thread-self/fd/FD/"]);
        let end = prop::sample::select(vec!["link", "volcrypt-hostile"]);
        let way = prop::sample::select(vec!["./", "a\nb/../"]);
        (start, way, end, 4060_usize..4100).prop_map(|(start, way, end, length)| {
            let ways = (length - start.len() - end.len()) / way.len();
            [start, &way.repeat(ways), end].concat().into_bytes()
        })
    }

    /// Paths that lead to the device over about as many links as the kernel follows.
    fn chains_of_links() -> impl Strategy<Value = Vec<u8>> {
        let start = prop::sample::select(vec!["", "/dev/fd/FD/", "/proc/self/fd/FD/", "/proc/self/cwd/dev/fd/FD/"]);
        (start, 34..42).prop_map(|(start, links)| format!("{start}chain{links}").into_bytes())
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
            let (folder, device) = folder_with_device();
            symlink("volcrypt-hostile", folder.path().join("chain1")).unwrap();
            for link in 2..42 {
                symlink(format!("chain{}", link - 1), folder.path().join(format!("chain{link}"))).unwrap();
            }
            fs::create_dir(folder.path().join("a\nb")).unwrap();
            let directory = fs::File::open(folder.path()).unwrap();
            let number = std::os::fd::AsRawFd::as_raw_fd(&directory);
            let path = put_number(&path, number);
            let wanted = OpenRequest { directory: Some(number), in_root: false, path: path.clone(), flags: OFlags::RDONLY };

            let kernel = rustix::fs::statat(&directory, OsStr::from_bytes(&path), AtFlags::empty());
            let is_device = kernel.is_ok_and(|status| FileType::from_raw_mode(status.st_mode) == FileType::BlockDevice);
            let located = locate(std::process::id(), &wanted, true);
            match &located {
                Located::Device(node) => prop_assert!(is_device && node.device == device),
                Located::NoVolume | Located::Refused(_) | Located::Unknown(_) => prop_assert!(!is_device, "{located:?}"),
                Located::WouldWait => prop_assert!(false),
            }
            let cached = locate(std::process::id(), &wanted, false);
            prop_assert!(!is_device || !matches!(cached, Located::NoVolume), "{cached:?}");
        }
    }
}
