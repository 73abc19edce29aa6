//! A KMIP server as the key manager: OASIS Key Management Interoperability Protocol 1.0 to 1.4.
//!
//! A volume's key is a symmetric key with the name `volcrypt/<volume id>`. KMIP demands no unique names of a server, so
//! two hosts that make the key of one new volume at the same moment may make two. Which one counts is agreed on by
//! looking only: the older one, and of two that are equally old the one with the smaller identifier. The server
//! tells ages in whole seconds, so a maker waits until the second of its own key is over before it looks: from then on
//! no key can come that would be older.

mod client;
mod connection;
pub mod message;
pub mod ttlv;

use std::path::PathBuf;
use std::time::Duration;

use self::client::{Client, NoAnswer};
use self::message::{Attributes, Failure, Label, Request, State};
use super::{Description, Key, KeyInfo, KeyManager};
use crate::policy::KeySize;
use crate::refusal::{Reason, Refusal};
use crate::volume::VolumeId;

pub use connection::{certificates, split_address};

/// The largest key that servers make themselves: AES has no longer one. XTS takes two of them, and those are handed
/// to the server.
const LARGEST_MADE_BY_SERVER: u32 = 256;

/// After this, the server's clock shows another second for sure; the two clocks need not show the same.
const ONE_SECOND: Duration = Duration::from_millis(1100);

/// How a KMIP server is reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KmipConfig {
    /// Servers that hold the same keys, each as `HOST:PORT`; the first one that answers is asked.
    pub servers: Vec<String>,
    /// The certificates of the authorities that servers have to be vouched for by, in PEM.
    pub ca: PathBuf,
    /// This host's certificate, in PEM.
    pub certificate: PathBuf,
    /// Its private key, in PEM.
    pub key: PathBuf,
    /// How long all servers together may take for one answer: 1 to 60 seconds.
    pub deadline: Duration,
}

/// Keeps volume keys on a KMIP server.
pub struct KmipKeyManager {
    client: Client,
}

/// A key on the server.
struct Found {
    identifier: String,
    attributes: Attributes,
}

impl KmipKeyManager {
    /// A key manager that asks the servers of `config`; nothing is connected yet.
    pub fn new(config: KmipConfig) -> Self {
        KmipKeyManager { client: Client::new(config) }
    }

    /// The keys of `volume` that the server has or remembers, the one that counts first.
    fn find(&self, volume: &VolumeId) -> Result<Vec<Found>, Refusal> {
        self.find_at(volume).map(|(found, _)| found)
    }

    /// As [`find`](Self::find), with the server's clock before it looked.
    fn find_at(&self, volume: &VolumeId) -> Result<(Vec<Found>, i64), Refusal> {
        let answer = self.ask(&Request::locate_name(&name_of(volume)), volume)?;
        let now = answer.time().map_err(|error| self.malformed(volume, error.0))?;
        let mut found = Vec::new();
        for identifier in answer.identifiers().map_err(|error| self.malformed(volume, error.0))? {
            // It may have been destroyed since.
            if let Some(attributes) = self.attributes(volume, &identifier)? {
                found.push(Found { identifier, attributes });
            }
        }
        found.sort_by(|one, other| {
            let rank = |found: &Found| (found.attributes.state == State::Destroyed, found.attributes.initial_date);
            rank(one).cmp(&rank(other)).then_with(|| one.identifier.cmp(&other.identifier))
        });
        Ok((found, now))
    }

    fn attributes(&self, volume: &VolumeId, identifier: &str) -> Result<Option<Attributes>, Refusal> {
        match self.client.ask(&Request::get_attributes(identifier)) {
            Ok(answer) => answer.attributes().map(Some).map_err(|error| self.malformed(volume, error.0)),
            Err(NoAnswer::Refused(failure)) if failure.reason == Failure::ITEM_NOT_FOUND => Ok(None),
            Err(no_answer) => Err(self.refusal(volume, no_answer)),
        }
    }

