//! The daemon against a simulated host: real seccomp, real database, devices and mappings that are
//! files.

mod attach;
mod audit;
mod broker;
mod by_xml;
mod control;
mod copies;
mod fleet;
mod foreign;
mod hostile;
mod in_use;
mod incoming;
mod lifecycle;
mod long;
mod prepare;
mod rewrite;
mod server;
mod silence;

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rustix::fs::{CWD, FileType, Mode, OFlags};
use tempfile::TempDir;

use super::broker::Broker;
use super::devices::Devices;
use crate::domain::{Disk, Domain, Facts, Given, given};
use crate::encryptor::{Mapping, MappingSpec, Opened, VolumeEncryptor};
use crate::guest::Domains;
use crate::keys::{CheckValue, Key};
use crate::policy::Config;
use crate::refusal::{Reason, Refusal};
use crate::volume::{Details, DeviceNumber, Identity, Portrait, VolumeId};

/// What is written on every simulated mapping.
const ON_THE_MAPPING: &str = "plaintext of the mapping";
/// The size of every simulated volume.
const SIZE: u64 = 4 << 20;

/// The domain that asks.
fn vm() -> Facts {
    Facts { name: "vm".to_owned(), uuid: None, owner: None }
}

/// A domain of an owner.
fn vm_of(owner: &str) -> Facts {
    Facts { owner: Some(owner.to_owned()), ..vm() }
}

/// A simulated host: volumes are files in a folder.
#[derive(Clone)]
struct World {
    folder: Arc<TempDir>,
    devices: Arc<Mutex<HashMap<DeviceNumber, Identity>>>,
    opened: Arc<Mutex<Vec<String>>>,
    delay: Duration,
    mapped: bool,
    in_use: bool,
    /// Why the guard is off.
    guard_fault: Option<&'static str>,
    /// Which domain every process is.
    domain: Option<Facts>,
    /// The block devices that every process has open.
    open: Arc<Mutex<Vec<DeviceNumber>>>,
    /// Those among them that are closed once they were looked for.
    closing: Arc<Mutex<Vec<DeviceNumber>>>,
    /// The live XML of every domain.
    given: Arc<Mutex<String>>,
    /// The domains that have every mapping open.
    users: Arc<Mutex<Vec<String>>>,
    /// Whether they have them open by nodes of their own.
    by_xml: bool,
    /// How often it was asked who has.
    asked: Arc<AtomicUsize>,
    /// How often an enrolment has ended.
    ended: Arc<AtomicUsize>,
    /// The key with which every mapping reads as the file `decrypted`, where not all read as the file `mapping`.
    readable: Arc<Mutex<Option<CheckValue>>>,
    /// Whether every mapping is there already, made with nobody knows which key.
    reuses_mappings: bool,
    /// Whether somebody has claimed every device.
    is_claimed: bool,
}

impl World {
    fn new() -> Self {
        let folder = Arc::new(tempfile::tempdir().unwrap());
        std::fs::write(folder.path().join("mapping"), ON_THE_MAPPING).unwrap();
        World {
            folder,
            devices: Arc::default(),
            opened: Arc::default(),
            delay: Duration::ZERO,
            mapped: false,
            in_use: false,
            guard_fault: None,
            domain: Some(vm()),
            open: Arc::default(),
            closing: Arc::default(),
            given: Arc::new(Mutex::new("<domain/>".to_owned())),
            users: Arc::default(),
            by_xml: false,
            asked: Arc::default(),
            ended: Arc::default(),
            readable: Arc::default(),
            reuses_mappings: false,
            is_claimed: false,
        }
    }

    /// Adds LUN 1 of the target of volume `id` as device `minor`, blank.
    fn add_volume(&self, id: &str, minor: u32) -> DeviceNumber {
        let number = DeviceNumber { major: 250, minor };
        let mut identity = Identity::of_iscsi_unit(&format!("iqn.2026-11.org.lab:volume-{id}"), 1);
        identity.number = number;
        identity.name = format!("sd{minor}");
        identity.size = SIZE;
        identity.wwid = Some(format!("naa.{minor}"));
        File::create(self.folder.path().join(&identity.name)).unwrap().set_len(SIZE).unwrap();
        self.devices.lock().unwrap().insert(number, identity);
        number
    }

