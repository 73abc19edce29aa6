use std::ffi::CString;
use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, FromRawFd};
use std::path::PathBuf;
use std::process::Command;
use std::sync::mpsc;
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{CWD, Mode};

use super::super::guests::Guests;
use super::super::pool::Pool;
use super::super::server::Server;
use super::*;
use crate::sys::seccomp;

/// For opens that have to be answered before it.
const DEADLINE: Duration = Duration::from_secs(60);

/// Runs `work` on a thread whose opens a server answers, as QEMU's are.
pub(super) fn as_guest<R: Send + 'static>(
    broker: Broker,
    deadline: Duration,
    work: impl FnOnce() -> R + Send + 'static,
) -> R {
    let guests = Arc::new(Guests::new(Arc::new(World::new())).unwrap());
    let server = Server::new(Arc::new(broker), Arc::clone(&guests), Pool::new(16), deadline);
    std::thread::spawn(move || server.serve());
    guest_of(&guests, work)
}

pub(super) fn guest_of<R: Send + 'static>(guests: &Arc<Guests>, work: impl FnOnce() -> R + Send + 'static) -> R {
    let (hand_over, take_over) = mpsc::channel();
    let (welcome, welcomed) = mpsc::channel();
    let (send, receive) = mpsc::channel();
    std::thread::spawn(move || {
        hand_over.send(seccomp::install_filter().unwrap()).unwrap();
        welcomed.recv().unwrap();
        let _ = send.send(work());
    });
    guests.add(std::process::id(), take_over.recv().unwrap()).unwrap();
    welcome.send(()).unwrap();
    receive.recv_timeout(Duration::from_secs(120)).expect("the guest has to get its answers")
}

pub(super) fn open_errno(path: &Path) -> Option<i32> {
    OpenOptions::new().read(true).write(true).open(path).err().and_then(|error| error.raw_os_error())
}

#[test]
fn what_is_no_block_device_is_as_without_volcrypt() {
    let world = World::new();
    let file = world.path().join("mapping");
    let broker = world.broker(false);
    let (content, missing) = as_guest(broker, DEADLINE, move || {
        let missing = File::open("/nowhere").unwrap_err().raw_os_error();
        (std::fs::read_to_string(file).unwrap(), missing)
    });
    assert_eq!((content.as_str(), missing), (ON_THE_MAPPING, Some(libc::ENOENT)));
}

#[test]
fn a_protected_device_opens_as_its_mapping_whatever_call_opens_it() {
    let world = World::new();
    let device = world.add_volume("calls", 11);
    let broker = world.broker(true);
    let node = Node::new("/dev", device);
    let path = node.0.clone();
    let link = world.path().join("by-path");
    std::os::unix::fs::symlink(&path, &link).unwrap();
    let contents = as_guest(broker, DEADLINE, move || {
        let read = |mut file: File| {
            let mut text = String::new();
            file.read_to_string(&mut text).unwrap();
            text
        };
        let directory = File::open("/dev").unwrap();
        let name = path.file_name().unwrap();
        let c_path = CString::new(path.to_str().unwrap()).unwrap();
        let resolve = rustix::fs::ResolveFlags::empty();
        let second = rustix::fs::openat2(CWD, &path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty(), resolve).unwrap();
        let relative = rustix::fs::openat(&directory, name, OFlags::RDWR, Mode::empty()).unwrap();
        let close_on_exec =
            |file: &OwnedFd| rustix::io::fcntl_getfd(file).unwrap().contains(rustix::io::FdFlags::CLOEXEC);
        assert!(close_on_exec(&second) && !close_on_exec(&relative));
        [
            read(OpenOptions::new().read(true).write(true).open(&path).unwrap()),
            read(File::open(link).unwrap()),
            read(File::from(second)),
            read(File::from(relative)),
            read(raw_open(&c_path)),
        ]
    });
    assert_eq!(contents, [ON_THE_MAPPING; 5]);
    assert_eq!(world.opened(), ["250:11"; 5]);
}

