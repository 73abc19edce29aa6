use std::borrow::Cow;
use std::ops::Range;

use toml::Spanned;

use super::error::Fault;
use super::file::RuleTable;
use super::pattern::{Pattern, matched};
use super::profile::{NAME_RULE, Profile, is_name};
use super::template::Template;
use crate::domain::Requester;
use crate::refusal::{Reason, Refusal};
use crate::volume::{Identity, VolumeId};

/// The gap of `volume_id` that stands for the device's logical unit number.
const LUN: &str = "lun";

/// A rule: which devices it is about, for which domains, and what becomes of them.
#[derive(Clone, Debug)]
pub struct Rule {
    name: String,
    iscsi_target: Option<Pattern>,
    lun: Option<u64>,
    wwid: Option<Pattern>,
    dm_uuid: Option<Pattern>,
    domain: Option<Pattern>,
    owner: Option<Pattern>,
    action: Action,
}

/// What becomes of the devices that a rule matches.
#[derive(Clone, Debug)]
pub enum Action {
    /// They are protected volumes.
    Protect(Protect),
    /// They are let through as they are.
    Pass,
    /// No guest may have them.
    Deny,
}

/// How the volumes that a rule protects are called and encrypted.
#[derive(Clone, Debug)]
pub struct Protect {
    volume_id: Template,
    /// The name of the profile they are encrypted with.
    pub profile_name: String,
    /// That profile.
    pub profile: Profile,
    /// Whether a blank volume without a key is enrolled when it is first used.
    pub create_keys: bool,
}

/// One thing that a rule may ask for of a device.
pub(super) struct Condition<'a> {
    /// What the device has.
    pub(super) name: Name<'a>,
    /// What is asked for, if anything is.
    pub(super) pattern: Option<&'a Pattern>,
}

/// How a rule fits a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fit {
    /// It is about the device.
    Yes,
    /// It may be about the device: all that can be told of it fits.
    Untold,
    /// It is about others.
    No,
}

impl Condition<'_> {
    /// Whether it holds; nothing if nothing is asked for.
    pub(super) fn holds(&self) -> Option<bool> {
        let pattern = self.pattern?;
        Some(self.name.text.is_some_and(|text| pattern.is_match(text)))
    }
}

impl Rule {
    /// The rule's name, as in the file.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What becomes of the devices it matches.
    pub fn action(&self) -> &Action {
        &self.action
    }

    /// How it protects, if it does.
    pub fn protect(&self) -> Option<&Protect> {
        match &self.action {
            Action::Protect(protect) => Some(protect),
            Action::Pass | Action::Deny => None,
        }
    }

    /// `profile` is the one that the table names.
    pub(super) fn new(table: RuleTable, span: Range<usize>, profile: (String, Profile)) -> Result<Self, Fault> {
        let name = table.name.get_ref().clone();
        if !is_name(&name) {
            return Err(Fault::new(table.name.span(), format!("{name:?} cannot name a rule; {NAME_RULE}")));
        }
        if table.iscsi_target.is_none() && table.wwid.is_none() && table.dm_uuid.is_none() {
            let sentence = format!("rule {name:?} says nothing about devices; give it iscsi_target, wwid or dm_uuid");
            return Err(Fault::new(span, sentence));
        }
        let pattern =
            |key, text: &Option<Spanned<String>>| text.as_ref().map(|text| Pattern::new(key, text)).transpose();
        let rule = Rule {
            iscsi_target: pattern("iscsi_target", &table.iscsi_target)?,
            wwid: pattern("wwid", &table.wwid)?,
            dm_uuid: pattern("dm_uuid", &table.dm_uuid)?,
            domain: pattern("domain", &table.domain)?,
            owner: pattern("owner", &table.owner)?,
            lun: table.lun.as_ref().map(logical_unit).transpose()?,
            action: action(&table, profile)?,
            name,
        };
        rule.check_names(table.volume_id.map_or(span, |text| text.span()))?;
        Ok(rule)
    }

    /// Every gap of the template has to have exactly one source.
    fn check_names(&self, span: Range<usize>) -> Result<(), Fault> {
        let Some(protect) = self.protect() else { return Ok(()) };
        for gap in protect.volume_id.gaps() {
            let captures = self.patterns().filter(|(_, pattern)| pattern.captures_name(gap)).count();
            let sources = captures + usize::from(gap == LUN);
            if sources == 0 {
                let sentence = format!(
                    "rule {:?} has no capture named {gap:?} for its volume_id; \
                     write (?<{gap}>...) around the volume's name in a pattern, or correct volume_id",
                    self.name
                );
                return Err(Fault::new(span, sentence));
            }
            if sources > 1 {
                let sentence = format!("rule {:?} has two meanings for ${{{gap}}}; rename one capture", self.name);
                return Err(Fault::new(span, sentence));
            }
        }
        Ok(())
    }

