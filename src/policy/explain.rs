use super::compare::Comparison;
use super::config::{Config, Intercept, OtherEmulators, Unmatched, WhenUnreachable, WhenUnwritable};
use super::key_manager::KeyManagerConfig;
use super::rule::{Action, Rule};
use crate::keys::kmip::KeyOrigin;

impl Config {
    /// The configuration in plain words, a line for each setting, with overlaps and warnings at the end.
    pub fn explain(&self) -> String {
        let mut lines = vec![self.keys()];
        lines.extend(self.cached_keys());
        lines.extend([self.deadlines(), self.users(), self.without_daemon(), self.without_audit()]);
        lines.extend(self.by_xml());
        lines.extend(self.without_wrapper());
        lines.push(self.guard());
        if !self.rules().iter().any(|rule| rule.protect().is_some()) {
            lines.push("No volume is protected: there is no rule that protects one.".to_owned());
        }
        lines.extend(self.rules().iter().map(in_words));
        lines.extend(self.without_rule());
        lines.extend(self.plaintext());
        lines.extend(self.unused_profiles());
        let comparison = self.compare_rules();
        lines.extend(comparison.overlaps.iter().map(|overlap| format!("Overlap: {overlap}.")));
        if comparison.more_overlaps {
            lines.push("There are more overlaps than these.".to_owned());
        }
        if comparison.incomplete {
            let why = "there are too many, or their patterns are too complicated";
            lines.push(format!("Not all pairs of rules were compared: {why}."));
        }
        lines.extend(self.warnings_after(&comparison).into_iter().map(|warning| format!("Warning: {warning}.")));
        lines.join("\n") + "\n"
    }

    /// What is allowed but probably not meant. Each is a sentence without its full stop.
    pub fn warnings(&self) -> Vec<String> {
        self.warnings_after(&self.compare_rules())
    }

    fn warnings_after(&self, comparison: &Comparison) -> Vec<String> {
        let mut warnings = Vec::new();
        if let KeyManagerConfig::KeyFile { file } = &self.key_manager {
            warnings.push(format!(
                "keys are in clear text in {}; this protects nothing from who can read it",
                file.display()
            ));
        }
        if self.hook.intercept == Intercept::Xml && !self.guard.enabled {
            warnings.push(
                "with intercept = \"xml\" and the guard off, nothing keeps a guest from a protected volume's own device; set \
                 enabled = true in [guard]"
                    .to_owned(),
            );
        }
        if let KeyManagerConfig::Kmip { kmip, .. } = &self.key_manager
            && kmip.wrapping_key.is_some()
            && kmip.key_origin == KeyOrigin::Host
        {
            warnings.push(
                "a new key goes to the KMIP servers in clear within TLS, although it comes back wrapped; set \
                 key_origin = \"server\" to have them make it"
                    .to_owned(),
            );
        }
        let slow = match &self.key_manager {
            KeyManagerConfig::Kmip { kmip, .. } => Some(("the KMIP servers have", kmip.deadline, "[kmip]")),
            KeyManagerConfig::Barbican { barbican, .. } => {
                Some(("Keystone and Barbican have", barbican.deadline, "[barbican]"))
            }
            _ => None,
        };
        if let Some((who, deadline, section)) = slow
            && deadline >= self.daemon.open_deadline.min(self.hook.deadline)
        {
            warnings.push(format!(
                "{who} as long to answer as a guest's open or the hook waits, so a guest is told of nothing but the time; \
                 make deadline_seconds in {section} shorter"
            ));
        }
        if self.key_cache.lifetime_days > 0 && self.key_manager.server().is_none() {
            warnings.push(
                "lifetime_days in [key_cache] does nothing, because keys come from no key server; remove it".to_owned(),
            );
        }
        for (index, rule) in self.rules().iter().enumerate() {
            let name = rule.name();
            if let Some(earlier) = comparison.taken_by[index] {
                let earlier = self.rules()[earlier].name();
                warnings.push(format!("rule {name} never matches: rule {earlier} before it takes every such device"));
            }
            if rule.has_one_id() {
                warnings.push(format!(
                    "rule {name} gives every device it matches the same volume id; it must match one only"
                ));
            } else if rule.confuses_luns() {
                warnings.push(format!(
                    "rule {name} gives all LUNs of a target the same volume id; set lun, or put ${{lun}} into volume_id"
                ));
            }
        }
        warnings
    }

