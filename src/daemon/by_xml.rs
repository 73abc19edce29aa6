//! Domains whose XML names their mappings (`intercept = "xml"`): what such a domain needs before it starts here or comes
//! here.
//!
//! Nothing stands between QEMU and what it opens here. So a protected volume may be named by its mapping only, and
//! the guard has to keep its own device shut, which is what a disk that was attached past volcrypt would open.

use std::cell::OnceCell;
use std::collections::HashMap;
use std::path::{Path, PathBuf};

use super::broker::{Broker, Finder, no_such_device};
use super::holds::{Mapped, Until};
use super::inspection::{check_chain, check_commands, check_unit};
use super::rewrite::rewrite;
use super::sight::check_in_sight;
use crate::domain::{
    Disk, Domain, Facts, Image, InvalidXml, Release, Source, in_disk, quoted, release, sources_before,
};
use crate::guest::{block_device_at, is_no_device};
use crate::policy::{Config, DEFAULT_PARTITION, OtherEmulators};
use crate::refusal::{Reason, Refusal};
use crate::volume::VolumeId;

/// Makes the mappings that `domain` names and holds them until it has started. `once_at` is where its volumes were
/// before its XML was rewritten.
///
/// # Errors
/// When one of them cannot be made or must not be opened, when a disk names a protected volume by anything but its
/// mapping, and when the guard is off.
pub fn prepare(
    broker: &Broker,
    config: &Config,
    name: &str,
    domain: &Domain,
    once_at: &HashMap<VolumeId, PathBuf>,
) -> Result<(), Refusal> {
    if !config.rules().is_empty() && config.hook.other_emulators == OtherEmulators::Refuse {
        check_guarded(broker, config, domain)?;
    }
    let facts = domain.facts();
    let finder = Finder::new(broker, config, &facts);
    let (guard, given) = (OnceCell::new(), HashMap::new());
    let used = Vec::new();
    let mut preparation = Preparation { broker, config, domain, facts: &facts, finder, once_at, guard, given, used };
    let mut mapped = Vec::new();
    for disk in &domain.disks {
        for image in disk.images() {
            mapped.extend(preparation.image(disk, image).map_err(|refusal| in_disk(disk, &refusal))?);
        }
    }
    broker.holds().hold(name, mapped, Until::Started);
    // Only now does another domain that starts at the same time see this one.
    preparation.check_alone().inspect_err(|_| broker.holds().ended(name))
}

/// The XML with which libvirt is to take the domain in `xml` from another host or from a file, if it is to be another one:
/// with its protected disks on their mappings, and the emulator that it had before it was adopted elsewhere. No mapping
/// is made yet: libvirt asks for the start as well.
///
/// # Errors
/// When a disk cannot be pointed to its mapping, and when a start would be refused.
pub fn admit(broker: &Broker, config: &Config, xml: &str) -> Result<Option<String>, Refusal> {
    let unreadable = |error: InvalidXml| Refusal::new(Reason::Configuration, error.to_string());
    let mut here = rewrite(broker, xml)?;
    if let Release::Changed { xml, .. } = release(&here).map_err(unreadable)? {
        here = xml;
    }
    let domain = Domain::parse(&here).map_err(unreadable)?;
    if !config.rules().is_empty() && config.hook.other_emulators == OtherEmulators::Refuse {
        check_guarded(broker, config, &domain)?;
    }
    let (facts, once_at) = (domain.facts(), sources_before(&here).unwrap_or_default());
    let finder = Finder::new(broker, config, &facts);
    for disk in &domain.disks {
        let mapped = disk.images().filter_map(|image| Some((image.source.mapped_volume()?, image.is_looked_into)));
        for (volume, is_looked_into) in mapped {
            let check = || {
                check_commands(disk, &volume)?;
                check_chain(&volume, is_looked_into)?;
                check_guarded(broker, config, &domain)?;
                broker.check_ready(&finder.find(&volume, once_at.get(&volume))?, &facts)
            };
            check().map_err(|refusal| in_disk(disk, &refusal.of(&volume)))?;
        }
    }
    Ok((here != xml).then_some(here))
}

