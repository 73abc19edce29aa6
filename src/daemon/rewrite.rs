//! Points the disks of a domain's XML to their mappings, for an operator. Nothing is opened, enrolled or recorded.

use super::broker::{Broker, no_such_device};
use super::incoming::may_be_a_volume;
use crate::domain::{self, Facts, Nobody, Requester, Source};
use crate::guest::{block_device_at, is_no_device};
use crate::refusal::Refusal;
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
