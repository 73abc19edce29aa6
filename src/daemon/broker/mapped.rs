//! Volumes that a domain names by their mapping, `/dev/mapper/volcrypt-<volume id>`, or by what stands on it.

use rustix::fs::OFlags;

use super::authorisation::known;
use super::{Broker, Verdict, writes};
use crate::audit::{Asker, Kind};
use crate::daemon::pool::while_waiting;
use crate::domain::Requester;
use crate::refusal::{Reason, Refusal};
use crate::volume::{Identity, VolumeId};

impl Broker {
    /// The volumes whose mappings `device` is or stands on, if `requester` may have each of them. A mapping
    /// holds its volume in clear, so all that holds for the volume holds for it: it is enrolled, on the device
    /// beneath, and for this domain.
    pub(super) fn check_mappings(
        &self,
        device: &Identity,
        requester: &dyn Requester,
    ) -> Result<Vec<VolumeId>, Refusal> {
        let mappings = device.own_mappings().into_iter();
        mappings.map(|(volume, mapping)| self.check_mapping(volume, mapping, requester)).collect()
    }

    /// As [`Broker::check_mappings`] for a guest that opens `device`, and records each use. `permitted` says
    /// whether the guest may open the device's node at all. Tells whether there are any mappings.
    pub(super) fn use_mappings(
        &self,
        device: &Identity,
        permitted: bool,
        guest: &dyn Requester,
    ) -> Result<bool, Refusal> {
        let Some((volume, _)) = device.own_mappings().into_iter().next() else { return Ok(false) };
        if !permitted {
            let sentence =
                format!("{device} gives access to volume {volume}, and libvirt has not given it to this QEMU");
            return Err(Refusal::new(Reason::NotAllowed, sentence).of(&volume));
        }
        let volumes = self.check_mappings(device, guest)?;
        Asker::current().known_as(guest.facts()).ask(|| {
            volumes.iter().try_for_each(|volume| self.record_use(Kind::KeyUsed, volume, &format!("opened as {device}")))
        })?;
        self.merge_audit_soon();
        Ok(true)
    }

    /// Opens a device that is a mapping, or stands on one, which its guest may have.
    pub(super) fn open_named(
        &self,
        device: &Identity,
        flags: OFlags,
        guest: &dyn Requester,
    ) -> Result<Verdict, Refusal> {
        let Some(volume) = device.own_volume() else { return Ok(Verdict::OnMapping) };
        if device.read_only && writes(flags) {
            let sentence = format!("{device} can only be read: mark the disk <readonly/>");
            return Err(Refusal::new(Reason::NotAllowed, sentence).of(&volume));
        }
        let opened = while_waiting(|| self.encryptor.open_present(&volume, device.number, flags));
        let below = device.underlying.first().map(|below| below.number);
        let opened = opened
            .and_then(|opened| self.check_locks_meet(&volume, below, &opened, flags, guest).map(|()| opened))
            .map_err(|refusal| refusal.of(&volume))?;
        Ok(Verdict::Named(volume, opened.descriptor))
    }

    fn check_mapping(
        &self,
        volume: VolumeId,
        mapping: &Identity,
        requester: &dyn Requester,
    ) -> Result<VolumeId, Refusal> {
        let check = || {
            let domain = known(requester, &volume)?;
            let record = self.volume(&volume)?;
            for below in &mapping.underlying {
                self.check_state(below, &record)?;
                self.check_device(below, &record)?;
            }
            self.authorise(&record, domain)
        };
        match check() {
            Ok(()) => Ok(volume),
            Err(refusal) => Err(refusal.of(&volume)),
        }
    }
}