    /// Adds the mapping of volume `id` over `backing`.
    fn add_mapping(&self, id: &str, backing: DeviceNumber, minor: u32) -> DeviceNumber {
        let number = self.add_volume("none", minor);
        let below = self.identify(backing).unwrap();
        self.change(number, |identity| {
            let (name, uuid) = (format!("volcrypt-{id}"), format!("VOLCRYPT-PLAIN-{id}"));
            identity.mapping = Some(crate::volume::Mapping { name, uuid });
            (identity.iscsi, identity.lun, identity.wwid) = (None, None, None);
            identity.underlying = vec![below];
        });
        number
    }

    fn change(&self, number: DeviceNumber, change: impl FnOnce(&mut Identity)) {
        change(self.devices.lock().unwrap().get_mut(&number).unwrap());
    }

    fn write(&self, number: DeviceNumber, data: &[u8]) {
        let name = self.devices.lock().unwrap()[&number].name.clone();
        OpenOptions::new().write(true).open(self.folder.path().join(name)).unwrap().write_all(data).unwrap();
    }

    fn broker(&self, create_keys: bool) -> Broker {
        self.broker_saying(create_keys, "")
    }

    /// A broker whose configuration has `more` in it.
    fn broker_saying(&self, create_keys: bool, more: &str) -> Broker {
        let state = self.folder.path().join("state");
        let text = format!(
            "{more}[key_manager]\ndirectory = {state:?}\n[[rules]]\nname = \"lab\"\n\
             iscsi_target = 'iqn\\.2026-11\\.org\\.lab:volume-(?<id>.*)'\nlun = 1\ncreate_keys = {create_keys}\n"
        );
        self.broker_with(&text)
    }

    fn broker_with(&self, config: &str) -> Broker {
        let state = self.folder.path().join("state");
        if !state.exists() {
            let mut builder = std::fs::DirBuilder::new();
            std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
            builder.create(&state).unwrap();
        }
        let config = Config::parse(config, "volcrypt.toml");
        Broker::new(config, Box::new(self.clone()), Box::new(self.clone()), Box::new(self.clone()))
    }

    /// The backing devices of the mappings that were made, in order.
    fn opened(&self) -> Vec<String> {
        self.opened.lock().unwrap().clone()
    }

    /// Opens what is a mapping here.
    fn open_file(&self, name: &str, flags: OFlags) -> Opened {
        let descriptor = rustix::fs::open(self.folder.path().join(name), flags, Mode::empty()).unwrap();
        Opened { descriptor, was_open: !self.users.lock().unwrap().is_empty() }
    }

    fn path(&self) -> &Path {
        self.folder.path()
    }
}

impl Devices for World {
    fn identify(&self, device: DeviceNumber) -> Result<Identity, Refusal> {
        let gone = || Refusal::new(Reason::DeviceGone, format!("device {device} is gone"));
        self.devices.lock().unwrap().get(&device).cloned().ok_or_else(gone)
    }

    fn portray(&self, device: DeviceNumber) -> Result<Portrait, Refusal> {
        let identity = self.identify(device)?;
        Ok(Portrait { identity, details: Details::default(), beneath: Vec::new() })
    }

    fn open_exclusively(&self, identity: &Identity) -> io::Result<File> {
        match self.is_claimed {
            true => Err(io::Error::from_raw_os_error(libc::EBUSY)),
            false => self.open_for_reading(identity),
        }
    }

    fn open_for_reading(&self, identity: &Identity) -> io::Result<File> {
        File::open(self.folder.path().join(&identity.name))
    }

    fn open_by(&self, _pid: u32) -> io::Result<Vec<DeviceNumber>> {
        let mut open = self.open.lock().unwrap().clone();
        open.append(&mut self.closing.lock().unwrap());
        Ok(open)
    }

    fn domains_with_open(&self, _device: DeviceNumber) -> Vec<(u32, String)> {
        (0..).zip(self.users.lock().unwrap().clone()).collect()
    }

