use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;

use crate::volume::DeviceNumber;

/// The user by which the kernel judges what thread `tid` may open.
///
/// # Errors
/// When the thread is gone.
pub fn file_system_user(tid: u32) -> io::Result<u32> {
    let status = fs::read_to_string(format!("/proc/{tid}/status"))?;
    parse_file_system_user(&status)
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "/proc/PID/status is not as proc(5) says"))
}

/// The process that thread `tid` belongs to. A process that a QEMU has started has that QEMU's listener
/// and is not that QEMU.
///
/// # Errors
/// When the thread is gone.
pub fn process_of(tid: u32) -> io::Result<u32> {
    let status = fs::read_to_string(format!("/proc/{tid}/status"))?;
    let process = status.lines().find_map(|line| line.strip_prefix("Tgid:")?.trim().parse().ok());
    process.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "/proc/PID/status is not as proc(5) says"))
}

/// proc_pid_status(5): `Uid:` holds the real, effective, saved and file-system id.
fn parse_file_system_user(status: &str) -> Option<u32> {
    let line = status.lines().find_map(|line| line.strip_prefix("Uid:"))?;
    line.split_whitespace().nth(3)?.parse().ok()
}

/// Whether `user` may open a file of this owner and mode as its owner. Root may open anything. The
/// rights of groups and others do not count: libvirt gives a disk to a guest by making it the owner
/// of the node.
pub fn may_open(user: u32, owner: u32, mode: u32, reads: bool, writes: bool) -> bool {
    let needed = u32::from(reads) * 0o400 + u32::from(writes) * 0o200;
    user == 0 || (user == owner && mode & needed == needed)
}

/// The name of the domain that QEMU process `pid` runs, as libvirt put it on the command line
/// (`-name guest=NAME,…`). It is for people to read: the process could have changed it.
pub fn domain_name(pid: u32) -> Option<String> {
    let value = option(pid, b"-name")?;
    // In an option of QEMU's a comma is doubled.
    let unescaped = value.replace(",,", "\0");
    let name = unescaped.split(',').next()?.replace('\0', ",");
    Some(name.strip_prefix("guest=").map(str::to_owned).unwrap_or(name))
}

/// The UUID of the domain that QEMU process `pid` runs, known as its name is (`-uuid UUID`).
pub fn domain_uuid(pid: u32) -> Option<String> {
    option(pid, b"-uuid")
}

/// What follows `option` on the command line of process `pid`.
fn option(pid: u32, option: &[u8]) -> Option<String> {
    let command_line = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    let mut words = command_line.split(|&byte| byte == 0);
    words.find(|word| *word == option)?;
    Some(String::from_utf8_lossy(words.next()?).into_owned())
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
    fn the_file_system_id_counts() {
        assert_eq!(parse_file_system_user("Name:\tqemu\nUid:\t1\t2\t3\t4\nGid:\t5\t6\t7\t8\n"), Some(4));
        assert_eq!(parse_file_system_user("Uid:\t1\n"), None);
        assert_eq!(file_system_user(std::process::id()).unwrap(), rustix::process::geteuid().as_raw());
    }

    #[test]
    fn threads_are_their_process_and_children_are_not() {
        let own = std::process::id();
        let thread = std::thread::spawn(|| process_of(rustix::thread::gettid().as_raw_nonzero().get() as u32));
        assert_eq!(thread.join().unwrap().unwrap(), own);
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        assert_eq!(process_of(child.id()).unwrap(), child.id());
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(process_of(child.id()).is_err());
    }

    #[test]
    fn only_the_owner_of_a_node_was_given_it() {
        let guest = 64055;
        assert!(may_open(guest, guest, 0o600, true, true));
        assert!(!may_open(guest, guest, 0o400, true, true));
        assert!(!may_open(guest, guest, 0o066, true, false));
        assert!(!may_open(guest, 0, 0o666, true, false), "what everybody may open was given to nobody");
        assert!(may_open(0, guest, 0, true, true));
    }
}
