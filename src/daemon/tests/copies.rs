//! What a guest with a protected volume may write to.

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Instant;

use super::server::as_guest;
use super::*;
use crate::audit::{Entry, Kind};
use crate::guest::{OpenRequest, Written, written_file};
use crate::store::{AuditQuery, Store};

const DEADLINE: Duration = Duration::from_secs(60);

/// A guest that has the protected volume `one`, and its files, which are on a disk.
struct Copier {
    world: World,
    node: Node,
    files: TempDir,
}

impl Copier {
    /// `minor` is the number of the volume's device; the next ones are free for the test.
    fn new(minor: u32) -> Self {
        let world = World::new();
        let disk = world.add_volume("one", minor);
        let mapping = world.add_mapping("one", disk, minor + 50);
        world.open.lock().unwrap().push(mapping);
        let files = tempfile::tempdir_in("/var/tmp").unwrap();
        Copier { world, node: Node::new("/dev", disk), files }
    }

    fn file(&self, name: &str) -> PathBuf {
        let path = self.files.path().join(name);
        std::fs::write(&path, "").unwrap();
        path
    }

    /// The live XML has a disk with these sources.
    fn gives(&self, sources: &[&Path]) {
        let sources: String = sources.iter().map(|path| format!("<source dev='{}'/>", path.display())).collect();
        self.gives_devices(&format!("<disk>{sources}</disk>"));
    }

    /// The live XML has these devices.
    fn gives_devices(&self, devices: &str) {
        *self.world.given.lock().unwrap() = format!("<domain><devices>{devices}</devices></domain>");
    }

    /// The XML of what the guest shares: its files.
    fn share(&self) -> String {
        format!("<filesystem><source dir='{}'/><target dir='x'/></filesystem>", self.files.path().display())
    }

    /// What comes of opening the paths for writing with the volume in use.
    fn open(&self, more: &str, paths: &[&Path]) -> Vec<Option<i32>> {
        let volume = self.node.0.clone();
        let paths: Vec<_> = paths.iter().map(|path| path.to_path_buf()).collect();
        as_guest(self.world.broker_saying(true, more), DEADLINE, move || {
            let volume = OpenOptions::new().read(true).write(true).open(volume).unwrap();
            let opened = paths.iter().map(|path| open_errno(path)).collect();
            drop(volume);
            opened
        })
    }

    /// The refusals in the audit log, the oldest first. There has to be one; it comes after the answer.
    fn refusals(&self) -> Vec<String> {
        (0..6000)
            .find_map(|_| {
                std::thread::sleep(Duration::from_millis(10));
                Some(self.recorded()).filter(|refusals| !refusals.is_empty())
            })
            .expect("a refusal has to be recorded")
    }

    fn recorded(&self) -> Vec<String> {
        let store = Store::open(&self.world.path().join("state")).unwrap();
        let entries = store.audit(&AuditQuery::default()).unwrap().entries.into_iter().rev();
        let events = entries.map(|entry| match entry {
            Entry::Record { record, .. } => record.event,
            Entry::Damaged { damaged, .. } => panic!("{damaged}"),
        });
        events.filter(|event| event.kind == Kind::Refused).map(|event| event.detail).collect()
    }
}

/// As QEMU opens an image, and as it makes one.
fn open_errno(path: &Path) -> Option<i32> {
    let opened = OpenOptions::new().read(true).write(true).create(!path.exists()).open(path);
    opened.err().and_then(|error| error.raw_os_error())
}

const REFUSED: Option<i32> = Some(libc::EACCES);
/// What the kernel says of a device that is simulated, when the open is left to it.
const NO_DEVICE: Option<i32> = Some(libc::ENXIO);

#[test]
fn a_guest_with_a_protected_volume_writes_to_nothing_that_it_was_not_given() {
    let copier = Copier::new(220);
    let (own, other, link) = (copier.file("own"), copier.file("other"), copier.files.path().join("link"));
    std::os::unix::fs::symlink(&own, &link).unwrap();
    let made = copier.files.path().join("made");
    copier.gives(&[&own]);
    let opened = copier.open("", &[&own, &link, &other, Path::new("/dev/null")]);
    assert_eq!(opened, [None, None, REFUSED, None]);
    assert_eq!(copier.open("", &[&made]), [REFUSED]);
    assert!(!made.exists());
    assert_eq!(
        copier.refusals()[0],
        format!(
            "QEMU of domain vm may not write to {}, which nothing encrypts, while it uses the protected volume one: a copy \
             in clear could come to stand there; if it may, add its path to plaintext_targets in [policy], and run \
             'systemctl reload volcryptd'",
            other.display()
        )
    );
}

