//! The package's scripts, run on a host that is a folder.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::Duration;

use tempfile::TempDir;

struct Host(TempDir);

impl Host {
    fn new(files: &[&str]) -> Self {
        let host = Host(tempfile::tempdir().unwrap());
        files.iter().for_each(|file| host.write(file, ""));
        host
    }

    fn path(&self, path: &str) -> PathBuf {
        self.0.path().join(path)
    }

    fn write(&self, path: &str, content: &str) {
        fs::create_dir_all(self.path(path).parent().unwrap()).unwrap();
        fs::write(self.path(path), content).unwrap();
    }

    fn read(&self, path: &str) -> String {
        fs::read_to_string(self.path(path)).unwrap()
    }

    fn run(&self, script: &str, arguments: &[&str]) {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("packaging").join(script);
        let output =
            Command::new("sh").arg(script).args(arguments).env("VOLCRYPT_ROOT", self.0.path()).output().unwrap();
        assert!(output.status.success() && output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
    }

    fn links(&self) -> Vec<(String, PathBuf)> {
        let mut links: Vec<_> = fs::read_dir(self.path("usr/libexec/volcrypt/emulators"))
            .unwrap()
            .map(|entry| entry.unwrap())
            .map(|entry| (entry.file_name().into_string().unwrap(), fs::read_link(entry.path()).unwrap()))
            .collect();
        links.sort();
        links
    }

    /// When the wrapper's inode last changed: what libvirt compares.
    fn wrapper_changed(&self) -> (i64, i64) {
        let metadata = fs::metadata(self.path(WRAPPER)).unwrap();
        (metadata.ctime(), metadata.ctime_nsec())
    }
}

const WRAPPER: &str = "usr/libexec/volcrypt/volcrypt-qemu";
const LOCAL: &str = "etc/apparmor.d/local/usr.sbin.libvirtd";

/// Longer than the kernel's clock takes to tick, so that a later change has a later time.
fn tick() {
    thread::sleep(Duration::from_millis(30));
}

#[test]
fn the_wrapper_stands_in_for_every_emulator_and_for_nothing_else() {
    let host = Host::new(&[WRAPPER, "usr/bin/qemu-system-arm", "usr/bin/qemu-system-x86_64", "usr/bin/qemu-img"]);
    symlink("qemu-system-x86_64", host.path("usr/bin/qemu-system-amd64")).unwrap();
    host.run("link-emulators", &[]);
    let wrapper = PathBuf::from("../volcrypt-qemu");
    let both = [("qemu-system-arm".to_owned(), wrapper.clone()), ("qemu-system-x86_64".to_owned(), wrapper)];
    assert_eq!(host.links(), both);

    // A link that leads elsewhere is put right.
    fs::remove_file(host.path("usr/libexec/volcrypt/emulators/qemu-system-x86_64")).unwrap();
    symlink("/bin/true", host.path("usr/libexec/volcrypt/emulators/qemu-system-x86_64")).unwrap();
    fs::remove_file(host.path("usr/bin/qemu-system-arm")).unwrap();
    host.run("link-emulators", &[]);
    assert_eq!(host.links(), both[1..]);
}

#[test]
fn libvirt_is_made_to_look_again_only_when_a_qemu_changed() {
    let host = Host::new(&["usr/bin/qemu-system-x86_64"]);
    tick();
    host.write(WRAPPER, "");
    let before = host.wrapper_changed();
    tick();
    host.run("link-emulators", &[]);
    assert_eq!(host.wrapper_changed(), before);

    // As dpkg does it: a new file with an old mtime.
    let emulator = host.path("usr/bin/qemu-system-x86_64");
    host.write("usr/bin/new", "");
    let old = fs::File::open(host.path("usr/bin/new")).unwrap();
    old.set_modified(std::time::SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000_000)).unwrap();
    fs::rename(host.path("usr/bin/new"), emulator).unwrap();
    tick();
    host.run("link-emulators", &[]);
    let after = host.wrapper_changed();
    assert!(after > before);
    tick();
    host.run("link-emulators", &[]);
    assert_eq!(host.wrapper_changed(), after);
}

#[test]
fn the_rules_come_once_and_go_without_a_trace() {
    let host = Host::new(&["etc/apparmor.d/usr.sbin.libvirtd"]);
    let others = "# the site's own\n/opt/tool PUx,\n";
    host.write(LOCAL, others);
    host.run("apparmor-rules", &["add"]);
    let added = host.read(LOCAL);
    assert!(added.starts_with(others) && added.contains("\n/usr/libexec/volcrypt/volcrypt-hook PUx,\n"), "{added}");
    assert_eq!(fs::metadata(host.path(LOCAL)).unwrap().permissions().mode() & 0o777, 0o644);
    host.run("apparmor-rules", &["add"]);
    assert_eq!(host.read(LOCAL), added);
    host.run("apparmor-rules", &["remove"]);
    assert_eq!(host.read(LOCAL), others);
    assert_eq!(fs::read_dir(host.path("etc/apparmor.d/local")).unwrap().count(), 1);
}

#[test]
fn no_rules_are_made_for_a_profile_that_is_not_installed() {
    let host = Host::new(&["etc/apparmor.d/usr.sbin.libvirtd"]);
    host.run("apparmor-rules", &["add"]);
    assert!(host.path(LOCAL).exists());
    assert!(!host.path("etc/apparmor.d/local/usr.sbin.virtqemud").exists());
}
