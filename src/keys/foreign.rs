//! Secrets that another program has made and keeps, Cinder first of all, and how a volume's key comes from one.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use aws_lc_rs::digest::{Context, SHA256};
use ripemd::{Digest, Ripemd160};
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use super::{Description, FIRST_VERSION, Key, KeyHandle, KeyId};
use crate::domain::is_uuid;
use crate::policy::KeySize;
use crate::refusal::Refusal;
use crate::volume::VolumeId;

/// What a secret is called by its key manager: a UUID.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct SecretId(String);

impl SecretId {
    /// The UUID, in small letters.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for SecretId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for SecretId {
    type Err = String;

    /// A UUID, or a reference that ends in one: `https://HOST:9311/v1/secrets/UUID`. Where else it points counts for
    /// nothing.
    fn from_str(text: &str) -> Result<Self, String> {
        let id = text.rsplit('/').next().unwrap_or_default();
        match is_uuid(id) {
            true => Ok(SecretId(id.to_ascii_lowercase())),
            false => Err(format!("{text:?} is no secret: write its UUID, as in 'openstack secret list'")),
        }
    }
}

impl TryFrom<String> for SecretId {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<SecretId> for String {
    fn from(id: SecretId) -> String {
        id.0
    }
}

/// How cryptsetup hashes a passphrase in `plain` mode.
///
/// os-brick gives it a secret's hexadecimal digits as the passphrase, and does not say which: that is ripemd160 before
/// cryptsetup 2.7, and sha256 since.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PassphraseHash {
    /// SHA-256.
    Sha256,
    /// RIPEMD-160.
    Ripemd160,
}

impl PassphraseHash {
    /// Both, the newer one first.
    pub const ALL: [PassphraseHash; 2] = [PassphraseHash::Sha256, PassphraseHash::Ripemd160];

    /// Its name.
    pub fn as_str(self) -> &'static str {
        match self {
            PassphraseHash::Sha256 => "sha256",
            PassphraseHash::Ripemd160 => "ripemd160",
        }
    }
}

impl fmt::Display for PassphraseHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for PassphraseHash {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let found = PassphraseHash::ALL.into_iter().find(|hash| hash.as_str() == text);
        found.ok_or_else(|| format!("{text:?} is no hash that os-brick's volumes have: write sha256 or ripemd160"))
    }
}

/// A volume's key that comes from a secret of another program's.
///
/// In records it is called by the secret's UUID, and where the key is made of the secret's digits as a passphrase, by
/// hash and size behind that: `dfe2418f-8205-4e90-816a-4e8ea2366b48.sha256-512`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "KeyId", into = "KeyId")]
pub struct ForeignKey {
    /// The secret.
    pub secret: SecretId,
    /// What is made of its digits, and how large the key is; nothing if the secret itself is the key.
    hashed: Option<(PassphraseHash, KeySize)>,
}

impl ForeignKey {
    /// The key that `secret` itself is.
    pub fn itself(secret: SecretId) -> Self {
        ForeignKey { secret, hashed: None }
    }

    /// The key of this size that cryptsetup makes of the digits of `secret`.
    pub fn hashed(secret: SecretId, hash: PassphraseHash, size: KeySize) -> Self {
        ForeignKey { secret, hashed: Some((hash, size)) }
    }

    /// The one that `handle` names; nothing if it is a key that volcrypt made for `volume`. What a secret holds never
    /// changes, so there is one version of it.
    pub fn named_by(volume: &VolumeId, handle: &KeyHandle) -> Option<Self> {
        let may_be = !handle.is_own(volume) && handle.version == FIRST_VERSION;
        may_be.then(|| handle.id.clone().try_into().ok()).flatten()
    }

    /// What is made of the secret's digits; nothing if the secret itself is the key.
    pub fn hash(&self) -> Option<PassphraseHash> {
        self.hashed.map(|(hash, _)| hash)
    }

