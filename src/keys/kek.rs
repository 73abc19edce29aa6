//! The key that wraps the volume keys in the database.

use std::io;
use std::path::Path;

use aws_lc_rs::aead::{AES_256_GCM_SIV, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use aws_lc_rs::rand;

use super::secret_file::{self, Trust};
use super::{CheckValue, Key, KeyHandle};
use crate::policy::KeySize;
use crate::refusal::{Reason, Refusal};
use crate::store::CachedKey;
use crate::volume::VolumeId;

/// The name of systemd's credential that holds the key.
pub(super) const CREDENTIAL: &str = "volcrypt.kek";
/// The name of the key's file in the database's directory.
pub(super) const FILE_NAME: &str = "kek";
const PURPOSE: &str = "the key-encryption key";
const KEY_LENGTH: usize = 32;

/// The first byte of every wrapped key: AES-256-GCM-SIV, the nonce in front, the tag at the end.
const FORMAT: u8 = 1;
const TAG_LENGTH: usize = 16;
const CONTEXT: &[u8] = b"volcrypt wrapped volume key v1\0";
const CACHE_CONTEXT: &[u8] = b"volcrypt cached volume key v1\0";

/// The key-encryption key: 256 bits that wrap volume keys with AES-256-GCM-SIV (RFC 8452).
///
/// A wrapped key is one format byte (1), a random nonce of 96 bits, the ciphertext and the tag of
/// 128 bits. The volume, the record's version and the key's size are authenticated with it, so a
/// wrapped key opens in its own record only. That of a key which came from a key server, and is kept for when that does
/// not answer, is bound to the volume, the server and the time at which the server last gave it in the same way.
pub struct KeyEncryptionKey {
    key: Key,
}

impl KeyEncryptionKey {
    /// Reads the key from the credential `volcrypt.kek` in `credentials` (systemd's
    /// `CREDENTIALS_DIRECTORY`), or, if it is not there, from `kek` in `directory`: 32 bytes as they
    /// are or 64 hexadecimal digits, with a line feed behind them or without.
    ///
    /// If neither is there and `may_create` is set, a random key is made in `directory`. Set it only
    /// while nothing was wrapped yet.
    ///
    /// # Errors
    /// [`Reason::NoKey`] when there is no key and none may be made, when others may read the file,
    /// and when the content is no key.
    pub fn load(credentials: Option<&Path>, directory: &Path, may_create: bool) -> Result<Self, Refusal> {
        let credential = credentials.map(|credentials| credentials.join(CREDENTIAL));
        if let Some(path) = &credential
            && let Some(key) = read(path, Trust::Directory)?
        {
            return Ok(key);
        }
        let path = directory.join(FILE_NAME);
        if let Some(key) = read(&path, Trust::Mode)? {
            return Ok(key);
        }
        if may_create {
            return KeyEncryptionKey::create(&path);
        }
        let expected = match credential {
            Some(credential) => format!("neither {} nor {}", credential.display(), path.display()),
            None => format!("neither the credential {CREDENTIAL} nor {}", path.display()),
        };
        Err(no_key(format!(
            "{PURPOSE} is missing: {expected} is there, but the database has keys that it wraps; restore it from backup"
        )))
    }

    /// Makes a random key at `path`, durably, or takes the one that is there.
    pub(super) fn create(path: &Path) -> Result<Self, Refusal> {
        let made = Key::filled(KEY_LENGTH, |bytes| {
            rand::fill(bytes)
                .map_err(|_| no_key(format!("the system's random number generator failed; {PURPOSE} was not made")))
        })?;
        match secret_file::write_new(path, &made) {
            Ok(()) => {}
            // Another process was quicker: its key counts.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => {
                let path = path.display();
                return Err(no_key(format!(
                    "{path} ({PURPOSE}) cannot be made ({error}): make its directory writable"
                )));
            }
        }
        // What wraps keys is what a restart will find.
        match read(path, Trust::Mode)? {
            Some(key) => Ok(key),
            None => Err(no_key(format!("{} ({PURPOSE}) vanished while it was made: try again", path.display()))),
        }
    }

    /// Whether it is one byte over and over: what a file holds that was never written.
    pub(super) fn is_blank(&self) -> bool {
        self.key.bytes().iter().all(|byte| *byte == self.key.bytes()[0])
    }

    /// What tells this key from another one without revealing it: the first 16 bytes of HMAC-SHA-256
    /// under the key over `volcrypt key-encryption key check v1` NUL.
    pub fn check_value(&self) -> CheckValue {
        self.key.check_value_for(b"volcrypt key-encryption key check v1\0", "")
    }

    /// Wraps `key` for record `version` of `volume`.
    ///
    /// # Errors
    /// [`Reason::NoKey`] when there is no randomness.
    pub fn wrap(&self, volume: &VolumeId, version: u32, key: &Key) -> Result<Vec<u8>, Refusal> {
        self.seal(volume, &associated_data(volume, version, key.bits()), key)
    }

    /// Wraps `key` as the one of `volume` that `handle` names and `server` last gave at `fetched_at`.
    ///
    /// # Errors
    /// [`Reason::NoKey`] when there is no randomness.
    pub(super) fn wrap_cached(
        &self,
        (volume, handle): (&VolumeId, &KeyHandle),
        server: &str,
        fetched_at: i64,
        key: &Key,
    ) -> Result<Vec<u8>, Refusal> {
        self.seal(volume, &cache_data((volume, handle), server, fetched_at, key.bits()), key)
    }

    fn seal(&self, volume: &VolumeId, context: &[u8], key: &Key) -> Result<Vec<u8>, Refusal> {
        let failed = |_| no_key(format!("the key of volume {volume} could not be wrapped; it was not stored"));
        let mut nonce = [0; NONCE_LEN];
        rand::fill(&mut nonce).map_err(failed)?;
        let mut wrapped = vec![FORMAT];
        wrapped.extend_from_slice(&nonce);
        let start = wrapped.len();
        let end = start + key.bytes().len();
        wrapped.resize(end + TAG_LENGTH, 0);
        let (head, tag) = wrapped.split_at_mut(end);
        // The key goes from its locked pages into the ciphertext; nothing else ever holds it.
        self.cipher()
            .and_then(|cipher| {
                cipher.seal_out_of_place_scatter(
                    Nonce::assume_unique_for_key(nonce),
                    Aad::from(context),
                    key.bytes(),
                    &mut head[start..],
                    &[],
                    tag,
                )
            })
            .map_err(failed)?;
        Ok(wrapped)
    }

    /// Unwraps the key of `size` in record `version` of `volume`, straight into locked memory.
    ///
    /// # Errors
    /// [`Reason::NoKey`] when `wrapped` was not made by this key for that record, or was changed.
    pub fn unwrap(&self, volume: &VolumeId, version: u32, size: KeySize, wrapped: &[u8]) -> Result<Key, Refusal> {
        self.unseal(volume, &associated_data(volume, version, size.bytes() * 8), size, wrapped)
    }

    /// Unwraps what [`KeyEncryptionKey::wrap_cached`] has wrapped.
    ///
    /// # Errors
    /// [`Reason::NoKey`] when `wrapped` was not made by this key for that, or was changed.
    pub(super) fn unwrap_cached(&self, kept: &CachedKey) -> Result<Key, Refusal> {
        let CachedKey { volume, key: handle, server, key_size, wrapped, fetched_at, .. } = kept;
        let context = cache_data((volume, handle), server, *fetched_at, key_size.bytes() * 8);
        self.unseal(volume, &context, *key_size, wrapped)
    }

    fn unseal(&self, volume: &VolumeId, context: &[u8], size: KeySize, wrapped: &[u8]) -> Result<Key, Refusal> {
        let damaged = |what: String| {
            no_key(format!("the key record of volume {volume} is damaged ({what}): restore the database from backup"))
        };
        let expected = 1 + NONCE_LEN + size.bytes() + TAG_LENGTH;
        if wrapped.len() != expected {
            return Err(damaged(format!("{} bytes instead of {expected}", wrapped.len())));
        }
        let Some((&FORMAT, rest)) = wrapped.split_first() else {
            return Err(damaged("its format is unknown".to_owned()));
        };
        let (nonce, rest) = rest.split_at(NONCE_LEN);
        let (ciphertext, tag) = rest.split_at(size.bytes());
        // On a mismatch what was deciphered so far is wiped with the pages it stands in.
        Key::filled(size.bytes(), |bytes| {
            let nonce = Nonce::try_assume_unique_for_key(nonce);
            self.cipher()
                .and_then(|cipher| cipher.open_separate_gather(nonce?, Aad::from(context), ciphertext, tag, bytes))
                .map_err(|_| damaged("it is not what was written".to_owned()))
        })
    }

    /// The cipher, for one operation: its key schedule is in ordinary memory, which aws-lc wipes as
    /// it frees it.
    fn cipher(&self) -> Result<LessSafeKey, aws_lc_rs::error::Unspecified> {
        UnboundKey::new(&AES_256_GCM_SIV, self.key.bytes()).map(LessSafeKey::new)
    }
}

