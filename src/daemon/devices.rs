use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::BorrowedFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::fs::FileType;

use crate::guard::{Guard, Shown};
use crate::guest::{
    Domains, LibvirtState, block_device_at, open_block_devices, opens_past, processes, processes_with_open,
};
use crate::refusal::Refusal;
use crate::volume::{DeviceNumber, Identity, Portrait, Sysfs};

/// How long a process may have a device open without being its user.
const GLANCE: Duration = Duration::from_secs(3);

/// How long udev may take to name a new mapping. On a host on which many devices appear at once that is seconds.
const NAMED_WITHIN: Duration = Duration::from_secs(10);
/// Where udev keeps what it knows of devices.
const UDEV_DATA: &str = "/run/udev/data";

/// The block devices of a host.
pub trait Devices: Send + Sync {
    /// What the kernel says of a device.
    ///
    /// # Errors
    /// When it is gone.
    fn identify(&self, device: DeviceNumber) -> Result<Identity, Refusal>;

    /// All that is known of a device, for an operator's eyes.
    ///
    /// # Errors
    /// Those of [`Devices::identify`].
    fn portray(&self, device: DeviceNumber) -> Result<Portrait, Refusal>;

    /// Opens a device for reading, claimed for the time being.
    ///
    /// # Errors
    /// `EBUSY` when something on the host has claimed it, `ENXIO` when its name is another device's.
    fn open_exclusively(&self, identity: &Identity) -> io::Result<File>;

    /// Opens a device for reading, whoever has claimed it.
    ///
    /// # Errors
    /// `ENXIO` when its name is another device's, `ENOMEDIUM` for a drive that is empty.
    fn open_for_reading(&self, identity: &Identity) -> io::Result<File>;

    /// The block devices that process `pid` has open, each as often as it has.
    ///
    /// # Errors
    /// When that cannot be told.
    fn open_by(&self, pid: u32) -> io::Result<Vec<DeviceNumber>>;

    /// The domains whose processes have a block device open: process and name of each.
    fn domains_with_open(&self, device: DeviceNumber) -> Vec<(u32, String)>;

    /// The domains among them that have it open by another node than `node`, which is one of its nodes.
    fn domains_past(&self, device: DeviceNumber, node: BorrowedFd<'_>) -> Vec<(u32, String)>;

    /// Every block device.
    ///
    /// # Errors
    /// When sysfs cannot be read.
    fn all(&self) -> io::Result<Vec<DeviceNumber>>;

    /// Waits until `path` leads to `device`. If it is new since then (microseconds of the monotonic clock), also
    /// until udev has seen that: what it does about an earlier device of the same number and name is done by then.
    ///
    /// # Errors
    /// `TimedOut` when udev takes too long.
    fn await_name(&self, path: &Path, device: DeviceNumber, since: Option<u64>) -> io::Result<()>;

    /// Why guests could open raw devices of protected volumes, if the guard does not keep them from it.
    fn guard_fault(&self) -> Option<String>;

    /// Notes that a device holds no enrolled volume any more.
    fn enrolment_ended(&self);

    /// Who has a device open, or open for writing, in words, if anybody has for longer than a glance.
    fn user(&self, device: DeviceNumber, for_writing: bool) -> Option<String>;
}

/// Those of this host.
pub struct HostDevices {
    sysfs: Sysfs,
    guard: Arc<Guard>,
}

impl HostDevices {
    /// The devices that /sys and /dev show; `guard` hears of each that is identified.
    pub fn new(guard: Arc<Guard>) -> Self {
        HostDevices { sysfs: Sysfs::system(), guard }
    }
}

impl Devices for HostDevices {
    fn identify(&self, device: DeviceNumber) -> Result<Identity, Refusal> {
        self.sysfs.identify(device).inspect(|identity| self.guard.saw(identity))
    }

    fn portray(&self, device: DeviceNumber) -> Result<Portrait, Refusal> {
        self.sysfs.portray(device)
    }

