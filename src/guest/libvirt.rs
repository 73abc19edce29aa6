//! Which domain a process is, by what libvirt wrote down when it started it.
//!
//! libvirt keeps `NAME.pid` and `NAME.xml` of every running domain in a directory that only root can
//! write to; both are there before the emulator is executed. The XML's root is
//! `<domstatus pid='…'>` with the live `<domain id='…'>` in it (src/conf/domain_conf.c,
//! `virDomainObjFormat`). The process has to be in the control group that libvirt made for that id as
//! well: a file that a dead libvirtd left behind could name a number that is another process's by now.

use std::fs;
use std::io::{self, Read};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use roxmltree::{Document, Node};

use crate::domain::{Disk, Domain, Facts, Given};

/// Where libvirtd and virtqemud keep the state of running domains.
const STATE: &str = "/run/libvirt/qemu";
/// The largest file that is read, in bytes: a domain with a thousand disks takes about one megabyte.
const SIZE_LIMIT: u64 = 16 << 20;

/// Tells which domain a process is.
pub trait Domains: Send + Sync {
    /// The domain that process `pid` runs; nothing if libvirt knows of none.
    ///
    /// # Errors
    /// When what libvirt wrote down cannot be read or trusted.
    fn of(&self, pid: u32) -> io::Result<Option<Facts>>;

    /// What libvirt has given to the domain that process `pid` runs; nothing if it knows of none.
    ///
    /// # Errors
    /// Those of [`Domains::of`].
    fn given(&self, pid: u32) -> io::Result<Vec<Given>>;

    /// The disks of the domain that process `pid` runs; nothing if libvirt knows of none.
    ///
    /// # Errors
    /// Those of [`Domains::of`].
    fn disks(&self, pid: u32) -> io::Result<Vec<Disk>>;
}

/// What libvirt wrote down on this host.
pub struct LibvirtState {
    state: PathBuf,
    proc: PathBuf,
}

impl LibvirtState {
    /// That of the running libvirt.
    pub fn system() -> Self {
        LibvirtState { state: STATE.into(), proc: "/proc".into() }
    }
}

impl Domains for LibvirtState {
    fn of(&self, pid: u32) -> io::Result<Option<Facts>> {
        self.live(pid, |domain| Domain::from_element(domain).facts())
    }

    fn given(&self, pid: u32) -> io::Result<Vec<Given>> {
        Ok(self.live(pid, Given::read)?.unwrap_or_default())
    }

    fn disks(&self, pid: u32) -> io::Result<Vec<Disk>> {
        Ok(self.live(pid, |domain| Domain::from_element(domain).disks)?.unwrap_or_default())
    }
}

impl LibvirtState {
    /// Reads the live `<domain>` of the domain whose process `pid` is.
    fn live<T>(&self, pid: u32, read: impl FnOnce(&Node<'_, '_>) -> T) -> io::Result<Option<T>> {
        let Some(path) = self.status_file(pid)? else { return Ok(None) };
        let text = read_trusted(&path)?;
        let unreadable = |what: &str| io::Error::other(format!("{} {what}", path.display()));
        let document = Document::parse(&text).map_err(|error| unreadable(&format!("cannot be read: {error}")))?;
        let root = document.root_element();
        if !root.has_tag_name("domstatus") || root.attribute("pid") != Some(pid.to_string().as_str()) {
            return Ok(None);
        }
        let domain = root.children().find(|node| node.has_tag_name("domain"));
        let domain = domain.ok_or_else(|| unreadable("holds no domain"))?;
        let id = domain.attribute("id").ok_or_else(|| unreadable("holds a domain without an id"))?;
        let groups = fs::read_to_string(self.proc.join(pid.to_string()).join("cgroup"))?;
        if !is_in_group_of(&groups, id) {
            return Ok(None);
        }
        Ok(Some(read(&domain)))
    }

    /// The process and the name of every running domain, as far as they can be told.
    pub fn running(&self) -> Vec<(u32, String)> {
        let Ok(entries) = fs::read_dir(&self.state) else { return Vec::new() };
        let running = |path: PathBuf| {
            let name = path.file_name()?.to_str()?.strip_suffix(".pid")?.to_owned();
            Some((read_trusted(&path).ok()?.trim_end().parse().ok()?, name))
        };
        entries.flatten().filter_map(|entry| running(entry.path())).collect()
    }

    /// The file about the domain whose process `pid` is.
    fn status_file(&self, pid: u32) -> io::Result<Option<PathBuf>> {
        let entries = match fs::read_dir(&self.state) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        for entry in entries {
            let path = entry?.path();
            if path.extension().is_some_and(|extension| extension == "pid")
                // One may go away meanwhile; that of a process which waits for an answer does not.
                && read_trusted(&path).is_ok_and(|text| text.trim_end().parse() == Ok(pid))
            {
                return Ok(Some(path.with_extension("xml")));
            }
        }
        Ok(None)
    }
}

/// The text of a file that nobody but root could have written.
fn read_trusted(path: &Path) -> io::Result<String> {
    let file = fs::OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(path)?;
    let metadata = file.metadata()?;
    if !metadata.is_file() || metadata.uid() != rustix::process::geteuid().as_raw() || metadata.mode() & 0o022 != 0 {
        return Err(io::Error::other(format!("{} can be written by others than root", path.display())));
    }
    let mut text = String::new();
    file.take(SIZE_LIMIT).read_to_string(&mut text)?;
    Ok(text)
}

