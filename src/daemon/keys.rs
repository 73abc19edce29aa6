//! What the operator is told of keys.

use std::fs;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::broker::Broker;
use crate::keys::{KeyHandle, KeyInfo};
use crate::protocol::{KeyPage, KeyStatus};
use crate::refusal::Refusal;
use crate::store::{Store, VolumeRecord, seconds_now};
use crate::volume::VolumeId;

/// How many keys are told of at once; a message to a client stays far below its limit.
const PAGE: usize = 2000;
/// For how long a list that was begun is gone through. A key manager may take long to make one.
const KEPT_FOR: Duration = Duration::from_secs(300);
const DAY: i64 = 24 * 3600;

/// The list that clients go through.
#[derive(Default)]
pub struct Listing(Mutex<Option<(Instant, Arc<Vec<KeyInfo>>)>>);

impl Listing {
    /// Some of the keys after that of volume `after`.
    ///
    /// # Errors
    /// Those of the key manager and of the database.
    pub fn page(&self, broker: &Broker, after: Option<&VolumeId>) -> Result<KeyPage, Refusal> {
        let all = self.keys(broker, after.is_some())?;
        let begin = after.map_or(0, |after| all.partition_point(|info| info.volume <= *after));
        let mut end = all.len().min(begin + PAGE);
        // All keys of one volume stand together.
        while end > 0 && end < all.len() && all[end].volume == all[end - 1].volume {
            end += 1;
        }
        let keys = all[begin..end].iter().map(|info| status(broker, info.clone())).collect::<Result<Vec<_>, _>>()?;
        let after = (end < all.len()).then(|| all[end - 1].volume.clone());
        Ok(KeyPage { keys, after })
    }

    /// All keys, by volume: as they were when the list was begun, to go on with it.
    fn keys(&self, broker: &Broker, go_on: bool) -> Result<Arc<Vec<KeyInfo>>, Refusal> {
        let kept = self.0.lock().unwrap_or_else(PoisonError::into_inner).clone();
        match kept {
            Some((since, keys)) if go_on && since.elapsed() < KEPT_FOR => Ok(keys),
            _ => {
                // Nobody else waits for the key manager meanwhile.
                let vault = broker.vault()?;
                let mut keys = vault.keys.list()?;
                if vault.keys.foreign().is_some() {
                    keys.extend(foreign_keys(&vault.store)?);
                }
                keys.sort_by(|one, other| (&one.volume, &one.key).cmp(&(&other.volume, &other.key)));
                let keys = Arc::new(keys);
                let kept = (keys.len() > PAGE).then(|| (Instant::now(), Arc::clone(&keys)));
                *self.0.lock().unwrap_or_else(PoisonError::into_inner) = kept;
                Ok(keys)
            }
        }
    }
}

/// The keys that come from secrets of other programs': a key manager does not know for which volumes they are used.
fn foreign_keys(store: &Store) -> Result<Vec<KeyInfo>, Refusal> {
    let mut keys = Vec::new();
    for (volume, foreign) in store.foreign_keys()? {
        let Some(VolumeRecord { key_size, enrolled_at: created_at, .. }) = store.volume(&volume)? else { continue };
        let (key, destroyed, hosts) = (foreign.handle(), false, Vec::new());
        keys.push(KeyInfo { volume, key, key_size, created_at, destroyed, hosts });
    }
    Ok(keys)
}

/// What is known here of a key that the key manager knows `info` of.
fn status(broker: &Broker, mut info: KeyInfo) -> Result<KeyStatus, Refusal> {
    let (config, vault) = (broker.config()?, broker.vault()?);
    let record = vault.store.volume(&info.volume)?.filter(|record| record.key == info.key);
    let volumes = vault.store.volumes_with(&info.key)?;
    let last_use = match &record {
        Some(record) => vault.store.last_use(&record.id)?,
        None => None,
    };
    if let Some(record) = record.filter(|record| record.key == KeyHandle::first(&record.id)) {
        // One that was moved here is older than its key manager knows.
        info.created_at = info.created_at.min(record.enrolled_at);
    }
    if info.hosts.is_empty() && last_use.is_some() {
        let name = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        info.hosts.extend(Some(name.trim().to_owned()).filter(|name| !name.is_empty()));
    }
    info.hosts.sort();
    info.hosts.dedup();
    let age_days = u32::try_from((seconds_now() - info.created_at).max(0) / DAY).unwrap_or(u32::MAX);
    let old = !info.destroyed && config.policy.key_age_days.is_some_and(|most| age_days > most);
    Ok(KeyStatus { info, manager: config.key_manager.kind(), volumes, last_use, age_days, old })
}