    /// What records call it.
    pub fn handle(&self) -> KeyHandle {
        KeyHandle { id: self.clone().into(), version: FIRST_VERSION }
    }

    /// The volume's key, of what the `secret` holds.
    ///
    /// # Errors
    /// When no memory can be locked.
    pub fn key(&self, secret: &Key) -> Result<Key, Refusal> {
        match self.hashed {
            None => secret.copy(),
            Some((PassphraseHash::Sha256, size)) => hashed(secret, size, |prefix, digits, room| {
                let mut context = Context::new(&SHA256);
                context.update(prefix);
                context.update(digits);
                fill(room, context.finish().as_ref())
            }),
            Some((PassphraseHash::Ripemd160, size)) => hashed(secret, size, |prefix, digits, room| {
                let mut hash = Ripemd160::new();
                hash.update(prefix);
                hash.update(digits);
                let mut digest = Zeroizing::new([0; 20]);
                hash.finalize_into((&mut *digest).into());
                fill(room, &*digest)
            }),
        }
    }
}

impl From<ForeignKey> for KeyId {
    fn from(key: ForeignKey) -> KeyId {
        KeyId::of_secret(&key.secret, key.hashed)
    }
}

impl TryFrom<KeyId> for ForeignKey {
    type Error = String;

    fn try_from(id: KeyId) -> Result<Self, String> {
        let no_key = || format!("{id} is no key that comes from another program's secret");
        let (secret, how) = match id.as_str().split_once('.') {
            None => (id.as_str(), None),
            Some((secret, how)) => (secret, Some(how)),
        };
        let hashed = how.map(|how| {
            let (hash, bits) = how.split_once('-')?;
            Some((hash.parse().ok()?, KeySize::try_from(bits.parse::<u32>().ok()?).ok()?))
        });
        let hashed = hashed.map(|hashed| hashed.ok_or_else(no_key)).transpose()?;
        let key = ForeignKey { secret: secret.parse().map_err(|_| no_key())?, hashed };
        // What is written otherwise than volcrypt does is not taken for the same.
        if KeyId::from(key.clone()) == id { Ok(key) } else { Err(no_key()) }
    }
}

/// In words: `Cinder's secret dfe2418f-8205-4e90-816a-4e8ea2366b48, hashed as a passphrase (sha256)`.
impl fmt::Display for ForeignKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Cinder's secret {}", self.secret)?;
        match self.hash() {
            None => Ok(()),
            Some(hash) => write!(f, ", hashed as a passphrase ({hash})"),
        }
    }
}

/// A key manager that has secrets of other programs', with which volumes can be encrypted as they are. It never changes
/// what one of them holds, and never deletes one.
pub trait ForeignSecrets {
    /// The secret that the configuration names as the key of `volume`.
    ///
    /// # Errors
    /// [`Reason::Configuration`](crate::refusal::Reason::Configuration) when nothing can be told of any volume.
    fn secret_for(&self, volume: &VolumeId) -> Result<Option<SecretId>, Refusal>;

    /// The key of `volume` that comes from `secret`, and what hosts have noted of the volume; nothing if none has noted
    /// anything.
    ///
    /// # Errors
    /// [`Reason::WrongKey`](crate::refusal::Reason::WrongKey) when it is another volume's key, or what is noted was
    /// changed, and as [`KeyManager::get`](super::KeyManager::get).
    fn described_by(&self, volume: &VolumeId, secret: &SecretId) -> Result<Option<(Key, Description)>, Refusal>;

    /// What `secret` holds, which is to become the key of `volume`.
    ///
    /// # Errors
    /// As [`KeyManager::get`](super::KeyManager::get).
    fn secret(&self, volume: &VolumeId, secret: &SecretId) -> Result<Key, Refusal>;