#[test]
fn a_mapping_by_its_name_is_the_same_node_as_by_its_volumes_device() {
    let world = World::new();
    let device = world.add_volume("met", 312);
    let mapping = world.add_mapping("met", device, 313);
    let broker = world.broker(true);
    let nodes = [Node::new("/dev", device), Node::new("/dev", mapping)];
    let paths = nodes.each_ref().map(|node| node.0.clone());
    let opened = as_guest(broker, DEADLINE, move || {
        paths.map(|path| {
            let file = OpenOptions::new().read(true).write(true).open(path).unwrap();
            let status = rustix::fs::fstat(&file).unwrap();
            (status.st_dev, status.st_ino)
        })
    });
    // QEMU's locks are the node's.
    assert_eq!(opened[0], opened[1]);
    assert_eq!(world.opened(), ["250:312", "met at 250:313"]);
}

/// open(2) itself, which no library uses any more.
#[allow(unsafe_code)]
fn raw_open(path: &CString) -> File {
    // SAFETY: the path ends in NUL; the new descriptor belongs to the file that is returned.
    unsafe {
        let descriptor = libc::syscall(libc::SYS_open, path.as_ptr(), libc::O_RDWR);
        assert!(descriptor >= 0, "{}", io::Error::last_os_error());
        File::from_raw_fd(descriptor as i32)
    }
}

#[test]
fn a_refusal_reaches_the_opener_as_its_errno() {
    let world = World::new();
    let device = world.add_volume("refused", 12);
    let node = Node::new("/dev", device);
    let path = node.0.clone();
    let broker = world.broker(false);
    let errno = as_guest(broker, DEADLINE, move || open_errno(&path));
    assert_eq!(errno, Some(libc::ENOKEY));
}

#[test]
fn a_node_that_libvirt_cannot_have_made_is_worth_nothing() {
    let world = World::new();
    let device = world.add_volume("forged", 13);
    let mount = Mount::new(world.path().join("nodev"));
    let node = Node::new(mount.0.to_str().unwrap(), device);
    let path = node.0.clone();
    let broker = world.broker(true);
    let errno = as_guest(broker, DEADLINE, move || open_errno(&path));
    assert_eq!(errno, Some(libc::EACCES));
    assert!(world.opened().is_empty());
}

#[test]
fn a_process_that_is_no_domain_gets_no_mapping() {
    let mut world = World::new();
    let device = world.add_volume("nobody", 16);
    world.domain = None;
    let node = Node::new("/dev", device);
    let path = node.0.clone();
    let broker = world.broker(true);
    let errno = as_guest(broker, DEADLINE, move || open_errno(&path));
    assert_eq!(errno, Some(libc::EACCES));
    assert!(world.opened().is_empty());
}

/// A file system on which a device node opens nothing, whoever owns it.
struct Mount(PathBuf);

impl Mount {
    fn new(path: PathBuf) -> Self {
        std::fs::create_dir(&path).unwrap();
        let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", "nodev", "tmpfs"]).arg(&path).status();
        assert!(mounted.is_ok_and(|status| status.success()), "run the tests as root");
        Mount(path)
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(&self.0).status();
    }
}

#[test]
fn a_descriptor_that_only_names_a_protected_device_cannot_be_turned_into_the_device() {
    let world = World::new();
    let device = world.add_volume("handle", 14);
    let node = Node::new("/dev", device);
    let path = node.0.clone();
    let broker = world.broker(true);
    let text = as_guest(broker, DEADLINE, move || {
        let handle = rustix::fs::open(&path, OFlags::PATH, Mode::empty()).unwrap();
        std::fs::read_to_string(format!("/proc/self/fd/{}", handle.as_raw_fd())).unwrap()
    });
    assert_eq!(text, ON_THE_MAPPING);
}

#[test]
fn a_slow_guest_gets_its_answer_at_the_deadline_and_delays_no_other() {
    let mut world = World::new();
    world.delay = Duration::from_secs(60);
    let device = world.add_volume("slow", 15);
    let node = Node::new("/dev", device);
    let path = node.0.clone();
    let guests = Arc::new(Guests::new(Arc::new(World::new())).unwrap());
    let server = Server::new(Arc::new(world.broker(true)), Arc::clone(&guests), Pool::new(16), Duration::from_secs(10));
    std::thread::spawn(move || server.serve());
    let began = Instant::now();
    let slow_guests = Arc::clone(&guests);
    let slow = std::thread::spawn(move || guest_of(&slow_guests, move || open_errno(&path)));
    let other = guest_of(&guests, || std::fs::read_to_string("/etc/passwd").is_ok());
    assert!(other && began.elapsed() < Duration::from_secs(10));
    assert_eq!(slow.join().unwrap(), Some(libc::ETIMEDOUT));
    assert!(began.elapsed() < Duration::from_secs(60));
}

