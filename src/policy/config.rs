use std::collections::{BTreeMap, HashSet};
use std::fs::OpenOptions;
use std::io::{self, Read};
use std::ops::RangeInclusive;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use toml::Spanned;

use super::error::{ConfigError, Fault};
use super::file::{AuditTable, DaemonTable, File, HookTable, PolicyTable, ProfileTable, RuleTable};
use super::guard::GuardConfig;
use super::index::Index;
use super::key_manager::{KeyCacheConfig, KeyManagerConfig, KeyServers};
use super::profile::{NAME_RULE, Profile, is_name};
use super::rule::{Fit, Rule};
use super::targets::PlaintextTargets;
use crate::volume::Identity;

/// Where the configuration is, unless a program is told otherwise.
pub const DEFAULT_PATH: &str = "/etc/volcrypt/volcrypt.toml";

/// The largest file that is read, in bytes.
const SIZE_LIMIT: u64 = 1 << 20;
/// The name of the profile that always exists.
const DEFAULT_PROFILE: &str = "default";
/// In seconds.
const DEFAULT_OPEN_DEADLINE: u64 = 20;
/// In seconds.
const DEFAULT_HOOK_DEADLINE: u64 = 30;
/// The most that makes sense: a century.
const MOST_DAYS: u32 = 36_500;
const EXAMPLE: &str = "/usr/share/doc/volcrypt/examples/volcrypt.toml";

/// The configuration. An empty file is a valid one; it protects nothing.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where keys live.
    pub key_manager: KeyManagerConfig,
    /// How long they may be used without it.
    pub key_cache: KeyCacheConfig,
    /// The servers where keys can live, whether or not they do.
    pub key_servers: KeyServers,
    /// What the daemon is told.
    pub daemon: DaemonConfig,
    /// What the hook is told.
    pub hook: HookConfig,
    /// What holds beside the rules.
    pub policy: PolicyConfig,
    /// What keeps guests from raw devices.
    pub guard: GuardConfig,
    /// What holds for the audit log.
    pub audit: AuditConfig,
    profiles: BTreeMap<String, Profile>,
    rules: Vec<Rule>,
    index: Index,
}

/// The section `[daemon]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DaemonConfig {
    /// How long a guest's open may wait before it fails with `ETIMEDOUT`: 1 to 120 seconds.
    pub open_deadline: Duration,
    /// The names of the users whose processes may register as a wrapped QEMU.
    pub qemu_users: Vec<String>,
}

/// The section `[hook]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HookConfig {
    /// How guests get to their mappings.
    pub intercept: Intercept,
    /// What becomes of domains that start while the daemon cannot be reached.
    pub when_daemon_unreachable: WhenUnreachable,
    /// What becomes of domains that run another emulator than the wrapper, once there are rules.
    pub other_emulators: OtherEmulators,
    /// How long the hook waits for the daemon: 1 to 300 seconds.
    pub deadline: Duration,
}

/// The section `[audit]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AuditConfig {
    /// What becomes of a key's use that cannot be recorded.
    pub when_unwritable: WhenUnwritable,
}

/// What becomes of a key's use that cannot be recorded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WhenUnwritable {
    /// The key is not used.
    Refuse,
    /// It is used all the same, and only the journal tells.
    Continue,
}

impl Default for DaemonConfig {
    fn default() -> Self {
        DaemonConfig {
            open_deadline: Duration::from_secs(DEFAULT_OPEN_DEADLINE),
            // Debian's and Fedora's.
            qemu_users: vec!["libvirt-qemu".to_owned(), "qemu".to_owned()],
        }
    }
}

impl Default for HookConfig {
    fn default() -> Self {
        HookConfig {
            intercept: Intercept::Open,
            when_daemon_unreachable: WhenUnreachable::Refuse,
            other_emulators: OtherEmulators::Refuse,
            deadline: Duration::from_secs(DEFAULT_HOOK_DEADLINE),
        }
    }
}

/// The section `[policy]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PolicyConfig {
    /// What becomes of iSCSI volumes that no rule matches.
    pub unmatched_iscsi: Unmatched,
    /// Whether a volume's key may be written to a file.
    pub export_keys: bool,
    /// From how many days on a key counts as old; never if it is nothing.
    pub key_age_days: Option<u32>,
    /// Where guests with a protected volume may write what nothing encrypts, beside what libvirt gave them.
    pub plaintext_targets: PlaintextTargets,
}

/// What becomes of devices that no rule matches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unmatched {
    /// They are let through as they are.
    Pass,
    /// No guest may have them.
    Deny,
}

/// How guests get to the mappings of their volumes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Intercept {
    /// The wrapper has QEMU's opens answered; the domains' XML stays as it is.
    #[default]
    Open,
    /// The domains' XML names the mappings, and the daemon holds each of them open until QEMU has it.
    Xml,
}

/// What becomes of domains that run another emulator than the wrapper.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OtherEmulators {
    /// They do not start.
    Refuse,
    /// They start unless they have a protected disk; what is attached to them later is not encrypted.
    Start,
}

