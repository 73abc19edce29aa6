//! Which key of a volume counts.
//!
//! Barbican demands no unique names, so two hosts that enrol one new volume at the same moment may make a key each.
//! Nothing in Barbican can be won by one of them only: metadata that two add at once is both times said to be new. So a
//! key is used only after it was chosen, and that goes as follows.
//!
//! A new key is offered: what is known of the volume is written beside it, all of it in one request. Before one is
//! chosen, whoever is about to waits, looks again, and takes the oldest that is offered (of two that are equally old,
//! the one whose id comes first). A key that is offered after that look is one whose maker waits in its turn, and then
//! finds the other one chosen. To choose a key again changes nothing.
//!
//! A choice that may be new is looked at again before the key is used, after as long a wait, by whoever finds it: of two
//! choices the later one's host sees both then, and uses neither. So two keys of a volume are used only if what was
//! written is not seen for longer than [`PATIENCE`]. One that was looked at again is settled, and noted as such, so that
//! nobody waits any more.
//!
//! That two are chosen does not come about at all where [`PATIENCE`] is at least [`PROMPTLY`] and twice the time after
//! which the other nodes of a cluster see what was written. Where it does in spite of all, neither is used until
//! somebody has decided. A key whose making broke off before it was offered counts for nothing.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::answer::NoAnswer;
use super::client::Asking;
use super::messages::Secret;
use super::refusals::About;
use super::{BarbicanKeyManager, name_of};
use crate::keys::SealedDescription;
use crate::refusal::{Reason, Refusal};
use crate::volume::VolumeId;

/// How long to wait before a key is chosen, and before one that was chosen is used.
pub(super) const PATIENCE: Duration = Duration::from_secs(3);
/// How long a choice may take: the look that it is made by, and until Barbican has it.
pub(super) const PROMPTLY: Duration = Duration::from_secs(1);
/// How many looks may take too long for a choice.
const SLOW_LOOKS: usize = 2;
/// The most keys of one volume that are offered or chosen. More than a few were not made by volcrypt.
const MOST: usize = 16;
/// How much one metadatum holds, in bytes; Barbican's column has 255 characters.
const PIECE: usize = 240;

/// How much of its seal tells a description's pieces from those of others, in hexadecimal digits.
const SET: usize = 16;

const VOLUME: &str = "volcrypt-volume";
/// The number of a piece follows, after the set that it is of and '-' if there may be several.
const DESCRIPTION: &str = "volcrypt-description-";
const CHOSEN: &str = "volcrypt-chosen";
const SETTLED: &str = "volcrypt-settled";
/// The mark of the host that is about to destroy it follows.
pub(super) const LEAVING: &str = "volcrypt-leaving";

/// A key in Barbican that was made for a volume.
pub(super) struct Found {
    /// The secret's id.
    pub(super) id: String,
    created: String,
    /// What is known of the volume.
    pub(super) sealed: SealedDescription,
    /// Whether it counts.
    pub(super) is_chosen: bool,
    /// Whether no other one was chosen at the same time.
    is_settled: bool,
    /// The mark of the host that is about to destroy it.
    pub(super) leaving: Option<String>,
}

/// What is kept beside a key that is offered.
pub(super) fn label(volume: &VolumeId, description: &str) -> BTreeMap<String, String> {
    let pieces = pieces(description).into_iter().enumerate();
    let pieces = pieces.map(|(number, piece)| (format!("{DESCRIPTION}{number:02}"), piece.to_owned()));
    pieces.chain([(VOLUME.to_owned(), volume.to_string())]).collect()
}

/// Which of its volume's keys it is that `metadata` is kept beside, by its own word; nothing if that makes no sense.
pub(super) fn key_version(metadata: &BTreeMap<String, String>) -> Option<u32> {
    SealedDescription::parse(&description(metadata)).ok().map(|sealed| sealed.key_version())
}