    /// Has a key handed out that was found.
    fn fetch(&self, volume: &VolumeId, found: &Found) -> Result<Key, Refusal> {
        match found.attributes.state {
            State::PreActive | State::Active => {}
            State::Revoked => {
                return Err(Refusal::new(
                    Reason::KeyDestroyed,
                    format!(
                        "the key of volume {volume} was revoked on the KMIP server (object {}): if the volume may still be \
                         used, have the server's administrator make it active again",
                        found.identifier
                    ),
                ));
            }
            State::Destroyed => {
                return Err(Refusal::new(
                    Reason::KeyDestroyed,
                    format!(
                        "the key of volume {volume} was destroyed on the KMIP server and its data can never be read again: \
                         to use the device anew, have a rule give it another id"
                    ),
                ));
            }
        }
        let answer = self.ask(&Request::get(&found.identifier), volume)?;
        let bytes = answer.key(&found.identifier).map_err(|error| self.malformed(volume, error.0))?;
        let bits = bytes.len() * 8;
        if bits != usize::try_from(found.attributes.bits).unwrap_or(0) || KeySize::try_from(bits as u32).is_err() {
            let sentence = format!(
                "the KMIP server's key of volume {volume} (object {}) has {bits} bits, and {} by its attributes; a key has \
                 128, 256 or 512: have the server's administrator look at it",
                found.identifier, found.attributes.bits
            );
            return Err(Refusal::new(Reason::WrongKey, sentence));
        }
        Key::filled(bytes.len(), |room| {
            room.copy_from_slice(bytes);
            Ok(())
        })
    }

    /// Makes a key on the server, which may turn out not to be the one that counts. Returns its identifier.
    fn make(
        &self,
        volume: &VolumeId,
        size: KeySize,
        description: Option<&str>,
    ) -> Result<(String, Option<Key>), Refusal> {
        let label = Label { name: &name_of(volume), volume: volume.as_str(), description };
        let (request, key) = match size.bits() <= LARGEST_MADE_BY_SERVER {
            true => (Request::create(&label, size), None),
            false => {
                let key = Key::random(size)?;
                (Request::register(&label, size, &key), Some(key))
            }
        };
        let answer = self.ask(&request, volume)?;
        match answer.identifiers().map_err(|error| self.malformed(volume, error.0))?.as_slice() {
            [identifier] => Ok((identifier.clone(), key)),
            _ => Err(self.malformed(volume, "it names no new object")),
        }
    }

    /// Has the key of `volume` that counts, which is made if there is none.
    fn create_with(
        &self,
        volume: &VolumeId,
        size: KeySize,
        description: Option<&str>,
    ) -> Result<(Key, Found), Refusal> {
        let (mut found, now) = self.find_at(volume)?;
        let made = if found.is_empty() { Some(self.make(volume, size, description)?) } else { None };
        // Another host's new key may be about to have an equally old rival.
        if found.first().is_none_or(|first| first.attributes.initial_date >= now) {
            std::thread::sleep(ONE_SECOND);
            found = self.find(volume)?;
        }
        if found.is_empty() {
            return Err(no_key(volume));
        }
        let first = found.remove(0);
        let key = self.fetch(volume, &first)?;
        if key.bits() != size.bits() as usize {
            let sentence = format!(
                "volume {volume} has a key of {0} bits already, {1} are asked for: use a profile with key_size = {0}",
                key.bits(),
                size.bits()
            );
            return Err(Refusal::new(Reason::Configuration, sentence));
        }
        match made {
            Some((identifier, Some(registered))) if identifier == first.identifier && !key.same_as(&registered) => {
                let sentence = format!(
                    "the new key of volume {volume} is not what the KMIP server gave back, and was not used: have its \
                     administrator look at object {identifier}"
                );
                return Err(Refusal::new(Reason::KeyManager, sentence));
            }
            // Another host was quicker, and nobody has used this one.
            Some((identifier, _)) if identifier != first.identifier => {
                if let Some(own) = found.iter().find(|found| found.identifier == identifier) {
                    self.end(volume, own)?;
                }
            }
            _ => {}
        }
        if first.attributes.state == State::PreActive {
            self.activate(volume, &first)?;
        }
        Ok((key, first))
    }

