use std::fs;
use std::io;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, FileType, Statx, StatxFlags};

use crate::sys::credentials::FileSystemUser;
use crate::volume::DeviceNumber;

/// By whose rights the kernel judges what thread `tid` may open.
///
/// # Errors
/// When the thread is gone.
pub fn file_system_user(tid: u32) -> io::Result<FileSystemUser> {
    let status = fs::read_to_string(format!("/proc/{tid}/status"))?;
    parse_file_system_user(&status)
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "/proc/PID/status is not as proc(5) says"))
}

/// The process that thread `tid` belongs to. A process that a QEMU has started has that QEMU's listener
/// and is not that QEMU.
///
/// # Errors
/// When the thread is gone.
pub fn process_of(tid: u32) -> io::Result<u32> {
    let status = fs::read_to_string(format!("/proc/{tid}/status"))?;
    let process = status.lines().find_map(|line| line.strip_prefix("Tgid:")?.trim().parse().ok());
    process.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "/proc/PID/status is not as proc(5) says"))
}

/// proc_pid_status(5): `Uid:` and `Gid:` hold the real, effective, saved and file-system id.
fn parse_file_system_user(status: &str) -> Option<FileSystemUser> {
    let numbers = |name| -> Option<Vec<u32>> {
        let line = status.lines().find_map(|line| line.strip_prefix(name))?;
        line.split_whitespace().map(|number| number.parse().ok()).collect()
    };
    let (users, groups) = (numbers("Uid:")?, numbers("Gid:")?);
    Some(FileSystemUser { user: *users.get(3)?, group: *groups.get(3)?, groups: numbers("Groups:")? })
}

/// Whether `user` may open a file of this owner and mode as its owner. Root may open anything. The
/// rights of groups and others do not count: libvirt gives a disk to a guest by making it the owner
/// of the node.
pub fn may_open(user: u32, owner: u32, mode: u32, reads: bool, writes: bool) -> bool {
    let needed = u32::from(reads) * 0o400 + u32::from(writes) * 0o200;
    user == 0 || (user == owner && mode & needed == needed)
}

/// When process `pid` started, in clock ticks since the host did. Together with its number that is one process.
///
/// # Errors
/// When the process is gone.
pub fn start_time(pid: u32) -> io::Result<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    parse_start_time(&status)
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "/proc/PID/stat is not as proc(5) says"))
}

/// The same from the text of /proc/PID/stat, see proc_pid_stat(5): the name comes second, in brackets and with anything
/// in it; the start is field 22.
pub fn parse_start_time(status: &str) -> Option<u64> {
    let (_, after_the_name) = status.rsplit_once(')')?;
    after_the_name.split_whitespace().nth(19)?.parse().ok()
}

/// All processes of the host.
pub fn processes() -> Vec<u32> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
}

/// Those of `pids` that have the device open, which is of this kind: for anything, or `for_writing`.
pub fn processes_with_open(pids: &[u32], device: (FileType, DeviceNumber), for_writing: bool) -> Vec<u32> {
    let has_open = |pid: &u32| {
        descriptors(*pid).into_iter().flatten().flatten().any(|place| {
            // Of what cannot be looked at any more the worst is believed.
            open_device(&place).is_ok_and(|open| open == Some(device))
                && (!for_writing || is_for_writing(&place).unwrap_or(true))
        })
    };
    pids.iter().copied().filter(has_open).collect()
}

/// Whether process `pid` has the device open, which is of this kind, by another node than `node`, which is one of its own.
/// A lock (fcntl(2)) is a node's and not the device's.
pub fn opens_past(pid: u32, device: (FileType, DeviceNumber), node: BorrowedFd<'_>) -> bool {
    let wanted = StatxFlags::TYPE | StatxFlags::INO;
    let place = |status: &Statx| (status.stx_dev_major, status.stx_dev_minor, status.stx_ino);
    let known = rustix::fs::statx(node, c"", AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC, wanted).ok();
    descriptors(pid).into_iter().flatten().flatten().any(|descriptor| {
        open_device(&descriptor).is_ok_and(|open| open == Some(device))
            && rustix::fs::statx(CWD, &descriptor, AtFlags::STATX_DONT_SYNC, wanted)
                .is_ok_and(|status| known.as_ref().map(place) != Some(place(&status)))
    })
}

/// The devices that process `pid` has open, each as often as it has. A process that is gone has none.
pub fn open_devices(pid: u32) -> impl Iterator<Item = DeviceNumber> {
    let descriptors = descriptors(pid).into_iter().flatten().flatten();
    descriptors.filter_map(|place| open_device(&place).ok().flatten()).map(|(_, device)| device)
}

