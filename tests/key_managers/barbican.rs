//! A real Barbican with a real Keystone, which `tests/prerequisites` installs.

use std::fs;
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use volcrypt::keys::barbican::{BarbicanConfig, BarbicanKeyManager, Credential};

use super::pykmip::free_port;
use super::scripted::{Reply, Request, Scripted, forward};

/// What Barbican says with 404.
pub const NOT_FOUND: &str = "{\"code\": 404, \"title\": \"Not Found\", \"description\": \"Secret not found.\"}";

/// Running servers. They end with this value.
pub struct Barbican {
    folder: tempfile::TempDir,
    keystone: u16,
    front: Scripted,
    barbican: u16,
    processes: Vec<Child>,
}

impl Barbican {
    /// Starts both, with users and a project and without keys.
    pub fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let copied = Command::new("cp").arg("-r").arg(target().join("template/.")).arg(folder.path()).status().unwrap();
        assert!(copied.success(), "run tests/prerequisites");
        let [keystone, barbican] = [free_port(), free_port()];
        let front = Scripted::start(move |request| forward(barbican, request));
        let front_port = front.port();
        let mut servers = Barbican { folder, keystone, front, barbican, processes: Vec::new() };
        let others = [format!("http://127.0.0.1:{front_port}"), keystone.to_string()];
        for ((name, port), other) in [("keystone", keystone), ("barbican", barbican)].into_iter().zip(others) {
            let process = run(servers.folder.path(), name, port, &other);
            servers.processes.push(process);
        }
        for (name, port) in [("keystone", keystone), ("barbican", barbican)] {
            let up = (0..3600).any(|_| {
                std::thread::sleep(Duration::from_millis(50));
                TcpStream::connect(("127.0.0.1", port)).is_ok()
            });
            let said = fs::read_to_string(servers.folder.path().join(format!("{name}.out"))).unwrap_or_default();
            assert!(up, "{name}: {said}");
        }
        servers
    }

    /// How `user`, one of `host1`, `host2` and `owner`, reaches them with its application credential.
    pub fn config(&self, user: &str) -> BarbicanConfig {
        let secret = self.folder.path().join(format!("{user}.secret"));
        fs::write(&secret, format!("{user}\n")).unwrap();
        fs::set_permissions(&secret, fs::Permissions::from_mode(0o600)).unwrap();
        let credential = Credential::NamedApplication {
            name: "hypervisor".to_owned(),
            user: user.to_owned(),
            user_domain: "Default".to_owned(),
        };
        BarbicanConfig {
            auth_url: format!("http://127.0.0.1:{}/v3", self.keystone),
            credential,
            secret,
            ca: None,
            interface: "public".to_owned(),
            region: Some("here".to_owned()),
            deadline: Duration::from_secs(30),
            volume_secrets: None,
        }
    }

    /// What all that is asked of Barbican goes through.
    pub fn front(&self) -> &Scripted {
        &self.front
    }

    /// Has `spoil` answer those requests to Barbican that it wants to; the others are handed on.
    pub fn spoil(&self, spoil: impl Fn(&Request) -> Option<Reply> + Send + Sync + 'static) {
        let barbican = self.barbican;
        self.front.answer(move |request| spoil(request).unwrap_or_else(|| forward(barbican, request)));
    }

    /// The port that Barbican itself listens on.
    pub fn barbican(&self) -> u16 {
        self.barbican
    }

    /// Barbican's database.
    pub fn database(&self) -> PathBuf {
        self.folder.path().join("barbican.db")
    }

    /// Asks Barbican as somebody who has the token of the request `like`; returns the whole answer.
    pub fn ask_like(&self, like: &Request, method: &str, target: &str, body: &str) -> String {
        let is_token = |line: &&str| line.to_lowercase().starts_with("x-auth-token");
        let token = like.head.lines().find(is_token).unwrap();
        let head = format!(
            "{method} {target} HTTP/1.1\r\nhost: 127.0.0.1\r\n{token}\r\ncontent-type: application/json\r\naccept: \
             application/json\r\nopenstack-api-version: key-manager 1.2\r\ncontent-length: {}\r\n\r\n",
            body.len()
        );
        let request = Request { method: method.into(), target: target.into(), head, body: body.as_bytes().to_vec() };
        String::from_utf8(forward(self.barbican, &request).bytes()).unwrap()
    }

    /// The key manager of another host's.
    pub fn manager(&self, user: &str) -> BarbicanKeyManager {
        BarbicanKeyManager::new(self.config(user))
    }
}

impl Drop for Barbican {
    fn drop(&mut self) {
        for process in &mut self.processes {
            // It may have ended by itself.
            let _ = process.kill();
            let _ = process.wait();
        }
    }
}

fn target() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("target/openstack")
}

fn run(folder: &Path, name: &str, port: u16, other: &str) -> Child {
    let program = target().join("venv/bin/python");
    let script = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/key_managers/openstack.py");
    let output = fs::File::create(folder.join(format!("{name}.out"))).unwrap();
    Command::new(&program)
        .arg(script)
        .arg(name)
        .arg(folder)
        .args([&port.to_string(), other])
        .stdout(Stdio::null())
        .stderr(output)
        .spawn()
        .unwrap_or_else(|error| panic!("{}: {error}; run tests/prerequisites", program.display()))
}
