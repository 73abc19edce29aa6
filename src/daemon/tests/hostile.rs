//! Guests that were taken over and hold up whoever looks at them.

use std::ffi::c_void;
use std::io::Read;
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::mpsc;
use std::time::Instant;

use rustix::mm::{MapFlags, ProtFlags, UserfaultfdFlags};

use super::super::guests::Guests;
use super::super::pool::Pool;
use super::super::registrar::Registrar;
use super::super::server::Server;
use super::server::{guest_of, open_errno};
use super::*;
use crate::protocol::registration;
use crate::sys::seccomp;

/// A page of this process's memory that is not there, and that whoever reads it waits for until this is
/// dropped: userfaultfd(2).
struct Withheld {
    page: *mut c_void,
    _faults: OwnedFd,
}

// SAFETY: the page is never read or written through the pointer here.
#[allow(unsafe_code)]
unsafe impl Send for Withheld {}

impl Withheld {
    #[allow(unsafe_code)]
    fn new() -> Self {
        #[repr(C)]
        struct Api {
            api: u64,
            features: u64,
            ioctls: u64,
        }
        #[repr(C)]
        struct Register {
            start: u64,
            length: u64,
            mode: u64,
            ioctls: u64,
        }
        const UFFDIO_API: libc::Ioctl = 0xc018_aa3f_u64 as libc::Ioctl;
        const UFFDIO_REGISTER: libc::Ioctl = 0xc020_aa00_u64 as libc::Ioctl;
        const REGISTER_MODE_MISSING: u64 = 1;
        let length = rustix::param::page_size();
        // SAFETY: an anonymous mapping of its own, and two ioctls with the structs that they are for.
        unsafe {
            let faults = rustix::mm::userfaultfd(UserfaultfdFlags::CLOEXEC)
                .expect("run the tests as root, on a kernel with CONFIG_USERFAULTFD");
            let mut api = Api { api: 0xaa, features: 0, ioctls: 0 };
            assert_eq!(libc::ioctl(faults.as_raw_fd(), UFFDIO_API, &mut api), 0);
            let access = ProtFlags::READ | ProtFlags::WRITE;
            let page = rustix::mm::mmap_anonymous(std::ptr::null_mut(), length, access, MapFlags::PRIVATE).unwrap();
            let (start, length) = (page as u64, length as u64);
            let mut register = Register { start, length, mode: REGISTER_MODE_MISSING, ioctls: 0 };
            assert_eq!(libc::ioctl(faults.as_raw_fd(), UFFDIO_REGISTER, &mut register), 0);
            Withheld { page, _faults: faults }
        }
    }

    /// Opens what stands on the page.
    #[allow(unsafe_code)]
    fn open(&self) -> Option<i32> {
        // SAFETY: the kernel reads the path, or fails with EFAULT.
        let opened = unsafe { libc::syscall(libc::SYS_openat, libc::AT_FDCWD, self.page, libc::O_RDONLY) };
        (opened < 0).then(|| io::Error::last_os_error().raw_os_error()).flatten()
    }
}

