//! What a volume is called, and how the kernel identifies the device that holds it.

mod device;
mod id;

pub use device::DeviceNumber;
pub use id::{InvalidVolumeId, VolumeId};
