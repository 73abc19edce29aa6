use serde::{Deserialize, Serialize};

use crate::policy::Trace;
use crate::volume::{DeviceNumber, Portrait};

/// What is at a path, as far as volcrypt goes.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Identification {
    /// A block device.
    Device {
        /// What the kernel says of it.
        device: Box<Portrait>,
        /// What the rules say of it; nothing if the configuration cannot be used.
        policy: Option<Trace>,
        /// Why the configuration cannot be used, if so.
        configuration_error: Option<String>,
    },
    /// An image file, which no rule protects.
    File {
        /// The device of the file system it is on.
        device: DeviceNumber,
        /// Its inode number there.
        inode: u64,
        /// Its size in bytes.
        size: u64,
    },
}
