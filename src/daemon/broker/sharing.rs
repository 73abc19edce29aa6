//! Who else uses a volume, and whether two may.

use std::os::fd::AsFd;

use rustix::fs::OFlags;

use super::{Broker, writes};
use crate::domain::{Disk, Requester, Source};
use crate::encryptor::Opened;
use crate::guest::{block_device_at, is_local};
use crate::refusal::{Reason, Refusal};
use crate::volume::{DeviceNumber, VolumeId};

impl Broker {
    /// Another domain than `domain` that has `volume` or is about to, if the two may not have it together: one of them is
    /// to write to it alone, and with `is_written_alone` that is `domain`.
    ///
    /// # Errors
    /// When device-mapper does not answer.
    pub fn rival(&self, volume: &VolumeId, domain: &str, is_written_alone: bool) -> Result<Option<String>, Refusal> {
        let held_for = self.holds.find(volume, |other, alone| other != domain && (is_written_alone || alone));
        if held_for.is_some() {
            return Ok(held_for);
        }
        let mappings = self.encryptor.mappings()?;
        let Some(mapping) = mappings.into_iter().find(|mapping| mapping.volume == *volume) else { return Ok(None) };
        let place = Place { volume, device: Some(mapping.device), backing: mapping.backing };
        let others = self.devices.domains_with_open(mapping.device).into_iter().filter(|(_, other)| other != domain);
        let mut rivals = others.filter(|(pid, _)| is_written_alone || self.writes_alone(*pid, &place));
        Ok(rivals.next().map(|(_, other)| other))
    }

    /// Whether QEMU's image locks on `opened`, the mapping of `volume` on `backing`, meet those of every other domain that
    /// has it: all but those that got to it by the domain's XML have this node of it open. Who shares it needs no locks.
    /// Nothing is looked up unless somebody has it open and `guest` is to write to it.
    ///
    /// # Errors
    /// [`Reason::InUse`] when they do not meet.
    pub(super) fn check_locks_meet(
        &self,
        volume: &VolumeId,
        backing: Option<DeviceNumber>,
        opened: &Opened,
        flags: OFlags,
        guest: &dyn Requester,
    ) -> Result<(), Refusal> {
        if !opened.was_open || !writes(flags) {
            return Ok(());
        }
        let domain = guest.facts().map_or("", |domain| domain.name.as_str());
        let device = rustix::fs::fstat(&opened.descriptor).ok().map(|status| DeviceNumber::from_raw(status.st_rdev));
        let place = Place { volume, device, backing };
        let shares = || {
            let is_held_to_share = self.holds.find(volume, |holder, alone| holder == domain && !alone).is_some();
            is_held_to_share || !place.is_written_alone(&guest.disks())
        };
        let past = |device| self.devices.domains_past(device, opened.descriptor.as_fd());
        let mut others = device.map(past).unwrap_or_default().into_iter().filter(|(_, other)| other != domain);
        let rival = others.find(|(pid, _)| self.writes_alone(*pid, &place) || !shares());
        let held_for = || self.holds.find(volume, |other, alone| other != domain && alone);
        match rival.map(|(_, other)| other).or_else(held_for) {
            None => Ok(()),
            Some(other) => {
                let sentence = format!(
                    "domain {other} has volume {volume} by its XML, where QEMU's locks do not keep two domains from \
                     overwriting each other's data: shut that one down or detach the volume from it first"
                );
                Err(Refusal::new(Reason::InUse, sentence))
            }
        }
    }

    /// Whether the domain that process `pid` runs is to write to what is at `place` alone.
    fn writes_alone(&self, pid: u32, place: &Place<'_>) -> bool {
        let disks = self.domains.disks(pid).unwrap_or_else(|error| {
            tracing::warn!(pid, "it cannot be told which disks the domain of process {pid} shares: {error}");
            Vec::new()
        });
        place.is_written_alone(&disks)
    }
}

/// The mapping of a volume and what it stands on.
struct Place<'a> {
    volume: &'a VolumeId,
    device: Option<DeviceNumber>,
    backing: Option<DeviceNumber>,
}

impl Place<'_> {
    /// Whether who has `disks` is to write here alone. He does as long as they do not say otherwise.
    fn is_written_alone(&self, disks: &[Disk]) -> bool {
        let mut is_known = false;
        for disk in disks {
            if self.is_at(&disk.source) {
                is_known = true;
                if disk.is_written_alone {
                    return true;
                }
            }
            // What others stand on is only read.
            is_known |= disk.beneath.iter().any(|layer| self.is_at(&layer.source));
        }
        !is_known
    }

    /// Whether `source` is the mapping, or its volume by the volume's own device.
    fn is_at(&self, source: &Source) -> bool {
        let Source::Path(path) = source else { return false };
        if source.mapped_volume().as_ref() == Some(self.volume) {
            return true;
        }
        // No file server that may be dead is asked.
        let number = is_local(path).then(|| block_device_at(path).ok()).flatten();
        number.is_some() && [self.device, self.backing].contains(&number)
    }
}
