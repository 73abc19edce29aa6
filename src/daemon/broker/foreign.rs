//! Volumes whose keys are secrets that Cinder has made, and those that os-brick has encrypted with them.

use std::cell::Cell;
use std::fs::File;
use std::time::{Duration, Instant};

use rustix::fs::OFlags;

use super::enrolment::check_tells_wwid;
use super::{Broker, Vault, enrolled_device};
use crate::encryptor::MappingSpec;
use crate::keys::{Description, ForeignKey, ForeignSecrets, Key, PassphraseHash, SecretId};
use crate::policy::Protection;
use crate::refusal::{Reason, Refusal};
use crate::store::{VolumeRecord, seconds_now};
use crate::volume::{Content, DeviceNumber, Identity, VolumeId, examine, recognise};

/// The unit in which os-brick has volumes encrypted, in bytes.
const SECTOR_SIZE: u32 = 512;
/// How long a mapping that was only looked through may take to go.
const GOING_DEADLINE: Duration = Duration::from_secs(5);
/// How often it is looked whether it is gone.
const GOING_PAUSE: Duration = Duration::from_millis(10);

impl Broker {
    /// Takes the volume on `device` into use, for `owner` or for everybody, that os-brick has encrypted with `secret`,
    /// or with the one that the configuration names. Not a byte of it is written. If no `hash` is given, those are
    /// tried that there are, and the secret itself as the key. A volume that is enrolled with that secret already stays
    /// as it is.
    ///
    /// # Errors
    /// When no rule protects the device; when what is on it does not become anything that is recognised; when the
    /// volume or the secret is in use in another way; and when the key manager does not give the secret or has none of
    /// that kind.
    pub fn adopt_encrypted(
        &self,
        device: DeviceNumber,
        secret: Option<&SecretId>,
        hash: Option<PassphraseHash>,
        owner: Option<&str>,
    ) -> Result<VolumeRecord, Refusal> {
        let (config, identity) = (self.config()?, self.devices.identify(device)?);
        let protection = self.protected(&config, &identity)?;
        let volume = &protection.volume;
        let adopted = self.one_at_a_time(volume, || {
            let vault = self.vault()?;
            let secret = self.secret_of(&vault, volume, secret)?.ok_or_else(|| {
                Refusal::new(
                    Reason::Configuration,
                    format!(
                        "it is not said with which secret of Cinder's volume {volume} is encrypted: give its UUID with --secret \
                         ('openstack volume show' has it as encryption_key_id), or name it in volume_secrets of [barbican]"
                    ),
                )
            })?;
            if let Some(record) = vault.store.volume(volume)? {
                check_same(&record, &secret, hash)?;
                return self.enrol_again(&identity, record, owner);
            }
            self.adopt_new(&vault, &identity, &protection, (&secret, hash), owner)
        });
        adopted.map_err(|refusal| refusal.of(volume))
    }

    fn adopt_new(
        &self,
        vault: &Vault,
        identity: &Identity,
        protection: &Protection<'_>,
        (secret, hash): (&SecretId, Option<PassphraseHash>),
        owner: Option<&str>,
    ) -> Result<VolumeRecord, Refusal> {
        let Protection { volume, profile, profile_name, .. } = protection;
        self.check_size(identity, profile)?;
        check_tells_wwid(identity)?;
        if profile.sector_size != SECTOR_SIZE {
            let sentence = format!(
                "os-brick encrypts in sectors of {SECTOR_SIZE} bytes, and profile {profile_name:?} has sector_size = {}: have \
                 the rule name a profile with sector_size = {SECTOR_SIZE}, and with cipher and key_size of the volume's type \
                 in Cinder",
                profile.sector_size
            );
            return Err(Refusal::new(Reason::Configuration, sentence));
        }
        if let Some(record) = self.take_over(identity, volume, Some(secret))? {
            check_same(&record, secret, hash)?;
            return self.enrol_again(identity, record, owner);
        }
        vault.store.check_secret(volume, secret)?;
        let plain = self.check_not_blank(identity, volume)?;
        let secrets = foreign_secrets(vault)?;
        let held = secrets.secret(volume, secret)?;
        let profile_named = (*profile_name, *profile);
        let wanted = Description::new(enrolled_device(identity), identity.size, profile_named, owner, seconds_now());
        let found = self.find_key(identity, protection, &wanted, (secret, hash), &held);
        let (foreign, key, what) = found.map_err(|refusal| match plain {
            Some(what) if refusal.reason() == Reason::ForeignData => refusal.and(&format!(
                "{identity} as it is holds {what}: only what os-brick has encrypted with the provider plain can be adopted"
            )),
            _ => refusal,
        })?;
        let description = secrets.describe(volume, &foreign, &key, &wanted)?;
        let record = description.record(volume, &key);
        self.check_device(identity, &record)?;
        vault.store.enrol(&record)?;
        tracing::info!(
            volume = %volume, device = %identity, rule = protection.rule.name(),
            "adopted volume {volume} on {identity}, on which {what} is encrypted with {foreign}"
        );
        Ok(record)
    }

