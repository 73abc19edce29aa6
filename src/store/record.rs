use serde::{Deserialize, Serialize};

use crate::keys::CheckValue;
use crate::policy::{KeySize, Provider};
use crate::volume::VolumeId;

/// What is written down of a volume when it is enrolled. Everything that decides what stands on the
/// device is pinned here, so that no later change of a rule or a default can garble the data.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeRecord {
    /// The volume's id.
    pub id: VolumeId,
    /// The device it was enrolled on.
    pub device: EnrolledDevice,
    /// The size of the device in bytes.
    pub size_bytes: u64,
    /// The name of the profile it was enrolled with.
    pub profile: String,
    /// The on-disk format.
    pub provider: Provider,
    /// The cipher in dm-crypt's notation.
    pub cipher: String,
    /// The size of the volume key.
    pub key_size: KeySize,
    /// The unit of encryption in bytes.
    pub sector_size: u32,
    /// Tells the right key from a wrong one.
    pub check_value: CheckValue,
    /// When it was enrolled, in seconds since 1970-01-01 UTC.
    pub enrolled_at: i64,
}

/// By what the device of a volume is known again. A field that the kernel did not report when the
/// volume was enrolled is `None` and not compared.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct EnrolledDevice {
    /// The name of the iSCSI target.
    pub iscsi_target: Option<String>,
    /// The logical unit number within the target.
    pub lun: Option<u64>,
    /// The world-wide identifier of the logical unit, as in sysfs.
    pub wwid: Option<String>,
}
