//! Secrets that Cinder has made, used as they are.
//!
//! What such a secret holds is never changed, and it is never deleted. What other hosts have to know of the volume is
//! kept beside it as beside a key that was made here, in metadata of volcrypt's own names; whatever else is kept there
//! stays. Where this host may read the secret and not write beside it, because it is another project's and an ACL lets
//! the host in, only this host's record has it.

use std::collections::BTreeMap;

use super::answer::NoAnswer;
use super::client::Asking;
use super::refusals::About;
use super::secrets_file;
use super::settle::{self, Found};
use super::{BarbicanKeyManager, PREFIX};
use crate::keys::{Description, ForeignKey, ForeignSecrets, Key, RecordedKey, SecretId};
use crate::refusal::{Reason, Refusal};
use crate::volume::VolumeId;

impl BarbicanKeyManager {
    /// The key that the record of a volume names, which comes from a secret of Cinder's.
    pub(super) fn foreign_key(&self, wanted: &RecordedKey, foreign: &ForeignKey) -> Result<Key, Refusal> {
        let RecordedKey { volume, check_value, .. } = wanted;
        let key = foreign.key(&self.secret(volume, &foreign.secret)?)?;
        if key.check_value(volume) != *check_value {
            let sentence = format!(
                "{foreign} does not hold any more what it held when volume {volume} was enrolled with it: have its owner \
                 restore it"
            );
            return Err(Refusal::new(Reason::WrongKey, sentence));
        }
        self.registered.is_now(volume, foreign.secret.as_str());
        Ok(key)
    }

    /// The key of a volume of which the file names the `secret`, and what hosts have noted of it. That none has is no word
    /// of there being no key: the volume may have had one before it was named there.
    pub(super) fn named_in_file(
        &self,
        volume: &VolumeId,
        secret: &SecretId,
    ) -> Result<Option<(Key, Description)>, Refusal> {
        let described = self.described_by(volume, secret);
        let has_none = match &described {
            Ok(described) => described.is_none(),
            Err(refusal) => refusal.reason() == Reason::NoKey,
        };
        if has_none {
            let asked = format!("volume_secrets of [barbican] names secret {secret}");
            self.check_has_no_own(&self.client.begin(), volume, &asked)?;
        }
        described
    }

    /// Refuses what is `asked` of a volume that has a key which was made here.
    fn check_has_no_own(&self, asking: &Asking<'_>, volume: &VolumeId, asked: &str) -> Result<(), Refusal> {
        match self.find_all(asking, volume)?.first() {
            None => Ok(()),
            Some(own) => Err(Refusal::new(
                Reason::WrongKey,
                format!(
                    "volume {volume} has a key of its own in Barbican (secret {}), and {asked}, which does not become its key: \
                     name no secret for it, or have its own key deleted first if nothing was encrypted with that",
                    own.id
                ),
            )),
        }
    }

    /// Refuses a secret that is called the key of a volume, even if nothing beside it says so any more.
    fn check_was_not_made_here(
        &self,
        asking: &Asking<'_>,
        volume: &VolumeId,
        secret: &SecretId,
    ) -> Result<(), Refusal> {
        let id = secret.as_str();
        let found = asking.secret(id).map_err(|no_answer| self.refusal(About::Foreign(volume, id), no_answer))?;
        match found.name.is_some_and(|name| name.starts_with(PREFIX)) {
            false => Ok(()),
            true => Err(Refusal::new(
                Reason::WrongKey,
                format!(
                    "Barbican's secret {id} is no secret of Cinder's but is called as a key that volcrypt has made for a volume, \
                     which may need it: give the one that Cinder has made for volume {volume}"
                ),
            )),
        }
    }

    /// What hosts have noted beside `secret`, if it is the key of `volume`.
    fn noted(&self, asking: &Asking<'_>, volume: &VolumeId, secret: &SecretId) -> Result<Option<Found>, Refusal> {
        let id = secret.as_str();
        let metadata = asking.metadata(id).map_err(|no_answer| self.refusal(About::Foreign(volume, id), no_answer))?;
        if let Some(other) = settle::volume_in(&metadata).filter(|other| *other != volume.as_str()) {
            let sentence = format!(
                "Barbican's secret {id} is the key of volume {other} and not of volume {volume}, by its metadata: each volume \
                 has a secret of its own, so give the one that Cinder has made for volume {volume}"
            );
            return Err(Refusal::new(Reason::WrongKey, sentence));
        }
        match settle::volume_in(&metadata) {
            Some(_) => settle::read(volume, id.to_owned(), String::new(), &metadata),
            // Whoever wrote pieces there broke off.
            None => Ok(None),
        }
    }

