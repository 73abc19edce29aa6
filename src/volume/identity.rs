use std::fmt;

use serde::Serialize;

use super::DeviceNumber;

/// What the kernel says of a block device, read from sysfs at one moment.
///
/// Names come from outside (a storage server picks target names and WWIDs), so they may hold
/// anything. Bytes that are not UTF-8 stand in them as `\xNN`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Identity {
    /// The device's number.
    pub number: DeviceNumber,
    /// The kernel's name: `sda`, `dm-0`, `cciss!c0d0`.
    pub name: String,
    /// The size in bytes.
    pub size: u64,
    /// Whether the kernel refuses writes.
    pub read_only: bool,
    /// The kernel's serial number of the disk (`diskseq`, Linux 5.15): unlike `number` it is never
    /// used again. Partitions have none.
    pub sequence: Option<u64>,
    /// The number of the partition, if this is one; its disk is in `underlying`.
    pub partition: Option<u64>,
    /// The iSCSI session that brings the device. A partition has none of its own.
    pub iscsi: Option<Iscsi>,
    /// The logical unit number, for SCSI disks.
    pub lun: Option<u64>,
    /// The world-wide id, as the storage server reports it: `naa.6001405…`, `t10.LIO-ORG …`.
    pub wwid: Option<String>,
    /// What device-mapper says, if this is one of its devices.
    pub mapping: Option<Mapping>,
    /// What the device is made of: a partition's disk, or every device below an md or dm device.
    pub underlying: Vec<Identity>,
}

/// An iSCSI session, seen from the initiator.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Iscsi {
    /// The target's name, which the initiator logged in to: `iqn.2010-10.org.openstack:volume-…`.
    pub target: String,
    /// The portal that was logged in to, `address:port`, if the kernel tells.
    pub portal: Option<String>,
}

/// A device-mapper device's two names.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Mapping {
    /// The name under `/dev/mapper`.
    pub name: String,
    /// The UUID; its prefix tells whose device it is (`mpath-`, `LVM-`, `VOLCRYPT-`). May be empty.
    pub uuid: String,
}

impl Identity {
    /// Whether this is a mapping that volcrypt made: its dm UUID starts with `VOLCRYPT-`.
    pub fn is_own_mapping(&self) -> bool {
        self.mapping.as_ref().is_some_and(|mapping| mapping.uuid.starts_with("VOLCRYPT-"))
    }
}

/// The name for an operator's eyes: `/dev/sda`, or `/dev/mapper/mpatha` for a dm device. It is
/// always one printable line.
impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.mapping {
            Some(mapping) => write!(f, "/dev/mapper/{}", mapping.name.escape_debug()),
            // The kernel writes '!' in sysfs for a '/' in the device's name.
            None => write!(f, "/dev/{}", self.name.replace('!', "/").escape_debug()),
        }
    }
}
