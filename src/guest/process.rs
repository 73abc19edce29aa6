use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;

use crate::volume::DeviceNumber;

/// The file-system identity of a thread, by which the kernel judges what it may open.
#[derive(Debug, PartialEq, Eq)]
pub struct Credentials {
    /// The user.
    pub uid: u32,
    /// The group.
    pub gid: u32,
    /// Further groups.
    pub groups: Vec<u32>,
}

impl Credentials {
    /// Those of thread `tid`.
    ///
    /// # Errors
    /// When the thread is gone.
    pub fn of_thread(tid: u32) -> io::Result<Self> {
        let status = fs::read_to_string(format!("/proc/{tid}/status"))?;
        Self::parse(&status)
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "/proc/PID/status is not as proc(5) says"))
    }

    /// proc_pid_status(5): `Uid:` and `Gid:` hold real, effective, saved and file-system id.
    fn parse(status: &str) -> Option<Self> {
        let line = |name: &str| status.lines().find_map(|line| line.strip_prefix(name));
        let number = |text: &str| text.parse::<u32>().ok();
        Some(Credentials {
            uid: number(line("Uid:")?.split_whitespace().nth(3)?)?,
            gid: number(line("Gid:")?.split_whitespace().nth(3)?)?,
            groups: line("Groups:")?.split_whitespace().map(number).collect::<Option<_>>()?,
        })
    }

    /// Whether a file of this owner, group and mode may be opened so. Root may open anything.
    pub fn may_open(&self, owner: u32, group: u32, mode: u32, reads: bool, writes: bool) -> bool {
        let needed = u32::from(reads) * 4 + u32::from(writes) * 2;
        let granted = match () {
            () if self.uid == 0 => 7,
            () if self.uid == owner => mode >> 6,
            () if self.gid == group || self.groups.contains(&group) => mode >> 3,
            () => mode,
        };
        granted & needed == needed
    }
}

/// The name of the domain that QEMU process `pid` runs, as libvirt put it on the command line
/// (`-name guest=NAME,…`). It is for people to read: the process could have changed it.
pub fn domain_name(pid: u32) -> Option<String> {
    let command_line = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    let mut words = command_line.split(|&byte| byte == 0);
    words.find(|word| *word == b"-name")?;
    let value = String::from_utf8_lossy(words.next()?).into_owned();
    // In an option of QEMU's a comma is doubled.
    let unescaped = value.replace(",,", "\0");
    let name = unescaped.split(',').next()?.replace('\0', ",");
    Some(name.strip_prefix("guest=").map(str::to_owned).unwrap_or(name))
}

/// All processes of the host.
pub fn processes() -> Vec<u32> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
}

/// Those of `pids` that have the block device open.
pub fn processes_with_open(pids: &[u32], device: DeviceNumber) -> Vec<u32> {
    let has_open = |pid: &u32| {
        let Ok(descriptors) = fs::read_dir(format!("/proc/{pid}/fd")) else { return false };
        descriptors.flatten().any(|descriptor| {
            // Only what is a device is worth a stat, which follows the link and could wait.
            fs::read_link(descriptor.path()).is_ok_and(|target| target.starts_with("/dev"))
                && fs::metadata(descriptor.path())
                    .is_ok_and(|metadata| DeviceNumber::from_raw(metadata.rdev()) == device)
        })
    };
    pids.iter().copied().filter(has_open).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_system_ids_count() {
        let status = "Name:\tqemu\nUid:\t1\t2\t3\t4\nGid:\t5\t6\t7\t8\nFDSize:\t64\nGroups:\t9 10 \n";
        assert_eq!(Credentials::parse(status), Some(Credentials { uid: 4, gid: 8, groups: vec![9, 10] }));
        assert_eq!(Credentials::parse("Uid:\t1\n"), None);
        let own = Credentials::of_thread(std::process::id()).unwrap();
        assert_eq!(own.uid, rustix::process::geteuid().as_raw());
    }

    #[test]
    fn permission_is_judged_as_the_kernel_does() {
        let guest = Credentials { uid: 64055, gid: 64055, groups: vec![103] };
        assert!(guest.may_open(64055, 6, 0o600, true, true));
        assert!(!guest.may_open(0, 6, 0o660, true, false));
        assert!(guest.may_open(0, 103, 0o660, true, true));
        assert!(!guest.may_open(64055, 103, 0o060, true, false), "the owner's bits come first");
        assert!(guest.may_open(0, 0, 0o004, true, false));
        assert!(!guest.may_open(0, 0, 0o004, true, true));
        assert!(Credentials { uid: 0, gid: 0, groups: vec![] }.may_open(1, 1, 0, true, true));
    }
}
