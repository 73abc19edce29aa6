//! Which key of a volume counts.
//!
//! KMIP demands no unique names of a server, so two hosts that enrol one new volume at the same moment may make a key
//! each. To activate a key is to choose it: a key that was ever activated counts, and nobody uses another. Before one is
//! activated, whoever is about to waits, looks again, and takes the oldest (of two that are equally old, the one whose
//! identifier comes first). A key that comes later than that look is made by a host that waits in its turn, and then
//! finds the other one active. Whoever has activated a key waits as long again and looks once more before it is used: if
//! another one was activated meanwhile, the later one's host sees both.
//!
//! Only while every server answers is a key chosen: one that does not may know of another that was. And only once every
//! server has it, for which they have the time of two waits: what is written with a key that one server has is lost with
//! that server. Whoever finds a key that was chosen need not look for that again.
//!
//! That needs a server on which what one client has done is seen by the next one at once, or by all hosts within the time
//! that is waited for. Where two keys are active in spite of all, neither is used until an administrator has decided.

use std::time::{Duration, Instant};

use super::client::Talk;
use super::connection::Trouble;
use super::message::{Attributes, Request, State};
use super::{Fault, name_of};
use crate::keys::{RecordedKey, SealedDescription};
use crate::refusal::{Reason, Refusal};
use crate::volume::VolumeId;

/// How long to wait before a key is chosen: servers tell ages in whole seconds, and their clocks may differ a little.
pub(super) const PATIENCE: Duration = Duration::from_millis(2500);
/// How long a choice may take: the look that it is made by, and until the server has it.
const PROMPTLY: Duration = Duration::from_secs(1);
/// How many looks may take too long for a choice.
const SLOW_LOOKS: usize = 2;
/// The most keys of one name that are looked at. More than a few were not made by volcrypt.
pub(super) const MOST: usize = 16;

/// A key on the server that was made for a volume.
pub(super) struct Found {
    /// What the server calls it.
    pub(super) identifier: String,
    /// What the server knows of it.
    pub(super) attributes: Attributes,
    /// What is known of the volume.
    pub(super) sealed: SealedDescription,
    /// Which of the servers that were asked have it; the first is the one whose word `attributes` are.
    pub(super) on: Vec<usize>,
}

impl Found {
    /// Whether it was revoked or destroyed.
    pub(super) fn is_ended(&self) -> bool {
        matches!(self.attributes.state, State::Revoked | State::Destroyed)
    }
}

/// The keys of `volume` that the server has or remembers.
pub(super) fn find(talk: &Talk<'_>, volume: &VolumeId) -> Result<Vec<Found>, Fault> {
    match find_whole(talk, volume)? {
        (found, None) => Ok(found),
        (_, Some(fault)) => Err(fault.into()),
    }
}

/// Those among them that can be read, and what is wrong with the first that cannot.
pub(super) fn find_whole(talk: &Talk<'_>, volume: &VolumeId) -> Result<(Vec<Found>, Option<Refusal>), Fault> {
    let name = name_of(volume);
    let identifiers = talk.ask(&Request::locate_name(&name))?.identifiers()?;
    if identifiers.len() > MOST {
        let sentence = format!(
            "the KMIP server has {} objects called {name:?}, and volcrypt makes one: have its administrator look at them",
            identifiers.len()
        );
        return Err(Refusal::new(Reason::KeyManager, sentence).into());
    }
    let (mut found, mut fault) = (Vec::new(), None);
    for identifier in identifiers {
        let attributes = match talk.ask(&Request::get_attributes(&identifier)) {
            Ok(answer) => answer.attributes(&identifier)?,
            // It was destroyed since.
            Err(Trouble::Refused(failure)) if failure.is_not_found() => continue,
            Err(trouble) => return Err(trouble.into()),
        };
        match read(volume, &name, identifier, attributes) {
            Ok(whole) => found.push(whole),
            Err(refusal) => drop(fault.get_or_insert(refusal)),
        }
    }
    Ok((found, fault))
}

