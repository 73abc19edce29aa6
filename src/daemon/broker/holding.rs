//! Mappings that a guest's QEMU will open by their name, which have to be made and held open for it before.

use std::cell::OnceCell;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;
use rustix::time::{ClockId, clock_gettime};

use super::{Broker, Ready, Verdict};
use crate::audit::Kind;
use crate::daemon::auditing::with_source;
use crate::daemon::holds::{Holds, Mapped};
use crate::domain::Facts;
use crate::guest::block_device_at;
use crate::policy::{Config, Decision};
use crate::refusal::{Reason, Refusal};
use crate::volume::{DeviceNumber, Identity, VolumeId};

impl Broker {
    /// The mappings that are held for guests which have not opened them yet.
    pub fn holds(&self) -> &std::sync::Arc<Holds> {
        &self.holds
    }

    /// Why guests could open raw devices of protected volumes, if so.
    pub fn guard_fault(&self) -> Option<String> {
        self.devices.guard_fault()
    }

    /// Makes and opens the mapping of the protected volume on `device` for `domain`, which may be to write to it
    /// alone, and waits until it has its name in /dev. `what` is for the audit log, where the use stands before the key
    /// is used.
    ///
    /// # Errors
    /// When `device` is not protected, or an open of it would be refused; [`Reason::TimedOut`] when udev does not
    /// name the mapping.
    pub fn map(
        &self,
        device: &Identity,
        domain: &Facts,
        is_written_alone: bool,
        what: &str,
    ) -> Result<Mapped, Refusal> {
        let unprotected = || Refusal::new(Reason::Configuration, format!("no rule protects {device} any more"));
        let Ready { volume, cached_since, .. } = self.make_ready(device, domain)?;
        let volume = volume.ok_or_else(unprotected)?;
        let made = || {
            self.record_use(Kind::KeyUsed, &volume, &with_source(what, cached_since))?;
            self.merge_audit_soon();
            // If it is not there yet, whoever makes it does so from now on.
            let before = clock_gettime(ClockId::Monotonic);
            let is_mapped = self.backing_of(&volume)?.is_some();
            if !is_mapped && let Some(user) = self.devices.user(device.number, true) {
                let sentence = format!(
                    "{user} has {device} itself open for writing, and what it writes there would destroy volume {volume}: \
                     detach it from that first"
                );
                return Err(Refusal::new(Reason::NotAllowed, sentence));
            }
            let opened = match self.open(device.number, true, OFlags::RDONLY, domain)? {
                Verdict::Mapping(opened_volume, opened, _) if opened_volume == volume => opened,
                _ => return Err(unprotected()),
            };
            self.await_name(&volume, opened.as_fd(), (!is_mapped).then_some(before))?;
            Ok(opened)
        };
        let opened = made().map_err(|refusal| refusal.of(&volume))?;
        Ok(Mapped { volume, is_written_alone, opened })
    }

    /// Waits for the link that udev makes. A mapping that was not there before is new to udev since then.
    fn await_name(
        &self,
        volume: &VolumeId,
        mapping: std::os::fd::BorrowedFd<'_>,
        since: Option<rustix::time::Timespec>,
    ) -> Result<(), Refusal> {
        let path = volume.mapping_path();
        let named = rustix::fs::fstat(mapping).map_err(std::io::Error::from).and_then(|status| {
            let since = since.map(|since| since.tv_sec as u64 * 1_000_000 + since.tv_nsec as u64 / 1000);
            self.devices.await_name(Path::new(&path), DeviceNumber::from_raw(status.st_rdev), since)
        });
        named.map_err(|error| {
            Refusal::new(
                Reason::TimedOut,
                format!(
                    "the mapping of volume {volume} was made, but udev does not show it as {path} ({error}): 'systemctl \
                     status systemd-udevd' says whether udev runs"
                ),
            )
        })
    }

    /// The device beneath the mapping of a volume, if it is mapped.
    fn backing_of(&self, volume: &VolumeId) -> Result<Option<DeviceNumber>, Refusal> {
        let mappings = self.encryptor.mappings()?;
        Ok(mappings.into_iter().find(|mapping| mapping.volume == *volume).and_then(|mapping| mapping.backing))
    }
}

/// Finds the devices of volumes on this host, as the rules call them for one domain.
pub struct Finder<'a> {
    broker: &'a Broker,
    config: &'a Config,
    domain: &'a Facts,
    /// Every device that is protected, with its volume; looked at when first needed.
    protected: OnceCell<Vec<(VolumeId, Identity)>>,
}

impl<'a> Finder<'a> {
    /// Finds devices for `domain` by the rules of `config`.
    pub fn new(broker: &'a Broker, config: &'a Config, domain: &'a Facts) -> Self {
        Finder { broker, config, domain, protected: OnceCell::new() }
    }

    /// The device of `volume`: what its mapping stands on if there is one, or else what is at the path that it
    /// once had if that is this volume still, or else whichever device the rules call so. A path of a multipath
    /// map is none, the map is.
    ///
    /// # Errors
    /// [`Reason::DeviceGone`] when there is none; [`Reason::NotAllowed`] when there are several.
    pub fn find(&self, volume: &VolumeId, once_at: Option<&PathBuf>) -> Result<Identity, Refusal> {
        let mapped_on = self.broker.backing_of(volume)?;
        let once_at = || once_at.and_then(|path| block_device_at(path).ok());
        for number in mapped_on.into_iter().chain(once_at()) {
            if let Ok(device) = self.broker.identify(number)
                && self.is(&device).as_ref() == Some(volume)
            {
                return Ok(device);
            }
        }
        let found: Vec<_> = self.protected()?.iter().filter(|(of, _)| of == volume).map(|(_, device)| device).collect();
        match found.as_slice() {
            [device] => Ok((*device).clone()),
            [] => Err(Refusal::new(Reason::DeviceGone, self.none(volume)).of(volume)),
            [first, second, ..] => {
                let sentence = format!(
                    "both {first} and {second} lead to volume {volume}: log out of one of the two portals, or have multipath \
                     join them"
                );
                Err(Refusal::new(Reason::NotAllowed, sentence).of(volume))
            }
        }
    }

    fn none(&self, volume: &VolumeId) -> String {
        let enrolled = self.broker.volume(volume).ok().and_then(|record| record.device.iscsi_target);
        let target = enrolled.map_or("its target".to_owned(), |target| format!("its target {target}"));
        format!(
            "no block device of this host is protected as volume {volume} for domain {}: log in to {target}, or see with \
             'volcrypt volume identify DEVICE' what the rules make of its device",
            self.domain.name
        )
    }

    fn protected(&self) -> Result<&Vec<(VolumeId, Identity)>, Refusal> {
        if let Some(protected) = self.protected.get() {
            return Ok(protected);
        }
        let numbers = self.broker.devices.all().map_err(|error| {
            Refusal::new(Reason::Kernel, format!("this host's block devices cannot be listed: {error}"))
        })?;
        // What went away meanwhile, or is a broken map, is no volume's device.
        let devices = numbers.into_iter().filter_map(|number| self.broker.identify(number).ok());
        let protected = devices.filter_map(|device| Some((self.is(&device)?, device))).collect();
        Ok(self.protected.get_or_init(|| protected))
    }

    /// The volume that the rules say `device` is.
    fn is(&self, device: &Identity) -> Option<VolumeId> {
        match self.config.decide(device, self.domain) {
            Decision::Protect(protection) => Some(protection.volume),
            Decision::Pass | Decision::Refuse(_) => None,
        }
    }
}
