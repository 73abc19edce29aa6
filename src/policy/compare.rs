//! Which rules take devices from each other.

use std::time::{Duration, Instant};

use super::config::Config;
use super::language::{Comparer, Empty, Relation};
use super::pattern::Pattern;
use super::rule::{Action, Rule};
use crate::volume::{Identity, Mapping};

/// How long rules are compared at most.
const TIME: Duration = Duration::from_secs(2);
/// How long examples are looked for afterwards.
const EXAMPLES_TIME: Duration = Duration::from_secs(1);
/// How many overlaps are kept, and how many are shown.
const MOST_OVERLAPS: usize = 10_000;
const MOST_SHOWN: usize = 20;
/// What a rule asks for in patterns, in the words of a sentence: see [`Rule::fields`].
const FIELDS: [&str; 5] = ["iSCSI target", "WWID", "device-mapper UUID", "domain", "owner"];
/// How many of those are about the device, and which is which.
const OF_THE_DEVICE: usize = 3;
const WWID: usize = 1;
const DM_UUID: usize = 2;
const DOMAIN: usize = 3;
const OWNER: usize = 4;

/// What comes of comparing every rule with those before it.
pub(super) struct Comparison {
    /// Of each rule, the first one before it that matches whatever it matches.
    pub(super) taken_by: Vec<Option<usize>>,
    /// Pairs of rules that match the same devices and would not do the same with them, a sentence each without
    /// its full stop.
    pub(super) overlaps: Vec<String>,
    /// Whether there are more of them.
    pub(super) more_overlaps: bool,
    /// Whether not all rules could be compared.
    pub(super) incomplete: bool,
}

impl Config {
    /// Compares all rules. It takes no more than some seconds, however many they are.
    pub(super) fn compare_rules(&self) -> Comparison {
        self.compare_rules_within(TIME)
    }

    fn compare_rules_within(&self, time: Duration) -> Comparison {
        Rules {
            rules: self.rules(),
            prefixes: self.rules().iter().map(prefixes).collect(),
            comparer: Comparer::until(Instant::now() + time),
            comparison: Comparison {
                taken_by: vec![None; self.rules().len()],
                overlaps: Vec::new(),
                more_overlaps: false,
                incomplete: false,
            },
            overlaps: Vec::new(),
        }
        .compare()
    }
}

/// What every text that a rule's patterns match begins with.
type Prefixes = [Vec<u8>; FIELDS.len()];

fn prefixes(rule: &Rule) -> Prefixes {
    rule.fields().map(|pattern| pattern.map(Pattern::literal_prefix).unwrap_or_default())
}

/// Whether texts that begin so can be the same.
fn meet(first: &[u8], second: &[u8]) -> bool {
    first.starts_with(second) || second.starts_with(first)
}

struct Rules<'a> {
    rules: &'a [Rule],
    prefixes: Vec<Prefixes>,
    comparer: Comparer<'a>,
    comparison: Comparison,
    /// By number, the earlier one last.
    overlaps: Vec<(usize, usize)>,
}

/// How a rule is related to an earlier one.
enum Related {
    /// No device is for both, as far as that can be told.
    Apart,
    /// Every device of the later one is the earlier one's.
    Taken,
    /// Some devices are for both.
    Overlapping,
}

impl<'a> Rules<'a> {
    fn compare(mut self) -> Comparison {
        let field = self.telling_field();
        let order = self.order(field);
        for (index, &one) in order.iter().enumerate() {
            // In this order, what may begin as this one does comes right after it.
            for &other in &order[index + 1..] {
                if !self.prefixes[other][field].starts_with(&self.prefixes[one][field]) {
                    break;
                }
                self.look_at(one.min(other), one.max(other));
            }
            if !self.comparer.has_time() {
                self.comparison.incomplete = true;
                break;
            }
        }
        self.tell_overlaps();
        self.comparison
    }

    /// The field by which the fewest pairs are left to compare.
    fn telling_field(&self) -> usize {
        let pairs = |&field: &usize| -> usize {
            let order = self.order(field);
            let begins = |one: usize, other: usize| self.prefixes[other][field].starts_with(&self.prefixes[one][field]);
            let after = |index: usize| order[index + 1..].partition_point(|&other| begins(order[index], other));
            (0..order.len()).map(after).sum()
        };
        (0..OF_THE_DEVICE).min_by_key(pairs).unwrap_or(0)
    }

    fn order(&self, field: usize) -> Vec<usize> {
        let mut order: Vec<usize> = (0..self.rules.len()).collect();
        order.sort_by_key(|&index| &self.prefixes[index][field]);
        order
    }

    fn look_at(&mut self, earlier: usize, later: usize) {
        match self.relate(earlier, later) {
            Related::Apart => {}
            Related::Taken => {
                let taken_by = &mut self.comparison.taken_by[later];
                *taken_by = Some(taken_by.map_or(earlier, |first| first.min(earlier)));
            }
            Related::Overlapping if self.overlaps.len() < MOST_OVERLAPS => self.overlaps.push((later, earlier)),
            Related::Overlapping => self.comparison.more_overlaps = true,
        }
    }

    fn relation(&mut self, field: usize, first: &'a Pattern, second: &'a Pattern) -> Relation {
        // Device-mapper's devices need no UUID; no other name is empty.
        let empty = if field == DM_UUID { Empty::Counts } else { Empty::Never };
        self.comparer.relation(first, second, empty)
    }

