use std::collections::BTreeMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::guests::Guest;

/// Answers every call that nobody has answered in time with `ETIMEDOUT`.
///
/// Whoever works on a call needs no say in this: an answer to a call that was answered already fails,
/// and what was made for it is undone.
#[derive(Default)]
pub struct Deadlines {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    pending: BTreeMap<Key, Pending>,
    next_number: u64,
    /// When the keeper looks again by itself.
    awake_at: Option<Instant>,
}

/// When the call is due, and a number that tells it from others that are due then.
type Key = (Instant, u64);

struct Pending {
    guest: Arc<Guest>,
    call: u64,
}

/// A call with a deadline, until this is dropped.
pub struct Deadline {
    of: Arc<Deadlines>,
    key: Key,
}

impl Deadlines {
    /// Has `call` of `guest` refused at `due` unless the returned value is dropped by then.
    ///
    /// Nearly every call is answered at once. So the keeper is woken only if it would come too late by itself:
    /// where every call has the same time, not more than once in that time.
    #[must_use]
    pub fn add(self: &Arc<Self>, due: Instant, guest: &Arc<Guest>, call: u64) -> Deadline {
        let mut state = self.state();
        let key = (due, state.next_number);
        state.next_number += 1;
        state.pending.insert(key, Pending { guest: Arc::clone(guest), call });
        let is_late = state.awake_at.is_none_or(|awake_at| due < awake_at);
        if is_late {
            state.awake_at = Some(due);
        }
        drop(state);
        if is_late {
            self.changed.notify_one();
        }
        Deadline { of: Arc::clone(self), key }
    }

    /// Keeps the deadlines; never returns.
    pub fn keep(&self) -> ! {
        let mut state = self.state();
        loop {
            let now = Instant::now();
            state.awake_at = state.pending.keys().next().map(|(due, _)| *due);
            state = match state.awake_at {
                None => self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
                Some(due) if due > now => {
                    self.changed.wait_timeout(state, due - now).unwrap_or_else(PoisonError::into_inner).0
                }
                Some(_) => {
                    let late = state.pending.pop_first();
                    drop(state);
                    if let Some((_, late)) = late {
                        late.refuse();
                    }
                    self.state()
                }
            };
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Pending {
    fn refuse(&self) {
        let guest = &self.guest;
        guest.give_up(self.call);
        // ENOENT: it was answered in time.
        if guest.listener().refuse(self.call, libc::ETIMEDOUT).is_ok() {
            tracing::error!(
                pid = guest.pid(),
                "an open of {guest} was not decided in time and failed with ETIMEDOUT: QEMU's own memory, the storage, the \
                 key store or device-mapper does not answer; see the messages before this one and 'dmesg'"
            );
        }
    }
}

impl Drop for Deadline {
    fn drop(&mut self) {
        // Whoever panicked has answered nothing.
        if !std::thread::panicking() {
            self.of.state().pending.remove(&self.key);
        }
    }
}
