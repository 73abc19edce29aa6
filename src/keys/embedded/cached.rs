//! Keys of a key server that are kept on this host are wrapped by the same key-encryption keys.

use super::EmbeddedKeyManager;
use crate::keys::{CheckValue, Key, KeyEncryptionKey, KeyHandle};
use crate::refusal::Refusal;
use crate::store::{CachedKey, Kept, Store};
use crate::volume::VolumeId;

impl EmbeddedKeyManager {
    /// The database.
    pub(in crate::keys) fn store(&self) -> &Store {
        &self.store
    }

    /// Keeps `key`, the one of `volume` that `handle` names, which `server` gave at `fetched_at`, durably. Returns whether it
    /// is kept: not for a volume that was retired or destroyed.
    ///
    /// # Errors
    /// When there is no randomness, and when the database cannot be written.
    pub(in crate::keys) fn keep(
        &self,
        (volume, handle): (&VolumeId, &KeyHandle),
        server: &str,
        fetched_at: i64,
        key: &Key,
    ) -> Result<bool, Refusal> {
        let Ok(key_size) = (key.bits() as u32).try_into() else { return Ok(false) };
        let mut ring = self.ring();
        loop {
            let (kek, wrapper) = &ring.current;
            let wrapped = wrapper.wrap_cached((volume, handle), server, fetched_at, key)?;
            let (volume, server) = (volume.clone(), server.to_owned());
            let kept = CachedKey { volume, key: handle.clone(), server, key_size, wrapped, kek: *kek, fetched_at };
            match self.store.cache_key(&kept)? {
                Kept::Stored => return Ok(true),
                Kept::NotEnrolled => return Ok(false),
                Kept::OtherKek => ring = self.reload()?,
            }
        }
    }

    /// Opens a key that is kept.
    ///
    /// # Errors
    /// When its key-encryption key is missing, and when it is not as it was written.
    pub(in crate::keys) fn open_kept(&self, kept: &CachedKey) -> Result<Key, Refusal> {
        if let Some(kek) = self.ring().by(kept.kek) {
            return kek.unwrap_cached(kept);
        }
        // A rotation began elsewhere, or ended since the row was read.
        match self.reload()?.by(kept.kek) {
            Some(kek) => kek.unwrap_cached(kept),
            None => Err(self.missing(kept.kek)),
        }
    }

    /// Has `new` wrap the kept keys that `old` wraps. What cannot be opened is wiped: the server has it.
    pub(super) fn rewrap_kept(&self, old: CheckValue) -> Result<(), Refusal> {
        let ring = self.ring();
        let (new, wrapper) = &ring.current;
        let mut rewrapped = Vec::new();
        for kept in self.store.cached_keys()?.into_iter().filter(|kept| kept.kek == old) {
            if let Some(wrapped) = ring.by(old).and_then(|kek| rewrap(kek, wrapper, &kept)) {
                rewrapped.push((kept, wrapped));
            }
        }
        self.store.rewrap_cached(&rewrapped, *new)?;
        if self.store.drop_cached_by(old)? > 0 {
            tracing::warn!("keys in the cache that could not be rewrapped were wiped: the key server has them");
        }
        Ok(())
    }
}

fn rewrap(old: &KeyEncryptionKey, new: &KeyEncryptionKey, kept: &CachedKey) -> Option<Vec<u8>> {
    let key = old.unwrap_cached(kept).ok()?;
    new.wrap_cached((&kept.volume, &kept.key), &kept.server, kept.fetched_at, &key).ok()
}