/// What is authenticated with a wrapped key: a label, the volume's id behind its length, the
/// record's version and the key's size in bits; numbers are 32 bits, big-endian.
fn associated_data(volume: &VolumeId, version: u32, bits: usize) -> Vec<u8> {
    // Ids have at most 64 bytes, keys at most 512 bits.
    let number = |value: usize| (value as u32).to_be_bytes();
    let id = volume.as_str().as_bytes();
    [CONTEXT, &number(id.len()), id, &version.to_be_bytes(), &number(bits)].concat()
}

/// The same for a key that is kept: another label, the server behind its length, and when it last gave the key, 64 bits
/// in big-endian. Any key but the volume's first own one has its id, behind its length, and its version at the end.
fn cache_data((volume, handle): (&VolumeId, &KeyHandle), server: &str, fetched_at: i64, bits: usize) -> Vec<u8> {
    let number = |value: usize| (value as u32).to_be_bytes();
    let id = volume.as_str().as_bytes();
    let (id_length, server_length) = (number(id.len()), number(server.len()));
    let parts: [&[u8]; 7] =
        [CACHE_CONTEXT, &id_length, id, &server_length, server.as_bytes(), &fetched_at.to_be_bytes(), &number(bits)];
    let mut data = parts.concat();
    if *handle != KeyHandle::first(volume) {
        let key_id = handle.id.as_str().as_bytes();
        data.extend([&number(key_id.len()), key_id, &handle.version.to_be_bytes()].concat());
    }
    data
}