    /// Lets a key be used, unless it may be already.
    fn activate(&self, volume: &VolumeId, found: &Found) -> Result<(), Refusal> {
        match self.client.ask(&Request::activate(&found.identifier)) {
            Ok(_) => Ok(()),
            // Another host was quicker.
            Err(NoAnswer::Refused(failure)) if self.is_active(volume, found)? => {
                tracing::debug!("{} is active already: {}", found.identifier, failure.message);
                Ok(())
            }
            Err(no_answer) => Err(self.refusal(volume, no_answer)),
        }
    }

    fn is_active(&self, volume: &VolumeId, found: &Found) -> Result<bool, Refusal> {
        Ok(self.attributes(volume, &found.identifier)?.is_some_and(|attributes| attributes.state == State::Active))
    }

    /// Revokes and destroys one key. One that is gone is destroyed already.
    fn end(&self, volume: &VolumeId, found: &Found) -> Result<(), Refusal> {
        if found.attributes.state == State::Active {
            self.unless_gone(volume, &Request::revoke(&found.identifier))?;
        }
        self.unless_gone(volume, &Request::destroy(&found.identifier))
    }

    fn unless_gone(&self, volume: &VolumeId, request: &Request) -> Result<(), Refusal> {
        match self.client.ask(request) {
            Ok(_) => Ok(()),
            Err(NoAnswer::Refused(failure)) if failure.reason == Failure::ITEM_NOT_FOUND => Ok(()),
            Err(no_answer) => Err(self.refusal(volume, no_answer)),
        }
    }

    fn ask(&self, request: &Request, volume: &VolumeId) -> Result<message::Answer, Refusal> {
        self.client.ask(request).map_err(|no_answer| self.refusal(volume, no_answer))
    }

    fn refusal(&self, volume: &VolumeId, no_answer: NoAnswer) -> Refusal {
        let (reason, sentence) = match no_answer {
            NoAnswer::Refused(Failure { reason: Failure::ITEM_NOT_FOUND, .. }) => return no_key(volume),
            NoAnswer::Refused(Failure { reason, message }) => {
                let sentence = format!(
                    "the KMIP server refuses this host the key of volume {volume} (reason {reason}: {message}): have its \
                     administrator look at the rights of the certificate {}",
                    self.client.config().certificate.display()
                );
                (Reason::NotAllowed, sentence)
            }
            NoAnswer::Malformed(reasons) => {
                (Reason::KeyManager, format!("no KMIP server gave a usable answer about volume {volume}: {reasons}"))
            }
            NoAnswer::Unreachable(reasons) => (
                Reason::TimedOut,
                format!(
                    "no KMIP server could be asked for the key of volume {volume}: {reasons}; see that one of them runs \
                     and can be reached from here"
                ),
            ),
            NoAnswer::Local(sentence) => (Reason::Configuration, sentence),
        };
        Refusal::new(reason, sentence)
    }

    fn malformed(&self, volume: &VolumeId, what: &str) -> Refusal {
        self.refusal(volume, NoAnswer::Malformed(what.to_owned()))
    }
}

impl KeyManager for KmipKeyManager {
    /// # Errors
    /// [`Reason::NoKey`] when the server has no such key, [`Reason::KeyDestroyed`] when it was revoked or destroyed,
    /// [`Reason::NotAllowed`] when this host may not have it, [`Reason::TimedOut`] when no server answers,
    /// [`Reason::KeyManager`] when an answer makes no sense.
    fn get(&self, volume: &VolumeId) -> Result<Key, Refusal> {
        match self.find(volume)?.first() {
            Some(found) => self.fetch(volume, found),
            None => Err(no_key(volume)),
        }
    }

    /// # Errors
    /// As [`get`](KeyManager::get), and [`Reason::Configuration`] when there is a key of another size.
    fn create(&self, volume: &VolumeId, size: KeySize) -> Result<Key, Refusal> {
        self.create_with(volume, size, None).map(|(key, _)| key)
    }

    /// # Errors
    /// As [`create`](KeyManager::create), and [`Reason::KeyManager`] when the description that counts makes no sense.
    fn create_described(&self, volume: &VolumeId, wanted: &Description) -> Result<(Key, Description), Refusal> {
        let text = wanted.to_text().map_err(|error| Refusal::new(Reason::KeyManager, error.to_string()))?;
        let (key, found) = self.create_with(volume, wanted.key_size, Some(&text))?;
        let described = describe(volume, &found)?;
        Ok((key, described.unwrap_or_else(|| wanted.clone())))
    }

