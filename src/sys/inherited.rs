//! Descriptors that the service manager passed on: sd_listen_fds(3).

use std::io;
use std::os::fd::{FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};

static TAKEN: AtomicBool = AtomicBool::new(false);

/// The descriptors and their names, close-on-exec. The second call finds none.
///
/// # Errors
/// When the environment variables of the protocol make no sense.
pub fn take_descriptors() -> io::Result<Vec<(OwnedFd, String)>> {
    if TAKEN.swap(true, Ordering::SeqCst) {
        return Ok(Vec::new());
    }
    let descriptors = sd_notify::listen_fds_with_names()?;
    // SAFETY: the service manager opened them for this process, which takes them just once.
    Ok(descriptors.map(|(descriptor, name)| (unsafe { OwnedFd::from_raw_fd(descriptor) }, name)).collect())
}