#[test]
fn guests_that_never_let_their_memory_be_read_hold_up_no_other() {
    const HOSTILE: usize = 9;
    let world = World::new();
    let node = Node::new("/dev", world.add_volume("upheld", 51));
    let guests = Arc::new(Guests::new(Arc::new(world.clone())).unwrap());
    let deadline = Duration::from_secs(15);
    let server = Server::new(Arc::new(world.broker(true)), Arc::clone(&guests), Pool::new(16), deadline);
    std::thread::spawn(move || server.serve());
    let began = Instant::now();
    let hostile: Vec<_> = (0..HOSTILE)
        .map(|_| {
            let guests = Arc::clone(&guests);
            std::thread::spawn(move || {
                let withheld = Withheld::new();
                // The page is withheld until all have seen their deadlines.
                (guest_of(&guests, move || (withheld.open(), withheld)), Instant::now())
            })
        })
        .collect();
    while guests.count() < HOSTILE {
        assert!(!hostile.iter().any(std::thread::JoinHandle::is_finished), "one of them has ended");
        std::thread::sleep(Duration::from_millis(1));
    }
    std::thread::sleep(Duration::from_millis(200));
    let path = node.0.clone();
    let (file, volume) = guest_of(&guests, move || (File::open("/etc/passwd").is_ok(), open_errno(&path)));
    assert_eq!((file, volume), (true, None));
    assert!(began.elapsed() < deadline, "the others waited for {:?}", began.elapsed());
    for hostile in hostile.into_iter().map(|hostile| hostile.join().unwrap()) {
        let ((errno, _withheld), at) = hostile;
        assert_eq!(errno, Some(libc::ETIMEDOUT));
        assert!((deadline..deadline + Duration::from_secs(45)).contains(&(at - began)), "{:?}", at - began);
    }
    // Once their memory can be read they are forgotten like every other.
    let end = Instant::now() + Duration::from_secs(60);
    while guests.count() > 0 {
        assert!(Instant::now() < end, "{} guests are still there", guests.count());
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A registrar on a socket of its own.
fn registrar(world: &World) -> (Arc<Guests>, PathBuf) {
    let path = world.path().join("wrapper");
    let socket = UnixListener::bind(&path).unwrap();
    let guests = Arc::new(Guests::new(Arc::new(world.clone())).unwrap());
    let registrar = Registrar::new(Arc::clone(&guests), Vec::new());
    std::thread::spawn(move || registrar.serve(&socket, &Pool::new(4)));
    (guests, path)
}

/// A thread that registers as a wrapper does, and stays until the returned sender is dropped.
fn register(path: &Path) -> (mpsc::Sender<()>, io::Result<()>) {
    let path = path.to_owned();
    let (stay, leave) = mpsc::channel::<()>();
    let (tell, told) = mpsc::channel();
    std::thread::spawn(move || {
        let stream = UnixStream::connect(path).unwrap();
        let listener = seccomp::install_filter().unwrap();
        tell.send(registration::hand_over(&stream, &listener)).unwrap();
        let _ = leave.recv();
    });
    (stay, told.recv_timeout(Duration::from_secs(60)).unwrap())
}

#[test]
fn a_process_has_one_listener_at_a_time() {
    let world = World::new();
    let (guests, path) = registrar(&world);
    let (stay, first) = register(&path);
    first.unwrap();
    assert_eq!(register(&path).1.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    assert_eq!(guests.count(), 1);
    drop(stay);
    let end = Instant::now() + Duration::from_secs(60);
    while register(&path).1.is_err() {
        assert!(Instant::now() < end, "the first one has ended");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Where the tests below have this very program run once more, as a wrapper of its own.
const SOCKET: &str = "VOLCRYPT_TEST_WRAPPER_SOCKET";

#[test]
fn a_wrapper_in_a_process_of_its_own() {
    let Some(path) = std::env::var_os(SOCKET) else { return };
    let stream = UnixStream::connect(path).unwrap();
    let listener = seccomp::install_filter().unwrap();
    // Nobody answers an open any more.
    std::process::exit(if registration::hand_over(&stream, &listener).is_ok() { 0 } else { 3 });
}

/// How long a wrapper in a process of its own takes to register.
fn register_elsewhere(path: &Path) -> Duration {
    let began = Instant::now();
    let mut command = std::process::Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "daemon::tests::hostile::a_wrapper_in_a_process_of_its_own"]).env(SOCKET, path);
    let status = command.stdout(std::process::Stdio::null()).status().unwrap();
    assert_eq!(status.code(), Some(0));
    began.elapsed()
}

#[test]
fn silent_connections_keep_nobody_from_registering() {
    let world = World::new();
    let (_guests, path) = registrar(&world);
    let first = UnixStream::connect(&path).unwrap();
    for _ in 0..1000 {
        let surplus = UnixStream::connect(&path).unwrap();
        surplus.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        assert_eq!((&surplus).read(&mut [0]).unwrap(), 0, "one more is dropped at once");
    }
    let silent: Vec<_> = (0..100).map(|_| UnixStream::connect(&path).unwrap()).collect();
    let took = register_elsewhere(&path);
    assert!(took < Duration::from_secs(25), "another process waited for {took:?}");
    drop(silent);
    // The first one has its time, and no more.
    first.set_read_timeout(Some(Duration::from_millis(10))).unwrap();
    assert_eq!((&first).read(&mut [0]).unwrap_err().kind(), io::ErrorKind::WouldBlock);
    first.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    assert_eq!((&first).read(&mut [0]).unwrap(), 0);
}

#[test]
fn what_is_no_registration_is_dropped() {
    let world = World::new();
    let (guests, path) = registrar(&world);
    for message in [&b"x"[..], &[registration::HELLO], b""] {
        let stream = UnixStream::connect(&path).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        (&stream).write_all(message).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        assert_eq!((&stream).read(&mut [0]).unwrap(), 0);
    }
    assert_eq!(guests.count(), 0);
    assert!(register_elsewhere(&path) < Duration::from_secs(25));
}
