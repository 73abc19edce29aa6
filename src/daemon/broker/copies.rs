//! What a guest with a protected volume may write to: a copy of the volume that nothing encrypts could come to
//! stand there.

use std::path::Path;

use super::Broker;
use super::authorisation::Guest;
use crate::domain::{Given, Requester};
use crate::guest::{Written, block_device_at};
use crate::policy::Config;
use crate::refusal::{Reason, Refusal};
use crate::volume::{Identity, VolumeId};

impl Broker {
    /// Decides on something that nothing encrypts and that `guest` opens for writing.
    ///
    /// What libvirt gave to the domain is its own: that stands in the XML that libvirt keeps of it, from before QEMU starts.
    /// What QEMU is to copy a disk to does not stand there when QEMU opens it, and neither does a disk that is attached:
    /// the configuration has to allow them. This is no wall against a QEMU that was taken over by its guest, which has the
    /// data and other ways to bring it out, but against mistakes.
    ///
    /// # Errors
    /// When the guest uses a protected volume, and neither libvirt nor the configuration allows the place.
    pub fn check_written(&self, written: Written<'_>, guest: &Guest<'_>) -> Result<(), Refusal> {
        let volumes = self.volumes_of(guest)?;
        let Some(volume) = volumes.first() else { return Ok(()) };
        let config = self.config()?;
        let place = match written {
            Written::File(file) => Place::File(&file.path),
            Written::Device(device) => Place::Device(Box::new(self.devices.identify(device)?)),
        };
        if place.is_allowed(&config, guest) || self.is_given(&config, written, guest) {
            return Ok(());
        }
        Err(place.refusal(guest, &volumes).of(volume))
    }

    /// The protected volumes that the process of `guest` has open, each once.
    fn volumes_of(&self, guest: &Guest<'_>) -> Result<Vec<VolumeId>, Refusal> {
        let pid = guest.process().map_err(|error| {
            Refusal::new(Reason::NotAllowed, format!("it cannot be told who wants to write: {error}; try again"))
        })?;
        // What is closed meanwhile is none of them.
        let devices = self.devices.open_by(pid).into_iter().filter_map(|device| self.devices.identify(device).ok());
        let mut volumes: Vec<_> = devices
            .flat_map(|device| device.own_mappings().into_iter().map(|(volume, _)| volume).collect::<Vec<_>>())
            .collect();
        volumes.sort();
        volumes.dedup();
        Ok(volumes)
    }

    /// Whether libvirt's own XML of the domain names the place, and not as the overlay of a protected volume: what
    /// is written there is that volume's.
    fn is_given(&self, config: &Config, written: Written<'_>, guest: &Guest<'_>) -> bool {
        guest
            .given()
            .iter()
            .any(|given| written.named_by(given).is_some_and(|path| !self.holds_a_volume(config, given, path, guest)))
    }

    fn holds_a_volume(&self, config: &Config, given: &Given, besides: &Path, guest: &Guest<'_>) -> bool {
        let devices = given.besides(besides).filter_map(|path| block_device_at(path).ok());
        let mut identities = devices.filter_map(|device| self.devices.identify(device).ok());
        identities.any(|device| {
            !device.own_mappings().is_empty() || !matches!(self.protection(config, &device, guest), Ok(None))
        })
    }
}

enum Place<'a> {
    File(&'a Path),
    Device(Box<Identity>),
}

impl Place<'_> {
    fn is_allowed(&self, config: &Config, guest: &Guest<'_>) -> bool {
        let targets = &config.policy.plaintext_targets;
        match self {
            Place::File(path) => targets.allow(&path.to_string_lossy()),
            Place::Device(device) => targets.allow(&device.to_string()) || config.lets_pass(device, guest),
        }
    }

    fn refusal(&self, guest: &Guest<'_>, volumes: &[VolumeId]) -> Refusal {
        let who = guest
            .facts()
            .map_or("a process that is no known domain".to_owned(), |domain| format!("QEMU of domain {}", domain.name));
        let (place, remedy) = match self {
            Place::File(path) => {
                (path.display().to_string(), "add its path to plaintext_targets in [policy]".to_owned())
            }
            Place::Device(device) => (
                device.to_string(),
                format!(
                    "add a rule with action = \"pass\" that matches it ('volcrypt volume identify {device}' shows by what), \
                     or its path to plaintext_targets in [policy]"
                ),
            ),
        };
        let volumes = match volumes {
            [one] => format!("volume {one}"),
            more => format!("volumes {}", more.iter().map(VolumeId::as_str).collect::<Vec<_>>().join(", ")),
        };
        let sentence = format!(
            "{who} may not write to {place}, which nothing encrypts, while it uses the protected {volumes}: a copy in clear \
             could come to stand there; if it may, {remedy}, and run 'systemctl reload volcryptd'"
        );
        Refusal::new(Reason::NotAllowed, sentence)
    }
}