    /// The key with which something is recognised on the device, and what that is.
    fn find_key(
        &self,
        identity: &Identity,
        protection: &Protection<'_>,
        wanted: &Description,
        (secret, hash): (&SecretId, Option<PassphraseHash>),
        held: &Key,
    ) -> Result<(ForeignKey, Key, String), Refusal> {
        let Protection { volume, profile, .. } = protection;
        let size = profile.key_size;
        let hashes = hash.map_or(PassphraseHash::ALL.to_vec(), |hash| vec![hash]);
        let mut candidates: Vec<ForeignKey> =
            hashes.iter().map(|hash| ForeignKey::hashed(secret.clone(), *hash, size)).collect();
        // Also what another host has enrolled with the secret itself.
        if hash.is_none() && held.bits() == size.bits() as usize {
            candidates.push(ForeignKey::itself(secret.clone()));
        }
        for foreign in candidates {
            let key = foreign.key(held)?;
            let record = wanted.clone().with_foreign(foreign.clone()).record(volume, &key);
            let spec = MappingSpec {
                record: &record,
                profile,
                device: identity.number,
                size_bytes: identity.size,
                read_only: true,
            };
            let found = self.map_to_look(&spec, &foreign, held).and_then(|mapping| recognise(&mapping, identity.size));
            // What was only looked through is in nobody's way, whatever was found.
            self.wait_until_unmapped(volume)?;
            if let Some(what) = found? {
                return Ok((foreign, key, what));
            }
        }
        let tried = match hash {
            Some(hash) => hash.to_string(),
            None => "sha256, ripemd160 and the secret itself".to_owned(),
        };
        Err(Refusal::new(
            Reason::ForeignData,
            format!(
                "nothing is recognised on {identity} with secret {secret} and the profile {:?} ({profile}; passphrase hash: \
                 {tried}), so volume {volume} is not adopted, and nothing was written to it: give the right secret, and have \
                 the profile say cipher and key_size of the volume's type in Cinder",
                protection.profile_name
            ),
        ))
    }

    /// A mapping that can only be read, made with `foreign` and not left over from another key.
    fn map_to_look(&self, spec: &MappingSpec<'_>, foreign: &ForeignKey, held: &Key) -> Result<File, Refusal> {
        let is_made = Cell::new(false);
        let key = || {
            is_made.set(true);
            foreign.key(held)
        };
        let opened = self.encryptor.open(spec, OFlags::RDONLY, &key)?;
        match is_made.get() {
            true => Ok(File::from(opened.descriptor)),
            false => Err(still_mapped(&spec.record.id)),
        }
    }

    fn wait_until_unmapped(&self, volume: &VolumeId) -> Result<(), Refusal> {
        let deadline = Instant::now() + GOING_DEADLINE;
        while self.is_mapped(volume)? {
            if Instant::now() > deadline {
                return Err(still_mapped(volume));
            }
            std::thread::sleep(GOING_PAUSE);
        }
        Ok(())
    }

