use roxmltree::{Attribute, Node};

use super::super::splice::{Edit, indentation_before, is_space, name_end, name_range, value_range, with_separator};
use super::super::xml::{Disk, Source, child, children, is};
use super::super::{passes_commands, reached_by_qemu};
use super::not_allowed;
use super::note::{Before, Driver, Entry};
use crate::refusal::{Reason, Refusal};
use crate::volume::VolumeId;

/// The driver of a disk that had none, as libvirt would write it.
const RAW_DRIVER: &str = "<driver name='qemu' type='raw'/>";

/// What becomes of a disk.
pub(super) enum Plan {
    /// It stays as it is.
    Leave,
    /// It is pointed to its mapping.
    Change {
        /// What stood there before.
        entry: Entry,
        /// What has to be changed.
        edits: Vec<Edit>,
    },
}

/// Decides on the `disk` that was read from `element`.
pub(super) fn plan(
    xml: &str,
    element: &Node<'_, '_>,
    disk: &Disk,
    judge: &dyn Fn(&Source) -> Result<Option<VolumeId>, Refusal>,
) -> Result<Plan, Refusal> {
    let source = source_of(element)?;
    let volume = match judge(&disk.source) {
        // What can do without a medium goes on without one that is not there.
        Err(refusal) if refusal.reason() == Reason::DeviceGone && disk.is_drive() => None,
        judged => judged?,
    };
    for beside in sources(element).filter(|beside| Some(*beside) != source) {
        check_beside(&beside, judge)?;
    }
    let (Some(volume), Some(source)) = (volume, source) else { return Ok(Plan::Leave) };
    let path = path_of(&source)?;
    check_protected(element, &source, disk, &volume)
        .and_then(|()| change(xml, element, &source, path.as_ref(), &volume))
        .map_err(|refusal| refusal.of(&volume))
}

/// The source of a disk or a host device.
///
/// # Errors
/// When libvirt could take another one for it.
pub(super) fn source_of<'a, 'input>(element: &Node<'a, 'input>) -> Result<Option<Node<'a, 'input>>, Refusal> {
    check_names(element)?;
    sources(element).try_for_each(|source| path_of(&source).map(drop))?;
    only(element, "source")
}

/// Everything in a disk that names a place of data. That of a `<mirror>` stands in its attributes as well; before
/// version 1.2.6 of libvirt it stood nowhere else.
fn sources<'a, 'input>(element: &Node<'a, 'input>) -> impl Iterator<Item = Node<'a, 'input>> {
    element.descendants().filter(|node| is(node, "source") || is(node, "mirror"))
}

/// Whether everything in a disk is in no namespace. libvirt's XPath takes no other elements, its loops over
/// children and its attributes did not ask, and which it uses where has changed over time.
fn check_names(element: &Node<'_, '_>) -> Result<(), Refusal> {
    for node in element.descendants().filter(Node::is_element) {
        let name = node.tag_name();
        if let Some(namespace) = name.namespace() {
            return Err(not_allowed(format!("it has {}", of_namespace(&format!("a <{}>", name.name()), namespace))));
        }
        for attribute in node.attributes() {
            if let Some(namespace) = attribute.namespace() {
                let what = of_namespace(&format!("an attribute {}", attribute.name()), namespace);
                return Err(not_allowed(format!("its <{}> has {what}", name.name())));
            }
        }
    }
    Ok(())
}

/// Something that looks like libvirt's but is not, for a sentence.
pub(super) fn of_namespace(what: &str, namespace: &str) -> String {
    format!(
        "{what} of the namespace {}, which not every libvirt reads in the same way: take its prefix away, or all of it",
        namespace.escape_debug()
    )
}

/// The child of this name, of which there may be one.
fn only<'a, 'input>(element: &Node<'a, 'input>, name: &'static str) -> Result<Option<Node<'a, 'input>>, Refusal> {
    let mut found = children(*element, name);
    match (found.next(), found.next()) {
        (_, Some(_)) => Err(not_allowed(format!("it has several <{name}> elements: leave the one that is meant"))),
        (first, None) => Ok(first),
    }
}

