//! What the programs say to each other on the daemon's two sockets.
//!
//! On the **control socket** (root only) a client sends one [`Request`] and gets one [`Response`],
//! each a line of JSON; no key is ever part of one. Before the response to what takes long, there may be some that say how
//! far it is. On the **wrapper socket** a wrapper sends its
//! seccomp listener and gets one byte back: see [`registration`].

mod control;
mod identification;
pub mod registration;
mod socket;
mod status;

pub use control::{HookOperation, Reply, Request, Response};
pub use identification::Identification;
pub use socket::{CallError, Connection, ControlClient, MAX_MESSAGE, receive_request};
pub use status::{
    CachedVolume, GuardStatus, GuestStatus, KeyCacheStatus, KeyPage, KeyStatus, MappingStatus, Status, VolumeStatus,
};

/// Where both sockets are.
pub const RUNTIME_DIRECTORY: &str = "/run/volcrypt";
/// The socket for the hook and for `volcrypt`.
pub const CONTROL_SOCKET: &str = "/run/volcrypt/control.sock";
/// The folder of the links named `qemu-system-*` that lead to the wrapper.
pub const EMULATOR_DIRECTORY: &str = "/usr/libexec/volcrypt/emulators";
/// The socket for the emulator wrapper.
pub const WRAPPER_SOCKET: &str = "/run/volcrypt/wrapper.sock";
