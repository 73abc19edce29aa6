//! Whether what a volume reads as, once it is decrypted, can be what somebody wrote there. A wrong key makes noise of
//! it.

use std::fs::File;
use std::os::unix::fs::FileExt;

use super::blank::{regions, signature, unreadable};
use crate::refusal::Refusal;

/// How much is read at the start, in bytes: file systems begin at the first mebibyte, too, in a partition.
const START: u64 = 16 << 20;
/// How much is read at once, in bytes; a whole number of sectors.
const CHUNK: u64 = 64 << 10;
/// The unit that has to be whole, in bytes: that of encryption.
const SECTOR: usize = 512;

/// What is recognised on the first `size` bytes of `device`, in words; nothing if that may be chance.
///
/// libblkid has to know it, and a sector has to be one byte all through, as there are in every file system, partition
/// table and volume group: in noise there is none, and neither is there where the key is right and the initial vectors
/// are not, which with CBC spoil the first 16 bytes of each sector only.
///
/// # Errors
/// When the device cannot be read, as for [`examine`](super::examine).
pub fn recognise(device: &File, size: u64) -> Result<Option<String>, Refusal> {
    match signature(device, size)? {
        Some(what) if has_plain_sector(device, size)? => Ok(Some(what)),
        _ => Ok(None),
    }
}

fn has_plain_sector(device: &File, size: u64) -> Result<bool, Refusal> {
    let mut buffer = vec![0; CHUNK as usize];
    for (start, length) in std::iter::once((0, size.min(START))).chain(regions(size)) {
        // Samples need not begin where a sector does.
        let mut position = start - start % SECTOR as u64;
        while position < start + length {
            let chunk = &mut buffer[..CHUNK.min(size - position) as usize];
            device.read_exact_at(chunk, position).map_err(|error| unreadable(position, &error))?;
            let is_plain = |sector: &[u8]| sector.iter().all(|byte| *byte == sector[0]);
            if chunk.chunks_exact(SECTOR).any(is_plain) {
                return Ok(true);
            }
            position += CHUNK;
        }
    }
    Ok(false)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;
    use std::process::{Command, Stdio};

    const SIZE: u64 = 20 << 20;

    fn noise(length: u64) -> Vec<u8> {
        let mut bytes = vec![0; length as usize];
        aws_lc_rs::rand::fill(&mut bytes).unwrap();
        bytes
    }

    fn volume() -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().write_all_at(&noise(SIZE), 0).unwrap();
        file
    }

    /// A file system whose unwritten places are noise, as they are on a volume that was encrypted when it was blank.
    fn with_file_system() -> Option<tempfile::NamedTempFile> {
        let mkfs = ["/usr/sbin/mkfs.ext4", "/sbin/mkfs.ext4"].into_iter().find(|path| Path::new(path).exists());
        let Some(mkfs) = mkfs else {
            eprintln!("skipped: there is no mkfs.ext4");
            return None;
        };
        let file = volume();
        let status = Command::new(mkfs).args(["-q", "-F"]).arg(file.path()).stdout(Stdio::null()).status().unwrap();
        assert!(status.success());
        Some(file)
    }

    #[test]
    fn noise_is_nothing() {
        for size in [512, 1 << 20, SIZE] {
            let file = volume();
            file.as_file().set_len(size).unwrap();
            assert_eq!(recognise(file.as_file(), size).unwrap(), None, "{size}");
        }
    }

    #[test]
    fn what_was_written_is_recognised() {
        let Some(file) = with_file_system() else { return };
        assert_eq!(recognise(file.as_file(), SIZE).unwrap().unwrap(), "an ext4 file system");
        let table = volume();
        let mut sector = [0; 512];
        sector[446..462].copy_from_slice(&[0, 0, 2, 0, 0x83, 0, 0, 0, 0, 8, 0, 0, 0, 64, 0, 0]);
        sector[510..].copy_from_slice(&[0x55, 0xaa]);
        table.as_file().write_all_at(&sector, 0).unwrap();
        assert_eq!(recognise(table.as_file(), SIZE).unwrap(), None, "nothing but a table, which may be chance");
        table.as_file().write_all_at(&[0; 512], (1 << 20) + 512).unwrap();
        assert_eq!(recognise(table.as_file(), SIZE).unwrap().unwrap(), "an MBR partition table");
    }

    #[test]
    fn a_superblock_between_spoiled_sectors_is_not_enough() {
        let Some(file) = with_file_system() else { return };
        // As aes-cbc with the right key and other initial vectors reads it.
        for sector in 0..SIZE / 512 {
            file.as_file().write_all_at(&noise(16), sector * 512).unwrap();
        }
        assert!(signature(file.as_file(), SIZE).unwrap().is_some(), "libblkid does not see it");
        assert_eq!(recognise(file.as_file(), SIZE).unwrap(), None);
    }

    #[test]
    fn blank_is_nothing() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(SIZE).unwrap();
        assert_eq!(recognise(&file, SIZE).unwrap(), None);
    }
}
