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
    let name = rustix::fs::readlink(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&node)), Vec::new());
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
    let caller = (0..6000).find_map(|_| {
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
        assert!(matches!(&located, Located::Device(node) if node.device == device), "{name} {flags:?}: {located:?}");
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
    for path in [format!("/proc/self/fd/{number}"), format!("/dev/fd/{number}"), "/proc/self/root/etc/passwd".into()] {
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
    let start =
        prop::sample::select(vec!["", "/", "/proc/self/fd/FD/", "/dev/fd/FD/", "/proc/self/root/dev/", "//dev/../"]);
    let end =
        prop::sample::select(vec!["", "/link", "/volcrypt-hostile", "/a\nb/../link", "/volcrypt-hostile/", "/link/."]);
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
