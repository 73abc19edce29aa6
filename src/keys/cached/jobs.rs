use std::collections::{HashMap, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::keys::RecordedKey;
use crate::volume::VolumeId;

/// How many volumes are asked for at once.
const MOST_AT_ONCE: usize = 4;
/// How many may wait for that.
const MOST: usize = 1024;

/// The volumes whose keys are asked for without anybody waiting for them, each at most once at a time.
#[derive(Default)]
pub(super) struct Jobs(Mutex<State>);

/// What is to be done with the key of a volume.
struct Job {
    /// Which one it is.
    key: RecordedKey,
    /// Whether it is to be held.
    hold: bool,
}

#[derive(Default)]
struct State {
    queue: VecDeque<VolumeId>,
    /// Those in the queue and those that are being asked for.
    pending: HashMap<VolumeId, Job>,
    workers: usize,
}

impl Jobs {
    /// Has `key` asked for, and held if `hold` says so, unless another one of its volume is being asked for. Returns whether
    /// the caller has to start somebody who calls [`Jobs::next`] until there is none.
    #[must_use]
    pub(super) fn add(&self, key: &RecordedKey, hold: bool) -> bool {
        let mut state = self.state();
        if let Some(job) = state.pending.get_mut(&key.volume) {
            job.hold |= hold && job.key == *key;
            return false;
        }
        if state.pending.len() == MOST {
            return false;
        }
        state.pending.insert(key.volume.clone(), Job { key: key.clone(), hold });
        state.queue.push_back(key.volume.clone());
        let needed = state.workers < MOST_AT_ONCE;
        state.workers += usize::from(needed);
        needed
    }

    /// The next one.
    pub(super) fn next(&self) -> Option<RecordedKey> {
        let mut state = self.state();
        let next = state.queue.pop_front().and_then(|volume| Some(state.pending.get(&volume)?.key.clone()));
        if next.is_none() {
            state.workers -= 1;
        }
        next
    }

    /// Gives up what nobody works on, because nobody could be started.
    pub(super) fn give_up(&self) {
        let mut state = self.state();
        state.workers -= 1;
        if state.workers == 0 {
            let State { queue, pending, .. } = &mut *state;
            for volume in queue.drain(..) {
                pending.remove(&volume);
            }
        }
    }

    /// Whether the key of a volume that is being asked for is to be held.
    pub(super) fn is_to_be_held(&self, volume: &VolumeId) -> bool {
        self.state().pending.get(volume).is_some_and(|job| job.hold)
    }

    /// Notes that `volume` was asked for.
    pub(super) fn end(&self, volume: &VolumeId) {
        self.state().pending.remove(volume);
    }

    /// Whether `volume` is being asked for, or is going to be.
    #[cfg(test)]
    pub(super) fn is_asked_for(&self, volume: &VolumeId) -> bool {
        self.state().pending.contains_key(volume)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keys::KeyHandle;

    #[test]
    fn each_volume_is_asked_for_once_at_a_time_by_a_few_and_not_without_end() {
        let jobs = Jobs::default();
        let volume = |number: usize| -> VolumeId { format!("v{number}").parse().unwrap() };
        let key = |number: usize, version| RecordedKey {
            volume: volume(number),
            handle: KeyHandle::of(&volume(number), version),
            check_value: "0".repeat(32).try_into().unwrap(),
        };
        let started = (0..2 * MOST).filter(|number| jobs.add(&key(*number, 1), false)).count();
        assert_eq!(started, MOST_AT_ONCE);
        assert!(!jobs.add(&key(0, 2), true) && !jobs.is_to_be_held(&volume(0)), "that is another key");
        assert!(!jobs.add(&key(0, 1), true) && jobs.is_to_be_held(&volume(0)));
        assert!(jobs.is_asked_for(&volume(0)));
        let mut done = 0;
        while let Some(key) = jobs.next() {
            jobs.end(&key.volume);
            done += 1;
        }
        assert_eq!(done, MOST);
        assert!(!jobs.is_asked_for(&volume(0)));
        (1..MOST_AT_ONCE).for_each(|_| assert!(jobs.next().is_none(), "all of them have ended"));
        assert!(jobs.add(&key(0, 1), false), "so another one is needed");
        jobs.give_up();
        assert!(!jobs.is_asked_for(&volume(0)));
    }
}
