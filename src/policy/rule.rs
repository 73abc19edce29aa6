use std::borrow::Cow;
use std::ops::Range;

use regex::{Captures, Regex, RegexBuilder};
use toml::Spanned;

use super::error::Fault;
use super::file::RuleTable;
use super::profile::{NAME_RULE, Profile, is_name};
use super::template::Template;
use crate::refusal::{Reason, Refusal};
use crate::volume::{Identity, VolumeId};

/// The longest pattern, in bytes.
const PATTERN_LIMIT: usize = 1024;
/// The most memory that a compiled pattern may take, in bytes.
const COMPILED_LIMIT: usize = 1 << 20;
/// The gap of `volume_id` that stands for the device's logical unit number.
const LUN: &str = "lun";

/// A rule: which devices are protected volumes, and what they are called.
#[derive(Clone, Debug)]
pub struct Rule {
    name: String,
    iscsi_target: Option<Pattern>,
    lun: Option<u64>,
    wwid: Option<Pattern>,
    volume_id: Template,
    profile_name: String,
    profile: Profile,
    create_keys: bool,
}

/// A regular expression that a whole text has to match.
#[derive(Clone, Debug)]
struct Pattern {
    source: String,
    regex: Regex,
}

impl Rule {
    /// The rule's name, as in the file.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The name of the profile its volumes are encrypted with.
    pub fn profile_name(&self) -> &str {
        &self.profile_name
    }

    /// The profile its volumes are encrypted with.
    pub fn profile(&self) -> &Profile {
        &self.profile
    }

    /// Whether a blank volume without a key is enrolled when it is first used.
    pub fn create_keys(&self) -> bool {
        self.create_keys
    }

    pub(super) fn new(
        table: RuleTable,
        span: Range<usize>,
        profile: Profile,
        profile_name: String,
    ) -> Result<Self, Fault> {
        let name = table.name.get_ref().clone();
        if !is_name(&name) {
            return Err(Fault::new(table.name.span(), format!("{name:?} cannot name a rule; {NAME_RULE}")));
        }
        if table.iscsi_target.is_none() && table.wwid.is_none() {
            let sentence = format!("rule {name:?} says nothing about devices; give it iscsi_target, wwid or both");
            return Err(Fault::new(span, sentence));
        }
        let rule = Rule {
            iscsi_target: table.iscsi_target.as_ref().map(|text| Pattern::new("iscsi_target", text)).transpose()?,
            wwid: table.wwid.as_ref().map(|text| Pattern::new("wwid", text)).transpose()?,
            lun: table.lun.map(logical_unit).transpose()?,
            volume_id: volume_id(table.volume_id.as_ref())?,
            profile_name,
            profile,
            create_keys: table.create_keys,
            name,
        };
        rule.check_names(table.volume_id.map_or(span, |text| text.span()))?;
        Ok(rule)
    }