/// Its disks' storage does not answer, and its thread pool opens one after the other.
#[test]
fn calls_that_wait_for_their_turn_are_answered_at_their_deadline_and_not_worked_on() {
    const CALLS: usize = 40;
    let mut world = World::new();
    world.delay = Duration::from_secs(15);
    let device = world.add_volume("stuck", 17);
    let node = Node::new("/dev", device);
    let path = node.0.clone();
    let guests = Arc::new(Guests::new(Arc::new(World::new())).unwrap());
    let server = Server::new(Arc::new(world.broker(true)), Arc::clone(&guests), Pool::new(256), Duration::from_secs(1));
    std::thread::spawn(move || server.serve());
    let (opened, at) = guest_of(&guests, move || {
        let began = Instant::now();
        let opens: Vec<_> = (0..CALLS)
            .map(|_| {
                std::thread::spawn({
                    let path = path.clone();
                    move || (open_errno(&path), began.elapsed())
                })
            })
            .collect();
        opens.into_iter().map(|open| open.join().unwrap()).unzip::<_, _, Vec<_>, Vec<_>>()
    });
    assert_eq!(opened, [Some(libc::ETIMEDOUT); CALLS]);
    // None was refused for being one too many.
    assert!(at.iter().all(|at| (Duration::from_millis(900)..Duration::from_secs(15)).contains(at)), "{at:?}");
    std::thread::sleep(Duration::from_secs(17));
    assert!(world.opened().len() <= 16, "{} were worked on", world.opened().len());
}

/// It keeps a copy of its listener, and has answered its only open just when the server, which was told of it, wants to
/// receive it.
#[test]
fn a_guest_that_takes_its_own_calls_away_delays_no_other() {
    let world = World::new();
    let guests = Arc::new(Guests::new(Arc::new(world.clone())).unwrap());
    let server = Server::new(Arc::new(world.broker(true)), Arc::clone(&guests), Pool::new(16), DEADLINE);
    std::thread::spawn(move || server.serve());
    let mut alive = Vec::new();
    for _ in 0..2000 {
        let (keep, kept) = mpsc::channel::<()>();
        alive.push(keep);
        let (hand_over, take_over) = mpsc::channel();
        let (welcome, welcomed) = mpsc::channel();
        let (send, opened) = mpsc::channel();
        std::thread::spawn(move || {
            let listener = seccomp::install_filter().unwrap();
            let copy = seccomp::Listener::from_descriptor(listener.as_fd().try_clone_to_owned().unwrap()).unwrap();
            hand_over.send(listener).unwrap();
            welcomed.recv().unwrap();
            std::thread::spawn(move || {
                let second = rustix::event::Timespec { tv_sec: 1, tv_nsec: 0 };
                let mut waits = [PollFd::new(&copy, PollFlags::IN)];
                if poll(&mut waits, Some(&second)) == Ok(1)
                    && let Ok(Some(call)) = copy.receive()
                {
                    let _ = copy.let_through(call.id);
                }
            });
            let _ = File::open("/etc/passwd");
            let _ = send.send(());
            // Without an end or another call of the guest's, the server would wait for ever.
            let _ = kept.recv();
        });
        guests.add(std::process::id(), take_over.recv().unwrap()).unwrap();
        welcome.send(()).unwrap();
        opened.recv_timeout(Duration::from_secs(120)).expect("somebody has to answer");
    }
    assert!(guest_of(&guests, || File::open("/etc/passwd").is_ok()));
}

#[test]
fn a_guest_that_ends_is_forgotten() {
    let world = World::new();
    let guests = Arc::new(Guests::new(Arc::new(World::new())).unwrap());
    let server = Server::new(Arc::new(world.broker(true)), Arc::clone(&guests), Pool::new(2), Duration::from_secs(1));
    std::thread::spawn(move || server.serve());
    guest_of(&guests, || ());
    let end = Instant::now() + Duration::from_secs(60);
    while !guests.list().is_empty() {
        assert!(Instant::now() < end, "the guest is still there");
        std::thread::sleep(Duration::from_millis(5));
    }
}
