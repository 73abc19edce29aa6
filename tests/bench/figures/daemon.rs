//! A volcryptd to measure against, and what stands in for its service manager.

use std::fs;
use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use rustix::net::{RecvAncillaryBuffer, RecvFlags, recvmsg};
use tempfile::TempDir;
use volcrypt::policy::DEFAULT_PATH;
use volcrypt::protocol::RUNTIME_DIRECTORY;

use crate::Outcome;

/// What a hypervisor of an OpenStack cloud would have. It protects nothing of this host.
const CONFIGURATION: &str = r#"
[[rules]]
name = "cinder"
iscsi_target = 'iqn\.2010-10\.org\.openstack:volume-(?<id>[0-9a-f-]{36})'
create_keys = true

[[rules]]
name = "array"
iscsi_target = 'iqn\.2026-11\.org\.example:array(?<array>[0-9]+)\.(?<pool>[a-z0-9-]+)'
volume_id = "array${array}-${pool}-${lun}"
profile = "large-sectors"

[[rules]]
name = "multipath"
wwid = 'naa\.(?<id>6001405[0-9a-f]{25})'

[profiles.large-sectors]
sector_size = 4096

[policy]
export_keys = true
"#;

/// The database's folder in the daemon's own.
const STORE: &str = "store";
const START_DEADLINE: Duration = Duration::from_secs(20);

/// A running daemon, with an empty database, in a folder that goes with it.
pub struct Daemon {
    process: Child,
    folder: TempDir,
}

impl Daemon {
    /// Starts one, with the configuration at its usual place, where the hook reads it too.
    pub fn start() -> Outcome<Self> {
        Daemon::start_saying("", "")
    }

    /// The same with `key_manager` in that section of the configuration and `more` behind it.
    pub fn start_saying(key_manager: &str, more: &str) -> Outcome<Self> {
        let folder = tempfile::tempdir_in("/run")?;
        let store = folder.path().join(STORE);
        fs::create_dir(&store)?;
        fs::write(DEFAULT_PATH, format!("[key_manager]\ndirectory = {store:?}\n{key_manager}{CONFIGURATION}{more}"))?;
        let _ = fs::remove_dir_all(RUNTIME_DIRECTORY);

        let socket = folder.path().join("notify");
        let ready = serve_notifications(UnixDatagram::bind(&socket)?)?;
        let log = folder.path().join("log");
        let process = Command::new(env!("CARGO_BIN_EXE_volcryptd"))
            .env("NOTIFY_SOCKET", &socket)
            .env_remove("JOURNAL_STREAM")
            .stdin(Stdio::null())
            .stderr(fs::File::create(&log)?)
            .spawn()?;
        let daemon = Daemon { process, folder };
        match ready.recv_timeout(START_DEADLINE) {
            Ok(()) => Ok(daemon),
            Err(_) => Err(format!("volcryptd does not start: {}", fs::read_to_string(log)?).into()),
        }
    }

    /// A folder for files of the measurement.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Where its database is.
    pub fn store(&self) -> PathBuf {
        self.folder.path().join(STORE)
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.process.id()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Takes what a daemon tells its service manager, and says when it is ready. Descriptors that come
/// along are closed, which is also the answer to a barrier.
fn serve_notifications(socket: UnixDatagram) -> Outcome<mpsc::Receiver<()>> {
    let (ready, is_ready) = mpsc::channel();
    std::thread::Builder::new().name("manager".to_owned()).spawn(move || {
        let mut buffer = [0; 4096];
        loop {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
            let mut descriptors = RecvAncillaryBuffer::new(&mut space);
            let mut parts = [IoSliceMut::new(&mut buffer)];
            let Ok(received) = recvmsg(&socket, &mut parts, &mut descriptors, RecvFlags::CMSG_CLOEXEC) else { return };
            if buffer[..received.bytes].starts_with(b"READY=1") {
                let _ = ready.send(());
            }
        }
    })?;
    Ok(is_ready)
}