    fn keys(&self) -> String {
        let mut more = String::new();
        if self.policy.export_keys {
            more.push_str(" Root may write them to files (export_keys).");
        }
        if let Some(days) = self.policy.key_age_days {
            more.push_str(&format!(" Those older than {days} days are warned of."));
        }
        match &self.key_manager {
            KeyManagerConfig::Embedded { directory } => {
                format!("Keys are kept in the database in {}.{more}", directory.display())
            }
            KeyManagerConfig::Kmip { directory, kmip } => format!(
                "Keys are {} the KMIP servers {}, which are asked in KMIP {} or older and have {} seconds to answer; \
                 what is known of volumes is in the database in {}.{}{more}",
                if kmip.key_origin == KeyOrigin::Server { "made by and kept on" } else { "kept on" },
                kmip.servers.join(", "),
                kmip.newest_version,
                kmip.deadline.as_secs(),
                directory.display(),
                kmip.wrapping_key.as_ref().map_or(String::new(), |wrapping| format!(
                    " Keys come wrapped by the servers' key {}, and {} unwraps them.",
                    wrapping.identifier,
                    wrapping.file.display()
                ))
            ),
            KeyManagerConfig::Barbican { directory, barbican } => {
                if let Some(file) = &barbican.volume_secrets {
                    more.push_str(&format!(
                        " New volumes that {} names get Cinder's secrets for keys.",
                        file.display()
                    ));
                }
                format!(
                    "Keys are kept in the Barbican that Keystone at {} names, both of which have {} seconds to answer; what is \
                     known of volumes is in the database in {}.{more}",
                    barbican.auth_url,
                    barbican.deadline.as_secs(),
                    directory.display()
                )
            }
            KeyManagerConfig::KeyFile { file } => format!("Keys are read from the file {}.{more}", file.display()),
        }
    }

    fn cached_keys(&self) -> Option<String> {
        self.key_manager.server()?;
        Some(match self.key_cache.lifetime_days {
            0 => "No volume starts while no key server answers: this host keeps no keys.".to_owned(),
            days => format!(
                "While no key server answers, keys that this host has used are taken from its cache, for {days} days after a \
                 server last gave them."
            ),
        })
    }

    fn deadlines(&self) -> String {
        let (open, hook) = (self.daemon.open_deadline.as_secs(), self.hook.deadline.as_secs());
        format!(
            "A guest's open of a volume waits {open} seconds at most, the hook waits {hook} seconds for the daemon."
        )
    }

    fn users(&self) -> String {
        format!("QEMU may run as one of these users: {}.", self.daemon.qemu_users.join(", "))
    }

    fn without_daemon(&self) -> String {
        let what = match self.hook.when_daemon_unreachable {
            WhenUnreachable::Refuse => "no domain starts",
            WhenUnreachable::StartUnprotected => {
                "domains without protected disks start, without the wrapper's protection of disks that are attached later"
            }
        };
        format!("While the daemon cannot be reached, {what}.")
    }

    fn without_audit(&self) -> String {
        let what = match self.audit.when_unwritable {
            WhenUnwritable::Refuse => "no key is used",
            WhenUnwritable::Continue => "keys are used all the same, and only the journal tells",
        };
        format!("While the audit log cannot be written, {what}.")
    }

    fn by_xml(&self) -> Option<String> {
        (self.hook.intercept == Intercept::Xml).then(|| {
            "Disks get to their mappings by the domain's XML, which 'volcrypt domain rewrite' and 'volcrypt attach-device' \
             see to, whatever the emulator is."
                .to_owned()
        })
    }

