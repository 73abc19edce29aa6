use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use crate::refusal::{Reason, Refusal};
use crate::volume::DeviceNumber;

/// The kernel writes at most one page into an attribute.
pub(super) const ATTRIBUTE_LIMIT: usize = 4096;

/// One directory of sysfs, read for the sake of `device`.
pub(super) struct Node<'a> {
    pub(super) directory: &'a Path,
    pub(super) device: DeviceNumber,
}

impl Node<'_> {
    /// An attribute without the white space around it; nothing if the device has no such attribute.
    pub(super) fn text(&self, attribute: &str) -> Result<Option<String>, Refusal> {
        let bytes = self.bytes(attribute, ATTRIBUTE_LIMIT)?;
        Ok(bytes.map(|bytes| text(bytes.trim_ascii())).filter(|text| !text.is_empty()))
    }

    /// An attribute of at most `limit` bytes as it is; nothing if the device has no such attribute.
    pub(super) fn bytes(&self, attribute: &str, limit: usize) -> Result<Option<Vec<u8>>, Refusal> {
        let path = self.directory.join(attribute);
        match read_capped(&path, limit) {
            Ok(bytes) if bytes.len() > limit => {
                Err(nonsense(self.device, &path, "holds more than a kernel writes there"))
            }
            Ok(bytes) => Ok(Some(bytes)),
            Err(error) if is_absent(&error) => Ok(None),
            Err(error) => Err(unreadable(self.device, &path, &error)),
        }
    }

    pub(super) fn first_text(&self, attributes: &[&str]) -> Result<Option<String>, Refusal> {
        for attribute in attributes {
            if let Some(text) = self.text(attribute)? {
                return Ok(Some(text));
            }
        }
        Ok(None)
    }

    pub(super) fn number(&self, attribute: &str) -> Result<Option<u64>, Refusal> {
        let Some(text) = self.text(attribute)? else { return Ok(None) };
        match text.parse() {
            Ok(number) => Ok(Some(number)),
            Err(_) => Err(nonsense(self.device, &self.directory.join(attribute), "holds no number")),
        }
    }

    pub(super) fn required_number(&self, attribute: &str) -> Result<u64, Refusal> {
        self.number(attribute)?.ok_or_else(|| gone(self.device))
    }

    /// The devices right beneath: every one under `slaves`, or the disk of a partition.
    pub(super) fn beneath(&self, whole: bool) -> Result<Vec<DeviceNumber>, Refusal> {
        let directories = match (whole, self.directory.parent()) {
            (false, Some(disk)) => vec![disk.to_owned()],
            _ => entries(&self.directory.join("slaves"), self.device)?,
        };
        directories.iter().map(|directory| self.number_of(directory)).collect()
    }

    fn number_of(&self, directory: &Path) -> Result<DeviceNumber, Refusal> {
        let node = Node { directory, device: self.device };
        let text = node.text("dev")?.ok_or_else(|| gone(self.device))?;
        DeviceNumber::parse(&text)
            .ok_or_else(|| nonsense(self.device, &directory.join("dev"), "holds no device number"))
    }
}

/// The paths of a directory's entries in order; none if there is no such directory.
pub(super) fn entries(directory: &Path, device: DeviceNumber) -> Result<Vec<PathBuf>, Refusal> {
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
fn read_capped(path: &Path, limit: usize) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?.take(limit as u64 + 1).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Whether an attribute is not there, or is there and the driver has nothing to say (a SCSI disk
/// without VPD page 0x83 answers `wwid` with EINVAL or ENXIO).
fn is_absent(error: &io::Error) -> bool {
    let nothing = [libc::ENOENT, libc::ENOTDIR, libc::EINVAL, libc::ENXIO, libc::EOPNOTSUPP];
    error.raw_os_error().is_some_and(|number| nothing.contains(&number))
}

/// Bytes as text; those that are not UTF-8 as `\xNN`.
pub(in crate::volume) fn text(bytes: &[u8]) -> String {
    match std::str::from_utf8(bytes) {
        Ok(text) => text.to_owned(),
        Err(_) => bytes.escape_ascii().to_string(),
    }
}

pub(super) fn unreadable(device: DeviceNumber, path: &Path, error: &io::Error) -> Refusal {
    match error.raw_os_error() {
        Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => gone(device),
        _ => {
            let sentence = format!("block device {device}: cannot read {}: {error}; see the kernel's log", shown(path));
            Refusal::new(Reason::Kernel, sentence)
        }
    }
}

pub(super) fn nonsense(device: DeviceNumber, path: &Path, what: &str) -> Refusal {
    let sentence = format!("block device {device}: {} {what}; the device is not touched", shown(path));
    Refusal::new(Reason::Kernel, sentence)
}

pub(super) fn gone(device: DeviceNumber) -> Refusal {
    let sentence = format!("block device {device} is not there (any more); attach the volume to this host again");
    Refusal::new(Reason::DeviceGone, sentence)
}

/// A path as one printable line.
fn shown(path: &Path) -> String {
    path.to_string_lossy().escape_debug().to_string()
}
