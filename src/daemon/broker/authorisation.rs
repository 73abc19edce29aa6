//! Which domain may have which volume.

use std::cell::OnceCell;
use std::io;
use std::path::Path;
use std::sync::Arc;

use super::{Broker, Vault, enrolled_device};
use crate::daemon::pool::while_waiting;
use crate::domain::{Disk, Facts, Given, Requester, quoted};
use crate::guest::{Domains, block_device_seen_by, process_of};
use crate::policy::{Config, Decision};
use crate::refusal::{Reason, Refusal};
use crate::store::{Store, VolumeRecord, seconds_now};
use crate::volume::{DeviceNumber, Identity, VolumeId, looks_encrypted};

/// The domain that a thread which waits for an open runs. It is looked up when it matters, which it does
/// for few opens, and anew for each of them: libvirt may have given the domain to another owner.
///
/// Not the process that registered counts: its listener may outlive it in a process that it has
/// started, and its number be another domain's by then.
pub struct Guest<'a> {
    domains: &'a dyn Domains,
    tid: u32,
    facts: OnceCell<Option<Facts>>,
}

impl Guest<'_> {
    /// The process that the thread belongs to.
    ///
    /// # Errors
    /// When the thread is gone.
    pub fn process(&self) -> io::Result<u32> {
        process_of(self.tid)
    }

    /// The block device that the thread finds at `path`.
    ///
    /// # Errors
    /// Those of [`block_device_seen_by`].
    pub(super) fn sees(&self, path: &Path) -> io::Result<DeviceNumber> {
        block_device_seen_by(self.tid, path)
    }

    /// What libvirt has given to the domain; nothing if there is none.
    pub(super) fn given(&self) -> Vec<Given> {
        self.process().and_then(|pid| self.domains.given(pid)).unwrap_or_else(|error| {
            tracing::error!(tid = self.tid, "it cannot be told what libvirt has given to thread {}: {error}", self.tid);
            Vec::new()
        })
    }
}

impl Requester for Guest<'_> {
    fn facts(&self) -> Option<&Facts> {
        let look_up = || {
            self.process().and_then(|pid| self.domains.of(pid)).unwrap_or_else(|error| {
                tracing::error!(tid = self.tid, "it cannot be told which domain thread {} runs: {error}", self.tid);
                None
            })
        };
        self.facts.get_or_init(look_up).as_ref()
    }

    fn disks(&self) -> Vec<Disk> {
        self.process().and_then(|pid| self.domains.disks(pid)).unwrap_or_else(|error| {
            tracing::error!(tid = self.tid, "it cannot be told which disks thread {} has: {error}", self.tid);
            Vec::new()
        })
    }
}

/// The domain of `guest`.
///
/// # Errors
/// [`Reason::NotAllowed`] when it is none that libvirt knows of.
pub(super) fn known<'a>(guest: &'a dyn Requester, volume: &VolumeId) -> Result<&'a Facts, Refusal> {
    guest.facts().ok_or_else(|| {
        Refusal::new(
            Reason::NotAllowed,
            format!(
                "volume {volume} is for domains of libvirt, and the process that asks for it is none: libvirt's own files \
                 in /run/libvirt/qemu and the process's control group have to say so"
            ),
        )
    })
}

/// Whether `device` passes, in whole or in part, only because no rule is about it, and one could be. A rule that lets a disk
/// pass is about its partitions too; a logical volume, or a partition that kpartx has made, is one that rules name by itself,
/// unless it stands on a mapping.
fn passes_unsaid(config: &Config, device: &Identity, requester: &dyn Requester) -> bool {
    if device.own_volume().is_some() || !matches!(config.decide(device, requester), Decision::Pass) {
        return false;
    }
    let is_named_by_itself = || {
        let named = enrolled_device(device);
        match device.underlying.is_empty() {
            // No host has a rule for what has none of these.
            true => named.iscsi_target.is_some() || named.wwid.is_some() || named.dm_uuid.is_some(),
            false => named.dm_uuid.is_some() && device.own_mappings().is_empty(),
        }
    };
    !config.lets_pass(device, requester)
        && (is_named_by_itself() || device.underlying.iter().any(|below| passes_unsaid(config, below, requester)))
}