/// What `hand_out` makes of the key in `state` that a record names, by its version and its check value, whatever else has its
/// name. Where it makes nothing of any that says so, what was wrong with the first is told.
pub(super) fn find_enrolled<T>(
    talk: &Talk<'_>,
    key: &RecordedKey,
    state: State,
    hand_out: impl Fn(&Found) -> Result<T, Fault>,
) -> Result<Option<T>, Fault> {
    let volume = &key.volume;
    let name = name_of(volume);
    let mut first = None;
    for identifier in talk.ask(&Request::locate_name(&name))?.identifiers()? {
        let passed_over = |what: &dyn std::fmt::Display| {
            tracing::warn!("passed over object {identifier}, which is called the key of volume {volume}: {what}");
        };
        let attributes = match talk.ask(&Request::get_attributes(&identifier)) {
            Ok(answer) => answer.attributes(&identifier),
            Err(Trouble::Refused(failure)) => {
                passed_over(&failure.message);
                continue;
            }
            Err(trouble) => return Err(trouble.into()),
        };
        let found = match attributes.map(|attributes| read(volume, &name, identifier.clone(), attributes)) {
            Ok(Ok(found)) => found,
            Ok(Err(refusal)) => {
                passed_over(&refusal);
                continue;
            }
            Err(malformed) => {
                passed_over(&malformed);
                continue;
            }
        };
        if found.attributes.state != state || !found.sealed.is_for(key) {
            continue;
        }
        // Anybody can write the check value beside a key that is another one.
        let fault = match hand_out(&found) {
            Ok(done) => return Ok(Some(done)),
            Err(fault) => fault,
        };
        match &fault {
            Fault::Final(refusal) => passed_over(refusal),
            Fault::Server(trouble @ (Trouble::Refused(_) | Trouble::Malformed(_) | Trouble::Unwrapped(_))) => {
                passed_over(trouble);
            }
            // That is the server's, whichever key it is asked for.
            Fault::Server(_) => return Err(fault),
        }
        first.get_or_insert(fault);
    }
    first.map_or(Ok(None), Err)
}

/// Takes an object for a key of `volume` only if it says so itself, whatever the server was asked for.
fn read(volume: &VolumeId, name: &str, identifier: String, attributes: Attributes) -> Result<Found, Refusal> {
    let foreign = |what: String| {
        let sentence = format!(
            "the KMIP server's object {identifier} is called {name:?} but {what}: have its administrator rename it, or \
             restore it if it was changed"
        );
        Refusal::new(Reason::KeyManager, sentence)
    };
    if !attributes.names.iter().any(|own| own == name) {
        return Err(foreign("does not have that name".to_owned()));
    }
    if attributes.volume.as_deref() != Some(volume.as_str()) {
        return Err(foreign("was not made for that volume".to_owned()));
    }
    let Some(text) = &attributes.description else {
        return Err(foreign("does not say what is on the volume".to_owned()));
    };
    let sealed = SealedDescription::parse(text)
        .map_err(|error| foreign(format!("what it says of the volume makes no sense ({error})")))?;
    Ok(Found { identifier, attributes, sealed, on: vec![0] })
}

