use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::domain::Facts;

/// How long after it began to restore a domain libvirt may ask for its start. That is the next thing it does.
const STARTS_WITHIN: Duration = Duration::from_secs(600);
/// How many domains are kept at the same time. The oldest goes for one more.
const MOST: usize = 1024;

/// The domains that libvirt has begun to restore from files that another host may have written. Its question before a start
/// does not say that there is such a file.
#[derive(Debug, Default)]
pub struct Restoring {
    domains: Mutex<VecDeque<(String, Instant)>>,
}

impl Restoring {
    /// Notes that `domain` is to be restored.
    pub fn begin(&self, domain: &Facts, now: Instant) {
        let mut domains = self.domains();
        domains.retain(|(name, begun)| name != name_of(domain) && is_recent(*begun, now));
        if domains.len() == MOST {
            domains.pop_front();
        }
        domains.push_back((name_of(domain).to_owned(), now));
    }

    /// Whether `domain`, which starts, is one of them. From now on it is none.
    pub fn ends(&self, domain: &Facts, now: Instant) -> bool {
        let mut domains = self.domains();
        let Some(at) = domains.iter().position(|(name, _)| name == name_of(domain)) else { return false };
        domains.remove(at).is_some_and(|(_, begun)| is_recent(begun, now))
    }

    fn domains(&self) -> MutexGuard<'_, VecDeque<(String, Instant)>> {
        self.domains.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn is_recent(begun: Instant, now: Instant) -> bool {
    now.saturating_duration_since(begun) <= STARTS_WITHIN
}

/// libvirt's XML always has a UUID, which stays when the domain is renamed on the way.
fn name_of(domain: &Facts) -> &str {
    domain.uuid.as_deref().unwrap_or(&domain.name)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn called(name: &str) -> Facts {
        Facts { name: name.to_owned(), uuid: None, owner: None }
    }

    #[test]
    fn a_restored_domain_is_known_until_it_starts_or_long_has_not() {
        let (restoring, begun) = (Restoring::default(), Instant::now());
        let renamed = |name| Facts { uuid: Some("u".to_owned()), ..called(name) };
        restoring.begin(&renamed("before"), begun);
        assert!(!restoring.ends(&called("before"), begun) && restoring.ends(&renamed("after"), begun));
        assert!(!restoring.ends(&renamed("after"), begun), "it has started");
        restoring.begin(&called("late"), begun);
        assert!(!restoring.ends(&called("late"), begun + STARTS_WITHIN + Duration::from_secs(1)));
    }

    #[test]
    fn no_more_domains_are_kept_than_can_be() {
        let (restoring, now) = (Restoring::default(), Instant::now());
        for number in 0..=MOST {
            restoring.begin(&called(&number.to_string()), now);
            restoring.begin(&called(&number.to_string()), now);
        }
        assert_eq!(restoring.domains().len(), MOST);
        assert!(!restoring.ends(&called("0"), now) && restoring.ends(&called("1"), now));
        restoring.begin(&called("new"), now + 2 * STARTS_WITHIN);
        assert_eq!(restoring.domains().len(), 1, "the others are long past");
    }
}
