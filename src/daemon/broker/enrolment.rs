//! How a volume gets its key and its record.

use std::fs::File;

use super::super::pool::while_waiting;
use super::foreign::{check_same, foreign_secrets};
use super::{Broker, enrolled_device};
use crate::domain::Nobody;
use crate::keys::{Description, SecretId};
use crate::policy::{Config, Decision, Profile, Protection};
use crate::refusal::{Reason, Refusal};
use crate::store::{VolumeRecord, seconds_now};
use crate::volume::{Content, DeviceNumber, Identity, VolumeId, examine};

impl Broker {
    /// Enrols the volume on `device` for `owner`, or for everybody. A rule must protect the device, and it
    /// must be blank. A volume that is enrolled already stays as it is, and one that was retired can be
    /// used again. Its key is `secret`, which Cinder has made, if one is given or the configuration names one.
    ///
    /// # Errors
    /// When no rule protects the device, when it holds anything, when the volume belongs to another
    /// owner or was destroyed, when its key cannot be kept, and when the volume or the secret is in use in another way.
    pub fn enrol_with(
        &self,
        device: DeviceNumber,
        secret: Option<&SecretId>,
        owner: Option<&str>,
    ) -> Result<VolumeRecord, Refusal> {
        let (config, identity) = (self.config()?, self.devices.identify(device)?);
        let protection = self.protected(&config, &identity)?;
        let enrolled = self.enrol_as(&identity, &protection, secret, owner);
        enrolled.map_err(|refusal| refusal.of(&protection.volume))
    }

    /// The same, with a key that volcrypt makes.
    #[cfg(test)]
    pub fn enrol(&self, device: DeviceNumber, owner: Option<&str>) -> Result<VolumeRecord, Refusal> {
        self.enrol_with(device, None, owner)
    }