#[test]
fn it_reads_what_it_likes_and_a_guest_without_a_volume_writes_as_ever() {
    let copier = Copier::new(221);
    let file = copier.file("file");
    let (volume, path) = (copier.node.0.clone(), file.clone());
    let read = as_guest(copier.world.broker(true), DEADLINE, move || {
        let _volume = File::open(volume).unwrap();
        File::open(path).is_ok()
    });
    assert!(read);
    let path = file.clone();
    assert_eq!(as_guest(copier.world.broker(true), DEADLINE, move || open_errno(&path)), None);
    // It was detached.
    copier.world.open.lock().unwrap().clear();
    assert_eq!(copier.open("", &[&file]), [None]);
}

#[test]
fn the_configuration_may_allow_a_file() {
    let copier = Copier::new(222);
    let (file, other) = (copier.file("a.qcow2"), copier.file("a.qcow2.old"));
    let folder = copier.files.path().display().to_string();
    let allow = |pattern: &str| format!("[policy]\nplaintext_targets = ['{folder}/x', '{pattern}']\n");
    assert_eq!(copier.open(&allow(&format!("{folder}/.*\\.qcow2")), &[&file, &other]), [None, REFUSED]);
    assert_eq!(copier.open(&allow(".*"), &[&file, &other]), [None, None]);
}

#[test]
fn a_device_is_allowed_by_what_libvirt_gave_by_a_rule_or_by_its_path() {
    let copier = Copier::new(223);
    let device = copier.world.add_volume("plain", 224);
    copier.world.change(device, |identity| identity.lun = Some(2));
    let node = Node::new("/dev", device);
    let rule = "[[rules]]\nname = \"backup\"\naction = \"pass\"\niscsi_target = '.*:volume-plain'\n";
    for (more, opened) in [
        ("", REFUSED),
        (rule, NO_DEVICE),
        ("[policy]\nplaintext_targets = ['/dev/sd224']\n", NO_DEVICE),
        ("[policy]\nplaintext_targets = ['/dev/sd22']\n", REFUSED),
    ] {
        assert_eq!(copier.open(more, &[&node.0]), [opened], "{more}");
    }
    let refusals = copier.refusals();
    assert!(refusals[0].contains("('volcrypt volume identify /dev/sd224' shows by what)"), "{refusals:?}");
    copier.gives(&[&node.0]);
    assert_eq!(copier.open("", &[&node.0]), [NO_DEVICE]);
}

#[test]
fn an_overlay_of_a_protected_volume_is_given_to_nobody() {
    let copier = Copier::new(225);
    let (overlay, base) = (copier.file("overlay"), copier.file("base"));
    copier.gives(&[&overlay, &copier.node.0.clone(), &base]);
    assert_eq!(copier.open("", &[&overlay, &base]), [REFUSED, REFUSED]);
    copier.gives(&[&overlay, &base]);
    assert_eq!(copier.open("", &[&overlay, &base]), [None, None]);
}

/// systemd gives the daemon a /home and a /tmp of its own (ProtectHome=, PrivateTmp=), in which nothing is.
#[test]
fn an_overlay_of_a_volume_that_only_the_guest_sees_is_given_to_nobody() {
    let copier = Copier::new(241);
    let (overlay, hidden) = (copier.file("overlay"), tempfile::tempdir_in("/var/tmp").unwrap());
    let at = |name: &str| hidden.path().join(name);
    let script = format!(
        "mount -t tmpfs none {0} && ln -s {1} {0}/lun && touch {0}/base {0}/ready && sleep 60",
        hidden.path().display(),
        copier.node.0.display()
    );
    let mut guest =
        Command::new("unshare").args(["--mount", "sh", "-c", &script]).spawn().expect("run the tests as root");
    let ready = format!("/proc/{}/root{}", guest.id(), at("ready").display());
    while !Path::new(&ready).exists() {
        assert_eq!(guest.try_wait().unwrap(), None, "it has ended");
        std::thread::sleep(Duration::from_millis(10));
    }
    assert!(!at("lun").exists() && !at("base").exists());
    let broker = copier.world.broker(true);
    let write = |tid: u32| {
        let path = overlay.to_str().unwrap().as_bytes().to_vec();
        let request = OpenRequest { directory: None, in_root: false, path, flags: OFlags::RDWR };
        let (guest, written) = (broker.guest(tid), written_file(std::process::id(), &request).unwrap().unwrap());
        let doubt = broker.check_written(Written::File(written), &guest).map_err(|refusal| refusal.to_string())?;
        doubt.map_or(Ok(()), |doubt| broker.look_up_written(&doubt, &guest).map_err(|refusal| refusal.to_string()))
    };
    copier.gives(&[&overlay, &at("base")]);
    assert_eq!(write(guest.id()), Ok(()));
    copier.gives(&[&overlay, &at("lun")]);
    let sentence = write(guest.id()).unwrap_err();
    assert!(sentence.starts_with(&format!("QEMU of domain vm may not write to {}", overlay.display())), "{sentence}");
    guest.kill().unwrap();
    guest.wait().unwrap();
    // What nobody can look at any more may have been one.
    copier.gives(&[&overlay, &at("base")]);
    assert!(write(guest.id()).is_err());
}

