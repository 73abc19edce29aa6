//! Reading a device's identity from sysfs.
//!
//! Sources: Documentation/ABI/stable/sysfs-block and testing/sysfs-block-device (`size`, `ro`,
//! `partition`, `diskseq`), stable/sysfs-block-dm (`dm/name`, `dm/uuid`), and
//! drivers/scsi/scsi_transport_iscsi.c (`iscsi_session`, `iscsi_connection`).

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use super::{DeviceNumber, Identity, Iscsi, Mapping};
use crate::refusal::{Reason, Refusal};

/// The kernel writes at most one page into an attribute.
const ATTRIBUTE_LIMIT: usize = 4096;
/// How many layers below a device are looked at.
const DEPTH_LIMIT: usize = 8;
/// How many devices below one device are looked at. A stack is a graph, not a tree: without this
/// bound, layers that share their parts would multiply.
const DEVICE_LIMIT: usize = 256;

/// A sysfs tree.
#[derive(Clone, Debug)]
pub struct Sysfs {
    root: PathBuf,
}

impl Sysfs {
    /// The running kernel's, at `/sys`.
    pub fn system() -> Self {
        Sysfs::at("/sys")
    }

    /// The tree at `root`.
    pub fn at(root: impl Into<PathBuf>) -> Self {
        Sysfs { root: root.into() }
    }

    /// What the kernel says of `device` and of everything beneath it.
    ///
    /// # Errors
    /// [`Reason::DeviceGone`] when there is no such device or it goes away meanwhile;
    /// [`Reason::NotAllowed`] when it stands on more layers than are looked at; [`Reason::Kernel`]
    /// when sysfs cannot be read or says what no kernel says. An identity that is only half known
    /// is never returned, because a volume could then pass for an unprotected one.
    pub fn identify(&self, device: DeviceNumber) -> Result<Identity, Refusal> {
        let mut left = DEVICE_LIMIT;
        self.identify_within(device, DEPTH_LIMIT, &mut left)
    }

    fn identify_within(&self, device: DeviceNumber, depth: usize, left: &mut usize) -> Result<Identity, Refusal> {
        *left = left.checked_sub(1).ok_or_else(|| too_deep(device))?;
        // From the root, so that the root's own name never passes for a session's.
        let place = self.place(device)?;
        let directory = self.root.join(&place);
        let node = Node { directory: &directory, device };
        let partition = node.number("partition")?;
        let whole = partition.is_none();
        let address = if whole { ScsiAddress::in_path(&place) } else { None };
        let iscsi = match address.as_ref().and_then(|address| address.session.as_deref()) {
            Some(session) => Some(self.iscsi(device, session)?),
            None => None,
        };
        let mut identity = Identity {
            number: device,
            name: directory.file_name().map(|name| text(name.as_bytes())).unwrap_or_default(),
            size: node.required_number("size")?.saturating_mul(512),
            read_only: node.required_number("ro")? != 0,
            sequence: node.number("diskseq")?,
            partition,
            iscsi,
            lun: address.map(|address| address.lun),
            wwid: if whole { node.first_text(&["device/wwid", "wwid"])? } else { None },
            mapping: node.mapping()?,
            underlying: Vec::new(),
        };
        for below in node.beneath(whole)? {
            let depth = depth.checked_sub(1).ok_or_else(|| too_deep(device))?;
            identity.underlying.push(self.identify_within(below, depth, left)?);
        }
        // The number may have gone to another disk since the first read.
        if self.place(device)? != place || node.number("diskseq")? != identity.sequence {
            return Err(gone(device));
        }
        Ok(identity)
    }

    /// Where the device lives in the tree, from its root: what the link in `dev/block` says. The
    /// kernel writes these links itself, relative and to a real directory, so one look is enough.
    fn place(&self, device: DeviceNumber) -> Result<PathBuf, Refusal> {
        let link = self.root.join("dev/block").join(device.to_string());
        let target = fs::read_link(&link).map_err(|error| unreadable(device, &link, &error))?;
        let place = target.strip_prefix("../..").ok().filter(|place| {
            place.components().next().is_some() && place.components().all(|part| matches!(part, Component::Normal(_)))
        });
        let place = place.ok_or_else(|| nonsense(device, &link, "leads out of the tree, which no kernel's does"))?;
        Ok(place.to_owned())
    }