/// The block devices among them. A character device may have the same number.
///
/// # Errors
/// When it cannot be told what a process has open that is still there.
pub fn open_block_devices(pid: u32) -> io::Result<Vec<DeviceNumber>> {
    let mut devices = Vec::new();
    for place in descriptors(pid)? {
        if let Some((FileType::BlockDevice, device)) = open_device(&place?)? {
            devices.push(device);
        }
    }
    Ok(devices)
}

/// Whether process `pid` has the file that `fits` open for writing.
pub fn writes_file(pid: u32, fits: impl Fn(&Statx) -> bool) -> bool {
    descriptors(pid).into_iter().flatten().flatten().any(|place| {
        let wanted = StatxFlags::TYPE | StatxFlags::INO;
        rustix::fs::statx(CWD, &place, AtFlags::STATX_DONT_SYNC, wanted).is_ok_and(|status| fits(&status))
            && is_for_writing(&place).unwrap_or(false)
    })
}

/// Whether the descriptor at `/proc/PID/fd/N` can be written to: proc_pid_fdinfo(5).
fn is_for_writing(place: &Path) -> Option<bool> {
    let process = place.parent()?.parent()?;
    let info = fs::read_to_string(process.join("fdinfo").join(place.file_name()?)).ok()?;
    let flags = info.lines().find_map(|line| line.strip_prefix("flags:"))?.trim();
    Some(u32::from_str_radix(flags, 8).ok()? & libc::O_ACCMODE as u32 != 0)
}

/// The places `/proc/PID/fd/N`.
fn descriptors(pid: u32) -> io::Result<impl Iterator<Item = io::Result<PathBuf>>> {
    let entries = fs::read_dir(format!("/proc/{pid}/fd"))?;
    Ok(entries.map(|entry| entry.map(|entry| entry.path())))
}

