//! A KMIP server as the key manager: OASIS Key Management Interoperability Protocol 1.0 to 1.4 and 2.0.
//!
//! A volume's key is a symmetric key with the name `volcrypt/<volume id>`, which is made here and handed over
//! (Register) or made by the server (see [`making`]), and has beside it what other hosts have to know of the volume, and
//! its check value. See [`settle`] for which key counts when two hosts make one for the same new volume.
//!
//! [`making`]: making
//! [`settle`]: settle

mod client;
mod connection;
mod making;
pub mod message;
mod settle;
pub mod ttlv;
mod wrapping;

use std::cell::{Cell, RefCell};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustls::ClientConfig;

use self::client::{Client, Talk};
use self::connection::Trouble;
use self::making::clear_unfinished;
use self::message::{Failure, Request, State, Version};
use self::settle::{Found, activate, chosen, find, find_enrolled, find_whole, settle, undecided};
use self::ttlv::Malformed;
use super::{
    Capabilities, Description, FIRST_VERSION, Imported, Key, KeyHandle, KeyInfo, KeyManager, Leaving, RecordedKey,
    SealedDescription, other_key, tell, tls,
};
use crate::policy::KeySize;
use crate::refusal::{Reason, Refusal};
use crate::volume::VolumeId;

pub use connection::split_address;
pub use wrapping::WrappingKey;

/// How long a server may take to say which keys there are: a good deal longer than to find one, and less than whoever
/// waits for the list waits without a word.
const LOOK_FOR_ALL: Duration = Duration::from_secs(50);

/// How a KMIP server is reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KmipConfig {
    /// Servers that hold the same keys, each as `HOST:PORT`. The one that answered last is asked first.
    pub servers: Vec<String>,
    /// The certificates of the authorities that servers have to be vouched for by, in PEM.
    pub ca: PathBuf,
    /// This host's certificate, in PEM.
    pub certificate: PathBuf,
    /// Its private key, in PEM.
    pub key: PathBuf,
    /// Who makes keys.
    pub key_origin: KeyOrigin,
    /// The key that the servers are to wrap others by; nothing if keys are handed out in clear within TLS.
    pub wrapping_key: Option<WrappingKey>,
    /// The newest version of the protocol that is spoken with the servers.
    pub newest_version: Version,
    /// How long all that is asked for one key may take, of all servers together: 1 to 60 seconds.
    pub deadline: Duration,
}

impl KmipConfig {
    /// The certificates and the key as they are in the files now.
    ///
    /// # Errors
    /// One sentence that names the file and says what is wrong with it.
    pub fn tls(&self) -> Result<Arc<ClientConfig>, String> {
        tls::mutual_client(&self.ca, &self.certificate, &self.key, "the KMIP client")
    }
}

/// Who makes keys.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum KeyOrigin {
    /// This host, which hands them to the server (Register).
    #[default]
    Host,
    /// The server (Create).
    Server,
}

/// What sentences call it.
const PLACE: &str = "the KMIP server";

/// Keeps volume keys on a KMIP server.
pub struct KmipKeyManager {
    client: Client,
}

/// Why a piece of work with one server came to nothing.
enum Fault {
    /// The server is at fault; another one may do it.
    Server(Trouble),
    /// It is decided.
    Final(Refusal),
}

impl From<Trouble> for Fault {
    fn from(trouble: Trouble) -> Self {
        Fault::Server(trouble)
    }
}

impl From<Malformed> for Fault {
    fn from(malformed: Malformed) -> Self {
        Fault::Server(malformed.into())
    }
}

impl From<Refusal> for Fault {
    fn from(refusal: Refusal) -> Self {
        Fault::Final(refusal)
    }
}

impl KmipKeyManager {
    /// A key manager that asks the servers of `config`; nothing is connected yet.
    pub fn new(config: KmipConfig) -> Self {
        KmipKeyManager { client: Client::new(config) }
    }

