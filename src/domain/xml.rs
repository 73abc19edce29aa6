use std::fmt;
use std::path::PathBuf;

use roxmltree::{Document, Node};

use super::Facts;
use crate::volume::VolumeId;

/// The beginning of Nova's namespaces; a version follows: nova/virt/libvirt/config.py.
const NOVA_NAMESPACE: &str = "http://openstack.org/xmlns/libvirt/nova/";

/// The namespace of an `<owner>` that is set by hand. It is one of its own because libvirt keeps one element
/// for each namespace: <https://libvirt.org/formatdomain.html#general-metadata>.
const OWNER_NAMESPACE: &str = "https://volcrypt.org/xmlns/libvirt/owner/1";

/// What volcrypt needs to know of a domain.
#[derive(Debug, PartialEq, Eq)]
pub struct Domain {
    /// Its name.
    pub name: String,
    /// Its UUID.
    pub uuid: Option<String>,
    /// Whom it belongs to: the project in the metadata that Nova writes, or else the text of volcrypt's
    /// own `<owner>` there, which `virsh metadata` can set.
    pub owner: Option<String>,
    /// The program that runs it.
    pub emulator: Option<PathBuf>,
    /// The resource partition that it asks for, in libvirt's notation: `/machine` or the like.
    pub partition: Option<String>,
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
    /// Whether it is written to, and not marked as one that others write to as well: neither `<readonly/>` nor
    /// `<shareable/>`, nor a CD-ROM.
    pub is_written_alone: bool,
    /// Whether libvirt looks into the image to learn on which others it stands: see [`Layer::is_looked_into`].
    pub is_looked_into: bool,
    /// Whether the XML says that it is a block device (`type='block'`).
    pub is_device: bool,
    /// The images on which it stands, as far as the XML says so, from the top.
    pub beneath: Vec<Layer>,
}

/// An image on which another one stands: a `<backingStore>`.
#[derive(Debug, PartialEq, Eq)]
pub struct Layer {
    /// Where its data is.
    pub source: Source,
    /// Whether libvirt looks into the image itself to learn on which others it stands. It does where the format
    /// knows such things, as qcow2 does, and the XML does not say it; `<backingStore/>` says that there is none.
    pub is_looked_into: bool,
    /// Whether the XML says that it is a block device.
    pub is_device: bool,
}

/// One of the images that a disk is made of.
#[derive(Clone, Copy, Debug)]
pub struct Image<'a> {
    /// Where its data is.
    pub source: &'a Source,
    /// See [`Layer::is_looked_into`].
    pub is_looked_into: bool,
    /// Whether the XML says that it is a block device.
    pub is_device: bool,
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
        match is(&root, "domain") {
            true => Ok(Domain::from_element(&root)),
            false => Err(InvalidXml::root(&root, "not libvirt's <domain>")),
        }
    }

    /// Reads the element `<domain>` of a larger document.
    pub(crate) fn from_element(root: &Node<'_, '_>) -> Self {
        let emulator = devices(root, "emulator").next();
        let Facts { name, uuid, owner } = Facts::read(root);
        Domain {
            name,
            uuid,
            owner,
            emulator: emulator.and_then(|emulator| text(&emulator)).map(PathBuf::from),
            partition: child(root, "resource").and_then(|resource| text_of(&resource, "partition")),
            disks: devices(root, "disk").chain(devices(root, "hostdev")).map(|disk| Disk::read(&disk)).collect(),
        }
    }

    /// Which domain it is.
    pub fn facts(&self) -> Facts {
        Facts { name: self.name.clone(), uuid: self.uuid.clone(), owner: self.owner.clone() }
    }
}

impl Facts {
    /// Reads them of an element `<domain>`.
    pub(super) fn read(root: &Node<'_, '_>) -> Self {
        Facts {
            name: text_of(root, "name").unwrap_or_default(),
            uuid: text_of(root, "uuid"),
            owner: child(root, "metadata").and_then(|metadata| owner(&metadata)),
        }
    }
}

impl Disk {
    pub(super) fn read(disk: &Node<'_, '_>) -> Self {
        let [target, source, format, layer, readonly, shareable] =
            first(disk, ["target", "source", "driver", "backingStore", "readonly", "shareable"]);
        let target = target.and_then(|target| target.attribute("dev")).unwrap_or("without a target");
        let device = disk.attribute("device");
        Disk {
            target: target.to_owned(),
            device: device.unwrap_or(disk.tag_name().name()).to_owned(),
            source: Source::of(source),
            is_written_alone: device != Some("cdrom") && readonly.is_none() && shareable.is_none(),
            is_looked_into: is_looked_into(format, layer),
            is_device: is_device(disk, source),
            beneath: layer.map(|layer| Layer::from_the_top(&layer)).unwrap_or_default(),
        }
    }

    /// Whether it is a drive that can do without a medium.
    pub fn is_drive(&self) -> bool {
        matches!(self.device.as_str(), "cdrom" | "floppy")
    }

    /// The images that it is made of, from the top.
    pub fn images(&self) -> impl Iterator<Item = Image<'_>> {
        let Disk { source, is_looked_into, is_device, beneath, .. } = self;
        let top = Image { source, is_looked_into: *is_looked_into, is_device: *is_device };
        let beneath = beneath.iter().map(|Layer { source, is_looked_into, is_device }| Image {
            source,
            is_looked_into: *is_looked_into,
            is_device: *is_device,
        });
        std::iter::once(top).chain(beneath)
    }
}