    fn without_wrapper(&self) -> Option<String> {
        if self.hook.intercept == Intercept::Xml && self.guard.enabled {
            return None;
        }
        // Nothing is asked of a domain where nothing is protected.
        (!self.rules().is_empty()).then(|| match self.hook.other_emulators {
            OtherEmulators::Refuse if self.hook.intercept == Intercept::Xml => {
                "No domain starts without the guard.".to_owned()
            }
            OtherEmulators::Start if self.hook.intercept == Intercept::Xml => {
                "Without the guard, domains start unless they have a protected disk, and protected volumes that are \
                 attached to them later past volcrypt are written in clear."
                    .to_owned()
            }
            OtherEmulators::Refuse => "Domains that run another emulator than the wrapper do not start.".to_owned(),
            OtherEmulators::Start => format!(
                "Domains that run another emulator than the wrapper start unless they have a protected disk, and \
                 protected volumes that are attached to them later are {}.",
                if self.guard.enabled { "refused by the guard" } else { "written in clear" }
            ),
        })
    }

    fn without_rule(&self) -> Option<String> {
        let what = match self.policy.unmatched_iscsi {
            Unmatched::Pass => "are let through as they are",
            Unmatched::Deny => "are denied to every guest",
        };
        let needed = !self.rules().is_empty() || self.policy.unmatched_iscsi == Unmatched::Deny;
        needed.then(|| format!("iSCSI volumes that no rule matches {what}."))
    }

    fn plaintext(&self) -> Option<String> {
        let protects = self.rules().iter().any(|rule| rule.protect().is_some());
        let patterns = self.policy.plaintext_targets.patterns().collect::<Vec<_>>().join(" or ");
        let matching = if patterns.is_empty() { patterns } else { format!(", and to paths matching {patterns}") };
        if protects && self.hook.intercept == Intercept::Xml {
            let sentence = "Nothing keeps QEMU from copying a protected volume in clear: it runs without the wrapper.";
            return Some(sentence.to_owned());
        }
        protects.then(|| {
            format!(
                "While a guest uses a protected volume, QEMU writes only to what its live XML names, to what a rule \
                 protects or lets pass{matching}."
            )
        })
    }

    fn guard(&self) -> String {
        match self.guard.enabled {
            true => format!(
                "The guard keeps processes of the cgroup {} from opening raw devices of protected volumes.",
                self.guard.cgroup
            ),
            false => {
                "The guard is off: what runs without the wrapper can open raw devices of protected volumes.".to_owned()
            }
        }
    }

    fn unused_profiles(&self) -> impl Iterator<Item = String> {
        let unused = self.profiles().filter(|(name, _)| {
            // The built-in profile is no setting that someone made and forgot.
            *name != "default"
                && !self.rules().iter().any(|rule| rule.protect().is_some_and(|protect| protect.profile_name == *name))
        });
        unused.map(|(name, profile)| format!("Profile {name} ({profile}) is used by no rule."))
    }
}

fn in_words(rule: &Rule) -> String {
    let (name, subject) = (rule.name(), rule.subject());
    let domains = rule.domains().map(|domains| format!(", for {domains}")).unwrap_or_default();
    // What was put in between ends with a comma.
    let domains = if rule.lun().is_some() || !domains.is_empty() { domains + "," } else { domains };
    match rule.action() {
        Action::Protect(protect) => {
            let keys = match protect.create_keys {
                true => "keys for blank volumes are created at their first use",
                false => "keys are not created automatically",
            };
            let (profile_name, profile) = (&protect.profile_name, &protect.profile);
            format!("Rule {name}: {subject}{domains} are protected with profile {profile_name} ({profile}); {keys}.")
        }
        Action::Pass => format!("Rule {name}: {subject}{domains} are let through as they are."),
        Action::Deny => format!("Rule {name}: {subject}{domains} are denied."),
    }
}