    /// Does `work`, which is about `what`, with the first server that can, in the time that there is for all of them.
    fn with_any<T>(
        &self,
        what: &str,
        work: impl Fn(&Talk<'_>) -> Result<Option<T>, Fault>,
    ) -> Result<Option<T>, Refusal> {
        self.with_any_within(self.client.config().deadline, what, work)
    }

    fn with_any_within<T>(
        &self,
        time: Duration,
        what: &str,
        work: impl Fn(&Talk<'_>) -> Result<Option<T>, Fault>,
    ) -> Result<Option<T>, Refusal> {
        let deadline = Instant::now() + time;
        let (mut troubles, mut none) = (Vec::new(), false);
        let servers: Vec<usize> = self.client.order().collect();
        for (turn, &server) in servers.iter().enumerate() {
            // One that does not answer leaves time for those after it. There are never more than fit.
            let share = deadline.saturating_duration_since(Instant::now()) / (servers.len() - turn) as u32;
            let talk = self.client.talk(server, Instant::now() + share);
            match work(&talk) {
                Ok(Some(done)) => {
                    self.client.prefer(server);
                    return Ok(Some(done));
                }
                // One that was restored from a backup, or lags behind, may not have it yet.
                Ok(None) => none = true,
                Err(Fault::Final(refusal)) => return Err(refusal),
                Err(Fault::Server(trouble)) => {
                    tracing::warn!(server = talk.name(), "KMIP server {}: {trouble}", talk.name());
                    troubles.push((talk.name().to_owned(), trouble));
                }
            }
        }
        match troubles.is_empty() {
            true if none => Ok(None),
            // That one has no such key is an answer, too.
            _ => Err(self.refusal(what, troubles, none)),
        }
    }

    /// What all `troubles` together come to; `answered` says whether a server without any has answered.
    fn refusal(&self, what: &str, troubles: Vec<(String, Trouble)>, answered: bool) -> Refusal {
        let said = |(name, trouble): &(String, Trouble)| format!("{name}: {trouble}");
        let all = troubles.iter().map(said).collect::<Vec<_>>().join("; ");
        for (_, trouble) in &troubles {
            match trouble {
                Trouble::Local(sentence) => return Refusal::new(Reason::Configuration, sentence),
                Trouble::Unwrapped(sentence) => return Refusal::new(Reason::KeyManager, sentence),
                Trouble::Refused(failure) if failure.is_not_allowed() => {
                    let sentence = format!(
                        "the KMIP server does not let this host have {what} ({all}): have its administrator look at the rights \
                         of the certificate {}",
                        self.client.config().certificate.display()
                    );
                    return Refusal::new(Reason::NotAllowed, sentence);
                }
                _ => {}
            }
        }
        let silent = |trouble: &Trouble| matches!(trouble, Trouble::Io(_) | Trouble::Tls(_));
        let unreachable = |trouble: &Trouble| silent(trouble) || matches!(trouble, Trouble::TurnedAway(_));
        let sentence = format!(
            "no KMIP server could be asked for {what} ({all}): see that one of them runs and can be reached from here"
        );
        match troubles.iter().all(|(_, trouble)| unreachable(trouble)) {
            true if !answered && troubles.iter().all(|(_, trouble)| silent(trouble)) => Refusal::unanswered(sentence),
            true => Refusal::new(Reason::TimedOut, sentence),
            false => Refusal::new(
                Reason::KeyManager,
                format!(
                    "no KMIP server has done what was asked for {what} ({all}): have their administrator look at them"
                ),
            ),
        }
    }

    /// What `fault` comes to where every server has to answer.
    fn not_asked(&self, what: &str, talk: &Talk<'_>, fault: Fault) -> Refusal {
        match fault {
            Fault::Final(refusal) => refusal,
            Fault::Server(trouble) => {
                let what = format!("{what}, for which every server has to answer");
                self.refusal(&what, vec![(talk.name().to_owned(), trouble)], false)
            }
        }
    }

    fn deadline(&self) -> Instant {
        Instant::now() + self.client.config().deadline
    }

    /// What comes of `work`, which is about the key of `volume`, with each server, by their names. All have to answer.
    fn with_every<T>(
        &self,
        volume: &VolumeId,
        deadline: Instant,
        work: impl Fn(&Talk<'_>) -> Result<T, Fault>,
    ) -> Result<Vec<(String, T)>, Refusal> {
        let each = self.client.order().map(|server| {
            let talk = self.client.talk(server, deadline);
            let done = work(&talk).map_err(|fault| self.not_asked(&key_of(volume), &talk, fault))?;
            Ok((talk.name().to_owned(), done))
        });
        each.collect()
    }

    /// The key of `volume` that counts, and what is known of the volume. Any server may say which one was chosen; none is
    /// chosen unless every one of them answers, with objects that are whole.
    fn fetch(&self, volume: &VolumeId) -> Result<Option<(Key, Description)>, Refusal> {
        let (what, deadline) = (key_of(volume), self.deadline());
        let is_unchosen = Cell::new(false);
        // What is wrong with the first object that cannot be read, and which keys were chosen by servers that gave none.
        let (damaged, said) = (RefCell::new(None), RefCell::new(Vec::new()));
        let pass_over = |talk: &Talk<'_>, refusal: Refusal| {
            let server = talk.name();
            tracing::warn!(server, "KMIP server {server} does not give the key of volume {volume}: {refusal}");
            damaged.borrow_mut().get_or_insert(refusal);
            Ok(None)
        };
        // Whether one was ended on a server where another object cannot be read: it may be the same one, registered anew.
        let was_ended = Cell::new(false);
        let fetched = self.with_any(&what, |talk| {
            let (mut found, fault) = find_whole(talk, volume)?;
            let has_ended = found.iter().any(|found| found.is_ended());
            let chosen = match (chosen(volume, &mut found), &fault) {
                (Err(ended), Some(fault)) if ended.reason().is_about_an_ended_key() => {
                    was_ended.set(true);
                    return pass_over(talk, fault.clone().and(&ended.to_string()));
                }
                (chosen, _) => chosen?,
            };
            let Some(chosen) = chosen else {
                is_unchosen.set(is_unchosen.get() || !found.is_empty());
                return fault.map_or(Ok(None), |refusal| pass_over(talk, refusal));
            };
            let says = chosen.sealed.check_value;
            let handed_out = match fault {
                None => hand_out(talk, volume, &chosen),
                Some(refusal) => Err(refusal.into()),
            };
            match handed_out {
                // Where two were chosen, nothing here tells which one the volume was written with.
                // The same goes for a server that does not know yet what was ended.
                Ok(_) if said.borrow().iter().any(|other| *other != says) || (was_ended.get() && !has_ended) => {
                    let refusal = damaged.borrow_mut().take();
                    let of_two =
                        || undecided(volume, "one server has chosen one and another server another".to_owned());
                    Err(refusal.unwrap_or_else(of_two).into())
                }
                Ok(handed_out) => Ok(Some(handed_out)),
                Err(fault) => {
                    said.borrow_mut().push(says);
                    match fault {
                        Fault::Final(refusal) if !refusal.reason().is_about_an_ended_key() => pass_over(talk, refusal),
                        fault => Err(fault),
                    }
                }
            }
        });
        match (fetched, damaged.into_inner()) {
            (Ok(None), Some(damaged)) => return Err(damaged),
            (Err(refusal), Some(damaged)) if refusal.reason() == Reason::TimedOut => {
                return Err(refusal.and(&damaged.to_string()));
            }
            (Ok(None), None) if is_unchosen.get() => {}
            (Err(refusal), None) if is_unchosen.get() && refusal.reason() == Reason::TimedOut => {
                return Err(refusal.and(
                    "another server has one that nobody has used yet, which is used only if every server answers",
                ));
            }
            (fetched, _) => return fetched,
        }
        let talks: Vec<_> = self.client.order().map(|server| self.client.talk(server, deadline)).collect();
        let talks: Vec<&Talk<'_>> = talks.iter().collect();
        let named = |talk: &Talk<'_>, fault: Fault| match fault {
            Fault::Final(refusal) => refusal,
            Fault::Server(trouble) => {
                let what = format!("{what}, for which every server has to answer");
                self.refusal(&what, vec![(talk.name().to_owned(), trouble)], true)
            }
        };
        let Some(found) = settle(&talks, volume, &named)? else { return Ok(None) };
        let talk = talks[found.on[0]];
        hand_out(talk, volume, &found).map(Some).map_err(|fault| named(talk, fault))
    }
}

impl KeyManager for KmipKeyManager {
    /// # Errors
    /// [`Reason::NoKey`] when no server has such a key, [`Reason::KeyRevoked`] or [`Reason::KeyDestroyed`] when it was
    /// revoked or destroyed, [`Reason::WrongKey`] when it is not the one that was made for the volume, [`Reason::NotAllowed`] when this
    /// host may not have it, [`Reason::TimedOut`] when no server answers, [`Reason::KeyManager`] when an answer makes
    /// no sense.
    fn get(&self, volume: &VolumeId) -> Result<Key, Refusal> {
        self.fetch(volume)?.map(|(key, _)| key).ok_or_else(|| no_key(volume))
    }

