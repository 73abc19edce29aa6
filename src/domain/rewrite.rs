//! Pointing the protected disks of a domain to their mappings, and back, in the XML alone.
//!
//! A disk that is protected gets `<source dev='/dev/mapper/volcrypt-ID'/>`. One that names its volume as a file
//! (`type='file'`) becomes `type='block'` with a raw driver as well. What stood there before is kept in a
//! `<volcrypt:disks>` of the domain's metadata. Every other byte stays, so that the way back is exact.
//!
//! What else a source says is as true of the mapping and stays: `startupPolicy`, `index`, `<seclabel>`, `<slices>`
//! (parts of what the guest sees, as before). What would read or write the volume past its mapping is refused:
//! `<encryption>`, `<reservations>`, `<dataStore>`, `fdgroup`, and of the disk `<mirror>` and `<transient>`. Not
//! looked at is what libvirt turns into a path only later: disks of storage pools (`type='volume'`), NVMe
//! controllers by their PCI address, and vhost-user sockets.
//!
//! A lone `<disk>`, which is what `virsh attach-device` takes, has no metadata. It is rewritten, and there is no
//! way back: whoever wrote it keeps it.

mod disk;
mod encoding;
mod note;

use std::collections::HashMap;
use std::path::PathBuf;

use roxmltree::{Document, Node};

use self::disk::Plan;
use self::encoding::check_encoding;
use super::splice::{Edit, spliced};
use super::xml::{Disk, InvalidXml, Source, children, devices, is};
use super::{Facts, in_disk};
use crate::refusal::{Reason, Refusal};
use crate::volume::VolumeId;

/// The longest XML that is rewritten, in bytes. A domain with a thousand disks needs about half a megabyte, and
/// this much still fits a message of the control socket.
pub const MAX_XML: usize = 4 << 20;

/// Says which protected volume a source is for a domain, if it is one, or that it must not be used. A lone disk
/// belongs to no domain yet.
pub type Judge<'a> = dyn Fn(Option<&Facts>, &Source) -> Result<Option<VolumeId>, Refusal> + 'a;

/// What [`rewrite`] came to.
#[derive(Debug, PartialEq, Eq)]
pub struct Rewritten {
    /// The text with every protected disk on its mapping.
    pub xml: String,
    /// The disks that were changed, in the order of the document.
    pub disks: Vec<OnMapping>,
}

/// A disk that was pointed to a mapping.
#[derive(Debug, PartialEq, Eq)]
pub struct OnMapping {
    /// The name the guest's bus gives it.
    pub target: String,
    /// The volume that is mapped.
    pub volume: VolumeId,
}

/// Points every disk in `xml`, a `<domain>` or a lone `<disk>`, that `judge` knows as protected to its mapping.
/// To do it twice changes nothing.
///
/// # Errors
/// [`Reason::Configuration`] when the text is too long or is neither of the two; [`Reason::NotAllowed`] when a
/// protected disk would get around its mapping, and when libvirt could read a disk otherwise than it was read
/// here; and those of `judge`.
pub fn rewrite(xml: &str, judge: &Judge<'_>) -> Result<Rewritten, Refusal> {
    let document = parse(xml)?;
    let root = document.root_element();
    let mut rewriting = Rewriting { xml, judge, facts: None, used: HashMap::new(), edits: Vec::new() };
    let (mut disks, mut entries) = (Vec::new(), Vec::new());
    if is(&root, "disk") {
        rewriting.disk(&root, &mut disks)?;
    } else {
        refuse_look_alikes(&root)?;
        rewriting.facts = Some(Facts::read(&root));
        for element in devices(&root, "disk") {
            entries.extend(rewriting.disk(&element, &mut disks)?);
        }
        devices(&root, "hostdev").try_for_each(|element| rewriting.host_device(&element))?;
        rewriting.edits.extend(note::with(xml, &root, entries)?);
    }
    Ok(Rewritten { xml: spliced(xml, rewriting.edits), disks })
}

