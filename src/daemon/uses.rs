use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::audit::{Asker, Event, Kind};
use crate::store::Store;
use crate::volume::VolumeId;

/// How long uses are counted before there is a record of them.
const EVERY: Duration = Duration::from_secs(60);
/// How many uses of a volume's key for the same asker have a record each within that time. QEMU opens a disk
/// two to four times when it is attached.
const MOST: u32 = 60;

/// Which uses of keys are recorded one by one, and how many others there were: a guest that opens its own
/// disk in a loop must not fill the log.
pub struct UseLimit {
    every: Duration,
    most: u32,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    uses: HashMap<Use, Uses>,
    /// Whether somebody is about to record what was counted.
    recording: bool,
    /// Whether the last record could not be written: then none is put off.
    unwritable: bool,
}

/// What makes two uses the same.
type Use = (Asker, VolumeId);

struct Uses {
    since: Instant,
    recorded: u32,
    counted: u64,
}

/// How a use gets into the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// By a record of its own, which has to be written now. So many more were counted before it.
    Record(u64),
    /// It was counted.
    Count,
}

impl Default for UseLimit {
    fn default() -> Self {
        UseLimit::new(EVERY, MOST)
    }
}

impl UseLimit {
    /// At most so many records of the same in so much time.
    pub fn new(every: Duration, most: u32) -> Self {
        UseLimit { every, most, state: Mutex::default() }
    }

    /// For how long uses may be counted without a record of them.
    pub fn every(&self) -> Duration {
        self.every
    }

    /// Says how a use of the key of `volume` for `asker` gets into the log.
    pub fn begin(&self, asker: &Asker, volume: &VolumeId, now: Instant) -> Turn {
        let mut state = self.state();
        let is_recent = |uses: &Uses| now.saturating_duration_since(uses.since) < self.every;
        let key = (asker.clone(), volume.clone());
        if !state.uses.contains_key(&key) {
            state.uses.retain(|_, uses| uses.counted > 0 || is_recent(uses));
        }
        let unwritable = state.unwritable;
        let uses = state.uses.entry(key).or_insert(Uses { since: now, recorded: 0, counted: 0 });
        if !is_recent(uses) {
            (uses.since, uses.recorded) = (now, 0);
        }
        if uses.recorded < self.most || unwritable {
            uses.recorded = uses.recorded.saturating_add(1);
            return Turn::Record(std::mem::take(&mut uses.counted));
        }
        uses.counted += 1;
        Turn::Count
    }

    /// Notes whether a record could be written that stood for `counted` others as well. If it could not, they
    /// are counted again.
    pub fn end(&self, asker: &Asker, volume: &VolumeId, counted: u64, written: bool) {
        let mut state = self.state();
        state.unwritable = !written;
        if !written && counted > 0 {
            let uses = Uses { since: Instant::now(), recorded: self.most, counted: 0 };
            state.uses.entry((asker.clone(), volume.clone())).or_insert(uses).counted += counted;
        }
    }

    /// Whether nobody is about to record what was counted: then it is up to the caller, who waits
    /// [`Self::every`] and calls [`Self::record_counted`].
    pub fn begin_recording(&self) -> bool {
        !std::mem::replace(&mut self.state().recording, true)
    }

    /// Gives that up.
    pub fn give_up_recording(&self) {
        self.state().recording = false;
    }

    /// Records what was counted. Whether that has to be done once more, after the same time.
    pub fn record_counted(&self, store: &Store) -> bool {
        let counted: Vec<(Use, u64)> = {
            let mut state = self.state();
            let counted = state.uses.iter_mut().filter(|(_, uses)| uses.counted > 0);
            counted.map(|(key, uses)| (key.clone(), std::mem::take(&mut uses.counted))).collect()
        };
        for ((asker, volume), counted) in counted {
            let detail = format!("{counted} times more since it was last recorded");
            let event = asker.clone().ask(|| Event::new(Kind::KeyUsed, &volume, detail));
            let appended = store.append_audit(event);
            self.end(&asker, &volume, counted, appended.is_ok());
            if let Err(refusal) = appended {
                tracing::error!(volume = %volume, "{counted} uses of the key of volume {volume} are not in the audit log yet: {refusal}");
            }
        }
        let mut state = self.state();
        state.recording = state.uses.values().any(|uses| uses.counted > 0);
        state.recording
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_too_much_is_counted_and_told_with_the_next_record() {
        let limit = UseLimit::new(Duration::from_secs(60), 3);
        let now = Instant::now();
        let begin = |pid, volume: &str, seconds| {
            let asker = Asker { pid: Some(pid), ..Asker::default() };
            limit.begin(&asker, &volume.parse().unwrap(), now + Duration::from_secs(seconds))
        };
        for second in 0..3 {
            assert_eq!(begin(1, "one", second), Turn::Record(0));
        }
        for second in 3..60 {
            assert_eq!(begin(1, "one", second), Turn::Count);
        }
        assert_eq!(begin(2, "one", 59), Turn::Record(0), "another process");
        assert_eq!(begin(1, "two", 59), Turn::Record(0), "another volume");
        assert_eq!(begin(1, "one", 60), Turn::Record(57));
        assert_eq!(begin(1, "one", 61), Turn::Record(0));
        // What is over and was told is forgotten.
        assert_eq!(begin(3, "one", 1000), Turn::Record(0));
        assert_eq!(limit.state().uses.len(), 1);
    }

    #[test]
    fn what_could_not_be_written_is_counted_on_and_nothing_is_put_off_then() {
        let limit = UseLimit::new(Duration::from_secs(60), 1);
        let (asker, volume, now) = (Asker::default(), "one".parse().unwrap(), Instant::now());
        assert_eq!(limit.begin(&asker, &volume, now), Turn::Record(0));
        assert_eq!(limit.begin(&asker, &volume, now), Turn::Count);
        let later = now + Duration::from_secs(60);
        for _ in 0..3 {
            assert_eq!(limit.begin(&asker, &volume, later), Turn::Record(1));
            limit.end(&asker, &volume, 1, false);
        }
        assert_eq!(limit.begin(&asker, &volume, later), Turn::Record(1));
        limit.end(&asker, &volume, 1, true);
        assert_eq!(limit.begin(&asker, &volume, later), Turn::Count);
    }
}