    fn iscsi(&self, device: DeviceNumber, session: &str) -> Result<Iscsi, Refusal> {
        let directory = self.root.join("class/iscsi_session").join(session);
        // A session whose target cannot be told must not pass for a local disk.
        let target = Node { directory: &directory, device }.text("targetname")?.ok_or_else(|| gone(device))?;
        Ok(Iscsi { target, portal: self.portal(device, session)? })
    }

    /// The portal of the session's first connection. It is for an operator's eyes only.
    fn portal(&self, device: DeviceNumber, session: &str) -> Result<Option<String>, Refusal> {
        let class = self.root.join("class/iscsi_connection");
        let prefix = format!("{}:", session.replacen("session", "connection", 1));
        let connection = entries(&class, device)?
            .into_iter()
            .find(|path| path.file_name().is_some_and(|name| name.as_bytes().starts_with(prefix.as_bytes())));
        let Some(connection) = connection else { return Ok(None) };
        let node = Node { directory: &connection, device };
        let (address, port) = (node.text("persistent_address")?, node.text("persistent_port")?);
        Ok(address.zip(port).map(|(address, port)| match address.contains(':') {
            true => format!("[{address}]:{port}"),
            false => format!("{address}:{port}"),
        }))
    }
}

/// One directory of sysfs, read for the sake of `device`.
struct Node<'a> {
    directory: &'a Path,
    device: DeviceNumber,
}

impl Node<'_> {
    /// An attribute without the white space around it; nothing if the device has no such attribute.
    fn text(&self, attribute: &str) -> Result<Option<String>, Refusal> {
        let path = self.directory.join(attribute);
        let bytes = match read_capped(&path) {
            Ok(bytes) => bytes,
            Err(error) if is_absent(&error) => return Ok(None),
            Err(error) => return Err(unreadable(self.device, &path, &error)),
        };
        if bytes.len() > ATTRIBUTE_LIMIT {
            return Err(nonsense(self.device, &path, "holds more than the page that a kernel writes"));
        }
        Ok(Some(text(bytes.trim_ascii())).filter(|text| !text.is_empty()))
    }

    fn first_text(&self, attributes: &[&str]) -> Result<Option<String>, Refusal> {
        for attribute in attributes {
            if let Some(text) = self.text(attribute)? {
                return Ok(Some(text));
            }
        }
        Ok(None)
    }

    fn number(&self, attribute: &str) -> Result<Option<u64>, Refusal> {
        let Some(text) = self.text(attribute)? else { return Ok(None) };
        match text.parse() {
            Ok(number) => Ok(Some(number)),
            Err(_) => Err(nonsense(self.device, &self.directory.join(attribute), "holds no number")),
        }
    }

    fn required_number(&self, attribute: &str) -> Result<u64, Refusal> {
        self.number(attribute)?.ok_or_else(|| gone(self.device))
    }

    fn mapping(&self) -> Result<Option<Mapping>, Refusal> {
        let Some(name) = self.text("dm/name")? else { return Ok(None) };
        Ok(Some(Mapping { name, uuid: self.text("dm/uuid")?.unwrap_or_default() }))
    }

    /// The devices right beneath: every one under `slaves`, or the disk of a partition.
    fn beneath(&self, whole: bool) -> Result<Vec<DeviceNumber>, Refusal> {
        let directories = match (whole, self.directory.parent()) {
            (false, Some(disk)) => vec![disk.to_owned()],
            _ => entries(&self.directory.join("slaves"), self.device)?,
        };
        directories.iter().map(|directory| self.number_of(directory)).collect()
    }

    fn number_of(&self, directory: &Path) -> Result<DeviceNumber, Refusal> {
        let node = Node { directory, device: self.device };
        let text = node.text("dev")?.ok_or_else(|| gone(self.device))?;
        let number = text
            .split_once(':')
            .and_then(|(major, minor)| Some(DeviceNumber { major: major.parse().ok()?, minor: minor.parse().ok()? }));
        number.ok_or_else(|| nonsense(self.device, &directory.join("dev"), "holds no device number"))
    }
}

