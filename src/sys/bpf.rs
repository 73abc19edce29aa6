//! bpf(2) as far as the guard needs it: one kind of map, one kind of program, and the folder in which
//! both can be found again.
//!
//! Sources: linux/bpf.h (the numbers and the members of `union bpf_attr`), and the kernel's
//! Documentation/userspace-api/ebpf and Documentation/bpf/prog_cgroup_*.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// The size of a key in bytes.
pub const KEY_SIZE: usize = 12;
/// A key of a [`Map`].
pub type Key = [u8; KEY_SIZE];
/// The size of a value, which only says that its key is there.
const VALUE_SIZE: usize = 4;

const MAP_CREATE: libc::c_long = 0;
const MAP_UPDATE_ELEM: libc::c_long = 2;
const MAP_DELETE_ELEM: libc::c_long = 3;
const MAP_GET_NEXT_KEY: libc::c_long = 4;
const PROG_LOAD: libc::c_long = 5;
const OBJ_PIN: libc::c_long = 6;
const OBJ_GET: libc::c_long = 7;
const PROG_ATTACH: libc::c_long = 8;
const PROG_DETACH: libc::c_long = 9;
const PROG_GET_FD_BY_ID: libc::c_long = 13;
const OBJ_GET_INFO_BY_FD: libc::c_long = 15;
const PROG_QUERY: libc::c_long = 16;

/// `BPF_MAP_TYPE_HASH`.
const HASH: u32 = 1;
/// Memory for an entry is taken when it is made.
const NO_PREALLOC: u32 = 1;
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

/// A hash map in the kernel: a set of keys, in fact.
#[derive(Debug)]
pub struct Map(OwnedFd);

impl Map {
    /// A new, empty map with room for `room` keys.
    ///
    /// # Errors
    /// Those of bpf(2): `EPERM` without the right to it.
    pub fn create(name: &str, room: u32) -> io::Result<Self> {
        #[repr(C)]
        struct Attributes {
            kind: u32,
            key_size: u32,
            value_size: u32,
            room: u32,
            flags: u32,
            inner: u32,
            numa_node: u32,
            name: [u8; 16],
        }
        let attributes = Attributes {
            kind: HASH,
            key_size: KEY_SIZE as u32,
            value_size: VALUE_SIZE as u32,
            room,
            flags: NO_PREALLOC,
            inner: 0,
            numa_node: 0,
            name: short_name(name),
        };
        // SAFETY: the attributes hold no pointer.
        unsafe { new_descriptor(MAP_CREATE, &attributes) }.map(Map)
    }

    /// The map that is pinned at `path`.
    ///
    /// # Errors
    /// `NotFound` when nothing is pinned there, `InvalidData` when it is no map of this shape.
    pub fn at(path: &Path) -> io::Result<Self> {
        let map = Map(pinned(path, b"anon_inode:bpf-map")?);
        let shape = map.information()?;
        match (shape.kind, shape.key_size, shape.value_size) {
            (HASH, key, value) if key == KEY_SIZE as u32 && value == VALUE_SIZE as u32 => Ok(map),
            _ => Err(io::Error::new(io::ErrorKind::InvalidData, "the map has another shape")),
        }
    }

    /// Adds `key`; one that is there stays.
    ///
    /// # Errors
    /// `E2BIG` when the map is full.
    pub fn insert(&self, key: &Key) -> io::Result<()> {
        let value = [0_u8; VALUE_SIZE];
        let attributes = Element::new(self, key.as_ptr(), value.as_ptr() as u64);
        // SAFETY: key and value are as long as the map's shape says, which `create` and `at` made sure of.
        unsafe { call(MAP_UPDATE_ELEM, &attributes) }.map(drop)
    }

