use std::fs;

/// A host, as the others that ask the same key manager are told of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Host {
    /// Its name.
    pub name: String,
    /// What tells it from others of that name. Hosts that were cloned may have the same.
    pub id: String,
}

impl Host {
    /// The host that this runs on: its name and its machine-id(5).
    pub fn this() -> Self {
        let read = |path| fs::read_to_string(path).unwrap_or_default().trim().to_owned();
        let name = read("/proc/sys/kernel/hostname");
        let id = Some(read("/etc/machine-id")).filter(|id| !id.is_empty()).unwrap_or_else(|| name.clone());
        Host { name, id }
    }
}
