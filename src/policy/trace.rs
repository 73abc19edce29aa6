use serde::{Deserialize, Serialize};

use super::config::Config;
use super::decision::Decision;
use super::rule::{Action, Condition, Fit, Name, Rule};
use crate::domain::Requester;
use crate::volume::{Identity, VolumeId};

/// What the configuration says of a device, and how it came to that.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Trace {
    /// Every rule in order, with what it says of the device itself.
    pub rules: Vec<RuleTrace>,
    /// What comes of it, with what lies beneath the device.
    pub outcome: Outcome,
}

/// What one rule says of a device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RuleTrace {
    /// The rule's name.
    pub rule: String,
    /// Whether it matches.
    pub matches: bool,
    /// Why so, in words.
    pub why: String,
}

/// What becomes of a device that a guest asks for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// It is not protected and passes.
    NotProtected,
    /// It is a protected volume.
    Protected {
        /// The volume.
        volume: VolumeId,
        /// The rule that says so.
        rule: String,
    },
    /// It is volcrypt's own mapping of volumes, or stands on such mappings: for domains that may have them all.
    Mapped {
        /// The volumes.
        volumes: Vec<VolumeId>,
    },
    /// No guest may have it.
    Refused {
        /// What is wrong and what to do.
        sentence: String,
    },
}

impl Config {
    /// Which rule matches `device` and why, and what becomes of it when `requester` asks for it.
    pub fn trace(&self, device: &Identity, requester: &dyn Requester) -> Trace {
        let mut decided = None;
        let rules = self.rules().iter().map(|rule| {
            let traced = rule.trace(device, requester, decided);
            if traced.matches {
                decided = decided.or(Some(rule.name()));
            }
            traced
        });
        let rules = rules.collect();
        let outcome = match self.decide(device, requester) {
            Decision::Pass => match device.own_mappings() {
                mappings if mappings.is_empty() => Outcome::NotProtected,
                mappings => Outcome::Mapped { volumes: mappings.into_iter().map(|(volume, _)| volume).collect() },
            },
            Decision::Protect(protection) => {
                Outcome::Protected { volume: protection.volume, rule: protection.rule.name().to_owned() }
            }
            Decision::Refuse(refusal) => Outcome::Refused { sentence: refusal.to_string() },
        };
        Trace { rules, outcome }
    }
}

impl Rule {
    /// `decided` is the rule that matched before.
    fn trace(&self, device: &Identity, requester: &dyn Requester, decided: Option<&str>) -> RuleTrace {
        let (matches, why) = self.verdict(device, requester, decided);
        RuleTrace { rule: self.name().to_owned(), matches, why }
    }

    fn verdict(&self, device: &Identity, requester: &dyn Requester, decided: Option<&str>) -> (bool, String) {
        let fit = self.fit(device);
        if let Some(why) = self.mismatch(device).filter(|_| fit == Fit::No || decided.is_some()) {
            return (false, why);
        }
        if device.own_volume().is_some() {
            return (false, "it would match, but this is volcrypt's own mapping".to_owned());
        }
        if !self.concerns(requester) {
            let domains = self.domains().unwrap_or_default();
            let asker =
                requester.facts().map_or("nobody in particular".to_owned(), |domain| format!("{:?}", domain.name));
            return (false, format!("it would match, but is for {domains} and not for {asker}"));
        }
        if fit == Fit::Untold {
            return (
                true,
                "it may be, for the device does not report its WWID, and all else is as the rule asks".to_owned(),
            );
        }
        let what = match self.action() {
            Action::Pass => "it passes".to_owned(),
            Action::Deny => "it is denied".to_owned(),
            Action::Protect(protect) => match self.volume(protect, device) {
                Ok(volume) => format!("volume {volume}"),
                Err(refusal) => refusal.to_string(),
            },
        };
        match decided {
            None => (true, format!("{what}, because of {}", self.match_in_words(device))),
            Some(earlier) => (true, format!("{what}, but rule {earlier:?} before it decides")),
        }
    }