/// The attribute that names a path, for which there may be one, and none beside what names a unit.
fn path_of<'a, 'input>(source: &Node<'a, 'input>) -> Result<Option<Attribute<'a, 'input>>, Refusal> {
    let mut named = ["dev", "file", "protocol"].into_iter().filter_map(|name| source.attribute_node(name));
    match (named.next(), named.next()) {
        (Some(first), Some(second)) => Err(not_allowed(format!(
            "its <{}> has both {}= and {}=: leave the one that is meant",
            source.tag_name().name(),
            first.name(),
            second.name()
        ))),
        (first, _) => Ok(first.filter(|first| first.name() != "protocol")),
    }
}

/// Whether what a disk reads or writes besides its own source is no protected volume.
fn check_beside(
    beside: &Node<'_, '_>,
    judge: &dyn Fn(&Source) -> Result<Option<VolumeId>, Refusal>,
) -> Result<(), Refusal> {
    let source = Source::read(beside);
    match judge(&source)?.or_else(|| source.mapped_volume()) {
        None => Ok(()),
        Some(volume) => {
            let parent = match is(beside, "mirror") {
                true => *beside,
                false => beside.parent().unwrap_or(*beside),
            };
            Err(not_allowed(format!(
                "its <{}> leads to the protected volume {volume}, and only a disk's own source can be a mapping: give \
                 the guest the volume as a disk of its own",
                parent.tag_name().name()
            ))
            .of(&volume))
        }
    }
}

/// Whether nothing of a protected disk gets around its mapping.
fn check_protected(
    element: &Node<'_, '_>,
    source: &Node<'_, '_>,
    disk: &Disk,
    volume: &VolumeId,
) -> Result<(), Refusal> {
    if !matches!(disk.source, Source::Path(_)) {
        return Err(not_by_qemu(&disk.source, volume));
    }
    if disk.device == "lun" {
        return Err(passes_commands(volume));
    }
    let refused = |why: &str| Err(not_allowed(format!("volume {volume} is protected, and {why}")));
    if element.descendants().any(|node| is(&node, "encryption")) {
        return refused("<encryption> would encrypt it once more, with a key that volcrypt does not have: take it out");
    }
    if child(element, "mirror").is_some() {
        return refused("<mirror> copies it in clear: end that block job first ('virsh blockjob')");
    }
    if child(element, "transient").is_some() {
        return refused("<transient> has QEMU write what changes to a file in clear: take it out");
    }
    if child(source, "reservations").is_some() {
        return refused("<reservations> has SCSI commands sent around its encryption: take it out");
    }
    if child(source, "dataStore").is_some() {
        return refused("<dataStore> has its data elsewhere, in clear: take it out");
    }
    if source.has_attribute("fdgroup") {
        return refused("fdgroup= hands QEMU the volume already opened, past its encryption: take it out");
    }
    Ok(())
}

/// A protected volume that QEMU reaches without opening a block device.
pub(super) fn not_by_qemu(source: &Source, volume: &VolumeId) -> Refusal {
    match source {
        Source::IscsiUnit { target, lun } => reached_by_qemu(&target.escape_debug().to_string(), *lun),
        _ => not_allowed(format!(
            "volume {volume} is protected, and this device gets around its encryption: give the guest its block device as \
             a disk"
        )),
    }
}

