use std::fmt;

use aws_lc_rs::{constant_time, hmac, rand};
use serde::{Deserialize, Serialize};

use crate::policy::KeySize;
use crate::refusal::{Reason, Refusal};
use crate::sys::memory::SecretPages;
use crate::volume::VolumeId;

/// A volume key. It lives in locked memory, is wiped when dropped, and has neither `Debug` nor
/// `Clone`.
pub struct Key {
    pages: SecretPages,
    cached_since: Option<i64>,
}

impl Key {
    /// A fresh random key of `size`.
    ///
    /// # Errors
    /// When no memory can be locked or the kernel gives no randomness.
    pub fn random(size: KeySize) -> Result<Self, Refusal> {
        let mut key = Key::zeroed(size.bytes())?;
        rand::fill(key.pages.bytes_mut()).map_err(|_| {
            Refusal::new(Reason::Kernel, "the system's random number generator failed; no key was made")
        })?;
        Ok(key)
    }

    /// A key of `length` bytes that `fill` writes in place, so that it never stands anywhere else.
    ///
    /// # Errors
    /// When no memory can be locked, and what `fill` returns.
    pub fn filled(length: usize, fill: impl FnOnce(&mut [u8]) -> Result<(), Refusal>) -> Result<Self, Refusal> {
        let mut key = Key::zeroed(length)?;
        fill(key.pages.bytes_mut())?;
        Ok(key)
    }

    fn zeroed(length: usize) -> Result<Self, Refusal> {
        let pages = SecretPages::new(length).map_err(|error| {
            // Not NoKey, which would say of a key server that it has none.
            Refusal::new(
                Reason::Kernel,
                format!("no locked memory for a key ({error}): raise LimitMEMLOCK of volcryptd.service"),
            )
        })?;
        Ok(Key { pages, cached_since: None })
    }

    /// Another one of the same bytes.
    ///
    /// # Errors
    /// When no memory can be locked.
    pub(super) fn copy(&self) -> Result<Self, Refusal> {
        let mut copy = Key::zeroed(self.bytes().len())?;
        copy.pages.bytes_mut().copy_from_slice(self.bytes());
        Ok(Key { cached_since: self.cached_since, ..copy })
    }

    /// The same, as one that this host has kept since the key server gave it at `fetched_at`.
    pub(super) fn cached_since(self, fetched_at: i64) -> Self {
        Key { cached_since: Some(fetched_at), ..self }
    }

    /// When the key server last gave it, in seconds since 1970-01-01 UTC, if that does not answer now.
    pub fn from_cache(&self) -> Option<i64> {
        self.cached_since
    }

    /// The key's bytes. Borrow them for as short a time as possible and copy them nowhere.
    pub fn bytes(&self) -> &[u8] {
        self.pages.bytes()
    }

    /// The key's size in bits.
    pub fn bits(&self) -> usize {
        self.bytes().len() * 8
    }

    /// Whether both keys are the same, in a time that does not depend on where they differ.
    pub fn same_as(&self, other: &Key) -> bool {
        constant_time::verify_slices_are_equal(self.bytes(), other.bytes()).is_ok()
    }

    /// What tells this key from another one without revealing it: the first 16 bytes of
    /// HMAC-SHA-256 under the key over `volcrypt key check v1` NUL and the volume's id.
    pub fn check_value(&self, volume: &VolumeId) -> CheckValue {
        self.check_value_for(b"volcrypt key check v1\0", volume.as_str())
    }

    /// What binds a text about `volume` to this key: HMAC-SHA-256 over the text, under HMAC-SHA-256 under the key over
    /// `volcrypt description key v1` NUL and the volume's id.
    pub(super) fn seal(&self, volume: &VolumeId, text: &str) -> [u8; 32] {
        let mut context = hmac::Context::with_key(&hmac::Key::new(hmac::HMAC_SHA256, self.bytes()));
        context.update(b"volcrypt description key v1\0");
        context.update(volume.as_str().as_bytes());
        let derived = hmac::Key::new(hmac::HMAC_SHA256, context.sign().as_ref());
        let mut seal = [0; 32];
        seal.copy_from_slice(hmac::sign(&derived, text.as_bytes()).as_ref());
        seal
    }

    /// The first 16 bytes of HMAC-SHA-256 under the key over `label` and `name`.
    pub(super) fn check_value_for(&self, label: &[u8], name: &str) -> CheckValue {
        let mut context = hmac::Context::with_key(&hmac::Key::new(hmac::HMAC_SHA256, self.bytes()));
        context.update(label);
        context.update(name.as_bytes());
        let mut value = [0; 16];
        value.copy_from_slice(&context.sign().as_ref()[..16]);
        CheckValue(value)
    }
}

/// The key check value of a volume, kept in its record: 16 bytes, 32 hexadecimal digits as text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct CheckValue([u8; 16]);

impl TryFrom<String> for CheckValue {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let wrong = || format!("{text:?} is not a key check value: 32 hexadecimal digits");
        if text.len() != 32 || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Err(wrong());
        }
        let number = u128::from_str_radix(&text, 16).map_err(|_| wrong())?;
        Ok(CheckValue(number.to_be_bytes()))
    }
}

impl From<CheckValue> for String {
    fn from(value: CheckValue) -> String {
        value.to_string()
    }
}

impl fmt::Display for CheckValue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", u128::from_be_bytes(self.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key_of(byte: u8) -> Key {
        Key::filled(64, |bytes| {
            bytes.fill(byte);
            Ok(())
        })
        .unwrap()
    }

    #[test]
    fn random_keys_differ() {
        let size = KeySize::try_from(512).unwrap();
        let (one, other) = (Key::random(size).unwrap(), Key::random(size).unwrap());
        assert_eq!(one.bits(), 512);
        assert!(one.same_as(&one) && !one.same_as(&other));
    }

    #[test]
    fn a_check_value_depends_on_key_and_volume() {
        let (one, two) = ("one".parse().unwrap(), "two".parse().unwrap());
        let value = key_of(1).check_value(&one);
        assert_eq!(value, key_of(1).check_value(&one));
        assert_ne!(value, key_of(2).check_value(&one));
        assert_ne!(value, key_of(1).check_value(&two));
        assert_eq!(CheckValue::try_from(value.to_string()), Ok(value));
        assert!(CheckValue::try_from("+".repeat(32)).is_err());
    }
}
