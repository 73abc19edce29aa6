//! How a volume gets its key and its record.

use super::super::pool::while_waiting;
use super::{Broker, enrolled_device};
use crate::domain::Nobody;
use crate::keys::Description;
use crate::policy::{Decision, Protection};
use crate::refusal::{Reason, Refusal};
use crate::store::{VolumeRecord, seconds_now};
use crate::volume::{Content, DeviceNumber, Identity, VolumeId, examine};

impl Broker {
    /// Enrols the volume on `device` for `owner`, or for everybody. A rule must protect the device, and it
    /// must be blank. A volume that is enrolled already stays as it is, and one that was retired can be
    /// used again.
    ///
    /// # Errors
    /// When no rule protects the device, when it holds anything, when the volume belongs to another
    /// owner or was destroyed, and when its key cannot be kept.
    pub fn enrol(&self, device: DeviceNumber, owner: Option<&str>) -> Result<VolumeRecord, Refusal> {
        let identity = self.devices.identify(device)?;
        match self.config()?.decide(&identity, &Nobody) {
            Decision::Protect(protection) => {
                self.enrol_as(&identity, &protection, owner).map_err(|refusal| refusal.of(&protection.volume))
            }
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
        owner: Option<&str>,
    ) -> Result<VolumeRecord, Refusal> {
        let Protection { volume, profile, .. } = protection;
        self.one_at_a_time(volume, || {
            let vault = self.vault()?;
            if let Some(record) = vault.store.volume(volume)? {
                return self.enrol_again(identity, record, owner);
            }
            if !identity.size.is_multiple_of(profile.sector_size.into()) || identity.size == 0 {
                let sentence = format!(
                    "the size of {identity}, {} bytes, is no multiple of sector_size = {}: use a profile with a smaller one",
                    identity.size, profile.sector_size
                );
                return Err(Refusal::new(Reason::Configuration, sentence));
            }
            if let Some(record) = self.take_over(identity, volume)? {
                return self.enrol_again(identity, record, owner);
            }
            self.check_blank(identity, volume)?;
            let wanted = Description::new(
                enrolled_device(identity),
                identity.size,
                (protection.profile_name, profile),
                owner,
                seconds_now(),
            );
            let (key, description) = vault.keys.create(volume, &wanted)?;
            let record = description.record(volume, &key);
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
            None => self.take_over(identity, volume),
        })
    }

    /// Runs `work`, which may wait for a key server, while nobody else enrols `volume` or takes it out of use.
    pub(super) fn one_at_a_time<R>(&self, volume: &VolumeId, work: impl FnOnce() -> R) -> R {
        while_waiting(|| self.enrolling.with(volume, work))
    }

    fn take_over(&self, identity: &Identity, volume: &VolumeId) -> Result<Option<VolumeRecord>, Refusal> {
        let vault = self.vault()?;
        let Some((key, description)) = vault.keys.described(volume)? else { return Ok(None) };
        let record = description.record(volume, &key);
        self.check_device(identity, &record)?;
        vault.store.enrol(&record)?;
        tracing::info!(volume = %volume, device = %identity, "took over volume {volume} on {identity}, which another host has enrolled");
        Ok(Some(record))
    }

    fn check_blank(&self, identity: &Identity, volume: &VolumeId) -> Result<(), Refusal> {
        if let Some(user) = self.devices.user(identity.number, false) {
            let sentence = format!(
                "{user} has {identity} open, so volume {volume} is not enrolled: what it writes there would be lost; \
                 detach the volume first"
            );
            return Err(Refusal::new(Reason::ForeignData, sentence));
        }
        let device = self.devices.open_exclusively(identity).map_err(|error| match error.raw_os_error() {
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
        })?;
        match examine(&device, identity.size)? {
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
