use std::fmt;

use serde::{Deserialize, Serialize};
use toml::Spanned;

use super::error::Fault;
use super::file::ProfileTable;

/// The ciphers that may be used, in dm-crypt's notation, with the sizes of their keys in bits. XTS
/// takes two keys of the same size at once.
const CIPHERS: [(&str, [u32; 2]); 4] = [
    ("aes-xts-plain64", [256, 512]),
    ("aes-cbc-essiv:sha256", [128, 256]),
    ("serpent-xts-plain64", [256, 512]),
    ("twofish-xts-plain64", [256, 512]),
];
/// The units of encryption that dm-crypt can use, in bytes.
const SECTOR_SIZES: [u32; 4] = [512, 1024, 2048, 4096];
/// What `is_name` asks for, as an instruction.
pub(super) const NAME_RULE: &str = "use 1 to 64 letters, digits, '.', '_' or '-'";

/// Whether `text` can name a rule or a profile. Names stand in messages and records.
pub(super) fn is_name(text: &str) -> bool {
    let valid_byte = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    (1..=64).contains(&text.len()) && text.bytes().all(valid_byte)
}

/// Whether a profile could ask for these: what is pinned in a volume's record and came from elsewhere.
pub(crate) fn is_supported(cipher: &str, key_size: KeySize, sector_size: u32) -> bool {
    let fits = |(name, sizes): &(&str, [u32; 2])| *name == cipher && sizes.contains(&key_size.bits());
    CIPHERS.iter().any(fits) && SECTOR_SIZES.contains(&sector_size)
}

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

impl Profile {
    /// A profile of the file: what it leaves out is as in the built-in one.
    pub(super) fn new(table: ProfileTable) -> Result<Self, Fault> {
        let built_in = Profile::default();
        let cipher = table.cipher.as_ref().map_or(built_in.cipher.as_str(), |cipher| cipher.get_ref().as_str());
        let Some((cipher, sizes)) = CIPHERS.iter().find(|(name, _)| *name == cipher) else {
            let names = CIPHERS.map(|(name, _)| name).join(", ");
            return Err(Fault::new(
                span(&table.cipher),
                format!("cipher {cipher:?} is not supported; use one of {names}"),
            ));
        };
        let bits = table.key_size.as_ref().map_or(i64::from(built_in.key_size.bits()), |size| *size.get_ref());
        let key_size =
            sizes.iter().find(|size| i64::from(**size) == bits).and_then(|size| KeySize::try_from(*size).ok());
        let Some(key_size) = key_size else {
            let [small, large] = sizes;
            let sentence = format!("key_size = {bits} does not fit {cipher}; use key_size = {small} or {large} (bits)");
            let at = if table.key_size.is_some() { span(&table.key_size) } else { span(&table.cipher) };
            return Err(Fault::new(at, sentence));
        };
        let sector = table.sector_size.as_ref().map_or(i64::from(built_in.sector_size), |size| *size.get_ref());
        let Some(&sector_size) = SECTOR_SIZES.iter().find(|size| i64::from(**size) == sector) else {
            let sentence = format!("sector_size = {sector} is not supported; use 512, 1024, 2048 or 4096 (bytes)");
            return Err(Fault::new(span(&table.sector_size), sentence));
        };
        Ok(Profile {
            provider: table.provider.unwrap_or(built_in.provider),
            cipher: (*cipher).to_owned(),
            key_size,
            sector_size,
            allow_discards: table.allow_discards.unwrap_or(built_in.allow_discards),
            no_read_workqueue: table.no_read_workqueue.unwrap_or(built_in.no_read_workqueue),
            no_write_workqueue: table.no_write_workqueue.unwrap_or(built_in.no_write_workqueue),
            submit_from_crypt_cpus: table.submit_from_crypt_cpus.unwrap_or(built_in.submit_from_crypt_cpus),
        })
    }
}

/// The built-in profile: AES-256 in XTS mode without a header, in sectors of 512 bytes.
impl Default for Profile {
    fn default() -> Self {
        Profile {
            provider: Provider::Plain,
            cipher: "aes-xts-plain64".to_owned(),
            key_size: KeySize(512),
            sector_size: 512,
            allow_discards: false,
            no_read_workqueue: false,
            no_write_workqueue: false,
            submit_from_crypt_cpus: false,
        }
    }
}

/// What decides the format, in words: `plain, aes-xts-plain64, 512 bits`.
impl fmt::Display for Profile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, {}, {} bits", self.provider, self.cipher, self.key_size.bits())?;
        match self.sector_size {
            512 => Ok(()),
            size => write!(f, ", sectors of {size} bytes"),
        }
    }
}

/// Where a value stands; the start of the file for one that does not.
fn span<T>(value: &Option<Spanned<T>>) -> std::ops::Range<usize> {
    value.as_ref().map_or(0..0, Spanned::span)
}
