//! The embedded key manager: wrapped keys in volcrypt's own database.

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use super::kek::CREDENTIAL;
use super::kek_places::{Found, KekPlaces};
use super::{
    Capabilities, CheckValue, Description, FIRST_VERSION, Imported, KekRotation, Key, KeyEncryptionKey, KeyHandle,
    KeyInfo, KeyManager, RecordedKey, RotationStep, other_key,
};
use crate::policy::KeySize;
use crate::refusal::{Reason, Refusal};
use crate::store::{Inserted, Keks, Store, WrappedKey, seconds_now};
use crate::volume::VolumeId;

mod cached;
mod rotation;

use rotation::Pace;

/// Keeps volume keys in the database, wrapped by a [`KeyEncryptionKey`] that is kept elsewhere: in a
/// systemd credential, or in a file of its own. While it is replaced, there are two.
pub struct EmbeddedKeyManager {
    store: Arc<Store>,
    places: KekPlaces,
    ring: RwLock<Arc<Ring>>,
    rotating: Mutex<()>,
    pace: Pace,
}

/// The key-encryption keys in use.
struct Ring {
    current: (CheckValue, KeyEncryptionKey),
    /// The one that is on its way out, if it is there.
    outgoing: Option<(CheckValue, Arc<KeyEncryptionKey>)>,
}

impl Ring {
    fn by(&self, value: CheckValue) -> Option<&KeyEncryptionKey> {
        match &self.outgoing {
            _ if self.current.0 == value => Some(&self.current.1),
            Some((own, kek)) if *own == value => Some(kek),
            _ => None,
        }
    }
}

impl EmbeddedKeyManager {
    /// Opens the keys in `store` with the key-encryption key that [`KeyEncryptionKey::load`] finds in
    /// `credentials` or `directory`, or with the two that are in use while one takes the other's place. It is made only
    /// for a database that never had one. A credential counts at once where nothing is wrapped yet; where another key that
    /// is in a file wraps something, that file is still used.
    ///
    /// # Errors
    /// [`Reason::NoKey`] when the key-encryption key is missing, unusable, or not the one that the database
    /// is used with; [`Reason::StoreUnavailable`] when the database fails.
    pub fn open(store: Arc<Store>, credentials: Option<&Path>, directory: &Path) -> Result<Self, Refusal> {
        let places = KekPlaces::new(credentials, directory);
        match store.keks()? {
            Keks { current: None, .. } => {
                let kek = places.first(!store.has_keys()?)?;
                store.tie_to_kek(kek.check_value())?;
            }
            Keks { current: Some(unused), outgoing: None } => take_up_credential(&store, &places, unused)?,
            Keks { current: Some(_), outgoing: Some(_) } => {}
        }
        let ring = RwLock::new(Arc::new(load(&store, &places, None)?));
        let manager = EmbeddedKeyManager { store, places, ring, rotating: Mutex::default(), pace: Pace::default() };
        if let Keks { current: Some(new), outgoing: Some(old) } = manager.store.keks()? {
            tracing::warn!(
                "the key-encryption key {old} is being replaced by {new}, which was broken off: run 'volcrypt key \
                 rotate-kek' to go on"
            );
            if manager.ring().outgoing.is_none() && manager.store.count_keys_wrapped_by(old)? > 0 {
                tracing::error!("{}", manager.missing(old));
            }
        }
        Ok(manager)
    }

    /// Opens every key, and if they are the volumes' keys (`are_used`) and not left over from another key manager, holds
    /// those of volumes that have a record against it. Returns how many there are.
    ///
    /// # Errors
    /// Those of the first key that does not open or is not the right one.
    pub fn check_all(&self, are_used: bool) -> Result<u64, Refusal> {
        let mut checked = 0;
        for info in self.store.key_infos()?.iter().filter(|info| !info.destroyed) {
            let mut key = self.version(&info.volume, info.key.version)?;
            if are_used && let Some(record) = self.store.volume(&info.volume)? {
                if record.key != info.key {
                    key = self.get_enrolled(&record.recorded_key())?;
                }
                if key.check_value(&info.volume) != record.check_value {
                    return Err(Refusal::new(
                        Reason::WrongKey,
                        format!("the key of volume {} is not the one it was enrolled with", info.volume),
                    ));
                }
            }
            checked += 1;
        }
        Ok(checked)
    }

