//! Whether keys are older than the configuration wants.

use super::Finding;
use crate::protocol::KeyStatus;

/// Looks at the age of every key; `most` is how many days it may be.
pub(super) fn age(keys: &[KeyStatus], most: u32) -> Finding {
    const SUBJECT: &str = "keys";
    let old = keys.iter().filter(|key| key.old);
    match old.clone().max_by_key(|key| key.age_days) {
        None => Finding::ok(SUBJECT, format!("none is older than {most} days (key_age_days)")),
        Some(oldest) => Finding::warn(
            SUBJECT,
            format!(
                "{} of {} are older than {most} days (key_age_days); the oldest, of volume {}, has {} days",
                old.count(),
                keys.len(),
                oldest.info.volume,
                oldest.age_days
            ),
            "copy what stands on such a volume to one that is newly enrolled, and destroy the old one; 'volcrypt key list' \
             shows all",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::super::Verdict;
    use super::*;
    use crate::keys::{KeyHandle, KeyInfo, ManagerKind};

    #[test]
    fn the_oldest_of_the_old_is_named() {
        let key = |name: &str, age_days| KeyStatus {
            info: KeyInfo {
                volume: name.parse().unwrap(),
                key: KeyHandle::first(&name.parse().unwrap()),
                key_size: 512.try_into().unwrap(),
                created_at: 0,
                destroyed: false,
                hosts: vec![],
            },
            manager: ManagerKind::Embedded,
            volumes: vec![],
            last_use: None,
            age_days,
            old: age_days > 365,
        };
        assert_eq!(age(&[key("one", 365)], 365).verdict(), Verdict::Ok);
        let finding = age(&[key("one", 366), key("two", 400), key("three", 3)], 365);
        assert_eq!(finding.verdict(), Verdict::Warn);
        assert_eq!(
            finding.sentence,
            "2 of 3 are older than 365 days (key_age_days); the oldest, of volume two, has 400 days"
        );
    }
}
