//! What the daemon puts into the audit log, and what becomes of a key's use that cannot be recorded.

use std::collections::HashMap;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::broker::Broker;
use crate::audit::{Asker, Event, Kind};
use crate::policy::WhenUnwritable;
use crate::refusal::{Reason, Refusal};
use crate::volume::VolumeId;

/// How often the same refusal of the same process is recorded.
const REPEATED_EVERY: Duration = Duration::from_secs(60);
/// How long records may stand in the write-ahead log alone.
const MERGE_AFTER: Duration = Duration::from_secs(1);
/// Enough for SQLite.
const MERGE_STACK: usize = 256 << 10;
/// How many refusals are recorded within that time, whoever they are of.
const MOST_REFUSALS: usize = 60;

impl Broker {
    /// Records that the key of `volume` is used for the present asker, before it is. It is on the disk
    /// when this returns.
    ///
    /// # Errors
    /// [`Reason::StoreUnavailable`] when that cannot be recorded, unless the configuration says that it
    /// does not matter.
    pub fn record_use(&self, kind: Kind, volume: &VolumeId, detail: &str) -> Result<(), Refusal> {
        let event = Event::new(kind, volume, detail);
        let recorded = self.vault().and_then(|vault| vault.store.append_audit(event));
        let Err(refusal) = recorded else { return Ok(()) };
        match self.config()?.audit.when_unwritable {
            WhenUnwritable::Continue => {
                tracing::error!(volume = %volume, "a use of the key of volume {volume} is not in the audit log: {refusal}");
                Ok(())
            }
            WhenUnwritable::Refuse => Err(Refusal::new(
                Reason::StoreUnavailable,
                format!(
                    "the key of volume {volume} is not used because the audit log cannot be written, and when_unwritable = \
                     \"refuse\" in the section [audit] asks for that: {refusal}"
                ),
            )
            .of(volume)),
        }
    }

    /// Records that another configuration is in force.
    pub fn record_reload(&self, path: &Path) {
        let event = Event::of_the_host(Kind::PolicyReloaded, format!("from {}", path.display()));
        match self.vault().and_then(|vault| vault.store.append_audit(event)) {
            Ok(_) => self.merge_audit_soon(),
            Err(error) => tracing::error!("that the configuration was read anew is not in the audit log: {error}"),
        }
    }

    /// Records that the present asker was refused something. The journal has every refusal; the log has
    /// the same one once a minute and no more than so many in all, lest who is refused fills the disk.
    pub fn record_refusal(&self, refusal: &Refusal) {
        let Some(repeated) = self.refusals().count(refusal, Instant::now()) else { return };
        let mut event = Event::refused(refusal);
        if repeated > 0 {
            event.detail = format!("{} ({repeated} times more since it was last recorded)", event.detail);
        }
        match self.vault().and_then(|vault| vault.store.append_audit(event)) {
            Ok(_) => self.merge_audit_soon(),
            Err(error) => tracing::error!("a refusal is not in the audit log: {error}"),
        }
    }

    /// Has the newest records brought into the database's file, once for all that come until then: while
    /// that is done, no guest's open gets on.
    pub fn merge_audit_soon(&self) {
        let Ok(vault) = self.vault() else { return };
        let merging = Arc::clone(self.merging());
        if merging.swap(true, Ordering::AcqRel) {
            return;
        }
        let merge = {
            let merging = Arc::clone(&merging);
            move || {
                std::thread::sleep(MERGE_AFTER);
                merging.store(false, Ordering::Release);
                vault.store.merge_audit();
            }
        };
        if std::thread::Builder::new().name("merge".to_owned()).stack_size(MERGE_STACK).spawn(merge).is_err() {
            // Whoever comes next tries again; the records are on the disk.
            merging.store(false, Ordering::Release);
        }
    }
}

/// Which refusals were recorded lately.
#[derive(Default)]
pub struct RefusalLimit {
    seen: Mutex<HashMap<Refused, Seen>>,
}

/// What makes two refusals the same.
type Refused = (Asker, Option<VolumeId>, i32);

struct Seen {
    recorded_at: Instant,
    repeated: u64,
}

impl RefusalLimit {
    /// Whether `refusal` is to be recorded now, and then how often it came since it last was.
    fn count(&self, refusal: &Refusal, now: Instant) -> Option<u64> {
        let key = (Asker::current(), refusal.volume().cloned(), refusal.errno());
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let is_recent = |seen: &Seen| now.saturating_duration_since(seen.recorded_at) < REPEATED_EVERY;
        let recorded = seen.values().filter(|seen| is_recent(seen)).count();
        if let Some(same) = seen.get_mut(&key)
            && (is_recent(same) || recorded >= MOST_REFUSALS)
        {
            same.repeated += 1;
            return None;
        }
        if recorded >= MOST_REFUSALS {
            return None;
        }
        let repeated = seen.get(&key).map_or(0, |same| same.repeated);
        // What is over and was not repeated has nothing more to say; of the rest there are not too many.
        seen.retain(|_, seen| is_recent(seen) || seen.repeated > 0);
        if seen.len() >= 2 * MOST_REFUSALS {
            seen.retain(|_, seen| is_recent(seen));
        }
        seen.insert(key, Seen { recorded_at: now, repeated: 0 });
        Some(repeated)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(volume: &str) -> Refusal {
        Refusal::new(Reason::NoKey, "no").of(&volume.parse().unwrap())
    }

    fn as_pid<R>(pid: u32, work: impl FnOnce() -> R) -> R {
        Asker { pid: Some(pid), ..Asker::default() }.ask(work)
    }

    #[test]
    fn the_same_refusal_is_recorded_once_a_minute_with_a_count() {
        let limit = RefusalLimit::default();
        let now = Instant::now();
        let count = |pid, volume: &str, seconds| {
            as_pid(pid, || limit.count(&refusal(volume), now + Duration::from_secs(seconds)))
        };
        assert_eq!(count(1, "one", 0), Some(0));
        for second in 1..60 {
            assert_eq!(count(1, "one", second), None);
        }
        assert_eq!(count(2, "one", 59), Some(0), "another process");
        assert_eq!(count(1, "two", 59), Some(0), "another volume");
        assert_eq!(count(1, "one", 60), Some(59));
        assert_eq!(count(1, "one", 61), None);
        assert_eq!(count(1, "one", 7200), Some(1));
        assert_eq!(count(1, "one", 7300), Some(0));
    }

    #[test]
    fn many_processes_together_fill_no_disk() {
        let limit = RefusalLimit::default();
        let now = Instant::now();
        let mut recorded = 0;
        for second in 0..600 {
            for pid in 0..100 {
                let at = now + Duration::from_secs(second);
                let counted = as_pid(second as u32 * 100 + pid, || limit.count(&refusal("one"), at));
                recorded += usize::from(counted.is_some());
                as_pid(second as u32 * 100 + pid, || limit.count(&refusal("one"), at));
            }
        }
        assert_eq!(recorded, 10 * MOST_REFUSALS);
        assert!(limit.seen.lock().unwrap().len() <= 2 * MOST_REFUSALS);
    }
}