/// The key in the file at `path`, if there is a file.
pub(super) fn read(path: &Path, trust: Trust) -> Result<Option<KeyEncryptionKey>, Refusal> {
    let Some(content) = secret_file::read(path, PURPOSE, trust, 2 * KEY_LENGTH + 1)? else { return Ok(None) };
    let wrong = || {
        no_key(format!(
            "{} ({PURPOSE}) holds no key: it must be {KEY_LENGTH} bytes or {} hexadecimal digits; restore it from backup",
            path.display(),
            2 * KEY_LENGTH
        ))
    };
    if content.bytes().len() == KEY_LENGTH {
        return Ok(Some(KeyEncryptionKey { key: content }));
    }
    let digits = content.bytes().strip_suffix(b"\n").unwrap_or(content.bytes());
    if digits.len() != 2 * KEY_LENGTH {
        return Err(wrong());
    }
    let digit = |byte: u8| char::from(byte).to_digit(16).ok_or_else(wrong);
    let key = Key::filled(KEY_LENGTH, |bytes| {
        for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
            // Two digits below 16 make a number below 256.
            *byte = (digit(pair[0])? << 4 | digit(pair[1])?) as u8;
        }
        Ok(())
    })?;
    Ok(Some(KeyEncryptionKey { key }))
}

fn no_key(sentence: String) -> Refusal {
    Refusal::new(Reason::NoKey, sentence)
}

#[cfg(test)]
mod tests {
    use std::fs::{self, Permissions};
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn size(bits: u32) -> KeySize {
        bits.try_into().unwrap()
    }

    fn id(name: &str) -> VolumeId {
        name.parse().unwrap()
    }

