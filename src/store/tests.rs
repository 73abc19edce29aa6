use std::collections::BTreeMap;
use std::fs::{self, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::process::Command;

use tempfile::TempDir;

use super::*;
use crate::keys::KeyHandle;
use crate::policy::Provider;

mod audit;
mod opening;
mod records;

impl Store {
    /// Opens the database as if its file system were read-only.
    pub(crate) fn open_for_reading(directory: &Path) -> Result<Self, Refusal> {
        let path = files::prepare(directory)?;
        let identity = files::identity(&path)?;
        Ok(Store::with(connect_for_reading(&path, schema::MIGRATIONS)?, path, identity))
    }

    /// Keeps what is written from now on in the write-ahead log, as long as the reader lives that is
    /// returned.
    pub(crate) fn keep_log(&self) -> Connection {
        self.connection().busy_timeout(Duration::ZERO).unwrap();
        let reader = Connection::open(&self.path).unwrap();
        reader.execute_batch("BEGIN; SELECT * FROM volumes").unwrap();
        reader
    }

    /// Lets the database grow by no page more, as on a full disk; `false` lifts it.
    pub(crate) fn fill_disk(&self, full: bool) {
        let limit = match full {
            true => "1",
            false => "1000000",
        };
        // SQLite raises the limit to the pages that are there.
        self.connection().execute_batch(&format!("PRAGMA max_page_count = {limit}")).unwrap();
    }
}

/// An empty directory that nobody else can enter, as the database wants it.
pub(crate) fn private_directory() -> TempDir {
    tempfile::Builder::new().permissions(Permissions::from_mode(0o700)).tempdir().unwrap()
}

/// A small file system of its own for the database, which can be full in earnest.
pub(crate) struct SmallDisk(PathBuf);

impl SmallDisk {
    /// Mounts it on the directory `path`, with the mode that the database wants.
    pub(crate) fn new(path: &Path) -> Self {
        let mounted =
            Command::new("mount").args(["-t", "tmpfs", "-o", "size=2m,mode=0700", "tmpfs"]).arg(path).status();
        assert!(mounted.is_ok_and(|status| status.success()), "run the tests as root");
        SmallDisk(path.to_owned())
    }

    /// Leaves no byte of it free.
    pub(crate) fn fill(&self) {
        let mut file = fs::File::create(self.0.join("filler")).unwrap();
        while std::io::Write::write_all(&mut file, &[0; 4096]).is_ok() {}
    }

    /// Takes that back.
    pub(crate) fn free(&self) {
        fs::remove_file(self.0.join("filler")).unwrap();
    }

    /// Waits until nobody has the database open any more: the last who closes it removes the log.
    pub(crate) fn wait_until_closed(&self) {
        let end = Instant::now() + Duration::from_secs(30);
        while self.0.join("volcrypt.db-wal").exists() {
            assert!(Instant::now() < end, "the database is still open");
            thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(&self.0).status();
    }
}

/// Every file of `directory` with its content.
fn contents(directory: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap());
    entries.map(|entry| (entry.file_name().into_string().unwrap(), fs::read(entry.path()).unwrap())).collect()
}

/// A directory with a copy of the database and its log as they are now: what a power cut leaves.
fn after_power_cut(directory: &Path) -> TempDir {
    let copy = private_directory();
    for name in ["volcrypt.db", "volcrypt.db-wal"] {
        fs::copy(directory.join(name), copy.path().join(name)).unwrap();
    }
    copy
}

fn record(name: &str) -> VolumeRecord {
    VolumeRecord {
        id: name.parse().unwrap(),
        device: EnrolledDevice {
            iscsi_target: Some(format!("iqn.2026-11.org.lab:{name}")),
            lun: Some(1),
            wwid: Some(format!("naa.{name}")),
            dm_uuid: None,
        },
        size_bytes: 1 << 30,
        profile: "default".to_owned(),
        provider: Provider::Plain,
        cipher: "aes-xts-plain64".to_owned(),
        key_size: 512.try_into().unwrap(),
        sector_size: 4096,
        key: KeyHandle::first(&name.parse().unwrap()),
        check_value: "00112233445566778899aabbccddeeff".to_owned().try_into().unwrap(),
        enrolled_at: 1_790_000_000,
        state: VolumeState::Enrolled,
        owner: None,
    }
}

fn names(store: &Store) -> Vec<String> {
    store.volumes().unwrap().into_iter().map(|record| record.id.into()).collect()
}

fn refused<T>(result: Result<T, Refusal>) -> String {
    let refusal = result.err().expect("must be refused");
    assert_eq!(refusal.reason(), Reason::StoreUnavailable);
    refusal.to_string()
}
