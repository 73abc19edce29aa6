//! How a new key comes to be: made here and handed over (Register), or made by the server (Create).
//!
//! What is kept beside a key holds its check value, so a key that the server has made is handed out to this host first
//! and described then. Until that is done it has a name of its own, under which nobody looks for a key that could be
//! used; it gets the right name last, and from then on it is one that was registered. A host that ends in between
//! leaves an unfinished key, which goes when the volume gets its key, or is destroyed.

use std::time::Instant;

use super::client::Talk;
use super::connection::Trouble;
use super::message::{Attributes, Label, Request, State};
use super::settle::{Found, MOST, find, settle};
use super::ttlv::Malformed;
use super::{Fault, KeyOrigin, KmipKeyManager, hand_out, name_of, no_key, unless_gone, wrapping};
use crate::keys::{CheckValue, Description, Key};
use crate::refusal::{Reason, Refusal};
use crate::volume::VolumeId;

/// What is kept beside a key that was not described yet.
const UNFINISHED: &str = "unfinished";

impl KmipKeyManager {
    /// Has a new key come to be on the server, or the one that was `brought` from elsewhere, and lets it be used if it is
    /// the one that counts in the end. Returns the one that does.
    ///
    /// All servers have to say that there is none: a key that only one of them knows would be replaced by another.
    ///
    /// What comes back with it has to be `alike`: another host that moves the same key may say more of the volume.
    pub(super) fn make(
        &self,
        volume: &VolumeId,
        wanted: &Description,
        brought: Option<&Key>,
        alike: fn(&Description, &Description) -> bool,
    ) -> Result<(Key, Description), Refusal> {
        if let Some(wrapping) = &self.client.config().wrapping_key {
            // What this host could not have back is not made.
            wrapping.read().map_err(|sentence| Refusal::new(Reason::Configuration, sentence))?;
        }
        let deadline = Instant::now() + self.client.config().deadline;
        let talks: Vec<_> = self.client.order().map(|server| self.client.talk(server, deadline)).collect();
        let talks: Vec<&Talk<'_>> = talks.iter().collect();
        let named =
            |talk: &Talk<'_>, fault: Fault| self.not_asked(&format!("a new key of volume {volume}"), talk, fault);
        // There is at least one: the configuration has no empty list.
        let first = talks[0];
        let mut none = true;
        for talk in &talks {
            none &= find(talk, volume).map_err(|fault| named(talk, fault))?.is_empty();
        }
        let made;
        let own = match (none, brought, self.client.config().key_origin) {
            (false, _, _) => None,
            (true, Some(key), _) => Some(key),
            (true, None, KeyOrigin::Host) => {
                made = Some(Key::random(wanted.key_size)?);
                made.as_ref()
            }
            (true, None, KeyOrigin::Server) => {
                made = have_made(first, volume, wanted).map_err(|fault| named(first, fault))?;
                made.as_ref()
            }
        };
        if let Some(key) = own
            && (brought.is_some() || self.client.config().key_origin == KeyOrigin::Host)
        {
            hand_over(first, volume, wanted, key).map_err(|fault| named(first, fault))?;
        }
        let found = settle(&talks, volume, &named)?.ok_or_else(|| no_key(volume))?;
        let has_it = talks[found.on[0]];
        let (kept, description) = hand_out(has_it, volume, &found).map_err(|fault| named(has_it, fault))?;
        let is_own = |key: &Key| key.check_value(volume) == found.sealed.check_value;
        if let Some(key) = own.filter(|key| is_own(key))
            && !(kept.same_as(key) && alike(&description, wanted))
        {
            let sentence = format!(
                "the new key of volume {volume} is not what the KMIP server gave back, and was not used: have its \
                 administrator look at object {}",
                found.identifier
            );
            return Err(Refusal::new(Reason::KeyManager, sentence));
        }
        // Another host was quicker, or the server has done twice what it was asked twice. That one stays does no harm.
        let given_up = own.map_or(Ok(()), |key| give_up(first, volume, key.check_value(volume), &found.identifier));
        let cleared = match self.client.config().key_origin {
            KeyOrigin::Host => Ok(()),
            KeyOrigin::Server => clear_unfinished(first, volume),
        };
        if let Err(fault) = given_up.and(cleared) {
            let refusal = named(first, fault);
            tracing::warn!("a new key of volume {volume} that nobody uses stays on the server: {refusal}");
        }
        self.client.prefer(self.client.order().next().unwrap_or(0));
        Ok((kept, description))
    }
}

