//! Before a domain comes from another host: everything it needs is here, or it is refused with a sentence and runs on
//! where it is.
//!
//! libvirt asks for its start as well once it has begun to take the domain. Only then is the use of a key recorded. A
//! domain that comes from a file is left to that, because libvirt would delete the file of one that is refused before
//! (see the hook); what that may have been on another host is looked at then.

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Instant;

use super::broker::{Broker, Ready, no_such_device};
use super::by_xml;
use super::inspection::{Inspection, check_emulator};
use super::rewrite::judge;
use crate::audit::Asker;
use crate::domain::{Adoption, Disk, Domain, Facts, InvalidXml, Source, adopt, in_disk, unrewrite};
use crate::guest::{block_device_at, is_no_device};
use crate::policy::Intercept;
use crate::protocol::EMULATOR_DIRECTORY;
use crate::refusal::{Reason, Refusal};
use crate::volume::VolumeId;

/// A folder of the libvirt that runs the host's domains.
const MANAGED_SAVES: &str = "/var/lib/libvirt/qemu/save";

/// Whether the domain in `xml`, which comes from another host, can run here. What comes back, if anything does, is
/// the XML that libvirt is to go on with: the same with the disks on their volumes that the other host had pointed to
/// their mappings, or on their mappings if this host goes by the XML. A refusal is recorded.
///
/// # Errors
/// When a protected disk is not here or could not be opened, or would be opened past its mapping; and when one that no
/// rule is about holds what looks like ciphertext: the guest would go on writing plaintext between it.
pub fn admit(broker: &Broker, name: &str, xml: &str) -> Result<Option<String>, Refusal> {
    let unmapped = |domain: &Domain| inspect_domain(broker, name, domain, &HashMap::new()).map(|()| None);
    inspect(broker, name, xml, &unmapped, &|xml| check_no_ciphertext(broker, &Domain::parse(xml).map_err(unreadable)?))
}

/// The XML with which libvirt is to restore the domain in `xml` from a file, if it is another: as for [`admit`]. What
/// names no mapping is looked at when it starts, with the wrapper if it was saved before that was its emulator: what an
/// operator defines since then is not what it is restored from. `is_there` says whether there is a file.
///
/// The start that follows is refused if a disk holds what looks like ciphertext and no rule is about it, because the domain
/// may have been saved on another host. A managed save was made on this one, which knows what is enrolled here.
///
/// # Errors
/// As for [`admit`], but for that.
pub fn restore(
    broker: &Broker,
    name: &str,
    xml: &str,
    is_there: &dyn Fn(&Path) -> bool,
) -> Result<Option<String>, Refusal> {
    if let Ok(domain) = Domain::parse(xml)
        && !is_there(&managed_save_of(name))
    {
        broker.restoring().begin(&domain.facts(), Instant::now());
    }
    let restored = inspect(broker, name, xml, &|domain| Ok(adopted(broker, name, domain, xml)), &|_| Ok(()))?;
    // XML that libvirt does not take has it delete a managed save as well. What names no such emulator is refused when the
    // domain starts.
    Ok(restored.filter(|xml| {
        let emulator = Domain::parse(xml).ok().and_then(|domain| domain.emulator);
        emulator.is_none_or(|emulator| is_there(&emulator))
    }))
}

/// Where libvirt keeps what `virsh managedsave` saves, and `virsh start` restores.
fn managed_save_of(name: &str) -> PathBuf {
    Path::new(MANAGED_SAVES).join(format!("{name}.save"))
}

/// `unmapped` looks at a domain none of whose disks names a mapping, where the wrapper is used, and `at_last` at the XML
/// that libvirt is to go on with.
fn inspect(
    broker: &Broker,
    name: &str,
    xml: &str,
    unmapped: &dyn Fn(&Domain) -> Result<Option<String>, Refusal>,
    at_last: &dyn Fn(&str) -> Result<(), Refusal>,
) -> Result<Option<String>, Refusal> {
    let domain = Domain::parse(xml).map_err(unreadable);
    let uuid = domain.as_ref().ok().and_then(|domain| domain.uuid.clone());
    Asker::hook(name, uuid.as_deref()).ask(|| {
        let inspected = match broker.config() {
            Ok(config) if config.hook.intercept == Intercept::Xml => by_xml::admit(broker, &config, xml),
            _ => domain.and_then(|domain| match mapped(&domain) {
                mapped if mapped.is_empty() => unmapped(&domain),
                mapped => {
                    let xml = off_mappings(xml)?;
                    let domain = Domain::parse(&xml).map_err(unreadable)?;
                    inspect_domain(broker, name, &domain, &mapped).map(|()| Some(xml))
                }
            }),
        };
        let looked_at = inspected.and_then(|admitted| {
            at_last(admitted.as_deref().unwrap_or(xml))?;
            Ok(admitted)
        });
        looked_at.inspect_err(|refusal| broker.record_refusal(refusal))
    })
}

/// The volumes of the disks that name a mapping, by the disks' targets.
fn mapped(domain: &Domain) -> HashMap<String, VolumeId> {
    domain.disks.iter().filter_map(|disk| Some((disk.target.clone(), disk.source.mapped_volume()?))).collect()
}

/// The domain as a host with the wrapper runs it: its disks name their volumes, its emulator is the wrapper.
fn off_mappings(xml: &str) -> Result<String, Refusal> {
    let xml = unrewrite(xml)?;
    match adopt(&xml).map_err(unreadable)? {
        Adoption::Changed { xml, .. } => Ok(xml),
        Adoption::Already => Ok(xml),
    }
}

