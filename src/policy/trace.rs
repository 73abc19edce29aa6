use super::config::{Config, Unmatched};
use super::decision::Decision;
use super::rule::{Action, Rule};
use crate::domain::Requester;
use crate::volume::Identity;

impl Config {
    /// How [`Config::decide`] comes to its decision, a line for each step: the device and every device
    /// beneath it, each with the rules that are tried on it, and what comes of it all.
    pub fn trace(&self, device: &Identity, requester: &dyn Requester) -> Vec<String> {
        let mut lines = Vec::new();
        self.trace_layer(device, requester, "", &mut lines);
        lines.push(match self.decide(device, requester) {
            Decision::Pass => format!("Decision: {device} is let through as it is."),
            Decision::Refuse(refusal) => format!("Decision: refused with errno {}: {refusal}.", refusal.errno()),
            Decision::Protect(protection) => format!(
                "Decision: {device} is the protected volume {}, with profile {} for a new one; it is {} at its first use.",
                protection.volume,
                protection.profile_name,
                if protection.create_keys { "enrolled" } else { "not enrolled" },
            ),
        });
        lines
    }

    fn trace_layer(&self, device: &Identity, requester: &dyn Requester, indent: &str, lines: &mut Vec<String>) {
        lines.push(format!("{indent}{device}: {}", facts(device)));
        if device.is_own_mapping() {
            lines.push(format!("{indent}  it is a mapping of volcrypt's own, which no rule is tried on"));
            return;
        }
        lines.extend(self.tries(device, requester).map(|line| format!("{indent}  {line}")));
        for below in &device.underlying {
            self.trace_layer(below, requester, &format!("{indent}  "), lines);
        }
    }

    /// The rules that are tried, up to the one that decides.
    fn tries(&self, device: &Identity, requester: &dyn Requester) -> impl Iterator<Item = String> {
        let mut lines = Vec::new();
        for rule in self.rules() {
            let (line, decides) = attempt(rule, device, requester);
            lines.push(line);
            if decides {
                return lines.into_iter();
            }
        }
        lines.push(match (&device.iscsi, self.policy.unmatched_iscsi) {
            (Some(_), Unmatched::Deny) => "no rule matches an iSCSI volume: denied (unmatched_iscsi)".to_owned(),
            (Some(_), Unmatched::Pass) => "no rule matches an iSCSI volume: passes (unmatched_iscsi)".to_owned(),
            (None, _) => "no rule matches: passes".to_owned(),
        });
        lines.into_iter()
    }
}

/// What comes of one rule, and whether it decides.
fn attempt(rule: &Rule, device: &Identity, requester: &dyn Requester) -> (String, bool) {
    let name = rule.name();
    if let Some(mismatch) = rule.mismatch(device) {
        return (format!("rule {name} does not match: {mismatch}"), false);
    }
    if rule.depends_on_domain() && !rule.concerns(requester.facts()) {
        let domains = rule.domains().unwrap_or_default();
        let asker = requester.facts().map_or("no known domain".to_owned(), |domain| format!("domain {}", domain.name));
        return (format!("rule {name} matches the device, but is for {domains} and not for {asker}"), false);
    }
    let what = match rule.action() {
        Action::Pass => "it passes".to_owned(),
        Action::Deny => "it is denied".to_owned(),
        Action::Protect(protect) => match rule.volume(protect, device) {
            Ok(volume) => format!("protected as volume {volume}"),
            Err(refusal) => format!("refused, because {refusal}"),
        },
    };
    (format!("rule {name} matches: {what}"), true)
}

/// What rules look at.
fn facts(device: &Identity) -> String {
    let target = device.iscsi.as_ref().map(|iscsi| format!("iSCSI target {:?}", iscsi.target));
    let lun = device.lun.map(|lun| format!("LUN {lun}"));
    let wwid = device.wwid.as_ref().map(|wwid| format!("WWID {wwid:?}"));
    let dm_uuid = device.mapping.as_ref().map(|mapping| format!("device-mapper UUID {:?}", mapping.uuid));
    let partition = device.partition.map(|number| format!("partition {number}"));
    let known: Vec<String> = [partition, target, lun, wwid, dm_uuid].into_iter().flatten().collect();
    if known.is_empty() { "nothing that a rule could match".to_owned() } else { known.join(", ") }
}