    fn open_exclusively(&self, identity: &Identity) -> io::Result<File> {
        open(identity, libc::O_EXCL)
    }

    fn open_for_reading(&self, identity: &Identity) -> io::Result<File> {
        open(identity, 0)
    }

    fn open_by(&self, pid: u32) -> io::Result<Vec<DeviceNumber>> {
        open_block_devices(pid)
    }

    fn domains_with_open(&self, device: DeviceNumber) -> Vec<(u32, String)> {
        let has_open = |pid: u32| !processes_with_open(&[pid], (FileType::BlockDevice, device), false).is_empty();
        LibvirtState::system().running().into_iter().filter(|(pid, _)| has_open(*pid)).collect()
    }

    fn domains_past(&self, device: DeviceNumber, node: BorrowedFd<'_>) -> Vec<(u32, String)> {
        LibvirtState::system()
            .running()
            .into_iter()
            .filter(|(pid, _)| opens_past(*pid, (FileType::BlockDevice, device), node))
            .collect()
    }

    fn all(&self) -> io::Result<Vec<DeviceNumber>> {
        Shown::here().block_devices()
    }

    fn await_name(&self, path: &Path, device: DeviceNumber, since: Option<u64>) -> io::Result<()> {
        let end = Instant::now() + NAMED_WITHIN;
        let mut pause = Duration::from_millis(1);
        loop {
            if block_device_at(path).is_ok_and(|number| number == device) && udev_has_seen(device, since) {
                return Ok(());
            }
            if Instant::now() > end {
                return Err(io::ErrorKind::TimedOut.into());
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(20));
        }
    }

    fn guard_fault(&self) -> Option<String> {
        self.guard.status().fault
    }

    fn enrolment_ended(&self) {
        self.guard.refresh();
    }

    fn user(&self, device: DeviceNumber, for_writing: bool) -> Option<String> {
        // udev opens a new device for a moment.
        let end = Instant::now() + GLANCE;
        loop {
            let pids = processes().into_iter().filter(|pid| *pid != std::process::id()).collect::<Vec<_>>();
            let block_device = (FileType::BlockDevice, device);
            let user = processes_with_open(&pids, block_device, for_writing).into_iter().next()?;
            if Instant::now() > end {
                return Some(match LibvirtState::system().of(user) {
                    Ok(Some(domain)) => format!("domain {} (pid {user})", domain.name),
                    Ok(None) | Err(_) => format!("process {user}"),
                });
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    }
}

fn open(identity: &Identity, flags: i32) -> io::Result<File> {
    let file = OpenOptions::new().read(true).custom_flags(flags).open(identity.to_string())?;
    match DeviceNumber::from_raw(file.metadata()?.rdev()) == identity.number {
        true => {
            // What the host's cache holds may be older than what another host wrote. What somebody here has changed
            // stays in it.
            rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed)?;
            Ok(file)
        }
        false => Err(io::Error::from_raw_os_error(libc::ENXIO)),
    }
}

/// Whether udev first saw `device` after `since`. Its database has the time in a line `I:…`
/// (sd_device_get_usec_initialized(3)), and the whole entry goes with the device.
fn udev_has_seen(device: DeviceNumber, since: Option<u64>) -> bool {
    let Some(since) = since else { return true };
    match fs::read_to_string(format!("{UDEV_DATA}/b{device}")) {
        Ok(entry) => first_seen(&entry).is_some_and(|seen| seen >= since),
        // Without udev it is somebody else who makes the names.
        Err(_) => !Path::new(UDEV_DATA).exists(),
    }
}

fn first_seen(entry: &str) -> Option<u64> {
    entry.lines().find_map(|line| line.strip_prefix("I:"))?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn udev_says_when_it_first_saw_a_device() {
        let entry = "S:mapper/volcrypt-a\nI:73512345\nE:DM_NAME=volcrypt-a\nE:I:9=x\nG:systemd\nV:1\n";
        assert_eq!(first_seen(entry), Some(73_512_345));
        assert_eq!(first_seen("E:X=I:1\nI:soon\n"), None);
    }
}