    /// Which key counts was settled when this host used it first. One that is not active any more is looked at as by
    /// [`get`](KeyManager::get), but none is chosen.
    ///
    /// # Errors
    /// As [`get`](KeyManager::get).
    fn get_enrolled(&self, key: &RecordedKey) -> Result<Key, Refusal> {
        let (volume, version) = (&key.volume, key.own_version(PLACE)?);
        // What servers say that do not give the key that is recorded. Each may be damaged or lag behind, as where it has
        // none, and it is the answer only if every other one was asked.
        let instead = RefCell::new(Vec::new());
        let found = self.with_any(&key_of(volume), |talk| {
            let said = match enrolled_on(talk, key, version) {
                Ok(Some(found)) if found.check_value(volume) == key.check_value => return Ok(Some(found)),
                Ok(Some(other)) => Ok(other),
                Ok(None) => return Ok(None),
                // That was done on purpose.
                Err(Fault::Final(refusal)) if refusal.reason().is_about_an_ended_key() => return Err(refusal.into()),
                Err(Fault::Final(refusal)) => Err(refusal),
                Err(fault) => return Err(fault),
            };
            let name = talk.name();
            tracing::warn!(server = name, "KMIP server {name} does not give the recorded key of volume {volume}");
            instead.borrow_mut().push(said);
            Ok(None)
        })?;
        if let Some(found) = found {
            return Ok(found);
        }
        let mut instead = instead.into_inner();
        // A no costs the key that is kept on this host, so what is none goes first.
        let is_none = |said: &Result<Key, Refusal>| matches!(said, Err(other) if other.reason() != Reason::WrongKey);
        let place = instead.iter().position(is_none).unwrap_or(0);
        match instead.is_empty() {
            true => Err(no_key(volume)),
            false => instead.swap_remove(place),
        }
    }