/// What becomes of domains that start while the daemon cannot be reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WhenUnreachable {
    /// None starts.
    Refuse,
    /// Those without a protected disk start, without a guard for disks that are attached later.
    StartUnprotected,
}

impl Config {
    /// Reads the configuration at `path`.
    ///
    /// # Errors
    /// When there is no such file, it is larger than 1 MiB or no regular file, and those of
    /// [`Config::parse`].
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let name = path.display().to_string();
        let bytes = read_capped(path).map_err(|error| {
            let sentence = match error.kind() {
                io::ErrorKind::NotFound => {
                    format!("there is no configuration; copy {EXAMPLE} to this place and edit it")
                }
                _ => format!("cannot read the configuration: {error}; it has to be a regular file of at most 1 MiB"),
            };
            ConfigError::whole(&name, sentence)
        })?;
        match std::str::from_utf8(&bytes) {
            Ok(text) => Config::parse(text, &name),
            Err(error) => {
                let sentence = "this line is not UTF-8 text; correct it with an editor";
                Err(ConfigError::at(&name, &bytes, error.valid_up_to(), sentence))
            }
        }
    }

    /// Reads a configuration from `text`; `name` is what errors call the file.
    ///
    /// # Errors
    /// One sentence, `NAME:LINE: what is wrong; what to do`, for the first fault found.
    pub fn parse(text: &str, name: &str) -> Result<Self, ConfigError> {
        let file: File = toml::from_str(text).map_err(|error| {
            // serde names Rust's types, which are nothing to an operator.
            let what = error.message().trim_end().replace("expected i64", "expected a whole number");
            let what = what.lines().collect::<Vec<_>>().join(", ");
            let sentence = format!("{what}; correct this line ({EXAMPLE} explains every setting)");
            match error.span() {
                Some(span) => ConfigError::at(name, text.as_bytes(), span.start, sentence),
                None => ConfigError::whole(name, sentence),
            }
        })?;
        Config::from_file(file)
            .map_err(|fault| ConfigError::at(name, text.as_bytes(), fault.span.start, fault.sentence))
    }

    /// The profile called `name`. One called `default` always exists.
    pub fn profile(&self, name: &str) -> Option<&Profile> {
        self.profiles.get(name)
    }

    /// Every profile with its name, in alphabetical order.
    pub fn profiles(&self) -> impl Iterator<Item = (&str, &Profile)> {
        self.profiles.iter().map(|(name, profile)| (name.as_str(), profile))
    }

    /// The rules, in the order in which they are tried.
    pub fn rules(&self) -> &[Rule] {
        &self.rules
    }

    /// The rules that are about `device` itself or may be, in the order in which they are tried.
    pub(super) fn rules_for<'a>(&'a self, device: &Identity) -> impl Iterator<Item = (&'a Rule, Fit)> {
        let candidates = self.index.candidates(device).into_iter().map(|number| &self.rules[number]);
        candidates.map(|rule| (rule, rule.fit(device))).filter(|(_, fit)| *fit != Fit::No)
    }

    fn from_file(file: File) -> Result<Self, Fault> {
        let profiles = profiles(file.profiles)?;
        let rules = rules(file.rules, &profiles)?;
        let key_servers = KeyServers::new(file.kmip, file.barbican)?;
        Ok(Config {
            key_manager: KeyManagerConfig::new(file.key_manager, &key_servers)?,
            key_cache: KeyCacheConfig::new(file.key_cache)?,
            key_servers,
            daemon: daemon(file.daemon)?,
            hook: hook(file.hook)?,
            policy: policy(file.policy)?,
            guard: GuardConfig::new(file.guard)?,
            audit: audit(file.audit)?,
            index: Index::new(&rules),
            rules,
            profiles,
        })
    }
}

fn read_capped(path: &Path) -> io::Result<Vec<u8>> {
    // Without O_NONBLOCK, opening a FIFO would wait for a writer.
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::other("it is no regular file"));
    }
    let mut bytes = Vec::new();
    file.take(SIZE_LIMIT + 1).read_to_end(&mut bytes)?;
    match bytes.len() as u64 > SIZE_LIMIT {
        true => Err(io::Error::other("it is too large")),
        false => Ok(bytes),
    }
}

fn daemon(table: DaemonTable) -> Result<DaemonConfig, Fault> {
    let open_deadline = seconds("open_deadline_seconds", table.open_deadline_seconds, DEFAULT_OPEN_DEADLINE, 1..=120)?;
    let Some(users) = table.qemu_users else {
        return Ok(DaemonConfig { open_deadline, ..DaemonConfig::default() });
    };
    if users.get_ref().is_empty() {
        let sentence = "qemu_users is empty, so no QEMU could ever register; name the user that libvirt runs QEMU as";
        return Err(Fault::new(users.span(), sentence));
    }
    for user in users.get_ref() {
        if !is_name(user.get_ref()) {
            return Err(Fault::new(user.span(), format!("{:?} cannot be a user's name; {NAME_RULE}", user.get_ref())));
        }
    }
    let qemu_users = users.into_inner().into_iter().map(Spanned::into_inner).collect();
    Ok(DaemonConfig { open_deadline, qemu_users })
}

