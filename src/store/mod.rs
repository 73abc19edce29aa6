//! The database of enrolled volumes and wrapped keys.

mod record;

pub use record::{EnrolledDevice, VolumeRecord};
