//! Mappings: the devices on top of the volumes that the guests really read and write.

mod device_mapper;
pub use device_mapper::device_path;
mod locks;
mod plain;
mod table;

use std::os::fd::OwnedFd;

use rustix::fs::OFlags;

use crate::keys::Key;
use crate::policy::Profile;
use crate::refusal::Refusal;
use crate::store::VolumeRecord;
use crate::volume::{DeviceNumber, VolumeId};

pub use locks::VolumeLocks;
pub use plain::PlainEncryptor;

/// Makes mappings and gives them out.
///
/// The kernel's own tables are the only book of mappings. Implementations are shared between threads
/// and let one thread at a time work on a volume.
pub trait VolumeEncryptor: Send + Sync {
    /// Opens the mapping of a volume with `flags`, making it first unless it is there. The mapping is
    /// flagged for removal at its last close before this returns, so it lives exactly as long as the
    /// descriptor and its duplicates. `key` is asked only when the mapping has to be made.
    ///
    /// # Errors
    /// When a mapping of that name is not the expected one, and when the kernel or `key` refuses.
    fn open(
        &self,
        wanted: &MappingSpec<'_>,
        flags: OFlags,
        key: &dyn Fn() -> Result<Key, Refusal>,
    ) -> Result<Opened, Refusal>;

    /// Opens the mapping of `volume`, which is there as `device`, with `flags`: as for [`VolumeEncryptor::open`], the host's
    /// own node of it.
    ///
    /// # Errors
    /// When it is not there any more, and when the kernel refuses.
    fn open_present(&self, volume: &VolumeId, device: DeviceNumber, flags: OFlags) -> Result<Opened, Refusal>;

    /// All of volcrypt's mappings in the kernel.
    ///
    /// # Errors
    /// When device-mapper does not answer.
    fn mappings(&self) -> Result<Vec<Mapping>, Refusal>;

    /// Flags every mapping for removal at its last close; those that nobody has open go at once.
    /// Returns the names of those that were not flagged before: a daemon that died half-way left
    /// them.
    ///
    /// # Errors
    /// When device-mapper does not answer.
    fn sweep(&self) -> Result<Vec<String>, Refusal>;
}

/// A mapping that was opened.
#[derive(Debug)]
pub struct Opened {
    /// The host's own node of it.
    pub descriptor: OwnedFd,
    /// Whether it was open already.
    pub was_open: bool,
}

/// The mapping that a volume must have.
#[derive(Debug)]
pub struct MappingSpec<'a> {
    /// What was pinned when the volume was enrolled.
    pub record: &'a VolumeRecord,
    /// How dm-crypt is to work, where that changes nothing on the volume.
    pub profile: &'a Profile,
    /// The device that holds the ciphertext.
    pub device: DeviceNumber,
    /// Its size in bytes.
    pub size_bytes: u64,
    /// Whether it can only be read.
    pub read_only: bool,
}

/// A mapping in the kernel.
#[derive(Debug)]
pub struct Mapping {
    /// The mapped volume.
    pub volume: VolumeId,
    /// The name of the mapping.
    pub name: String,
    /// Its own device number.
    pub device: DeviceNumber,
    /// The device beneath; `None` while the mapping has no table.
    pub backing: Option<DeviceNumber>,
    /// The on-disk format, as in the mapping's UUID.
    pub format: String,
    /// The cipher in dm-crypt's notation; empty while the mapping has no table.
    pub cipher: String,
    /// How many times it is open.
    pub open_count: i32,
    /// Whether it is removed at its last close.
    pub deferred_removal: bool,
}
