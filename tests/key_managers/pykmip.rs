//! A real KMIP server: PyKMIP, which `tests/prerequisites` installs.

use std::fs;
use std::net::{TcpListener, TcpStream};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Duration;

use rusqlite::Connection;
use volcrypt::keys::kmip::message::Version;
use volcrypt::keys::kmip::{KeyOrigin, KmipConfig, KmipKeyManager};

use super::authority::Authority;

/// A running server. It ends with this value.
pub struct PyKmip {
    authority: Authority,
    port: u16,
    process: Child,
}

impl PyKmip {
    /// Starts one with an empty database.
    pub fn start() -> Self {
        PyKmip::of(Authority::new("authority"))
    }

    /// Another one, with an empty database of its own, that this one's clients believe.
    pub fn twin(&self) -> Self {
        let authority = Authority::new("authority");
        for entry in fs::read_dir(self.authority.folder()).unwrap() {
            let path = entry.unwrap().path();
            if path.extension().is_some_and(|extension| extension == "pem" || extension == "key") {
                fs::copy(&path, authority.path(path.file_name().unwrap().to_str().unwrap())).unwrap();
            }
        }
        PyKmip::of(authority)
    }

    fn of(authority: Authority) -> Self {
        let port = free_port();
        let process = run(&authority, port);
        PyKmip { authority, port, process }
    }

    /// Stops it as a power cut would, with the processes that it has started itself.
    pub fn stop(&mut self) {
        let group = rustix::process::Pid::from_child(&self.process);
        // None of it may be left, if it was stopped before.
        let _ = rustix::process::kill_process_group(group, rustix::process::Signal::KILL);
        self.process.wait().unwrap();
    }

    /// Starts it again with the database that it had.
    pub fn start_again(&mut self) {
        self.process = run(&self.authority, self.port);
    }

    /// The authority that server and clients believe.
    pub fn authority(&self) -> &Authority {
        &self.authority
    }

    /// Where it listens.
    pub fn address(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// How many objects it holds, finished or not.
    pub fn objects(&self) -> usize {
        let database = Connection::open(self.authority.path("pykmip.db")).unwrap();
        let count = database.query_row("SELECT count(*) FROM managed_objects", [], |row| row.get::<_, i64>(0));
        count.unwrap() as usize
    }

    /// How the client `name` reaches `servers`.
    pub fn config(&self, name: &str, servers: Vec<String>) -> KmipConfig {
        config(&self.authority, name, servers)
    }

    /// A key manager of another host's.
    pub fn manager(&self) -> KmipKeyManager {
        KmipKeyManager::new(self.config("client", vec![self.address()]))
    }
}

/// A port that nobody has. The kernel gives those above 32767 to whoever asks for any, which may be before the server that
/// is to have it is there.
pub fn free_port() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    loop {
        let port = 20_000 + (std::process::id() % 80) as u16 * 150 + NEXT.fetch_add(1, Ordering::Relaxed) % 150;
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
}

/// How the client `name` reaches `servers` that `authority` vouches for.
pub fn config(authority: &Authority, name: &str, servers: Vec<String>) -> KmipConfig {
    KmipConfig {
        servers,
        ca: authority.path("ca.pem"),
        certificate: authority.path(&format!("{name}.pem")),
        key: authority.path(&format!("{name}.key")),
        key_origin: KeyOrigin::Host,
        newest_version: Version::NEWEST,
        wrapping_key: None,
        deadline: Duration::from_secs(20),
    }
}

impl Drop for PyKmip {
    fn drop(&mut self) {
        self.stop();
    }
}

fn run(authority: &Authority, port: u16) -> Child {
    let folder = authority.folder().to_str().unwrap();
    let settings = include_str!("pykmip.conf").replace("FOLDER", folder).replace("PORT", &port.to_string());
    fs::write(authority.path("server.conf"), settings).unwrap();
    fs::create_dir_all(authority.path("policy")).unwrap();
    let program = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("target/pykmip/bin/pykmip-server");
    let process = Command::new(&program)
        .arg("-f")
        .arg(authority.path("server.conf"))
        .arg("-l")
        .arg(authority.path("server.log"))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .process_group(0)
        .spawn()
        .unwrap_or_else(|error| panic!("{}: {error}; run tests/prerequisites", program.display()));
    let up = (0..3600).any(|_| {
        std::thread::sleep(Duration::from_millis(50));
        TcpStream::connect(("127.0.0.1", port)).is_ok()
    });
    assert!(up, "{}", fs::read_to_string(authority.path("server.log")).unwrap_or_default());
    process
}
