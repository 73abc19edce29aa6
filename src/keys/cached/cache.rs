//! The keys that are kept on the disk.

use std::collections::{BTreeMap, HashSet};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::clock::{Clock, TOLERANCE};
use crate::audit::Hash;
use crate::keys::{EmbeddedKeyManager, Key, KeyHandle, RecordedKey};
use crate::refusal::Refusal;
use crate::store::{CachedKey, Store};
use crate::volume::VolumeId;

/// A key is kept anew when it was kept so many seconds ago, and not each time that the server gives it.
const KEPT_ANEW_AFTER: i64 = 3600;

/// Keys that a key server gave, in the database, wrapped by this host's key-encryption key, for a time.
pub struct KeyCache {
    keks: EmbeddedKeyManager,
    /// What tells the server from others.
    server: String,
    /// In seconds.
    lifetime: i64,
    clock: Clock,
    /// Volumes whose keys may not be used, though they may still be there: what was refused has to be forgotten also
    /// when the database cannot be written.
    refused: Mutex<HashSet<VolumeId>>,
}

impl KeyCache {
    /// The cache in `store` of the keys that `server` gives, each for `lifetime` since it last did. What is kept of
    /// other servers, and for too long, is wiped. The key-encryption key is found as the embedded key manager's is.
    ///
    /// # Errors
    /// When the key-encryption key is missing or unusable, and when the database fails.
    pub fn open(
        store: Arc<Store>,
        credentials: Option<&Path>,
        directory: &Path,
        server: &str,
        lifetime: Duration,
    ) -> Result<Self, Refusal> {
        let latest = latest_seen(&store)?;
        KeyCache::with_clock(store, (credentials, directory), server, lifetime, Clock::of_host(latest))
    }

    /// Wipes whatever is kept in `store`.
    ///
    /// # Errors
    /// When the database cannot be written.
    pub fn wipe(store: &Store) -> Result<(), Refusal> {
        let wiped = store.cache_for(None)?;
        if wiped > 0 {
            tracing::info!("wiped {wiped} cached keys, because none are to be kept");
        }
        Ok(())
    }

    /// The same where a key server has all keys: then the next cache may have another key-encryption key.
    ///
    /// # Errors
    /// When the database cannot be written.
    pub fn switch_off(store: &Store) -> Result<(), Refusal> {
        KeyCache::wipe(store)?;
        match store.keks()?.current {
            Some(_) => store.untie_from_kek(),
            None => Ok(()),
        }
    }

    pub(super) fn with_clock(
        store: Arc<Store>,
        (credentials, directory): (Option<&Path>, &Path),
        server: &str,
        lifetime: Duration,
        clock: Clock,
    ) -> Result<Self, Refusal> {
        let server = Hash::of(server.as_bytes()).to_string();
        let wiped = store.cache_for(Some(&server))?;
        if wiped > 0 {
            tracing::info!("wiped {wiped} cached keys, because another key server is asked now");
        }
        let keks = EmbeddedKeyManager::open(store, credentials, directory).map_err(|refusal| {
            refusal.and(
                "if it is lost, set lifetime_days = 0 in [key_cache], run 'systemctl restart volcryptd', and set it again",
            )
        })?;
        let lifetime = i64::try_from(lifetime.as_secs()).unwrap_or(i64::MAX);
        let cache = KeyCache { keks, server, lifetime, clock, refused: Mutex::default() };
        cache.tidy();
        Ok(cache)
    }

    /// The key-encryption keys that wrap the kept keys.
    pub(super) fn keks(&self) -> &EmbeddedKeyManager {
        &self.keks
    }

    /// For how long keys are kept.
    pub(super) fn lifetime(&self) -> Duration {
        Duration::from_secs(self.lifetime.unsigned_abs())
    }

    /// Keeps a key that the server has just given as the one of `volume` that `handle` names.
    pub(super) fn keep(&self, volume: &VolumeId, handle: &KeyHandle, key: &Key) {
        if let Err(refusal) = self.try_to_keep(volume, handle, key) {
            tracing::warn!(volume = %volume, "the key of volume {volume} is not kept for when no key server answers: {refusal}");
        }
    }

    fn try_to_keep(&self, volume: &VolumeId, handle: &KeyHandle, key: &Key) -> Result<(), Refusal> {
        let now = match self.clock.now() {
            Some(now) => now,
            None => {
                let Some(now) = self.clock.restart(|now| self.keks.store().restart_cache(now))? else {
                    tracing::warn!("this host's clock is wrong, so no keys are kept for when no key server answers");
                    return Ok(());
                };
                tracing::warn!("this host's clock was set back, so the keys that were kept are wiped");
                now
            }
        };
        let present = self.keks.store().cached_key(volume)?;
        let is_new = |kept: &CachedKey| kept.server == self.server && now - kept.fetched_at < KEPT_ANEW_AFTER;
        let is_same =
            |kept: &CachedKey| kept.key == *handle && self.keks.open_kept(kept).is_ok_and(|kept| kept.same_as(key));
        if !present.is_some_and(|kept| is_new(&kept) && is_same(&kept))
            && !self.keks.keep((volume, handle), &self.server, now, key)?
        {
            return Ok(());
        }
        self.refused().remove(volume);
        self.wipe_refused();
        Ok(())
    }