    /// Every gap of the template has to have exactly one source.
    fn check_names(&self, span: Range<usize>) -> Result<(), Fault> {
        for gap in self.volume_id.gaps() {
            let captures = self.patterns().filter(|pattern| pattern.captures_name(gap)).count();
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

    /// The volume that the rule sees in `device` itself, whatever lies beneath; nothing when the
    /// rule does not match. A match that makes no valid id is a refusal, never a pass.
    pub(super) fn volume(&self, device: &Identity) -> Option<Result<VolumeId, Refusal>> {
        if self.lun.is_some() && self.lun != device.lun {
            return None;
        }
        let target = device.iscsi.as_ref().map(|iscsi| iscsi.target.as_str());
        let captures = [matched(&self.iscsi_target, target)?, matched(&self.wwid, device.wwid.as_deref())?];
        let value = |name: &str| {
            let captured = captures.iter().flatten().find_map(|captures| captures.name(name));
            let lun = device.lun.filter(|_| name == LUN).map(|lun| Cow::from(lun.to_string()));
            captured.map(|text| Cow::from(text.as_str())).or(lun)
        };
        let refuse = |what: String| {
            let sentence = format!("rule {:?} makes no volume id of {device}: {what}; correct the rule", self.name);
            Refusal::new(Reason::Configuration, sentence)
        };
        Some(match self.volume_id.fill(value) {
            Ok(text) => text.parse().map_err(|error: crate::volume::InvalidVolumeId| refuse(error.to_string())),
            Err(gap) => Err(refuse(format!("the device has nothing for ${{{gap}}}"))),
        })
    }

    /// Whether every device that `later` matches is matched by this rule already.
    pub(super) fn shadows(&self, later: &Rule) -> bool {
        let covers = |own: &Option<Pattern>, other: &Option<Pattern>| match (own, other) {
            (None, _) => true,
            (Some(own), Some(other)) => own.source == other.source,
            (Some(_), None) => false,
        };
        covers(&self.iscsi_target, &later.iscsi_target)
            && covers(&self.wwid, &later.wwid)
            && (self.lun.is_none() || self.lun == later.lun)
    }

    /// Whether two LUNs of one target would get the same id.
    pub(super) fn confuses_luns(&self) -> bool {
        let tells_luns_apart = |gap: &str| gap == LUN || self.wwid.as_ref().is_some_and(|wwid| wwid.captures_name(gap));
        self.iscsi_target.is_some() && self.lun.is_none() && !self.volume_id.gaps().any(tells_luns_apart)
    }

    /// Whether every device that matches gets the same id.
    pub(super) fn has_one_id(&self) -> bool {
        self.volume_id.gaps().next().is_none()
    }

    /// Which devices the rule is about, in words.
    pub(super) fn subject(&self) -> String {
        let wwid = self.wwid.as_ref().map(|wwid| format!("a WWID matching {}", wwid.source));
        let mut words = match (&self.iscsi_target, wwid) {
            (Some(target), Some(wwid)) => format!("volumes on iSCSI targets matching {} with {wwid}", target.source),
            (Some(target), None) => format!("volumes on iSCSI targets matching {}", target.source),
            (None, wwid) => format!("block devices with {}", wwid.unwrap_or_default()),
        };
        if let Some(lun) = self.lun {
            words.push_str(&format!(", LUN {lun} only,"));
        }
        words
    }

    fn patterns(&self) -> impl Iterator<Item = &Pattern> {
        [&self.iscsi_target, &self.wwid].into_iter().flatten()
    }
}

impl Pattern {
    fn new(key: &str, text: &Spanned<String>) -> Result<Self, Fault> {
        let source = text.get_ref().clone();
        if source.is_empty() || source.len() > PATTERN_LIMIT {
            let sentence = format!("{key} has to be a regular expression of 1 to {PATTERN_LIMIT} bytes; correct it");
            return Err(Fault::new(text.span(), sentence));
        }
        // By itself first: `a)|(?:b` is no pattern, yet between the anchors it would be one, and a
        // part of a name would match.
        let compiled = compile(&source).and_then(|_| compile(&format!(r"\A(?:{source})\z")));
        match compiled {
            Ok(regex) => Ok(Pattern { source, regex }),
            Err(what) => {
                let sentence = format!("{key} is no regular expression that can be used: {what}; correct the pattern");
                Err(Fault::new(text.span(), sentence))
            }
        }
    }

    fn captures_name(&self, name: &str) -> bool {
        self.regex.capture_names().flatten().any(|capture| capture == name)
    }
}

fn compile(pattern: &str) -> Result<Regex, String> {
    let compiled = RegexBuilder::new(pattern).size_limit(COMPILED_LIMIT).dfa_size_limit(COMPILED_LIMIT).build();
    compiled.map_err(|error| match error {
        // The crate draws a picture; its last line says what is wrong.
        regex::Error::Syntax(picture) => {
            let last = picture.lines().last().unwrap_or_default();
            last.trim_start_matches("error: ").to_owned()
        }
        regex::Error::CompiledTooBig(_) => "it is too complicated".to_owned(),
        other => other.to_string().replace('\n', " "),
    })
}

/// What a pattern captures in `text`: nothing at all (the outer `None`) if it does not match, no
/// captures if there is no pattern.
fn matched<'a>(pattern: &Option<Pattern>, text: Option<&'a str>) -> Option<Option<Captures<'a>>> {
    match pattern {
        None => Some(None),
        Some(pattern) => pattern.regex.captures(text?).map(Some),
    }
}

fn logical_unit(lun: Spanned<i64>) -> Result<u64, Fault> {
    u64::try_from(*lun.get_ref())
        .map_err(|_| Fault::new(lun.span(), "lun is negative; logical unit numbers start at 0"))
}

fn volume_id(text: Option<&Spanned<String>>) -> Result<Template, Fault> {
    match text {
        Some(text) => Template::parse(text.get_ref()).map_err(|sentence| Fault::new(text.span(), sentence)),
        None => Template::parse("${id}").map_err(|sentence| Fault::new(0..0, sentence)),
    }
}