    fn domains_past(&self, device: DeviceNumber, _node: BorrowedFd<'_>) -> Vec<(u32, String)> {
        self.asked.fetch_add(1, Ordering::Relaxed);
        if self.by_xml { self.domains_with_open(device) } else { Vec::new() }
    }

    fn all(&self) -> io::Result<Vec<DeviceNumber>> {
        let mut all: Vec<_> = self.devices.lock().unwrap().keys().copied().collect();
        all.sort();
        Ok(all)
    }

    fn await_name(&self, _path: &Path, _device: DeviceNumber, _since: Option<u64>) -> io::Result<()> {
        Ok(())
    }

    fn guard_fault(&self) -> Option<String> {
        self.guard_fault.map(str::to_owned)
    }

    fn enrolment_ended(&self) {
        self.ended.fetch_add(1, Ordering::Relaxed);
    }

    fn user(&self, _device: DeviceNumber, _for_writing: bool) -> Option<String> {
        self.in_use.then(|| "process 1".to_owned())
    }
}

impl Domains for World {
    fn of(&self, _pid: u32) -> io::Result<Option<Facts>> {
        Ok(self.domain.clone())
    }

    fn given(&self, _pid: u32) -> io::Result<Vec<Given>> {
        Ok(given(&self.given.lock().unwrap()))
    }

    fn disks(&self, _pid: u32) -> io::Result<Vec<Disk>> {
        Ok(Domain::parse(&self.given.lock().unwrap()).unwrap().disks)
    }
}

impl VolumeEncryptor for World {
    fn open(
        &self,
        wanted: &MappingSpec<'_>,
        flags: OFlags,
        key: &dyn Fn() -> Result<Key, Refusal>,
    ) -> Result<Opened, Refusal> {
        std::thread::sleep(self.delay);
        let mut name = "mapping";
        if !self.reuses_mappings {
            let key = key()?;
            assert_eq!(key.bits(), wanted.record.key_size.bits() as usize);
            if let Some(readable) = *self.readable.lock().unwrap() {
                assert!(wanted.read_only || flags.contains(OFlags::RDWR), "what is looked at could be written to");
                name = if key.check_value(&wanted.record.id) == readable { "decrypted" } else { "noise" };
            }
        }
        self.opened.lock().unwrap().push(wanted.device.to_string());
        Ok(self.open_file(name, flags))
    }

    fn open_present(&self, volume: &VolumeId, device: DeviceNumber, flags: OFlags) -> Result<Opened, Refusal> {
        self.opened.lock().unwrap().push(format!("{volume} at {device}"));
        Ok(self.open_file("mapping", flags))
    }

    fn mappings(&self) -> Result<Vec<Mapping>, Refusal> {
        let mapping = |device: &Identity| Mapping {
            volume: device.iscsi.as_ref().unwrap().target.rsplit_once('-').unwrap().1.parse().unwrap(),
            name: format!("volcrypt-{}", device.name),
            device: DeviceNumber { major: 253, minor: device.number.minor },
            backing: Some(device.number),
            format: "plain".to_owned(),
            cipher: "aes-xts-plain64".to_owned(),
            open_count: 1,
            deferred_removal: true,
        };
        let devices = self.devices.lock().unwrap();
        Ok(devices.values().filter(|_| self.mapped).map(mapping).collect())
    }

    fn sweep(&self) -> Result<Vec<String>, Refusal> {
        Ok(Vec::new())
    }
}

/// The node of a device in the real /dev, gone with the test.
struct Node(PathBuf);

impl Node {
    fn new(folder: &str, device: DeviceNumber) -> Self {
        static NODES: AtomicU32 = AtomicU32::new(0);
        let number = NODES.fetch_add(1, Ordering::Relaxed);
        let path = PathBuf::from(format!("{folder}/volcrypt-test-{}-{number}", std::process::id()));
        let raw = rustix::fs::makedev(device.major, device.minor);
        rustix::fs::mknodat(CWD, &path, FileType::BlockDevice, Mode::RUSR | Mode::WUSR, raw)
            .expect("run the tests as root");
        Node(path)
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}
