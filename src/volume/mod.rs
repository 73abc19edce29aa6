//! What a volume is called, and how the kernel identifies the device that holds it.

mod device;
mod id;
mod identity;
mod sysfs;

pub use device::DeviceNumber;
pub use id::{InvalidVolumeId, VolumeId};
pub use identity::{Identity, Iscsi, Mapping};
pub use sysfs::Sysfs;