    /// How `identity` is protected from everybody.
    pub(super) fn protected<'a>(&self, config: &'a Config, identity: &Identity) -> Result<Protection<'a>, Refusal> {
        match config.decide(identity, &Nobody) {
            Decision::Protect(protection) => Ok(protection),
            Decision::Refuse(refusal) => Err(refusal),
            Decision::Pass => Err(Refusal::new(
                Reason::Configuration,
                format!(
                    "no rule protects {identity}: add one to /etc/volcrypt/volcrypt.toml; 'volcrypt config check' explains the present ones"
                ),
            )),
        }
    }

    pub(super) fn enrol_as(
        &self,
        identity: &Identity,
        protection: &Protection<'_>,
        secret: Option<&SecretId>,
        owner: Option<&str>,
    ) -> Result<VolumeRecord, Refusal> {
        let Protection { volume, profile, .. } = protection;
        self.one_at_a_time(volume, || {
            let vault = self.vault()?;
            if let Some(record) = vault.store.volume(volume)? {
                secret.map_or(Ok(()), |secret| check_same(&record, secret, None))?;
                return self.enrol_again(identity, record, owner);
            }
            let secret = self.secret_of(&vault, volume, secret)?;
            self.check_size(identity, profile)?;
            check_tells_wwid(identity)?;
            if let Some(record) = self.take_over(identity, volume, secret.as_ref())? {
                return self.enrol_again(identity, record, owner);
            }
            self.check_blank(identity, volume).map_err(|refusal| match secret {
                None => refusal,
                Some(_) => refusal.and(&format!(
                    "if os-brick has encrypted it with that secret, 'volcrypt volume adopt {identity}' takes it as it is"
                )),
            })?;
            let wanted = Description::new(
                enrolled_device(identity),
                identity.size,
                (protection.profile_name, profile),
                owner,
                seconds_now(),
            );
            let record = match &secret {
                Some(secret) => self.with_secret(&vault, volume, secret, &wanted)?,
                None => {
                    let (key, description) = vault.keys.create(volume, &wanted)?;
                    description.record(volume, &key)
                }
            };
            self.check_device(identity, &record)?;
            vault.store.enrol(&record)?;
            tracing::info!(volume = %volume, device = %identity, rule = protection.rule.name(), "enrolled volume {volume} on {identity}");
            Ok(record)
        })
    }

    /// The record of a volume that another host has enrolled, as it is kept beside the key; this host keeps it from now
    /// on.
    pub(super) fn adopt(&self, identity: &Identity, volume: &VolumeId) -> Result<Option<VolumeRecord>, Refusal> {
        self.one_at_a_time(volume, || match self.vault()?.store.volume(volume)? {
            // Another thread was quicker.
            Some(record) => {
                self.check_state(identity, &record)?;
                self.check_device(identity, &record)?;
                Ok(Some(record))
            }
            None => self.take_over(identity, volume, None),
        })
    }

    /// Runs `work`, which may wait for a key server, while nobody else enrols `volume` or takes it out of use.
    pub(super) fn one_at_a_time<R>(&self, volume: &VolumeId, work: impl FnOnce() -> R) -> R {
        while_waiting(|| self.enrolling.with(volume, work))
    }

    /// The same, of a volume whose key is `secret`, if it is one of Cinder's that an operator has named.
    pub(super) fn take_over(
        &self,
        identity: &Identity,
        volume: &VolumeId,
        secret: Option<&SecretId>,
    ) -> Result<Option<VolumeRecord>, Refusal> {
        let vault = self.vault()?;
        let described = match secret {
            Some(secret) => foreign_secrets(&vault)?.described_by(volume, secret)?,
            None => vault.keys.described(volume)?,
        };
        let Some((key, description)) = described else { return Ok(None) };
        let record = description.record(volume, &key);
        self.check_device(identity, &record)?;
        vault.store.enrol(&record)?;
        tracing::info!(volume = %volume, device = %identity, "took over volume {volume} on {identity}, which another host has enrolled");
        Ok(Some(record))
    }

    pub(super) fn check_size(&self, identity: &Identity, profile: &Profile) -> Result<(), Refusal> {
        match identity.size.is_multiple_of(profile.sector_size.into()) && identity.size > 0 {
            true => Ok(()),
            false => Err(Refusal::new(
                Reason::Configuration,
                format!(
                    "the size of {identity}, {} bytes, is no multiple of sector_size = {}: use a profile with a smaller one",
                    identity.size, profile.sector_size
                ),
            )),
        }
    }

    /// The device, which nobody else uses.
    pub(super) fn claim(&self, identity: &Identity, volume: &VolumeId) -> Result<File, Refusal> {
        if let Some(user) = self.devices.user(identity.number, false) {
            let sentence = format!(
                "{user} has {identity} open, so volume {volume} is not enrolled: what it writes there would be lost; \
                 detach the volume first"
            );
            return Err(Refusal::new(Reason::ForeignData, sentence));
        }
        self.devices.open_exclusively(identity).map_err(|error| match error.raw_os_error() {
            Some(libc::EBUSY) => Refusal::new(
                Reason::ForeignData,
                format!(
                    "{identity} is in use by the host itself, so volume {volume} is not enrolled: 'lsblk' shows by what"
                ),
            ),
            _ => Refusal::new(
                Reason::DeviceGone,
                format!("{identity} cannot be read ({error}): is its storage server up?"),
            ),
        })
    }

    fn check_blank(&self, identity: &Identity, volume: &VolumeId) -> Result<(), Refusal> {
        match examine(&self.claim(identity, volume)?, identity.size)? {
            Content::Blank => Ok(()),
            Content::Holds(what) => Err(Refusal::new(
                Reason::ForeignData,
                format!(
                    "{identity} holds {what}, so volume {volume} is not enrolled: encrypting it would destroy that; wipe it \
                     first if nobody needs it"
                ),
            )),
        }
    }
}

/// Refuses a device of which it could not be told later whether its target has given its number to another volume.
pub(super) fn check_tells_wwid(identity: &Identity) -> Result<(), Refusal> {
    match identity.hides_wwid() {
        false => Ok(()),
        true => Err(Refusal::new(
            Reason::ForeignData,
            format!(
                "{identity} reports no WWID, and without it the volume cannot be told from another one that gets its number \
                 later: {}, and repeat",
                identity.remedy_for_no_wwid()
            ),
        )),
    }
}