    /// The first condition that does not hold.
    fn mismatch(&self, device: &Identity) -> Option<String> {
        let [target, others @ ..] = self.conditions(device);
        let lun = || {
            let wanted = self.lun().filter(|wanted| device.lun != Some(*wanted))?;
            Some(match device.lun {
                None => format!("the device has no LUN, and lun = {wanted}"),
                Some(found) => format!("LUN {found} is not {wanted}"),
            })
        };
        target.fault().or_else(lun).or_else(|| others.iter().find_map(Condition::fault))
    }

    /// The conditions that hold.
    fn match_in_words(&self, device: &Identity) -> String {
        let [target, others @ ..] = self.conditions(device);
        let in_words = |condition: &Condition<'_>| {
            condition.pattern.and(condition.name.text).map(|text| format!("{} {text:?}", condition.name.what))
        };
        let lun = self.lun().map(|lun| format!("LUN {lun}"));
        let held = in_words(&target).into_iter().chain(lun).chain(others.iter().filter_map(in_words));
        held.collect::<Vec<_>>().join(", ")
    }
}

impl Condition<'_> {
    /// Why it does not hold.
    fn fault(&self) -> Option<String> {
        let Condition { name: Name { key, what, text, .. }, pattern } = self;
        match (self.holds()?, text, pattern) {
            (true, ..) => None,
            (false, Some(text), Some(pattern)) => Some(format!("{what} {text:?} does not match {}", pattern.source())),
            (false, ..) => Some(format!("the device has no {what}, and {key} is set")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::Nobody;

    const RULES: &str = r#"
        [[rules]]
        name = "one-lun"
        iscsi_target = 'iqn\.a:(?<id>.*)'
        lun = 1
        [[rules]]
        name = "by-wwid"
        wwid = 'naa\.(?<id>.*)'
    "#;

    fn traced(device: &Identity) -> (Vec<(bool, String)>, Outcome) {
        let trace = Config::parse(RULES, "test.toml").unwrap().trace(device, &Nobody);
        (trace.rules.into_iter().map(|rule| (rule.matches, rule.why)).collect(), trace.outcome)
    }

    fn said(matches: bool, why: &str) -> (bool, String) {
        (matches, why.to_owned())
    }

    #[test]
    fn each_rule_says_why_it_matches_or_not() {
        let mut disk = Identity::of_iscsi_unit("iqn.a:v", 1);
        let (rules, outcome) = traced(&disk);
        assert_eq!(
            rules,
            [
                said(true, "volume v, because of iSCSI target \"iqn.a:v\", LUN 1"),
                said(false, "the device has no WWID, and wwid is set")
            ]
        );
        assert_eq!(outcome, Outcome::Protected { volume: "v".parse().unwrap(), rule: "one-lun".to_owned() });
        let (rules, outcome) = traced(&Identity { lun: Some(2), ..disk.clone() });
        let may_be = "it may be, for the device does not report its WWID, and all else is as the rule asks";
        assert_eq!(rules, [said(false, "LUN 2 is not 1"), said(true, may_be)]);
        assert!(
            matches!(outcome, Outcome::Refused { sentence } if sentence.contains("whether rule \"by-wwid\" is about it"))
        );
        disk.wwid = Some("naa.6".to_owned());
        assert_eq!(traced(&disk).0[1], said(true, "volume 6, but rule \"one-lun\" before it decides"));
        disk.lun = Some(2);
        assert_eq!(traced(&disk).0, [said(false, "LUN 2 is not 1"), said(true, "volume 6, because of WWID \"naa.6\"")]);
        disk.iscsi = None;
        disk.wwid = Some("t10.x".to_owned());
        let (rules, outcome) = traced(&disk);
        assert_eq!(
            rules,
            [
                said(false, "the device has no iSCSI target, and iscsi_target is set"),
                said(false, "WWID \"t10.x\" does not match naa\\.(?<id>.*)")
            ]
        );
        assert_eq!(outcome, Outcome::NotProtected);
    }

    #[test]
    fn a_match_without_a_volume_says_what_is_wrong() {
        let (rules, outcome) = traced(&Identity::of_iscsi_unit("iqn.a:../x", 1));
        assert!(rules[0].0 && rules[0].1.contains("makes no volume id"), "{rules:?}");
        assert!(matches!(outcome, Outcome::Refused { .. }), "{outcome:?}");
    }
}
