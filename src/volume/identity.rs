use std::fmt;

use serde::{Deserialize, Serialize};

use super::{DeviceNumber, VolumeId};

/// What the kernel says of a block device, read from sysfs at one moment.
///
/// Names come from outside (a storage server picks target names and WWIDs), so they may hold
/// anything. Bytes that are not UTF-8 stand in them as `\xNN`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
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
    /// The iSCSI session that brings the device. A partition has none of its own; a multipath map has
    /// what its paths have in common.
    pub iscsi: Option<Iscsi>,
    /// The logical unit number, for SCSI disks; for a multipath map, if its paths agree.
    pub lun: Option<u64>,
    /// The world-wide id, as the storage server reports it: `naa.6001405…`, `t10.LIO-ORG …`. All paths of a
    /// multipath map have the same.
    pub wwid: Option<String>,
    /// What device-mapper says, if this is one of its devices.
    pub mapping: Option<Mapping>,
    /// The multipath map that this disk is a path of.
    pub path_of: Option<Mapping>,
    /// What the device is made of: a partition's disk, or every device below an md or dm device.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub underlying: Vec<Identity>,
}

/// An iSCSI session, seen from the initiator.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Iscsi {
    /// The target's name, which the initiator logged in to: `iqn.2010-10.org.openstack:volume-…`.
    pub target: String,
    /// The portal that was logged in to, `address:port`, if the kernel tells.
    pub portal: Option<String>,
}

/// A device-mapper device's two names.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mapping {
    /// The name under `/dev/mapper`.
    pub name: String,
    /// The UUID; its prefix tells whose device it is (`mpath-`, `LVM-`, `VOLCRYPT-`). May be empty.
    pub uuid: String,
}

impl Mapping {
    /// What the dm UUID of every multipath map starts with.
    pub const MULTIPATH_PREFIX: &str = "mpath-";

    /// Whether multipathd or multipath(8) made it.
    pub fn is_multipath(&self) -> bool {
        self.uuid.starts_with(Self::MULTIPATH_PREFIX)
    }
}

/// What the dm UUID of every mapping that volcrypt makes starts with.
pub const OWN_UUID_PREFIX: &str = "VOLCRYPT-";

/// Format and volume of a mapping that volcrypt made, from its dm UUID: `VOLCRYPT-<format>-<volume id>`.
pub fn parse_own_uuid(uuid: &str) -> Option<(&str, VolumeId)> {
    let (format, id) = uuid.strip_prefix(OWN_UUID_PREFIX)?.split_once('-')?;
    Some((format, id.parse().ok()?))
}

/// The path of its node, as one printable line.
impl fmt::Display for Mapping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "/dev/mapper/{}", self.name.escape_debug())
    }
}

impl Identity {
    /// A logical unit that is no device of this host, known by its address only.
    pub fn of_iscsi_unit(target: &str, lun: u64) -> Self {
        Identity {
            number: DeviceNumber { major: 0, minor: 0 },
            name: format!("LUN {lun} of {target}"),
            size: 0,
            read_only: false,
            sequence: None,
            partition: None,
            iscsi: Some(Iscsi { target: target.to_owned(), portal: None }),
            lun: Some(lun),
            wwid: None,
            mapping: None,
            path_of: None,
            underlying: Vec::new(),
        }
    }

    /// Whether this is a device, and no logical unit that is known by its address only.
    pub fn is_on_this_host(&self) -> bool {
        self.number.major != 0
    }

    /// Whether this is a multipath map: a volume by itself, and what is beneath are ways to it.
    pub fn is_multipath(&self) -> bool {
        self.mapping.as_ref().is_some_and(Mapping::is_multipath)
    }

    /// What an operator can do about a WWID that the kernel has not learned: have it ask each disk again.
    pub fn remedy_for_no_wwid(&self) -> String {
        let disks = if self.is_multipath() { self.underlying.as_slice() } else { std::slice::from_ref(self) };
        let rescan = |disk: &Identity| format!("'echo 1 >/sys/block/{}/device/rescan'", disk.name.escape_debug());
        match self.is_on_this_host() {
            true => {
                format!("run {} or log in to its target again", disks.iter().map(rescan).collect::<Vec<_>>().join(", "))
            }
            false => "log in to its target on the host".to_owned(),
        }
    }

    /// The device as it is known at one address of the storage network: the path of a multipath map
    /// that leads there, if there is one, or else the device itself.
    pub fn at_address(&self, target: Option<&str>, lun: Option<u64>) -> &Identity {
        let leads_there = |path: &&Identity| path.iscsi_target() == target && path.lun == lun;
        let paths = if self.is_multipath() { self.underlying.as_slice() } else { &[] };
        paths.iter().find(leads_there).unwrap_or(self)
    }

    /// The name of the iSCSI target that brings the device.
    pub fn iscsi_target(&self) -> Option<&str> {
        self.iscsi.as_ref().map(|iscsi| iscsi.target.as_str())
    }

    /// Whether the device has a WWID and does not tell it: every logical unit of iSCSI has one, and the kernel
    /// knows none where VPD page 0x83 could not be read when the disk appeared.
    pub fn hides_wwid(&self) -> bool {
        self.iscsi.is_some() && self.wwid.is_none()
    }

    /// The volume that this device is, if it is a mapping that volcrypt made.
    pub fn own_volume(&self) -> Option<VolumeId> {
        parse_own_uuid(&self.mapping.as_ref()?.uuid).map(|(_, volume)| volume)
    }

    /// Every mapping that volcrypt made, of this device and those that it stands on, with its volume.
    pub fn own_mappings(&self) -> Vec<(VolumeId, &Identity)> {
        let itself = self.own_volume().map(|volume| (volume, self));
        itself.into_iter().chain(self.underlying.iter().flat_map(Identity::own_mappings)).collect()
    }
}

/// The name for an operator's eyes: `/dev/sda`, or `/dev/mapper/mpatha` for a dm device. It is
/// always one printable line.
impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.mapping {
            Some(mapping) => mapping.fmt(f),
            // The kernel writes '!' in sysfs for a '/' in the device's name.
            None => write!(f, "/dev/{}", self.name.replace('!', "/").escape_debug()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uuid_names_format_and_volume() {
        let (format, id) = parse_own_uuid("VOLCRYPT-PLAIN-0b1f7c1e-1111").unwrap();
        assert_eq!((format, id.as_str()), ("PLAIN", "0b1f7c1e-1111"));
        for foreign in ["", "LVM-x", "VOLCRYPT-", "VOLCRYPT-PLAIN", "VOLCRYPT-PLAIN-", "VOLCRYPT-PLAIN-../x"] {
            assert!(parse_own_uuid(foreign).is_none(), "{foreign}");
        }
    }
}
