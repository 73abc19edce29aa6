//! Mappings that are kept open until a guest's QEMU has them open (`intercept = "xml"`).
//!
//! A mapping goes at its last close, and here nobody hands QEMU a descriptor: it opens the mapping by its name, some
//! time after that was made for it. The descriptors stand in no file. A daemon that is to end waits for those who are
//! about to open theirs. If it ends all the same, the kernel removes the mapping, libvirt finds nothing to open, and
//! nothing is left.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, ThreadId};
use std::time::{Duration, Instant};

use crate::volume::VolumeId;

/// How long a mapping is held for who never says that it is not needed any more. Between its hook and QEMU's open
/// libvirt may have minutes of work, with host devices to reset and storage that answers late.
pub const HELD_FOR: Duration = Duration::from_secs(600);

/// A mapping that was made and is open.
#[derive(Debug)]
pub struct Mapped {
    /// The volume that it is of.
    pub volume: VolumeId,
    /// Whether whom it is for is to write to it, and to be the only one.
    pub is_written_alone: bool,
    /// Keeps it.
    pub opened: OwnedFd,
}

/// The mappings that are held.
pub struct Holds {
    limit: Duration,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    held: Vec<Held>,
    callers: u64,
}

struct Held {
    domain: String,
    volume: VolumeId,
    is_written_alone: bool,
    until: Until,
    /// The thread that works on the request, and since when it is held.
    by: (ThreadId, Instant),
    _mapping: OwnedFd,
}

/// Until when a mapping is held, unless its domain ends before or it takes too long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Until {
    /// libvirt says that the domain has started.
    Started,
    /// Somebody says that it is enough: [`Holds::released`].
    Released,
    /// This caller has gone.
    CallerGone(u64),
}

/// Holds mappings until it is dropped.
pub struct CallerHold {
    holds: Arc<Holds>,
    caller: u64,
}

impl Holds {
    /// Holds nothing yet, and nothing for longer than `limit`.
    pub fn new(limit: Duration) -> Self {
        Holds { limit, state: Mutex::default(), changed: Condvar::new() }
    }

    /// Holds `mappings` for `domain`.
    pub fn hold(&self, domain: &str, mappings: Vec<Mapped>, until: Until) {
        let by = (thread::current().id(), Instant::now());
        let held = |Mapped { volume, is_written_alone, opened }| Held {
            domain: domain.to_owned(),
            volume,
            is_written_alone,
            until,
            by,
            _mapping: opened,
        };
        self.state().held.extend(mappings.into_iter().map(held));
        self.changed.notify_all();
    }

    /// Holds `mappings` for `domain` as long as the result is there.
    #[must_use]
    pub fn hold_for_caller(self: &Arc<Self>, domain: &str, mappings: Vec<Mapped>) -> CallerHold {
        let caller = {
            let mut state = self.state();
            state.callers += 1;
            state.callers
        };
        self.hold(domain, mappings, Until::CallerGone(caller));
        CallerHold { holds: Arc::clone(self), caller }
    }

    /// Drops what this thread has held since `begin`: whoever asked for it was gone before the answer came.
    pub fn undo_since(&self, begin: Instant) {
        let own = thread::current().id();
        self.drop_if(|held| held.by.0 == own && held.by.1 >= begin);
    }

    /// `domain` has started: its QEMU has open what it was started with.
    pub fn started(&self, domain: &str) {
        self.drop_if(|held| held.until == Until::Started && held.domain == domain);
    }

    /// `domain` has ended, and with it everybody who could open anything for it.
    pub fn ended(&self, domain: &str) {
        self.drop_if(|held| held.domain == domain);
    }

    /// Whoever had `volume` held for `domain` needs that no longer.
    pub fn released(&self, domain: &str, volume: &VolumeId) {
        self.drop_if(|held| held.until == Until::Released && held.domain == domain && held.volume == *volume);
    }

    /// For which domains each volume is held.
    pub fn by_volume(&self) -> HashMap<VolumeId, Vec<String>> {
        let mut domains: HashMap<_, Vec<_>> = HashMap::new();
        for held in &self.state().held {
            let domains = domains.entry(held.volume.clone()).or_default();
            if !domains.contains(&held.domain) {
                domains.push(held.domain.clone());
            }
        }
        domains
    }

    /// A domain that `volume` is held for and that `fits`, of which is said whether it is to write there alone.
    pub fn find(&self, volume: &VolumeId, fits: impl Fn(&str, bool) -> bool) -> Option<String> {
        let state = self.state();
        let mut held = state.held.iter().filter(|held| held.volume == *volume);
        held.find(|held| fits(&held.domain, held.is_written_alone)).map(|held| held.domain.clone())
    }

    /// Waits until nothing is held, for `limit` at most.
    pub fn await_none(&self, limit: Duration) {
        let waited = self.changed.wait_timeout_while(self.state(), limit, |state| !state.held.is_empty());
        drop(waited);
    }

    /// Drops what is held for too long; never returns.
    pub fn keep(&self) -> ! {
        let mut state = self.state();
        loop {
            let now = Instant::now();
            state = match state.held.iter().map(|held| held.by.1 + self.limit).min() {
                None => self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
                Some(due) if due > now => {
                    self.changed.wait_timeout(state, due - now).unwrap_or_else(PoisonError::into_inner).0
                }
                Some(_) => {
                    let late: Vec<Held> = state.held.extract_if(.., |held| held.by.1 + self.limit <= now).collect();
                    drop(state);
                    for Held { domain, volume, .. } in &late {
                        tracing::warn!(
                            domain, volume = %volume,
                            "the mapping of volume {volume} is no longer held for domain {domain}, which should have \
                             opened it long ago"
                        );
                    }
                    drop(late);
                    self.state()
                }
            };
        }
    }