/// Hands a key to the server.
fn hand_over(talk: &Talk<'_>, volume: &VolumeId, wanted: &Description, key: &Key) -> Result<(), Fault> {
    let text = describe(volume, wanted, key)?;
    let label = Label { name: &name_of(volume), volume: volume.as_str(), description: &text };
    match talk.ask(&Request::register(&label, wanted.key_size, key)) {
        Ok(_) => Ok(()),
        Err(trouble) => unless_offered(talk, volume, trouble),
    }
}

/// Has the server make a key and hand it out, and offers it; nothing if another host has offered one meanwhile, which
/// may have cleared this one away.
fn have_made(talk: &Talk<'_>, volume: &VolumeId, wanted: &Description) -> Result<Option<Key>, Fault> {
    let label = Label { name: &unfinished_name(volume), volume: volume.as_str(), description: UNFINISHED };
    let made = talk.ask(&Request::create(&label, wanted.key_size))?.identifiers()?;
    let [identifier] = made.as_slice() else {
        return Err(Malformed("the key that was made has no identifier").into());
    };
    let key = match taken(talk, volume, identifier, wanted) {
        Ok(key) => key,
        Err(fault) => return undo(talk, volume, identifier, fault),
    };
    let text = describe(volume, wanted, &key)?;
    let finished = Label { name: &name_of(volume), volume: volume.as_str(), description: &text };
    let described = change(talk, &Request::describe_anew(identifier, &label, &finished), identifier, |now| {
        now.description.as_deref() == Some(&text)
    });
    let named = described.and_then(|()| {
        let is_named = |now: &Attributes| now.names == [finished.name];
        change(talk, &Request::rename(identifier, &label, &finished), identifier, is_named)
    });
    match named {
        Ok(()) => Ok(Some(key)),
        Err(trouble @ Trouble::Refused(_)) => undo(talk, volume, identifier, trouble.into()),
        Err(trouble) => unless_offered(talk, volume, trouble).map(|()| Some(key)),
    }
}

/// Has an attribute changed. What takes another one's place by its value (KMIP 2.0) can do so once; if the server gets
/// the request twice because its answer was lost, the second time finds it `done`.
fn change(
    talk: &Talk<'_>,
    request: &Request<'_>,
    identifier: &str,
    done: impl Fn(&Attributes) -> bool,
) -> Result<(), Trouble> {
    let refused = match talk.ask(request) {
        Ok(_) => return Ok(()),
        Err(trouble @ Trouble::Refused(_)) => trouble,
        Err(trouble) => return Err(trouble),
    };
    match talk.ask(&Request::get_attributes(identifier)).map(|answer| answer.attributes(identifier)) {
        Ok(Ok(now)) if done(&now) => Ok(()),
        _ => Err(refused),
    }
}

/// The key that the server has just made.
fn taken(talk: &Talk<'_>, volume: &VolumeId, identifier: &str, wanted: &Description) -> Result<Key, Fault> {
    let key = wrapping::take(talk, volume, identifier)?;
    if key.bits() != wanted.key_size.bits() as usize {
        let sentence = format!(
            "the KMIP server has made a key of {} bits for volume {volume}, and was asked for {}: use a profile with a key_size \
             that it can make, or key_origin = \"host\"",
            key.bits(),
            wanted.key_size.bits()
        );
        return Err(Refusal::new(Reason::KeyManager, sentence).into());
    }
    Ok(key)
}

/// Ends a key that was not offered, if the server can still be asked for that. That it was not is a fault only if no
/// other one was.
fn undo(talk: &Talk<'_>, volume: &VolumeId, identifier: &str, fault: Fault) -> Result<Option<Key>, Fault> {
    if unless_gone(talk, &Request::destroy(identifier)).is_err() {
        tracing::warn!("the unfinished key {identifier} stays on the KMIP server {}", talk.name());
    }
    match find(talk, volume) {
        Ok(found) if !found.is_empty() => Ok(None),
        _ => Err(fault),
    }
}