/// `xml` as it was before [`rewrite`]: byte for byte, if nobody changed it since; otherwise every disk that is
/// still on its mapping has its source again, and what was changed stays. Only disks that [`rewrite`] changed are
/// touched.
///
/// # Errors
/// [`Reason::Configuration`] when the text is too long, is no `<domain>`, or the note in its metadata is damaged;
/// [`Reason::NotAllowed`] for a lone `<disk>` on a mapping.
pub fn unrewrite(xml: &str) -> Result<String, Refusal> {
    let document = parse(xml)?;
    let root = document.root_element();
    if is(&root, "disk") {
        return refuse_lone(&root).map(|()| xml.to_owned());
    }
    let Some(element) = note::find(&root)? else { return Ok(xml.to_owned()) };
    let note = note::Note::read(&element)?;
    let entries: HashMap<_, _> = note.entries.iter().map(|entry| (&entry.volume, entry)).collect();
    let mut edits = vec![note::without(xml, &element, note.metadata)];
    for element in devices(&root, "disk") {
        let disk = Disk::read(&element);
        if let Some(entry) = disk.source.mapped_volume().and_then(|volume| entries.get(&volume)) {
            edits.extend(disk::undone(xml, &element, entry).map_err(|refusal| in_disk(&disk, &refusal))?);
        }
    }
    let before = spliced(xml, edits);
    // The note comes from outside, and what it says stands in the text now.
    match Document::parse(&before) {
        Ok(_) => Ok(before),
        Err(error) => Err(note::damaged(&format!("what it says makes no XML ({error})"))),
    }
}

/// A lone device, which is what `virsh attach-device` takes: if it is a disk that `judge` knows as protected, it is
/// pointed to its mapping; every other device stays as it is.
///
/// # Errors
/// Those of [`rewrite`], and [`Reason::NotAllowed`] for a host device that is a protected volume.
pub fn rewrite_device(xml: &str, judge: &Judge<'_>) -> Result<String, Refusal> {
    let document = parse_any(xml)?;
    let root = document.root_element();
    let mut rewriting = Rewriting { xml, judge, facts: None, used: HashMap::new(), edits: Vec::new() };
    match (root.tag_name().namespace(), root.tag_name().name()) {
        (None, "disk") => drop(rewriting.disk(&root, &mut Vec::new())?),
        (None, "hostdev") => rewriting.host_device(&root)?,
        // libvirt looks at the name alone.
        (Some(namespace), name @ ("disk" | "hostdev")) => {
            let what = disk::of_namespace(&format!("a <{name}>"), namespace);
            return Err(not_allowed(format!("the device is {what}")));
        }
        _ => {}
    }
    Ok(spliced(xml, rewriting.edits))
}

/// The disk, if `xml` is a lone one.
pub fn lone_disk(xml: &str) -> Option<Disk> {
    let document = parse_any(xml).ok()?;
    let root = document.root_element();
    is(&root, "disk").then(|| Disk::read(&root))
}

/// Where the volumes of a rewritten domain were before, as its note says it.
///
/// # Errors
/// [`Reason::Configuration`] when `xml` cannot be read or the note is damaged.
pub fn sources_before(xml: &str) -> Result<HashMap<VolumeId, PathBuf>, Refusal> {
    let document = parse(xml)?;
    let Some(element) = note::find(&document.root_element())? else { return Ok(HashMap::new()) };
    let entries = note::Note::read(&element)?.entries.into_iter();
    // What stood between quotes has its references still.
    let unescaped = |text: &str| {
        let element = format!("<a b=\"{}\"/>", text.replace('"', "&quot;"));
        Document::parse(&element).ok()?.root_element().attribute("b").map(PathBuf::from)
    };
    Ok(entries.filter_map(|entry| Some((entry.volume, unescaped(entry.before.path())?))).collect())
}

/// The work on one document.
struct Rewriting<'a> {
    xml: &'a str,
    judge: &'a Judge<'a>,
    facts: Option<Facts>,
    /// Which disk has which volume.
    used: HashMap<VolumeId, String>,
    edits: Vec<Edit>,
}

