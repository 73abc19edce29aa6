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
    /// `a.partition/b.partition`: <https://libvirt.org/cgroups.html>.
    pub fn has_partition(&self, partition: &str) -> bool {
        let parts: Vec<&str> = partition.split('/').filter(|part| !part.is_empty()).collect();
        // libvirt escapes anything else, and a name that stands for another one is no name to decide by.
        let is_plain = |part: &&str| part.chars().all(|letter| letter.is_ascii_alphanumeric() || letter == '_');
        let slices: PathBuf = (1..=parts.len()).map(|count| format!("{}.slice", parts[..count].join("-"))).collect();
        let partitions: PathBuf = parts.iter().map(|part| format!("{part}.partition")).collect();
        parts.iter().all(is_plain) && [slices, partitions].iter().any(|path| path.starts_with(&self.cgroup))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_partition_is_in_the_cgroup_or_it_is_not() {
        let in_it = |cgroup: &str, partition: &str| {
            GuardConfig { enabled: true, cgroup: cgroup.to_owned() }.has_partition(partition)
        };
        for inside in ["/machine", "/machine/", "/machine/web", "machine/web/one"] {
            assert!(in_it("machine.slice", inside), "{inside}");
        }
        for outside in
            ["/", "", "/other", "/machine2", "/machine-web", "/mach\\x69ne", "/machine/../other", "/other/machine"]
        {
            assert!(!in_it("machine.slice", outside), "{outside}");
        }
        assert!(in_it("machine.slice/machine-web.slice", "/machine/web"));
        assert!(!in_it("machine.slice/machine-web.slice", "/machine"));
        assert!(in_it("machine.partition", "/machine/web"));
    }
}