    fn relate(&mut self, earlier: usize, later: usize) -> Related {
        if !self.may_meet(earlier, later) {
            return Related::Apart;
        }
        let (earlier, later) = (&self.rules[earlier], &self.rules[later]);
        let (mut covers, mut meets) = (Some(earlier.lun().is_none() || earlier.lun() == later.lun()), true);
        for (field, pair) in earlier.fields().into_iter().zip(later.fields()).enumerate() {
            let covered = match pair {
                (None, _) => Some(true),
                (Some(_), None) => Some(false),
                (Some(first), Some(second)) => {
                    let relation = self.relation(field, first, second);
                    match relation.common {
                        Some(None) => return Related::Apart,
                        Some(Some(_)) => {}
                        None => meets = false,
                    }
                    relation.covers
                }
            };
            covers = match (covers, covered) {
                (Some(false), _) | (_, Some(false)) => Some(false),
                (Some(true), Some(true)) => Some(true),
                _ => None,
            };
        }
        // A rule that passes has to know volume and domain for sure; one that does not may come in its place.
        let knows = [WWID, DOMAIN, OWNER].into_iter().all(|field| earlier.fields()[field].is_none());
        if covers == Some(true) && (knows || !matches!(earlier.action(), Action::Pass)) {
            return Related::Taken;
        }
        self.comparison.incomplete |= covers.is_none() || !meets;
        if meets { Related::Overlapping } else { Related::Apart }
    }

    /// What can be told at once of two rules.
    fn may_meet(&self, one: usize, other: usize) -> bool {
        let (first, second) = (&self.rules[one], &self.rules[other]);
        let (prefixes, others) = (&self.prefixes[one], &self.prefixes[other]);
        if first.lun().is_some() && second.lun().is_some() && first.lun() != second.lun() {
            return false;
        }
        if !prefixes.iter().zip(others).all(|(first, second)| meet(first, second)) {
            return false;
        }
        // Of device-mapper's devices, only a multipath map has the volume's target, LUN and WWID.
        let of_a_disk = |rule: &Rule| rule.lun().is_some() || rule.fields()[..DM_UUID].iter().any(Option::is_some);
        let of_a_map = |prefixes: &Prefixes| meet(&prefixes[DM_UUID], Mapping::MULTIPATH_PREFIX.as_bytes());
        !(of_a_disk(first) || of_a_disk(second)) || (of_a_map(prefixes) && of_a_map(others))
    }

    fn tell_overlaps(&mut self) {
        self.comparer.go_on_until(Instant::now() + EXAMPLES_TIME);
        let mut overlaps = std::mem::take(&mut self.overlaps);
        overlaps.sort_unstable();
        // What never matches takes nothing from anybody.
        overlaps.retain(|&(later, _)| self.comparison.taken_by[later].is_none());
        for (later, earlier) in overlaps {
            if self.comparison.taken_by[earlier].is_some() {
                continue;
            }
            let Some(sentence) = self.tell(&self.rules[earlier], &self.rules[later]) else { continue };
            if self.comparison.overlaps.len() == MOST_SHOWN {
                self.comparison.more_overlaps = true;
                return;
            }
            self.comparison.overlaps.push(sentence);
        }
    }

    /// What the later of two rules that overlap would do otherwise, with an example.
    fn tell(&mut self, earlier: &'a Rule, later: &'a Rule) -> Option<String> {
        let mut texts = [const { None }; FIELDS.len()];
        for (field, (first, second)) in earlier.fields().into_iter().zip(later.fields()).enumerate() {
            if let Some(one) = first.or(second) {
                texts[field] = self.relation(field, one, second.unwrap_or(one)).common.flatten();
            }
        }
        let lun = earlier.lun().or(later.lun());
        let what = otherwise(earlier, later, &example(&texts, lun))?;
        let mut words: Vec<String> =
            FIELDS.iter().zip(&texts).filter_map(|(what, text)| Some(format!("{what} {:?}", text.as_ref()?))).collect();
        words.extend(lun.map(|lun| format!("LUN {lun}")));
        let (first, second) = (earlier.name(), later.name());
        Some(format!(
            "rules {first} and {second} both match {}; {first} comes first, {second} {what}",
            words.join(", ")
        ))
    }
}

/// What `later` would do otherwise with a device that `earlier` has, if anything.
fn otherwise(earlier: &Rule, later: &Rule, device: &Identity) -> Option<String> {
    let (first, second) = match (earlier.action(), later.action()) {
        (Action::Protect(first), Action::Protect(second)) => (first, second),
        (Action::Pass, Action::Pass) | (Action::Deny, Action::Deny) => return None,
        (_, Action::Pass) => return Some("would let it pass".to_owned()),
        (_, Action::Deny) => return Some("would deny it".to_owned()),
        (_, Action::Protect(_)) => return Some("would protect it".to_owned()),
    };
    // The example may make one id of what makes two of others.
    let another_id = earlier.volume_name(first, device) != later.volume_name(second, device)
        || !earlier.id_fields(first).eq(later.id_fields(second));
    if another_id {
        return Some("would give it another volume id".to_owned());
    }
    if first.profile != second.profile {
        return Some(format!("would use profile {} and not {}", second.profile_name, first.profile_name));
    }
    (first.create_keys != second.create_keys).then(|| match second.create_keys {
        true => "would create a key for it".to_owned(),
        false => "would create no key for it".to_owned(),
    })
}

/// A device with these names.
fn example([target, wwid, dm_uuid, ..]: &[Option<String>; FIELDS.len()], lun: Option<u64>) -> Identity {
    let mut device = Identity::of_iscsi_unit(target.as_deref().unwrap_or_default(), lun.unwrap_or_default());
    device.wwid = wwid.clone();
    device.mapping = dm_uuid.as_ref().map(|uuid| Mapping { name: String::new(), uuid: uuid.clone() });
    device
}

#[cfg(test)]
mod tests;