    /// Notes beside the secret that `key` comes from it and is the key of `volume`, and what other hosts have to know
    /// of that, if this host may do so. Returns what is noted there; another host may have been quicker.
    ///
    /// # Errors
    /// [`Reason::WrongKey`](crate::refusal::Reason::WrongKey) when the volume has another key, or the secret is another
    /// volume's, or another host reads the volume in another way; and as [`KeyManager::get`](super::KeyManager::get).
    fn describe(
        &self,
        volume: &VolumeId,
        foreign: &ForeignKey,
        key: &Key,
        wanted: &Description,
    ) -> Result<Description, Refusal>;

    /// Says which secrets are keys of which volumes of this host, for
    /// [`KeyManager::note_uses`](super::KeyManager::note_uses).
    fn are_keys(&self, secrets: BTreeMap<VolumeId, SecretId>);
}

/// What cryptsetup's `plain` mode makes of the secret's digits as a passphrase (lib/crypt_plain.c): the digests of the
/// passphrase behind no `A`, one `A`, two and so on, one after the other, as much of them as is needed.
fn hashed(secret: &Key, size: KeySize, digest: impl Fn(&[u8], &[u8], &mut [u8]) -> usize) -> Result<Key, Refusal> {
    let digits = Key::filled(secret.bytes().len() * 2, |room| {
        for (pair, byte) in room.chunks_exact_mut(2).zip(secret.bytes()) {
            pair.copy_from_slice(&[digit(byte >> 4), digit(byte & 15)]);
        }
        Ok(())
    })?;
    Key::filled(size.bytes(), |room| {
        let (mut filled, mut prefix) = (0, Vec::new());
        while filled < room.len() {
            filled += digest(&prefix, digits.bytes(), &mut room[filled..]);
            prefix.push(b'A');
        }
        Ok(())
    })
}

/// Without a table, in which the cache would show what was looked up.
fn digit(value: u8) -> u8 {
    // 39 lies between '9' + 1 and 'a'.
    let is_letter = 9_u8.wrapping_sub(value) >> 7;
    b'0' + value + is_letter * 39
}