    fn drop_if(&self, condition: impl Fn(&Held) -> bool) {
        // Closing may have the kernel remove mappings, for which nobody else need wait.
        let dropped: Vec<Held> = self.state().held.extract_if(.., |held| condition(held)).collect();
        drop(dropped);
        self.changed.notify_all();
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for CallerHold {
    fn drop(&mut self) {
        self.holds.drop_if(|held| held.until == Until::CallerGone(self.caller));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{PipeReader, PipeWriter, Read};

    /// A descriptor, and what tells when it was closed.
    fn mapping(volume: &str) -> (PipeReader, Mapped) {
        let (reader, writer): (PipeReader, PipeWriter) = std::io::pipe().unwrap();
        (reader, Mapped { volume: id(volume), is_written_alone: true, opened: writer.into() })
    }

    fn id(volume: &str) -> VolumeId {
        volume.parse().unwrap()
    }

    fn is_closed(reader: &PipeReader) -> bool {
        rustix::io::ioctl_fionbio(reader, true).unwrap();
        (&mut &*reader).read(&mut [0]).is_ok_and(|length| length == 0)
    }

    #[test]
    fn each_hold_ends_with_what_it_waits_for() {
        let holds = Arc::new(Holds::new(HELD_FOR));
        let (start, by_start) = mapping("a");
        let (other, by_other) = mapping("a");
        let (order, by_order) = mapping("b");
        let (caller, by_caller) = mapping("c");
        holds.hold("web", vec![by_start], Until::Started);
        holds.hold("db", vec![by_other], Until::Started);
        holds.hold("web", vec![by_order], Until::Released);
        let call = holds.hold_for_caller("web", vec![by_caller]);
        assert_eq!(holds.by_volume()[&id("a")], ["web", "db"]);

        holds.started("web");
        assert_eq!([&start, &other, &order, &caller].map(is_closed), [true, false, false, false]);
        holds.released("web", &id("c"));
        holds.released("db", &id("b"));
        assert_eq!([&order, &caller].map(is_closed), [false, false]);
        holds.released("web", &id("b"));
        assert_eq!([&other, &order, &caller].map(is_closed), [false, true, false]);
        drop(call);
        assert!(is_closed(&caller) && !is_closed(&other));
        holds.ended("db");
        assert!(is_closed(&other) && holds.by_volume().is_empty());
    }

    #[test]
    fn a_domain_that_ends_takes_all_with_it() {
        let holds = Arc::new(Holds::new(HELD_FOR));
        let (order, by_order) = mapping("a");
        let (caller, by_caller) = mapping("b");
        holds.hold("web", vec![by_order], Until::Released);
        let call = holds.hold_for_caller("web", vec![by_caller]);
        holds.ended("web");
        assert!(is_closed(&order) && is_closed(&caller));
        drop(call);
    }

    #[test]
    fn two_callers_hold_each_their_own() {
        let holds = Arc::new(Holds::new(HELD_FOR));
        let (first, by_first) = mapping("a");
        let (second, by_second) = mapping("a");
        let one = holds.hold_for_caller("web", vec![by_first]);
        let other = holds.hold_for_caller("web", vec![by_second]);
        drop(one);
        assert!(is_closed(&first) && !is_closed(&second));
        drop(other);
        assert!(is_closed(&second));
    }

    #[test]
    fn one_request_is_undone_and_no_other() {
        let holds = Arc::new(Holds::new(HELD_FOR));
        let (earlier, by_earlier) = mapping("a");
        let (other, by_other) = mapping("a");
        let (own, by_own) = mapping("a");
        holds.hold("web", vec![by_earlier], Until::Started);
        let begin = Instant::now();
        thread::scope(|scope| {
            scope.spawn(|| holds.hold("web", vec![by_other], Until::Started));
        });
        holds.hold("web", vec![by_own], Until::Started);
        holds.undo_since(begin);
        assert_eq!([&earlier, &other, &own].map(is_closed), [false, false, true]);
    }

    #[test]
    fn who_is_to_end_waits_until_nothing_is_held_but_not_for_long() {
        let holds = Arc::new(Holds::new(HELD_FOR));
        holds.await_none(HELD_FOR);
        let (_reader, by_start) = mapping("a");
        holds.hold("web", vec![by_start], Until::Started);
        holds.await_none(Duration::from_millis(20));
        assert_eq!(holds.by_volume().len(), 1);
        thread::scope(|scope| {
            let waiting = scope.spawn(|| {
                holds.await_none(HELD_FOR);
                holds.by_volume().len()
            });
            holds.started("web");
            assert_eq!(waiting.join().unwrap(), 0);
        });
    }

    #[test]
    fn nothing_is_held_for_ever() {
        let holds = Arc::new(Holds::new(Duration::from_millis(20)));
        let keeper = Arc::clone(&holds);
        thread::spawn(move || keeper.keep());
        let (mut reader, by_start) = mapping("a");
        holds.hold("web", vec![by_start], Until::Started);
        // Ends when it was closed.
        assert_eq!(reader.read(&mut [0]).unwrap(), 0);
        while !holds.by_volume().is_empty() {
            thread::yield_now();
        }
    }
}
