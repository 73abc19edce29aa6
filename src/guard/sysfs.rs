use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::volume::DeviceNumber;

/// The devices that a sysfs tree shows.
#[derive(Debug)]
pub struct Shown {
    root: PathBuf,
}

impl Shown {
    /// The running kernel's devices.
    pub fn here() -> Self {
        Shown::at("/sys")
    }

    /// Those of the tree at `root`.
    pub fn at(root: impl Into<PathBuf>) -> Self {
        Shown { root: root.into() }
    }

    /// Every block device.
    ///
    /// # Errors
    /// When the tree cannot be read.
    pub fn block_devices(&self) -> io::Result<Vec<DeviceNumber>> {
        let entries: Vec<_> = fs::read_dir(self.root.join("class/block"))?.collect::<io::Result<_>>()?;
        // What goes away meanwhile is left out; the kernel announces it.
        Ok(entries.iter().filter_map(|entry| number_of(&entry.path())).collect())
    }

    /// Whether there is such a block device.
    pub fn has(&self, number: DeviceNumber) -> bool {
        self.root.join("dev/block").join(number.to_string()).exists()
    }

    /// The character devices that pass SCSI commands to the disk `number`: sg's and bsg's.
    pub fn passing_commands_to(&self, number: DeviceNumber) -> Vec<DeviceNumber> {
        let device = self.root.join("dev/block").join(number.to_string()).join("device");
        ["scsi_generic", "bsg"].iter().flat_map(|class| numbers_below(&device.join(class))).collect()
    }

    /// The disks of the SCSI device at `place`: one, or none as long as no driver has taken it.
    pub fn disks_of(&self, place: &Path) -> Vec<DeviceNumber> {
        numbers_below(&self.root.join(place).join("block"))
    }
}

fn numbers_below(directory: &Path) -> Vec<DeviceNumber> {
    let Ok(entries) = fs::read_dir(directory) else { return Vec::new() };
    entries.flatten().filter_map(|entry| number_of(&entry.path())).collect()
}

fn number_of(device: &Path) -> Option<DeviceNumber> {
    DeviceNumber::parse(fs::read_to_string(device.join("dev")).ok()?.trim_end())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    const SCSI: &str = "devices/platform/host2/session1/target2:0:0/2:0:0:1";

    fn disk() -> DeviceNumber {
        DeviceNumber { major: 8, minor: 0 }
    }

    fn tree() -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        let add = |place: &str, number: &str| {
            let place = root.path().join(SCSI).join(place);
            fs::create_dir_all(&place).unwrap();
            fs::write(place.join("dev"), format!("{number}\n")).unwrap();
        };
        add("block/sda", "8:0");
        add("block/sda/sda1", "8:1");
        add("scsi_generic/sg1", "21:1");
        add("bsg/2:0:0:1", "248:1");
        let link = |target: &str, place: &str| {
            let place = root.path().join(place);
            fs::create_dir_all(place.parent().unwrap()).unwrap();
            symlink(root.path().join(SCSI).join(target), place).unwrap();
        };
        link("block/sda", "class/block/sda");
        link("block/sda/sda1", "class/block/sda1");
        link("gone", "class/block/sdb");
        link("block/sda", "dev/block/8:0");
        link("", &format!("{SCSI}/block/sda/device"));
        root
    }

    #[test]
    fn a_disk_leads_to_what_passes_commands_to_it_and_back() {
        let root = tree();
        let shown = Shown::at(root.path());
        let character = |major, minor| DeviceNumber { major, minor };
        assert_eq!(shown.passing_commands_to(disk()), [character(21, 1), character(248, 1)]);
        assert!(shown.has(disk()) && !shown.has(DeviceNumber { major: 8, minor: 1 }));
        assert_eq!(shown.disks_of(Path::new(SCSI)), [disk()]);
        assert!(shown.disks_of(Path::new("devices/none")).is_empty());
        assert!(shown.passing_commands_to(DeviceNumber { major: 8, minor: 1 }).is_empty());
    }

    #[test]
    fn a_device_that_goes_meanwhile_is_left_out() {
        let root = tree();
        let mut all = Shown::at(root.path()).block_devices().unwrap();
        all.sort();
        assert_eq!(all, [disk(), DeviceNumber { major: 8, minor: 1 }]);
        assert!(Shown::at(root.path().join("none")).block_devices().is_err());
    }
}
