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
//! That needs a Barbican on which what one client has done is seen by the next one, within the time that is waited for.
//! Where that fails in spite of all, two keys are chosen; then neither is used until somebody has decided. A key whose
//! making broke off before it was offered counts for nothing.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::answer::NoAnswer;
use super::client::Asking;
use super::messages::Secret;
use super::refusals::About;
use super::{BarbicanKeyManager, name_of};
use crate::keys::{CheckValue, Description};
use crate::refusal::{Reason, Refusal};
use crate::volume::VolumeId;

/// How long to wait before a key is chosen: Barbican may run on several machines, whose clocks may differ a little.
const PATIENCE: Duration = Duration::from_millis(2500);
/// How long what a choice is made by may take to be read.
const PROMPTLY: Duration = Duration::from_millis(1500);
/// How many looks may take too long for a choice.
const SLOW_LOOKS: usize = 2;
/// The most keys of one name that are looked at. More than a few were not made by volcrypt.
const MOST: usize = 16;
/// How much one metadatum holds, in bytes; Barbican's column has 255 characters.
const PIECE: usize = 240;

const VOLUME: &str = "volcrypt-volume";
/// The number of a piece follows.
const DESCRIPTION: &str = "volcrypt-description-";
const CHOSEN: &str = "volcrypt-chosen";

/// A key in Barbican that was made for a volume.
pub(super) struct Found {
    /// The secret's id.
    pub(super) id: String,
    created: String,
    /// What is known of the volume.
    pub(super) description: Description,
    /// The check value of the key that was made for it.
    pub(super) check_value: CheckValue,
    /// Whether it counts.
    pub(super) is_chosen: bool,
}

/// What is kept beside a key that is offered.
pub(super) fn label(volume: &VolumeId, description: &str) -> BTreeMap<String, String> {
    let pieces = pieces(description).into_iter().enumerate();
    let pieces = pieces.map(|(number, piece)| (format!("{DESCRIPTION}{number:02}"), piece.to_owned()));
    pieces.chain([(VOLUME.to_owned(), volume.to_string())]).collect()
}

/// Whether what is kept beside a key says that it counts.
pub(super) fn is_chosen(metadata: &BTreeMap<String, String>) -> bool {
    metadata.contains_key(CHOSEN)
}

impl BarbicanKeyManager {
    /// The keys of `volume` that are offered or chosen, oldest first.
    pub(super) fn find(&self, asking: &Asking<'_>, volume: &VolumeId) -> Result<Vec<Found>, Refusal> {
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
            if named.len() > MOST {
                let sentence = format!(
                    "Barbican has more than {MOST} secrets called {name:?}, and volcrypt makes one: have their owner look at \
                     them"
                );
                return Err(Refusal::new(Reason::KeyManager, sentence));
            }
            if end {
                return Ok(named);
            }
        }
    }

    /// The key of `volume` that counts, which can be used from here on; nothing if there is none.
    pub(super) fn settle(&self, asking: &mut Asking<'_>, volume: &VolumeId) -> Result<Option<Found>, Refusal> {
        let mut found = self.find(asking, volume)?;
        let mut slow = 0;
        loop {
            if found.is_empty() {
                return Ok(None);
            }
            if let Some(chosen) = chosen(volume, &mut found)? {
                return Ok(Some(chosen));
            }
            asking.pause(PATIENCE);
            let looked = Instant::now();
            found = self.find(asking, volume)?;
            if let (Some(oldest), None) = (found.first(), found.iter().find(|found| found.is_chosen)) {
                if looked.elapsed() >= PROMPTLY {
                    if slow == SLOW_LOOKS {
                        return Err(too_slow(volume));
                    }
                    slow += 1;
                    continue;
                }
                match asking.add_metadatum(&oldest.id, CHOSEN, "yes") {
                    Ok(()) => {
                        found = self.find(asking, volume)?;
                        if !found.is_empty() && !found.iter().any(|found| found.is_chosen) {
                            let sentence = format!(
                                "Barbican has forgotten which key of volume {volume} was chosen: have its administrator look \
                                 into its log"
                            );
                            return Err(Refusal::new(Reason::KeyManager, sentence));
                        }
                    }
                    // Another host has chosen another one, and its maker has deleted this one.
                    Err(NoAnswer::Refused(answered)) if answered.status == 404 => {}
                    Err(no_answer) => return Err(self.refusal(About::Secret(volume, &oldest.id), no_answer)),
                }
            }
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
fn read(
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
    let pieces = metadata.iter().filter(|(name, _)| name.starts_with(DESCRIPTION));
    let text: String = pieces.map(|(_, piece)| piece.as_str()).collect();
    match metadata.get(VOLUME) {
        None if text.is_empty() => return Ok(None),
        Some(own) if own == volume.as_str() => {}
        _ => return Err(foreign("was not made for that volume".to_owned())),
    }
    let (description, check_value) = Description::parse(&text)
        .map_err(|error| foreign(format!("says of the volume what makes no sense ({error})")))?;
    Ok(Some(Found { id, created, description, check_value, is_chosen: is_chosen(metadata) }))
}

/// The one key that was chosen, if any was.
fn chosen(volume: &VolumeId, found: &mut Vec<Found>) -> Result<Option<Found>, Refusal> {
    let ids: Vec<&str> = found.iter().filter(|found| found.is_chosen).map(|found| found.id.as_str()).collect();
    if ids.len() > 1 {
        let sentence = format!(
            "Barbican has several keys of volume {volume} that were chosen (secrets {}): have their owner delete all but the \
             one whose check value 'volcrypt volume show {volume}' shows on the hosts that use it",
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
