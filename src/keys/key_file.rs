//! The fixed key of the blueprint's first version, for tests.

use std::path::Path;

use super::secret_file::{self, Trust};
use super::{Capabilities, Description, Imported, Key, KeyInfo, KeyManager, RecordedKey};
use crate::policy::KeySize;
use crate::refusal::{Reason, Refusal};
use crate::volume::VolumeId;

/// The longest key, in bytes.
const LONGEST: usize = 64;

/// Says that whoever opens a [`KeyFileManager`] knows that it is **insecure**: one key for every
/// volume, with ciphertexts that can be swapped between volumes, and no way to destroy one volume's
/// data. Construct it only where the administrator's configuration says so in as many words.
#[derive(Clone, Copy, Debug)]
pub struct OneKeyForEveryVolume;

/// A key manager for tests: one file holds the one key of all volumes.
///
/// The file's bytes are the key: 16, 32 or 64 of them. Nothing is kept for any volume.
pub struct KeyFileManager {
    key: Key,
    size: KeySize,
    path: String,
}

impl KeyFileManager {
    /// Reads the key from `path`.
    ///
    /// # Errors
    /// [`Reason::NoKey`] when the file is missing, belongs to somebody else, can be read by others,
    /// is a symbolic link, or has a length that no key has.
    pub fn open(path: &Path, _insecure: OneKeyForEveryVolume) -> Result<Self, Refusal> {
        let shown = path.display().to_string();
        let key = secret_file::read(path, "the key of all volumes", Trust::Mode, LONGEST)?.ok_or_else(|| {
            Refusal::new(Reason::NoKey, format!("{shown} is not there: put the key of all volumes into that file"))
        })?;
        // At most 512 bits.
        let size = KeySize::try_from(key.bits() as u32).map_err(|_| {
            let found = key.bits();
            Refusal::new(
                Reason::NoKey,
                format!("{shown} holds {found} bits, a key has 128, 256 or 512: replace the file"),
            )
        })?;
        Ok(KeyFileManager { key, size, path: shown })
    }
}

impl KeyFileManager {
    fn sized(&self, volume: &VolumeId, size: KeySize) -> Result<Key, Refusal> {
        if size != self.size {
            return Err(Refusal::new(
                Reason::Configuration,
                format!(
                    "volume {volume} needs a key of {} bits, {} holds one of {} bits: change the profile's key_size or \
                     the file",
                    size.bits(),
                    self.path,
                    self.size.bits()
                ),
            ));
        }
        self.get(volume)
    }
}

impl KeyManager for KeyFileManager {
    /// The one key.
    fn get(&self, _volume: &VolumeId) -> Result<Key, Refusal> {
        Key::filled(self.size.bytes(), |bytes| {
            bytes.copy_from_slice(self.key.bytes());
            Ok(())
        })
    }

    /// The one key, whichever the record names: there is no other.
    fn get_enrolled(&self, key: &RecordedKey) -> Result<Key, Refusal> {
        self.get(&key.volume)
    }

    /// The one key, if it has the size that is asked for.
    fn create(&self, volume: &VolumeId, wanted: &Description) -> Result<(Key, Description), Refusal> {
        self.sized(volume, wanted.key_size).map(|key| (key, wanted.clone()))
    }

    /// Always refused: there is one key for all volumes.
    fn import(&self, volume: &VolumeId, _key: &Key, _description: &Description) -> Result<Imported, Refusal> {
        Err(Refusal::new(
            Reason::Configuration,
            format!(
                "the key of volume {volume} cannot be moved to {}, which holds one key for all volumes: name another key \
                 manager",
                self.path
            ),
        ))
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities { lists: false, imports: false, destroys: false, describes: false }
    }

    /// Always refused: the key is every volume's.
    fn destroy(&self, volume: &VolumeId) -> Result<(), Refusal> {
        Err(Refusal::new(
            Reason::Configuration,
            format!(
                "the key of volume {volume} is the key of all volumes and cannot be destroyed alone: delete {} by hand \
                 if all of them may go",
                self.path
            ),
        ))
    }

    /// Empty: no volume has a key of its own.
    fn list(&self) -> Result<Vec<KeyInfo>, Refusal> {
        Ok(Vec::new())
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, Permissions};
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn open(content: &[u8], mode: u32) -> Result<KeyFileManager, Refusal> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("fixed.key");
        fs::write(&path, content).unwrap();
        fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
        KeyFileManager::open(&path, OneKeyForEveryVolume)
    }

    #[test]
    fn every_volume_gets_the_one_key() {
        for length in [16, 32, 64] {
            let manager = open(&vec![9; length], 0o400).unwrap();
            let size = KeySize::try_from(length as u32 * 8).unwrap();
            for name in ["one", "two"] {
                let volume = name.parse().unwrap();
                assert_eq!(manager.sized(&volume, size).unwrap().bytes(), vec![9; length]);
                assert_eq!(manager.get(&volume).unwrap().bytes(), vec![9; length]);
            }
            assert_eq!(manager.list(), Ok(vec![]));
        }
    }

    #[test]
    fn another_size_is_refused_in_bits() {
        let manager = open(&[9; 32], 0o600).unwrap();
        let refusal = manager.sized(&"one".parse().unwrap(), 512.try_into().unwrap()).err().unwrap();
        let sentence = refusal.to_string();
        assert!(sentence.contains("512 bits") && sentence.contains("256 bits"), "{sentence}");
    }

    #[test]
    fn the_key_of_all_cannot_be_destroyed_for_one() {
        let manager = open(&[9; 32], 0o600).unwrap();
        let volume = "one".parse().unwrap();
        assert!(manager.destroy(&volume).is_err());
        assert!(manager.get(&volume).is_ok());
    }

    #[test]
    fn a_bad_file_is_refused() {
        for (length, mode) in [(32, 0o640), (32, 0o604), (0, 0o600), (31, 0o600), (33, 0o600), (65, 0o600)] {
            let refusal = open(&vec![9; length], mode).err().expect("must be refused");
            assert_eq!(refusal.reason(), Reason::NoKey);
        }
        let missing = KeyFileManager::open(Path::new("/nonexistent/key"), OneKeyForEveryVolume).err().unwrap();
        assert!(missing.to_string().contains("/nonexistent/key"));
    }
}
