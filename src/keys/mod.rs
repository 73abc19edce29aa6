//! Key managers, and the secret types they hand out.

use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::time::Duration;

use crate::policy::KeySize;
use crate::refusal::{Reason, Refusal};
use crate::volume::VolumeId;

pub mod barbican;
pub mod cached;
mod description;
mod embedded;
mod kek;
mod kek_places;
mod key;
mod key_file;
pub mod kmip;
mod rotation;
mod secret_file;
pub mod tls;

pub use description::Description;
pub use embedded::EmbeddedKeyManager;
pub use kek::KeyEncryptionKey;
pub use key::{CheckValue, Key};
pub use key_file::{KeyFileManager, OneKeyForEveryVolume};
pub use rotation::{KekHome, KekRotation, RotationStep};

/// Where volume keys live.
///
/// Implementations are shared between threads. Every call may take as long as its own deadline
/// allows, so it is never made on the thread that polls the guests' listeners.
pub trait KeyManager: Send + Sync {
    /// The key of `volume`.
    fn get(&self, volume: &VolumeId) -> Result<Key, Refusal>;

    /// Makes and stores a random key for `volume`, reads it back and compares it, and keeps beside it what other hosts
    /// have to know of the volume. A key that is there already is handed out as it is, never replaced, if it has the
    /// right size; another host may have been quicker, so what is known of the volume comes with it.
    fn create(&self, volume: &VolumeId, wanted: &Description) -> Result<(Key, Description), Refusal>;

    /// The key of `volume` and what was said of the volume when it was made; nothing if there is no key. A key manager
    /// that no other host asks keeps none.
    fn described(&self, _volume: &VolumeId) -> Result<Option<(Key, Description)>, Refusal> {
        Ok(None)
    }

    /// Destroys the key of `volume`. What was encrypted with it can never be read again.
    fn destroy(&self, volume: &VolumeId) -> Result<(), Refusal>;

    /// What is known of every key; the keys themselves stay where they are.
    fn list(&self) -> Result<Vec<KeyInfo>, Refusal>;

    /// Has the key of `volume` fetched while nobody waits, because it will probably be asked for within a minute. Returns
    /// at once, and whatever comes of it is nobody's refusal. A key manager that is quick has nothing to do.
    fn fetch_ahead(&self, _volume: &VolumeId) {}

    /// Wipes what is on this host of the key of `volume`, if it is a copy.
    fn forget(&self, _volume: &VolumeId) {}

    /// What could be used if the key server did not answer; nothing where there is no such server.
    fn kept(&self) -> Option<KeptKeys> {
        None
    }

    /// Notes that the volumes in `in_use`, and no others, are mapped on this host, where others see it before they
    /// destroy a key. It is told all of them each time, by one thread, now and then and after each use.
    ///
    /// # Errors
    /// What could not be noted is tried again with the next call.
    fn note_uses(&self, _in_use: &HashSet<VolumeId>) -> Result<(), Refusal> {
        Ok(())
    }

    /// Takes a step in the replacement of the key-encryption key, of a second or so.
    ///
    /// # Errors
    /// [`Reason::Configuration`] from a key manager that has none.
    fn rotate_kek(&self, _step: &RotationStep) -> Result<KekRotation, Refusal> {
        Err(Refusal::new(
            Reason::Configuration,
            "the key manager in use has no key-encryption key to replace: only the embedded database's keys are wrapped by one",
        ))
    }
}

/// Copies of a key server's keys that this host keeps.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KeptKeys {
    /// For how long a key is kept after the server last gave it; zero if none is.
    pub lifetime: Duration,
    /// Until when the key of each volume can be used, in seconds since 1970-01-01 UTC.
    pub until: BTreeMap<VolumeId, i64>,
    /// Why none can, although some were to be.
    pub fault: Option<String>,
}

/// What may be shown of a key.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct KeyInfo {
    /// The volume whose key it is.
    pub volume: VolumeId,
    /// The size of the key.
    pub key_size: KeySize,
    /// The version of the record that holds it.
    pub version: u32,
    /// When it was created, in seconds since 1970-01-01 UTC.
    pub created_at: i64,
    /// Whether it was destroyed.
    pub destroyed: bool,
}

impl fmt::Display for KeyInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({} bits, version {})", self.volume, self.key_size.bits(), self.version)
    }
}