/// The key of `volume` that counts, which can be used from here on; nothing if there is none. All of `talks` are asked,
/// which are with every server that there is, and the one that has the key is told. `named` says what a fault of one of
/// them comes to.
pub(super) fn settle(
    talks: &[&Talk<'_>],
    volume: &VolumeId,
    named: &impl Fn(&Talk<'_>, Fault) -> Refusal,
) -> Result<Option<Found>, Refusal> {
    let mut found = find_all(talks, volume, named)?;
    if found.is_empty() {
        return Ok(None);
    }
    let (mut is_unanswered, mut is_late, mut slow) = (false, false, 0);
    // Each conversation has as much time left as before.
    let wait = || {
        std::thread::sleep(PATIENCE);
        talks.iter().for_each(|talk| talk.extend(PATIENCE));
    };
    loop {
        if let Some(chosen) = chosen(volume, &mut found)? {
            return Ok(Some(chosen));
        }
        wait();
        let looked = Instant::now();
        found = find_all(talks, volume, named)?;
        if let Some(chosen) = chosen(volume, &mut found)? {
            return Ok(Some(chosen));
        }
        let age = |found: &&Found| (found.attributes.initial_date, found.identifier.clone());
        let Some(oldest) = found.iter().min_by_key(age) else { return Ok(None) };
        let left = PROMPTLY.saturating_sub(looked.elapsed());
        if left.is_zero() {
            if slow == SLOW_LOOKS {
                return Err(too_slow(volume));
            }
            slow += 1;
            continue;
        }
        let talk = talks[oldest.on[0]];
        let has_it = |server: usize| {
            found
                .iter()
                .any(|found| found.sealed.check_value == oldest.sealed.check_value && found.on.contains(&server))
        };
        if let Some(without) = (0..talks.len()).find(|&server| !has_it(server)) {
            if is_late {
                return Err(not_everywhere(volume, talk.name(), talks[without].name()));
            }
            is_late = true;
            continue;
        }
        match activate(talk, &oldest.identifier, left) {
            Ok(()) => {
                wait();
                found = find_all(talks, volume, named)?;
                // It was activated just now.
                let chosen = chosen(volume, &mut found)?;
                return match chosen {
                    Some(chosen) => Ok(Some(chosen)),
                    None => Err(undecided(volume, "none of them can be used".to_owned())),
                };
            }
            // It may come about all the same. That is seen after the next wait.
            Err(Trouble::Io(_)) if !is_unanswered => is_unanswered = true,
            Err(trouble) => return Err(named(talk, trouble.into())),
        }
    }
}

/// The one key that was activated, if any was.
pub(super) fn chosen(volume: &VolumeId, found: &mut Vec<Found>) -> Result<Option<Found>, Refusal> {
    let is = |state: State| move |found: &Found| found.attributes.state == state;
    let active: Vec<&str> =
        found.iter().filter(|found| is(State::Active)(found)).map(|found| found.identifier.as_str()).collect();
    if let [one, more @ ..] = active.as_slice()
        && !more.is_empty()
    {
        let both = format!("{one} and {} can be used both", more.join(", "));
        return Err(undecided(volume, both));
    }
    if let Some(place) = found.iter().position(is(State::Active)) {
        return Ok(Some(found.swap_remove(place)));
    }
    // What was ended had been chosen before: one that is not chosen is ended only when another one is.
    if let Some(revoked) = found.iter().find(|found| is(State::Revoked)(found)) {
        let sentence = format!(
            "the key of volume {volume} was revoked on the KMIP server (object {}): if the volume is still needed, have its \
             administrator register the same key anew, with the same names and application specific information",
            revoked.identifier
        );
        return Err(Refusal::new(Reason::KeyRevoked, sentence));
    }
    match found.iter().any(is(State::Destroyed)) {
        true => Err(Refusal::new(
            Reason::KeyDestroyed,
            format!(
                "the key of volume {volume} was destroyed on the KMIP server and its data can never be read again: to use \
                 the device anew, have a rule give it another id"
            ),
        )),
        false => Ok(None),
    }
}

/// A choice that was made by an old look could be another one than another host's.
fn too_slow(volume: &VolumeId) -> Refusal {
    Refusal::new(
        Reason::TimedOut,
        format!(
            "the KMIP server takes longer than {} ms to say which keys of volume {volume} there are, so none of them was \
             chosen: have its administrator see why it is slow to find objects by name",
            PROMPTLY.as_millis()
        ),
    )
}

/// What would be written with such a key is lost with the server that has it.
fn not_everywhere(volume: &VolumeId, with: &str, without: &str) -> Refusal {
    Refusal::new(
        Reason::KeyManager,
        format!(
            "the KMIP server {without} does not have the new key of volume {volume} that {with} has, so it was not used: all \
             servers of [kmip] have to hold the same keys, so have their administrator see to their replication, and repeat"
        ),
    )
}

pub(super) fn undecided(volume: &VolumeId, what: String) -> Refusal {
    Refusal::new(
        Reason::KeyManager,
        format!(
            "the KMIP server has several keys of volume {volume}, of which {what}: have its administrator revoke all but the \
             one whose check value 'volcrypt volume show {volume}' shows on the hosts that use it"
        ),
    )
}

/// What all servers know together; they hold the same keys, but one may be late. What one of them knows to be chosen is.
fn find_all(
    talks: &[&Talk<'_>],
    volume: &VolumeId,
    named: &impl Fn(&Talk<'_>, Fault) -> Refusal,
) -> Result<Vec<Found>, Refusal> {
    let mut all: Vec<Found> = Vec::new();
    for (server, talk) in talks.iter().enumerate() {
        for mut found in find(talk, volume).map_err(|fault| named(talk, fault))? {
            found.on = vec![server];
            match all.iter_mut().find(|known| known.identifier == found.identifier) {
                None => all.push(found),
                // Servers that know nothing of each other's keys number them alike.
                Some(known) if known.sealed.check_value != found.sealed.check_value => {
                    return Err(differing(volume, &found.identifier, talks[known.on[0]].name(), talk.name()));
                }
                Some(known)
                    if known.attributes.state == State::PreActive && found.attributes.state != State::PreActive =>
                {
                    found.on.append(&mut known.on);
                    *known = found;
                }
                Some(known) => known.on.push(server),
            }
        }
    }
    Ok(all)
}

fn differing(volume: &VolumeId, identifier: &str, one: &str, other: &str) -> Refusal {
    Refusal::new(
        Reason::KeyManager,
        format!(
            "the KMIP servers {one} and {other} do not have the same keys: object {identifier} is a key of volume {volume} on \
             both, and not the same one; all servers of [kmip] have to hold the same keys, so have their administrator \
             mend their replication"
        ),
    )
}

/// Lets a key be used, `within` a time. Another host may be quicker.
pub(super) fn activate(talk: &Talk<'_>, identifier: &str, within: Duration) -> Result<(), Trouble> {
    let refused = match talk.within(within).ask(&Request::activate(identifier)) {
        Ok(_) => return Ok(()),
        Err(trouble) => trouble,
    };
    match talk.ask(&Request::get_attributes(identifier)).map(|answer| answer.attributes(identifier)) {
        Ok(Ok(Attributes { state: State::Active, .. })) => Ok(()),
        _ => Err(refused),
    }
}