    /// Takes `key` out; one that is not there is no error.
    ///
    /// # Errors
    /// Those of bpf(2).
    pub fn remove(&self, key: &Key) -> io::Result<()> {
        let attributes = Element::new(self, key.as_ptr(), 0);
        // SAFETY: the key is as long as the map's shape says.
        match unsafe { call(MAP_DELETE_ELEM, &attributes) } {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    /// All keys, as long as nobody else changes the map meanwhile.
    ///
    /// # Errors
    /// Those of bpf(2).
    pub fn keys(&self) -> io::Result<Vec<Key>> {
        let mut keys: Vec<Key> = Vec::new();
        loop {
            let mut next = [0_u8; KEY_SIZE];
            let last = keys.last().map_or(std::ptr::null(), |key| key.as_ptr());
            let attributes = Element::new(self, last, next.as_mut_ptr() as u64);
            // SAFETY: both keys are as long as the map's shape says; without a last one the first is asked for.
            match unsafe { call(MAP_GET_NEXT_KEY, &attributes) } {
                Ok(_) => keys.push(next),
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(keys),
                Err(error) => return Err(error),
            }
        }
    }

    /// The kernel's number of this map.
    ///
    /// # Errors
    /// Those of bpf(2).
    pub fn id(&self) -> io::Result<u32> {
        Ok(self.information()?.id)
    }

    fn information(&self) -> io::Result<MapInformation> {
        let mut information = MapInformation::default();
        // SAFETY: the struct is plain numbers, and the kernel reads no pointer from it.
        unsafe { describe(self.0.as_fd(), &mut information) }?;
        Ok(information)
    }
}

impl AsFd for Map {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
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

/// Makes a map or a program outlive its users, at `path` in a BPF file system.
///
/// # Errors
/// `EEXIST`, or `EPERM` where there is no BPF file system.
pub fn pin(object: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let path = CString::new(path.as_os_str().as_bytes()).map_err(|_| io::ErrorKind::InvalidInput)?;
    let attributes = Pin { path: path.as_ptr() as u64, object: object.as_raw_fd() as u32, flags: 0 };
    // SAFETY: the path ends in NUL.
    unsafe { call(OBJ_PIN, &attributes) }.map(drop)
}

/// Has every process in and below `cgroup`, a folder of cgroup v2, ask `program` before it opens a device.
///
/// # Errors
/// `EBADF` when it is no cgroup, `E2BIG` when it has too many programs, `EPERM` when one further up
/// forbids it.
pub fn attach(cgroup: BorrowedFd<'_>, program: &Program) -> io::Result<()> {
    // SAFETY: the attributes are plain numbers.
    unsafe { call(PROG_ATTACH, &Attachment::new(cgroup, program)) }.map(drop)
}

/// Takes `program` off `cgroup`.
///
/// # Errors
/// `NotFound` when it is not attached there.
pub fn detach(cgroup: BorrowedFd<'_>, program: &Program) -> io::Result<()> {
    // SAFETY: the attributes are plain numbers.
    unsafe { call(PROG_DETACH, &Attachment::new(cgroup, program)) }.map(drop)
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

/// For the commands on one entry of a map. Which of a value and a next key is meant depends on the command.
#[repr(C)]
struct Element {
    map: u32,
    padding: u32,
    key: u64,
    value: u64,
    flags: u64,
}

impl Element {
    fn new(map: &Map, key: *const u8, value: u64) -> Self {
        Element { map: map.0.as_raw_fd() as u32, padding: 0, key: key as u64, value, flags: 0 }
    }
}

#[repr(C)]
struct Pin {
    path: u64,
    object: u32,
    flags: u32,
}

#[repr(C)]
struct Attachment {
    target: u32,
    program: u32,
    kind: u32,
    flags: u32,
}

impl Attachment {
    fn new(cgroup: BorrowedFd<'_>, program: &Program) -> Self {
        Attachment {
            target: cgroup.as_raw_fd() as u32,
            program: program.0.as_raw_fd() as u32,
            kind: DEVICE_ATTACHMENT,
            flags: ALLOW_MULTI,
        }
    }
}

/// The head of `struct bpf_map_info`.
#[derive(Default)]
#[repr(C)]
struct MapInformation {
    kind: u32,
    id: u32,
    key_size: u32,
    value_size: u32,
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

/// The kernel keeps fifteen bytes of a name.
fn short_name(name: &str) -> [u8; 16] {
    let mut bytes = [0; 16];
    let length = name.len().min(15);
    bytes[..length].copy_from_slice(&name.as_bytes()[..length]);
    bytes
}

/// The object pinned at `path`, if it is of the kind that its descriptor's link names.
fn pinned(path: &Path, kind: &[u8]) -> io::Result<OwnedFd> {
    let path = CString::new(path.as_os_str().as_bytes()).map_err(|_| io::ErrorKind::InvalidInput)?;
    let attributes = Pin { path: path.as_ptr() as u64, object: 0, flags: 0 };
    // SAFETY: the path ends in NUL.
    let object = unsafe { new_descriptor(OBJ_GET, &attributes) }?;
    let name = rustix::fs::readlink(format!("/proc/self/fd/{}", object.as_raw_fd()), Vec::new())?;
    match name.as_bytes() == kind {
        true => Ok(object),
        false => Err(io::Error::new(io::ErrorKind::InvalidData, "another kind of object is pinned there")),
    }
}

/// Has the kernel describe a map or a program.
///
/// # Safety
/// `T` is a head of the struct that the kernel writes for this kind of object, and every pointer in it
/// leads to as many items as the member for their number says.
unsafe fn describe<T>(object: BorrowedFd<'_>, information: &mut T) -> io::Result<()> {
    #[repr(C)]
    struct Attributes {
        object: u32,
        length: u32,
        information: u64,
    }
    let mut attributes = Attributes {
        object: object.as_raw_fd() as u32,
        length: size_of::<T>() as u32,
        information: (information as *mut T) as u64,
    };
    // SAFETY: the kernel writes no more than the struct is long, and that length into the attributes; the
    // rest is the caller's promise.
    unsafe { call_mut(OBJ_GET_INFO_BY_FD, &mut attributes) }.map(drop)
}

/// A command that makes a descriptor, which is close-on-exec.
///
/// # Safety
/// As for [`call`], and the command's result is a new descriptor.
unsafe fn new_descriptor<T>(command: libc::c_long, attributes: &T) -> io::Result<OwnedFd> {
    // SAFETY: the caller's promise.
    let descriptor = unsafe { call(command, attributes) }?;
    // SAFETY: the descriptor is new and nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor as RawFd) })
}

/// A command that only reads its attributes.
///
/// # Safety
/// As for [`call_mut`]; the kernel does not write into `attributes` for this command.
unsafe fn call<T>(command: libc::c_long, attributes: &T) -> io::Result<libc::c_long> {
    // SAFETY: the caller's promise.
    unsafe { syscall(command, attributes, size_of::<T>()) }
}

/// A command that also writes into its attributes.
///
/// # Safety
/// `T` begins like the kernel's `union bpf_attr` for this command, without padding of the compiler's, and
/// every pointer in it leads to what the command expects there.
unsafe fn call_mut<T>(command: libc::c_long, attributes: &mut T) -> io::Result<libc::c_long> {
    // SAFETY: the caller's promise.
    unsafe { syscall(command, attributes, size_of::<T>()) }
}

unsafe fn syscall<T>(command: libc::c_long, attributes: *const T, size: usize) -> io::Result<libc::c_long> {
    // SAFETY: the attributes are `size` bytes long; the rest is the caller's promise.
    match unsafe { libc::syscall(libc::SYS_bpf, command, attributes, size) } {
        -1 => Err(io::Error::last_os_error()),
        result => Ok(result),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_structs_are_those_of_the_kernel_headers() {
        assert_eq!(size_of::<Instruction>(), 8);
        assert_eq!(size_of::<Element>(), 32);
        assert_eq!(size_of::<Pin>(), 16);
        assert_eq!(size_of::<Attachment>(), 16);
        assert_eq!(size_of::<MapInformation>(), 16);
        assert_eq!(std::mem::offset_of!(ProgramInformation, map_ids), 56);
        assert_eq!(size_of::<ProgramInformation>(), 80);
    }

    #[test]
    fn names_are_cut_to_what_the_kernel_keeps() {
        assert_eq!(&short_name("guard"), b"guard\0\0\0\0\0\0\0\0\0\0\0");
        assert_eq!(&short_name("a_name_that_is_too_long"), b"a_name_that_is_\0");
    }
}
