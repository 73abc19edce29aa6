use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::limit::Limit;

/// How often the journal says of the same process that it was not registered, and of how many within that time.
const REPEATED_EVERY: Duration = Duration::from_secs(60);
const MOST_SENTENCES: usize = 20;

/// Whose process was not registered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Whose {
    /// Root's, or that of a user that libvirt runs QEMU as.
    Qemus,
    /// Another user's: anybody may connect.
    Strangers,
}

/// What the journal was told lately of processes that were not registered. Strangers keep it from saying
/// nothing that it says of QEMUs.
#[derive(Debug, Default)]
pub struct Refused {
    of_qemus: Sentences,
    of_strangers: Sentences,
}

impl Refused {
    /// Counts a process that was not registered. If that is to be told now, the words about those that were not
    /// told, which may be none.
    pub fn count(&self, whose: Whose, pid: u32, now: Instant) -> Option<String> {
        match whose {
            Whose::Qemus => self.of_qemus.count(pid, now),
            Whose::Strangers => self.of_strangers.count(pid, now),
        }
    }
}

#[derive(Debug)]
struct Sentences {
    said: Limit<u32>,
    left_out: Mutex<LeftOut>,
}

/// What was not told since that was last told.
#[derive(Debug, Default)]
struct LeftOut {
    count: u64,
    told_at: Option<Instant>,
}

impl Default for Sentences {
    fn default() -> Self {
        Sentences { said: Limit::new(REPEATED_EVERY, MOST_SENTENCES), left_out: Mutex::default() }
    }
}

impl Sentences {
    fn count(&self, pid: u32, now: Instant) -> Option<String> {
        let mut left_out = self.left_out.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(repeated) = self.said.count(pid, now) else {
            left_out.count += 1;
            return None;
        };
        let of_it = (repeated > 0).then(|| format!("{repeated} times more since that was last said of it"));
        let of_all = left_out.tell(now).filter(|count| *count > repeated);
        let of_all = of_all.map(|count| format!("{count} sentences like this one were left out"));
        match (of_it, of_all) {
            (None, None) => Some(String::new()),
            (Some(one), None) | (None, Some(one)) => Some(format!(" ({one})")),
            (Some(of_it), Some(of_all)) => Some(format!(" ({of_it}; {of_all})")),
        }
    }
}

impl LeftOut {
    /// How many were left out, once in so much time.
    fn tell(&mut self, now: Instant) -> Option<u64> {
        let is_recent = |told_at| now.saturating_duration_since(told_at) < REPEATED_EVERY;
        if self.count == 0 || self.told_at.is_some_and(is_recent) {
            return None;
        }
        self.told_at = Some(now);
        Some(std::mem::take(&mut self.count))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strangers_do_not_silence_what_is_said_of_qemus() {
        let refused = Refused::default();
        let now = Instant::now();
        let told = (0..1000).filter(|pid| refused.count(Whose::Strangers, *pid, now).is_some()).count();
        assert_eq!(told, MOST_SENTENCES);
        assert_eq!(refused.count(Whose::Qemus, 1, now), Some(String::new()));
        assert_eq!(refused.count(Whose::Strangers, 1000, now), None);
    }

    #[test]
    fn what_was_left_out_is_counted_and_told_once_a_minute() {
        let refused = Refused::default();
        let now = Instant::now();
        let count = |pid, seconds| refused.count(Whose::Qemus, pid, now + Duration::from_secs(seconds));
        let said = |words: &str| Some(words.to_owned());
        for pid in 0..20 {
            assert_eq!(count(pid, 0), said(""));
        }
        for pid in 0..500 {
            assert_eq!(count(pid, 1), None);
        }
        // 20 of them are those of which something was said.
        let repeated = "1 times more since that was last said of it";
        assert_eq!(count(0, 60), said(&format!(" ({repeated}; 500 sentences like this one were left out)")));
        assert_eq!(count(1, 60), said(&format!(" ({repeated})")));
        assert_eq!(count(1, 61), None);
        assert_eq!(count(1000, 119), said(""), "told a minute ago");
        assert_eq!(count(1001, 120), said(" (1 sentences like this one were left out)"));
        assert_eq!(count(1, 121), said(&format!(" ({repeated})")));
        assert_eq!(count(1002, 600), said(""), "all is told");
    }
}
