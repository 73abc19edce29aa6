use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

use super::{call, describe, new_descriptor, pinned, short_name};

/// The size of a key in bytes.
const KEY_SIZE: usize = 12;
/// A key of a [`Map`].
pub type Key = [u8; KEY_SIZE];
/// The size of a value, which only says that its key is there.
const VALUE_SIZE: usize = 4;

const MAP_CREATE: libc::c_long = 0;
const MAP_UPDATE_ELEM: libc::c_long = 2;
const MAP_DELETE_ELEM: libc::c_long = 3;
const MAP_GET_NEXT_KEY: libc::c_long = 4;

/// `BPF_MAP_TYPE_HASH`.
const HASH: u32 = 1;
/// Memory for an entry is taken when it is made.
const NO_PREALLOC: u32 = 1;
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

/// The head of `struct bpf_map_info`.
#[derive(Default)]
#[repr(C)]
struct MapInformation {
    kind: u32,
    id: u32,
    key_size: u32,
    value_size: u32,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_structs_are_those_of_the_kernel_headers() {
        assert_eq!(size_of::<Element>(), 32);
        assert_eq!(size_of::<MapInformation>(), 16);
    }
}