    /// Whether the rule is about `device` itself, whatever lies beneath. What lets a device pass has to know it
    /// for sure.
    pub(super) fn fit(&self, device: &Identity) -> Fit {
        if self.lun.is_some() && self.lun != device.lun {
            return Fit::No;
        }
        let mut fit = Fit::Yes;
        for condition in self.conditions(device) {
            match condition.holds() {
                None | Some(true) => {}
                Some(false) if condition.name.untold && !matches!(self.action, Action::Pass) => fit = Fit::Untold,
                Some(false) => return Fit::No,
            }
        }
        fit
    }

    /// Whether the rule is about the domain that asks; one that is not known may be any. Whoever is not
    /// known is not let through for that, and gets no disk that is denied to some. Who it is is looked up
    /// only for rules that ask.
    pub(super) fn concerns(&self, requester: &dyn Requester) -> bool {
        if !self.depends_on_domain() {
            return true;
        }
        let Some(domain) = requester.facts() else {
            return !matches!(self.action, Action::Pass);
        };
        let fits = |pattern: &Option<Pattern>, text: Option<&str>| match pattern {
            None => true,
            Some(pattern) => text.is_some_and(|text| pattern.is_match(text)),
        };
        fits(&self.domain, Some(&domain.name)) && fits(&self.owner, domain.owner.as_deref())
    }

    /// Whether it is about some domains only.
    pub(super) fn depends_on_domain(&self) -> bool {
        self.domain.is_some() || self.owner.is_some()
    }

    /// The id of the volume on `device`, which matches and is protected. A match that makes no valid id
    /// is a refusal, never a pass.
    pub(super) fn volume(&self, protect: &Protect, device: &Identity) -> Result<VolumeId, Refusal> {
        let refuse = |what: String| {
            let sentence = format!("rule {:?} makes no volume id of {device}: {what}; correct the rule", self.name);
            Refusal::new(Reason::Configuration, sentence)
        };
        match self.volume_name(protect, device) {
            Ok(text) => text.parse().map_err(|error: crate::volume::InvalidVolumeId| refuse(error.to_string())),
            Err(gap) => Err(refuse(format!("the device has nothing for ${{{gap}}}"))),
        }
    }

    /// What stands in the gaps of the volume's id, whether or not that makes a valid one; the error is the first gap
    /// that nothing stands in.
    pub(super) fn volume_name<'a>(&self, protect: &'a Protect, device: &Identity) -> Result<String, &'a str> {
        let conditions = self.conditions(device);
        let captures: Vec<_> =
            conditions.into_iter().filter_map(|condition| matched(condition.pattern?, condition.name.text?)).collect();
        let value = |name: &str| {
            let captured = captures.iter().find_map(|captures| captures.name(name));
            let lun = device.lun.filter(|_| name == LUN).map(|lun| Cow::from(lun.to_string()));
            captured.map(|text| Cow::from(text.as_str())).or(lun)
        };
        protect.volume_id.fill(value)
    }

    /// By which of [`Rule::fields`] each gap of the volume's id is filled, if by any.
    pub(super) fn id_fields<'a>(&'a self, protect: &'a Protect) -> impl Iterator<Item = Option<usize>> {
        let captures = |gap: &str, field: &Option<&Pattern>| field.is_some_and(|pattern| pattern.captures_name(gap));
        protect.volume_id.gaps().map(move |gap| self.fields().iter().position(|field| captures(gap, field)))
    }

    /// Whether two LUNs of one target would get the same id.
    pub(super) fn confuses_luns(&self) -> bool {
        let Some(protect) = self.protect() else { return false };
        let one_device = [&self.wwid, &self.dm_uuid];
        let tells_luns_apart =
            |gap: &str| gap == LUN || one_device.into_iter().flatten().any(|pattern| pattern.captures_name(gap));
        self.iscsi_target.is_some() && self.lun.is_none() && !protect.volume_id.gaps().any(tells_luns_apart)
    }

    /// Whether every device that matches gets the same id.
    pub(super) fn has_one_id(&self) -> bool {
        self.protect().is_some_and(|protect| protect.volume_id.gaps().next().is_none())
    }

    /// Which devices the rule is about, in words.
    pub(super) fn subject(&self) -> String {
        let with = |what, pattern: &Option<Pattern>| Some(format!("a {what} matching {}", pattern.as_ref()?.source()));
        let with = [with("WWID", &self.wwid), with("device-mapper UUID", &self.dm_uuid)];
        let with = with.into_iter().flatten().collect::<Vec<_>>().join(" and ");
        let mut words = match &self.iscsi_target {
            Some(target) if with.is_empty() => format!("volumes on iSCSI targets matching {}", target.source()),
            Some(target) => format!("volumes on iSCSI targets matching {} with {with}", target.source()),
            None => format!("block devices with {with}"),
        };
        if let Some(lun) = self.lun {
            words.push_str(&format!(", LUN {lun} only"));
        }
        words
    }

    /// Which domains the rule is about, in words, if not about all.
    pub(super) fn domains(&self) -> Option<String> {
        let called = self.domain.as_ref().map(|domain| format!("domains called {}", domain.source()));
        let owned = self.owner.as_ref().map(|owner| format!("owned by {}", owner.source()));
        match (called, owned) {
            (Some(called), Some(owned)) => Some(format!("{called} and {owned}")),
            (None, Some(owned)) => Some(format!("domains {owned}")),
            (called, None) => called,
        }
    }

    /// The logical unit number that it asks for.
    pub(super) fn lun(&self) -> Option<u64> {
        self.lun
    }

    /// What else it asks for, and what `device` has.
    pub(super) fn conditions<'a>(&'a self, device: &'a Identity) -> [Condition<'a>; 3] {
        let [target, wwid, dm_uuid] = names_of(device);
        [(target, &self.iscsi_target), (wwid, &self.wwid), (dm_uuid, &self.dm_uuid)]
            .map(|(name, pattern)| Condition { name, pattern: pattern.as_ref() })
    }

    /// Every pattern of the rule: for iSCSI target, WWID, device-mapper UUID, domain and owner.
    pub(super) fn fields(&self) -> [Option<&Pattern>; 5] {
        [&self.iscsi_target, &self.wwid, &self.dm_uuid, &self.domain, &self.owner].map(Option::as_ref)
    }

    /// Those that may name the volume, each with the word for it in the file.
    pub(super) fn patterns(&self) -> impl Iterator<Item = (&'static str, &Pattern)> {
        let patterns = [&self.iscsi_target, &self.wwid, &self.dm_uuid];
        KEYS.into_iter().zip(patterns).filter_map(|(key, pattern)| Some((key, pattern.as_ref()?)))
    }
}

