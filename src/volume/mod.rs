//! What a volume is called, how the kernel identifies the device that holds it, and whether
//! anything stands on it.

mod blank;
mod details;
mod device;
mod id;
mod identity;
mod recognise;
mod sysfs;
pub mod vpd;

pub use blank::{Content, examine, looks_encrypted};
pub use details::{Details, LogicalVolume, Portrait};
pub use device::DeviceNumber;
pub(crate) use id::is_id;
pub use id::{InvalidVolumeId, MAPPING_PREFIX, VolumeId};
pub use identity::{Identity, Iscsi, Mapping, OWN_UUID_PREFIX, parse_own_uuid};
pub use recognise::recognise;
pub use sysfs::Sysfs;