    /// # Errors
    /// As [`get`](KeyManager::get), and [`Reason::Configuration`] when there is a key of another size.
    fn create(&self, volume: &VolumeId, wanted: &Description) -> Result<(Key, Description), Refusal> {
        let (key, description) = match self.fetch(volume)? {
            Some(present) => present,
            None => self.make(volume, wanted, None, Description::eq)?,
        };
        description.check_size(volume, wanted)?;
        Ok((key, description))
    }

    /// # Errors
    /// As [`get`](KeyManager::get), and [`Reason::WrongKey`] when there is another key.
    fn import(&self, volume: &VolumeId, key: &Key, description: &Description) -> Result<Imported, Refusal> {
        let (imported, (kept, said)) = match self.fetch(volume)? {
            Some(present) => (Imported::Present, present),
            None => {
                self.make(volume, description, Some(key), Description::reads_as)?;
                // What was handed over is read once more, from whichever server is asked from now on.
                (Imported::Stored, self.fetch(volume)?.ok_or_else(|| no_key(volume))?)
            }
        };
        match kept.same_as(key) && said.reads_as(description) {
            true => Ok(imported),
            false => Err(other_key(volume, PLACE)),
        }
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities { lists: true, imports: true, destroys: true, describes: true }
    }

    /// # Errors
    /// As [`get`](KeyManager::get).
    fn described(&self, volume: &VolumeId) -> Result<Option<(Key, Description)>, Refusal> {
        self.fetch(volume)
    }

