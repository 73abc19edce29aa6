//! OpenStack Barbican as the key manager, with Keystone deciding who may have a key.
//!
//! A volume's key is a secret with the name `volcrypt/<volume id>`, which is made here and handed over, and has beside
//! it, as metadata, what other hosts have to know of the volume, and its check value. See [`settle`] for which key
//! counts when two hosts make one for the same new volume.
//!
//! [`settle`]: settle

mod answer;
mod client;
mod consumers;
mod credential;
mod foreign;
mod http;
mod keystone;
mod listing;
mod messages;
mod refusals;
mod secrets_file;
mod settle;
mod wiped;

use std::collections::HashSet;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde::Serialize;
use zeroize::Zeroizing;

use self::answer::NoAnswer;
use self::client::{Asking, Client};
use self::consumers::Registered;
use self::refusals::About;
use self::settle::{Found, label};
use super::{
    Capabilities, Description, ForeignKey, ForeignSecrets, Imported, Key, KeyInfo, KeyManager, Leaving, RecordedKey,
    other_key,
};
use crate::refusal::{Reason, Refusal};
use crate::volume::VolumeId;

pub use credential::Credential;
pub use http::check_url;
pub use secrets_file::read as read_volume_secrets;

/// What the name of every key begins with; the volume's id follows.
const PREFIX: &str = "volcrypt/";
/// What sentences call it.
const PLACE: &str = "Barbican";

/// How Barbican is reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BarbicanConfig {
    /// Keystone, as `https://HOST:PORT/v3`.
    pub auth_url: String,
    /// Who this host is.
    pub credential: Credential,
    /// The file with the application credential's secret, or the password.
    pub secret: PathBuf,
    /// The certificates of the authorities that servers have to be vouched for by, in PEM. Needed for https.
    pub ca: Option<PathBuf>,
    /// Which of Barbican's addresses in the catalogue is used: `public`, `internal` or `admin`.
    pub interface: String,
    /// The region whose Barbican is used, where there are several.
    pub region: Option<String>,
    /// How long all that is asked for one key may take together: 1 to 60 seconds.
    pub deadline: Duration,
    /// The file that says which secrets of Cinder's are the keys of which volumes.
    pub volume_secrets: Option<PathBuf>,
}

/// Keeps volume keys in Barbican.
pub struct BarbicanKeyManager {
    client: Client,
    registered: Registered,
}

impl BarbicanKeyManager {
    /// A key manager that works by `config`; nothing is connected yet.
    pub fn new(config: BarbicanConfig) -> Self {
        BarbicanKeyManager { client: Client::new(config), registered: Registered::default() }
    }

    /// Has Keystone give this host a token; returns where its catalogue says that Barbican is.
    ///
    /// # Errors
    /// [`Reason::NotAllowed`] when it gives none, [`Reason::TimedOut`] when it does not answer, [`Reason::KeyManager`]
    /// when what it says makes no sense, [`Reason::Configuration`] when something on this side is not right.
    pub fn introduce(&self) -> Result<String, Refusal> {
        self.client.begin().introduce().map_err(|no_answer| self.refusal(About::NoVolume, no_answer))
    }

    /// The key of `volume` that counts, and what is known of the volume.
    fn fetch(&self, volume: &VolumeId) -> Result<Option<(Key, Description)>, Refusal> {
        if let Some(secret) = self.secret_for(volume)? {
            return self.named_in_file(volume, &secret);
        }
        let mut asking = self.client.begin();
        let Some(found) = self.settle(&mut asking, volume, false)? else { return Ok(None) };
        self.hand_out(&asking, volume, &found).map(Some)
    }

    /// Has a key handed out that was found, if it is the one that its description was written for.
    fn hand_out(&self, asking: &Asking<'_>, volume: &VolumeId, found: &Found) -> Result<(Key, Description), Refusal> {
        let id = &found.id;
        let key = asking.payload(id).map_err(|no_answer| self.refusal(About::Secret(volume, id), no_answer))?;
        let description = found.sealed.open(volume, &key).map_err(|what| self.not_the_one(volume, id, &what))?;
        if description.foreign().is_some() {
            return Err(self.not_the_one(volume, id, "is called as another secret's should be"));
        }
        self.registered.is_now(volume, id);
        Ok((key, description))
    }

    /// The refusal of the secret `id`, of which it is said `what` is wrong with it.
    fn not_the_one(&self, volume: &VolumeId, id: &str, what: &str) -> Refusal {
        let sentence = format!(
            "Barbican's key of volume {volume} (secret {id}) {what}: have its owner restore the key that was made for the \
             volume, and its metadata"
        );
        Refusal::new(Reason::WrongKey, sentence)
    }