/// The words for what a pattern may ask for of a device.
const KEYS: [&str; 3] = ["iscsi_target", "wwid", "dm_uuid"];

/// What a device has that a pattern may ask for.
#[derive(Clone, Copy)]
pub(super) struct Name<'a> {
    /// The word for it in the file.
    pub(super) key: &'static str,
    /// The word for it in a sentence.
    pub(super) what: &'static str,
    /// What it is, if the device has it.
    pub(super) text: Option<&'a str>,
    /// Whether the device has it, and it cannot be told what it is.
    pub(super) untold: bool,
}

/// What `device` has for each of [`KEYS`].
pub(super) fn names_of(device: &Identity) -> [Name<'_>; 3] {
    let dm_uuid = device.mapping.as_ref().map(|mapping| mapping.uuid.as_str());
    let [target, wwid, uuid] = KEYS;
    [
        Name { key: target, what: "iSCSI target", text: device.iscsi_target(), untold: false },
        Name { key: wwid, what: "WWID", text: device.wwid.as_deref(), untold: device.hides_wwid() },
        Name { key: uuid, what: "device-mapper UUID", text: dm_uuid, untold: false },
    ]
}

fn action(table: &RuleTable, (profile_name, profile): (String, Profile)) -> Result<Action, Fault> {
    let name = table.name.get_ref();
    let other = match table.action.as_ref().map(|word| word.get_ref().as_str()) {
        None | Some("protect") => {
            return Ok(Action::Protect(Protect {
                volume_id: volume_id(table.volume_id.as_ref())?,
                profile_name,
                profile,
                create_keys: table.create_keys.as_ref().is_some_and(|create| *create.get_ref()),
            }));
        }
        Some("pass") => Action::Pass,
        Some("deny") => Action::Deny,
        Some(word) => {
            let sentence = format!("action = {word:?} is not known; use \"protect\", \"pass\" or \"deny\"");
            return Err(Fault::new(table.action.as_ref().map_or(0..0, Spanned::span), sentence));
        }
    };
    let useless = [
        ("volume_id", table.volume_id.as_ref().map(Spanned::span)),
        ("profile", table.profile.as_ref().map(Spanned::span)),
        ("create_keys", table.create_keys.as_ref().map(Spanned::span)),
    ];
    match useless.into_iter().find_map(|(key, span)| Some((key, span?))) {
        None => Ok(other),
        Some((key, span)) => {
            let sentence = format!("{key} belongs to rules that protect, and rule {name:?} does not; remove it");
            Err(Fault::new(span, sentence))
        }
    }
}

fn logical_unit(lun: &Spanned<i64>) -> Result<u64, Fault> {
    u64::try_from(*lun.get_ref())
        .map_err(|_| Fault::new(lun.span(), "lun is negative; logical unit numbers start at 0"))
}

fn volume_id(text: Option<&Spanned<String>>) -> Result<Template, Fault> {
    match text {
        Some(text) => Template::parse(text.get_ref()).map_err(|sentence| Fault::new(text.span(), sentence)),
        None => Template::parse("${id}").map_err(|sentence| Fault::new(0..0, sentence)),
    }
}