    /// On every server, each of which has to answer before it is destroyed on any. To destroy a key again is no error where
    /// a server remembers it.
    ///
    /// # Errors
    /// [`Reason::NoKey`] when no server has such a key, and those of [`get`](KeyManager::get).
    fn destroy(&self, volume: &VolumeId) -> Result<(), Refusal> {
        let deadline = self.deadline();
        let found = self.with_every(volume, deadline, |talk| find(talk, volume))?;
        self.with_every(volume, deadline, |talk| destroy_on(talk, volume))?;
        match found.iter().any(|(_, found)| !found.is_empty()) {
            true => Ok(()),
            false => Err(no_key(volume)),
        }
    }

    /// # Errors
    /// As [`get`](KeyManager::get), where every server has to answer, and [`Reason::KeyManager`] when one has another or none.
    fn check_everywhere(&self, volume: &VolumeId, key: &Key) -> Result<(), Refusal> {
        let have =
            self.with_every(volume, self.deadline(), |talk| match chosen(volume, &mut find(talk, volume)?)? {
                Some(found) => hand_out(talk, volume, &found).map(|(found, _)| found.same_as(key)),
                None => Ok(false),
            })?;
        match have.iter().find(|(_, has_it)| !has_it) {
            None => Ok(()),
            Some((server, _)) => Err(Refusal::new(
                Reason::KeyManager,
                format!(
                    "the KMIP server {server} does not have the key of volume {volume} that the others have: all servers of \
                     [kmip] have to hold the same keys, so have their administrator see to that, and repeat"
                ),
            )),
        }
    }

    /// # Errors
    /// As [`get`](KeyManager::get), where every server has to answer.
    fn leaving(&self, volume: &VolumeId) -> Result<Option<Leaving>, Refusal> {
        let found = self.with_every(volume, self.deadline(), |talk| find(talk, volume))?;
        let mut marks = found.into_iter().flat_map(|(_, found)| found).filter_map(|found| found.attributes.leaving);
        Ok(marks.next().map(|mark| Leaving::parse(&mark)))
    }

    /// # Errors
    /// As [`get`](KeyManager::get).
    fn note_leaving(&self, volume: &VolumeId, leaving: Option<&Leaving>) -> Result<(), Refusal> {
        let mark = leaving.map(Leaving::to_string);
        let noted = self.with_any(&key_of(volume), |talk| {
            let mut found = find(talk, volume)?;
            found.retain(|found| found.attributes.state != State::Destroyed);
            for Found { identifier, attributes, .. } in &found {
                unless_gone(talk, &Request::mark(identifier, volume.as_str(), attributes, mark.as_deref()))?;
            }
            Ok((!found.is_empty()).then_some(()))
        })?;
        noted.ok_or_else(|| no_key(volume))
    }

    fn seen_after(&self) -> Duration {
        settle::PATIENCE
    }