impl Rewriting<'_> {
    /// Plans one disk, and says what has to be kept of it.
    fn disk(&mut self, element: &Node<'_, '_>, changed: &mut Vec<OnMapping>) -> Result<Option<note::Entry>, Refusal> {
        let disk = Disk::read(element);
        let judge = |source: &Source| (self.judge)(self.facts.as_ref(), source);
        let plan = disk::plan(self.xml, element, &disk, &judge).map_err(|refusal| in_disk(&disk, &refusal))?;
        match plan {
            Plan::Leave => {
                if let Some(volume) = disk.source.mapped_volume() {
                    self.uses(&disk, &volume)?;
                }
                Ok(None)
            }
            Plan::Change { entry, edits } => {
                self.uses(&disk, &entry.volume)?;
                self.edits.extend(edits);
                changed.push(OnMapping { target: disk.target, volume: entry.volume.clone() });
                Ok(Some(entry))
            }
        }
    }

    /// Notes that `disk` has a volume, which no other disk may have.
    fn uses(&mut self, disk: &Disk, volume: &VolumeId) -> Result<(), Refusal> {
        match self.used.insert(volume.clone(), disk.target.clone()) {
            None => Ok(()),
            Some(other) => {
                let sentence = format!(
                    "it is on volume {volume}, as disk {} is, and the two would overwrite each other's data: take one of \
                     them out",
                    other.escape_debug()
                );
                Err(in_disk(disk, &not_allowed(sentence).of(volume)))
            }
        }
    }

    /// A SCSI device that is passed to the guest gets past any mapping.
    fn host_device(&self, element: &Node<'_, '_>) -> Result<(), Refusal> {
        let device = Disk::read(element);
        let volume = disk::source_of(element).and_then(|_| (self.judge)(self.facts.as_ref(), &device.source));
        match volume.map_err(|refusal| in_disk(&device, &refusal))? {
            None => Ok(()),
            Some(volume) => Err(in_disk(&device, &disk::not_by_qemu(&device.source, &volume).of(&volume))),
        }
    }
}

fn parse(xml: &str) -> Result<Document<'_>, Refusal> {
    let document = parse_any(xml)?;
    let root = document.root_element();
    match is(&root, "domain") || is(&root, "disk") {
        true => Ok(document),
        false => Err(unreadable(InvalidXml::root(&root, "neither libvirt's <domain> nor a <disk>"))),
    }
}

fn parse_any(xml: &str) -> Result<Document<'_>, Refusal> {
    if xml.len() > MAX_XML {
        return Err(Refusal::new(Reason::Configuration, format!("the XML is longer than {MAX_XML} bytes")));
    }
    let document =
        check_encoding(xml).and_then(|()| Document::parse(xml).map_err(|error| InvalidXml(error.to_string())));
    document.map_err(unreadable)
}

fn unreadable(error: InvalidXml) -> Refusal {
    Refusal::new(Reason::Configuration, error.to_string())
}

/// Elements that are none of libvirt's today, and could be taken for one.
fn refuse_look_alikes(root: &Node<'_, '_>) -> Result<(), Refusal> {
    let named = |node: Node<'_, '_>, names: &[&str]| match (node.tag_name().namespace(), node.tag_name().name()) {
        (Some(namespace), name) if names.contains(&name) => {
            let what = disk::of_namespace(&format!("a <{name}>"), namespace);
            Err(not_allowed(format!("the domain has {what}")))
        }
        _ => Ok(()),
    };
    root.children().try_for_each(|child| named(child, &["devices"]))?;
    let mut devices = children(*root, "devices").flat_map(|devices| devices.children());
    devices.try_for_each(|child| named(child, &["disk", "hostdev"]))
}

fn refuse_lone(disk: &Node<'_, '_>) -> Result<(), Refusal> {
    let disk = Disk::read(disk);
    match disk.source.mapped_volume() {
        None => Ok(()),
        Some(volume) => {
            let sentence = "a lone <disk> has no metadata that would say what its source was: use the XML that was \
                            rewritten";
            Err(in_disk(&disk, &not_allowed(sentence).of(&volume)))
        }
    }
}

fn not_allowed(sentence: impl Into<String>) -> Refusal {
    Refusal::new(Reason::NotAllowed, sentence)
}

#[cfg(test)]
mod tests;
