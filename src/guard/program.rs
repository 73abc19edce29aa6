use std::os::fd::{AsRawFd, BorrowedFd};

use crate::sys::bpf::{Instruction, Key};
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

/// What the kernel runs at every open of a device; `map` holds the keys of the guarded ones. 1 lets it through, 0 makes it fail with `EPERM`.
///
/// Its context is `struct bpf_cgroup_dev_ctx { u32 access_type, major, minor; }`, with the kind of device
/// in the lower half of `access_type` and what is wanted in the upper.
pub fn instructions(map: BorrowedFd<'_>) -> Vec<Instruction> {
    let (r0, r1, r2, r6, r10) = (0, 1, 2, 6, 10);
    let map = map.as_raw_fd();
    vec![
        op(LOAD_WORD, r6, r1, 0, 0),                // r6 = context.access_type
        op(MOVE, r2, r6, 0, 0),                     // r2 = what is wanted
        op(SHIFT_RIGHT, r2, 0, 0, 16),              //
        op(AND, r2, 0, 0, READ_OR_WRITE),           // to make a node is neither
        op(JUMP_IF_EQUAL, r2, 0, 14, 0),            // if that is all, let it through
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

    /// What the program says of an open, with the operations that it is made of carried out here.
    fn verdict(access: u32, device: Device, guarded: &[Device]) -> u64 {
        let stdin = std::io::stdin();
        let program = instructions(std::os::fd::AsFd::as_fd(&stdin));
        let key = device.key();
        let word = |bytes: &[u8]| u32::from_ne_bytes(bytes.try_into().unwrap());
        let context = [word(&key[0..4]) | access << 16, word(&key[4..8]), word(&key[8..12])];
        let mut registers = [u64::MAX; 11];
        let mut stack = Key::default();
        let mut at = 0;
        loop {
            let Instruction { code, registers: pair, offset, immediate } = program[at];
            let (to, from) = (usize::from(pair & 15), usize::from(pair >> 4));
            at += 1;
            match code {
                LOAD_WORD => registers[to] = u64::from(context[offset as usize / 4]),
                STORE_WORD => {
                    let start = (stack.len() as i16 + offset) as usize;
                    stack[start..start + 4].copy_from_slice(&(registers[from] as u32).to_ne_bytes());
                }
                LOAD_DOUBLE => at += 1,
                MOVE => registers[to] = registers[from],
                SET => registers[to] = immediate as u64,
                ADD => registers[to] = registers[to].wrapping_add(immediate as u64),
                AND => registers[to] &= immediate as u64,
                SHIFT_RIGHT => registers[to] >>= immediate,
                JUMP_IF_EQUAL if registers[to] == immediate as u64 => at += offset as usize,
                JUMP_IF_EQUAL => {}
                CALL => registers[0] = guarded.iter().any(|device| device.key() == stack).into(),
                EXIT => return registers[0],
                other => panic!("operation {other:#x}"),
            }
        }
    }

    #[test]
    fn only_reading_and_writing_a_guarded_device_is_refused() {
        let number = DeviceNumber { major: 8, minor: 16 };
        let guarded = [Device::Block(number), Device::Character(DeviceNumber { major: 21, minor: 1 })];
        let (make, read, write) = (1, 2, 4);
        for device in guarded {
            for (access, allowed) in [(0, 1), (make, 1), (read, 0), (write, 0), (read | write, 0), (make | read, 0)] {
                assert_eq!(verdict(access, device, &guarded), allowed, "{access} of {device:?}");
            }
        }
        for other in [Device::Character(number), Device::Block(DeviceNumber { major: 16, minor: 8 })] {
            assert_eq!(verdict(read | write, other, &guarded), 1, "{other:?}");
        }
    }

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