/// The device that is open at `place`, if any is. What is closed meanwhile is none.
fn open_device(place: &Path) -> io::Result<Option<(FileType, DeviceNumber)>> {
    // What has a name anywhere, and is no pipe or socket. The name of what a daemon gave is /dm-0 once that
    // daemon is gone, and its mounts with it.
    let closed = |error: &io::Error| error.kind() == io::ErrorKind::NotFound;
    match fs::read_link(place) {
        Ok(target) if target.is_absolute() => {}
        Ok(_) => return Ok(None),
        Err(error) if closed(&error) => return Ok(None),
        Err(error) => return Err(error),
    }
    match device_at(place).map_err(io::Error::from) {
        Ok((kind @ (FileType::BlockDevice | FileType::CharacterDevice), number)) => Ok(Some((kind, number))),
        Ok(_) => Ok(None),
        Err(error) if closed(&error) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Kind and number of the device at `path`. It may be a process's own file system that serves the place, which
/// is not asked: what the kernel knows already is enough.
fn device_at(path: &Path) -> rustix::io::Result<(FileType, DeviceNumber)> {
    let status = rustix::fs::statx(CWD, path, AtFlags::STATX_DONT_SYNC, StatxFlags::TYPE)?;
    let number = DeviceNumber { major: status.stx_rdev_major, minor: status.stx_rdev_minor };
    Ok((FileType::from_raw_mode(status.stx_mode.into()), number))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::OpenOptionsExt;

    #[test]
    fn a_file_that_is_written_is_told_from_one_that_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        let writer = fs::File::create(&path).unwrap();
        let wanted = StatxFlags::TYPE | StatxFlags::INO;
        let own = rustix::fs::statx(CWD, &path, AtFlags::empty(), wanted).unwrap();
        let is_written = || {
            writes_file(std::process::id(), |status| {
                (status.stx_ino, status.stx_dev_major, status.stx_dev_minor)
                    == (own.stx_ino, own.stx_dev_major, own.stx_dev_minor)
            })
        };
        assert!(is_written());
        drop(writer);
        let _reader = fs::File::open(&path).unwrap();
        assert!(!is_written());
        assert!(open_block_devices(0x7fff_fff0).is_err(), "nobody has this number");
    }

    #[test]
    fn the_file_system_id_counts() {
        let status = "Name:\tqemu\nUid:\t1\t2\t3\t4\nGid:\t5\t6\t7\t8\nGroups:\t9 10 \n";
        let user = FileSystemUser { user: 4, group: 8, groups: vec![9, 10] };
        assert_eq!(parse_file_system_user(status), Some(user));
        assert_eq!(parse_file_system_user("Uid:\t1\nGid:\t1\nGroups:\t\n"), None);
        assert_eq!(file_system_user(std::process::id()).unwrap().user, rustix::process::geteuid().as_raw());
    }

    #[test]
    fn a_process_is_told_from_the_next_of_its_number() {
        let fields = (3..=52).map(|field| field.to_string()).collect::<Vec<_>>().join(" ");
        assert_eq!(parse_start_time(&format!("7 (a) b (c) S)) {fields}\n")), Some(22));
        assert_eq!(parse_start_time("7 (a) S 1"), None);
        let own = std::process::id();
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        assert_eq!(start_time(own).unwrap(), start_time(own).unwrap());
        assert!(start_time(own).unwrap() <= start_time(child.id()).unwrap());
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(start_time(child.id()).is_err());
    }

    #[test]
    fn who_has_a_device_open_is_found() {
        let number = |path: &str| device_at(Path::new(path)).unwrap().1;
        let _null = fs::File::open("/dev/null").unwrap();
        let own = std::process::id();
        assert!(!open_block_devices(own).unwrap().contains(&number("/dev/null")), "a character device");
        let with_open =
            |path: &str, kind, for_writing| processes_with_open(&[own, u32::MAX], (kind, number(path)), for_writing);
        let character = FileType::CharacterDevice;
        assert_eq!(with_open("/dev/null", character, false), [own]);
        // A device that does not exist: whatever other tests of this process have open is none of its matter.
        let nobodys = (character, DeviceNumber { major: 1, minor: 200 });
        assert!(processes_with_open(&[own, u32::MAX], nobodys, false).is_empty());
        // Numbers are given to block devices and character devices apart.
        assert!(with_open("/dev/null", FileType::BlockDevice, false).is_empty());
        let _reads = fs::File::open("/dev/random").unwrap();
        assert_eq!(with_open("/dev/random", character, false), [own]);
        assert!(with_open("/dev/random", character, true).is_empty(), "it is only read");
        let _writes = fs::File::options().append(true).open("/dev/random").unwrap();
        assert_eq!(with_open("/dev/random", character, true), [own]);
    }

    #[test]
    fn two_nodes_of_a_device_are_told_apart() {
        use std::os::fd::AsFd;
        let folder = tempfile::tempdir().unwrap();
        let (path, mode) = (folder.path().join("full"), rustix::fs::Mode::RUSR);
        let (kind, number) = (FileType::CharacterDevice, device_at(Path::new("/dev/full")).unwrap().1);
        let raw = rustix::fs::makedev(number.major, number.minor);
        rustix::fs::mknodat(CWD, &path, kind, mode, raw).expect("run the tests as root");
        let place = |path: &Path| fs::OpenOptions::new().read(true).custom_flags(libc::O_PATH).open(path).unwrap();
        let (node, other) = (place(Path::new("/dev/full")), place(&path));
        let mut holder = std::process::Command::new("sleep")
            .arg("60")
            .stdin(fs::File::open("/dev/full").unwrap())
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null())
            .spawn()
            .unwrap();
        let past = [&node, &other].map(|node| opens_past(holder.id(), (kind, number), node.as_fd()));
        let null = (kind, device_at(Path::new("/dev/null")).unwrap().1);
        let of_another = opens_past(holder.id(), null, place(Path::new("/dev/null")).as_fd());
        holder.kill().unwrap();
        holder.wait().unwrap();
        assert_eq!((past, of_another), ([false, true], false));
    }

    /// As a mapping is that an earlier daemon gave to a guest.
    #[test]
    fn a_device_is_found_whose_mount_is_gone() {
        let mut holder = std::process::Command::new("unshare")
            .args(["--mount", "--propagation", "private", "sh", "-c"])
            .arg(
                "mount -t tmpfs tmpfs /mnt && mknod /mnt/zero c 1 5 && exec </mnt/zero && umount -l /mnt && echo ready && \
                 exec sleep 60",
            )
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let mut ready = [0; 6];
        io::Read::read_exact(holder.stdout.as_mut().unwrap(), &mut ready).expect("run the tests as root");
        let pid = holder.id();
        let found: Vec<_> = open_devices(pid).collect();
        holder.kill().unwrap();
        holder.wait().unwrap();
        assert!(found.contains(&DeviceNumber { major: 1, minor: 5 }), "{found:?}");
    }

    #[test]
    fn threads_are_their_process_and_children_are_not() {
        let own = std::process::id();
        let thread = std::thread::spawn(|| process_of(rustix::thread::gettid().as_raw_nonzero().get() as u32));
        assert_eq!(thread.join().unwrap().unwrap(), own);
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        assert_eq!(process_of(child.id()).unwrap(), child.id());
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(process_of(child.id()).is_err());
    }

    #[test]
    fn only_the_owner_of_a_node_was_given_it() {
        let guest = 64055;
        assert!(may_open(guest, guest, 0o600, true, true));
        assert!(!may_open(guest, guest, 0o400, true, true));
        assert!(!may_open(guest, guest, 0o066, true, false));
        assert!(!may_open(guest, 0, 0o666, true, false), "what everybody may open was given to nobody");
        assert!(may_open(0, guest, 0, true, true));
    }
}