/// It may have been offered though no answer came; and a server that lets no name be used twice has taken another
/// host's meanwhile.
fn unless_offered(talk: &Talk<'_>, volume: &VolumeId, trouble: Trouble) -> Result<(), Fault> {
    match find(talk, volume)?.is_empty() {
        true => Err(trouble.into()),
        false => Ok(()),
    }
}

fn describe(volume: &VolumeId, wanted: &Description, key: &Key) -> Result<String, Refusal> {
    let text = wanted.to_text(volume, key);
    text.map_err(|error| Refusal::new(Reason::KeyManager, error.to_string()))
}

/// Destroys what was made here, has this check value, and was never chosen, while `chosen` was.
fn give_up(talk: &Talk<'_>, volume: &VolumeId, check_value: CheckValue, chosen: &str) -> Result<(), Fault> {
    let found = find(talk, volume)?;
    found
        .iter()
        .filter(|found| is_left(found, check_value, chosen))
        .try_for_each(|found| unless_gone(talk, &Request::destroy(&found.identifier)))
}

/// Whether `found` was made for nothing. The server's word is not enough: what it says may be older than the choice.
fn is_left(found: &Found, check_value: CheckValue, chosen: &str) -> bool {
    found.attributes.state == State::PreActive && found.sealed.check_value == check_value && found.identifier != chosen
}

/// The name of a key that the server has made and that was not described yet.
fn unfinished_name(volume: &VolumeId) -> String {
    format!("volcrypt-unfinished/{volume}")
}

/// Destroys what the server has made for `volume` and nobody has finished.
pub(super) fn clear_unfinished(talk: &Talk<'_>, volume: &VolumeId) -> Result<(), Fault> {
    let name = unfinished_name(volume);
    let identifiers = talk.ask(&Request::locate_name(&name))?.identifiers()?;
    for identifier in identifiers.iter().take(MOST) {
        let attributes = match talk.ask(&Request::get_attributes(identifier)) {
            Ok(answer) => answer.attributes(identifier)?,
            Err(Trouble::Refused(failure)) if failure.is_not_found() => continue,
            Err(trouble) => return Err(trouble.into()),
        };
        let Attributes { names, state, volume: of, .. } = attributes;
        // Its name is all that it has: one that was offered meanwhile has another.
        if names == [name.as_str()] && of.as_deref() == Some(volume.as_str()) && state == State::PreActive {
            unless_gone(talk, &Request::destroy(identifier))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keys::SealedDescription;
    use crate::policy::Profile;
    use crate::store::EnrolledDevice;

    /// The server's word that the chosen key was not chosen may be old.
    #[test]
    fn only_what_was_made_for_nothing_is_destroyed() {
        let volume: VolumeId = "one".parse().unwrap();
        let device = EnrolledDevice { wwid: Some("naa.6".to_owned()), ..EnrolledDevice::default() };
        let description = Description::new(device, 4096, ("default", &Profile::default()), None, 7);
        let [own, other] = [(); 2].map(|()| Key::random(description.key_size).unwrap());
        let found = |identifier: &str, state: State, key: &Key| Found {
            identifier: identifier.to_owned(),
            attributes: Attributes {
                names: Vec::new(),
                state,
                initial_date: 7,
                bits: 512,
                volume: None,
                leaving: None,
                description: None,
            },
            sealed: SealedDescription::parse(&description.to_text(&volume, key).unwrap()).unwrap(),
            on: vec![0],
        };
        let is_left = |found: Found| is_left(&found, own.check_value(&volume), "1");
        assert!(is_left(found("2", State::PreActive, &own)));
        assert!(!is_left(found("1", State::PreActive, &own)), "the one that was chosen");
        assert!(!is_left(found("2", State::Active, &own)));
        assert!(!is_left(found("2", State::PreActive, &other)), "another host's");
    }
}
