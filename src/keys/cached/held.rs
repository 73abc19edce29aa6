use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::keys::{Key, KeyHandle, RecordedKey};
use crate::volume::VolumeId;

/// How long a key that was fetched ahead waits for its use.
pub(super) const HELD_FOR: Duration = Duration::from_secs(60);
/// How many there may be. Each has a page of locked memory.
const MOST: usize = 256;

/// Keys that were fetched ahead, in locked memory, for a short time.
#[derive(Default)]
pub(super) struct Held(Mutex<HashMap<VolumeId, Entry>>);

struct Entry {
    handle: KeyHandle,
    key: Key,
    since: Instant,
}

impl Held {
    /// Holds a copy of `key`, the one of `volume` that `handle` names, from `now` on.
    pub(super) fn put(&self, volume: &VolumeId, handle: &KeyHandle, key: &Key, now: Instant) {
        let mut held = self.held();
        if held.len() < MOST
            && let Ok(key) = key.copy()
        {
            held.insert(volume.clone(), Entry { handle: handle.clone(), key, since: now });
        }
    }

    /// The key that a record names, if it is held.
    pub(super) fn get(&self, wanted: &RecordedKey, now: Instant) -> Option<Key> {
        let held = self.held();
        let Entry { handle, key, since } = held.get(&wanted.volume)?;
        let is_wanted = *handle == wanted.handle && key.check_value(&wanted.volume) == wanted.check_value;
        (is_wanted && now.saturating_duration_since(*since) < HELD_FOR).then(|| key.copy().ok())?
    }

    /// Wipes the key of `volume`.
    pub(super) fn remove(&self, volume: &VolumeId) {
        self.held().remove(volume);
    }

    /// Wipes those that were held for long enough; returns when the next one will have been.
    pub(super) fn expire(&self, now: Instant) -> Option<Instant> {
        let mut held = self.held();
        held.retain(|_, entry| now.saturating_duration_since(entry.since) < HELD_FOR);
        held.values().map(|entry| entry.since + HELD_FOR).min()
    }

    fn held(&self) -> MutexGuard<'_, HashMap<VolumeId, Entry>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_held_for_a_minute() {
        let held = Held::default();
        let (volume, key): (VolumeId, _) = ("one".parse().unwrap(), Key::random(256.try_into().unwrap()).unwrap());
        let first = KeyHandle::first(&volume);
        let recorded =
            RecordedKey { volume: volume.clone(), handle: first.clone(), check_value: key.check_value(&volume) };
        let now = Instant::now();
        held.put(&volume, &first, &key, now);
        let almost = now + HELD_FOR - Duration::from_millis(1);
        assert!(held.get(&recorded, almost).is_some_and(|held| held.same_as(&key)));
        let second = RecordedKey { handle: KeyHandle::of(&volume, 2), ..recorded.clone() };
        assert!(held.get(&second, almost).is_none(), "it is held as another one");
        assert_eq!(held.expire(almost), Some(now + HELD_FOR));
        assert!(held.get(&recorded, now + HELD_FOR).is_none());
        assert_eq!(held.expire(now + HELD_FOR), None);
        assert!(held.held().is_empty(), "and wiped");
        for number in 0..2 * MOST {
            held.put(&format!("v{number}").parse().unwrap(), &first, &key, now);
        }
        assert_eq!(held.held().len(), MOST);
    }
}