#[test]
fn all_volumes_of_the_guest_are_named() {
    let copier = Copier::new(226);
    let disk = copier.world.add_volume("two", 227);
    let mapping = copier.world.add_mapping("two", disk, 278);
    copier.world.open.lock().unwrap().push(mapping);
    assert_eq!(copier.open("", &[&copier.file("file")]), [REFUSED]);
    assert!(copier.refusals()[0].contains("while it uses the protected volumes one, two: "), "{:?}", copier.refusals());
}

#[test]
fn what_is_written_already_goes_on_to_be_written() {
    let copier = Copier::new(229);
    let (file, volume) = (copier.file("file"), copier.node.0.clone());
    let opened = as_guest(copier.world.broker(true), DEADLINE, move || {
        let before = OpenOptions::new().write(true).open(&file).unwrap();
        let volume = OpenOptions::new().read(true).write(true).open(volume).unwrap();
        let again = open_errno(&file);
        drop(before);
        let closed = open_errno(&file);
        drop(volume);
        [again, closed]
    });
    assert_eq!(opened, [None, REFUSED]);
}

/// As a multipath map is whose paths are all gone, for as long as it queues.
#[test]
fn a_device_that_is_open_and_cannot_be_told_counts_as_protected() {
    let copier = Copier::new(230);
    let file = copier.file("file");
    let missing = DeviceNumber { major: 250, minor: 231 };
    // It is closed meanwhile.
    copier.world.open.lock().unwrap().clear();
    copier.world.closing.lock().unwrap().push(missing);
    assert_eq!(copier.open("", &[&file]), [None]);
    copier.world.open.lock().unwrap().push(missing);
    assert_eq!(copier.open("", &[&file]), [REFUSED]);
    assert_eq!(
        copier.refusals()[0],
        "QEMU of domain vm may not write to what nothing encrypts as long as it cannot be told whether it uses a protected \
         volume: it has block device 250:231 open, which is not there or has no path to its storage ('multipath -ll' shows \
         maps); bring the storage back or detach the disk, and try again"
    );
}

#[test]
fn what_is_allowed_needs_no_look_at_what_the_guest_has_open() {
    let copier = Copier::new(232);
    copier.world.open.lock().unwrap().push(DeviceNumber { major: 250, minor: 233 });
    let (shared, other) = (copier.file("shared"), tempfile::NamedTempFile::new_in("/var/tmp").unwrap());
    let open = |more: &str| copier.open(more, &[&shared, other.path()]);
    assert_eq!(open(""), [REFUSED; 2]);
    copier.gives_devices(&copier.share());
    assert_eq!(open(""), [None, REFUSED]);
    let allow = format!("[policy]\nplaintext_targets = ['{}']\n", other.path().display());
    assert_eq!(open(&allow), [None, None]);
}

#[test]
fn a_folder_of_a_device_that_holds_a_volume_is_given_to_nobody() {
    let copier = Copier::new(234);
    let file = copier.file("file");
    let volume = copier.node.0.display();
    let folder = copier.files.path().display();
    copier.gives_devices(&format!("<thing><source dir='{folder}'/><other file='{volume}'/></thing>"));
    assert_eq!(copier.open("", &[&file]), [REFUSED]);
}

