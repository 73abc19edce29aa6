//! The embedded key manager: wrapped keys in volcrypt's own database.

use std::path::Path;
use std::sync::Arc;

use super::{Description, Key, KeyEncryptionKey, KeyInfo, KeyManager};
use crate::policy::KeySize;
use crate::refusal::{Reason, Refusal};
use crate::store::{Store, WrappedKey, seconds_now};
use crate::volume::VolumeId;

/// The version of the one record that every key has.
const VERSION: u32 = 1;

/// Keeps volume keys in the database, wrapped by a [`KeyEncryptionKey`] that is kept elsewhere: in a
/// systemd credential, or in a file of its own.
pub struct EmbeddedKeyManager {
    store: Arc<Store>,
    kek: KeyEncryptionKey,
}

impl EmbeddedKeyManager {
    /// Opens the keys in `store` with the key-encryption key that [`KeyEncryptionKey::load`] finds in
    /// `credentials` or `directory`. It is made only for a database that never had one.
    ///
    /// # Errors
    /// [`Reason::NoKey`] when the key-encryption key is missing, unusable, or not the one the database
    /// was made with; [`Reason::StoreUnavailable`] when the database fails.
    pub fn open(store: Arc<Store>, credentials: Option<&Path>, directory: &Path) -> Result<Self, Refusal> {
        let expected = store.kek_check_value()?;
        let may_create = expected.is_none() && !store.has_keys()?;
        let kek = KeyEncryptionKey::load(credentials, directory, may_create)?;
        let found = kek.check_value();
        let expected = match expected {
            Some(expected) => expected,
            None => store.tie_to_kek(found)?,
        };
        if found != expected {
            return Err(Refusal::new(
                Reason::NoKey,
                format!(
                    "the key-encryption key is not the one {} was made with: restore the credential volcrypt.kek or {} \
                     from backup (check value {expected}, found {found})",
                    store.path().display(),
                    directory.join("kek").display()
                ),
            ));
        }
        Ok(EmbeddedKeyManager { store, kek })
    }

    /// Opens a record that was found.
    fn unwrap(&self, record: &WrappedKey) -> Result<Key, Refusal> {
        let info = &record.info;
        let Some(wrapped) = &record.wrapped else {
            return Err(Refusal::new(
                Reason::KeyDestroyed,
                format!(
                    "the key of volume {0} was destroyed and its data can never be read again: to use the device anew, \
                     have a rule give it another id",
                    info.volume
                ),
            ));
        };
        self.kek.unwrap(&info.volume, info.version, info.key_size, wrapped)
    }

    /// Opens a record that was found, if its key has `size`.
    fn unwrap_sized(&self, record: &WrappedKey, size: KeySize) -> Result<Key, Refusal> {
        let key = self.unwrap(record)?;
        match record.info.key_size == size {
            true => Ok(key),
            false => Err(Refusal::new(
                Reason::Configuration,
                format!(
                    "volume {} has a key of {} bits already, {} are asked for: use a profile with key_size = {}",
                    record.info.volume,
                    record.info.key_size.bits(),
                    size.bits(),
                    record.info.key_size.bits()
                ),
            )),
        }
    }
}

impl EmbeddedKeyManager {
    /// As [`create`](KeyManager::create), for a volume of which nothing has to be known elsewhere.
    ///
    /// # Errors
    /// As [`get`](KeyManager::get), and [`Reason::Configuration`] when there is a key of another size.
    /// After an error the volume has either no key or a correct one.
    pub fn make(&self, volume: &VolumeId, size: KeySize) -> Result<Key, Refusal> {
        if let Some(record) = self.store.wrapped_key(volume)? {
            return self.unwrap_sized(&record, size);
        }
        let key = Key::random(size)?;
        let wrapped = self.kek.wrap(volume, VERSION, &key)?;
        // Nothing is stored that does not open.
        self.compare(volume, &key, self.kek.unwrap(volume, VERSION, size, &wrapped)?)?;
        let info = KeyInfo {
            volume: volume.clone(),
            key_size: size,
            version: VERSION,
            created_at: seconds_now(),
            destroyed: false,
        };
        let stored = self.store.insert_key(&info, &wrapped)?;
        let record = self.store.wrapped_key_from_disk(volume)?.ok_or_else(|| no_key(volume))?;
        let read = self.unwrap_sized(&record, size)?;
        match stored {
            true => self.compare(volume, &key, read),
            // Somebody else made one meanwhile; that is the volume's key.
            false => Ok(read),
        }
    }
}

impl KeyManager for EmbeddedKeyManager {
    /// # Errors
    /// [`Reason::NoKey`] when there is no key or its record is damaged, [`Reason::KeyDestroyed`] when it
    /// was destroyed, [`Reason::StoreUnavailable`] when the database cannot be read.
    fn get(&self, volume: &VolumeId) -> Result<Key, Refusal> {
        match self.store.wrapped_key(volume)? {
            Some(record) => self.unwrap(&record),
            None => Err(no_key(volume)),
        }
    }

    /// # Errors
    /// Those of [`EmbeddedKeyManager::make`].
    fn create(&self, volume: &VolumeId, wanted: &Description) -> Result<(Key, Description), Refusal> {
        Ok((self.make(volume, wanted.key_size)?, wanted.clone()))
    }

    /// The record stays, so that the key is known to be destroyed. To destroy it again is no error.
    ///
    /// # Errors
    /// [`Reason::NoKey`] when there never was a key, [`Reason::StoreUnavailable`] when the database cannot
    /// be written, or when another process kept the wrapped key from being wiped.
    fn destroy(&self, volume: &VolumeId) -> Result<(), Refusal> {
        match self.store.destroy_keys(volume, seconds_now())? {
            true => Ok(()),
            false => Err(no_key(volume)),
        }
    }

    fn list(&self) -> Result<Vec<KeyInfo>, Refusal> {
        self.store.key_infos()
    }
}

impl EmbeddedKeyManager {
    fn compare(&self, volume: &VolumeId, made: &Key, read: Key) -> Result<Key, Refusal> {
        match read.same_as(made) {
            true => Ok(read),
            false => Err(Refusal::new(
                Reason::StoreUnavailable,
                format!(
                    "the new key of volume {volume} is not what {} gave back, and was not used: check the machine's \
                     memory and the disk",
                    self.store.path().display()
                ),
            )),
        }
    }
}

fn no_key(volume: &VolumeId) -> Refusal {
    Refusal::new(
        Reason::NoKey,
        format!("volume {volume} has no key here: if it was enrolled, restore the key store from backup"),
    )
}

#[cfg(test)]
mod tests;