    /// Refuses a blank device. Returns what is recognised on it as it is, if anything is.
    fn check_not_blank(&self, identity: &Identity, volume: &VolumeId) -> Result<Option<String>, Refusal> {
        let device = self.claim(identity, volume)?;
        match examine(&device, identity.size)? {
            Content::Holds(_) => recognise(&device, identity.size),
            Content::Blank => Err(Refusal::new(
                Reason::ForeignData,
                format!(
                    "{identity} is blank, so nothing is encrypted on it and volume {volume} is not adopted: 'volcrypt volume \
                     enrol {identity} --secret UUID' gives a new volume a secret of Cinder's for a key"
                ),
            )),
        }
    }

    /// The secret of Cinder's that is to be the key of `volume`: the one that is `given`, or else the one that the
    /// configuration names, if it names one.
    pub(super) fn secret_of(
        &self,
        vault: &Vault,
        volume: &VolumeId,
        given: Option<&SecretId>,
    ) -> Result<Option<SecretId>, Refusal> {
        let secrets = match (vault.keys.foreign(), given) {
            (Some(secrets), _) => secrets,
            (None, None) => return Ok(None),
            (None, Some(_)) => foreign_secrets(vault)?,
        };
        match (given, secrets.secret_for(volume)?) {
            (Some(given), Some(named)) if *given != named => Err(Refusal::new(
                Reason::Configuration,
                format!(
                    "volume_secrets of [barbican] names secret {named} for volume {volume}, and not {given}: correct that file, or \
                     give the same secret"
                ),
            )),
            (given, named) => Ok(given.cloned().or(named)),
        }
    }

    /// The record of a blank volume that gets the `secret` for a key.
    pub(super) fn with_secret(
        &self,
        vault: &Vault,
        volume: &VolumeId,
        secret: &SecretId,
        wanted: &Description,
    ) -> Result<VolumeRecord, Refusal> {
        vault.store.check_secret(volume, secret)?;
        let secrets = foreign_secrets(vault)?;
        let foreign = ForeignKey::itself(secret.clone());
        let key = foreign.key(&secrets.secret(volume, secret)?)?;
        if key.bits() != wanted.key_size.bits() as usize {
            let sentence = format!(
                "secret {secret} has {0} bits, and volume {volume} is to have a key of {1}: use a profile with key_size = {0}, \
                 or a secret of {1} bits",
                key.bits(),
                wanted.key_size.bits()
            );
            return Err(Refusal::new(Reason::Configuration, sentence));
        }
        Ok(secrets.describe(volume, &foreign, &key, wanted)?.record(volume, &key))
    }
}

/// The secrets of Cinder's, where the key manager in use has any.
pub(super) fn foreign_secrets(vault: &Vault) -> Result<&dyn ForeignSecrets, Refusal> {
    vault.keys.foreign().ok_or_else(|| {
        Refusal::new(
            Reason::Configuration,
            "the key manager in use has no secrets of Cinder's: they are in Barbican, so set type = \"barbican\" in the section \
             [key_manager]",
        )
    })
}

/// Whether a volume that is enrolled has `secret`, with `hash` if one is given, for its key.
pub(super) fn check_same(
    record: &VolumeRecord,
    secret: &SecretId,
    hash: Option<PassphraseHash>,
) -> Result<(), Refusal> {
    let present = ForeignKey::named_by(&record.id, &record.key);
    let is_same = |present: &ForeignKey| present.secret == *secret && (hash.is_none() || present.hash() == hash);
    if present.as_ref().is_some_and(is_same) {
        return Ok(());
    }
    let present = present.map_or("a key that volcrypt has made".to_owned(), |present| present.to_string());
    let asked = hash.map_or(String::new(), |hash| format!(" ({hash})"));
    Err(Refusal::new(
        Reason::WrongKey,
        format!(
            "volume {} is enrolled already, with {present}, so its key does not become secret {secret}{asked}: nothing was \
             changed; 'volcrypt volume show {}' shows how it is encrypted",
            record.id, record.id
        ),
    ))
}

fn still_mapped(volume: &VolumeId) -> Refusal {
    Refusal::new(
        Reason::TimedOut,
        format!(
            "the mapping of volume {volume} that was to be looked through is not removed: 'dmsetup info volcrypt-{volume}' \
             shows who has it open; nothing was written to the volume, try it again"
        ),
    )
}
