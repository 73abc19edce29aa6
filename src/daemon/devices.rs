use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};

use crate::refusal::Refusal;
use crate::volume::{DeviceNumber, Identity, Sysfs};

/// The block devices of a host.
pub trait Devices: Send + Sync {
    /// What the kernel says of a device.
    ///
    /// # Errors
    /// When it is gone.
    fn identify(&self, device: DeviceNumber) -> Result<Identity, Refusal>;

    /// Opens a device for reading, claimed for the time being.
    ///
    /// # Errors
    /// `EBUSY` when something on the host has claimed it, `ENXIO` when its name is another device's.
    fn open_exclusively(&self, identity: &Identity) -> io::Result<File>;
}

/// Those of this host.
pub struct HostDevices {
    sysfs: Sysfs,
}

impl HostDevices {
    /// The devices that /sys and /dev show.
    pub fn new() -> Self {
        HostDevices { sysfs: Sysfs::system() }
    }
}

impl Default for HostDevices {
    fn default() -> Self {
        Self::new()
    }
}

impl Devices for HostDevices {
    fn identify(&self, device: DeviceNumber) -> Result<Identity, Refusal> {
        self.sysfs.identify(device)
    }

    fn open_exclusively(&self, identity: &Identity) -> io::Result<File> {
        let file = OpenOptions::new().read(true).custom_flags(libc::O_EXCL).open(identity.to_string())?;
        match DeviceNumber::from_raw(file.metadata()?.rdev()) == identity.number {
            true => Ok(file),
            false => Err(io::Error::from_raw_os_error(libc::ENXIO)),
        }
    }
}
