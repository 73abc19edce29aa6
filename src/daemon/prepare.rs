//! Before a domain starts: everything it needs is there, or the start is refused with a sentence.

use std::path::Path;

use super::broker::{Broker, Ready, no_such_device};
use crate::audit::{Asker, Kind};
use crate::domain::{Disk, Domain, Facts, Source, in_disk, is_hidden, passes_commands, quoted, reached_by_qemu};
use crate::guest::{block_device_at, is_no_device};
use crate::policy::OtherEmulators;
use crate::protocol::EMULATOR_DIRECTORY;
use crate::refusal::{Reason, Refusal};
use crate::volume::{Identity, VolumeId};

/// Makes every protected disk of the domain in `xml` ready for QEMU's open, or refuses; either is
/// recorded.
///
/// # Errors
/// When a protected disk could not be opened, or would be opened past its mapping.
pub fn prepare(broker: &Broker, name: &str, xml: &str) -> Result<(), Refusal> {
    let domain = Domain::parse(xml).map_err(|error| Refusal::new(Reason::Configuration, error.to_string()));
    let uuid = domain.as_ref().ok().and_then(|domain| domain.uuid.clone());
    Asker::hook(name, uuid.as_deref()).ask(|| {
        let prepared = domain.and_then(|domain| prepare_domain(broker, name, &domain));
        prepared.inspect_err(|refusal| broker.record_refusal(refusal))
    })
}

fn prepare_domain(broker: &Broker, name: &str, domain: &Domain) -> Result<(), Refusal> {
    match broker.config() {
        Ok(config) if config.rules().is_empty() || config.hook.other_emulators == OtherEmulators::Start => {}
        Ok(_) => check_emulator(name, domain, "protected volumes attached to it")?,
        Err(fault) => check_emulator(name, domain, "protected volumes").map_err(|_| unknown_volumes(name, &fault))?,
    }
    for disk in &domain.disks {
        for image in disk.images() {
            prepare_image(broker, name, domain, disk, image).map_err(|refusal| in_disk(disk, &refusal))?;
        }
    }
    Ok(())
}

/// Makes one of the images that `disk` is made of ready; libvirt may look into it.
fn prepare_image(
    broker: &Broker,
    name: &str,
    domain: &Domain,
    disk: &Disk,
    (source, is_looked_into): (&Source, bool),
) -> Result<(), Refusal> {
    let facts = domain.facts();
    let path = match source {
        Source::Path(path) => path,
        Source::IscsiUnit { target, lun } => return check_unit(broker, target, *lun, &facts),
        Source::Other => return Ok(()),
    };
    let ready = prepare_path(broker, path, &facts)?;
    for volume in &ready.mapped {
        let detail = format!("made ready for disk {} as {}", disk.target, path.display());
        broker.record_use(Kind::KeyUsed, volume, &detail)?;
        broker.merge_audit_soon();
    }
    let Some(volume) = ready.volume else { return Ok(()) };
    check_disk(disk, is_looked_into, &volume).map_err(|refusal| refusal.of(&volume))?;
    check_emulator(name, domain, &format!("the protected volume {volume}")).map_err(|refusal| refusal.of(&volume))?;
    broker.record_use(Kind::KeyUsed, &volume, &format!("made ready for disk {}", disk.target))?;
    broker.merge_audit_soon();
    tracing::info!(domain = name, volume = %volume, "volume {volume} is ready for disk {} of domain {name}", disk.target);
    Ok(())
}

fn prepare_path(broker: &Broker, path: &Path, domain: &Facts) -> Result<Ready, Refusal> {
    match block_device_at(path) {
        Ok(device) => broker.make_ready(&broker.identify(device)?, domain),
        // An image file, which no rule protects; or nothing yet, about which libvirt says its own.
        Err(error) if is_no_device(&error) => Ok(Ready::default()),
        Err(error) => Err(no_such_device(path, &error)),
    }
}

fn check_unit(broker: &Broker, target: &str, lun: u64, domain: &Facts) -> Result<(), Refusal> {
    match broker.make_ready(&Identity::of_iscsi_unit(target, lun), domain) {
        Ok(Ready { volume: None, .. }) => Ok(()),
        _ => Err(reached_by_qemu(target, lun)),
    }
}

fn check_disk(disk: &Disk, is_looked_into: bool, volume: &VolumeId) -> Result<(), Refusal> {
    match disk.device.as_str() {
        "lun" => Err(passes_commands(volume)),
        _ if is_looked_into => Err(is_hidden(volume)),
        _ => Ok(()),
    }
}

/// Whether the domain runs the wrapper. Any other emulator opens devices as they are; `what` it would
/// write to is for the sentence.
fn check_emulator(name: &str, domain: &Domain, what: &str) -> Result<(), Refusal> {
    let emulator = domain.emulator.as_deref().unwrap_or(Path::new(""));
    if emulator.parent() == Some(Path::new(EMULATOR_DIRECTORY)) {
        return Ok(());
    }
    Err(Refusal::new(
        Reason::NotAllowed,
        format!(
            "domain {name} runs the emulator {:?} and would write to {what} unencrypted: run 'volcrypt domain adopt {}', \
             which has it run volcrypt's wrapper",
            emulator.display().to_string(),
            quoted(name)
        ),
    ))
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
