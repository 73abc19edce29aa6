use std::os::fd::{AsFd, AsRawFd};

use crate::sys::bpf::{Instruction, Key, Map};
use crate::volume::DeviceNumber;

/// Goes up with every change of the program or of the map's keys, so that a new daemon replaces what an
/// older one has left.
pub const VERSION: u32 = 1;

/// `BPF_DEVCG_DEV_BLOCK`.
const BLOCK: u32 = 1;
/// `BPF_DEVCG_DEV_CHAR`.
const CHARACTER: u32 = 2;
/// `BPF_DEVCG_ACC_READ | BPF_DEVCG_ACC_WRITE`.
const READ_OR_WRITE: i32 = 6;

/// A device that a node in /dev can lead to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Device {
    /// A block device.
    Block(DeviceNumber),
    /// A character device: one that passes SCSI commands to a disk.
    Character(DeviceNumber),
}

impl Device {
    /// The key in the map: three numbers as the program finds them in its context.
    pub fn key(self) -> Key {
        let (kind, number) = match self {
            Device::Block(number) => (BLOCK, number),
            Device::Character(number) => (CHARACTER, number),
        };
        let mut key = Key::default();
        key[0..4].copy_from_slice(&kind.to_ne_bytes());
        key[4..8].copy_from_slice(&number.major.to_ne_bytes());
        key[8..12].copy_from_slice(&number.minor.to_ne_bytes());
        key
    }

    /// The device of a key; `None` for a key that this version does not make.
    pub fn from_key(key: &Key) -> Option<Self> {
        let word = |at: usize| u32::from_ne_bytes([key[at], key[at + 1], key[at + 2], key[at + 3]]);
        let number = DeviceNumber { major: word(4), minor: word(8) };
        match word(0) {
            BLOCK => Some(Device::Block(number)),
            CHARACTER => Some(Device::Character(number)),
            _ => None,
        }
    }
}

/// What the kernel runs at every open of a device: 1 lets it through, 0 makes it fail with `EPERM`.
///
/// Its context is `struct bpf_cgroup_dev_ctx { u32 access_type, major, minor; }`, with the kind of device
/// in the lower half of `access_type` and what is wanted in the upper.
pub fn instructions(map: &Map) -> Vec<Instruction> {
    let (r0, r1, r2, r6, r10) = (0, 1, 2, 6, 10);
    let map = map.as_fd().as_raw_fd();
    vec![
        op(LOAD_WORD, r6, r1, 0, 0),                // r6 = context.access_type
        op(MOVE, r2, r6, 0, 0),                     // r2 = what is wanted
        op(SHIFT_RIGHT, r2, 0, 0, 16),              //
        op(AND, r2, 0, 0, READ_OR_WRITE),           // to make a node is neither
        op(JUMP_IF_EQUAL, r2, 0, 13, 0),            // if that is all, let it through
        op(AND, r6, 0, 0, 0xffff),                  // r6 = the kind of device
        op(STORE_WORD, r10, r6, -12, 0),            // key.kind
        op(LOAD_WORD, r2, r1, 4, 0),                // r2 = context.major
        op(STORE_WORD, r10, r2, -8, 0),             // key.major
        op(LOAD_WORD, r2, r1, 8, 0),                // r2 = context.minor
        op(STORE_WORD, r10, r2, -4, 0),             // key.minor
        op(MOVE, r2, r10, 0, 0),                    // r2 = the key's address
        op(ADD, r2, 0, 0, -12),                     //
        op(LOAD_DOUBLE, r1, PSEUDO_MAP_FD, 0, map), // r1 = the map; takes the place of two instructions
        op(0, 0, 0, 0, 0),                          //
        op(CALL, 0, 0, 0, MAP_LOOKUP),              // r0 = bpf_map_lookup_elem(r1, r2)
        op(JUMP_IF_EQUAL, r0, 0, 2, 0),             // if there is no such key, let it through
        op(SET, r0, 0, 0, 0),                       // refuse
        op(EXIT, 0, 0, 0, 0),                       //
        op(SET, r0, 0, 0, 1),                       // let it through
        op(EXIT, 0, 0, 0, 0),                       //
    ]
}

// The operations, put together as linux/bpf_common.h and linux/bpf.h have it; 64 bits wide unless they
// say otherwise.
/// `BPF_LDX | BPF_MEM | BPF_W`
const LOAD_WORD: u8 = 0x61;
/// `BPF_STX | BPF_MEM | BPF_W`
const STORE_WORD: u8 = 0x63;
/// `BPF_LD | BPF_IMM | BPF_DW`
const LOAD_DOUBLE: u8 = 0x18;
/// `BPF_ALU64 | BPF_MOV | BPF_X`
const MOVE: u8 = 0xbf;
/// `BPF_ALU64 | BPF_MOV | BPF_K`
const SET: u8 = 0xb7;
/// `BPF_ALU64 | BPF_ADD | BPF_K`
const ADD: u8 = 0x07;
/// `BPF_ALU64 | BPF_AND | BPF_K`
const AND: u8 = 0x57;
/// `BPF_ALU64 | BPF_RSH | BPF_K`
const SHIFT_RIGHT: u8 = 0x77;
/// `BPF_JMP | BPF_JEQ | BPF_K`
const JUMP_IF_EQUAL: u8 = 0x15;
/// `BPF_JMP | BPF_CALL`
const CALL: u8 = 0x85;
/// `BPF_JMP | BPF_EXIT`
const EXIT: u8 = 0x95;
/// `BPF_FUNC_map_lookup_elem`
const MAP_LOOKUP: i32 = 1;
/// `BPF_PSEUDO_MAP_FD`, in the place of a source register: the constant is a map's descriptor.
const PSEUDO_MAP_FD: u8 = 1;

fn op(code: u8, destination: u8, source: u8, offset: i16, immediate: i32) -> Instruction {
    Instruction { code, registers: destination | source << 4, offset, immediate }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_tell_block_from_character_devices() {
        let number = DeviceNumber { major: 8, minor: 0x1234_5678 };
        for device in [Device::Block(number), Device::Character(number)] {
            assert_eq!(Device::from_key(&device.key()), Some(device));
        }
        assert_ne!(Device::Block(number).key(), Device::Character(number).key());
        assert_eq!(Device::from_key(&Key::default()), None);
    }
}