    /// A key-encryption key, the volume key it wrapped, and the wrapped form.
    fn wrapped(bits: u32) -> (KeyEncryptionKey, Key, Vec<u8>) {
        let directory = tempfile::tempdir().unwrap();
        let kek = KeyEncryptionKey::load(None, directory.path(), true).unwrap();
        let key = Key::random(size(bits)).unwrap();
        let wrapped = kek.wrap(&id("one"), 1, &key).unwrap();
        (kek, key, wrapped)
    }

    fn refused(result: Result<Key, Refusal>) -> String {
        let refusal = result.err().expect("no key may come out");
        assert_eq!(refusal.reason(), Reason::NoKey);
        refusal.to_string()
    }

    fn load_refused(credentials: Option<&Path>, directory: &Path, may_create: bool) -> String {
        let refusal = KeyEncryptionKey::load(credentials, directory, may_create).err().expect("must be refused");
        assert_eq!(refusal.reason(), Reason::NoKey);
        refusal.to_string()
    }

    fn put(path: &Path, content: &[u8]) {
        fs::write(path, content).unwrap();
        fs::set_permissions(path, Permissions::from_mode(0o600)).unwrap();
    }

    #[test]
    fn what_is_wrapped_is_unwrapped_and_every_wrapping_differs() {
        for bits in [128, 256, 512] {
            let (kek, key, wrapped) = wrapped(bits);
            assert_eq!(wrapped.len(), 1 + 12 + bits as usize / 8 + 16);
            assert!(kek.unwrap(&id("one"), 1, size(bits), &wrapped).unwrap().same_as(&key));
            let again = kek.wrap(&id("one"), 1, &key).unwrap();
            assert_ne!(wrapped[1..13], again[1..13], "nonces differ");
            assert_ne!(wrapped[13..], again[13..]);
        }
    }

    #[test]
    fn no_changed_bit_goes_unnoticed() {
        for bits in [128, 256, 512] {
            let (kek, _, wrapped) = wrapped(bits);
            for at in 0..wrapped.len() * 8 {
                let mut changed = wrapped.clone();
                changed[at / 8] ^= 1 << (at % 8);
                let sentence = refused(kek.unwrap(&id("one"), 1, size(bits), &changed));
                assert!(sentence.contains("volume one") && sentence.contains("from backup"), "{sentence}");
            }
        }
    }

    #[test]
    fn a_wrapped_key_opens_in_its_own_record_only() {
        let (kek, _, wrapped) = wrapped(256);
        refused(kek.unwrap(&id("two"), 1, size(256), &wrapped));
        refused(kek.unwrap(&id("one"), 2, size(256), &wrapped));
        for bits in [128, 512] {
            refused(kek.unwrap(&id("one"), 1, size(bits), &wrapped));
        }
        refused(kek.unwrap(&id("one"), 1, size(256), &wrapped[..wrapped.len() - 1]));
        refused(kek.unwrap(&id("one"), 1, size(256), &[]));
        let (other, _, _) = self::wrapped(256);
        refused(other.unwrap(&id("one"), 1, size(256), &wrapped));
        assert_ne!(other.check_value(), kek.check_value());
    }

    #[test]
    fn no_two_records_authenticate_the_same_bytes() {
        let records = [("a", 1, 256), ("a", 2, 256), ("a", 1, 512), ("b", 1, 256), ("a1", 1, 256), ("a", 256, 1)];
        let data: Vec<_> = records.map(|(name, version, bits)| associated_data(&id(name), version, bits)).into();
        for (index, one) in data.iter().enumerate() {
            assert!(!data[index + 1..].contains(one));
        }
    }