    /// Hands `key` to Barbican and chooses it, if it is the one that counts in the end. Returns the one that does.
    ///
    /// What comes back with it has to be `alike`: another host that moves the same key may say more of the volume.
    fn store(
        &self,
        volume: &VolumeId,
        wanted: &Description,
        key: &Key,
        alike: fn(&Description, &Description) -> bool,
    ) -> Result<(Key, Description), Refusal> {
        if let Some(secret) = self.secret_for(volume)? {
            let sentence = format!(
                "volume_secrets of [barbican] names secret {secret} as the key of volume {volume}, so it gets no other: take it out \
                 of that file if that is wrong"
            );
            return Err(Refusal::new(Reason::WrongKey, sentence));
        }
        let mut asking = self.client.begin();
        let refusal = |no_answer| self.refusal(About::NewKey(volume), no_answer);
        let text = wanted.to_text(volume, key).map_err(|error| Refusal::new(Reason::KeyManager, error.to_string()))?;
        let id = asking.store(&name_of(volume), key).map_err(refusal)?;
        let offered = Instant::now();
        if let Err(no_answer) = asking.put_metadata(&id, &label(volume, &text)) {
            self.take_back(&asking, &id, offered, &no_answer);
            return Err(refusal(no_answer));
        }
        let found = self.settle(&mut asking, volume, true)?.ok_or_else(|| self.no_key(volume))?;
        let (kept, description) = self.hand_out(&asking, volume, &found)?;
        let is_own = found.id == id;
        if is_own && !(kept.same_as(key) && alike(&description, wanted)) {
            let sentence = format!(
                "the new key of volume {volume} is not what Barbican gave back, and was not used: have its administrator look \
                 at the secret {id}"
            );
            return Err(Refusal::new(Reason::KeyManager, sentence));
        }
        // Another host was quicker. That one stays does no harm.
        if !is_own && let Err(refusal) = self.give_up(&asking, volume, &id) {
            tracing::warn!("a new key of volume {volume} that nobody uses stays in Barbican: {refusal}");
        }
        Ok((kept, description))
    }

    /// Deletes the secret `id` that could not be offered since `offered`, so that it is in nobody's way, if Barbican has
    /// refused at once. Otherwise somebody may have chosen it and waited for long enough by now.
    fn take_back(&self, asking: &Asking<'_>, id: &str, offered: Instant, no_answer: &NoAnswer) {
        let left = settle::PROMPTLY.saturating_sub(offered.elapsed());
        let is_refused = matches!(no_answer, NoAnswer::Refused(answered) if !matches!(answered.status, 502 | 504));
        if is_refused && !left.is_zero() && asking.within(left).delete(id).is_err() {
            tracing::warn!("the secret {id}, which is nobody's key, stays in Barbican");
        }
    }

    /// Deletes the secret `id`, which was made here while another one was chosen. One that was chosen as well stays until
    /// somebody has decided, and one that anybody is registered as a consumer of, because Barbican refuses.
    fn give_up(&self, asking: &Asking<'_>, volume: &VolumeId, id: &str) -> Result<(), Refusal> {
        let refusal = |no_answer| self.refusal(About::Secret(volume, id), no_answer);
        match settle::is_chosen(&asking.metadata(id).map_err(refusal)?) {
            true => Ok(()),
            false => asking.delete(id).map_err(refusal),
        }
    }
}

impl KeyManager for BarbicanKeyManager {
    /// # Errors
    /// [`Reason::NoKey`] when Barbican has no such key, [`Reason::WrongKey`] when it is not the one that was made for the
    /// volume, [`Reason::NotAllowed`] when this host may not have it, [`Reason::TimedOut`] when Keystone or Barbican
    /// does not answer, [`Reason::KeyManager`] when an answer makes no sense.
    fn get(&self, volume: &VolumeId) -> Result<Key, Refusal> {
        self.fetch(volume)?.map(|(key, _)| key).ok_or_else(|| self.no_key(volume))
    }

    /// Which key counts was settled when this host used it first.
    ///
    /// # Errors
    /// As [`get`](KeyManager::get).
    fn get_enrolled(&self, key: &RecordedKey) -> Result<Key, Refusal> {
        if let Some(foreign) = ForeignKey::named_by(&key.volume, &key.handle) {
            return self.foreign_key(key, &foreign);
        }
        let (volume, version) = (&key.volume, key.own_version(PLACE)?);
        let asking = self.client.begin();
        let (mut first, mut others) = (None, 0);
        for secret in self.named(&asking, volume)? {
            let id = secret.id().map_err(|no_answer| self.refusal(About::Volume(volume), no_answer))?.to_owned();
            let about = About::Secret(volume, &id);
            let outcome = match asking.metadata(&id) {
                Ok(metadata) => settle::read(volume, id.clone(), secret.created, &metadata),
                Err(NoAnswer::Refused(answered)) if answered.status == 404 => continue,
                Err(no_answer @ (NoAnswer::Refused(_) | NoAnswer::Malformed(_))) => Err(self.refusal(about, no_answer)),
                Err(no_answer) => return Err(self.refusal(about, no_answer)),
            };
            let outcome = match outcome {
                Ok(Some(found)) if found.sealed.is_for(key) => {
                    self.hand_out(&asking, volume, &found).map(|(key, _)| key)
                }
                Ok(found) => {
                    others += usize::from(found.is_some());
                    continue;
                }
                Err(refusal) => Err(refusal),
            };
            match outcome {
                Ok(key) => return Ok(key),
                Err(refusal) => {
                    tracing::warn!("passed over a secret that is called the key of volume {volume}: {refusal}");
                    first.get_or_insert(refusal);
                }
            }
        }
        Err(match first {
            Some(refusal) => refusal,
            None if others == 0 => self.no_key(volume),
            None => Refusal::new(
                Reason::WrongKey,
                format!(
                    "none of the keys that Barbican has of volume {volume} is the one that this host has used, version {version}: \
                     have the owner restore the secret whose key has the check value that 'volcrypt volume show {volume}' shows"
                ),
            ),
        })
    }

