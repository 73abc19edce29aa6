//! Tells an operator what a device is to volcrypt.

use std::os::fd::AsFd;

use rustix::fs::FileType;

use super::broker::Broker;
use crate::domain::Nobody;
use crate::protocol::Identification;
use crate::refusal::{Reason, Refusal};
use crate::volume::DeviceNumber;

/// Looks at what `place` is open on; a handle without any right to it (`O_PATH`) is enough.
///
/// # Errors
/// When that is neither a block device nor a file, and when what the kernel says of the device makes it none
/// that any guest may have.
pub fn identify(broker: &Broker, place: impl AsFd) -> Result<Identification, Refusal> {
    let status = rustix::fs::fstat(place)
        .map_err(|error| Refusal::new(Reason::DeviceGone, format!("the device cannot be looked at: {error}")))?;
    match FileType::from_raw_mode(status.st_mode) {
        FileType::BlockDevice => {
            let device = broker.portray(DeviceNumber::from_raw(status.st_rdev))?;
            let (policy, configuration_error) = match broker.config() {
                Ok(config) => (Some(config.trace(&device.judged(), &Nobody)), None),
                Err(refusal) => (None, Some(refusal.to_string())),
            };
            Ok(Identification::Device { device: Box::new(device), policy, configuration_error })
        }
        FileType::RegularFile => Ok(Identification::File {
            device: DeviceNumber::from_raw(status.st_dev),
            inode: status.st_ino,
            size: status.st_size.unsigned_abs(),
        }),
        _ => Err(Refusal::new(
            Reason::DeviceGone,
            "there is neither a block device nor an image file: give the device of a volume, for example /dev/sda",
        )),
    }
}
