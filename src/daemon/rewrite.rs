//! Points the disks of a domain's XML to their mappings and back, for an operator. Nothing is opened, enrolled or
//! recorded.

use super::broker::{Broker, no_such_device};
use super::incoming::{may_be_a_volume, unreadable, what_is_where};
use crate::domain::{self, Disk, Domain, Facts, Nobody, Requester, Source, in_disk, quoted};
use crate::guest::{block_device_at, is_no_device};
use crate::refusal::{Reason, Refusal};
use crate::volume::{Identity, VolumeId};

/// `xml`, a `<domain>` or a lone `<disk>`, with every protected disk on its mapping.
///
/// # Errors
/// Those of [`domain::rewrite`]; and when a disk's device is denied or is not there, so that nobody can tell
/// whether it is protected.
pub fn rewrite(broker: &Broker, xml: &str) -> Result<String, Refusal> {
    let rewritten = domain::rewrite(xml, &|domain, source| judge(broker, domain, source))?;
    for disk in &rewritten.disks {
        let (target, volume) = (disk.target.escape_debug(), &disk.volume);
        tracing::info!(volume = %volume, "pointed disk {target} to the mapping of volume {volume}, in XML for an operator");
    }
    Ok(rewritten.xml)
}

/// `xml`, a `<domain>`, as it was before [`rewrite`], if every disk gets the volume back that it is on. What is called
/// /dev/sda may be another one since then, which the guest would overwrite.
///
/// # Errors
/// Those of [`domain::unrewrite`]; and when the source that a disk had is no longer the volume that the disk is on.
pub fn unrewrite(broker: &Broker, xml: &str) -> Result<String, Refusal> {
    let before = domain::unrewrite(xml)?;
    let parse = |xml: &str| Domain::parse(xml).map_err(unreadable);
    let (now, then) = (parse(xml)?, parse(&before)?);
    let facts = then.facts();
    for (now, then) in now.disks.iter().zip(&then.disks).filter(|(now, then)| now.source != then.source) {
        let Some(volume) = now.source.mapped_volume() else { continue };
        let check = || match judge(broker, Some(&facts), &then.source)? {
            Some(found) if found == volume => Ok(()),
            found => Err(another(&facts.name, then, &volume, found.as_ref())),
        };
        check().map_err(|refusal| in_disk(then, &refusal.of(&volume)))?;
    }
    Ok(before)
}

fn another(domain: &str, then: &Disk, volume: &VolumeId, found: Option<&VolumeId>) -> Refusal {
    let (path, found) = what_is_where(&then.source, found);
    let sentence = format!(
        "it is on volume {volume}, and {path}, which it was before, is {found} now: have the disk name the device of \
         volume {volume} ('virsh edit {}'), and run the command again for the others",
        quoted(domain)
    );
    Refusal::new(Reason::NotAllowed, sentence)
}

/// The protected volume that `source` is for `domain`, or for nobody in particular.
pub(super) fn judge(broker: &Broker, domain: Option<&Facts>, source: &Source) -> Result<Option<VolumeId>, Refusal> {
    let requester = domain.map_or(&Nobody as &dyn Requester, |domain| domain);
    match source {
        Source::Path(path) => match block_device_at(path) {
            Ok(device) => broker.judge(&broker.identify(device)?, requester),
            Err(error) if is_no_device(&error) && !may_be_a_volume(path, &error) => Ok(None),
            Err(error) => Err(no_such_device(path, &error)),
        },
        Source::IscsiUnit { target, lun } => broker.judge(&Identity::of_iscsi_unit(target, *lun), requester),
        Source::Other => Ok(None),
    }
}
