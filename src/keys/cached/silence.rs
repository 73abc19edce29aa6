use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::keys::RecordedKey;

/// How long nobody may be answered before a kept key is used, where the server's own deadline is longer.
const GRACE: Duration = Duration::from_secs(3);
/// How long after it was found silent a server is first asked whether it answers again. Then it is asked when half as much
/// time again has passed.
const FIRST_AGAIN: Duration = Duration::from_secs(10);
/// The longest time between two of these questions.
const LAST_AGAIN: Duration = Duration::from_secs(60);

/// Whether a server answers, as whoever asked it has found.
#[derive(Default)]
pub(super) struct Silence(Mutex<State>);

#[derive(Default)]
struct State {
    /// When it was found not to answer, and when it was last asked again; nothing if it answered since.
    found: Option<(Instant, Instant)>,
    /// How many wait for its answer.
    waiting: usize,
    /// Since when they do, and nobody was answered.
    since: Option<Instant>,
    /// What it was last asked for.
    wanted: Option<RecordedKey>,
}

/// Somebody waits for the server's answer as long as this lives.
pub(super) struct Question<'a>(&'a Silence);

impl Silence {
    /// How long whoever has a kept key waits for the server before that is used; nothing if not at all.
    pub(super) fn patience(&self, now: Instant) -> Option<Duration> {
        let State { found, since, .. } = *self.state();
        let waited = since.map_or(Duration::ZERO, |since| now.saturating_duration_since(since));
        let left = GRACE.saturating_sub(waited);
        (found.is_none() && !left.is_zero()).then_some(left)
    }

    /// It is asked for `wanted`.
    pub(super) fn question(&self, wanted: &RecordedKey, now: Instant) -> Question<'_> {
        let mut state = self.state();
        state.waiting += 1;
        state.since.get_or_insert(now);
        state.wanted = Some(wanted.clone());
        Question(self)
    }

    /// It did not answer.
    pub(super) fn begin(&self, now: Instant) {
        self.state().found.get_or_insert((now, now));
    }

    /// It answered.
    pub(super) fn end(&self, now: Instant) {
        let mut state = self.state();
        state.found = None;
        state.since = (state.waiting > 0).then_some(now);
    }

    /// What it is to be asked for now, to see whether it answers again, and in what time this is to be called once more.
    pub(super) fn ask_again(&self, now: Instant) -> (Option<RecordedKey>, Option<Duration>) {
        let mut state = self.state();
        let Some((found, asked)) = state.found else { return (None, None) };
        let pause = |asked: Instant| (asked.saturating_duration_since(found) / 2).clamp(FIRST_AGAIN, LAST_AGAIN);
        let left = (asked + pause(asked)).saturating_duration_since(now);
        if !left.is_zero() {
            return (None, Some(left));
        }
        state.found = Some((found, now));
        (state.wanted.clone(), Some(pause(now)))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Question<'_> {
    fn drop(&mut self) {
        let mut state = self.0.state();
        state.waiting -= 1;
        if state.waiting == 0 {
            state.since = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keys::KeyHandle;
    use crate::volume::VolumeId;

    const MOMENT: Duration = Duration::from_millis(1);

    fn wanted(volume: &str) -> RecordedKey {
        let volume: VolumeId = volume.parse().unwrap();
        let handle = KeyHandle::first(&volume);
        RecordedKey { volume, handle, check_value: "0".repeat(32).try_into().unwrap() }
    }

    #[test]
    fn a_silent_server_is_not_waited_for_until_it_answers() {
        let (silence, now) = (Silence::default(), Instant::now());
        assert_eq!(silence.patience(now), Some(GRACE));
        silence.begin(now);
        for later in [Duration::ZERO, FIRST_AGAIN, LAST_AGAIN, 100 * LAST_AGAIN] {
            assert_eq!(silence.patience(now + later), None, "{later:?}");
        }
        silence.end(now);
        assert_eq!(silence.patience(now), Some(GRACE));
    }

    #[test]
    fn all_who_wait_share_the_time_since_somebody_was_answered() {
        let (silence, now) = (Silence::default(), Instant::now());
        let first = silence.question(&wanted("one"), now);
        let second = silence.question(&wanted("two"), now + GRACE / 2);
        assert_eq!(silence.patience(now + GRACE - MOMENT), Some(MOMENT));
        assert_eq!(silence.patience(now + GRACE), None);
        silence.end(now + GRACE);
        drop(first);
        assert_eq!(silence.patience(now + GRACE + GRACE / 2), Some(GRACE / 2), "the second waits since then");
        assert_eq!(silence.patience(now + 2 * GRACE), None);
        drop(second);
        assert_eq!(silence.patience(now + 2 * GRACE), Some(GRACE), "nobody waits");
    }

    #[test]
    fn it_is_asked_again_more_and_more_rarely_as_long_as_it_is_silent() {
        let (silence, now) = (Silence::default(), Instant::now());
        drop(silence.question(&wanted("one"), now));
        drop(silence.question(&wanted("two"), now));
        assert_eq!(silence.ask_again(now + LAST_AGAIN), (None, None));
        silence.begin(now);
        let mut asked = Vec::new();
        let mut time = Duration::ZERO;
        while asked.len() < 7 {
            let (again, next) = silence.ask_again(now + time);
            if again.is_some() {
                assert_eq!(again, Some(wanted("two")));
                asked.push(time.as_secs());
                // It says nothing now either.
                silence.begin(now + time);
            }
            time += next.unwrap();
        }
        assert_eq!(asked, [10, 20, 30, 45, 67, 101, 151]);
        time += 100 * LAST_AGAIN;
        assert!(silence.ask_again(now + time).0.is_some());
        assert_eq!(silence.ask_again(now + time), (None, Some(LAST_AGAIN)));
        silence.end(now + time);
        assert_eq!(silence.ask_again(now + time + LAST_AGAIN), (None, None));
    }
}
