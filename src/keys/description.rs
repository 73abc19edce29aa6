use aws_lc_rs::constant_time;
use serde::{Deserialize, Serialize};

use super::{CheckValue, FIRST_VERSION, ForeignKey, Key, KeyHandle, RecordedKey};
use crate::policy::{KeySize, Provider, is_supported};
use crate::refusal::{Reason, Refusal};
use crate::store::{EnrolledDevice, VolumeRecord, VolumeState};
use crate::volume::VolumeId;

/// What has to be known of a volume besides its key: its record without what follows from the key. A key manager that
/// several hosts ask keeps it beside the key, so that each of them reads the volume in the same way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Description {
    device: EnrolledDevice,
    size_bytes: u64,
    profile: String,
    provider: Provider,
    cipher: String,
    /// The size of the volume's key.
    pub key_size: KeySize,
    sector_size: u32,
    enrolled_at: i64,
    #[serde(deserialize_with = "there")]
    owner: Option<String>,
    /// Which of the volume's keys it is. It is left out for the first, as it was when there was no other.
    #[serde(default = "first", skip_serializing_if = "is_first")]
    key_version: u32,
    /// The secret that its key comes from, if volcrypt has not made it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    foreign: Option<ForeignKey>,
}

fn first() -> u32 {
    FIRST_VERSION
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde asks so")]
fn is_first(version: &u32) -> bool {
    *version == FIRST_VERSION
}

/// The version of what is kept. What it says decides what stands on a volume, so no older volcrypt may guess.
const VERSION: u32 = 2;

/// A description as it is kept beside a key, without the seal.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Kept {
    version: u32,
    /// That of the key beside it.
    check_value: CheckValue,
    volume: Description,
}

/// A value that may be null but has to be there: nobody's volume and one whose owner was lost are not the same.
fn there<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Option<String>, D::Error> {
    Option::deserialize(deserializer)
}

impl Description {
    /// That of a volume on `device`, of `size_bytes`, which is encrypted as `profile` says and belongs to `owner`.
    pub fn new(
        device: EnrolledDevice,
        size_bytes: u64,
        (profile_name, profile): (&str, &crate::policy::Profile),
        owner: Option<&str>,
        enrolled_at: i64,
    ) -> Self {
        Description {
            device,
            size_bytes,
            profile: profile_name.to_owned(),
            provider: profile.provider,
            cipher: profile.cipher.clone(),
            key_size: profile.key_size,
            sector_size: profile.sector_size,
            enrolled_at,
            owner: owner.map(str::to_owned),
            key_version: FIRST_VERSION,
            foreign: None,
        }
    }

    /// That of a volume which has a record.
    pub fn of(record: &VolumeRecord) -> Self {
        let VolumeRecord { device, size_bytes, profile, provider, cipher, key_size, sector_size, .. } = record.clone();
        Description {
            device,
            size_bytes,
            profile,
            provider,
            cipher,
            key_size,
            sector_size,
            enrolled_at: record.enrolled_at,
            owner: record.owner.clone(),
            key_version: record.key.version,
            foreign: ForeignKey::named_by(&record.id, &record.key),
        }
    }

    /// The same, where the volume's key comes from a secret that another program has made.
    pub fn with_foreign(self, foreign: ForeignKey) -> Self {
        Description { foreign: Some(foreign), ..self }
    }

    /// The secret that the volume's key comes from; nothing if volcrypt has made it.
    pub fn foreign(&self) -> Option<&ForeignKey> {
        self.foreign.as_ref()
    }

    /// The same, where it is the key number `key_version` that goes with it.
    pub(super) fn with_key_version(self, key_version: u32) -> Self {
        Description { key_version, ..self }
    }

    /// Which of the volume's keys goes with it.
    pub fn key_version(&self) -> u32 {
        self.key_version
    }

    /// When the volume was enrolled, in seconds since 1970-01-01 UTC.
    pub fn enrolled_at(&self) -> i64 {
        self.enrolled_at
    }

    /// Whether what stands on the volume is read in the same way by both: by the same cipher, in the same units, with the
    /// same of its keys.
    pub fn reads_as(&self, other: &Description) -> bool {
        let how = |of: &Description| (of.provider, of.key_size, of.sector_size, of.key_version);
        how(self) == how(other) && (&self.cipher, &self.foreign) == (&other.cipher, &other.foreign)
    }

    /// The record of `volume` with this description and `key`.
    pub fn record(self, volume: &VolumeId, key: &Key) -> VolumeRecord {
        VolumeRecord {
            id: volume.clone(),
            device: self.device,
            size_bytes: self.size_bytes,
            profile: self.profile,
            provider: self.provider,
            cipher: self.cipher,
            key_size: self.key_size,
            sector_size: self.sector_size,
            key: self.foreign.map_or_else(|| KeyHandle::of(volume, self.key_version), |foreign| foreign.handle()),
            check_value: key.check_value(volume),
            enrolled_at: self.enrolled_at,
            state: VolumeState::Enrolled,
            owner: self.owner,
        }
    }

