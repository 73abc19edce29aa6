//! Finds the few of many rules that could match a device.
//!
//! A name that matches a pattern begins with one of the pattern's literal prefixes. So a rule is looked up
//! by those of one of its patterns, and only the rules that are found have their patterns tried.

use std::collections::HashMap;

use super::rule::{Rule, names_of};
use crate::volume::Identity;

/// The rules, by the beginnings of the names that they could match.
#[derive(Clone, Debug, Default)]
pub(super) struct Index {
    /// For each condition by its key, the rules that are looked up by it.
    by_condition: HashMap<&'static str, Prefixes>,
    /// Rules whose patterns all may begin with anything.
    others: Vec<usize>,
}

#[derive(Clone, Debug, Default)]
struct Prefixes {
    rules: HashMap<Vec<u8>, Vec<usize>>,
    /// The lengths that there are, in bytes.
    lengths: Vec<usize>,
}

impl Index {
    pub(super) fn new(rules: &[Rule]) -> Self {
        let mut index = Index::default();
        for (number, rule) in rules.iter().enumerate() {
            let prefixes = rule.patterns().filter_map(|(key, pattern)| Some((key, pattern.prefixes()?)));
            // The longer they are, the fewer other names begin with them.
            match prefixes.max_by_key(|(_, prefixes)| prefixes.iter().map(Vec::len).min()) {
                Some((key, prefixes)) => {
                    let of_condition = index.by_condition.entry(key).or_default();
                    prefixes.into_iter().for_each(|prefix| of_condition.add(prefix, number));
                }
                None => index.others.push(number),
            }
        }
        index
    }

    /// The numbers of all rules that could match `device`, and of few others, in ascending order.
    pub(super) fn candidates(&self, device: &Identity) -> Vec<usize> {
        let mut found = self.others.clone();
        for name in names_of(device) {
            match (self.by_condition.get(name.key), name.text) {
                (Some(prefixes), Some(text)) => prefixes.find(text.as_bytes(), &mut found),
                (Some(prefixes), None) if name.untold => found.extend(prefixes.rules.values().flatten()),
                _ => {}
            }
        }
        found.sort_unstable();
        found.dedup();
        found
    }
}

impl Prefixes {
    fn add(&mut self, prefix: Vec<u8>, rule: usize) {
        if let Err(place) = self.lengths.binary_search(&prefix.len()) {
            self.lengths.insert(place, prefix.len());
        }
        self.rules.entry(prefix).or_default().push(rule);
    }

    fn find(&self, name: &[u8], found: &mut Vec<usize>) {
        let beginnings = self.lengths.iter().map_while(|length| name.get(..*length));
        beginnings.filter_map(|beginning| self.rules.get(beginning)).for_each(|rules| found.extend(rules));
    }
}

#[cfg(test)]
mod tests {
    use std::fmt::Write;

    use proptest::prelude::*;

    use super::*;
    use crate::policy::Config;
    use crate::policy::rule::Fit;

    fn config(targets: &[&str]) -> Config {
        let mut text = String::new();
        for (number, target) in targets.iter().enumerate() {
            writeln!(text, "[[rules]]\nname = 'r{number}'\niscsi_target = '{target}'\nvolume_id = 'v{number}'")
                .unwrap();
        }
        Config::parse(&text, "test").unwrap()
    }

    fn candidates(targets: &[&str], name: &str) -> Vec<usize> {
        Index::new(config(targets).rules()).candidates(&Identity::of_iscsi_unit(name, 0))
    }

    #[test]
    fn only_rules_that_could_match_are_found_in_their_order() {
        let rules = ["iqn:b[0-9]", "iqn:(a|b)x?", "iqn:c", ".*", "(?i)IQN:B", "iqn:bb", "iqn:b"];
        assert_eq!(candidates(&rules, "iqn:b"), [1, 3, 4, 6]);
        assert_eq!(candidates(&rules, "iqn:b7"), [0, 1, 3, 4, 6]);
        assert_eq!(candidates(&rules, "iqn:bb"), [1, 3, 4, 5, 6]);
        assert_eq!(candidates(&rules, "IqN:b"), [3, 4]);
        assert_eq!(candidates(&rules, "x"), [3]);
        assert_eq!(candidates(&rules, ""), [3]);
    }

    #[test]
    fn a_rule_is_looked_up_by_the_pattern_that_says_most() {
        let text = "[[rules]]\nname = 'r'\niscsi_target = 'i.*'\nwwid = 'naa\\.60014(?<id>05)'\n";
        let index = Index::new(Config::parse(text, "test").unwrap().rules());
        let mut device = Identity::of_iscsi_unit("iqn:a", 0);
        assert_eq!(index.candidates(&device), [0], "its WWID cannot be told");
        device.wwid = Some("naa.6001405".to_owned());
        assert_eq!(index.candidates(&device), [0]);
        device.wwid = Some("naa.5".to_owned());
        assert!(index.candidates(&device).is_empty());
    }

    #[test]
    fn of_ten_thousand_rules_few_are_tried() {
        let targets: Vec<String> = (0..10_000).map(|number| format!(r"iqn\.2026-11\.lab:volume-{number}")).collect();
        let targets: Vec<&str> = targets.iter().map(String::as_str).collect();
        assert_eq!(candidates(&targets, "iqn.2026-11.lab:volume-9999"), [9, 99, 999, 9999]);
    }

    /// A pattern of every kind that the look-up could misjudge.
    fn pattern() -> impl Strategy<Value = String> {
        r"(\(\?i\))?([abc]|a\||\(a\|bc\)|\[ab\]|\.|b\*|c\+|a\?|b\{2\}|\(\?m:\^\)|\\b|\\<){1,5}"
    }

    proptest! {
        #[test]
        fn no_rule_that_may_be_about_a_device_is_missed(
            patterns in prop::collection::vec((pattern(), prop::option::of(pattern()), any::<bool>()), 1..8),
            target in "[abcABC]{1,6}",
            wwid in prop::option::of("[abcABC]{1,6}"),
        ) {
            let mut text = String::new();
            for (number, (first, second, swapped)) in patterns.iter().enumerate() {
                let keys = if *swapped { ["wwid", "iscsi_target"] } else { ["iscsi_target", "wwid"] };
                writeln!(text, "[[rules]]\nname = 'r{number}'\nvolume_id = 'v'\n{} = '{first}'", keys[0]).unwrap();
                if let Some(second) = second {
                    writeln!(text, "{} = '{second}'", keys[1]).unwrap();
                }
            }
            let config = Config::parse(&text, "test").unwrap();
            let device = Identity { wwid, ..Identity::of_iscsi_unit(&target, 0) };
            let found = Index::new(config.rules()).candidates(&device);
            for (number, rule) in config.rules().iter().enumerate() {
                prop_assert!(rule.fit(&device) == Fit::No || found.contains(&number), "{:?} {:?}", patterns[number], device);
            }
        }
    }
}
