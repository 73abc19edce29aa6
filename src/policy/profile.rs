use std::fmt;

use serde::{Deserialize, Serialize};

/// The on-disk format of a protected volume, in OpenStack's word for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Provider {
    /// dm-crypt without a header: the guest sees exactly the size of the volume.
    Plain,
}

impl fmt::Display for Provider {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Provider::Plain => "plain",
        })
    }
}

/// The size of a volume key in bits: 128, 256 or 512 (two keys of 256 bits, for XTS).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "u32", into = "u32")]
pub struct KeySize(u32);

impl KeySize {
    /// The size in bits.
    pub fn bits(self) -> u32 {
        self.0
    }

    /// The size in bytes.
    pub fn bytes(self) -> usize {
        self.0 as usize / 8
    }
}

impl TryFrom<u32> for KeySize {
    type Error = UnsupportedKeySize;

    fn try_from(bits: u32) -> Result<Self, UnsupportedKeySize> {
        match bits {
            128 | 256 | 512 => Ok(KeySize(bits)),
            _ => Err(UnsupportedKeySize(bits)),
        }
    }
}

impl From<KeySize> for u32 {
    fn from(size: KeySize) -> u32 {
        size.0
    }
}

/// A key size that no supported cipher takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnsupportedKeySize(u32);

impl fmt::Display for UnsupportedKeySize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "key_size = {} is not supported: use 128, 256 or 512 bits", self.0)
    }
}

impl std::error::Error for UnsupportedKeySize {}

/// How a volume is encrypted: what the blueprint calls an encryption type.
///
/// `provider`, `cipher`, `key_size` and `sector_size` decide what stands on the volume; they are
/// pinned in its record when it is enrolled. The other fields only steer how dm-crypt works.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Profile {
    /// The on-disk format.
    pub provider: Provider,
    /// The cipher in dm-crypt's notation, for example `aes-xts-plain64`.
    pub cipher: String,
    /// The size of the volume key.
    pub key_size: KeySize,
    /// The unit of encryption in bytes: 512, 1024, 2048 or 4096.
    pub sector_size: u32,
    /// Lets the guest's discards reach the volume (they show which sectors are unused).
    pub allow_discards: bool,
    /// dm-crypt's `no_read_workqueue`.
    pub no_read_workqueue: bool,
    /// dm-crypt's `no_write_workqueue`.
    pub no_write_workqueue: bool,
    /// dm-crypt's `submit_from_crypt_cpus`.
    pub submit_from_crypt_cpus: bool,
}
