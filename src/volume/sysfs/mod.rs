//! Reading a device's identity from sysfs.
//!
//! Sources: Documentation/ABI/stable/sysfs-block and testing/sysfs-block-device (`size`, `ro`,
//! `partition`, `diskseq`), stable/sysfs-block-dm (`dm/name`, `dm/uuid`), and
//! drivers/scsi/scsi_transport_iscsi.c (`iscsi_session`, `iscsi_connection`).

mod attributes;
mod details;
mod dm;
mod scsi;

use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, PathBuf};

pub(super) use attributes::text;
use attributes::{Node, gone, nonsense, unreadable};
use scsi::ScsiAddress;

use super::{DeviceNumber, Identity};
use crate::refusal::{Reason, Refusal};

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
    /// [`Reason::DeviceGone`] when there is no such device, it goes away meanwhile, or a multipath map has no path;
    /// [`Reason::NotAllowed`] when it stands on more layers than are looked at; [`Reason::ForeignData`]
    /// when a multipath map leads to more than one volume; [`Reason::Kernel`] when sysfs cannot be read or says what no kernel says. An identity that is only half known
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
            path_of: None,
            underlying: Vec::new(),
        };
        if whole && identity.mapping.is_none() {
            identity.path_of = node.path_of()?;
        }
        for below in node.beneath(whole)? {
            let depth = depth.checked_sub(1).ok_or_else(|| too_deep(device))?;
            identity.underlying.push(self.identify_within(below, depth, left)?);
        }
        if identity.is_multipath() {
            dm::agree(&mut identity)?;
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
}

fn too_deep(device: DeviceNumber) -> Refusal {
    let sentence = format!(
        "block device {device} stands in a stack of more than {DEPTH_LIMIT} layers or {DEVICE_LIMIT} devices; \
         give the guest a device nearer to the disk"
    );
    Refusal::new(Reason::NotAllowed, sentence)
}

#[cfg(test)]
mod tests;