impl Broker {
    /// Whoever waits in thread `tid`.
    pub fn guest(&self, tid: u32) -> Guest<'_> {
        Guest { domains: self.domains.as_ref(), tid, facts: OnceCell::new() }
    }

    /// Whether a device that no rule protects from `requester` holds an enrolled volume all the same: a rule
    /// that was lost, or that is about other domains, must not give a guest the ciphertext to format. A rule
    /// that lets it pass in so many words may.
    pub(super) fn check_not_enrolled(
        &self,
        config: &Config,
        device: &Identity,
        requester: &dyn Requester,
    ) -> Result<(), Refusal> {
        if device.own_volume().is_some() || config.lets_pass(device, requester) {
            return Ok(());
        }
        let Some(vault) = self.present_vault(config)? else { return Ok(()) };
        if let Some(volume) = vault.store.held_by(&enrolled_device(device))? {
            let sentence = format!(
                "{device} holds the volume {volume}, and no rule protects it for this domain: a guest would find \
                 ciphertext; correct the rules ('volcrypt policy test --device {device}' tries them), or have one with \
                 action = \"pass\" let it through"
            );
            return Err(Refusal::new(Reason::NotAllowed, sentence).of(&volume));
        }
        device.underlying.iter().try_for_each(|below| self.check_not_enrolled(config, below, requester))
    }

    /// Refuses a device of which no rule says anything and that holds what looks like ciphertext, to a domain that comes
    /// from another host: that host's rules may protect it. What a disk of this host holds is in some format mostly.
    pub fn check_no_ciphertext(&self, device: &Identity, requester: &dyn Requester) -> Result<(), Refusal> {
        let config = self.config()?;
        if !passes_unsaid(&config, device, requester) {
            return Ok(());
        }
        // What is enrolled here has a sentence of its own.
        self.check_not_enrolled(&config, device, requester)?;
        // Its storage may never answer. Who has claimed it keeps no QEMU from opening it.
        let looked = while_waiting(|| match self.devices.open_for_reading(device) {
            Ok(file) if device.size > 0 => looks_encrypted(&file, device.size),
            Ok(_) => Ok(false),
            Err(error) if error.raw_os_error() == Some(libc::ENOMEDIUM) => Ok(false),
            Err(error) => Err(Refusal::new(Reason::DeviceGone, format!("it cannot be opened: {error}"))),
        });
        match looked {
            Ok(true) => Err(Refusal::new(
                Reason::NotAllowed,
                format!(
                    "{device} holds what looks like ciphertext, and no rule here says whether it is protected, as it may be \
                     on the host that the domain comes from: have the same rules here ('volcrypt policy test --device \
                     {device}' tries them), or one with action = \"pass\" for this device alone, if the guest itself \
                     encrypts what it writes there; if these are remains of an earlier volume that nobody needs, this guest \
                     included, zero all of the device"
                ),
            )),
            Ok(false) => Ok(()),
            // What cannot be read now may be written later.
            Err(why) => Err(Refusal::new(
                why.reason(),
                format!(
                    "{device} is one that no rule here is about, and whether it holds ciphertext of the host that the domain \
                     comes from cannot be seen: {why}; mend that, or have a rule with action = \"pass\" for this device \
                     alone, or for what it stands on"
                ),
            )),
        }
    }

    /// Whether `device` itself holds an enrolled volume; nothing if that cannot be told.
    pub fn is_enrolled(&self, device: &Identity) -> Option<bool> {
        match self.present_vault(&*self.config().ok()?).ok()? {
            Some(vault) => vault.store.held_by(&enrolled_device(device)).ok().map(|held| held.is_some()),
            None => Some(false),
        }
    }

    /// The database and the key manager, if any volume was ever enrolled with them.
    fn present_vault(&self, config: &Config) -> Result<Option<Arc<Vault>>, Refusal> {
        match config.key_manager.directory() {
            directory if Store::is_in(directory) => self.vault().map(Some),
            _ => Ok(None),
        }
    }

    /// Whether `domain` may have the volume: it has the same owner, or was granted it, or the volume
    /// is everybody's.
    pub(super) fn authorise(&self, record: &VolumeRecord, domain: &Facts) -> Result<(), Refusal> {
        let Some(owner) = &record.owner else { return Ok(()) };
        if domain.owner.as_ref() == Some(owner) || self.vault()?.store.is_granted(&record.id, domain, seconds_now())? {
            return Ok(());
        }
        let (volume, name, argument) = (&record.id, &domain.name, quoted(&domain.name));
        let other = domain.owner.as_ref().map_or("to nobody".to_owned(), |other| format!("to {other:?}"));
        Err(Refusal::new(
            Reason::NotAllowed,
            format!(
                "volume {volume} belongs to {owner:?} and domain {name} {other}: if it may have the volume, run 'volcrypt \
                 grant add {volume} {argument} --for 1h'"
            ),
        ))
    }
}
