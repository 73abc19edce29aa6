use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::keys::Key;
use crate::volume::VolumeId;

/// How long a key that was fetched ahead waits for its use.
pub(super) const HELD_FOR: Duration = Duration::from_secs(60);
/// How many there may be. Each has a page of locked memory.
const MOST: usize = 256;

/// Keys that were fetched ahead, in locked memory, for a short time.
#[derive(Default)]
pub(super) struct Held(Mutex<HashMap<VolumeId, (Key, Instant)>>);

impl Held {
    /// Holds a copy of `key` from `now` on.
    pub(super) fn put(&self, volume: &VolumeId, key: &Key, now: Instant) {
        let mut held = self.held();
        if held.len() < MOST
            && let Ok(copy) = key.copy()
        {
            held.insert(volume.clone(), (copy, now));
        }
    }

    /// The key of `volume`, if it is held.
    pub(super) fn get(&self, volume: &VolumeId, now: Instant) -> Option<Key> {
        let held = self.held();
        let (key, since) = held.get(volume)?;
        (now.saturating_duration_since(*since) < HELD_FOR).then(|| key.copy().ok())?
    }

    /// Wipes the key of `volume`.
    pub(super) fn remove(&self, volume: &VolumeId) {
        self.held().remove(volume);
    }

    /// Wipes those that were held for long enough; returns when the next one will have been.
    pub(super) fn expire(&self, now: Instant) -> Option<Instant> {
        let mut held = self.held();
        held.retain(|_, (_, since)| now.saturating_duration_since(*since) < HELD_FOR);
        held.values().map(|(_, since)| *since + HELD_FOR).min()
    }

    fn held(&self) -> MutexGuard<'_, HashMap<VolumeId, (Key, Instant)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_held_for_a_minute() {
        let held = Held::default();
        let (volume, key) = ("one".parse().unwrap(), Key::random(256.try_into().unwrap()).unwrap());
        let now = Instant::now();
        held.put(&volume, &key, now);
        let almost = now + HELD_FOR - Duration::from_millis(1);
        assert!(held.get(&volume, almost).is_some_and(|held| held.same_as(&key)));
        assert_eq!(held.expire(almost), Some(now + HELD_FOR));
        assert!(held.get(&volume, now + HELD_FOR).is_none());
        assert_eq!(held.expire(now + HELD_FOR), None);
        assert!(held.held().is_empty(), "and wiped");
        for number in 0..2 * MOST {
            held.put(&format!("v{number}").parse().unwrap(), &key, now);
        }
        assert_eq!(held.held().len(), MOST);
    }
}