    /// # Errors
    /// As [`get`](KeyManager::get), and [`Reason::Configuration`] when there is a key of another size.
    fn create(&self, volume: &VolumeId, wanted: &Description) -> Result<(Key, Description), Refusal> {
        let (key, description) = match self.fetch(volume)? {
            Some(present) => present,
            None => self.store(volume, wanted, &Key::random(wanted.key_size)?, Description::eq)?,
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
                self.store(volume, description, key, Description::reads_as)?;
                (Imported::Stored, self.fetch(volume)?.ok_or_else(|| self.no_key(volume))?)
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

    /// # Errors
    /// [`Reason::NoKey`] when Barbican has no such key, [`Reason::NotAllowed`] when somebody else is registered as using
    /// it, and those of [`get`](KeyManager::get).
    fn destroy(&self, volume: &VolumeId) -> Result<(), Refusal> {
        let mut asking = self.client.begin();
        let mut found = self.find_all(&asking, volume)?;
        // The one that counts goes last, so that none takes its place if this breaks off.
        found.sort_by_key(|found| found.is_chosen);
        let named = self.named(&asking, volume)?;
        let unfinished = named.iter().filter_map(|secret| secret.id().ok()).map(str::to_owned);
        let ids: Vec<String> = unfinished
            .filter(|id| found.iter().all(|found| found.id != *id))
            .chain(found.iter().map(|found| found.id.clone()))
            .collect();
        if ids.is_empty() {
            return Err(self.no_key(volume));
        }
        self.check_unused(&mut asking, volume, &named)?;
        for id in ids {
            asking.renew();
            asking.delete(&id).map_err(|no_answer| self.refusal(About::Secret(volume, &id), no_answer))?;
        }
        match self.named(&asking, volume)?.is_empty() {
            true => Ok(()),
            false => Err(Refusal::new(
                Reason::KeyManager,
                format!("Barbican still has a key of volume {volume} after it was destroyed: destroy it again"),
            )),
        }
    }

    /// # Errors
    /// [`Reason::NotAllowed`] when another host uses the key, and those of [`get`](KeyManager::get).
    fn check_destroyable(&self, volume: &VolumeId) -> Result<(), Refusal> {
        let secrets = self.named(&self.client.begin(), volume)?;
        self.check_used_by_nobody_else(volume, &secrets)
    }

    /// # Errors
    /// As [`get`](KeyManager::get).
    fn leaving(&self, volume: &VolumeId) -> Result<Option<Leaving>, Refusal> {
        let found = self.find_all(&self.client.begin(), volume)?;
        Ok(found.into_iter().find_map(|found| found.leaving).map(|mark| Leaving::parse(&mark)))
    }

    /// # Errors
    /// As [`get`](KeyManager::get).
    fn note_leaving(&self, volume: &VolumeId, leaving: Option<&Leaving>) -> Result<(), Refusal> {
        let asking = self.client.begin();
        let found = self.find_all(&asking, volume)?;
        for Found { id, .. } in &found {
            let noted = match leaving {
                Some(leaving) => asking.replace_metadatum(id, settle::LEAVING, &leaving.to_string()),
                None => asking.remove_metadatum(id, settle::LEAVING),
            };
            noted.map_err(|no_answer| self.refusal(About::Secret(volume, id), no_answer))?;
        }
        if found.is_empty() { Err(self.no_key(volume)) } else { Ok(()) }
    }

    fn seen_after(&self) -> Duration {
        settle::PATIENCE
    }

    fn list(&self) -> Result<Vec<KeyInfo>, Refusal> {
        self.all_chosen()
    }

    fn foreign(&self) -> Option<&dyn ForeignSecrets> {
        Some(self)
    }

    /// # Errors
    /// As [`get`](KeyManager::get), of the first volume that it went wrong with.
    fn note_uses(&self, in_use: &HashSet<VolumeId>) -> Result<(), Refusal> {
        self.settle_uses(in_use, Instant::now())
    }
}

fn name_of(volume: &VolumeId) -> String {
    format!("{PREFIX}{volume}")
}

/// JSON, in memory that is wiped.
fn to_json(value: &impl Serialize) -> Zeroizing<Vec<u8>> {
    // Nothing here is longer, and memory that is outgrown would not be wiped.
    let mut text = Zeroizing::new(Vec::with_capacity(16 << 10));
    // Texts and numbers can always be written to memory.
    let _ = serde_json::to_writer(&mut *text, value);
    text
}
