//! Whether a device holds anything. What does is never overwritten.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use libblkid_rs::{BlkidErr, BlkidProbe, BlkidSafeprobeRet, BlkidSublks, BlkidSublksFlags};

use crate::refusal::{Reason, Refusal};

/// The bytes that are read at either end, where nearly every format keeps its headers.
const END: u64 = 1 << 20;
/// How many regions are read between the ends.
const SAMPLES: u64 = 64;
/// The size of each of them, in bytes.
const SAMPLE: u64 = 64 << 10;

/// The size of a sector, in bytes.
const SECTOR: u64 = 512;
/// How many of the 256 values are among the bytes of a sector of noise, at least. The mean is 221 with a standard
/// deviation of 5; code and text have far fewer.
const VALUES_OF_NOISE: usize = 190;

/// What stands on a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Content {
    /// Nothing that libblkid recognises, and every byte that was read is zero.
    Blank,
    /// Something, in words: `an ext4 file system`, `data at byte 1048576`.
    Holds(String),
}

/// Looks at the first `size` bytes of `device`, a block device or a regular file.
///
/// libblkid looks for the signatures it knows; then the first and the last mebibyte and 64 regions
/// of 64 KiB, spread evenly between them, have to read as zeros. A device of up to 6 MiB is read
/// as a whole. Data in none of these places stays unseen: `Blank` is no proof for a large device.
///
/// The file's position is moved. It reads until the device answers: call it where a dead storage server may block.
///
/// # Errors
/// [`Reason::DeviceGone`] when the device is empty or ends before `size`; [`Reason::Kernel`] when
/// it cannot be read.
pub fn examine(device: &File, size: u64) -> Result<Content, Refusal> {
    let mut handle = device;
    let present = handle.seek(SeekFrom::End(0)).map_err(|error| unreadable(0, &error))?;
    if size == 0 || present < size {
        let sentence = format!("the device has {present} bytes where {size} are expected: is its storage server up?");
        return Err(Refusal::new(Reason::DeviceGone, sentence));
    }
    if let Some(signature) = signature(device, size)? {
        return Ok(Content::Holds(signature));
    }
    Ok(match first_data(device, size)? {
        Some(position) => Content::Holds(format!("data at byte {position}")),
        None => Content::Blank,
    })
}

/// Whether the first `size` bytes of `device` read like ciphertext: in no format that libblkid knows, and noise in the
/// first sector of those that [`examine`] reads which is not all zeros. What a guest has compressed or encrypted itself
/// looks no different.
///
/// # Errors
/// [`Reason::DeviceGone`] or [`Reason::Kernel`] when it cannot be read.
pub fn looks_encrypted(device: &File, size: u64) -> Result<bool, Refusal> {
    if signature(device, size)?.is_some() {
        return Ok(false);
    }
    let Some(position) = first_data(device, size)? else { return Ok(false) };
    let start = position - position % SECTOR;
    let mut sector = [0; SECTOR as usize];
    device.read_exact_at(&mut sector, start).map_err(|error| unreadable(start, &error))?;
    let mut is_there = [false; 256];
    sector.iter().for_each(|&byte| is_there[usize::from(byte)] = true);
    Ok(is_there.iter().filter(|&&is_there| is_there).count() >= VALUES_OF_NOISE)
}

/// The position of the first byte that is not zero, among those that are read.
fn first_data(device: &File, size: u64) -> Result<Option<u64>, Refusal> {
    for (start, length) in regions(size) {
        if let Some(position) = first_nonzero(device, start, length)? {
            return Ok(Some(position));
        }
    }
    Ok(None)
}

/// What libblkid recognises, in words.
pub(super) fn signature(device: &File, size: u64) -> Result<Option<String>, Refusal> {
    let (found, probe) = probe(device, size)
        .map_err(|error| Refusal::new(Reason::Kernel, format!("libblkid cannot examine the device: {error}")))?;
    match found {
        BlkidSafeprobeRet::None => Ok(None),
        BlkidSafeprobeRet::Ambiguous => Ok(Some("signatures of more than one format".to_owned())),
        BlkidSafeprobeRet::Success => {
            let value = |name| probe.lookup_value(name).ok();
            Ok(Some(in_words(value("USAGE").as_deref(), value("TYPE").as_deref(), value("PTTYPE").as_deref())))
        }
    }
}

fn probe(device: &File, size: u64) -> Result<(BlkidSafeprobeRet, BlkidProbe), BlkidErr> {
    let size = i64::try_from(size).map_err(|_| BlkidErr::InvalidConv)?;
    let mut probe = BlkidProbe::new()?;
    probe.set_device(device.as_raw_fd(), 0, size)?;
    probe.enable_superblocks(true)?;
    probe.set_superblock_flags(BlkidSublksFlags::new(vec![BlkidSublks::Type, BlkidSublks::Usage]))?;
    probe.enable_partitions(true)?;
    probe.enable_topology(false)?;
    Ok((probe.do_safeprobe()?, probe))
}

