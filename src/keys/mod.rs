//! Key managers, and the secret types they hand out.

use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::policy::KeySize;
use crate::refusal::{Reason, Refusal};
use crate::store::VolumeRecord;
use crate::volume::VolumeId;

pub mod barbican;
pub mod cached;
mod description;
mod embedded;
mod foreign;
mod handle;
mod host;
mod kek;
mod kek_places;
mod key;
mod key_file;
pub mod kmip;
mod leaving;
mod migration;
mod progress;
mod rotation;
mod secret_file;
pub mod tls;

pub use description::{Description, SealedDescription};
pub use embedded::EmbeddedKeyManager;
pub use foreign::{ForeignKey, ForeignSecrets, PassphraseHash, SecretId};
pub use handle::{InvalidKeyId, KeyHandle, KeyId, RecordedKey};
pub use host::Host;
pub use kek::KeyEncryptionKey;
pub use kek_places::kek_file;
pub use key::{CheckValue, Key};
pub use key_file::{KeyFileManager, OneKeyForEveryVolume};
pub use leaving::Leaving;
pub use migration::{Aim, KeyMigration, MigrationProgress, MigrationStep, Place, Route};
pub use progress::{tell, telling};
pub use rotation::{KekHome, KekRotation, RotationStep};

/// The version of the first key that a volume has.
pub(crate) const FIRST_VERSION: u32 = 1;

/// Where volume keys live.
///
/// Implementations are shared between threads. Every call may take as long as its own deadline
/// allows, so it is never made on the thread that polls the guests' listeners.
pub trait KeyManager: Send + Sync {
    /// The key of `volume` that counts in the key manager now, whichever of the volume's keys that is: for whoever has no
    /// record that names one.
    fn get(&self, volume: &VolumeId) -> Result<Key, Refusal>;

    /// The key that a volume's record names: whatever else is said to be the volume's key does not count. It may have
    /// another check value all the same where there is none with the one that is recorded, and never another version.
    ///
    /// # Errors
    /// [`Reason::WrongKey`] when the key manager has the volume's key, and not that one; [`Reason::NoKey`] when it has none.
    fn get_enrolled(&self, key: &RecordedKey) -> Result<Key, Refusal>;

    /// Makes and stores a random key for `volume`, reads it back and compares it, and keeps beside it what other hosts
    /// have to know of the volume. A key that is there already is handed out as it is, never replaced, if it has the
    /// right size; another host may have been quicker, so what is known of the volume comes with it.
    fn create(&self, volume: &VolumeId, wanted: &Description) -> Result<(Key, Description), Refusal>;

    /// Stores `key`, which another key manager has, as that of `volume`, and keeps beside it what other hosts have to know
    /// of the volume. It returns when the key was read back from here and is the same. A key that is there already is
    /// never replaced: the same one is fine, whoever stored it.
    ///
    /// # Errors
    /// [`Reason::WrongKey`] when the volume has another key here, or one that is used in another way;
    /// [`Reason::KeyDestroyed`] when its key was destroyed here, [`Reason::KeyRevoked`] when it may not be used any more;
    /// [`Reason::Configuration`] from a key manager that cannot take keys.
    fn import(&self, volume: &VolumeId, key: &Key, description: &Description) -> Result<Imported, Refusal>;

    /// What it can do.
    fn capabilities(&self) -> Capabilities;

    /// The key of `volume` and what was said of the volume when it was made; nothing if there is no key. A key manager
    /// that no other host asks keeps none.
    fn described(&self, _volume: &VolumeId) -> Result<Option<(Key, Description)>, Refusal> {
        Ok(None)
    }

    /// Destroys the key of `volume`. What was encrypted with it can never be read again.
    fn destroy(&self, volume: &VolumeId) -> Result<(), Refusal>;

    /// Destroys the key of `volume` here, while another key manager has it as well: what was encrypted with it can be
    /// read as before. If there is no key here, that is no error.
    fn forget(&self, volume: &VolumeId) -> Result<(), Refusal> {
        match self.destroy(volume) {
            Err(refusal) if refusal.reason() == Reason::NoKey => Ok(()),
            outcome => outcome,
        }
    }

    /// The mark of the host that is about to destroy the key of `volume` here, if one is. Every server that could have it
    /// has to answer. A key manager that no other host asks keeps none.
    fn leaving(&self, _volume: &VolumeId) -> Result<Option<Leaving>, Refusal> {
        Ok(None)
    }

    /// Sets that mark, in the place of any other, or takes it away.
    fn note_leaving(&self, _volume: &VolumeId, _leaving: Option<&Leaving>) -> Result<(), Refusal> {
        Ok(())
    }

    /// Whether the key manager would destroy the key of `volume` now, as far as that can be told without doing it.
    ///
    /// # Errors
    /// Those of [`destroy`](KeyManager::destroy).
    fn check_destroyable(&self, _volume: &VolumeId) -> Result<(), Refusal> {
        Ok(())
    }

