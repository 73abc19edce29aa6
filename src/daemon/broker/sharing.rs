//! Who else uses a volume, and whether two may.

use super::Broker;
use crate::domain::Source;
use crate::encryptor::Mapping;
use crate::guest::{block_device_at, is_local};
use crate::refusal::Refusal;
use crate::volume::VolumeId;

impl Broker {
    /// Another domain than `domain` that has `volume` or is about to, if the two may not have it together: one of them is
    /// to write to it alone, and with `is_written_alone` that is `domain`.
    ///
    /// # Errors
    /// When device-mapper does not answer.
    pub fn rival(&self, volume: &VolumeId, domain: &str, is_written_alone: bool) -> Result<Option<String>, Refusal> {
        let held_for = self.holds.find(volume, |other, alone| other != domain && (is_written_alone || alone));
        if held_for.is_some() {
            return Ok(held_for);
        }
        let mappings = self.encryptor.mappings()?;
        let Some(mapping) = mappings.into_iter().find(|mapping| mapping.volume == *volume) else { return Ok(None) };
        let others = self.devices.domains_with_open(mapping.device).into_iter().filter(|(_, other)| other != domain);
        let mut rivals = others.filter(|(pid, _)| is_written_alone || self.writes_alone(*pid, &mapping));
        Ok(rivals.next().map(|(_, other)| other))
    }

    /// Whether the domain that process `pid` runs is to write to `mapping` alone. It does as long as libvirt does not say
    /// otherwise.
    fn writes_alone(&self, pid: u32, mapping: &Mapping) -> bool {
        let disks = self.domains.disks(pid).unwrap_or_else(|error| {
            tracing::warn!(pid, "it cannot be told which disks the domain of process {pid} shares: {error}");
            Vec::new()
        });
        let mut is_known = false;
        for disk in &disks {
            if mapping.is_at(&disk.source) {
                is_known = true;
                if disk.is_written_alone {
                    return true;
                }
            }
            // What others stand on is only read.
            is_known |= disk.beneath.iter().any(|layer| mapping.is_at(&layer.source));
        }
        !is_known
    }
}

impl Mapping {
    /// Whether `source` is the mapping, or its volume by the volume's own device.
    fn is_at(&self, source: &Source) -> bool {
        let Source::Path(path) = source else { return false };
        if source.mapped_volume().as_ref() == Some(&self.volume) {
            return true;
        }
        // No file server that may be dead is asked.
        let number = is_local(path).then(|| block_device_at(path).ok()).flatten();
        number.is_some_and(|number| number == self.device || Some(number) == self.backing)
    }
}
