//! Why a protected volume cannot be a domain's disk in the way its XML says.

use super::Disk;
use crate::refusal::{Reason, Refusal};
use crate::volume::VolumeId;

/// `refusal` as one of a disk.
pub fn in_disk(disk: &Disk, refusal: &Refusal) -> Refusal {
    let of_disk = Refusal::new(refusal.reason(), format!("disk {}: {refusal}", disk.target.escape_debug()));
    match refusal.volume() {
        Some(volume) => of_disk.of(volume),
        None => of_disk,
    }
}

/// A disk passes the guest's SCSI commands to a protected volume.
pub fn passes_commands(volume: &VolumeId) -> Refusal {
    Refusal::new(
        Reason::NotAllowed,
        format!(
            "volume {volume} is protected, and device='lun' passes SCSI commands around its encryption: use device='disk'"
        ),
    )
}

/// libvirt looks into a protected volume to learn on which others the image there stands, and finds ciphertext.
pub fn is_hidden(volume: &VolumeId) -> Refusal {
    Refusal::new(
        Reason::NotAllowed,
        format!(
            "libvirt cannot see on which image the one in the protected volume {volume} stands, and the guest would \
             read zeros in the place of that: say it with <backingStore> in the disk's XML, where <backingStore/> stands \
             for none"
        ),
    )
}

/// libvirt looks into the mapping of a protected volume to learn on which others the image there stands, and gives the
/// guest what it finds. A guest that had the volume as a raw disk could have written that.
pub fn is_believed(volume: &VolumeId) -> Refusal {
    Refusal::new(
        Reason::NotAllowed,
        format!(
            "libvirt would look into the protected volume {volume} for the image on which the one there stands, and give \
             the guest whatever it finds named, which a guest may have written there itself: say it with <backingStore> in \
             the disk's XML, where <backingStore/> stands for none"
        ),
    )
}

/// QEMU reaches a protected volume by its own iSCSI client: it never opens a device, so nothing would encrypt
/// what it sends.
pub fn reached_by_qemu(target: &str, lun: u64) -> Refusal {
    Refusal::new(
        Reason::NotAllowed,
        format!(
            "LUN {lun} of {target} is or may be a protected volume, and QEMU's own iSCSI client would write to it \
             unencrypted: log in to the target on the host and give the guest the block device"
        ),
    )
}
