use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, FileType, OFlags, Statx, StatxFlags};
use rustix::io::Errno;

use super::OpenRequest;
use super::lookup::End;
use super::node::{block_device_at, end, look_as, origin};
use super::process::writes_file;
use crate::domain::Given;
use crate::volume::DeviceNumber;

/// File systems that keep nothing: proc(5), sysfs(5), and the one of huge pages, which are a guest's memory. Their
/// numbers stand in `linux/magic.h`.
const KEEP_NOTHING: [i64; 3] = [0x9fa0, 0x6265_6572, 0x9584_58f6];

/// Where libvirt has QEMU write what is no disk: sockets, logs, and the guest's memory itself, which is in /dev/shm
/// where it is shared with other processes.
const NO_DISKS: [&str; 5] =
    ["/run/libvirt", "/var/cache/libvirt", "/var/log/libvirt", "/var/lib/libvirt/qemu/ram", "/dev/shm"];

/// Where libvirt keeps what it has of running domains.
const LIBVIRT_FOLDER: &str = "/var/lib/libvirt/qemu";
/// What the name of a running domain's own folder there begins with, in which libvirt has QEMU write screenshots and
/// what it is to show of the memory; `7-web` follows.
const DOMAINS_FOLDER: &[u8] = b"domain-";

/// Something that a call could write to.
#[derive(Debug)]
pub enum Written {
    /// A file.
    File(WrittenFile),
    /// A block device.
    Device(DeviceNumber),
}

/// A regular file that a call could write to, or make.
#[derive(Debug)]
pub struct WrittenFile {
    /// Its path as the host sees it; that of its folder, if it is to have no name.
    pub path: PathBuf,
    /// The file system and the number of the file there; nothing if there is no file yet.
    number: Option<Number>,
    /// The thread that would write.
    tid: u32,
}

/// Major and minor number of the file system, and the inode.
type Number = (u32, u32, u64);

/// What `request` of thread `tid` could write to; nothing if it could not, if there is something else than a file, and
/// if the place keeps no copy of anything: see [`KEEP_NOTHING`] and [`NO_DISKS`].
///
/// # Errors
/// When it cannot be told.
pub fn written_file(tid: u32, request: &OpenRequest) -> io::Result<Option<WrittenFile>> {
    if !request.writes() || request.is_path_only() {
        return Ok(None);
    }
    let end = match origin(tid, request).and_then(|origin| end(tid, &origin, request)) {
        Ok(end) => end,
        // The kernel finds nothing there either.
        Err(Errno::NOENT | Errno::NOTDIR) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let (handle, name, number) = match end {
        End::Nothing(folder, name) if request.flags.contains(OFlags::CREATE) => (folder, Some(name), None),
        End::Nothing(..) => return Ok(None),
        End::Place(place) => {
            let status = rustix::fs::statx(&place, c"", AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC, WANTED)?;
            match FileType::from_raw_mode(status.stx_mode.into()) {
                FileType::RegularFile => (place, None, Some(number(&status))),
                FileType::Directory if request.flags.contains(OFlags::TMPFILE) => (place, None, None),
                _ => return Ok(None),
            }
        }
    };
    if KEEP_NOTHING.contains(&(rustix::fs::fstatfs(&handle)?.f_type as i64)) {
        return Ok(None);
    }
    let mut path = path_of(&handle)?;
    path.extend(name.map(OsString::from_vec));
    Ok((!is_no_disk(&path)).then_some(WrittenFile { path, number, tid }))
}

fn is_no_disk(path: &Path) -> bool {
    let domains = Path::new(LIBVIRT_FOLDER);
    let is_domains =
        |own: &Path| path.strip_prefix(own).is_ok_and(|rest| rest.as_os_str().as_bytes().starts_with(DOMAINS_FOLDER));
    // Any of them may be a link to a larger disk.
    let real = |folder: &Path, fits: &dyn Fn(&Path) -> bool| folder.canonicalize().is_ok_and(|folder| fits(&folder));
    is_domains(domains)
        || NO_DISKS.iter().any(|folder| path.starts_with(folder))
        || real(domains, &is_domains)
        || NO_DISKS.iter().any(|folder| real(folder.as_ref(), &|folder| path.starts_with(folder)))
}

const WANTED: StatxFlags = StatxFlags::TYPE.union(StatxFlags::INO);

fn number(status: &Statx) -> Number {
    (status.stx_dev_major, status.stx_dev_minor, status.stx_ino)
}

/// libvirt's namespaces have mounts of their own in /dev only: elsewhere the path is that of the host.
fn path_of(handle: &OwnedFd) -> io::Result<PathBuf> {
    fs::read_link(format!("/proc/self/fd/{}", handle.as_raw_fd()))
}

impl Written {
    /// The path by which `given` names this place, if that can be told without asking any file server: a file in the
    /// same words, or by a folder that it is in; a device by what is in /dev.
    pub fn named_at_once_by<'a>(&self, given: &'a Given) -> Option<&'a Path> {
        match self {
            Written::Device(device) => given.find(|path| is_local(path) && is_device(path, *device)),
            Written::File(file) => given
                .find(|path| path == file.path)
                .or_else(|| given.find_folder(|folder| file.path.starts_with(folder))),
        }
    }

    /// Whether process `pid` writes to it already. QEMU opens an image anew when it takes it up again.
    pub fn is_written_by(&self, pid: u32) -> bool {
        match self {
            Written::File(WrittenFile { number: Some(own), .. }) => writes_file(pid, |status| number(status) == *own),
            _ => false,
        }
    }

    /// The folder by which `given` names this place, if it does. It is looked up.
    pub fn within_folder_of<'a>(&self, given: &'a Given) -> Option<&'a Path> {
        match self {
            Written::Device(_) => None,
            Written::File(file) => given.find_folder(|folder| file.is_within(folder)),
        }
    }

    /// The path by which `given` names this place, if it does. All of them are looked up.
    pub fn named_by<'a>(&self, given: &'a Given) -> Option<&'a Path> {
        match self {
            Written::Device(device) => given.find(|path| is_device(path, *device)),
            Written::File(file) => given.find(|path| file.is_at(path)),
        }
    }
}