/// The same where several hosts may write it at once, one metadatum after the other: pieces with the beginning of their
/// seal in their names, which no other description shares, and what is written last of all, which says whose key it is and
/// which pieces count.
pub(super) fn set(volume: &VolumeId, description: &str) -> (Vec<(String, String)>, (&'static str, String)) {
    let seal = description.rsplit(' ').next().unwrap_or_default();
    let set = seal.get(..SET).unwrap_or(seal);
    let pieces = pieces(description).into_iter().enumerate();
    let pieces = pieces.map(|(number, piece)| (format!("{DESCRIPTION}{set}-{number:02}"), piece.to_owned()));
    (pieces.collect(), (VOLUME, format!("{volume} {set}")))
}

/// What is said of the volume beside a key: by the pieces that are named, or those that have numbers only.
fn description(metadata: &BTreeMap<String, String>) -> String {
    let set = metadata.get(VOLUME).and_then(|volume| volume.split_once(' ')).map(|(_, set)| set);
    let is_meant = |name: &str| match (name.strip_prefix(DESCRIPTION), set) {
        (None, _) => false,
        (Some(number), None) => !number.contains('-'),
        (Some(rest), Some(set)) => rest.split_once('-').is_some_and(|(of, _)| of == set),
    };
    let pieces = metadata.iter().filter(|(name, _)| is_meant(name));
    pieces.map(|(_, piece)| piece.as_str()).collect()
}

/// The volume whose key it is, by what is kept beside it. What follows it names the pieces that count.
pub(super) fn volume_in(metadata: &BTreeMap<String, String>) -> Option<&str> {
    metadata.get(VOLUME).map(|volume| volume.split_once(' ').map_or(volume.as_str(), |(volume, _)| volume))
}

/// Whether what is kept beside a key says that it counts.
pub(super) fn is_chosen(metadata: &BTreeMap<String, String>) -> bool {
    metadata.contains_key(CHOSEN)
}

impl BarbicanKeyManager {
    /// The keys of `volume` that are offered or chosen, oldest first.
    pub(super) fn find(&self, asking: &Asking<'_>, volume: &VolumeId) -> Result<Vec<Found>, Refusal> {
        let all = self.find_all(asking, volume)?;
        if all.len() > MOST {
            let sentence = format!(
                "Barbican has more than {MOST} keys of volume {volume}, and volcrypt makes one: have the owner of the secrets \
                 called {:?} look at them",
                name_of(volume)
            );
            return Err(Refusal::new(Reason::KeyManager, sentence));
        }
        Ok(all)
    }

    /// All of them, however many there are.
    pub(super) fn find_all(&self, asking: &Asking<'_>, volume: &VolumeId) -> Result<Vec<Found>, Refusal> {
        let mut all = Vec::new();
        for secret in self.named(asking, volume)? {
            let id = secret.id().map_err(|no_answer| self.refusal(About::Volume(volume), no_answer))?.to_owned();
            match asking.metadata(&id) {
                Ok(metadata) => all.extend(read(volume, id, secret.created, &metadata)?),
                // It was deleted since.
                Err(NoAnswer::Refused(answered)) if answered.status == 404 => {}
                Err(no_answer) => return Err(self.refusal(About::Secret(volume, &id), no_answer)),
            }
        }
        all.sort_by(|one, other| (&one.created, &one.id).cmp(&(&other.created, &other.id)));
        Ok(all)
    }

    /// The secrets that have the name of the key of `volume`.
    pub(super) fn named(&self, asking: &Asking<'_>, volume: &VolumeId) -> Result<Vec<Secret>, Refusal> {
        let name = name_of(volume);
        // A name with '_' in it is like others, which are not meant.
        let mut named = Vec::new();
        let mut offset = 0;
        loop {
            let (secrets, total) =
                asking.secrets(&name, offset).map_err(|no_answer| self.refusal(About::Volume(volume), no_answer))?;
            offset += secrets.len();
            let end = secrets.is_empty() || offset >= total;
            named.extend(secrets.into_iter().filter(|secret| secret.name.as_ref() == Some(&name)));
            if end {
                return Ok(named);
            }
        }
    }

    /// The key of `volume` that counts, which can be used from here on; nothing if there is none. If one `is_offered` by
    /// this host just now, that is waited for.
    pub(super) fn settle(
        &self,
        asking: &mut Asking<'_>,
        volume: &VolumeId,
        is_offered: bool,
    ) -> Result<Option<Found>, Refusal> {
        let mut found = if is_offered { Vec::new() } else { self.find(asking, volume)? };
        let (mut before, mut may_wait, mut is_unanswered, mut slow) = (None, is_offered, false, 0);
        loop {
            if found.is_empty() && !may_wait {
                return Ok(None);
            }
            may_wait = false;
            let chosen = chosen(volume, &mut found)?;
            match (&chosen, &before) {
                (Some(Found { is_settled: true, .. }), _) => return Ok(chosen),
                (Some(found), Some(before)) if found.id == *before => {
                    self.note_settled(asking, volume, &found.id);
                    return Ok(chosen);
                }
                (None, Some(_)) => {
                    let sentence = format!(
                        "Barbican has forgotten which key of volume {volume} was chosen: have its administrator look into its \
                         log"
                    );
                    return Err(Refusal::new(Reason::KeyManager, sentence));
                }
                _ => {}
            }
            before = chosen.map(|found| found.id);
            asking.pause(PATIENCE);
            let looked = Instant::now();
            found = self.find(asking, volume)?;
            let left = PROMPTLY.saturating_sub(looked.elapsed());
            if found.is_empty() || before.is_some() || found.iter().any(|found| found.is_chosen) {
                continue;
            }
            if left.is_zero() {
                if slow == SLOW_LOOKS {
                    return Err(too_slow(volume));
                }
                slow += 1;
                continue;
            }
            let oldest = &mut found[0];
            match asking.within(left).add_metadatum(&oldest.id, CHOSEN, "yes") {
                Ok(()) => oldest.is_chosen = true,
                // Another host has chosen another one, and its maker has deleted this one.
                Err(NoAnswer::Refused(answered)) if answered.status == 404 => {}
                // It may come about all the same. That is seen after the next wait.
                Err(NoAnswer::Unreachable(_)) if !is_unanswered => is_unanswered = true,
                Err(no_answer) => return Err(self.refusal(About::Secret(volume, &oldest.id), no_answer)),
            }
        }
    }

    /// Has other hosts know that they need not wait. If they do not get to know it, they wait.
    fn note_settled(&self, asking: &Asking<'_>, volume: &VolumeId, id: &str) {
        if let Err(no_answer) = asking.within(PROMPTLY).add_metadatum(id, SETTLED, "yes") {
            let refusal = self.refusal(About::Secret(volume, id), no_answer);
            tracing::warn!("other hosts wait for some seconds before they first use volume {volume}: {refusal}");
        }
    }
}

/// A choice that was made by an old look could be another one than another host's.
fn too_slow(volume: &VolumeId) -> Refusal {
    Refusal::new(
        Reason::TimedOut,
        format!(
            "Barbican takes longer than {} ms to say which keys of volume {volume} there are, so none of them was chosen: have \
             its administrator see why it is slow to find secrets by name",
            PROMPTLY.as_millis()
        ),
    )
}

/// Takes a secret for a key of `volume` only if it says so itself. Nothing if it does not say anything yet.
pub(super) fn read(
    volume: &VolumeId,
    id: String,
    created: String,
    metadata: &BTreeMap<String, String>,
) -> Result<Option<Found>, Refusal> {
    let foreign = |what: String| {
        let sentence = format!(
            "Barbican's secret {id} is called the key of volume {volume}, and by its metadata {what}: have its owner restore \
             what was changed"
        );
        Refusal::new(Reason::KeyManager, sentence)
    };
    let text = description(metadata);
    match volume_in(metadata) {
        None if text.is_empty() => return Ok(None),
        Some(own) if own == volume.as_str() => {}
        _ => return Err(foreign("was not made for that volume".to_owned())),
    }
    let sealed = SealedDescription::parse(&text)
        .map_err(|error| foreign(format!("says of the volume what makes no sense ({error})")))?;
    let (is_chosen, is_settled) = (is_chosen(metadata), metadata.contains_key(SETTLED));
    let leaving = metadata.get(LEAVING).cloned();
    Ok(Some(Found { id, created, sealed, is_chosen, is_settled, leaving }))
}

/// The one key that was chosen, if any was.
fn chosen(volume: &VolumeId, found: &mut Vec<Found>) -> Result<Option<Found>, Refusal> {
    let ids: Vec<&str> = found.iter().filter(|found| found.is_chosen).map(|found| found.id.as_str()).collect();
    if ids.len() > 1 {
        let sentence = format!(
            "Barbican has several keys of volume {volume} that were chosen (secrets {}): have their owner delete all but the \
             one whose check value 'volcrypt volume show {volume}' shows on the hosts that use it, or any one if none does",
            ids.join(", ")
        );
        return Err(Refusal::new(Reason::KeyManager, sentence));
    }
    let place = found.iter().position(|found| found.is_chosen);
    Ok(place.map(|place| found.swap_remove(place)))
}

/// `text` in pieces of at most [`PIECE`] bytes.
fn pieces(text: &str) -> Vec<&str> {
    let mut pieces = Vec::new();
    let mut rest = text;
    while !rest.is_empty() {
        let end = (0..=rest.len().min(PIECE)).rev().find(|&end| rest.is_char_boundary(end)).unwrap_or(0);
        let (piece, left) = rest.split_at(end);
        pieces.push(piece);
        rest = left;
    }
    pieces
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_fit_and_come_together_again_in_order() {
        let volume = "v".parse().unwrap();
        for text in [String::new(), "x".repeat(PIECE), "xyz".repeat(1000), "ä".repeat(500), "€x".repeat(300)] {
            let label = label(&volume, &text);
            assert!(label.values().all(|piece| piece.len() <= PIECE && !piece.is_empty()));
            let pieces = label.iter().filter(|(name, _)| name.starts_with(DESCRIPTION));
            assert_eq!(pieces.map(|(_, piece)| piece.as_str()).collect::<String>(), text);
        }
    }
}
