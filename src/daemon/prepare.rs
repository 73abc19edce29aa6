//! Before a domain starts: everything it needs is there, or the start is refused with a sentence.

use std::path::Path;
use std::time::Instant;

use super::auditing::with_source;
use super::broker::{Broker, Ready, no_such_device};
use super::by_xml;
use super::incoming::check_no_ciphertext;
use super::inspection::{Inspection, by_adopting};
use crate::audit::{Asker, Kind};
use crate::domain::{Domain, Facts, Source, in_disk, quoted, sources_before};
use crate::guest::{block_device_at, is_no_device};
use crate::policy::Intercept;
use crate::refusal::{Reason, Refusal};
use crate::volume::VolumeId;

/// Makes every protected disk of the domain in `xml` ready for QEMU's open, or refuses; either is
/// recorded.
///
/// # Errors
/// When a protected disk could not be opened, or would be opened past its mapping; and when the domain is restored from a
/// file, and one that no rule is about holds what looks like ciphertext.
pub fn prepare(broker: &Broker, name: &str, xml: &str) -> Result<(), Refusal> {
    let domain = Domain::parse(xml).map_err(|error| Refusal::new(Reason::Configuration, error.to_string()));
    let uuid = domain.as_ref().ok().and_then(|domain| domain.uuid.clone());
    Asker::hook(name, uuid.as_deref()).ask(|| {
        let prepared = domain.and_then(|domain| {
            if broker.restoring().ends(&domain.facts(), Instant::now()) {
                check_no_ciphertext(broker, &domain)?;
            }
            match broker.config() {
                Ok(config) if config.hook.intercept == Intercept::Xml => {
                    by_xml::prepare(broker, &config, name, &domain, &sources_before(xml).unwrap_or_default())
                }
                _ => prepare_domain(broker, name, &domain),
            }
        });
        prepared.inspect_err(|refusal| broker.record_refusal(refusal))
    })
}

fn prepare_domain(broker: &Broker, name: &str, domain: &Domain) -> Result<(), Refusal> {
    let ready = |path: &Path, facts: &Facts| match block_device_at(path) {
        Ok(device) => broker.make_ready(&broker.identify(device)?, facts),
        Err(error) if is_no_device(&error) && VolumeId::of_mapping(path).is_some() => Err(Refusal::new(
            Reason::DeviceGone,
            format!(
                "{} is not there, and nothing makes it on a host with the wrapper: run 'volcrypt domain unrewrite {}', or name \
                 the volume's own device",
                path.display(),
                quoted(name)
            ),
        )),
        // An image file, which no rule protects; or nothing yet, about which libvirt says its own.
        Err(error) if is_no_device(&error) => Ok(Ready::default()),
        Err(error) => Err(no_such_device(path, &error)),
    };
    let inspection = Inspection { broker, name, domain, ready: &ready, remedy: &by_adopting };
    inspection.of_domain()?;
    for disk in &domain.disks {
        let refused = |refusal: Refusal| in_disk(disk, &refusal);
        let images = inspection.of_disk(disk)?;
        for (image, ready) in disk.images().zip(images) {
            if let Source::Path(path) = image.source {
                for volume in &ready.mapped {
                    let detail = format!("made ready for disk {} as {}", disk.target, path.display());
                    broker.record_use(Kind::KeyUsed, volume, &detail).map_err(refused)?;
                    broker.merge_audit_soon();
                }
            }
            if let Some(volume) = ready.volume {
                let detail = format!("made ready for disk {}", disk.target);
                broker
                    .record_use(Kind::KeyUsed, &volume, &with_source(&detail, ready.cached_since))
                    .map_err(refused)?;
                broker.merge_audit_soon();
                tracing::info!(domain = name, volume = %volume, "volume {volume} is ready for disk {} of domain {name}", disk.target);
            }
        }
    }
    Ok(())
}