impl Layer {
    /// The image in the element `<backingStore>`, and those beneath it. An empty element says that there is none.
    fn from_the_top(layer: &Node<'_, '_>) -> Vec<Self> {
        let mut layers = Vec::new();
        let mut next = Some(*layer);
        while let Some(layer) = next {
            let [source, format, beneath] = first(&layer, ["source", "format", "backingStore"]);
            if source.is_none() {
                break;
            }
            layers.push(Layer {
                source: Source::of(source),
                is_looked_into: is_looked_into(format, beneath),
                is_device: is_device(&layer, source),
            });
            next = beneath;
        }
        layers
    }
}

/// libvirt reads `dev` of a block device, and `file` of everything else that has a path.
fn is_device(image: &Node<'_, '_>, source: Option<Node<'_, '_>>) -> bool {
    image.attribute("type") == Some("block") || source.is_some_and(|source| source.has_attribute("dev"))
}

/// The formats in which an image says on which other one it stands (libvirt's src/storage_file/storage_file_probe.c).
const STANDING_ON_OTHERS: [&str; 5] = ["cow", "qcow", "qcow2", "qed", "vmdk"];

/// `format` is the element whose `type` says the image's format, and `layer` that of the image beneath.
fn is_looked_into(format: Option<Node<'_, '_>>, layer: Option<Node<'_, '_>>) -> bool {
    let format = format.and_then(|format| format.attribute("type")).unwrap_or("raw");
    STANDING_ON_OTHERS.contains(&format) && layer.is_none()
}

impl Source {
    /// The volume whose mapping it names.
    pub fn mapped_volume(&self) -> Option<VolumeId> {
        match self {
            Source::Path(path) => VolumeId::of_mapping(path),
            _ => None,
        }
    }

    fn of(source: Option<Node<'_, '_>>) -> Self {
        source.map_or(Source::Other, |source| Source::read(&source))
    }

    pub(super) fn read(source: &Node<'_, '_>) -> Self {
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

/// Nova's `<nova:instance><nova:owner><nova:project uuid='…'>`, of whichever version of its namespace.
fn owner(metadata: &Node<'_, '_>) -> Option<String> {
    let within = |node: Node<'_, '_>, name: &str, namespace: &str| {
        let tag = node.tag_name();
        node.is_element() && tag.name() == name && tag.namespace().is_some_and(|own| own.starts_with(namespace))
    };
    let nova = metadata.children().find(|node| within(*node, "instance", NOVA_NAMESPACE)).and_then(|instance| {
        let owner = instance.children().find(|node| within(*node, "owner", NOVA_NAMESPACE))?;
        let project = owner.children().find(|node| within(*node, "project", NOVA_NAMESPACE))?;
        project.attribute("uuid").map(str::to_owned)
    });
    let own = || {
        let owner = metadata.children().find(|node| node.has_tag_name((OWNER_NAMESPACE, "owner")))?;
        Some(owner.text()?.trim().to_owned())
    };
    nova.or_else(own).filter(|owner| !owner.is_empty())
}

/// The elements `domain/devices/NAME`. There may be several `<devices>`: libvirt reads them all.
pub(super) fn devices<'a, 'input>(
    root: &Node<'a, 'input>,
    name: &'static str,
) -> impl Iterator<Item = Node<'a, 'input>> {
    children(*root, "devices").flat_map(move |devices| children(devices, name))
}

pub(super) fn is(node: &Node<'_, '_>, name: &str) -> bool {
    node.is_element() && node.tag_name().namespace().is_none() && node.tag_name().name() == name
}

pub(super) fn children<'a, 'input>(
    node: Node<'a, 'input>,
    name: &'static str,
) -> impl Iterator<Item = Node<'a, 'input>> {
    node.children().filter(move |child| is(child, name))
}

pub(super) fn child<'a, 'input>(node: &Node<'a, 'input>, name: &'static str) -> Option<Node<'a, 'input>> {
    children(*node, name).next()
}

/// The first child of each of these names, found in one pass: a domain may have a thousand disks.
fn first<'a, 'input, const N: usize>(
    node: &Node<'a, 'input>,
    names: [&'static str; N],
) -> [Option<Node<'a, 'input>>; N] {
    let mut found = [None; N];
    for child in node.children().filter(Node::is_element) {
        let tag = child.tag_name();
        if tag.namespace().is_none()
            && let Some(place) = names.iter().position(|name| *name == tag.name())
        {
            found[place].get_or_insert(child);
        }
    }
    found
}

fn text_of(node: &Node<'_, '_>, name: &'static str) -> Option<String> {
    text(&child(node, name)?)
}

fn text(node: &Node<'_, '_>) -> Option<String> {
    Some(node.text()?.trim().to_owned())
}

/// A text that is no domain's XML.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InvalidXml(pub(super) String);

impl InvalidXml {
    pub(super) fn root(root: &Node<'_, '_>, but: &str) -> Self {
        let name = root.tag_name();
        let of = |namespace: &str| format!(" of the namespace {}", namespace.escape_debug());
        let namespace = name.namespace().map(of).unwrap_or_default();
        InvalidXml(format!("the root element is <{}>{namespace}, {but}", name.name()))
    }
}

impl fmt::Display for InvalidXml {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the domain's XML cannot be read: {}", self.0)
    }
}

impl std::error::Error for InvalidXml {}