fn hook(table: HookTable) -> Result<HookConfig, Fault> {
    let when_daemon_unreachable = word(
        "when_daemon_unreachable",
        table.when_daemon_unreachable,
        [("refuse", WhenUnreachable::Refuse), ("start-unprotected", WhenUnreachable::StartUnprotected)],
    )?;
    let intercept = word("intercept", table.intercept, [("open", Intercept::Open), ("xml", Intercept::Xml)])?;
    let other_emulators = word(
        "other_emulators",
        table.other_emulators,
        [("refuse", OtherEmulators::Refuse), ("start", OtherEmulators::Start)],
    )?;
    let deadline = seconds("deadline_seconds", table.deadline_seconds, DEFAULT_HOOK_DEADLINE, 1..=300)?;
    Ok(HookConfig { intercept, when_daemon_unreachable, other_emulators, deadline })
}

fn policy(table: PolicyTable) -> Result<PolicyConfig, Fault> {
    let unmatched_iscsi =
        word("unmatched_iscsi", table.unmatched_iscsi, [("pass", Unmatched::Pass), ("deny", Unmatched::Deny)])?;
    let plaintext_targets = PlaintextTargets::new(table.plaintext_targets)?;
    let key_age_days = match table.key_age_days {
        None => None,
        Some(days) => match u32::try_from(*days.get_ref()).ok().filter(|days| *days <= MOST_DAYS) {
            Some(days) => Some(days).filter(|&days| days > 0),
            None => {
                let sentence =
                    format!("key_age_days = {days} is out of range; use 1 to {MOST_DAYS}, or 0 for no limit");
                return Err(Fault::new(days.span(), sentence));
            }
        },
    };
    Ok(PolicyConfig { unmatched_iscsi, export_keys: table.export_keys, key_age_days, plaintext_targets })
}

fn audit(table: AuditTable) -> Result<AuditConfig, Fault> {
    let words = [("refuse", WhenUnwritable::Refuse), ("continue", WhenUnwritable::Continue)];
    Ok(AuditConfig { when_unwritable: word("when_unwritable", table.when_unwritable, words)? })
}

/// One of two words; the first one is the default.
fn word<T>(key: &str, value: Option<Spanned<String>>, words: [(&str, T); 2]) -> Result<T, Fault> {
    let [(first, default), (second, other)] = words;
    match value {
        None => Ok(default),
        Some(word) if word.get_ref() == first => Ok(default),
        Some(word) if word.get_ref() == second => Ok(other),
        Some(word) => {
            let sentence = format!("{key} = {:?} is not known; use {first:?} or {second:?}", word.get_ref());
            Err(Fault::new(word.span(), sentence))
        }
    }
}

pub(super) fn seconds(
    key: &str,
    value: Option<Spanned<i64>>,
    default: u64,
    allowed: RangeInclusive<u64>,
) -> Result<Duration, Fault> {
    let Some(value) = value else { return Ok(Duration::from_secs(default)) };
    match u64::try_from(*value.get_ref()).ok().filter(|seconds| allowed.contains(seconds)) {
        Some(seconds) => Ok(Duration::from_secs(seconds)),
        None => {
            let (low, high) = allowed.into_inner();
            Err(Fault::new(value.span(), format!("{key} = {value} is out of range; use {low} to {high}")))
        }
    }
}

fn profiles(tables: BTreeMap<Spanned<String>, ProfileTable>) -> Result<BTreeMap<String, Profile>, Fault> {
    let mut profiles = BTreeMap::from([(DEFAULT_PROFILE.to_owned(), Profile::default())]);
    for (name, table) in tables {
        if !is_name(name.get_ref()) {
            return Err(Fault::new(name.span(), format!("{:?} cannot name a profile; {NAME_RULE}", name.get_ref())));
        }
        profiles.insert(name.into_inner(), Profile::new(table)?);
    }
    Ok(profiles)
}

fn rules(tables: Vec<Spanned<RuleTable>>, profiles: &BTreeMap<String, Profile>) -> Result<Vec<Rule>, Fault> {
    let mut rules = Vec::with_capacity(tables.len());
    let mut names = HashSet::with_capacity(tables.len());
    for table in tables {
        let span = table.span();
        let table = table.into_inner();
        if !names.insert(table.name.get_ref().clone()) {
            let sentence =
                format!("there is a rule {:?} already; give every rule a name of its own", table.name.get_ref());
            return Err(Fault::new(table.name.span(), sentence));
        }
        let profile_name = table.profile.as_ref().map_or(DEFAULT_PROFILE, |name| name.get_ref().as_str()).to_owned();
        let Some(profile) = profiles.get(&profile_name) else {
            let known = profiles.keys().map(String::as_str).collect::<Vec<_>>().join(", ");
            let sentence =
                format!("there is no profile {profile_name:?}; add a section for it, or use one of: {known}");
            return Err(Fault::new(table.profile.map_or(span, |name| name.span()), sentence));
        };
        let profile = profile.clone();
        rules.push(Rule::new(table, span, (profile_name, profile))?);
    }
    Ok(rules)
}
