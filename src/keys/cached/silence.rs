use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How long a server that did not answer is taken to be silent.
const SILENT_FOR: Duration = Duration::from_secs(10);

/// How long a server is waited for by somebody who could do without its answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Patience {
    /// As long as its deadline says.
    Whole,
    /// A moment: it was silent when it was last asked, which is some time ago.
    Short,
    /// Not at all: it has just been silent.
    None,
}

/// When a server was last found not to answer; nothing if it answered since.
#[derive(Default)]
pub(super) struct Silence(Mutex<Option<Instant>>);

impl Silence {
    pub(super) fn patience(&self, now: Instant) -> Patience {
        match *self.found() {
            None => Patience::Whole,
            Some(found) if now.saturating_duration_since(found) < SILENT_FOR => Patience::None,
            Some(_) => Patience::Short,
        }
    }

    /// It did not answer.
    pub(super) fn begin(&self, now: Instant) {
        *self.found() = Some(now);
    }

    /// It answered.
    pub(super) fn end(&self) {
        *self.found() = None;
    }

    fn found(&self) -> MutexGuard<'_, Option<Instant>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_silent_server_is_asked_again_after_a_while() {
        let (silence, now) = (Silence::default(), Instant::now());
        assert_eq!(silence.patience(now), Patience::Whole);
        silence.begin(now);
        assert_eq!(silence.patience(now + SILENT_FOR - Duration::from_millis(1)), Patience::None);
        assert_eq!(silence.patience(now + SILENT_FOR), Patience::Short);
        silence.end();
        assert_eq!(silence.patience(now), Patience::Whole);
    }
}
