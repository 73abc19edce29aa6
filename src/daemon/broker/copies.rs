//! What a guest with a protected volume may write to: a copy of the volume that nothing encrypts could come to
//! stand there.

use std::io;
use std::path::Path;
use std::sync::Arc;

use super::Broker;
use super::authorisation::Guest;
use crate::domain::{Given, Requester};
use crate::guest::{Written, block_device_at, is_local, is_no_device};
use crate::policy::Config;
use crate::refusal::{Reason, Refusal};
use crate::volume::{DeviceNumber, Identity, VolumeId};

/// A write that can only be decided on once more was looked up, which may take a file server that has to do with another
/// disk.
pub struct Doubt {
    written: Written,
    config: Arc<Config>,
    volumes: Vec<VolumeId>,
}

impl Broker {
    /// Decides on something that nothing encrypts and that `guest` opens for writing, as far as that can be done without
    /// looking up what else libvirt has given to the guest: see [`Broker::look_up_written`].
    ///
    /// What libvirt gave to the domain is its own: that stands in the XML that libvirt keeps of it, from before QEMU starts.
    /// What QEMU is to copy a disk to does not stand there when QEMU opens it, and neither does a disk that is attached:
    /// the configuration has to allow them. This is no wall against a QEMU that was taken over by its guest, which has the
    /// data and other ways to bring it out, but against mistakes.
    ///
    /// # Errors
    /// When the guest uses a protected volume, or that cannot be told.
    pub fn check_written(&self, written: Written, guest: &Guest<'_>) -> Result<Option<Doubt>, Refusal> {
        let pid = guest.process().map_err(|error| untold(&error))?;
        // Without a volume in use it does not matter that the configuration is faulty.
        let config = self.config();
        // From cheap to dear: a guest may have thousands of descriptors, and many threads that write to a shared folder.
        if let (Written::File(file), Ok(config)) = (&written, &config)
            && (Place::File(&file.path).is_allowed(config, guest) || self.is_given_at_once(config, &written, guest))
        {
            return Ok(None);
        }
        let volumes = self.volumes_of(pid, guest)?;
        if volumes.is_empty() {
            return Ok(None);
        }
        let config = config?;
        let is_allowed = match &written {
            // What it was once allowed to write to it goes on to write to.
            Written::File(_) => written.is_written_by(pid),
            Written::Device(_) => {
                self.place(&written)?.is_allowed(&config, guest) || self.is_given_at_once(&config, &written, guest)
            }
        };
        Ok((!is_allowed).then_some(Doubt { written, config, volumes }))
    }

    /// Decides on what [`Broker::check_written`] left in doubt. This may hang as long as some file server is dead.
    ///
    /// # Errors
    /// When neither libvirt nor the configuration allows the place.
    pub fn look_up_written(&self, doubt: &Doubt, guest: &Guest<'_>) -> Result<(), Refusal> {
        let Doubt { written, config, volumes } = doubt;
        let given = guest.given();
        let is_given = |named: for<'a> fn(&Written, &'a Given) -> Option<&'a Path>| {
            given
                .iter()
                .any(|given| named(written, given).is_some_and(|path| !self.holds_a_volume(config, given, path, guest)))
        };
        // A guest has few folders, and most writes to one.
        if is_given(Written::named_at_once_by) || is_given(Written::within_folder_of) || is_given(Written::named_by) {
            return Ok(());
        }
        let refusal = self.place(written)?.refusal(guest, volumes);
        Err(volumes.iter().take(1).fold(refusal, Refusal::of))
    }

    fn place<'a>(&self, written: &'a Written) -> Result<Place<'a>, Refusal> {
        Ok(match written {
            Written::File(file) => Place::File(&file.path),
            Written::Device(device) => Place::Device(Box::new(self.devices.identify(*device)?)),
        })
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

    /// Whether libvirt's own XML of the domain names the place, as far as no file server has to be asked, and not as the
    /// overlay of a protected volume: what is written there is that volume's.
    fn is_given_at_once(&self, config: &Config, written: &Written, guest: &Guest<'_>) -> bool {
        guest.given().iter().any(|given| {
            written.named_at_once_by(given).is_some_and(|path| {
                given.besides(path).all(is_local) && !self.holds_a_volume(config, given, path, guest)
            })
        })
    }

    /// Whether there is a protected volume among what `given` names `besides`, for the guest or for the daemon: the guest
    /// does not have all of /dev, nor the daemon what is in /tmp or /home. What cannot be looked at may be one.
    fn holds_a_volume(&self, config: &Config, given: &Given, besides: &Path, guest: &Guest<'_>) -> bool {
        given.besides(besides).any(|path| {
            [guest.sees(path), block_device_at(path)]
                .into_iter()
                .any(|found| self.may_hold_a_volume(config, found, guest))
        })
    }

    fn may_hold_a_volume(&self, config: &Config, found: io::Result<DeviceNumber>, guest: &Guest<'_>) -> bool {
        match found {
            Ok(device) => match self.devices.identify(device) {
                Ok(device) => {
                    !device.own_mappings().is_empty() || !matches!(self.protection(config, &device, guest), Ok(None))
                }
                Err(_) => true,
            },
            Err(error) => !is_no_device(&error),
        }
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
