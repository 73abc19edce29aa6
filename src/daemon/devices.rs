use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::guard::Guard;
use crate::guest::{Domains, LibvirtState, open_block_devices, processes, processes_with_open};
use crate::refusal::Refusal;
use crate::volume::{DeviceNumber, Identity, Portrait, Sysfs};

/// How long a process may have a device open without being its user.
const GLANCE: Duration = Duration::from_secs(3);

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

    /// The block devices that process `pid` has open, each as often as it has.
    fn open_by(&self, pid: u32) -> Vec<DeviceNumber>;

    /// Who has a device open, in words, if anybody has for longer than a glance.
    fn user(&self, device: DeviceNumber) -> Option<String>;
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
        let file = OpenOptions::new().read(true).custom_flags(libc::O_EXCL).open(identity.to_string())?;
        match DeviceNumber::from_raw(file.metadata()?.rdev()) == identity.number {
            true => {
                // What the host's cache holds may be older than what another host wrote. It only can
                // be dropped as long as nobody changes it here, and that was made sure of.
                rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed)?;
                Ok(file)
            }
            false => Err(io::Error::from_raw_os_error(libc::ENXIO)),
        }
    }

    fn open_by(&self, pid: u32) -> Vec<DeviceNumber> {
        open_block_devices(pid).collect()
    }

    fn user(&self, device: DeviceNumber) -> Option<String> {
        // udev opens a new device for a moment.
        let end = Instant::now() + GLANCE;
        loop {
            let pids = processes().into_iter().filter(|pid| *pid != std::process::id()).collect::<Vec<_>>();
            let user = processes_with_open(&pids, device).into_iter().next()?;
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
