//! What an operator wants to know of a device and an open does not need.

use super::Sysfs;
use super::attributes::Node;
use crate::refusal::Refusal;
use crate::volume::details::{Details, LogicalVolume, Portrait};
use crate::volume::vpd::{PAGE_LIMIT, designators, unit_serial};
use crate::volume::{DeviceNumber, Identity};

impl Sysfs {
    /// All that is known of `device` and of everything beneath it.
    ///
    /// # Errors
    /// Those of [`Sysfs::identify`].
    pub fn portray(&self, device: DeviceNumber) -> Result<Portrait, Refusal> {
        self.portrait(self.identify(device)?)
    }

    fn portrait(&self, mut identity: Identity) -> Result<Portrait, Refusal> {
        let details = self.details(&identity)?;
        let beneath = std::mem::take(&mut identity.underlying);
        let beneath = beneath.into_iter().map(|below| self.portrait(below)).collect::<Result<_, Refusal>>()?;
        Ok(Portrait { identity, details, beneath })
    }

    fn details(&self, identity: &Identity) -> Result<Details, Refusal> {
        let mut details = Details {
            lvm: identity.mapping.as_ref().and_then(|mapping| LogicalVolume::of_dm_uuid(&mapping.uuid)),
            ..Details::default()
        };
        // A partition's attributes are its own, and only its disk has an identity.
        if identity.partition.is_some() {
            return Ok(details);
        }
        let directory = self.root.join(self.place(identity.number)?);
        let node = Node { directory: &directory, device: identity.number };
        if let Some(page) = node.bytes("device/vpd_pg83", PAGE_LIMIT)? {
            match designators(&page) {
                Ok(designators) => details.designators = designators,
                Err(malformed) => details.faults.push(malformed.to_string()),
            }
        }
        if let Some(page) = node.bytes("device/vpd_pg80", PAGE_LIMIT)? {
            match unit_serial(&page) {
                Ok(serial) => details.serial = serial,
                Err(malformed) => details.faults.push(malformed.to_string()),
            }
        } else {
            details.serial = node.first_text(&["device/serial", "serial"])?;
        }
        details.namespace = node.number("nsid")?;
        details.nguid = node.text("nguid")?;
        details.eui64 = node.text("eui")?;
        details.uuid = node.text("uuid")?;
        Ok(details)
    }
}
