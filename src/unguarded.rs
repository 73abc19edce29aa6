//! The permission to start without the daemon, and so without a listener.
//!
//! While the daemon cannot be reached, a domain without protected disks may start if the
//! configuration says so. The hook, as root, has looked at its disks and leaves a marker; the
//! wrapper, which may not even read the configuration, sees it and starts QEMU without a listener.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::domain::{Domain, is_uuid};
use crate::protocol::RUNTIME_DIRECTORY;

/// The place of one domain's marker: a file named after its UUID in `/run/volcrypt/unguarded`, a
/// folder that only root can write to.
#[derive(Debug, PartialEq, Eq)]
pub struct Marker {
    path: Option<PathBuf>,
}

impl Marker {
    /// The marker of the domain with this UUID; of none, if it is no UUID.
    pub fn of_uuid(uuid: &str) -> Self {
        let path =
            is_uuid(uuid).then(|| Path::new(RUNTIME_DIRECTORY).join("unguarded").join(uuid.to_ascii_lowercase()));
        Marker { path }
    }

    /// The marker of the domain that `xml` describes.
    pub fn of_xml(xml: &str) -> Self {
        let uuid = Domain::parse(xml).ok().and_then(|domain| domain.uuid);
        Marker::of_uuid(&uuid.unwrap_or_default())
    }

    /// Whether the permission is given.
    pub fn is_set(&self) -> bool {
        self.path.as_ref().is_some_and(|path| path.exists())
    }

    /// Gives the permission.
    ///
    /// # Errors
    /// A sentence, when the marker cannot be written.
    pub fn set(&self) -> Result<(), String> {
        let path = self.path.as_ref().ok_or("the domain has no UUID to note that it starts without a guard")?;
        let explain = |error: io::Error| format!("{} cannot be written: {error}", path.display());
        fs::create_dir_all(path.parent().unwrap_or(path)).map_err(explain)?;
        fs::write(path, "").map_err(explain)
    }

    /// Takes the permission back.
    pub fn remove(&self) {
        if let Some(path) = &self.path
            && let Err(error) = fs::remove_file(path)
            && error.kind() != io::ErrorKind::NotFound
        {
            eprintln!("volcrypt: {} cannot be removed: {error}", path.display());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_uuid_names_a_marker() {
        let marker = Marker::of_uuid("0B1F7C1E-1111-4222-8333-444455556666");
        let path = "/run/volcrypt/unguarded/0b1f7c1e-1111-4222-8333-444455556666";
        assert_eq!(marker.path.as_deref(), Some(Path::new(path)));
        for other in ["", "../../etc/passwd", "0b1f7c1e-1111-4222-8333-44445555666/", "x"] {
            assert_eq!(Marker::of_uuid(other).path, None, "{other}");
        }
        assert!(!Marker::of_uuid("").is_set());
        assert!(Marker::of_uuid("").set().is_err());
    }
}