    #[test]
    fn a_kept_key_opens_in_its_own_row_only() {
        let (kek, key, in_its_record) = wrapped(256);
        let (first, second) = (KeyHandle::first(&id("one")), KeyHandle::of(&id("one"), 2));
        let row = |name: &str, key: &KeyHandle, server: &str, fetched_at, wrapped: &[u8]| CachedKey {
            volume: id(name),
            key: key.clone(),
            server: server.to_owned(),
            key_size: size(256),
            wrapped: wrapped.to_vec(),
            kek: kek.check_value(),
            fetched_at,
        };
        let elsewhere = KeyHandle { id: "0b1f7c1e".parse().unwrap(), version: 1 };
        let handles = [&first, &second, &elsewhere];
        for handle in handles {
            let kept = kek.wrap_cached((&id("one"), handle), "kmip", 7, &key).unwrap();
            assert!(kek.unwrap_cached(&row("one", handle, "kmip", 7, &kept)).unwrap().same_as(&key));
            for other in handles.into_iter().filter(|other| *other != handle) {
                refused(kek.unwrap_cached(&row("one", other, "kmip", 7, &kept)));
            }
            refused(kek.unwrap_cached(&row("two", handle, "kmip", 7, &kept)));
            refused(kek.unwrap_cached(&row("one", handle, "other", 7, &kept)));
            refused(kek.unwrap_cached(&row("one", handle, "kmip", 8, &kept)));
            refused(kek.unwrap(&id("one"), handle.version, size(256), &kept));
        }
        refused(kek.unwrap_cached(&row("one", &first, "kmip", 1, &in_its_record)));
    }

    /// What was kept before keys had handles opens still.
    #[test]
    fn the_first_key_of_a_volume_is_kept_as_ever() {
        let volume = id("one");
        let data = cache_data((&volume, &KeyHandle::first(&volume)), "kmip", 7, 256);
        let parts: [&[u8]; 7] =
            [CACHE_CONTEXT, &[0, 0, 0, 3], b"one", &[0, 0, 0, 4], b"kmip", &7i64.to_be_bytes(), &256u32.to_be_bytes()];
        assert_eq!(data, parts.concat());
    }

    #[test]
    fn a_key_is_made_once_and_found_again() {
        let directory = tempfile::tempdir().unwrap();
        let made = KeyEncryptionKey::load(None, directory.path(), true).unwrap();
        for may_create in [true, false] {
            let found = KeyEncryptionKey::load(None, directory.path(), may_create).unwrap();
            assert!(found.key.same_as(&made.key));
        }
        let mode = fs::metadata(directory.path().join("kek")).unwrap().permissions().mode();
        assert_eq!(mode & 0o7777, 0o600);
    }

    #[test]
    fn a_missing_key_is_not_made_unless_allowed() {
        let directory = tempfile::tempdir().unwrap();
        let sentence = load_refused(None, directory.path(), false);
        let path = directory.path().join("kek");
        assert!(sentence.contains(path.to_str().unwrap()) && sentence.contains("volcrypt.kek"), "{sentence}");
        assert!(sentence.contains("restore it from backup"), "{sentence}");
        assert!(!path.exists());
    }

    #[test]
    fn the_credential_comes_first_in_bytes_or_in_digits() {
        let directory = tempfile::tempdir().unwrap();
        let credentials = tempfile::tempdir().unwrap();
        let path = credentials.path().join(CREDENTIAL);
        KeyEncryptionKey::load(Some(credentials.path()), directory.path(), true).unwrap();
        let digits = "00ff".repeat(16);
        for content in [&[0, 255].repeat(16)[..], digits.as_bytes(), format!("{digits}\n").to_uppercase().as_bytes()] {
            put(&path, content);
            let kek = KeyEncryptionKey::load(Some(credentials.path()), directory.path(), false).unwrap();
            assert_eq!(kek.key.bytes(), [0, 255].repeat(16));
        }
        for content in [&b"short"[..], &[b'g'; 64], &[b'0'; 63], &[b'0'; 66], &[0; 33], b""] {
            put(&path, content);
            // A broken credential is never passed over for the file.
            let sentence = load_refused(Some(credentials.path()), directory.path(), true);
            assert!(sentence.contains(path.to_str().unwrap()), "{sentence}");
        }
    }

    #[test]
    fn a_key_file_that_others_can_read_is_refused_and_kept() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("kek");
        put(&path, &[7; 32]);
        fs::set_permissions(&path, Permissions::from_mode(0o644)).unwrap();
        assert!(load_refused(None, directory.path(), true).contains("open to others"));
        assert_eq!(fs::read(&path).unwrap(), [7; 32]);
    }
}
