use std::path::{Component, Path, PathBuf};

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
    /// Whether a domain in libvirt's resource partition `partition` runs in the cgroup, or below it. libvirt has
    /// systemd put `/a/b` into the slice `a-b.slice`, which stands in `a.slice`; without systemd it makes
    /// `a.partition/b.partition`, and only `machine`, `system` and `user` are called so:
    /// <https://libvirt.org/cgroups.html>.
    pub fn has_partition(&self, partition: &str) -> bool {
        let parts: Vec<&str> = partition.split('/').filter(|part| !part.is_empty()).collect();
        if parts.iter().any(|part| part.starts_with('.')) {
            return false;
        }
        let Some(parts) = parts.get(..Path::new(&self.cgroup).components().count()) else { return false };
        // systemd has anything else escaped, and what stands for another name is no name to decide by.
        let is_plain = |part: &&str| part.chars().all(|letter| letter.is_ascii_alphanumeric() || letter == '_');
        let slices: PathBuf = (1..=parts.len()).map(|count| format!("{}.slice", parts[..count].join("-"))).collect();
        let partitions: PathBuf = (0..parts.len())
            .map(|place| match (place, parts[place]) {
                (0, "machine" | "system" | "user") => parts[0].to_owned(),
                (_, part) => format!("{part}.partition"),
            })
            .collect();
        parts.iter().all(is_plain) && [slices, partitions].contains(&PathBuf::from(&self.cgroup))
    }
}

/// The partition of a domain that asks for none.
pub const DEFAULT_PARTITION: &str = "/machine";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_partition_is_in_the_cgroup_or_it_is_not() {
        let in_it = |cgroup: &str, partition: &str| {
            GuardConfig { enabled: true, cgroup: cgroup.to_owned() }.has_partition(partition)
        };
        for inside in ["/machine", "/machine/", "/machine/web", "machine/web/one", "/machine/web-1"] {
            assert!(in_it("machine.slice", inside), "{inside}");
        }
        for outside in
            ["/", "", "/other", "/machine2", "/machine-web", "/mach\\x69ne", "/machine/../other", "/other/machine"]
        {
            assert!(!in_it("machine.slice", outside), "{outside}");
        }
        assert!(in_it("machine.slice/machine-web.slice", "/machine/web"));
        assert!(!in_it("machine.slice/machine-web.slice", "/machine"));
        assert!(in_it("machine", "/machine/web"));
        assert!(in_it("production.partition", "/production/web"));
        assert!(!in_it("production.slice", DEFAULT_PARTITION));
    }
}