/// Whether looking `path` up asks no file server.
pub fn is_local(path: &Path) -> bool {
    path.starts_with("/dev")
}

fn is_device(path: &Path, device: DeviceNumber) -> bool {
    block_device_at(path).is_ok_and(|named| named == device)
}

impl WrittenFile {
    fn is_at(&self, path: &Path) -> bool {
        match (look_as(self.tid, path), self.number) {
            (Ok(End::Place(place)), Some(own)) => {
                let status = rustix::fs::statx(&place, c"", AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC, WANTED);
                status.is_ok_and(|status| number(&status) == own)
            }
            (Ok(End::Nothing(folder, name)), None) => {
                path_of(&folder).is_ok_and(|folder| folder.join(OsString::from_vec(name)) == self.path)
            }
            _ => false,
        }
    }

    fn is_within(&self, folder: &Path) -> bool {
        match look_as(self.tid, folder) {
            Ok(End::Place(place)) => path_of(&place).is_ok_and(|folder| self.path.starts_with(folder)),
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::given;
    use std::os::unix::fs::symlink;

    fn request(path: &Path, flags: OFlags) -> OpenRequest {
        let path = path.to_str().unwrap().as_bytes().to_vec();
        OpenRequest { directory: None, in_root: false, path, flags }
    }

    fn written(path: &Path, flags: OFlags) -> Option<WrittenFile> {
        written_file(std::process::id(), &request(path, flags)).unwrap()
    }

    fn is_named(given: &[Given], file: WrittenFile) -> bool {
        let written = Written::File(file);
        given.iter().any(|given| written.within_folder_of(given).or_else(|| written.named_by(given)).is_some())
    }

    fn folder() -> tempfile::TempDir {
        tempfile::tempdir_in("/var/tmp").unwrap()
    }

    #[test]
    fn what_could_be_written_to_is_known_by_its_path_on_the_host() {
        let folder = folder();
        let at = |name: &str| folder.path().join(name);
        fs::write(at("there"), "").unwrap();
        symlink("there", at("link")).unwrap();
        symlink("made", at("dangling")).unwrap();
        let new = OFlags::RDWR | OFlags::CREATE;
        for (name, flags, path) in [
            ("there", OFlags::RDWR, at("there")),
            ("there", OFlags::WRONLY | OFlags::TRUNC, at("there")),
            ("./link", OFlags::RDWR, at("there")),
            ("made", new, at("made")),
            ("dangling", new | OFlags::EXCL, at("made")),
            ("", OFlags::RDWR | OFlags::TMPFILE, folder.path().to_owned()),
        ] {
            assert_eq!(written(&at(name), flags).unwrap().path, path, "{name}");
        }
        for (path, flags) in [
            (at("there"), OFlags::RDONLY),
            (at("there"), OFlags::RDWR | OFlags::PATH),
            (at("made"), OFlags::RDWR),
            (at("made/below"), new),
            (at("made/"), new),
            (folder.path().to_owned(), OFlags::RDWR),
            ("/dev/null".into(), OFlags::RDWR),
            ("/proc/self/comm".into(), OFlags::RDWR),
            ("/dev/shm/volcrypt".into(), new),
        ] {
            assert!(written(&path, flags).is_none(), "{} {flags:?}", path.display());
        }
    }

    #[test]
    fn libvirts_folders_for_what_is_no_disk_are_known() {
        for path in ["/var/lib/libvirt/qemu/domain-7-web/qemu.screendump.1PVKZ3", "/var/lib/libvirt/qemu/ram/7-web/ram"]
        {
            assert!(is_no_disk(path.as_ref()), "{path}");
        }
        for path in ["/var/lib/libvirt/images/a", "/var/lib/libvirt/qemu/save/web.save", "/run/libvirt-backup/a"] {
            assert!(!is_no_disk(path.as_ref()), "{path}");
        }
    }

    #[test]
    fn who_may_not_be_looked_at_is_no_file_to_write_to() {
        let folder = folder();
        symlink("loop", folder.path().join("loop")).unwrap();
        let request = request(&folder.path().join("loop"), OFlags::RDWR | OFlags::CREATE);
        assert_eq!(written_file(std::process::id(), &request).unwrap_err().raw_os_error(), Some(libc::ELOOP));
    }

    #[test]
    fn a_file_is_named_by_any_path_to_it_and_by_a_folder_that_a_guest_shares() {
        let folder = folder();
        let at = |name: &str| folder.path().join(name);
        fs::create_dir(at("share")).unwrap();
        for name in ["there", "other", "share/in"] {
            fs::write(at(name), "").unwrap();
        }
        symlink("there", at("link")).unwrap();
        fs::hard_link(at("there"), at("hard")).unwrap();
        let shown = folder.path().display();
        let given = given(&format!(
            "<domain><devices><disk><source file='{shown}/link'/></disk><serial><log file='{shown}/log'/></serial>\
             <filesystem><source dir='{shown}/share'/></filesystem></devices></domain>"
        ));
        let named = |name: &str, flags| is_named(&given, written(&at(name), flags).unwrap());
        for name in ["there", "link", "hard", "share/in"] {
            assert!(named(name, OFlags::RDWR), "{name}");
        }
        for name in ["log", "share/new"] {
            assert!(named(name, OFlags::RDWR | OFlags::CREATE), "{name}");
        }
        for name in ["other", "logs", "share-new"] {
            assert!(!named(name, OFlags::RDWR | OFlags::CREATE), "{name}");
        }
    }

    /// As for the daemon's own /tmp and /home, which systemd gives it (PrivateTmp=, ProtectHome=).
    #[test]
    fn a_path_is_what_it_is_for_the_writer() {
        let folder = folder();
        let file = folder.path().join("disk.img");
        let script =
            format!("mount -t tmpfs none {0} && touch {0}/disk.img {0}/ready && sleep 60", folder.path().display());
        let mut writer = std::process::Command::new("unshare");
        let mut writer = writer.args(["--mount", "sh", "-c", &script]).spawn().expect("run the tests as root");
        let ready = format!("/proc/{}/root{}/ready", writer.id(), folder.path().display());
        while !Path::new(&ready).exists() {
            assert_eq!(writer.try_wait().unwrap(), None, "it has ended");
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        let named = |xml: &str| {
            let given = given(&format!("<domain><devices>{xml}</devices></domain>"));
            ["disk.img", "new.img"].map(|name| {
                let request = request(&folder.path().join(name), OFlags::RDWR | OFlags::CREATE);
                is_named(&given, written_file(writer.id(), &request).unwrap().unwrap())
            })
        };
        assert!(!file.exists());
        assert_eq!(named(&format!("<disk><source file='{}'/></disk>", file.display())), [true, false]);
        assert_eq!(
            named(&format!("<filesystem><source dir='{}'/></filesystem>", folder.path().display())),
            [true, true]
        );
        assert_eq!(named("<disk><source file='/var/tmp/other.img'/></disk>"), [false, false]);
        writer.kill().unwrap();
        writer.wait().unwrap();
    }
}
