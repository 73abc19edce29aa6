use serde::{Deserialize, Serialize};

use super::Disk;

/// Which domain somebody is, as libvirt says it and the guest cannot change it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Facts {
    /// Its name.
    pub name: String,
    /// Its UUID.
    pub uuid: Option<String>,
    /// Whom it belongs to: see [`super::Domain::owner`].
    pub owner: Option<String>,
}

/// Somebody who asks for a device.
pub trait Requester {
    /// Which domain it is; nothing if that is not known, or if it is none.
    fn facts(&self) -> Option<&Facts>;

    /// The disks that libvirt has given to it, as far as that is known.
    fn disks(&self) -> Vec<Disk> {
        Vec::new()
    }
}

impl Requester for Facts {
    fn facts(&self) -> Option<&Facts> {
        Some(self)
    }
}

/// Nobody in particular: an operator, or a check for no domain.
pub struct Nobody;

impl Requester for Nobody {
    fn facts(&self) -> Option<&Facts> {
        None
    }
}
