//! By what a volume's record names its key.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::{CheckValue, FIRST_VERSION, PassphraseHash, SecretId};
use crate::policy::KeySize;
use crate::refusal::{Reason, Refusal};
use crate::volume::{VolumeId, is_id};

/// What a key is called where it is kept: 1 to 128 ASCII letters, digits, `.`, `_` or `-`, the first one a letter or a
/// digit. A key that volcrypt made is called as its volume is; any other may be, for example, the UUID of a secret.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct KeyId(String);

impl KeyId {
    /// The longest id, in bytes.
    pub const MAX_LENGTH: usize = 128;

    /// The id as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl KeyId {
    /// What the key is called that is a secret of another program's, or made of its digits.
    pub(super) fn of_secret(secret: &SecretId, hashed: Option<(PassphraseHash, KeySize)>) -> Self {
        KeyId(match hashed {
            None => secret.to_string(),
            Some((hash, size)) => format!("{secret}.{hash}-{}", size.bits()),
        })
    }
}

/// Whatever a volume may be called, its key may be called so, too.
impl From<&VolumeId> for KeyId {
    fn from(volume: &VolumeId) -> Self {
        KeyId(volume.as_str().to_owned())
    }
}

impl FromStr for KeyId {
    type Err = InvalidKeyId;

    fn from_str(text: &str) -> Result<Self, InvalidKeyId> {
        match is_id(text, Self::MAX_LENGTH) {
            true => Ok(KeyId(text.to_owned())),
            false => Err(InvalidKeyId(text.chars().take(80).collect())),
        }
    }
}

impl TryFrom<String> for KeyId {
    type Error = InvalidKeyId;

    fn try_from(text: String) -> Result<Self, InvalidKeyId> {
        text.parse()
    }
}

impl From<KeyId> for String {
    fn from(id: KeyId) -> String {
        id.0
    }
}

impl fmt::Display for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A text that cannot be a key's id. Holds the first 80 characters of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InvalidKeyId(String);

impl fmt::Display for InvalidKeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:?} is not a key id: use 1 to {} letters, digits, '.', '_' or '-', the first a letter or a digit",
            self.0,
            KeyId::MAX_LENGTH
        )
    }
}

impl std::error::Error for InvalidKeyId {}

/// Which key: what it is called, and which of those that are called so.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct KeyHandle {
    /// What it is called.
    pub id: KeyId,
    /// Counted from 1 on: a key that takes another one's place has the next number.
    pub version: u32,
}

impl KeyHandle {
    /// The key number `version` of those that volcrypt made for `volume`.
    pub fn of(volume: &VolumeId, version: u32) -> Self {
        KeyHandle { id: volume.into(), version }
    }

    /// The first key that volcrypt made for `volume`.
    pub fn first(volume: &VolumeId) -> Self {
        KeyHandle::of(volume, FIRST_VERSION)
    }

    /// Whether it is a key that volcrypt made for `volume`, and none that an operator named.
    pub fn is_own(&self, volume: &VolumeId) -> bool {
        self.id.as_str() == volume.as_str()
    }
}

/// As sentences have it: `vol-1, version 1`.
impl fmt::Display for KeyHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, version {}", self.id, self.version)
    }
}

/// The key that a volume's record names: this one, and no other that the volume has had or will have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RecordedKey {
    /// The volume.
    pub volume: VolumeId,
    /// Which key it is.
    pub handle: KeyHandle,
    /// What tells it from any other, whatever that is called.
    pub check_value: CheckValue,
}

impl RecordedKey {
    /// Its version, for a key manager in which every key is called as its volume is.
    ///
    /// # Errors
    /// [`Reason::WrongKey`] when it is called otherwise. The volume's own key is not taken in its place.
    pub(super) fn own_version(&self, place: &str) -> Result<u32, Refusal> {
        match self.handle.is_own(&self.volume) {
            true => Ok(self.handle.version),
            false => Err(Refusal::new(
                Reason::WrongKey,
                format!(
                    "the record of volume {} names the key {}, and {place} hands out only keys that are called as their \
                     volumes are: use the key manager that has that key",
                    self.volume, self.handle.id
                ),
            )),
        }
    }

    /// The refusal where `place` has the volume's key, but only as the version that was `found`.
    pub(super) fn other_version(&self, place: &str, found: u32) -> Refusal {
        let (volume, version) = (&self.volume, self.handle.version);
        Refusal::new(
            Reason::WrongKey,
            format!(
                "the record of volume {volume} names version {version} of its key, and {place} has version {found}, which \
                 is another key and was not used: have version {version} restored there"
            ),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_called_as_a_volume_or_a_secret_may_be() {
        let longest = "x".repeat(128);
        for name in ["a", "0b1f7c1e-1111-4222-8333-444455556666", "vol_1.lun0", &longest] {
            assert_eq!(name.parse::<KeyId>().map(String::from).as_deref(), Ok(name));
        }
        let long = "x".repeat(129);
        for name in ["", ".", "..", "-x", "../x", "a/b", "a b", "a\0b", "a\n", "é", "a:b", long.as_str()] {
            let refused = name.parse::<KeyId>().unwrap_err().to_string();
            assert!(refused.contains("is not a key id: use 1 to 128 letters"), "{refused}");
            assert!(serde_json::from_value::<KeyId>(name.into()).is_err(), "{name:?}");
        }
    }

    #[test]
    fn a_key_is_a_volumes_own_by_its_id() {
        let (one, other) = ("one".parse().unwrap(), "other".parse().unwrap());
        assert_eq!(KeyHandle::first(&one).to_string(), "one, version 1");
        assert!(KeyHandle::of(&one, 2).is_own(&one) && !KeyHandle::of(&one, 2).is_own(&other));
        let json = serde_json::json!({ "id": "one", "version": 2 });
        assert_eq!(serde_json::to_value(KeyHandle::of(&one, 2)).unwrap(), json);
    }
}
