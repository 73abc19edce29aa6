//! What the daemon puts into the audit log, and what becomes of a key's use that cannot be recorded.

use std::path::Path;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::broker::Broker;
use super::limit::Limit;
use super::pool::while_waiting;
use super::uses::Turn;
use crate::audit::{Asker, Event, Kind};
use crate::policy::WhenUnwritable;
use crate::refusal::{Reason, Refusal};
use crate::store::seconds_now;
use crate::volume::VolumeId;

/// How often the same refusal of the same process is recorded.
const REPEATED_EVERY: Duration = Duration::from_secs(60);
/// How long records may stand in the write-ahead log alone.
const MERGE_AFTER: Duration = Duration::from_secs(1);
/// When it is tried again to merge them while somebody reads the database, such as a backup.
const MERGE_AGAIN: Duration = Duration::from_secs(5);
/// Enough for SQLite.
const MERGE_STACK: usize = 256 << 10;
/// How many refusals are recorded within that time, whoever they are of.
const MOST_REFUSALS: usize = 60;

impl Broker {
    /// Records that the key of `volume` is used for the present asker, before it is. It is on the disk
    /// when this returns, unless there were too many such uses lately: then it is counted, and the number is
    /// recorded within a minute or so.
    ///
    /// # Errors
    /// [`Reason::StoreUnavailable`] when that cannot be recorded, unless the configuration says that it
    /// does not matter.
    pub fn record_use(&self, kind: Kind, volume: &VolumeId, detail: &str) -> Result<(), Refusal> {
        let asker = Asker::current();
        let turn = match kind {
            Kind::KeyUsed => self.uses().begin(&asker, volume, Instant::now()),
            _ => Turn::Record(0),
        };
        let detail = match turn {
            Turn::Record(0) => detail.to_owned(),
            Turn::Record(counted) => format!("{detail} ({counted} times more since it was last recorded)"),
            Turn::Count => {
                self.record_counted_soon();
                return Ok(());
            }
        };
        let event = Event::new(kind, volume, detail);
        let recorded = self.vault().and_then(|vault| vault.store.append_audit(event));
        if let (Kind::KeyUsed, Turn::Record(counted)) = (kind, turn) {
            self.uses().end(&asker, volume, counted, recorded.is_ok());
        }
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

    /// Has the uses that were counted recorded a minute from now, whether or not there are more by then.
    fn record_counted_soon(&self) {
        let Ok(vault) = self.vault() else { return };
        let uses = Arc::clone(self.uses());
        if !uses.begin_recording() {
            return;
        }
        let record = {
            let uses = Arc::clone(&uses);
            move || {
                loop {
                    std::thread::sleep(uses.every());
                    let again = uses.record_counted(&vault.store);
                    vault.store.merge_audit();
                    if !again {
                        return;
                    }
                }
            }
        };
        if std::thread::Builder::new().name("uses".to_owned()).stack_size(MERGE_STACK).spawn(record).is_err() {
            // The next use that is counted tries again.
            uses.give_up_recording();
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
        // A key server that falls silent has many refused at once. Whoever gets a key meanwhile records that as well, and
        // waits for one of them at most.
        let recorded = while_waiting(|| {
            let _turn = self.refusals().1.lock().unwrap_or_else(PoisonError::into_inner);
            self.vault().and_then(|vault| vault.store.append_audit(event))
        });
        match recorded {
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
                let mut pause = MERGE_AFTER;
                loop {
                    std::thread::sleep(pause);
                    merging.store(false, Ordering::Release);
                    // If it was hindered, another thread may be about to try by now.
                    if vault.store.merge_audit() || merging.swap(true, Ordering::AcqRel) {
                        return;
                    }
                    pause = MERGE_AGAIN;
                }
            }
        };
        if std::thread::Builder::new().name("merge".to_owned()).stack_size(MERGE_STACK).spawn(merge).is_err() {
            // Whoever comes next tries again; the records are on the disk.
            merging.store(false, Ordering::Release);
        }
    }
}

/// What is recorded of a key's use, with where the key came from if the key server did not answer: that last gave it at
/// `cached_since`, in seconds since 1970-01-01 UTC.
pub fn with_source(detail: &str, cached_since: Option<i64>) -> String {
    match cached_since {
        None => detail.to_owned(),
        Some(since) => format!(
            "{detail}, with the key from this host's cache, which a key server last gave {} minutes before",
            seconds_now().saturating_sub(since) / 60
        ),
    }
}

/// Which refusals were recorded lately, and whose turn it is to record one.
pub struct RefusalLimit(Limit<Refused>, Mutex<()>);

/// What makes two refusals the same.
type Refused = (Asker, Option<VolumeId>, i32);

impl Default for RefusalLimit {
    fn default() -> Self {
        RefusalLimit(Limit::new(REPEATED_EVERY, MOST_REFUSALS), Mutex::default())
    }
}

impl RefusalLimit {
    /// Whether `refusal` is to be recorded now, and then how often it came since it last was.
    fn count(&self, refusal: &Refusal, now: Instant) -> Option<u64> {
        self.0.count((Asker::current(), refusal.volume().cloned(), refusal.errno()), now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(volume: &str) -> Refusal {
        Refusal::new(Reason::NoKey, "no").of(&volume.parse().unwrap())
    }

    #[test]
    fn refusals_are_the_same_if_process_volume_and_errno_are() {
        let limit = RefusalLimit::default();
        let now = Instant::now();
        let count =
            |pid, volume: &str| Asker { pid: Some(pid), ..Asker::default() }.ask(|| limit.count(&refusal(volume), now));
        assert_eq!(count(1, "one"), Some(0));
        assert_eq!(count(1, "one"), None);
        assert_eq!(count(2, "one"), Some(0), "another process");
        assert_eq!(count(1, "two"), Some(0), "another volume");
    }
}
