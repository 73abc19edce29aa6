use std::path::{Component, Path};

use super::error::Fault;
use super::file::GuardTable;

/// The cgroup in which systemd-machined has libvirt's guests.
const DEFAULT_CGROUP: &str = "machine.slice";

/// The section `[guard]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuardConfig {
    /// Whether processes of the cgroup are kept from raw devices of protected volumes.
    pub enabled: bool,
    /// The cgroup that all guests run in, as a path below `/sys/fs/cgroup`.
    pub cgroup: String,
}

impl Default for GuardConfig {
    fn default() -> Self {
        GuardConfig { enabled: true, cgroup: DEFAULT_CGROUP.to_owned() }
    }
}

impl GuardConfig {
    pub(super) fn new(table: GuardTable) -> Result<Self, Fault> {
        let default = GuardConfig::default();
        let enabled = table.enabled.unwrap_or(default.enabled);
        let Some(cgroup) = table.cgroup else { return Ok(GuardConfig { enabled, ..default }) };
        let text = cgroup.get_ref();
        let plain = Path::new(text).components().all(|part| matches!(part, Component::Normal(_)));
        match plain && !text.is_empty() && !text.contains('\0') {
            true => Ok(GuardConfig { enabled, cgroup: cgroup.into_inner() }),
            false => {
                let sentence =
                    format!("cgroup = {text:?} is no path below /sys/fs/cgroup; write one like {DEFAULT_CGROUP:?}");
                Err(Fault::new(cgroup.span(), sentence))
            }
        }
    }
}
