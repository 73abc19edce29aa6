use std::fmt;
use std::path::PathBuf;

use roxmltree::{Document, Node};

/// What volcrypt needs to know of a domain.
#[derive(Debug, PartialEq, Eq)]
pub struct Domain {
    /// Its name.
    pub name: String,
    /// Its UUID.
    pub uuid: Option<String>,
    /// The program that runs it.
    pub emulator: Option<PathBuf>,
    /// Its disks, in the order of the document, and then its host devices, which may be SCSI units.
    pub disks: Vec<Disk>,
}

/// A `<disk>` or a `<hostdev>` of a domain.
#[derive(Debug, PartialEq, Eq)]
pub struct Disk {
    /// The name the guest's bus gives it, for example `sda`: unique within the domain.
    pub target: String,
    /// The `device` attribute: `disk`, `lun`, `cdrom` or `floppy`; `hostdev` for a host device.
    pub device: String,
    /// Where its data is.
    pub source: Source,
}

/// Where a disk's data is.
#[derive(Debug, PartialEq, Eq)]
pub enum Source {
    /// A path on this host: a block device or a file.
    Path(PathBuf),
    /// A logical unit that QEMU itself reaches, past the host's initiator.
    IscsiUnit {
        /// The name of the target.
        target: String,
        /// The logical unit number.
        lun: u64,
    },
    /// No source, or one that is no path and no iSCSI unit.
    Other,
}

impl Domain {
    /// Reads a domain's XML as libvirt does: only `domain/devices/disk`, elements only if they are in no
    /// namespace (its XPath asks for that), attributes whatever their namespace (libxml2's
    /// `xmlGetProp` ignores it).
    ///
    /// # Errors
    /// When the text is not one well-formed document with a `<domain>` at its root.
    pub fn parse(text: &str) -> Result<Self, InvalidXml> {
        let document = Document::parse(text).map_err(|error| InvalidXml(error.to_string()))?;
        let root = document.root_element();
        if !is(&root, "domain") {
            let name = root.tag_name();
            let namespace =
                name.namespace().map(|namespace| format!(" of the namespace {namespace}")).unwrap_or_default();
            return Err(InvalidXml(format!(
                "the root element is <{}>{namespace}, not libvirt's <domain>",
                name.name()
            )));
        }
        let devices = child(&root, "devices");
        let devices_of = |name: &'static str| devices.into_iter().flat_map(move |node| children(node, name));
        Ok(Domain {
            name: text_of(&root, "name").unwrap_or_default(),
            uuid: text_of(&root, "uuid"),
            emulator: devices.and_then(|node| text_of(&node, "emulator")).map(PathBuf::from),
            disks: devices_of("disk").chain(devices_of("hostdev")).map(|disk| Disk::read(&disk)).collect(),
        })
    }
}

impl Disk {
    fn read(disk: &Node<'_, '_>) -> Self {
        let target = child(disk, "target").and_then(|target| target.attribute("dev")).unwrap_or("without a target");
        Disk {
            target: target.to_owned(),
            device: disk.attribute("device").unwrap_or(disk.tag_name().name()).to_owned(),
            source: child(disk, "source").map_or(Source::Other, |source| Source::read(&source)),
        }
    }
}

impl Source {
    fn read(source: &Node<'_, '_>) -> Self {
        let path = source.attribute("dev").or_else(|| source.attribute("file"));
        match (path, source.attribute("protocol"), source.attribute("name")) {
            (Some(path), _, _) => Source::Path(PathBuf::from(path)),
            (None, Some("iscsi"), Some(name)) => {
                // libvirt: the target's name, a slash and the unit's number; the number may be missing.
                let (target, lun) = name.rsplit_once('/').unwrap_or((name, "0"));
                Source::IscsiUnit { target: target.to_owned(), lun: lun.parse().unwrap_or(0) }
            }
            _ => Source::Other,
        }
    }
}

fn is(node: &Node<'_, '_>, name: &str) -> bool {
    node.is_element() && node.tag_name().namespace().is_none() && node.tag_name().name() == name
}

fn children<'a, 'input>(node: Node<'a, 'input>, name: &'static str) -> impl Iterator<Item = Node<'a, 'input>> {
    node.children().filter(move |child| is(child, name))
}

fn child<'a, 'input>(node: &Node<'a, 'input>, name: &'static str) -> Option<Node<'a, 'input>> {
    children(*node, name).next()
}

fn text_of(node: &Node<'_, '_>, name: &'static str) -> Option<String> {
    Some(child(node, name)?.text()?.trim().to_owned())
}

/// A text that is no domain's XML.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InvalidXml(String);

impl fmt::Display for InvalidXml {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the domain's XML cannot be read: {}", self.0)
    }
}

impl std::error::Error for InvalidXml {}