    /// The key that `secret` is or gives, if that is the one that what was `found` beside it was written for.
    fn open_noted(&self, volume: &VolumeId, secret: &SecretId, found: &Found) -> Result<(Key, Description), Refusal> {
        let foreign = found.sealed.foreign().filter(|foreign| foreign.secret == *secret).ok_or_else(|| {
            let sentence = format!(
                "Barbican's secret {secret} is no secret of Cinder's but the key that volcrypt has made for volume {volume}: it \
                 is found by its name, so do not name it"
            );
            Refusal::new(Reason::WrongKey, sentence)
        })?;
        let key = foreign.key(&self.secret(volume, secret)?)?;
        let description = found.sealed.open(volume, &key).map_err(|what| self.not_the_one(volume, &found.id, &what))?;
        Ok((key, description))
    }

    /// Writes beside `secret` what other hosts have to know of `volume`; last of all that it is that volume's, and which
    /// pieces count.
    fn note(&self, asking: &mut Asking<'_>, volume: &VolumeId, secret: &SecretId, text: &str) -> Result<(), NoAnswer> {
        let id = secret.as_str();
        let (pieces, (name, named)) = settle::set(volume, text);
        for (name, value) in &pieces {
            asking.renew();
            asking.add_metadatum(id, name, value)?;
        }
        // Where another host was first, its pieces stay the ones that count.
        asking.renew();
        asking.add_metadatum(id, name, &named)
    }
}

impl ForeignSecrets for BarbicanKeyManager {
    fn secret_for(&self, volume: &VolumeId) -> Result<Option<SecretId>, Refusal> {
        match &self.client.config().volume_secrets {
            None => Ok(None),
            Some(path) => Ok(secrets_file::read(path)?.remove(volume)),
        }
    }

    fn described_by(&self, volume: &VolumeId, secret: &SecretId) -> Result<Option<(Key, Description)>, Refusal> {
        let Some(found) = self.noted(&self.client.begin(), volume, secret)? else { return Ok(None) };
        let described = self.open_noted(volume, secret, &found)?;
        self.registered.is_now(volume, secret.as_str());
        Ok(Some(described))
    }

    fn secret(&self, volume: &VolumeId, secret: &SecretId) -> Result<Key, Refusal> {
        let id = secret.as_str();
        self.client.begin().payload(id).map_err(|no_answer| self.refusal(About::Foreign(volume, id), no_answer))
    }

    fn describe(
        &self,
        volume: &VolumeId,
        foreign: &ForeignKey,
        key: &Key,
        wanted: &Description,
    ) -> Result<Description, Refusal> {
        let mut asking = self.client.begin();
        let id = foreign.secret.as_str();
        self.check_has_no_own(&asking, volume, &format!("{foreign} was given"))?;
        let wanted = wanted.clone().with_foreign(foreign.clone());
        let found = match self.noted(&asking, volume, &foreign.secret)? {
            Some(found) => found,
            None => {
                self.check_was_not_made_here(&asking, volume, &foreign.secret)?;
                let text = wanted.to_text(volume, key);
                let text = text.map_err(|error| Refusal::new(Reason::KeyManager, error.to_string()))?;
                match self.note(&mut asking, volume, &foreign.secret, &text) {
                    Ok(()) => {}
                    Err(NoAnswer::Refused(answered)) if answered.status == 403 => {
                        tracing::warn!(
                            volume = %volume,
                            "this host alone knows that volume {volume} has {foreign} for a key: it may not write that beside \
                             the secret ({answered}), so name the secret on every host that uses the volume"
                        );
                        return Ok(wanted);
                    }
                    Err(no_answer) => return Err(self.refusal(About::Foreign(volume, id), no_answer)),
                }
                asking.renew();
                let lost = || self.not_the_one(volume, id, "has nothing beside it of what was written there");
                self.noted(&asking, volume, &foreign.secret)?.ok_or_else(lost)?
            }
        };
        let (kept, noted) = self.open_noted(volume, &foreign.secret, &found)?;
        match kept.same_as(key) && noted.reads_as(&wanted) {
            true => Ok(noted),
            false => Err(Refusal::new(
                Reason::WrongKey,
                format!(
                    "another host uses volume {volume} with the same secret in another way (profile, cipher or passphrase \
                     hash), so nothing was changed: give the volume the same profile here"
                ),
            )),
        }
    }

    fn are_keys(&self, secrets: BTreeMap<VolumeId, SecretId>) {
        self.registered.knows(secrets);
    }
}
