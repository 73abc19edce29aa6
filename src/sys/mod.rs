//! The system calls that no safe crate offers. All unsafe code of the project is in this folder.

pub mod alarm;
pub mod bpf;
pub mod credentials;
pub mod dm;
pub mod inherited;
pub mod keyring;
pub mod memory;
pub mod seccomp;
pub mod signals;
pub mod trace;
