use super::config::Config;
use super::profile::Profile;
use super::rule::Rule;
use crate::refusal::{Reason, Refusal};
use crate::volume::{Identity, VolumeId};

/// What the configuration says of a device.
#[derive(Clone, Debug)]
pub enum Decision<'a> {
    /// It is not protected: let it through as it is.
    Pass,
    /// It is a protected volume: a guest may have it through its mapping only.
    Protect(Protection<'a>),
    /// No guest may have it.
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
}

impl Config {
    /// What becomes of `device` when a guest asks for it. The first rule that matches decides; a
    /// device that none matches passes.
    ///
    /// A partition of a protected volume, or a stack that stands on one, is refused: neither the
    /// raw volume nor a part of the ciphertext may reach a guest that way. What stands on a mapping
    /// of volcrypt's own is encrypted by it and passes.
    pub fn decide(&self, device: &Identity) -> Decision<'_> {
        match self.beneath(device) {
            Decision::Pass => self.of_itself(device),
            Decision::Protect(protection) => Decision::Refuse(not_the_volume(device, &protection)),
            refusal => refusal,
        }
    }

    /// The first thing but a pass that any layer below `device` deserves.
    fn beneath(&self, device: &Identity) -> Decision<'_> {
        if device.is_own_mapping() {
            return Decision::Pass;
        }
        let layers = device.underlying.iter().flat_map(|below| [self.of_itself(below), self.beneath(below)]);
        layers.into_iter().find(|decision| !matches!(decision, Decision::Pass)).unwrap_or(Decision::Pass)
    }

    fn of_itself(&self, device: &Identity) -> Decision<'_> {
        if device.is_own_mapping() {
            return Decision::Pass;
        }
        let matched = self.rules().iter().find_map(|rule| Some((rule, rule.volume(device)?)));
        match matched {
            None => Decision::Pass,
            Some((_, Err(refusal))) => Decision::Refuse(refusal),
            Some((rule, Ok(volume))) => Decision::Protect(Protection {
                volume,
                rule,
                profile_name: rule.profile_name(),
                profile: rule.profile(),
            }),
        }
    }
}

fn not_the_volume(device: &Identity, protection: &Protection<'_>) -> Refusal {
    let volume = &protection.volume;
    let relation = if device.partition.is_some() { "is a partition of" } else { "stands on" };
    let sentence = format!("{device} {relation} the protected volume {volume}; give the guest the whole volume");
    Refusal::new(Reason::NotAllowed, sentence)
}

#[cfg(test)]
mod tests;
