//! volcrypt encrypts virtual machines' volumes on the hypervisor.
//!
//! A **volume** is a block device the hypervisor sees (an iSCSI LUN first of all). A **mapping** is
//! the dm-crypt device on top of it. The guest reads and writes the mapping; the volume holds
//! ciphertext only. Folders are subjects:
//!
//! - [`volume`]: what a volume is called and how the kernel identifies it;
//! - [`policy`]: the configuration file, its rules and profiles;
//! - [`keys`]: key managers and the secret types they hand out;
//! - [`store`]: the database of enrolled volumes, wrapped keys and audit records;
//! - [`audit`]: what is recorded of their use, and the chain that it makes;
//! - [`domain`]: domains as libvirt describes them;
//! - [`encryptor`]: making, checking and flagging mappings;
//! - [`guest`]: the wrapped QEMUs and the system calls they send;
//! - [`guard`]: keeping guests without the wrapper from protected volumes;
//! - [`protocol`]: what the programs say to each other;
//! - [`daemon`], [`hook`], [`wrapper`], [`cli`]: the four programs; [`unguarded`], [`logging`] and
//!   [`printable`] are what they share;
//! - [`sys`]: the only place with unsafe code.

#![deny(unsafe_code)]
#![warn(missing_docs)]

pub mod audit;
pub mod cli;
pub mod daemon;
pub mod domain;
pub mod encryptor;
pub mod guard;
pub mod guest;
pub mod hook;
pub mod keys;
pub mod logging;
pub mod policy;
pub mod printable;
pub mod protocol;
pub mod refusal;
pub mod store;
#[allow(unsafe_code)]
pub mod sys;
pub mod unguarded;
pub mod volume;
pub mod wrapper;