    fn ring(&self) -> Arc<Ring> {
        Arc::clone(&self.ring.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Looks anew which key-encryption keys are in use.
    fn reload(&self) -> Result<Arc<Ring>, Refusal> {
        let ring = Arc::new(load(&self.store, &self.places, Some(&self.ring()))?);
        *self.ring.write().unwrap_or_else(PoisonError::into_inner) = Arc::clone(&ring);
        Ok(ring)
    }

    /// The key of `volume` that has `version`.
    fn version(&self, volume: &VolumeId, version: u32) -> Result<Key, Refusal> {
        match self.store.wrapped_key_of(volume, version)? {
            Some(record) => self.unwrap(&record),
            None => Err(no_key(volume)),
        }
    }

    /// The database, as sentences call it.
    fn place(&self) -> String {
        self.store.path().display().to_string()
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
        let Some(by) = record.kek else {
            return Err(Refusal::new(
                Reason::NoKey,
                format!(
                    "the key record of volume {} is damaged (nothing says what wraps it): restore the database from backup",
                    info.volume
                ),
            ));
        };
        if let Some(kek) = self.ring().by(by) {
            return kek.unwrap(&info.volume, info.key.version, info.key_size, wrapped);
        }
        // A rotation began elsewhere, or ended since the record was read.
        let ring = self.reload()?;
        if let Some(kek) = ring.by(by) {
            return kek.unwrap(&info.volume, info.key.version, info.key_size, wrapped);
        }
        match self.store.wrapped_key_of(&info.volume, info.key.version)? {
            Some(WrappedKey { info, wrapped: Some(wrapped), kek: Some(now) }) if now != by => match ring.by(now) {
                Some(kek) => kek.unwrap(&info.volume, info.key.version, info.key_size, &wrapped),
                None => Err(self.missing(now)),
            },
            _ => Err(self.missing(by)),
        }
    }

    fn missing(&self, kek: CheckValue) -> Refusal {
        Refusal::new(
            Reason::NoKey,
            format!(
                "the key-encryption key with check value {kek} is missing, which keys in {} still need: {}, and run \
                 'systemctl restart volcryptd'",
                self.store.path().display(),
                self.places.way_back()
            ),
        )
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
        self.make_or_find(volume, size).map(|(key, _)| key)
    }

    /// The same, with the key's version.
    fn make_or_find(&self, volume: &VolumeId, size: KeySize) -> Result<(Key, u32), Refusal> {
        if let Some(record) = self.store.wrapped_key(volume)? {
            return Ok((self.unwrap_sized(&record, size)?, record.info.key.version));
        }
        let key = Key::random(size)?;
        let info = KeyInfo {
            volume: volume.clone(),
            key: KeyHandle::of(volume, FIRST_VERSION),
            key_size: size,
            created_at: seconds_now(),
            destroyed: false,
            hosts: Vec::new(),
        };
        let inserted = self.insert(&info, &key)?;
        let record = self.store.wrapped_key_from_disk(volume, None)?.ok_or_else(|| no_key(volume))?;
        let read = self.unwrap_sized(&record, size)?;
        let read = match inserted {
            Inserted::Stored => self.compare(volume, &key, read)?,
            // Somebody else made one meanwhile; that is the volume's key.
            _ => read,
        };
        Ok((read, record.info.key.version))
    }

    /// Stores `key` if the volume has none.
    fn insert(&self, info: &KeyInfo, key: &Key) -> Result<Inserted, Refusal> {
        let KeyInfo { volume, key: KeyHandle { version, .. }, key_size, .. } = info;
        let mut ring = self.ring();
        loop {
            let (value, kek) = &ring.current;
            let wrapped = kek.wrap(volume, *version, key)?;
            // Nothing is stored that does not open.
            self.compare(volume, key, kek.unwrap(volume, *version, *key_size, &wrapped)?)?;
            match self.store.insert_key(info, &wrapped, *value)? {
                Inserted::OtherKek => ring = self.reload()?,
                inserted => return Ok(inserted),
            }
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
    /// As [`get`](KeyManager::get), and [`Reason::WrongKey`] when only other versions of the key are there.
    fn get_enrolled(&self, key: &RecordedKey) -> Result<Key, Refusal> {
        let (volume, version) = (&key.volume, key.own_version(&self.place())?);
        if let Some(record) = self.store.wrapped_key_of(volume, version)? {
            return self.unwrap(&record);
        }
        Err(match self.store.wrapped_key(volume)? {
            Some(other) => key.other_version(&self.place(), other.info.key.version),
            None => no_key(volume),
        })
    }

    /// # Errors
    /// Those of [`EmbeddedKeyManager::make`].
    fn create(&self, volume: &VolumeId, wanted: &Description) -> Result<(Key, Description), Refusal> {
        let (key, version) = self.make_or_find(volume, wanted.key_size)?;
        Ok((key, wanted.clone().with_key_version(version)))
    }

    /// What has to be known of the volume is in its record. The key is as old as the volume is enrolled, not as it is here.
    fn import(&self, volume: &VolumeId, key: &Key, description: &Description) -> Result<Imported, Refusal> {
        let info = KeyInfo {
            volume: volume.clone(),
            key: KeyHandle::of(volume, description.key_version()),
            key_size: description.key_size,
            created_at: description.enrolled_at(),
            destroyed: false,
            hosts: Vec::new(),
        };
        let inserted = self.insert(&info, key)?;
        let record = match self.store.wrapped_key_from_disk(volume, Some(info.key.version))? {
            Some(record) => record,
            None => self.store.wrapped_key(volume)?.ok_or_else(|| no_key(volume))?,
        };
        let same = self.unwrap(&record)?.same_as(key) && record.info.key == info.key;
        match (inserted, same) {
            (Inserted::Stored, true) => Ok(Imported::Stored),
            (_, true) => Ok(Imported::Present),
            (_, false) => Err(other_key(volume, &self.place())),
        }
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities { lists: true, imports: true, destroys: true, describes: false }
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

    /// Unlike a key that is destroyed, one that is elsewhere leaves no record: it may come back.
    fn forget(&self, volume: &VolumeId) -> Result<(), Refusal> {
        self.store.forget_keys(volume)
    }

    fn records_destruction(&self) -> bool {
        true
    }

    fn list(&self) -> Result<Vec<KeyInfo>, Refusal> {
        self.store.key_infos()
    }

    fn rotate_kek(&self, step: &RotationStep) -> Result<KekRotation, Refusal> {
        let _only_one = self.rotating.lock().unwrap_or_else(PoisonError::into_inner);
        self.rotate(step)
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

/// Has `store`, in which the key-encryption key `unused` wraps nothing, used with the one that has come as a credential
/// since then. What the first question to a new daemon has made is in nobody's way.
fn take_up_credential(store: &Store, places: &KekPlaces, unused: CheckValue) -> Result<(), Refusal> {
    let Some(found) = places.read(false).into_iter().find(Found::is_credential) else { return Ok(()) };
    // One that cannot be read is told of by who needs it.
    let Ok(kek) = found.kek else { return Ok(()) };
    let value = kek.check_value();
    if value != unused && !store.has_keys()? && store.tie_anew(unused, value)? {
        tracing::info!(
            "the key-encryption key is the credential's from now on (check value {value}); the one before ({unused}) wraps \
             nothing, and {} is not needed if it is that",
            places.own_file().display()
        );
    }
    Ok(())
}

/// Finds the key-encryption keys that the database says are in use. One on its way out that is in `before` need not be
/// on the disk any more: as long as this process lives its keys open.
fn load(store: &Store, places: &KekPlaces, before: Option<&Ring>) -> Result<Ring, Refusal> {
    loop {
        let keks = store.keks()?;
        match load_these(keks, store, places, before) {
            // What is in the files may belong to what the database says by now.
            Err(_) if store.keks()? != keks => {}
            loaded => return loaded,
        }
    }
}

fn load_these(keks: Keks, store: &Store, places: &KekPlaces, before: Option<&Ring>) -> Result<Ring, Refusal> {
    let Keks { current: Some(expected), outgoing } = keks else {
        return Err(Refusal::new(
            Reason::NoKey,
            format!(
                "{} does not say which key-encryption key it was made with: restore it from backup",
                store.path().display()
            ),
        ));
    };
    let mut all = places.read(outgoing.is_some());
    let mut take = |value| {
        let at = all.iter().position(|found| found.is(value))?;
        all.swap_remove(at).kek.ok()
    };
    let current = take(expected).or_else(|| passed_over(expected, places));
    let outgoing = outgoing.and_then(|value| {
        let remembered = || before?.outgoing.clone().filter(|(own, _)| *own == value).map(|(_, kek)| kek);
        Some((value, take(value).map(Arc::new).or_else(remembered)?))
    });
    match current {
        Some(current) => Ok(Ring { current: (expected, current), outgoing }),
        None => Err(not_found(expected, all, store, places)),
    }
}

/// The key-encryption key `expected` from a file in whose place there is a credential with another one. Not to take it
/// would lock every volume of the host.
fn passed_over(expected: CheckValue, places: &KekPlaces) -> Option<KeyEncryptionKey> {
    let found = places.read(true).into_iter().find(|found| found.is(expected))?;
    tracing::warn!(
        "the key-encryption key in use (check value {expected}) is that of {}, and not that of the credential {CREDENTIAL}: \
         to have the credential's, name it {CREDENTIAL}.new in the drop-in of volcryptd.service, run 'systemctl restart \
         volcryptd' and 'volcrypt key rotate-kek'",
        found.path.display()
    );
    found.kek.ok()
}

/// Why the key-encryption key `expected` is not among `all`.
fn not_found(expected: CheckValue, all: Vec<Found>, store: &Store, places: &KekPlaces) -> Refusal {
    let mut others = Vec::new();
    for found in all {
        match found.kek {
            Ok(kek) => others.push(format!("found {}", kek.check_value())),
            Err(refusal) => return refusal,
        }
    }
    if others.is_empty() {
        return places.first(false).err().unwrap_or_else(|| no_kek(expected, "not there before", store, places));
    }
    no_kek(expected, &others.join(", "), store, places)
}

fn no_kek(expected: CheckValue, found: &str, store: &Store, places: &KekPlaces) -> Refusal {
    Refusal::new(
        Reason::NoKey,
        format!(
            "the key-encryption key is not the one {} was made with: restore {} from backup (check value {expected}, {found}), \
             and keep what is there now under another name first",
            store.path().display(),
            places.names()
        ),
    )
}

fn no_key(volume: &VolumeId) -> Refusal {
    Refusal::new(
        Reason::NoKey,
        format!("volume {volume} has no key here: if it was enrolled, restore the key store from backup"),
    )
}

#[cfg(test)]
mod tests;
