use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use crate::store::seconds_now;

/// How far the clock may be behind what it was, in seconds: it is set by others, who correct it.
pub(super) const TOLERANCE: i64 = 300;
/// 2026-01-01 UTC. A host whose clock stands before that, as it does at a boot with an empty battery, does not know
/// the time.
const FLOOR: i64 = 1_767_225_600;

/// The clock that lifetimes are counted by. It never goes back: one that was set back is not believed, and as long as
/// this process runs, time passes at least as fast as it really does.
pub(super) struct Clock {
    wall: Box<dyn Fn() -> i64 + Send + Sync>,
    /// The latest time that was seen, and when.
    latest: Mutex<(i64, Instant)>,
}

impl Clock {
    /// The host's clock, which was seen at `latest` before.
    pub(super) fn of_host(latest: i64) -> Self {
        Clock::new(Box::new(seconds_now), latest)
    }

    /// The clock `wall`, which was seen at `latest` before.
    pub(super) fn new(wall: Box<dyn Fn() -> i64 + Send + Sync>, latest: i64) -> Self {
        Clock { wall, latest: Mutex::new((latest, Instant::now())) }
    }

    /// Seconds since 1970-01-01 UTC; nothing if the clock is not to be believed.
    pub(super) fn now(&self) -> Option<i64> {
        let wall = (self.wall)();
        let mut latest = self.latest();
        let passed = latest.0.saturating_add(latest.1.elapsed().as_secs() as i64);
        if wall < FLOOR || wall.saturating_add(TOLERANCE) < passed {
            return None;
        }
        if wall > passed {
            *latest = (wall, Instant::now());
        }
        Some(wall.max(passed))
    }

    /// Believes the clock as it stands, whatever was seen before, once `forget` has wiped what was kept by what was seen;
    /// it is given the time, which is returned. Nothing if it cannot be one.
    ///
    /// # Errors
    /// Those of `forget`: then the clock is believed no more than before.
    pub(super) fn restart<E>(&self, forget: impl FnOnce(i64) -> Result<(), E>) -> Result<Option<i64>, E> {
        let (wall, looked) = ((self.wall)(), Instant::now());
        if wall < FLOOR {
            return Ok(None);
        }
        forget(wall)?;
        *self.latest() = (wall, looked);
        Ok(Some(wall))
    }

    fn latest(&self) -> MutexGuard<'_, (i64, Instant)> {
        self.latest.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicI64, Ordering};

    use super::*;

    #[test]
    fn a_clock_that_was_set_back_is_not_believed_until_it_is_restarted() {
        const NOW: i64 = FLOOR + 1_000_000;
        let wall = Arc::new(AtomicI64::new(NOW));
        let clock = {
            let wall = Arc::clone(&wall);
            Clock::new(Box::new(move || wall.load(Ordering::Relaxed)), NOW - 100)
        };
        let at = |time| {
            wall.store(time, Ordering::Relaxed);
            clock.now()
        };
        assert_eq!(at(NOW), Some(NOW));
        assert_eq!(at(NOW - TOLERANCE), Some(NOW), "it is corrected a little, and time does not go back");
        for wrong in [NOW - TOLERANCE - 1, FLOOR - 1, 0] {
            assert_eq!(at(wrong), None);
        }
        let restart = |outcome: Result<(), &'static str>| clock.restart(|_| outcome);
        assert_eq!(restart(Ok(())), Ok(None), "1970 is no time");
        assert_eq!(at(NOW + 7_000_000), Some(NOW + 7_000_000));
        assert_eq!(at(NOW), None);
        assert_eq!(restart(Err("the disk is full")), Err("the disk is full"));
        assert_eq!(at(NOW), None, "what was kept is still there");
        assert_eq!(restart(Ok(())), Ok(Some(NOW)));
        assert_eq!(at(NOW), Some(NOW));
    }
}