/// What the path of a SCSI disk tells:
/// `devices/platform/host2/session1/target2:0:0/2:0:0:1/block/sda`.
struct ScsiAddress {
    /// `session1`: only iSCSI has this above a target.
    session: Option<String>,
    lun: u64,
}

impl ScsiAddress {
    fn in_path(path: &Path) -> Option<Self> {
        let components: Vec<&str> = path.components().filter_map(|part| part.as_os_str().to_str()).collect();
        let target = components.iter().rposition(|part| part.starts_with("target"))?;
        let lun = logical_unit(components.get(target + 1)?)?;
        let above = target.checked_sub(1).map(|index| components[index]);
        let session = above.filter(|name| {
            name.strip_prefix("session")
                .is_some_and(|id| !id.is_empty() && id.bytes().all(|byte| byte.is_ascii_digit()))
        });
        Some(ScsiAddress { session: session.map(str::to_owned), lun })
    }
}

/// The last number of `host:channel:target:lun`.
fn logical_unit(address: &str) -> Option<u64> {
    let numbers: Option<Vec<u64>> = address.split(':').map(|number| number.parse().ok()).collect();
    match numbers?[..] {
        [_, _, _, lun] => Some(lun),
        _ => None,
    }
}

/// The paths of a directory's entries in order; none if there is no such directory.
fn entries(directory: &Path, device: DeviceNumber) -> Result<Vec<PathBuf>, Refusal> {
    let listed = match fs::read_dir(directory) {
        Ok(listed) => listed,
        Err(error) if is_absent(&error) => return Ok(Vec::new()),
        Err(error) => return Err(unreadable(device, directory, &error)),
    };
    let paths: io::Result<Vec<PathBuf>> = listed.map(|entry| Ok(entry?.path())).collect();
    let mut paths = paths.map_err(|error| unreadable(device, directory, &error))?;
    paths.sort();
    Ok(paths)
}

/// At most one byte more than an attribute can hold.
fn read_capped(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?.take(ATTRIBUTE_LIMIT as u64 + 1).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Whether an attribute is not there, or is there and the driver has nothing to say (a SCSI disk
/// without VPD page 0x83 answers `wwid` with EINVAL or ENXIO).
fn is_absent(error: &io::Error) -> bool {
    let nothing = [libc::ENOENT, libc::ENOTDIR, libc::EINVAL, libc::ENXIO, libc::EOPNOTSUPP];
    error.raw_os_error().is_some_and(|number| nothing.contains(&number))
}

fn text(bytes: &[u8]) -> String {
    match std::str::from_utf8(bytes) {
        Ok(text) => text.to_owned(),
        Err(_) => bytes.escape_ascii().to_string(),
    }
}

fn unreadable(device: DeviceNumber, path: &Path, error: &io::Error) -> Refusal {
    match error.raw_os_error() {
        Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => gone(device),
        _ => {
            let sentence = format!("block device {device}: cannot read {}: {error}; see the kernel's log", shown(path));
            Refusal::new(Reason::Kernel, sentence)
        }
    }
}

fn nonsense(device: DeviceNumber, path: &Path, what: &str) -> Refusal {
    let sentence = format!("block device {device}: {} {what}; the device is not touched", shown(path));
    Refusal::new(Reason::Kernel, sentence)
}

fn gone(device: DeviceNumber) -> Refusal {
    let sentence = format!("block device {device} is not there (any more); attach the volume to this host again");
    Refusal::new(Reason::DeviceGone, sentence)
}

fn too_deep(device: DeviceNumber) -> Refusal {
    let sentence = format!(
        "block device {device} stands in a stack of more than {DEPTH_LIMIT} layers or {DEVICE_LIMIT} devices; \
         give the guest a device nearer to the disk"
    );
    Refusal::new(Reason::NotAllowed, sentence)
}

/// A path as one printable line.
fn shown(path: &Path) -> String {
    path.to_string_lossy().escape_debug().to_string()
}

#[cfg(test)]
mod tests;
