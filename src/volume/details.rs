use serde::{Deserialize, Serialize};

use super::Identity;
use super::vpd::Designator;

/// A device with everything that is known of it, and of what it stands on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Portrait {
    /// What rules and records go by; what is beneath is in `beneath` instead.
    #[serde(flatten)]
    pub identity: Identity,
    /// What else there is.
    #[serde(flatten)]
    pub details: Details,
    /// The devices right beneath: the paths of a multipath map, a partition's disk.
    pub beneath: Vec<Portrait>,
}

/// What identifies a device and is not needed to open it. All of it is the storage server's word.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Details {
    /// The serial number: of VPD page 0x80, of the NVMe subsystem, or of a virtio disk.
    pub serial: Option<String>,
    /// The designators of VPD page 0x83.
    pub designators: Vec<Designator>,
    /// The number of the NVMe namespace.
    pub namespace: Option<u64>,
    /// The NVMe namespace's globally unique identifier, as the kernel writes it.
    pub nguid: Option<String>,
    /// The NVMe namespace's IEEE extended unique identifier, as the kernel writes it.
    pub eui64: Option<String>,
    /// The NVMe namespace's UUID.
    pub uuid: Option<String>,
    /// The logical volume that this device is.
    pub lvm: Option<LogicalVolume>,
    /// What could not be read because it is malformed, a sentence each.
    pub faults: Vec<String>,
}

/// A logical volume of LVM, in the notation of `lvs` and `vgs`: `PoT12r-58C0-vvZc-GPnm-XIdb-88BF-0xS9du`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogicalVolume {
    /// The volume group's UUID.
    pub group_uuid: String,
    /// The volume's own UUID.
    pub volume_uuid: String,
}

impl Portrait {
    /// The identity with what is beneath, as rules judge it.
    pub fn judged(&self) -> Identity {
        Identity { underlying: self.beneath.iter().map(Portrait::judged).collect(), ..self.identity.clone() }
    }
}

impl LogicalVolume {
    /// How many characters a UUID of LVM has without its hyphens.
    const UUID: usize = 32;

    /// Takes apart a dm UUID: `LVM-`, the two UUIDs without hyphens, and for a hidden part of a volume a
    /// hyphen and what it is (`-cow`, `-tdata`); that is no volume then.
    pub fn of_dm_uuid(uuid: &str) -> Option<Self> {
        let uuids = uuid.strip_prefix("LVM-")?;
        // The alphabet of LVM2's lib/uuid/uuid.c.
        let known = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'!' | b'#');
        if uuids.len() != 2 * Self::UUID || !uuids.bytes().all(known) {
            return None;
        }
        let (group, volume) = uuids.split_at(Self::UUID);
        Some(LogicalVolume { group_uuid: hyphenated(group), volume_uuid: hyphenated(volume) })
    }
}

fn hyphenated(uuid: &str) -> String {
    let groups = [0..6, 6..10, 10..14, 14..18, 18..22, 22..26, 26..32];
    groups.map(|range| &uuid[range]).join("-")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_logical_volume_has_the_uuids_that_lvs_shows() {
        let uuid = "LVM-1z2D8e6JKcZIuAi1qqCAp1lkxeyzpvXAPoT12r58C0vvZcGPnmXIdb88BF0xS9du";
        let volume = LogicalVolume::of_dm_uuid(uuid).unwrap();
        assert_eq!(volume.group_uuid, "1z2D8e-6JKc-ZIuA-i1qq-CAp1-lkxe-yzpvXA");
        assert_eq!(volume.volume_uuid, "PoT12r-58C0-vvZc-GPnm-XIdb-88BF-0xS9du");
        for other in [&uuid[..uuid.len() - 1], &uuid[4..], &format!("{uuid}-cow"), &uuid.replace('z', "é"), "LVM-", ""]
        {
            assert_eq!(LogicalVolume::of_dm_uuid(other), None, "{other}");
        }
    }

    proptest! {
        #[test]
        fn any_dm_uuid_is_taken_apart_or_not(rest in ".{0,80}") {
            let _ = LogicalVolume::of_dm_uuid(&format!("LVM-{rest}"));
        }
    }
}