/// The pool of QEMU that serves shared folders has 64 threads.
#[test]
fn many_writes_in_a_shared_folder_at_once_are_all_answered() {
    const THREADS: usize = 64;
    let copier = Copier::new(235);
    copier.gives_devices(&copier.share());
    let (volume, folder) = (copier.node.0.clone(), copier.files.path().to_owned());
    let failed = as_guest(copier.world.broker(true), DEADLINE, move || {
        let _volume = OpenOptions::new().read(true).write(true).open(volume).unwrap();
        let writers: Vec<_> = (0..THREADS)
            .map(|thread| {
                let folder = folder.clone();
                std::thread::spawn(move || {
                    (0..10).filter_map(|n| open_errno(&folder.join(format!("{thread}-{n}")))).count()
                })
            })
            .collect();
        writers.into_iter().map(|writer| writer.join().unwrap()).sum::<usize>()
    });
    assert_eq!(failed, 0, "of {}", 10 * THREADS);
}

/// Where everything that is looked up hangs until this is dropped: a file system whose server never answers.
struct DeadServer {
    folder: TempDir,
    _server: File,
}

impl DeadServer {
    fn new() -> Self {
        let server = OpenOptions::new().read(true).write(true).open("/dev/fuse").expect("the tests need FUSE");
        let folder = tempfile::tempdir_in("/var/tmp").unwrap();
        let mut mount = Command::new("mount");
        let mount = mount.args(["-i", "-t", "fuse", "-o", "fd=0,rootmode=40000,user_id=0,group_id=0", "dead"]);
        let mounted = mount.arg(folder.path()).stdin(Stdio::from(server.try_clone().unwrap())).status();
        assert!(mounted.is_ok_and(|status| status.success()), "run the tests as root");
        DeadServer { folder, _server: server }
    }

    /// The XML of a disk there.
    fn disk(&self) -> String {
        format!("<disk><source file='{}/disk.img'/></disk>", self.folder.path().display())
    }
}

impl Drop for DeadServer {
    fn drop(&mut self) {
        // By force: what hangs there fails, though not at once.
        let _ = Command::new("umount").args(["--force", "--lazy"]).arg(self.folder.path()).status();
    }
}

#[test]
fn a_dead_file_server_of_another_disk_holds_up_no_write_to_a_shared_folder_or_a_device() {
    let copier = Copier::new(236);
    let device = copier.world.add_volume("plain", 237);
    copier.world.change(device, |identity| identity.lun = Some(2));
    let node = Node::new("/dev", device);
    let (file, dead) = (copier.file("file"), DeadServer::new());
    let device_disk = format!("<disk><source dev='{}'/></disk>", node.0.display());
    copier.gives_devices(&[dead.disk(), copier.share(), device_disk].concat());
    let began = Instant::now();
    assert_eq!(copier.open("", &[&file, &node.0]), [None, NO_DEVICE]);
    assert!(began.elapsed() < DEADLINE, "it took {:?}", began.elapsed());
}

/// What a link leads to has to be looked up, among the guest's folders first.
#[test]
fn a_dead_file_server_holds_up_no_write_to_a_shared_folder_by_another_name() {
    let copier = Copier::new(238);
    let (file, dead) = (copier.file("file"), DeadServer::new());
    let links = tempfile::tempdir_in("/var/tmp").unwrap();
    let link = links.path().join("link");
    std::os::unix::fs::symlink(copier.files.path(), &link).unwrap();
    copier.gives_devices(&format!("{}<filesystem><source dir='{}'/></filesystem>", dead.disk(), link.display()));
    assert_eq!(copier.open("", &[&file]), [None]);
}

#[test]
fn lookups_that_hang_take_no_attach_with_them() {
    let copier = Copier::new(239);
    let attached = copier.world.add_volume("attached", 240);
    let node = Node::new("/dev", attached);
    let (file, dead) = (copier.file("file"), DeadServer::new());
    copier.gives_devices(&dead.disk());
    let (volume, other) = (copier.node.0.clone(), node.0.clone());
    let (attach, writes) = as_guest(copier.world.broker(true), Duration::from_secs(20), move || {
        let _volume = OpenOptions::new().read(true).write(true).open(volume).unwrap();
        let writers: Vec<_> = (0..40)
            .map(|_| {
                let file = file.clone();
                std::thread::spawn(move || open_errno(&file))
            })
            .collect();
        std::thread::sleep(Duration::from_secs(1));
        let attach = open_errno(&other);
        (attach, writers.into_iter().map(|writer| writer.join().unwrap()).collect::<Vec<_>>())
    });
    assert_eq!(attach, None);
    assert_eq!(writes, [Some(libc::ETIMEDOUT); 40]);
    drop(dead);
}
