//! SCSI disks, and the iSCSI sessions that bring them.

use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use super::Sysfs;
use super::attributes::{Node, entries, gone};
use crate::refusal::Refusal;
use crate::volume::{DeviceNumber, Iscsi};

/// What the path of a SCSI disk tells:
/// `devices/platform/host2/session1/target2:0:0/2:0:0:1/block/sda`.
pub(super) struct ScsiAddress {
    /// `session1`: only iSCSI has this above a target.
    pub(super) session: Option<String>,
    pub(super) lun: u64,
}

impl ScsiAddress {
    pub(super) fn in_path(path: &Path) -> Option<Self> {
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

impl Sysfs {
    pub(super) fn iscsi(&self, device: DeviceNumber, session: &str) -> Result<Iscsi, Refusal> {
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