struct Preparation<'a> {
    broker: &'a Broker,
    config: &'a Config,
    domain: &'a Domain,
    facts: &'a Facts,
    finder: Finder<'a>,
    once_at: &'a HashMap<VolumeId, PathBuf>,
    /// What came of asking for the guard.
    guard: OnceCell<Result<(), Refusal>>,
    /// The volumes that disks are the whole of.
    given: HashMap<VolumeId, &'a Disk>,
    /// Every volume that is mapped, with the disk for which it is, and whether that writes to it alone.
    used: Vec<(VolumeId, &'a Disk, bool)>,
}

impl<'a> Preparation<'a> {
    fn image(&mut self, disk: &'a Disk, image: Image<'_>) -> Result<Vec<Mapped>, Refusal> {
        let Image { source, is_looked_into, .. } = image;
        let path = match source {
            Source::Path(path) => path,
            Source::IscsiUnit { target, lun } => {
                return check_unit(self.broker, target, *lun, self.facts).map(|()| Vec::new());
            }
            Source::Other => return Ok(Vec::new()),
        };
        let writes_alone = *source == disk.source && disk.is_written_alone;
        if let Some(volume) = VolumeId::of_mapping(path) {
            self.give(disk, source, &volume)?;
            return Ok(vec![self.mapping(disk, &volume, writes_alone, is_looked_into)?]);
        }
        check_in_sight(self.broker, image)?;
        let device = match block_device_at(path) {
            Ok(number) => self.broker.identify(number)?,
            // An image file, which no rule protects; or nothing yet, about which libvirt says its own.
            Err(error) if is_no_device(&error) => return Ok(Vec::new()),
            Err(error) => return Err(no_such_device(path, &error)),
        };
        if let Some(volume) = self.broker.judge(&device, self.facts)? {
            return Err(named_by_its_device(&self.domain.name, path, &volume));
        }
        if self.config.guard.enabled && self.config.is_guarded(&device) {
            return Err(shut_by_the_guard(path));
        }
        if let Some(volume) = device.own_volume() {
            self.give(disk, source, &volume)?;
        }
        // A mapping that is there already for somebody else, under another name, or what stands on one, of which others
        // may have another part.
        let itself = device.own_volume();
        let mapped = |(volume, _): (VolumeId, _)| {
            self.mapping(disk, &volume, writes_alone && itself.as_ref() == Some(&volume), is_looked_into)
        };
        device.own_mappings().into_iter().map(mapped).collect()
    }

    /// Notes that `volume` is `source`, which may be a disk itself or what one stands on and only reads.
    fn give(&mut self, disk: &'a Disk, source: &Source, volume: &VolumeId) -> Result<(), Refusal> {
        if *source != disk.source {
            return Ok(());
        }
        match self.given.get(volume) {
            Some(other) if disk.is_written_alone || other.is_written_alone => {
                Err(given_twice(&self.domain.name, volume, other).of(volume))
            }
            Some(_) => Ok(()),
            None => {
                self.given.insert(volume.clone(), disk);
                Ok(())
            }
        }
    }

    /// Whether no other domain has what the domain is to write to, nor writes what the domain is to have.
    fn check_alone(&self) -> Result<(), Refusal> {
        self.used.iter().try_for_each(|(volume, disk, is_written_alone)| {
            let alone = check_alone(self.broker, &self.domain.name, volume, *is_written_alone);
            alone.map_err(|refusal| in_disk(disk, &refusal.of(volume)))
        })
    }

