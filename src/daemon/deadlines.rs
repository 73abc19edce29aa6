use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Instant;

use super::guests::Guest;

/// Answers every call that nobody has answered in time with `ETIMEDOUT`.
///
/// Whoever works on a call needs no say in this: an answer to a call that was answered already fails,
/// and what was made for it is undone.
#[derive(Default)]
pub struct Deadlines {
    pending: Mutex<BinaryHeap<Reverse<Pending>>>,
    added: Condvar,
}

struct Pending {
    due: Instant,
    guest: Arc<Guest>,
    call: u64,
}

impl Deadlines {
    /// Has `call` of `guest` refused at `due` unless it is answered by then.
    pub fn add(&self, due: Instant, guest: &Arc<Guest>, call: u64) {
        let pending = Pending { due, guest: Arc::clone(guest), call };
        let mut calls = self.pending.lock().unwrap_or_else(PoisonError::into_inner);
        let is_next = calls.peek().is_none_or(|Reverse(next)| due < next.due);
        calls.push(Reverse(pending));
        drop(calls);
        if is_next {
            self.added.notify_one();
        }
    }

    /// Keeps the deadlines; never returns.
    pub fn keep(&self) -> ! {
        let mut pending = self.pending.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            let now = Instant::now();
            pending = match pending.peek() {
                None => self.added.wait(pending).unwrap_or_else(PoisonError::into_inner),
                Some(Reverse(next)) if next.due > now => {
                    let wait = next.due - now;
                    self.added.wait_timeout(pending, wait).unwrap_or_else(PoisonError::into_inner).0
                }
                Some(_) => {
                    if let Some(Reverse(Pending { guest, call, .. })) = pending.pop() {
                        // ENOENT: it was answered in time.
                        if guest.listener().refuse(call, libc::ETIMEDOUT).is_ok() {
                            tracing::error!(
                                pid = guest.pid(),
                                "an open of {guest} was not decided in time and failed with ETIMEDOUT: the storage, the key \
                                 store or device-mapper does not answer; see the messages before this one and 'dmesg'"
                            );
                        }
                    }
                    pending
                }
            };
        }
    }
}

impl Ord for Pending {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.due.cmp(&other.due)
    }
}

impl PartialOrd for Pending {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Pending {
    fn eq(&self, other: &Self) -> bool {
        self.due == other.due
    }
}

impl Eq for Pending {}
