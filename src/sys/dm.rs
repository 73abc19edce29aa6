//! The one request to device-mapper that no crate offers: a device with a number of the caller's choice.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// `struct dm_ioctl` of `linux/dm-ioctl.h`.
#[repr(C)]
struct DmIoctl {
    version: [u32; 3],
    data_size: u32,
    data_start: u32,
    target_count: u32,
    open_count: i32,
    flags: u32,
    event_nr: u32,
    padding: u32,
    dev: u64,
    name: [u8; 128],
    uuid: [u8; 129],
    data: [u8; 7],
}

/// `DM_DEV_CREATE`: `_IOWR(0xfd, 3, struct dm_ioctl)`.
const DEV_CREATE: libc::c_ulong = 0xc138_fd03;
/// `DM_READONLY_FLAG`.
const READ_ONLY: u32 = 1 << 0;
/// `DM_PERSISTENT_DEV_FLAG`: the minor number is the one in `dev`.
const PERSISTENT_DEV: u32 = 1 << 3;

/// Makes a device without a table whose minor number is `minor`, by /dev/mapper/control.
///
/// # Errors
/// `EBUSY` when the name or the UUID is taken; `ENXIO` when the number is, or there is no memory; `EINVAL` when a text or the
/// number is too long for the kernel.
pub fn create(control: &File, name: &str, uuid: &str, minor: u32, read_only: bool) -> io::Result<()> {
    let length = size_of::<DmIoctl>() as u32;
    let mut request = DmIoctl {
        version: [4, 0, 0],
        data_size: length,
        data_start: length,
        target_count: 0,
        open_count: 0,
        flags: PERSISTENT_DEV | if read_only { READ_ONLY } else { 0 },
        event_nr: 0,
        padding: 0,
        // huge_encode_dev() of linux/kdev_t.h; the major number is device-mapper's own.
        dev: u64::from(minor & 0xff) | u64::from(minor & !0xff) << 12,
        name: [0; 128],
        uuid: [0; 129],
        data: [0; 7],
    };
    fill(&mut request.name, name)?;
    fill(&mut request.uuid, uuid)?;
    // SAFETY: the kernel reads and writes `data_size` bytes of the structure, which are all of it and outlive the call.
    match unsafe { libc::ioctl(control.as_raw_fd(), DEV_CREATE, &raw mut request) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Puts `text` in front of the zero that has to end it.
fn fill(room: &mut [u8], text: &str) -> io::Result<()> {
    match room.len() > text.len() {
        true => room[..text.len()].copy_from_slice(text.as_bytes()),
        false => return Err(io::Error::from_raw_os_error(libc::EINVAL)),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_structure_is_the_kernels() {
        assert_eq!(size_of::<DmIoctl>(), 312);
        assert_eq!(std::mem::offset_of!(DmIoctl, dev), 40);
        assert_eq!(std::mem::offset_of!(DmIoctl, uuid), 176);
    }

    #[test]
    fn what_is_too_long_is_refused_here() {
        for (length, fits) in [(0, true), (127, true), (128, false), (200, false)] {
            assert_eq!(fill(&mut [0; 128], &"x".repeat(length)).is_ok(), fits, "{length}");
        }
        assert!(fill(&mut [0; 129], &"x".repeat(128)).is_ok());
        assert!(fill(&mut [0; 129], &"x".repeat(129)).is_err());
    }

    #[test]
    fn what_is_no_device_mapper_says_so() {
        let null = File::open("/dev/null").unwrap();
        assert_eq!(create(&null, "x", "y", 5, false).unwrap_err().raw_os_error(), Some(libc::ENOTTY));
    }
}
