use std::fmt;
use std::str::FromStr;

use serde::de::IntoDeserializer;
use serde::de::value::Error as ValueError;
use serde::{Deserialize, Serialize};

use super::{Asker, Link};
use crate::refusal::Refusal;
use crate::volume::VolumeId;

/// The outcome of what succeeded.
pub const DONE: &str = "done";

/// The longest text of a record in bytes: names and sentences may come from a guest.
const MOST_TEXT: usize = 4096;
/// What stands at the end of a text that was cut.
const CUT: char = '…';

/// What can be found in the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// A volume was enrolled.
    Enrolled,
    /// A volume's key was used: a guest gets its mapping, or a domain's start was prepared.
    KeyUsed,
    /// Something was refused.
    Refused,
    /// A volume was retired.
    Retired,
    /// A volume that was retired is enrolled again.
    Reinstated,
    /// A key manager elsewhere is about to be asked to destroy a volume's key.
    DestructionStarted,
    /// A volume's key was destroyed.
    Destroyed,
    /// A volume's key was written to a file.
    KeyExported,
    /// Somebody was given the right to a volume.
    GrantAdded,
    /// That right was taken back.
    GrantRevoked,
    /// A volume belongs to somebody else.
    OwnerChanged,
    /// The configuration was read anew.
    PolicyReloaded,
    /// Another key-encryption key wraps new keys, and the others are being rewrapped.
    KekRotationStarted,
    /// The database was copied to a file.
    DatabaseBackedUp,
    /// A copy took the database's place.
    DatabaseRestored,
    /// A volume's key is in another key manager as well, which was given it or had it.
    KeyMoved,
    /// The key that a volume has in another key manager was destroyed in the one where it was before.
    OldKeyDestroyed,
    /// All keys are rewrapped, and the old key-encryption key is dropped.
    KekRotated,
}

/// Something that happened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// What it was.
    pub kind: Kind,
    /// The volume it was about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub volume: Option<VolumeId>,
    /// For whom.
    #[serde(flatten)]
    pub asker: Asker,
    /// [`DONE`], or the name of the errno that it was refused with.
    pub outcome: String,
    /// More about it in words; of a refusal the sentence.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub detail: String,
}

impl Event {
    /// Something that is done for the present asker.
    pub fn new(kind: Kind, volume: &VolumeId, detail: impl Into<String>) -> Self {
        Event { volume: Some(volume.clone()), ..Event::with(kind, DONE, detail.into()) }
    }

    /// Something that the present asker is refused.
    pub fn refused(refusal: &Refusal) -> Self {
        let event = Event::with(Kind::Refused, refusal.reason().errno_name(), refusal.to_string());
        Event { volume: refusal.volume().cloned(), ..event }
    }

    /// Something that is done and concerns no one volume.
    pub fn of_the_host(kind: Kind, detail: impl Into<String>) -> Self {
        Event::with(kind, DONE, detail.into())
    }

    fn with(kind: Kind, outcome: &str, detail: String) -> Self {
        Event { kind, volume: None, asker: Asker::current(), outcome: outcome.to_owned(), detail }
    }

    /// Tells the journal that this is recorded as `link`: the second witness of the log.
    pub fn announce(&self, link: Link) {
        let Event { kind, volume, asker, outcome, detail } = self;
        tracing::info!(
            audit_seq = link.seq,
            audit_hash = %link.hash,
            audit_kind = %kind,
            volume = volume.as_ref().map(VolumeId::as_str),
            domain = asker.domain,
            domain_uuid = asker.domain_uuid,
            pid = asker.pid,
            by = %asker.by,
            uid = asker.uid,
            login_uid = asker.login_uid,
            outcome,
            detail,
            "audit record {}: {self}",
            link.seq
        );
    }

    /// The event with no text longer than a record may have.
    pub(super) fn cut(mut self) -> Self {
        for text in [&mut self.asker.domain, &mut self.asker.domain_uuid].into_iter().flatten() {
            cut(text);
        }
        cut(&mut self.detail);
        self
    }
}

fn cut(text: &mut String) {
    if text.len() > MOST_TEXT {
        let mut end = MOST_TEXT - CUT.len_utf8();
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        text.truncate(end);
        text.push(CUT);
    }
}

/// Without the detail: `key-used, volume one, domain "vm", pid 7, by guest: done`.
impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Event { kind, volume, asker, outcome, .. } = self;
        write!(f, "{kind}")?;
        if let Some(volume) = volume {
            write!(f, ", volume {volume}")?;
        }
        if let Some(domain) = &asker.domain {
            write!(f, ", domain {domain:?}")?;
        }
        if let Some(pid) = asker.pid {
            write!(f, ", pid {pid}")?;
        }
        write!(f, ", by {}: {outcome}", asker.by)
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.serialize(f)
    }
}

impl FromStr for Kind {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        Kind::deserialize(text.into_deserializer())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_are_words() {
        assert_eq!(Kind::KeyUsed.to_string(), "key-used");
        assert_eq!("policy-reloaded".parse::<Kind>().unwrap(), Kind::PolicyReloaded);
        assert!("used".parse::<Kind>().unwrap_err().to_string().contains("`key-used`"));
    }

    #[test]
    fn long_texts_are_cut_between_characters() {
        for length in MOST_TEXT - 4..MOST_TEXT + 8 {
            let mut text = "é".repeat(length / 2) + &"x".repeat(length % 2);
            let before = text.clone();
            cut(&mut text);
            assert_eq!(text == before, length <= MOST_TEXT);
            assert!(text.len() <= MOST_TEXT && (text == before || text.ends_with(CUT)));
        }
    }
}
