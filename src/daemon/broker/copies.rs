//! What a guest with a protected volume may write to: a copy of the volume that nothing encrypts could come to
//! stand there.

use std::io;
use std::path::Path;

use super::Broker;
use super::authorisation::Guest;
use crate::domain::{Given, Requester};
use crate::guest::{Written, block_device_at, is_no_device};
use crate::policy::Config;
use crate::refusal::{Reason, Refusal};
use crate::volume::{DeviceNumber, Identity, VolumeId};

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
        let pid = guest.process().map_err(|error| untold(&error))?;
        let volumes = self.volumes_of(pid, guest)?;
        let Some(volume) = volumes.first() else { return Ok(()) };
        let config = self.config()?;
        let place = match written {
            Written::File(file) => Place::File(&file.path),
            Written::Device(device) => Place::Device(Box::new(self.devices.identify(device)?)),
        };
        // What it was once allowed to write to it goes on to write to.
        if place.is_allowed(&config, guest) || written.is_written_by(pid) || self.is_given(&config, written, guest) {
            return Ok(());
        }
        Err(place.refusal(guest, &volumes).of(volume))
    }

    /// The protected volumes that process `pid` has open, each once.
    fn volumes_of(&self, pid: u32, guest: &Guest<'_>) -> Result<Vec<VolumeId>, Refusal> {
        let open = || self.devices.open_by(pid).map_err(|error| untold(&error));
        let mut volumes = Vec::new();
        for device in open()? {
            match self.devices.identify(device) {
                Ok(device) => volumes.extend(device.own_mappings().into_iter().map(|(volume, _)| volume)),
                // It was closed meanwhile, or has lost what is beneath it: it may be a volume that comes back.
                Err(refusal) if refusal.reason() == Reason::DeviceGone => {
                    if open()?.contains(&device) {
                        return Err(lost(device, guest));
                    }
                }
                Err(refusal) => return Err(refusal),
            }
        }
        volumes.sort();
        volumes.dedup();
        Ok(volumes)
    }

    /// Whether libvirt's own XML of the domain names the place, and not as the overlay of a protected volume: what
    /// is written there is that volume's.
    fn is_given(&self, config: &Config, written: Written<'_>, guest: &Guest<'_>) -> bool {
        let given = guest.given();
        let is_own = |named: for<'a> fn(&Written<'_>, &'a Given) -> Option<&'a Path>| {
            given.iter().any(|given| {
                named(&written, given).is_some_and(|path| !self.holds_a_volume(config, given, path, guest))
            })
        };
        // To look a path up may take a file server that has to do with another disk.
        is_own(|written, given| written.spelled_by(given)) || is_own(|written, given| written.named_by(given))
    }

    /// Whether there is a protected volume among what `given` names `besides`. What cannot be looked at may be one.
    fn holds_a_volume(&self, config: &Config, given: &Given, besides: &Path, guest: &Guest<'_>) -> bool {
        given.besides(besides).any(|path| match block_device_at(path) {
            Ok(device) => match self.devices.identify(device) {
                Ok(device) => {
                    !device.own_mappings().is_empty() || !matches!(self.protection(config, &device, guest), Ok(None))
                }
                Err(_) => true,
            },
            Err(error) => !is_no_device(&error),
        })
    }
}

fn lost(device: DeviceNumber, guest: &Guest<'_>) -> Refusal {
    let sentence = format!(
        "{} may not write to what nothing encrypts as long as it cannot be told whether it uses a protected volume: it has \
         block device {device} open, which is not there or has no path to its storage ('multipath -ll' shows maps); bring \
         the storage back or detach the disk, and try again",
        who(guest)
    );
    Refusal::new(Reason::NotAllowed, sentence)
}

fn who(guest: &Guest<'_>) -> String {
    let domain = guest.facts().map(|domain| format!("QEMU of domain {}", domain.name));
    domain.unwrap_or_else(|| "a process that is no known domain".to_owned())
}

fn untold(error: &io::Error) -> Refusal {
    let sentence = format!("it cannot be told what a guest that wants to write has open ({error}): try again");
    Refusal::new(Reason::NotAllowed, sentence)
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
        let who = who(guest);
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