    /// # Errors
    /// As [`get`](KeyManager::get), and [`Reason::KeyManager`] when the description makes no sense.
    fn described(&self, volume: &VolumeId) -> Result<Option<(Key, Description)>, Refusal> {
        let found = self.find(volume)?;
        let Some(first) = found.first() else { return Ok(None) };
        let Some(description) = describe(volume, first)? else { return Ok(None) };
        Ok(Some((self.fetch(volume, first)?, description)))
    }

    /// To destroy a key again is no error where the server remembers it.
    ///
    /// # Errors
    /// [`Reason::NoKey`] when the server has no such key, and those of [`get`](KeyManager::get).
    fn destroy(&self, volume: &VolumeId) -> Result<(), Refusal> {
        let found = self.find(volume)?;
        if found.is_empty() {
            return Err(no_key(volume));
        }
        for found in found.iter().filter(|found| found.attributes.state != State::Destroyed) {
            self.end(volume, found)?;
        }
        // What was made meanwhile is one that nobody has used.
        match self.find(volume)?.iter().all(|found| found.attributes.state == State::Destroyed) {
            true => Ok(()),
            false => Err(Refusal::new(
                Reason::KeyManager,
                format!("the KMIP server still has a key of volume {volume} after it was destroyed: destroy it again"),
            )),
        }
    }

    fn list(&self) -> Result<Vec<KeyInfo>, Refusal> {
        // What goes wrong here is no volume's.
        let nobody = |no_answer| match no_answer {
            NoAnswer::Unreachable(reasons) => Refusal::new(
                Reason::TimedOut,
                format!(
                    "no KMIP server could be asked: {reasons}; see that one of them runs and can be reached from here"
                ),
            ),
            NoAnswer::Local(sentence) => Refusal::new(Reason::Configuration, sentence),
            NoAnswer::Malformed(reasons) => {
                Refusal::new(Reason::KeyManager, format!("no KMIP server gave a usable answer: {reasons}"))
            }
            NoAnswer::Refused(failure) => Refusal::new(
                Reason::NotAllowed,
                format!(
                    "the KMIP server refuses this host the list of keys (reason {}: {})",
                    failure.reason, failure.message
                ),
            ),
        };
        let malformed = |error: ttlv::Malformed| nobody(NoAnswer::Malformed(error.0.to_owned()));
        let answer = self.client.ask(&Request::locate_all()).map_err(nobody)?;
        let mut infos = Vec::new();
        for identifier in answer.identifiers().map_err(malformed)? {
            let attributes = match self.client.ask(&Request::get_attributes(&identifier)) {
                Ok(answer) => answer.attributes().map_err(malformed)?,
                Err(NoAnswer::Refused(failure)) if failure.reason == Failure::ITEM_NOT_FOUND => continue,
                Err(no_answer) => return Err(nobody(no_answer)),
            };
            // Whoever else put an object into that group, it is none of ours.
            let volume = attributes.volume.as_ref().and_then(|volume| volume.parse().ok());
            let size = u32::try_from(attributes.bits).ok().and_then(|bits| KeySize::try_from(bits).ok());
            let (Some(volume), Some(key_size)) = (volume, size) else { continue };
            let destroyed = matches!(attributes.state, State::Revoked | State::Destroyed);
            infos.push(KeyInfo { volume, key_size, version: 1, created_at: attributes.initial_date, destroyed });
        }
        infos.sort_by(|one, other| one.volume.as_str().cmp(other.volume.as_str()));
        Ok(infos)
    }
}

/// What is kept of the volume beside its key.
fn describe(volume: &VolumeId, found: &Found) -> Result<Option<Description>, Refusal> {
    let Some(text) = &found.attributes.description else { return Ok(None) };
    Description::parse(text).map(Some).map_err(|error| {
        let sentence = format!(
            "what the KMIP server keeps of volume {volume} beside its key (object {}) makes no sense ({error}): have its \
             administrator restore the object",
            found.identifier
        );
        Refusal::new(Reason::KeyManager, sentence)
    })
}

fn name_of(volume: &VolumeId) -> String {
    format!("volcrypt/{volume}")
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