    /// Whether every server on which the key manager keeps its keys has `key` for `volume`, so that no other copy is needed.
    /// One that has a single place is not asked.
    ///
    /// # Errors
    /// When one has another or none, or cannot be asked.
    fn check_everywhere(&self, _volume: &VolumeId, _key: &Key) -> Result<(), Refusal> {
        Ok(())
    }

    /// How long after a mark was set every host that asks for it sees it.
    fn seen_after(&self) -> Duration {
        Duration::ZERO
    }

    /// Whether a key that is destroyed has its record in the audit log with that: only one that keeps the keys beside the
    /// log can do both at once.
    fn records_destruction(&self) -> bool {
        false
    }

    /// What is known of every key; the keys themselves stay where they are. That may take minutes where there are many, and
    /// who waits for it with [`telling`] is told how far it is.
    fn list(&self) -> Result<Vec<KeyInfo>, Refusal>;

    /// Has the key that a volume's record names fetched while nobody waits, because it will probably be asked for within a
    /// minute. Returns at once, and whatever comes of it is nobody's refusal. A key manager that is quick has nothing to do.
    fn fetch_ahead(&self, _key: &RecordedKey) {}

    /// Wipes what is on this host of the keys of `volume`, if it is a copy.
    fn wipe_copy(&self, _volume: &VolumeId) {}

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

    /// The secrets of other programs' that it has, if volumes can be encrypted with such.
    fn foreign(&self) -> Option<&dyn ForeignSecrets> {
        None
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
    /// Which key of each volume can be used, and until when, in seconds since 1970-01-01 UTC.
    pub until: BTreeMap<VolumeId, (KeyHandle, i64)>,
    /// Why none can, although some were to be.
    pub fault: Option<String>,
}

impl KeptKeys {
    /// Until when the key that `record` names can be used, in seconds since 1970-01-01 UTC; nothing if it is not kept.
    pub fn until(&self, record: &VolumeRecord) -> Option<i64> {
        self.until.get(&record.id).filter(|(key, _)| *key == record.key).map(|(_, until)| *until)
    }
}

/// What a key manager can do beside handing out keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capabilities {
    /// Whether it lists the volumes that it has keys of.
    pub lists: bool,
    /// Whether it takes keys that another one has.
    pub imports: bool,
    /// Whether the key of one volume can be destroyed.
    pub destroys: bool,
    /// Whether other hosts ask it as well, so that it keeps beside each key what they have to know of the volume.
    pub describes: bool,
}

/// What became of a key that was to be stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Imported {
    /// It was stored now.
    Stored,
    /// It was there already.
    Present,
}

/// The kinds of key managers, by their names in the configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ManagerKind {
    /// The daemon's own database.
    Embedded,
    /// A KMIP server.
    Kmip,
    /// OpenStack Barbican.
    Barbican,
    /// One key for all volumes, in a file.
    KeyFile,
}

impl ManagerKind {
    /// Its name.
    pub fn as_str(self) -> &'static str {
        match self {
            ManagerKind::Embedded => "embedded",
            ManagerKind::Kmip => "kmip",
            ManagerKind::Barbican => "barbican",
            ManagerKind::KeyFile => "key-file",
        }
    }
}

impl fmt::Display for ManagerKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for ManagerKind {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let all = [ManagerKind::Embedded, ManagerKind::Kmip, ManagerKind::Barbican, ManagerKind::KeyFile];
        all.into_iter()
            .find(|kind| kind.as_str() == text)
            .ok_or_else(|| format!("{text:?} is no key manager: write embedded, kmip or barbican"))
    }
}

/// The refusal of a key that is to become that of `volume` in `place`, where the volume has another one.
fn other_key(volume: &VolumeId, place: &str) -> Refusal {
    Refusal::new(
        Reason::WrongKey,
        format!(
            "{place} has another key of volume {volume} already, or the same for another cipher, which stays: compare what \
             'volcrypt volume show {volume}' says on the hosts that use it, and have it removed there if nobody does"
        ),
    )
}

/// What may be shown of a key.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct KeyInfo {
    /// The volume that it was made for.
    pub volume: VolumeId,
    /// Which key it is; a server's word is enough for that, because nothing is read with it.
    #[serde(flatten)]
    pub key: KeyHandle,
    /// The size of the key.
    pub key_size: KeySize,
    /// When it was created, in seconds since 1970-01-01 UTC.
    pub created_at: i64,
    /// Whether it was destroyed.
    pub destroyed: bool,
    /// The hosts that the key manager knows to use it; none from one that knows of no hosts.
    #[serde(default)]
    pub hosts: Vec<String>,
}

impl fmt::Display for KeyInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({} bits, version {})", self.volume, self.key_size.bits(), self.key.version)
    }
}
