use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

use super::{call, call_mut, describe, new_descriptor, pinned, short_name};

const PROG_LOAD: libc::c_long = 5;
const PROG_ATTACH: libc::c_long = 8;
const PROG_DETACH: libc::c_long = 9;
const PROG_GET_FD_BY_ID: libc::c_long = 13;
const PROG_QUERY: libc::c_long = 16;

/// `BPF_PROG_TYPE_CGROUP_DEVICE`.
const DEVICE_PROGRAM: u32 = 15;
/// `BPF_CGROUP_DEVICE`.
const DEVICE_ATTACHMENT: u32 = 6;
/// The program stands beside those that others attach here and below, and all have to allow an open.
const ALLOW_MULTI: u32 = 2;
/// The kernel takes no more programs for one cgroup (`BPF_CGROUP_MAX_PROGS`).
const MOST_PROGRAMS: usize = 64;

/// One instruction: `struct bpf_insn`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Instruction {
    /// The operation.
    pub code: u8,
    /// The destination register in the lower half, the source register in the upper.
    pub registers: u8,
    /// How far to jump, or an offset in memory.
    pub offset: i16,
    /// A constant.
    pub immediate: i32,
}

/// A program that says which devices may be opened.
#[derive(Debug)]
pub struct Program(OwnedFd);

impl Program {
    /// Loads a program; the kernel verifies it.
    ///
    /// # Errors
    /// `EPERM` without the right to it, `EACCES` or `EINVAL` when the verifier rejects it.
    pub fn load(name: &str, instructions: &[Instruction]) -> io::Result<Self> {
        #[repr(C)]
        struct Attributes {
            kind: u32,
            count: u32,
            instructions: u64,
            license: u64,
            log_level: u32,
            log_size: u32,
            log: u64,
            kernel_version: u32,
            flags: u32,
            name: [u8; 16],
            interface: u32,
            attachment: u32,
        }
        let attributes = Attributes {
            kind: DEVICE_PROGRAM,
            count: instructions.len() as u32,
            instructions: instructions.as_ptr() as u64,
            license: c"Apache-2.0".as_ptr() as u64,
            log_level: 0,
            log_size: 0,
            log: 0,
            kernel_version: 0,
            flags: 0,
            name: short_name(name),
            interface: 0,
            attachment: DEVICE_ATTACHMENT,
        };
        // SAFETY: the instructions are as many as is said, the license ends in NUL, and there is no log.
        unsafe { new_descriptor(PROG_LOAD, &attributes) }.map(Program)
    }

    /// The program that is pinned at `path`.
    ///
    /// # Errors
    /// `NotFound` when nothing is pinned there, `InvalidData` when it is no program.
    pub fn at(path: &Path) -> io::Result<Self> {
        pinned(path, b"anon_inode:bpf-prog").map(Program)
    }

    /// The program with the kernel's number `id`.
    ///
    /// # Errors
    /// `NotFound` when it is gone.
    pub fn with_id(id: u32) -> io::Result<Self> {
        // SAFETY: the attribute is a plain number.
        unsafe { new_descriptor(PROG_GET_FD_BY_ID, &id) }.map(Program)
    }

    /// The kernel's number of this program.
    ///
    /// # Errors
    /// Those of bpf(2).
    pub fn id(&self) -> io::Result<u32> {
        Ok(self.information()?.0.id)
    }

    /// The name it was loaded with.
    ///
    /// # Errors
    /// Those of bpf(2).
    pub fn name(&self) -> io::Result<String> {
        let name = self.information()?.0.name;
        Ok(String::from_utf8_lossy(name.split(|&byte| byte == 0).next().unwrap_or_default()).into_owned())
    }

    /// Whether it looks into the map with the number `map`, and no other.
    ///
    /// # Errors
    /// Those of bpf(2).
    pub fn uses_only(&self, map: u32) -> io::Result<bool> {
        let (information, first) = self.information()?;
        Ok(information.map_count == 1 && first == map)
    }

