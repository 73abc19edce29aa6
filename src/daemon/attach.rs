//! Devices that are attached to a domain and taken away again by `volcrypt` for an operator, or by another caller's hook.

use super::broker::{Broker, Finder};
use super::by_xml::{check_alone, check_guarded, given_twice};
use super::holds::Mapped;
use super::inspection::{by_adopting, check_chain, check_commands, check_emulator};
use super::rewrite::judge;
use super::sight::check_in_sight;
use crate::audit::Asker;
use crate::domain::{self, Disk, Domain, Facts, Source, in_disk, lone_disk};
use crate::guest::block_device_at;
use crate::policy::{Config, Intercept};
use crate::refusal::{Reason, Refusal};
use crate::volume::VolumeId;

/// A device as libvirt is to have it.
#[derive(Debug)]
pub struct Device {
    /// Its XML.
    pub xml: String,
    /// The protected volume that it is a disk of, if its XML names the mapping.
    pub volume: Option<VolumeId>,
    /// The mapping that libvirt's QEMU is about to open.
    pub mapped: Option<Mapped>,
}

/// Which domain a device is for.
pub struct Recipient {
    domain: Domain,
    facts: Facts,
}

impl Recipient {
    /// The one that libvirt describes so.
    ///
    /// # Errors
    /// When that cannot be read.
    pub fn parse(xml: &str) -> Result<Self, Refusal> {
        let domain = Domain::parse(xml).map_err(|error| Refusal::new(Reason::Configuration, error.to_string()))?;
        Ok(Recipient { facts: domain.facts(), domain })
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.domain.name
    }

    /// Who asks for something on its behalf.
    pub fn asker(&self) -> Asker {
        Asker::current().known_as(Some(&self.facts))
    }

    /// The disk that the guest's bus knows by the same name.
    fn disk_called(&self, target: &str) -> Option<&Disk> {
        self.domain.disks.iter().find(|disk| disk.target == target)
    }
}

/// The device `xml` as `recipient` may have it. If it is to have it at once (`live`), its mapping is made and open.
///
/// # Errors
/// When it is a protected volume that the domain must not have, or would get past its mapping.
pub fn attach(broker: &Broker, recipient: &Recipient, xml: &str, live: bool) -> Result<Device, Refusal> {
    let config = broker.config()?;
    let attaching = Attaching { broker, config: &config, recipient, before: lone_disk(xml) };
    match config.hook.intercept {
        Intercept::Open => attaching.as_it_is(xml),
        Intercept::Xml => attaching.by_xml(xml, live),
    }
}

struct Attaching<'a> {
    broker: &'a Broker,
    config: &'a Config,
    recipient: &'a Recipient,
    before: Option<Disk>,
}

impl Attaching<'_> {
    /// The wrapper answers QEMU's open. Without it the disk would be written in clear.
    fn as_it_is(&self, xml: &str) -> Result<Device, Refusal> {
        let Recipient { domain, facts } = self.recipient;
        if let Some(disk) = &self.before {
            let check = || match judge(self.broker, Some(facts), &disk.source)? {
                Some(volume) => {
                    check_emulator(&domain.name, domain, &format!("the protected volume {volume}"), &by_adopting)
                        .map_err(|refusal| refusal.of(&volume))
                }
                None => Ok(()),
            };
            check().map_err(|refusal| in_disk(disk, &refusal))?;
        }
        Ok(Device { xml: xml.to_owned(), volume: None, mapped: None })
    }

    fn by_xml(&self, xml: &str, live: bool) -> Result<Device, Refusal> {
        let facts = &self.recipient.facts;
        let xml = domain::rewrite_device(xml, &|_, source| judge(self.broker, Some(facts), source))?;
        let disk = lone_disk(&xml);
        let volume = disk.as_ref().and_then(|disk| disk.source.mapped_volume());
        let (Some(disk), Some(volume)) = (&disk, volume) else {
            disk.iter().try_for_each(|disk| self.check_no_mapping(disk))?;
            return Ok(Device { xml, volume: None, mapped: None });
        };
        let mapped = self.map(disk, &volume, live).map_err(|refusal| in_disk(disk, &refusal.of(&volume)))?;
        Ok(Device { xml, volume: Some(volume), mapped })
    }

    /// Whether a disk is no mapping under another name, and stands on none.
    fn check_no_mapping(&self, disk: &Disk) -> Result<(), Refusal> {
        let in_sight = disk.images().try_for_each(|image| check_in_sight(self.broker, image));
        in_sight.map_err(|refusal| in_disk(disk, &refusal))?;
        let Source::Path(path) = &disk.source else { return Ok(()) };
        let Ok(device) =
            block_device_at(path).map_err(|_| ()).and_then(|number| self.broker.identify(number).map_err(|_| ()))
        else {
            return Ok(());
        };
        match device.own_mappings().into_iter().next() {
            None => Ok(()),
            Some((volume, _)) => {
                let sentence = format!(
                    "{} is the mapping of volume {volume} or stands on it: name the volume's own device",
                    path.display()
                );
                Err(in_disk(disk, &Refusal::new(Reason::NotAllowed, sentence).of(&volume)))
            }
        }
    }

    fn map(&self, disk: &Disk, volume: &VolumeId, live: bool) -> Result<Option<Mapped>, Refusal> {
        let Recipient { domain, facts } = self.recipient;
        check_commands(disk, volume)?;
        check_chain(volume, disk.is_looked_into)?;
        check_guarded(self.broker, self.config, domain)?;
        let once_at = self.before.as_ref().and_then(|before| match &before.source {
            Source::Path(path) => Some(path),
            _ => None,
        });
        let device = Finder::new(self.broker, self.config, facts).find(volume, once_at)?;
        if !live {
            return self.broker.make_ready(&device, facts).map(|_| None);
        }
        if let Some(other) = domain.disks.iter().find(|other| other.source.mapped_volume().as_ref() == Some(volume)) {
            return Err(given_twice(&domain.name, volume, other));
        }
        check_alone(self.broker, &domain.name, volume, disk.is_written_alone)?;
        let what = format!("mapped for disk {} to be attached", disk.target);
        self.broker.map(&device, facts, disk.is_written_alone, &what).map(Some)
    }
}

/// The device `xml` as `recipient` has it, and what it is a disk of. Of a volume whose device is gone nothing is
/// known any more, and libvirt finds a disk by its target anyway.
pub fn detach(broker: &Broker, recipient: &Recipient, xml: &str) -> Device {
    let facts = &recipient.facts;
    let rewritten = match broker.config() {
        Ok(config) if config.hook.intercept == Intercept::Xml => {
            domain::rewrite_device(xml, &|_, source| judge(broker, Some(facts), source))
        }
        Ok(_) => Ok(xml.to_owned()),
        Err(fault) => Err(fault),
    };
    let xml = rewritten.unwrap_or_else(|_| xml.to_owned());
    let disk = lone_disk(&xml);
    let present = disk.as_ref().and_then(|disk| recipient.disk_called(&disk.target));
    let volume = present.or(disk.as_ref()).and_then(|disk| disk.source.mapped_volume());
    Device { xml, volume, mapped: None }
}
