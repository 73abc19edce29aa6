use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How often what is the same is told, and how often anything.
#[derive(Debug)]
pub struct Limit<K> {
    every: Duration,
    most: usize,
    seen: Mutex<HashMap<K, Seen>>,
}

#[derive(Debug)]
struct Seen {
    told_at: Instant,
    repeated: u64,
}

impl<K: Eq + Hash> Limit<K> {
    /// The same once in so much time, and no more than `most` in all within that time.
    pub fn new(every: Duration, most: usize) -> Self {
        Limit { every, most, seen: Mutex::default() }
    }

    /// Whether what came is to be told now, and then how often the same came since it last was.
    pub fn count(&self, key: K, now: Instant) -> Option<u64> {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let is_recent = |seen: &Seen| now.saturating_duration_since(seen.told_at) < self.every;
        let told = seen.values().filter(|seen| is_recent(seen)).count();
        if let Some(same) = seen.get_mut(&key)
            && (is_recent(same) || told >= self.most)
        {
            same.repeated += 1;
            return None;
        }
        if told >= self.most {
            return None;
        }
        let repeated = seen.get(&key).map_or(0, |same| same.repeated);
        // What is over and was not repeated has nothing more to say; of the rest there are not too many.
        seen.retain(|_, seen| is_recent(seen) || seen.repeated > 0);
        if seen.len() >= 2 * self.most {
            seen.retain(|_, seen| is_recent(seen));
        }
        seen.insert(key, Seen { told_at: now, repeated: 0 });
        Some(repeated)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOST: usize = 60;

    fn limit() -> Limit<u32> {
        Limit::new(Duration::from_secs(60), MOST)
    }

    #[test]
    fn the_same_is_told_once_a_minute_with_a_count() {
        let limit = limit();
        let now = Instant::now();
        let count = |key, seconds| limit.count(key, now + Duration::from_secs(seconds));
        assert_eq!(count(1, 0), Some(0));
        for second in 1..60 {
            assert_eq!(count(1, second), None);
        }
        assert_eq!(count(2, 59), Some(0), "another one");
        assert_eq!(count(1, 60), Some(59));
        assert_eq!(count(1, 61), None);
        assert_eq!(count(1, 7200), Some(1));
        assert_eq!(count(1, 7300), Some(0));
    }

    #[test]
    fn many_together_are_not_too_many() {
        let limit = limit();
        let now = Instant::now();
        let mut told = 0;
        for second in 0..600 {
            for one in 0..100 {
                let at = now + Duration::from_secs(second);
                told += usize::from(limit.count(second as u32 * 100 + one, at).is_some());
                limit.count(second as u32 * 100 + one, at);
            }
        }
        assert_eq!(told, 10 * MOST);
        assert!(limit.seen.lock().unwrap().len() <= 2 * MOST);
    }
}