/// Whether the lines of /proc/PID/cgroup (cgroups(7)) are those of the domain with this id. systemd's
/// name for the scope is `machine-qemu\x2dID\x2dNAME.scope`; without systemd it is `qemu-ID-NAME.libvirt-qemu`.
fn is_in_group_of(groups: &str, id: &str) -> bool {
    let scope = format!(r"machine-qemu\x2d{id}\x2d");
    let plain = format!("qemu-{id}-");
    let paths = groups.lines().filter_map(|line| line.splitn(3, ':').nth(2));
    paths.flat_map(|path| path.split('/')).any(|name| {
        (name.starts_with(&scope) && name.ends_with(".scope"))
            || (name.starts_with(&plain) && name.ends_with(".libvirt-qemu"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    const SCOPE: &str = r"0::/machine.slice/machine-qemu\x2d7\x2dvm.scope/libvirt/emulator";

    struct Host(tempfile::TempDir);

    impl Host {
        fn new(pid: u32, status: &str, groups: &str) -> Self {
            let directory = tempfile::tempdir().unwrap();
            fs::create_dir_all(directory.path().join(format!("proc/{pid}"))).unwrap();
            fs::create_dir(directory.path().join("state")).unwrap();
            fs::write(directory.path().join(format!("proc/{pid}/cgroup")), groups).unwrap();
            let host = Host(directory);
            host.write("other.pid", "41\n");
            host.write("vm.pid", &format!("{pid}\n"));
            host.write("vm.xml", status);
            host
        }

        fn write(&self, name: &str, text: &str) {
            fs::write(self.0.path().join("state").join(name), text).unwrap();
        }

        fn of(&self, pid: u32) -> io::Result<Option<Facts>> {
            LibvirtState { state: self.0.path().join("state"), proc: self.0.path().join("proc") }.of(pid)
        }
    }

    fn status(pid: u32) -> String {
        format!(
            "<domstatus state='running' pid='{pid}'><monitor path='x'/><domain type='kvm' id='7'><name>vm</name>\
             <uuid>0b1f7c1e-1111-4222-8333-444455556666</uuid><metadata>\
             <nova:instance xmlns:nova='http://openstack.org/xmlns/libvirt/nova/1.1'><nova:owner>\
             <nova:project uuid='p1'>demo</nova:project></nova:owner></nova:instance></metadata></domain></domstatus>"
        )
    }

    #[test]
    fn a_domain_is_known_by_libvirts_own_files() {
        let facts = Host::new(42, &status(42), SCOPE).of(42).unwrap().unwrap();
        assert_eq!((facts.name.as_str(), facts.owner.as_deref()), ("vm", Some("p1")));
        assert_eq!(facts.uuid.as_deref(), Some("0b1f7c1e-1111-4222-8333-444455556666"));
    }

    #[test]
    fn the_disks_of_a_domain_are_those_of_its_live_xml() {
        let disks = "<devices><disk type='block' device='disk'><source dev='/dev/a'/><target dev='sda'/><shareable/></disk>\
                     <disk type='block' device='disk'><source dev='/dev/b'/><target dev='sdb'/></disk></devices></domain>";
        let host = Host::new(42, &status(42).replace("</domain>", disks), SCOPE);
        let state = LibvirtState { state: host.0.path().join("state"), proc: host.0.path().join("proc") };
        let found: Vec<_> =
            state.disks(42).unwrap().into_iter().map(|disk| (disk.target, disk.is_written_alone)).collect();
        assert_eq!(found, [("sda".to_owned(), false), ("sdb".to_owned(), true)]);
        // That of an earlier domain of this name says nothing about the process.
        host.write("vm.xml", &status(41).replace("</domain>", disks));
        assert!(state.disks(42).unwrap().is_empty());
    }

    #[test]
    fn running_domains_are_those_with_a_process() {
        let host = Host::new(42, "", "");
        host.write("half.pid", "");
        let state = LibvirtState { state: host.0.path().join("state"), proc: "/proc".into() };
        let mut running = state.running();
        running.sort();
        assert_eq!(running, [(41, "other".to_owned()), (42, "vm".to_owned())]);
    }

    #[test]
    fn who_is_not_in_the_domains_control_group_is_not_the_domain() {
        for groups in [
            "0::/user.slice/user-64055.slice/session-1.scope",
            r"0::/machine.slice/machine-qemu\x2d8\x2dvm.scope",
            r"0::/machine.slice/machine-qemu\x2d77\x2dvm.scope",
            r"0::/user.slice/app-machine-qemu\x2d7\x2dvm.scope",
            "",
        ] {
            assert_eq!(Host::new(42, &status(42), groups).of(42).unwrap(), None, "{groups}");
        }
        assert!(Host::new(42, &status(42), "4:devices:/machine/qemu-7-vm.libvirt-qemu").of(42).unwrap().is_some());
    }

    #[test]
    fn a_process_that_libvirt_does_not_name_is_no_domain() {
        assert_eq!(Host::new(42, &status(42), SCOPE).of(43).unwrap(), None);
        assert_eq!(Host::new(42, &status(43), SCOPE).of(42).unwrap(), None);
        let none = LibvirtState { state: "/nowhere".into(), proc: "/proc".into() };
        assert_eq!(none.of(42).unwrap(), None);
    }

    #[test]
    fn what_others_could_have_written_is_not_believed() {
        let host = Host::new(42, &status(42), SCOPE);
        let xml = host.0.path().join("state/vm.xml");
        fs::set_permissions(&xml, fs::Permissions::from_mode(0o666)).unwrap();
        assert!(host.of(42).unwrap_err().to_string().contains("can be written by others"));
        fs::rename(&xml, host.0.path().join("real.xml")).unwrap();
        std::os::unix::fs::symlink(host.0.path().join("real.xml"), &xml).unwrap();
        assert!(host.of(42).is_err());
    }
}