    /// Each question has the deadline for itself once the server has said which keys there are.
    fn list(&self) -> Result<Vec<KeyInfo>, Refusal> {
        let time = LOOK_FOR_ALL.max(self.client.config().deadline);
        let infos = self.with_any_within(time, "the list of keys", |talk| {
            let mut infos = Vec::new();
            let identifiers = talk.ask(&Request::locate_all())?.identifiers()?;
            for (number, identifier) in identifiers.iter().enumerate() {
                talk.renew();
                tell(number, identifiers.len());
                let attributes = match talk.ask(&Request::get_attributes(identifier)) {
                    Ok(answer) => answer.attributes(identifier),
                    Err(Trouble::Refused(failure)) if failure.is_not_found() => continue,
                    Err(trouble) => return Err(trouble.into()),
                };
                // Whatever else somebody put into that group is none of ours.
                let Ok(attributes) = attributes else { continue };
                let volume: Option<VolumeId> = attributes.volume.as_ref().and_then(|volume| volume.parse().ok());
                // One that the server has made and nobody has described has another name yet.
                let volume = volume.filter(|volume| attributes.names.contains(&name_of(volume)));
                let size = u32::try_from(attributes.bits).ok().and_then(|bits| KeySize::try_from(bits).ok());
                let (Some(volume), Some(key_size)) = (volume, size) else { continue };
                let destroyed = matches!(attributes.state, State::Revoked | State::Destroyed);
                // One of which nothing is said that makes sense is none that could be used.
                let said = attributes.description.as_deref().map(SealedDescription::parse);
                let version = said.and_then(Result::ok).map_or(FIRST_VERSION, |said| said.key_version());
                infos.push(KeyInfo {
                    key: KeyHandle::of(&volume, version),
                    volume,
                    key_size,
                    created_at: attributes.initial_date,
                    destroyed,
                    hosts: Vec::new(),
                });
            }
            infos.sort_by(|one, other| one.volume.as_str().cmp(other.volume.as_str()));
            Ok(Some(infos))
        })?;
        Ok(infos.unwrap_or_default())
    }
}

/// The key that a record names on one server, or another one of the same version.
fn enrolled_on(talk: &Talk<'_>, key: &RecordedKey, version: u32) -> Result<Option<Key>, Fault> {
    let volume = &key.volume;
    if let Some((found, _)) = find_enrolled(talk, key, State::Active, |found| hand_out(talk, volume, found))? {
        return Ok(Some(found));
    }
    let Some(found) = chosen(volume, &mut find(talk, volume)?)? else {
        // The one that is recorded was chosen before it was used, and the server does not know that, as after it was
        // restored from a backup. No other one is chosen by being read.
        return find_enrolled(talk, key, State::PreActive, |found| {
            let (key, _) = hand_out(talk, volume, found)?;
            activate(talk, &found.identifier, talk.config().deadline)?;
            Ok(key)
        });
    };
    let (found, description) = hand_out(talk, volume, &found)?;
    match description.key_version() {
        own if own == version => Ok(Some(found)),
        other => Err(key.other_version(PLACE, other).into()),
    }
}

/// Has a key handed out that was found, if it is the one that its description was written for.
fn hand_out(talk: &Talk<'_>, volume: &VolumeId, found: &Found) -> Result<(Key, Description), Fault> {
    let identifier = &found.identifier;
    let key = wrapping::take(talk, volume, identifier)?;
    let description = found.sealed.open(volume, &key).map_err(|what| {
        let sentence = format!(
            "the KMIP server's key of volume {volume} (object {identifier}) {what}: have its administrator restore the key \
             that was made for the volume, and its application specific information"
        );
        Refusal::new(Reason::WrongKey, sentence)
    })?;
    Ok((key, description))
}

/// Destroys whatever the server has of the key of `volume`, unfinished ones included.
fn destroy_on(talk: &Talk<'_>, volume: &VolumeId) -> Result<(), Fault> {
    for found in find(talk, volume)?.iter().filter(|found| found.attributes.state != State::Destroyed) {
        if found.attributes.state == State::Active {
            unless_gone(talk, &Request::revoke(&found.identifier))?;
        }
        unless_gone(talk, &Request::destroy(&found.identifier))?;
    }
    clear_unfinished(talk, volume)?;
    match find(talk, volume)?.iter().all(|found| found.attributes.state == State::Destroyed) {
        true => Ok(()),
        false => Err(Fault::Final(Refusal::new(
            Reason::KeyManager,
            format!(
                "the KMIP server {} still has a key of volume {volume} after it was destroyed: destroy it again",
                talk.name()
            ),
        ))),
    }
}

fn unless_gone(talk: &Talk<'_>, request: &Request<'_>) -> Result<(), Fault> {
    match talk.ask(request) {
        Ok(_) => Ok(()),
        Err(Trouble::Refused(failure)) if failure.is_not_found() || failure.reason == Failure::OBJECT_DESTROYED => {
            Ok(())
        }
        Err(trouble) => Err(trouble.into()),
    }
}

fn name_of(volume: &VolumeId) -> String {
    format!("volcrypt/{volume}")
}

fn key_of(volume: &VolumeId) -> String {
    format!("the key of volume {volume}")
}

fn no_key(volume: &VolumeId) -> Refusal {
    Refusal::new(
        Reason::NoKey,
        format!(
            "the KMIP server has no key of volume {volume} that this host may see: if the volume was enrolled, have its \
             administrator restore the key or give this host the right to it"
        ),
    )
}