    /// What the kernel says of it, and the number of its first map.
    fn information(&self) -> io::Result<(ProgramInformation, u32)> {
        let mut first = 0_u32;
        let mut information =
            ProgramInformation { map_count: 1, map_ids: (&raw mut first) as u64, ..ProgramInformation::default() };
        // SAFETY: the one pointer in the struct leads to as many numbers as are asked for, one.
        unsafe { describe(self.0.as_fd(), &mut information) }?;
        Ok((information, first))
    }
}

impl AsFd for Program {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Has every process in and below `cgroup`, a folder of cgroup v2, ask `program` before it opens a device.
///
/// # Errors
/// `EBADF` when it is no cgroup, `E2BIG` when it has too many programs, `EPERM` when one further up
/// forbids it.
pub fn attach(cgroup: BorrowedFd<'_>, program: &Program) -> io::Result<()> {
    // SAFETY: the attributes are plain numbers.
    unsafe { call(PROG_ATTACH, &Attachment::new(cgroup, program, ALLOW_MULTI)) }.map(drop)
}

/// Takes `program` off `cgroup`.
///
/// # Errors
/// `NotFound` when it is not attached there.
pub fn detach(cgroup: BorrowedFd<'_>, program: &Program) -> io::Result<()> {
    // The kernel takes no flags here.
    // SAFETY: the attributes are plain numbers.
    unsafe { call(PROG_DETACH, &Attachment::new(cgroup, program, 0)) }.map(drop)
}

/// The numbers of the device programs that are attached to `cgroup` itself.
///
/// # Errors
/// `EBADF` when it is no cgroup.
pub fn attached(cgroup: BorrowedFd<'_>) -> io::Result<Vec<u32>> {
    #[repr(C)]
    struct Attributes {
        target: u32,
        kind: u32,
        query_flags: u32,
        attach_flags: u32,
        ids: u64,
        count: u32,
        padding: u32,
        // Linux 6.17 writes into the last of these, however short the attributes are.
        later: [u64; 4],
    }
    let mut ids = [0_u32; MOST_PROGRAMS];
    let mut attributes = Attributes {
        target: cgroup.as_raw_fd() as u32,
        kind: DEVICE_ATTACHMENT,
        query_flags: 0,
        attach_flags: 0,
        ids: ids.as_mut_ptr() as u64,
        count: MOST_PROGRAMS as u32,
        padding: 0,
        later: [0; 4],
    };
    // SAFETY: there is room for as many numbers as is said; the kernel writes the count into the attributes.
    unsafe { call_mut(PROG_QUERY, &mut attributes) }?;
    Ok(ids[..(attributes.count as usize).min(MOST_PROGRAMS)].to_vec())
}

#[repr(C)]
struct Attachment {
    target: u32,
    program: u32,
    kind: u32,
    flags: u32,
}

impl Attachment {
    fn new(cgroup: BorrowedFd<'_>, program: &Program, flags: u32) -> Self {
        Attachment {
            target: cgroup.as_raw_fd() as u32,
            program: program.0.as_raw_fd() as u32,
            kind: DEVICE_ATTACHMENT,
            flags,
        }
    }
}

/// The head of `struct bpf_prog_info`.
#[derive(Default)]
#[repr(C)]
struct ProgramInformation {
    kind: u32,
    id: u32,
    tag: [u8; 8],
    lengths: [u32; 2],
    instructions: [u64; 2],
    load_time: u64,
    user: u32,
    map_count: u32,
    map_ids: u64,
    name: [u8; 16],
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_structs_are_those_of_the_kernel_headers() {
        assert_eq!(size_of::<Instruction>(), 8);
        assert_eq!(size_of::<Attachment>(), 16);
        assert_eq!(std::mem::offset_of!(ProgramInformation, map_ids), 56);
        assert_eq!(size_of::<ProgramInformation>(), 80);
    }
}
