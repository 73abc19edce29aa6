//! Looks at what a domain's XML asks for, before libvirt goes on with it: whether it starts here or comes here.

use std::path::Path;

use super::broker::{Broker, Ready};
use super::sight::check_in_sight;
use crate::domain::{
    Disk, Domain, Facts, Image, Source, in_disk, is_believed, is_hidden, passes_commands, quoted, reached_by_qemu,
};
use crate::policy::OtherEmulators;
use crate::protocol::EMULATOR_DIRECTORY;
use crate::refusal::{Reason, Refusal};
use crate::volume::{Identity, VolumeId};

/// The inspection of one domain.
pub(super) struct Inspection<'a> {
    pub(super) broker: &'a Broker,
    pub(super) name: &'a str,
    pub(super) domain: &'a Domain,
    /// What is asked about the path of a disk.
    pub(super) ready: &'a dyn Fn(&Path, &Facts) -> Result<Ready, Refusal>,
    pub(super) remedy: &'a Remedy<'a>,
}

/// What to do about the domain of this name that runs this emulator and no wrapper.
pub(super) type Remedy<'a> = dyn Fn(&str, &Path) -> String + 'a;

impl Inspection<'_> {
    /// Whether the domain may run on this host at all.
    pub(super) fn of_domain(&self) -> Result<(), Refusal> {
        match self.broker.config() {
            Ok(config) if config.rules().is_empty() || config.hook.other_emulators == OtherEmulators::Start => Ok(()),
            Ok(_) => self.of_emulator("protected volumes attached to it"),
            Err(fault) => self.of_emulator("protected volumes").map_err(|_| unknown_volumes(self.name, &fault)),
        }
    }

    /// Whether the domain will get one of its disks, and nothing past its mappings: what was found of each of its
    /// images, from the top.
    pub(super) fn of_disk(&self, disk: &Disk) -> Result<Vec<Ready>, Refusal> {
        disk.images().map(|image| self.of_image(disk, image)).collect()
    }

    fn of_image(&self, disk: &Disk, image: Image<'_>) -> Result<Ready, Refusal> {
        let ready = match image.source {
            Source::Path(path) => {
                check_in_sight(self.broker, image).and_then(|()| (self.ready)(path, &self.domain.facts()))
            }
            Source::IscsiUnit { target, lun } => {
                check_unit(self.broker, target, *lun, &self.domain.facts()).map(|()| Ready::default())
            }
            Source::Other => Ok(Ready::default()),
        };
        let ready = ready.map_err(|refusal| in_disk(disk, &refusal))?;
        if let Some(volume) = &ready.volume {
            let hidden = if image.is_looked_into { Err(is_hidden(volume)) } else { Ok(()) };
            let checked = check_commands(disk, volume).and(hidden);
            checked.map_err(|refusal| in_disk(disk, &refusal.of(volume)))?;
            self.of_emulator(&format!("the protected volume {volume}")).map_err(|refusal| refusal.of(volume))?;
        }
        Ok(ready)
    }

    fn of_emulator(&self, what: &str) -> Result<(), Refusal> {
        check_emulator(self.name, self.domain, what, self.remedy)
    }
}

/// Whether the domain runs the wrapper. Any other emulator opens devices as they are; `what` it would
/// write to is for the sentence.
pub(super) fn check_emulator(name: &str, domain: &Domain, what: &str, remedy: &Remedy<'_>) -> Result<(), Refusal> {
    let emulator = domain.emulator.as_deref().unwrap_or(Path::new(""));
    if emulator.parent() == Some(Path::new(EMULATOR_DIRECTORY)) {
        return Ok(());
    }
    Err(Refusal::new(
        Reason::NotAllowed,
        format!(
            "domain {name} runs the emulator {:?} and would write to {what} unencrypted: {}",
            emulator.display().to_string(),
            remedy(name, emulator)
        ),
    ))
}

/// What to do about a domain of this host.
pub(super) fn by_adopting(name: &str, _emulator: &Path) -> String {
    format!("run 'volcrypt domain adopt {}', which has it run volcrypt's wrapper", quoted(name))
}

/// Whether a unit that QEMU reaches by itself is protected.
pub(super) fn check_unit(broker: &Broker, target: &str, lun: u64, domain: &Facts) -> Result<(), Refusal> {
    match broker.judge(&Identity::of_iscsi_unit(target, lun), domain) {
        Ok(None) => Ok(()),
        _ => Err(reached_by_qemu(target, lun)),
    }
}

/// Whether a disk of a protected volume passes no commands around its encryption.
pub(super) fn check_commands(disk: &Disk, volume: &VolumeId) -> Result<(), Refusal> {
    match disk.device.as_str() {
        "lun" => Err(passes_commands(volume)),
        _ => Ok(()),
    }
}

/// Whether libvirt, which sees what is in a mapping that the XML names, takes nothing that stands there for the images that
/// a disk stands on.
pub(super) fn check_chain(volume: &VolumeId, is_looked_into: bool) -> Result<(), Refusal> {
    match is_looked_into {
        true => Err(is_believed(volume)),
        false => Ok(()),
    }
}

/// The refusal of a domain that does not run the wrapper, while `fault` is wrong with the configuration.
fn unknown_volumes(name: &str, fault: &Refusal) -> Refusal {
    Refusal::new(
        fault.reason(),
        format!(
            "domain {name} does not run volcrypt's wrapper, and with a faulty configuration nothing tells which volumes it \
             would write to unencrypted: {fault}"
        ),
    )
}