    /// Whether the key of `volume` that goes with it has the size that is `wanted`.
    ///
    /// # Errors
    /// [`Reason::Configuration`] when it has another one.
    pub fn check_size(&self, volume: &VolumeId, wanted: &Description) -> Result<(), Refusal> {
        match self.key_size == wanted.key_size {
            true => Ok(()),
            false => Err(Refusal::new(
                Reason::Configuration,
                format!(
                    "volume {volume} has a key of {0} bits already, {1} are asked for: use a profile with key_size = {0}",
                    self.key_size.bits(),
                    wanted.key_size.bits()
                ),
            )),
        }
    }

    /// As it is kept beside the `key` of `volume`: one line of JSON, a space, and in hexadecimal digits the seal, by which
    /// all of the line is known to be what was written for this key and this volume.
    ///
    /// # Errors
    /// Never, in practice: it holds texts and numbers only.
    pub fn to_text(&self, volume: &VolumeId, key: &Key) -> Result<String, serde_json::Error> {
        let kept = Kept { version: VERSION, check_value: key.check_value(volume), volume: self.clone() };
        let text = serde_json::to_string(&kept)?;
        let seal = hexadecimal(&key.seal(volume, &text));
        Ok(format!("{text} {seal}"))
    }
}

/// A description that came back from elsewhere. Only the key that it was written for shows that nobody has changed it.
pub struct SealedDescription {
    text: String,
    seal: String,
    /// The check value of the key that it was written for, by its own word.
    pub check_value: CheckValue,
    description: Description,
}

impl SealedDescription {
    /// What [`Description::to_text`] wrote.
    ///
    /// # Errors
    /// In words, when it is not that, names no device, or asks for a cipher or a sector size that no profile could.
    pub fn parse(text: &str) -> Result<Self, String> {
        let (text, seal) = text
            .rsplit_once(' ')
            .filter(|(_, seal)| seal.len() == 64 && seal.bytes().all(|byte| byte.is_ascii_hexdigit()))
            .ok_or("it does not end with a seal")?;
        let Kept { version, check_value, volume } = serde_json::from_str(text).map_err(|error| error.to_string())?;
        if version != VERSION {
            return Err(format!("it was written by another volcrypt, version {version} instead of {VERSION}"));
        }
        let Description { device, cipher, key_size, sector_size, .. } = &volume;
        if !is_supported(cipher, *key_size, *sector_size) {
            return Err(format!(
                "cipher {cipher:?} with a key of {} bits in sectors of {sector_size} bytes is not supported",
                key_size.bits()
            ));
        }
        if volume.key_version < FIRST_VERSION {
            return Err(format!("keys are numbered from {FIRST_VERSION} on, and it is for key {}", volume.key_version));
        }
        match *device == EnrolledDevice::default() {
            true => Err("it does not say which device the volume is on".to_owned()),
            false => {
                let (text, seal) = (text.to_owned(), seal.to_owned());
                Ok(SealedDescription { text, seal, check_value, description: volume })
            }
        }
    }

    /// The secret that the key comes from that it was written for, by its own word, if volcrypt has not made that.
    pub fn foreign(&self) -> Option<&ForeignKey> {
        self.description.foreign()
    }

    /// Which of the volume's keys it was written for, by its own word.
    pub fn key_version(&self) -> u32 {
        self.description.key_version
    }

    /// Whether it was written for the key that a record names, by its own word.
    pub(super) fn is_for(&self, key: &RecordedKey) -> bool {
        key.handle == KeyHandle::of(&key.volume, self.key_version()) && self.check_value == key.check_value
    }

    /// The description, if `key` is the one of `volume` that it was written for.
    ///
    /// # Errors
    /// In words that go on from the key's name, when it is another key or something in the description was changed.
    pub fn open(&self, volume: &VolumeId, key: &Key) -> Result<Description, String> {
        let (bits, made_with) = (key.bits(), self.description.key_size.bits());
        if bits != made_with as usize {
            return Err(format!("has {bits} bits and not the {made_with} that it was made with"));
        }
        if key.check_value(volume) != self.check_value {
            return Err("is another one than was made for it".to_owned());
        }
        let seal = hexadecimal(&key.seal(volume, &self.text));
        match constant_time::verify_slices_are_equal(seal.as_bytes(), self.seal.as_bytes()) {
            Ok(()) => Ok(self.description.clone()),
            Err(_) => Err("is the right one, but what is said of the volume beside it was changed".to_owned()),
        }
    }
}

fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keys::PassphraseHash;
    use crate::policy::Profile;

    fn description() -> Description {
        let device = EnrolledDevice { iscsi_target: Some("iqn".into()), lun: Some(1), ..EnrolledDevice::default() };
        Description::new(device, 4096, ("default", &Profile::default()), Some("p1"), 7)
    }

    fn key() -> Key {
        Key::filled(64, |room| {
            room.fill(3);
            Ok(())
        })
        .unwrap()
    }

    #[test]
    fn a_description_comes_back_as_it_was() {
        let volume = "one".parse().unwrap();
        let text = description().to_text(&volume, &key()).unwrap();
        let sealed = SealedDescription::parse(&text).unwrap();
        assert_eq!(sealed.check_value, key().check_value(&volume));
        assert_eq!(sealed.open(&volume, &key()).unwrap(), description());
        assert!(sealed.open(&"other".parse().unwrap(), &key()).is_err());
        assert!(sealed.open(&volume, &Key::random(description().key_size).unwrap()).is_err());
    }

    #[test]
    fn what_was_changed_is_not_what_was_written_with_the_key() {
        let volume = "one".parse().unwrap();
        let text = description().to_text(&volume, &key()).unwrap();
        for (from, to) in [
            ("\"sector_size\":512", "\"sector_size\":4096"),
            ("\"p1\"", "\"p2\""),
            ("\"p1\"", "null"),
            ("\"lun\":1", "\"lun\":2"),
            ("\"size_bytes\":4096", "\"size_bytes\":512"),
            ("\"enrolled_at\":7", "\"enrolled_at\":8"),
            ("{", "{ "),
        ] {
            let changed = text.replacen(from, to, 1);
            assert_ne!(changed, text);
            let sealed = SealedDescription::parse(&changed).unwrap();
            let said = sealed.open(&volume, &key()).unwrap_err();
            assert!(said.contains("was changed"), "{changed}: {said}");
        }
    }

    #[test]
    fn the_first_key_needs_no_number() {
        let volume = "one".parse().unwrap();
        assert!(!description().to_text(&volume, &key()).unwrap().contains("key_version"));
        assert_eq!(description().key_version(), 1);
        let second = Description { key_version: u32::MAX, ..description() };
        let text = second.to_text(&volume, &key()).unwrap();
        let read = SealedDescription::parse(&text).unwrap().open(&volume, &key()).unwrap();
        assert_eq!(read, second);
        assert!(!read.reads_as(&description()), "another key");
        let sealed = SealedDescription::parse(&text).unwrap();
        let named = |version, check_value| {
            sealed.is_for(&RecordedKey { volume: volume.clone(), handle: KeyHandle::of(&volume, version), check_value })
        };
        assert!(named(u32::MAX, key().check_value(&volume)) && !named(1, key().check_value(&volume)));
        assert!(!named(u32::MAX, key().check_value(&"other".parse().unwrap())));
        let record = read.clone().record(&volume, &key());
        assert_eq!(record.key, KeyHandle::of(&volume, u32::MAX));
        assert_eq!(Description::of(&record), read);
    }

    #[test]
    fn a_secret_that_another_program_has_made_is_named() {
        let volume = "one".parse().unwrap();
        let secret = "dfe2418f-8205-4e90-816a-4e8ea2366b48".parse().unwrap();
        let foreign = ForeignKey::hashed(secret, PassphraseHash::Sha256, description().key_size);
        let described = description().with_foreign(foreign.clone());
        assert!(!description().to_text(&volume, &key()).unwrap().contains("foreign"));
        let text = described.to_text(&volume, &key()).unwrap();
        let sealed = SealedDescription::parse(&text).unwrap();
        assert_eq!(sealed.foreign(), Some(&foreign));
        assert_eq!(sealed.open(&volume, &key()).unwrap(), described);
        assert!(!described.reads_as(&description()), "another key");
        let record = described.clone().record(&volume, &key());
        assert_eq!(record.key, foreign.handle());
        assert_eq!(Description::of(&record), described);
    }

    #[test]
    fn what_cannot_be_meant_is_refused() {
        let text = description().to_text(&"one".parse().unwrap(), &key()).unwrap();
        for (from, to) in [
            ("aes-xts-plain64", "cipher_null"),
            ("aes-xts-plain64", "aes-xts-plain64 0 8:0 0"),
            ("\"key_size\":512", "\"key_size\":128"),
            ("\"key_size\":512", "\"key_size\":7"),
            ("\"sector_size\":512", "\"sector_size\":513"),
            ("\"provider\":\"plain\"", "\"provider\":\"none\""),
            ("{", "["),
            ("\"version\":2", "\"version\":1"),
            ("\"version\":2", "\"version\":2,\"iv_offset\":8"),
            ("\"size_bytes\"", "\"iv_offset\":8,\"size_bytes\""),
            ("\"size_bytes\"", "\"key_version\":0,\"size_bytes\""),
            ("\"size_bytes\"", "\"key_version\":-1,\"size_bytes\""),
            ("\"size_bytes\"", "\"key_version\":4294967296,\"size_bytes\""),
            ("\"size_bytes\"", "\"key_version\":\"2\",\"size_bytes\""),
            ("\"size_bytes\"", "\"key_version\":null,\"size_bytes\""),
            ("\"iscsi_target\":\"iqn\",\"lun\":1", "\"iscsi_target\":null,\"lun\":null"),
            (",\"owner\":\"p1\"", ""),
            ("\"size_bytes\"", "\"foreign\":\"x\",\"size_bytes\""),
            ("} ", "}"),
            ("} ", "} 0"),
        ] {
            let changed = text.replacen(from, to, 1);
            assert_ne!(changed, text);
            assert!(SealedDescription::parse(&changed).is_err(), "{changed}");
        }
    }
}