/// libblkid's `USAGE`, `TYPE` and `PTTYPE` as an operator would say it.
fn in_words(usage: Option<&str>, kind: Option<&str>, table: Option<&str>) -> String {
    match (usage, kind, table) {
        (_, Some("LVM2_member"), _) => "an LVM2 physical volume".to_owned(),
        (_, Some("crypto_LUKS"), _) => "a LUKS header".to_owned(),
        (_, Some("swap"), _) => "swap space".to_owned(),
        (Some("filesystem"), Some(kind), _) => format!("{} {kind} file system", article(kind)),
        (Some("raid"), Some(kind), _) => format!("a part of a RAID ({kind})"),
        (_, Some(kind), _) => format!("data of the type {kind}"),
        (_, None, Some("gpt")) => "a GPT partition table".to_owned(),
        (_, None, Some("dos")) => "an MBR partition table".to_owned(),
        (_, None, Some(table)) => format!("a partition table of the type {table}"),
        (_, None, None) => "something that libblkid recognises".to_owned(),
    }
}

fn article(word: &str) -> &'static str {
    match word.starts_with(['a', 'e', 'i', 'o', 'x']) {
        true => "an",
        false => "a",
    }
}

/// The regions to be read, as (start, length), in order and without a gap where they would meet.
pub(super) fn regions(size: u64) -> Vec<(u64, u64)> {
    if size <= 2 * END + SAMPLES * SAMPLE {
        return vec![(0, size)];
    }
    // Each sample stands in the middle of one of SAMPLES equal parts.
    let part = (size - 2 * END) / SAMPLES;
    let samples = (0..SAMPLES).map(|index| (END + index * part + (part - SAMPLE) / 2, SAMPLE));
    std::iter::once((0, END)).chain(samples).chain(std::iter::once((size - END, END))).collect()
}

/// The position of the first byte that is not zero.
fn first_nonzero(device: &File, start: u64, length: u64) -> Result<Option<u64>, Refusal> {
    let mut buffer = vec![0; SAMPLE as usize];
    let end = start + length;
    let mut position = start;
    while position < end {
        let wanted = SAMPLE.min(end - position) as usize;
        let chunk = &mut buffer[..wanted];
        device.read_exact_at(chunk, position).map_err(|error| unreadable(position, &error))?;
        if let Some(index) = chunk.iter().position(|&byte| byte != 0) {
            return Ok(Some(position + index as u64));
        }
        position += wanted as u64;
    }
    Ok(None)
}