    /// The kept key that a record names, or in words why there is none.
    pub(super) fn load(&self, wanted: &RecordedKey) -> Result<Key, String> {
        let volume = &wanted.volume;
        if self.refused().contains(volume) {
            return Err("its cached key was given up, because a key server refused it".to_owned());
        }
        let kept = match self.keks.store().cached_key(volume) {
            Ok(Some(kept)) if kept.server == self.server && kept.key == wanted.handle => kept,
            Ok(Some(kept)) if kept.server == self.server => {
                return Err(format!(
                    "this host's cache has another key of it ({}, and not {})",
                    kept.key, wanted.handle
                ));
            }
            Ok(_) => return Err("this host's cache does not have it".to_owned()),
            Err(refusal) => return Err(format!("this host's cache cannot be read: {refusal}")),
        };
        let Some(now) = self.clock.now() else {
            return Err("its cached key is not used, because this host's clock is wrong: set it".to_owned());
        };
        if self.is_over(&kept, now) {
            self.evict(volume);
            return Err("the time of its cached key is over".to_owned());
        }
        match self.keks.open_kept(&kept) {
            Ok(key) => Ok(key.cached_since(kept.fetched_at)),
            Err(refusal) => Err(format!("its cached key does not open: {refusal}")),
        }
    }

    /// Forgets the key of `volume` at once.
    pub(super) fn evict(&self, volume: &VolumeId) {
        self.refused().insert(volume.clone());
        match self.keks.store().evict_cached(volume) {
            // It is gone for good.
            Ok(_) => drop(self.refused().remove(volume)),
            Err(refusal) => {
                tracing::error!(volume = %volume, "the cached key of volume {volume} is not used any more, but cannot be wiped: {refusal}")
            }
        }
    }

    /// Wipes what could not be wiped when it was to be, lest the next start of the daemon uses it.
    fn wipe_refused(&self) {
        let refused: Vec<VolumeId> = self.refused().iter().cloned().collect();
        for volume in refused {
            self.evict(&volume);
        }
    }

    /// Wipes the keys whose time is over, and those that could not be wiped when they were to be.
    pub(super) fn tidy(&self) {
        self.wipe_refused();
        let Some(now) = self.clock.now() else { return };
        let store = self.keks.store();
        let wiped = store.expire_cached(now.saturating_sub(self.lifetime), now.saturating_add(TOLERANCE));
        match wiped.and_then(|wiped| store.cache_has_seen(now).map(|()| wiped)) {
            Ok(0) => {}
            Ok(wiped) => tracing::info!("wiped {wiped} cached keys, whose time is over"),
            Err(refusal) => tracing::warn!("cached keys whose time is over cannot be wiped: {refusal}"),
        }
    }

    /// Which key of each volume is kept and can be used, and until when, in seconds since 1970-01-01 UTC.
    ///
    /// # Errors
    /// In words, when none can: why, and behind a semicolon what to do.
    pub(super) fn until(&self) -> Result<BTreeMap<VolumeId, (KeyHandle, i64)>, String> {
        let kept = self.keks.store().cached_keys().map_err(|refusal| refusal.to_string())?;
        let Some(now) = self.clock.now() else {
            return Err("no cached key is used, because this host's clock is wrong; set it".to_owned());
        };
        let usable = |kept: &CachedKey| {
            kept.server == self.server && !self.is_over(kept, now) && self.keks.open_kept(kept).is_ok()
        };
        let refused = self.refused();
        let usable = kept.into_iter().filter(|kept| !refused.contains(&kept.volume) && usable(kept));
        Ok(usable.map(|kept| (kept.volume, (kept.key, kept.fetched_at.saturating_add(self.lifetime)))).collect())
    }

    /// A key that was given at a time that is still to come was kept by a clock that was wrong: nobody knows for how long
    /// it has been here.
    fn is_over(&self, kept: &CachedKey, now: i64) -> bool {
        now.saturating_sub(kept.fetched_at) >= self.lifetime || kept.fetched_at > now.saturating_add(TOLERANCE)
    }

    fn refused(&self) -> MutexGuard<'_, HashSet<VolumeId>> {
        self.refused.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The latest time that is known to have been.
pub(super) fn latest_seen(store: &Store) -> Result<i64, Refusal> {
    let fetched = store.cached_keys()?.into_iter().map(|kept| kept.fetched_at);
    Ok(fetched.chain(store.cache_seen_at()?).max().unwrap_or(0))
}
