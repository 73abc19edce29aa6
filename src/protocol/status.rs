//! What the daemon says of volumes, mappings, guests and keys.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::keys::{KeyInfo, ManagerKind};
use crate::policy::Intercept;
use crate::store::VolumeRecord;
use crate::volume::VolumeId;

/// What the daemon and the kernel know right now.
#[derive(Debug, Serialize, Deserialize)]
pub struct Status {
    /// The daemon's version.
    pub version: String,
    /// Why the configuration could not be used, if so: everything protected is refused then.
    pub configuration_error: Option<String>,
    /// Why the key store could not be used, if so.
    pub key_store_error: Option<String>,
    /// Which keys are in the database only, while another key manager is used, if there are any.
    #[serde(default)]
    pub keys_left_behind: Option<String>,
    /// Every mapping of volcrypt's in the kernel.
    pub mappings: Vec<MappingStatus>,
    /// Every QEMU whose opens the daemon answers.
    pub guests: Vec<GuestStatus>,
    /// How guests get to their mappings.
    #[serde(default)]
    pub intercept: Intercept,
    /// What keeps other QEMUs from protected volumes.
    pub guard: GuardStatus,
    /// Which volumes would start without the key server; nothing where there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key_cache: Option<Box<KeyCacheStatus>>,
}

/// What this host keeps of a key server's keys.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeyCacheStatus {
    /// For how many days a key is kept after the server last gave it; 0 if none is.
    pub lifetime_days: u64,
    /// Why none can be used although the configuration asks for it.
    pub fault: Option<String>,
    /// Every enrolled volume.
    pub volumes: Vec<CachedVolume>,
}

/// Whether a volume would start without the key server.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CachedVolume {
    /// The volume.
    pub volume: VolumeId,
    /// Until when it would, in seconds since 1970-01-01 UTC; nothing if it would not.
    pub starts_until: Option<i64>,
}

/// The guard that keeps the raw devices of protected volumes shut.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct GuardStatus {
    /// Whether every such device is shut.
    pub on: bool,
    /// For whom: the processes in and below this cgroup.
    pub cgroup: String,
    /// How many devices are shut: block devices, and character devices that pass commands to them.
    pub devices: usize,
    /// Why it is off, and what to do.
    pub fault: Option<String>,
    /// Why every block device but volcrypt's own is shut, if so: what is wrong with the configuration.
    #[serde(default)]
    pub all_because: Option<String>,
}

/// One mapping in the kernel.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct MappingStatus {
    /// The mapped volume.
    pub volume: VolumeId,
    /// The name of the mapping: `volcrypt-<volume id>`.
    pub name: String,
    /// Its device: `/dev/dm-0`.
    pub device: PathBuf,
    /// The device that holds the ciphertext: `/dev/sda`; its number if it has no name any more.
    pub backing: String,
    /// The on-disk format.
    pub format: String,
    /// The cipher in dm-crypt's notation.
    pub cipher: String,
    /// How many times the mapping is open.
    pub open_count: i32,
    /// Whether the kernel will remove it at the last close.
    pub deferred_removal: bool,
    /// The domains whose QEMU has it open.
    pub domains: Vec<String>,
    /// The domains that it is held for until their QEMU has opened it.
    #[serde(default)]
    pub held_for: Vec<String>,
    /// When it was made, in seconds since 1970-01-01 UTC.
    pub since: Option<i64>,
}

/// One registered QEMU.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct GuestStatus {
    /// The process that registered.
    pub pid: u32,
    /// The domain's name as its command line says it.
    pub domain: Option<String>,
}

/// An enrolled volume and who uses it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct VolumeStatus {
    /// What was written down when it was enrolled.
    #[serde(flatten)]
    pub record: VolumeRecord,
    /// Whether there is a mapping of it on this host now.
    pub mapped: bool,
    /// The domains whose QEMU has that open, as in [`MappingStatus::domains`].
    pub domains: Vec<String>,
}

/// Some of the keys, by volume.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct KeyPage {
    /// What is known of them.
    pub keys: Vec<KeyStatus>,
    /// After which volume to look on; nothing when there are no more.
    pub after: Option<VolumeId>,
}

/// What is known of a key.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct KeyStatus {
    /// What its key manager knows.
    #[serde(flatten)]
    pub info: KeyInfo,
    /// The key manager.
    pub manager: ManagerKind,
    /// The volumes, enrolled or retired on this host, whose records name it.
    #[serde(default)]
    pub volumes: Vec<VolumeId>,
    /// When this host used it last, in seconds since 1970-01-01 UTC.
    pub last_use: Option<i64>,
    /// How old it is, in days.
    pub age_days: u32,
    /// Whether that is more than the configuration wants.
    pub old: bool,
}