/// The domain with the wrapper as its emulator, if its start would be refused for the one that it has. One that cannot be
/// adopted is refused then.
fn adopted(broker: &Broker, name: &str, domain: &Domain, xml: &str) -> Option<String> {
    let runs_the_wrapper = check_emulator(name, domain, "its volumes", &with_the_wrapper).is_ok();
    if runs_the_wrapper || !needs_the_wrapper(broker, name, domain) {
        return None;
    }
    match adopt(xml).ok()? {
        Adoption::Changed { xml, from, to } => {
            tracing::info!(domain = name, "domain {name} is restored with the emulator {to} in the place of {from}");
            Some(xml)
        }
        Adoption::Already => None,
    }
}

/// Whether no other emulator may run the domain: any domain that is run so is refused, or it has a protected volume.
fn needs_the_wrapper(broker: &Broker, name: &str, domain: &Domain) -> bool {
    let ready = |_: &Path, _: &Facts| Ok(Ready::default());
    let facts = domain.facts();
    let is_protected = |source: &Source| matches!(judge(broker, Some(&facts), source), Ok(Some(_)));
    Inspection { broker, name, domain, ready: &ready, remedy: &with_the_wrapper }.of_domain().is_err()
        || domain.disks.iter().flat_map(Disk::images).any(|image| is_protected(image.source))
}

/// `mapped` has the volumes of those disks that named a mapping before.
fn inspect_domain(
    broker: &Broker,
    name: &str,
    domain: &Domain,
    mapped: &HashMap<String, VolumeId>,
) -> Result<(), Refusal> {
    let rules = broker.config().is_ok_and(|config| !config.rules().is_empty());
    let ready = |path: &Path, facts: &Facts| match block_device_at(path) {
        Ok(device) => broker.check_ready(&broker.identify(device)?, facts),
        Err(error) if is_no_device(&error) && !(rules && may_be_a_volume(path, &error)) => Ok(Ready::default()),
        Err(error) => Err(no_such_device(path, &error)),
    };
    let inspection = Inspection { broker, name, domain, ready: &ready, remedy: &with_the_wrapper };
    inspection.of_domain()?;
    for disk in &domain.disks {
        let refused = |refusal: Refusal| in_disk(disk, &refusal);
        if let Some(volume) = disk.source.mapped_volume() {
            return Err(refused(no_note(&volume).of(&volume)));
        }
        // What can do without a medium loses it on the way, if it is not here.
        if disk.is_drive() && is_missing(disk) {
            continue;
        }
        let found = inspection.of_disk(disk)?.into_iter().next().unwrap_or_default();
        match mapped.get(&disk.target) {
            Some(volume) if found.volume.as_ref() != Some(volume) => {
                return Err(refused(another(disk, volume, &found).of(volume)));
            }
            _ => {}
        }
    }
    Ok(())
}

/// Whether none of its disks may be protected on the host that `domain` comes from, and is not here.
pub(super) fn check_no_ciphertext(broker: &Broker, domain: &Domain) -> Result<(), Refusal> {
    let facts = domain.facts();
    for disk in &domain.disks {
        for image in disk.images() {
            let Source::Path(path) = image.source else { continue };
            // What is not here is not opened.
            let Ok(device) = block_device_at(path) else { continue };
            match broker.check_no_ciphertext(&broker.identify(device)?, &facts) {
                // A medium that cannot be read.
                Err(refusal) if disk.is_drive() && refusal.reason() != Reason::NotAllowed => {}
                looked => looked.map_err(|refusal| in_disk(disk, &refusal))?,
            }
        }
    }
    Ok(())
}

/// Whether a device that is protected could be expected at `path`, where none is.
pub(super) fn may_be_a_volume(path: &Path, error: &io::Error) -> bool {
    error.raw_os_error() != Some(libc::ENOTBLK) && path.starts_with("/dev") && VolumeId::of_mapping(path).is_none()
}

fn is_missing(disk: &Disk) -> bool {
    matches!(&disk.source, Source::Path(path) if block_device_at(path).is_err_and(|error| is_no_device(&error)))
}

/// A domain that is not defined here cannot be adopted here; virsh takes another XML for either way it comes.
fn with_the_wrapper(_: &str, emulator: &Path) -> String {
    let program = emulator.file_name().unwrap_or_default();
    format!("give virsh an XML (--xml) whose <emulator> is {EMULATOR_DIRECTORY}/{}", program.display())
}

fn no_note(volume: &VolumeId) -> Refusal {
    Refusal::new(
        Reason::NotAllowed,
        format!(
            "it is on {}, and no note in the domain's metadata says what its device was: give virsh an XML (--xml) that \
             names the device of volume {volume}",
            volume.mapping_path()
        ),
    )
}

fn another(disk: &Disk, volume: &VolumeId, found: &Ready) -> Refusal {
    let (path, found) = what_is_where(&disk.source, found.volume.as_ref());
    Refusal::new(
        Reason::NotAllowed,
        format!(
            "it is on volume {volume}, and {path} is {found} on this host: give virsh an XML (--xml) that names the \
             volume's device here"
        ),
    )
}

/// The place of a disk, and what was found there, in words.
pub(super) fn what_is_where(source: &Source, found: Option<&VolumeId>) -> (String, String) {
    let path = match source {
        Source::Path(path) => path.display().to_string(),
        _ => "its source".to_owned(),
    };
    (path, found.map_or("no protected volume".to_owned(), |found| format!("volume {found}")))
}

pub(super) fn unreadable(error: InvalidXml) -> Refusal {
    Refusal::new(Reason::Configuration, error.to_string())
}
