//! The wrapped QEMUs: what their stopped system calls ask for, and who they are.

mod libvirt;
mod lookup;
mod node;
mod process;
mod request;
mod written;

pub use libvirt::{Domains, LibvirtState};
pub use node::{Located, Node, block_device_at, block_device_seen_by, is_no_device, locate};
pub use process::{
    open_block_devices, open_devices, opens_past, parse_start_time, process_of, processes, processes_with_open,
    start_time, writes_file,
};
pub use request::OpenRequest;
pub use written::{Written, WrittenFile, is_local, written_file};