fn change(
    xml: &str,
    element: &Node<'_, '_>,
    source: &Node<'_, '_>,
    path: Option<&Attribute<'_, '_>>,
    volume: &VolumeId,
) -> Result<Plan, Refusal> {
    let kind = element.attribute_node("type");
    // What libvirt takes for a disk that does not say.
    let read_as = kind.map_or("file", |kind| kind.value());
    let Some(path) = path.filter(|path| matches!((read_as, path.name()), ("block", "dev") | ("file", "file"))) else {
        return Err(not_allowed(format!(
            "libvirt takes no source with {}= for a disk with type='{}': write type='block' and dev=",
            path.map_or("dev", |path| path.name()),
            read_as.escape_debug()
        )));
    };
    let place = value_range(xml, path);
    let stood_there = xml[place.clone()].to_owned();
    let mut edits = vec![(place, volume.mapping_path())];
    let before = match path.name() {
        "file" => {
            edits.push((name_range(path), "dev".to_owned()));
            edits.push(match &kind {
                Some(kind) => (value_range(xml, kind), "block".to_owned()),
                None => (name_end(element)..name_end(element), " type='block'".to_owned()),
            });
            let (driver, edit) = raw_driver(xml, element, source)?;
            edits.extend(edit);
            let kind = kind.map(|kind| xml[value_range(xml, &kind)].to_owned());
            Before::File { path: stood_there, kind, driver }
        }
        _ => Before::Device(stood_there),
    };
    Ok(Plan::Change { entry: Entry { volume: volume.clone(), before }, edits })
}

/// Has a disk that was a file name its format, as it has to now.
fn raw_driver(xml: &str, element: &Node<'_, '_>, source: &Node<'_, '_>) -> Result<(Driver, Option<Edit>), Refusal> {
    let Some(driver) = only(element, "driver")? else {
        let start = source.range().start;
        return Ok((Driver::Added, Some((start..start, format!("{RAW_DRIVER}{}", indentation_before(xml, start))))));
    };
    match driver.attribute("type") {
        Some("raw") => Ok((Driver::Kept, None)),
        None => Ok((Driver::TypeAdded, Some((name_end(&driver)..name_end(&driver), " type='raw'".to_owned())))),
        Some(format) => Err(not_allowed(format!(
            "a file that is protected has to be a raw image, and its driver says type='{}': convert it ('qemu-img convert \
             -O raw')",
            format.escape_debug()
        ))),
    }
}

/// What has to be changed so that a disk is again what `entry` says.
pub(super) fn undone(xml: &str, element: &Node<'_, '_>, entry: &Entry) -> Result<Vec<Edit>, Refusal> {
    let Some(source) = source_of(element)? else { return Ok(Vec::new()) };
    let Some(path) = path_of(&source)? else { return Ok(Vec::new()) };
    let mut edits = vec![
        (name_range(&path), entry.before.attribute().to_owned()),
        (value_range(xml, &path), in_quotes_of(xml, &path, entry.before.path())),
    ];
    if let Before::File { kind, driver, .. } = &entry.before {
        if let Some(now) = element.attribute_node("type").filter(|now| now.value() == "block") {
            edits.push(match kind {
                Some(kind) => (value_range(xml, &now), in_quotes_of(xml, &now, kind)),
                None => (with_separator(&now), String::new()),
            });
        }
        edits.extend(child(element, "driver").and_then(|now| driver_undone(xml, &now, &source, *driver)));
    }
    Ok(edits)
}

/// A driver that somebody has given more to do since then stays.
fn driver_undone(xml: &str, driver: &Node<'_, '_>, source: &Node<'_, '_>, added: Driver) -> Option<Edit> {
    let kind = driver.attribute_node("type").filter(|kind| kind.value() == "raw")?;
    match added {
        Driver::Kept => None,
        Driver::TypeAdded => Some((with_separator(&kind), String::new())),
        Driver::Added => {
            let name = driver.attribute("name") == Some("qemu");
            let unchanged = name && driver.attributes().len() == 2 && !driver.has_children();
            let (start, end) = (driver.range().start, driver.range().end);
            let between = xml.get(end..source.range().start).filter(|between| between.chars().all(is_space));
            unchanged.then(|| (start..end + between.map_or(0, str::len), String::new()))
        }
    }
}

/// A part of an XML text that stood between quotes, to stand between those of `attribute`.
fn in_quotes_of(xml: &str, attribute: &Attribute<'_, '_>, raw: &str) -> String {
    match xml[..attribute.range().end].ends_with('"') {
        true => raw.replace('"', "&quot;"),
        false => raw.replace('\'', "&apos;"),
    }
}