pub(super) fn unreadable(position: u64, error: &io::Error) -> Refusal {
    match error.kind() {
        io::ErrorKind::UnexpectedEof => Refusal::new(
            Reason::DeviceGone,
            format!("the device ends before byte {position}: it shrank, or is being detached; attach it again"),
        ),
        _ => Refusal::new(
            Reason::Kernel,
            format!("the device cannot be read at byte {position}: {error}; see the kernel's log"),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::path::Path;
    use std::process::{Command, Stdio};

    const MIB: u64 = 1 << 20;

    fn file_with(size: u64, writes: &[(u64, &[u8])]) -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(size).unwrap();
        for (position, bytes) in writes {
            file.write_all_at(bytes, *position).unwrap();
        }
        file
    }

    #[test]
    fn noise_looks_encrypted_and_nothing_else_does() {
        let mut noise = vec![0; 4096];
        aws_lc_rs::rand::fill(&mut noise).unwrap();
        let looks = |writes: &[(u64, &[u8])]| looks_encrypted(&file_with(16 * MIB, writes), 16 * MIB).unwrap();
        for position in [0, 8 * 512, MIB - 512, 16 * MIB - 4096] {
            assert!(looks(&[(position, &noise)]), "{position}");
        }
        let text: Vec<u8> = include_bytes!("blank.rs").iter().copied().take(8192).collect();
        let program = std::fs::read("/proc/self/exe").unwrap();
        assert!(!looks(&[]) && !looks(&[(0, &text)]) && !looks(&[(512, &program[..4096])]));
        // A partition table makes a disk of it, whatever is in the partitions.
        let mut table = [0; 512];
        table[446..462].copy_from_slice(&[0, 0, 2, 0, 0x83, 0, 0, 0, 8, 0, 0, 0, 0, 16, 0, 0]);
        table[510..].copy_from_slice(&[0x55, 0xaa]);
        assert!(!looks(&[(0, &table), (4096, &noise)]));
    }

    fn held(size: u64, writes: &[(u64, &[u8])]) -> String {
        match examine(&file_with(size, writes), size).unwrap() {
            Content::Holds(what) => what,
            Content::Blank => panic!("taken for blank: {writes:?}"),
        }
    }

    #[test]
    fn zeros_are_blank() {
        for size in [512, MIB, 6 * MIB, 6 * MIB + 512, 100 * MIB, 1 << 40] {
            assert_eq!(examine(&file_with(size, &[]), size), Ok(Content::Blank), "{size}");
        }
    }

    #[test]
    fn signatures_are_named() {
        let luks = [b"LUKS\xba\xbe\x00\x01".as_slice(), &[0; 100]].concat();
        assert_eq!(held(16 * MIB, &[(0, &luks)]), "a LUKS header");
        let mut sector = [0; 512];
        sector[446..462].copy_from_slice(&[0, 0, 2, 0, 0x83, 0, 0, 0, 1, 0, 0, 0, 100, 0, 0, 0]);
        sector[510..].copy_from_slice(&[0x55, 0xaa]);
        assert_eq!(held(16 * MIB, &[(0, &sector)]), "an MBR partition table");
        let swap = [1_u32.to_le_bytes(), 100_u32.to_le_bytes(), 0_u32.to_le_bytes()].concat();
        assert_eq!(held(16 * MIB, &[(1024, &swap), (4086, b"SWAPSPACE2")]), "swap space");
    }

    #[test]
    fn what_libblkid_says_is_put_into_words() {
        let cases = [
            ((Some("raid"), Some("LVM2_member"), None), "an LVM2 physical volume"),
            ((Some("raid"), Some("linux_raid_member"), None), "a part of a RAID (linux_raid_member)"),
            ((Some("filesystem"), Some("btrfs"), None), "a btrfs file system"),
            ((Some("other"), Some("drbd"), None), "data of the type drbd"),
            ((None, None, Some("gpt")), "a GPT partition table"),
            ((None, None, None), "something that libblkid recognises"),
        ];
        for ((usage, kind, table), words) in cases {
            assert_eq!(in_words(usage, kind, table), words);
        }
    }

    #[test]
    fn a_file_system_is_named_by_its_type() {
        let Some(mkfs) = ["/usr/sbin/mkfs.ext4", "/sbin/mkfs.ext4"].iter().find(|path| Path::new(path).exists()) else {
            eprintln!("skipped: there is no mkfs.ext4");
            return;
        };
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(16 * MIB).unwrap();
        let status = Command::new(mkfs).args(["-q", "-F"]).arg(file.path()).stdout(Stdio::null()).status().unwrap();
        assert!(status.success());
        assert_eq!(examine(file.as_file(), 16 * MIB), Ok(Content::Holds("an ext4 file system".to_owned())));
    }

    #[test]
    fn two_formats_at_once_are_not_blank() {
        let swap = [1_u32.to_le_bytes(), 100_u32.to_le_bytes(), 0_u32.to_le_bytes()].concat();
        let bfs = [0xce, 0xfa, 0xad, 0x1b];
        let both: [(u64, &[u8]); 3] = [(0, &bfs), (1024, &swap), (4086, b"SWAPSPACE2")];
        assert_eq!(held(16 * MIB, &both), "signatures of more than one format");
    }

    #[test]
    fn a_byte_where_no_format_is_known_is_named_by_its_position() {
        let size = 100 * MIB;
        for position in [0, 5, MIB - 1, size - MIB, size - 1] {
            assert_eq!(held(size, &[(position, &[1])]), format!("data at byte {position}"));
        }
        for (start, length) in regions(size) {
            assert_eq!(held(size, &[(start + length - 1, &[1])]), format!("data at byte {}", start + length - 1));
        }
    }

    #[test]
    fn a_device_that_is_empty_or_too_short_is_refused() {
        for (present, size) in [(0, 0), (MIB, 0), (0, MIB), (MIB, MIB + 1)] {
            assert_eq!(examine(&file_with(present, &[]), size).unwrap_err().reason(), Reason::DeviceGone);
        }
    }

    #[test]
    fn an_unreadable_device_is_refused() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let unreadable = File::options().write(true).open(file.path()).unwrap();
        unreadable.set_len(MIB).unwrap();
        assert_eq!(examine(&unreadable, MIB).unwrap_err().reason(), Reason::Kernel);
    }

    proptest! {
        #[test]
        fn regions_are_in_order_and_reach_both_ends(size in 1_u64..=i64::MAX as u64) {
            let regions = regions(size);
            prop_assert_eq!(regions[0].0, 0);
            let mut end = 0;
            for &(start, length) in &regions {
                prop_assert!(start >= end && length > 0);
                end = start + length;
            }
            prop_assert_eq!(end, size);
            prop_assert!(size <= 6 * MIB || regions.len() == 66);
        }
    }
}
