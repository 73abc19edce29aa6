use super::config::Config;
use super::decision::{Decision, Protection};
use crate::domain::Requester;
use crate::refusal::{Reason, Refusal};
use crate::volume::{Identity, Mapping};

impl Config {
    /// What becomes of a device that stands on no protected one. Of a multipath map and its paths, a
    /// guest may have the map only, and that only if every path is the same volume by itself: a rule
    /// that knows one of them by a target that the map has not in common would miss the map, and the
    /// volume would be written in clear.
    pub(super) fn of_volume(&self, device: &Identity, requester: &dyn Requester) -> Decision<'_> {
        let decision = self.of_itself(device, requester);
        match (&decision, &device.path_of) {
            (Decision::Protect(protection), Some(map)) => Decision::Refuse(is_a_path(device, protection, map)),
            _ if device.is_multipath() => self.unlike(device, &decision, requester).map_or(decision, Decision::Refuse),
            _ => decision,
        }
    }

    fn unlike(&self, map: &Identity, decision: &Decision<'_>, requester: &dyn Requester) -> Option<Refusal> {
        map.underlying.iter().find_map(|path| {
            let of_path = self.of_itself(path, requester);
            let alike = match (decision, &of_path) {
                (Decision::Pass, Decision::Pass) => true,
                (Decision::Protect(of_map), Decision::Protect(of_path)) => of_map.volume == of_path.volume,
                // That one is a refusal already.
                (Decision::Refuse(_), _) => true,
                _ => false,
            };
            (!alike).then(|| differs(map, decision, path, of_path))
        })
    }
}

fn is_a_path(path: &Identity, protection: &Protection<'_>, map: &Mapping) -> Refusal {
    let sentence = format!(
        "{path} is one path of the multipath map {map} to the protected volume {}; give the guest {map}",
        protection.volume
    );
    Refusal::new(Reason::NotAllowed, sentence)
}

fn differs(map: &Identity, of_map: &Decision<'_>, path: &Identity, of_path: Decision<'_>) -> Refusal {
    if let Decision::Refuse(refusal) = of_path {
        return refusal;
    }
    let sentence = format!(
        "the multipath map {map} is {} and its path {path} is {}: write a rule that knows them by their WWID, which they \
         have in common",
        in_words(of_map),
        in_words(&of_path)
    );
    Refusal::new(Reason::Configuration, sentence)
}

fn in_words(decision: &Decision<'_>) -> String {
    match decision {
        Decision::Protect(protection) => format!("volume {} by rule {:?}", protection.volume, protection.rule.name()),
        _ => "protected by no rule".to_owned(),
    }
}

#[cfg(test)]
mod tests;
