use super::config::{Config, Intercept, Unmatched};
use super::profile::Profile;
use super::rule::{Action, Fit, Protect, Rule};
use crate::domain::Requester;
use crate::refusal::{Reason, Refusal};
use crate::volume::{Identity, VolumeId};

/// What the configuration says of a device.
#[derive(Clone, Debug)]
pub enum Decision<'a> {
    /// It is not protected: let it through as it is.
    Pass,
    /// It is a protected volume: a guest may have it through its mapping only.
    Protect(Protection<'a>),
    /// No guest may have it, or not this one.
    Refuse(Refusal),
}

/// How a volume is protected.
#[derive(Clone, Debug)]
pub struct Protection<'a> {
    /// The volume.
    pub volume: VolumeId,
    /// The rule that says so.
    pub rule: &'a Rule,
    /// The name of the profile that the rule names.
    pub profile_name: &'a str,
    /// That profile, for a volume that is enrolled now; an enrolled one has its own in its record.
    pub profile: &'a Profile,
    /// Whether a blank volume without a key is enrolled when it is first used.
    pub create_keys: bool,
}

impl Config {
    /// What becomes of `device` when `requester` asks for it. The first rule that matches decides; a
    /// device that none matches passes, unless it comes over iSCSI and the configuration denies those.
    ///
    /// A partition of a protected volume, or a stack that stands on one, is refused: neither the
    /// raw volume nor a part of the ciphertext may reach a guest that way. A mapping of volcrypt's own,
    /// and what stands on one, is encrypted by it and passes, as far as rules go: whether the requester may have
    /// the volumes of [`Identity::own_mappings`] is not the configuration's to say.
    pub fn decide(&self, device: &Identity, requester: &dyn Requester) -> Decision<'_> {
        if let Some(volume) = device.own_volume() {
            return self.of_mapping(device, &volume, requester);
        }
        match self.beneath(device, requester) {
            Decision::Pass => self.of_volume(device, requester),
            Decision::Protect(protection) => Decision::Refuse(not_the_volume(device, &protection)),
            refusal => refusal,
        }
    }

    /// Whether no process of a guest may open `device` itself, wrapped or not: everything that no domain at
    /// all may have as it is.
    pub fn is_guarded(&self, device: &Identity) -> bool {
        self.is_guarded_with(device, &|_| false)
    }

    /// As [`Self::is_guarded`]; a device that `is_enrolled` is guarded as well, unless a rule lets it pass in so many
    /// words: that the rule which protected it was lost makes no plaintext of what is on it.
    pub fn is_guarded_with(&self, device: &Identity, is_enrolled: &dyn Fn(&Identity) -> bool) -> bool {
        if device.own_volume().is_some() {
            return false;
        }
        self.guards_itself(device, is_enrolled)
            || device.underlying.iter().any(|below| self.is_guarded_with(below, is_enrolled))
    }

    fn guards_itself(&self, device: &Identity, is_enrolled: &dyn Fn(&Identity) -> bool) -> bool {
        // A rule for some domains is enough: what is protected for one is ciphertext to every other. Only
        // one that lets some domain pass leaves the device open.
        let mut for_some = false;
        for (rule, _) in self.rules_for(device) {
            match (rule.action(), rule.depends_on_domain()) {
                // Without the wrapper nobody asks which domain opens it, and it would be open to all of them.
                (Action::Pass, true) if self.hook.intercept == Intercept::Xml => {}
                (Action::Pass, _) => return false,
                (Action::Protect(_) | Action::Deny, false) => return true,
                (Action::Protect(_) | Action::Deny, true) => for_some = true,
            }
        }
        for_some || self.denies_unmatched(device) || is_enrolled(device)
    }

    /// Whether a rule says in so many words that `requester` may have `device` as it is.
    pub fn lets_pass(&self, device: &Identity, requester: &dyn Requester) -> bool {
        self.deciding(device, requester).is_some_and(|(rule, _)| matches!(rule.action(), Action::Pass))
    }

    /// The first rule that is about the device or may be.
    fn deciding(&self, device: &Identity, requester: &dyn Requester) -> Option<(&Rule, Fit)> {
        self.rules_for(device).find(|(rule, _)| rule.concerns(requester))
    }

    /// The first thing but a pass that any layer below `device` deserves.
    fn beneath(&self, device: &Identity, requester: &dyn Requester) -> Decision<'_> {
        for below in &device.underlying {
            let decisions = match below.own_volume() {
                Some(volume) => [self.of_mapping(below, &volume, requester), Decision::Pass],
                // A map is what its paths are, wherever it stands.
                None if below.is_multipath() => [self.of_volume(below, requester), self.beneath(below, requester)],
                // The paths of a multipath map are the volume that it is; `of_volume` looks at them.
                None if device.is_multipath() => [Decision::Pass, self.beneath(below, requester)],
                None => [self.of_itself(below, requester), self.beneath(below, requester)],
            };
            for decision in decisions {
                if !matches!(decision, Decision::Pass) {
                    return decision;
                }
            }
        }
        Decision::Pass
    }

    /// What becomes of volcrypt's own mapping of `volume`. It is the volume in clear, so it passes only where
    /// the device with the ciphertext would be protected as that volume: a rule that denies it, lets it pass as
    /// it is, or is about other domains holds whatever name the volume is asked for by.
    fn of_mapping(&self, mapping: &Identity, volume: &VolumeId, requester: &dyn Requester) -> Decision<'_> {
        let refuse = |reason, what: String| {
            let sentence = format!("{mapping} is volcrypt's own mapping of volume {volume}, and {what}");
            Decision::Refuse(Refusal::new(reason, sentence).of(volume))
        };
        for below in &mapping.underlying {
            match self.decide(below, requester) {
                Decision::Protect(protection) if protection.volume == *volume => {}
                Decision::Protect(protection) => {
                    let what = format!(
                        "rule {:?} calls {below} beneath it volume {}: correct the rule, or detach the volume and attach \
                         it anew",
                        protection.rule.name(),
                        protection.volume
                    );
                    return refuse(Reason::Configuration, what);
                }
                Decision::Refuse(refusal) => return refuse(refusal.reason(), refusal.to_string()),
                Decision::Pass => {
                    let what = format!(
                        "no rule protects {below} beneath it for this domain: correct the rules ('volcrypt policy test \
                         --device {below}' tries them)"
                    );
                    return refuse(Reason::NotAllowed, what);
                }
            }
        }
        match mapping.underlying.is_empty() {
            true => refuse(Reason::DeviceGone, "there is no device beneath it: attach the volume anew".to_owned()),
            false => Decision::Pass,
        }
    }

    pub(super) fn of_itself(&self, device: &Identity, requester: &dyn Requester) -> Decision<'_> {
        let rule = match self.deciding(device, requester) {
            Some((rule, Fit::Untold)) => return Decision::Refuse(untold(device, rule)),
            decided => decided.map(|(rule, _)| rule),
        };
        match rule.map(|rule| (rule, rule.action())) {
            None if self.denies_unmatched(device) => Decision::Refuse(Refusal::new(
                Reason::NotAllowed,
                format!(
                    "no rule matches {device}, and unmatched_iscsi = \"deny\" keeps such volumes from every guest: add \
                     a rule that protects it or lets it pass"
                ),
            )),
            None | Some((_, Action::Pass)) => Decision::Pass,
            Some((rule, Action::Deny)) => Decision::Refuse(Refusal::new(
                Reason::NotAllowed,
                format!("rule {:?} denies {device} to {}", rule.name(), whom(rule, requester)),
            )),
            Some((rule, Action::Protect(protect))) => self.protection(device, rule, protect),
        }
    }

    fn protection<'a>(&self, device: &Identity, rule: &'a Rule, protect: &'a Protect) -> Decision<'a> {
        match rule.volume(protect, device) {
            Ok(volume) => Decision::Protect(Protection {
                volume,
                rule,
                profile_name: &protect.profile_name,
                profile: &protect.profile,
                create_keys: protect.create_keys,
            }),
            Err(refusal) => Decision::Refuse(refusal),
        }
    }

    fn denies_unmatched(&self, device: &Identity) -> bool {
        device.iscsi.is_some() && self.policy.unmatched_iscsi == Unmatched::Deny
    }
}

fn whom(rule: &Rule, requester: &dyn Requester) -> String {
    match (rule.depends_on_domain(), requester.facts()) {
        (false, _) => "every guest".to_owned(),
        (true, Some(domain)) => format!("domain {}", domain.name),
        (true, None) => "a process that is no known domain".to_owned(),
    }
}

/// The refusal for a device of which only the WWID could say whether `rule` is about it.
fn untold(device: &Identity, rule: &Rule) -> Refusal {
    let sentence = format!(
        "{device} reports no WWID, so it cannot be told whether rule {:?} is about it: {}; or put a rule with action = \
         \"pass\" that knows it by its target before that one",
        rule.name(),
        device.remedy_for_no_wwid()
    );
    Refusal::new(Reason::NotAllowed, sentence)
}

fn not_the_volume(device: &Identity, protection: &Protection<'_>) -> Refusal {
    let volume = &protection.volume;
    let relation = if device.partition.is_some() { "is a partition of" } else { "stands on" };
    let sentence = format!("{device} {relation} the protected volume {volume}; give the guest the whole volume");
    Refusal::new(Reason::NotAllowed, sentence)
}

#[cfg(test)]
mod tests;