    fn mapping(
        &mut self,
        disk: &'a Disk,
        volume: &VolumeId,
        is_written_alone: bool,
        is_looked_into: bool,
    ) -> Result<Mapped, Refusal> {
        let checked = check_commands(disk, volume).and(check_chain(volume, is_looked_into));
        checked.map_err(|refusal| refusal.of(volume))?;
        let guard = self.guard.get_or_init(|| check_guarded(self.broker, self.config, self.domain));
        guard.clone().map_err(|refusal| refusal.of(volume))?;
        let device = self.finder.find(volume, self.once_at.get(volume))?;
        let what = format!("mapped for disk {}", disk.target);
        let mapped = self.broker.map(&device, self.facts, is_written_alone, &what)?;
        self.used.push((volume.clone(), disk, is_written_alone));
        tracing::info!(
            domain = self.domain.name, volume = %volume,
            "the mapping of volume {volume} is there for disk {} of domain {}", disk.target.escape_debug(), self.domain.name
        );
        Ok(mapped)
    }
}

/// Whether raw devices of protected volumes are shut to `domain`.
pub fn check_guarded(broker: &Broker, config: &Config, domain: &Domain) -> Result<(), Refusal> {
    check_guard(broker, &domain.name)?;
    let partition = domain.partition.as_deref().unwrap_or(DEFAULT_PARTITION);
    match config.guard.has_partition(partition) {
        true => Ok(()),
        false => Err(Refusal::new(
            Reason::NotAllowed,
            format!(
                "with intercept = \"xml\" the guard alone keeps domain {} from the raw devices of protected volumes, and it \
                 is for the cgroup {} only, which the domain's <partition> {partition:?} is not in: change the partition, or \
                 cgroup in [guard]",
                domain.name, config.guard.cgroup
            ),
        )),
    }
}

fn check_guard(broker: &Broker, domain: &str) -> Result<(), Refusal> {
    match broker.guard_fault() {
        None => Ok(()),
        Some(fault) => Err(Refusal::new(
            Reason::NotAllowed,
            format!(
                "with intercept = \"xml\" the guard alone keeps domain {domain} from the raw devices of protected volumes, \
                 and it is off: {fault}"
            ),
        )),
    }
}

/// The refusal of a disk on a volume that `domain` has as the disk `other` already. QEMU's own lock does not see that two
/// names are one device.
pub fn given_twice(domain: &str, volume: &VolumeId, other: &Disk) -> Refusal {
    let sentence = format!(
        "domain {domain} has volume {volume} already, as disk {}, and the two would overwrite each other's data",
        other.target.escape_debug()
    );
    Refusal::new(Reason::NotAllowed, sentence)
}

/// Whether no domain but `domain` has `volume`; if none of them is to write to it alone, they may have it together. Each
/// QEMU has a node of its own for it here, so their locks do not meet.
pub fn check_alone(broker: &Broker, domain: &str, volume: &VolumeId, is_written_alone: bool) -> Result<(), Refusal> {
    match broker.rival(volume, domain, is_written_alone)? {
        None => Ok(()),
        Some(other) => {
            let sentence = format!(
                "domain {other} has volume {volume}, and the two would overwrite each other's data: shut that one down or \
                 detach the volume from it, or mark the disk <shareable/> in both if what is in it is made for that"
            );
            Err(Refusal::new(Reason::NotAllowed, sentence))
        }
    }
}

fn shut_by_the_guard(path: &Path) -> Refusal {
    let sentence = format!(
        "{} passes for this domain, and the guard shuts it to all of them, because a rule protects or denies it for others \
         and with intercept = \"xml\" nothing else tells them apart: have the rules treat it alike for all",
        path.display()
    );
    Refusal::new(Reason::NotAllowed, sentence)
}

fn named_by_its_device(name: &str, path: &Path, volume: &VolumeId) -> Refusal {
    let sentence = format!(
        "{} is the protected volume {volume}, and with intercept = \"xml\" a domain has to name {}: run 'volcrypt \
         domain rewrite {}'",
        path.display(),
        volume.mapping_path(),
        quoted(name)
    );
    Refusal::new(Reason::NotAllowed, sentence).of(volume)
}