/// Copies as much of `digest` as there is room for, and says how much that was.
fn fill(room: &mut [u8], digest: &[u8]) -> usize {
    let length = room.len().min(digest.len());
    room[..length].copy_from_slice(&digest[..length]);
    length
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: &str = "dfe2418f-8205-4e90-816a-4e8ea2366b48";

    fn secret(length: u8) -> Key {
        Key::filled(length.into(), |room| {
            room.iter_mut().zip(0..length).for_each(|(byte, value)| *byte = value.wrapping_mul(9));
            Ok(())
        })
        .unwrap()
    }

    /// What libcryptsetup 2.6.1 gives for the digits of such secrets (`crypt_volume_key_get` of a device of the type
    /// plain).
    #[test]
    fn keys_are_those_that_cryptsetup_makes() {
        for (bytes, hash, bits, expected) in [
            (16, PassphraseHash::Sha256, 128, "f39d99094cbd59d2173c2496e8fad0e3"),
            (16, PassphraseHash::Ripemd160, 128, "f7b1d069b87be52d618deb2ef5cd64d3"),
            (32, PassphraseHash::Sha256, 128, "7154b4f84808cfaee6ac864d2da710ee"),
            (32, PassphraseHash::Sha256, 256, "7154b4f84808cfaee6ac864d2da710eecd3afe8cac1fef967b3cd7863e3ff2a2"),
            (
                32,
                PassphraseHash::Sha256,
                512,
                "7154b4f84808cfaee6ac864d2da710eecd3afe8cac1fef967b3cd7863e3ff2a2330ba74207a5f03b193d5764cb41a02ee981a1fe57efffe43408074723fb0c56",
            ),
            (32, PassphraseHash::Ripemd160, 128, "f38ddc3a7125c6508c126c131d6b3971"),
            (32, PassphraseHash::Ripemd160, 256, "f38ddc3a7125c6508c126c131d6b39717fe61cdedef1f0f229cf0b15dab02fb6"),
            (
                32,
                PassphraseHash::Ripemd160,
                512,
                "f38ddc3a7125c6508c126c131d6b39717fe61cdedef1f0f229cf0b15dab02fb65a5a13cea1cdd9669f563869921d5b42fdb734fc911bfd82b9df1f772d126c65",
            ),
            (
                64,
                PassphraseHash::Sha256,
                512,
                "f9b77c6b339cd6ca1abed020ccdc1d8252fa67942c664018903ab624ec6e5a3fc93c545326a0525011e9cf029cef0cf844061f0712e23d53cc19b283217c28f9",
            ),
            (
                64,
                PassphraseHash::Ripemd160,
                512,
                "c6e35b40f493fcc59f7ccb7e1c19cd777dc36a5fdfb1d71b35e31ccca7c69ba2cd4275f894f2ac4545aa149b87636574baa9d26a485d72b8fa73fb5a2046c41b",
            ),
        ] {
            let size = KeySize::try_from(bits).unwrap();
            let key = ForeignKey::hashed(ID.parse().unwrap(), hash, size).key(&secret(bytes)).unwrap();
            let found: String = key.bytes().iter().map(|byte| format!("{byte:02x}")).collect();
            assert_eq!(found, expected, "{hash} of {bytes} bytes, {bits} bits");
        }
    }

    #[test]
    fn a_secret_may_itself_be_the_key() {
        let key = ForeignKey::itself(ID.parse().unwrap()).key(&secret(32)).unwrap();
        assert!(key.same_as(&secret(32)));
    }

    #[test]
    fn a_key_is_called_by_its_secret() {
        let secret: SecretId = ID.parse().unwrap();
        let size = |bits| KeySize::try_from(bits).unwrap();
        for (key, name) in [
            (ForeignKey::itself(secret.clone()), ID.to_owned()),
            (ForeignKey::hashed(secret.clone(), PassphraseHash::Sha256, size(512)), format!("{ID}.sha256-512")),
            (ForeignKey::hashed(secret, PassphraseHash::Ripemd160, size(256)), format!("{ID}.ripemd160-256")),
        ] {
            assert_eq!(key.handle().id.as_str(), name);
            assert_eq!(ForeignKey::named_by(&"vol-1".parse().unwrap(), &key.handle()), Some(key.clone()));
            assert_eq!(serde_json::to_value(&key).unwrap(), name);
            assert_eq!(serde_json::from_value::<ForeignKey>(name.into()).unwrap(), key);
        }
        // What a volume is called is never looked into.
        let volume = ID.parse().unwrap();
        assert_eq!(ForeignKey::named_by(&volume, &KeyHandle::first(&volume)), None);
        let upper = ID.to_uppercase();
        for wrong in ["vol-1", &upper, &format!("{ID}.sha256"), &format!("{ID}.sha256-0512"), &format!("{ID}.md5-256")]
        {
            let id: KeyId = wrong.parse().unwrap();
            assert!(ForeignKey::try_from(id).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_secret_is_named_by_its_uuid() {
        let id = ID;
        for text in [id.to_owned(), id.to_uppercase(), format!("https://barbican.example:9311/v1/secrets/{id}")] {
            assert_eq!(text.parse::<SecretId>().unwrap().as_str(), id);
        }
        for wrong in
            ["", "x", &id[1..], &format!("{id}/"), &format!(" {id}"), &id.replace('-', ""), &id.replace('d', "g")]
        {
            assert!(wrong.parse::<SecretId>().is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn hashes_have_one_name_each() {
        for hash in PassphraseHash::ALL {
            assert_eq!(hash.as_str().parse(), Ok(hash));
            assert_eq!(serde_json::to_string(&hash).unwrap(), format!("\"{hash}\""));
        }
        assert!("plain".parse::<PassphraseHash>().is_err());
    }
}
