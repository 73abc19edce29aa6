//! The packages: their scripts, run on a host that is a folder, and that both bring the same.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::thread;
use std::time::Duration;

use tempfile::TempDir;
use toml::Value;

struct Host(TempDir);

impl Host {
    fn new(files: &[&str]) -> Self {
        let host = Host(tempfile::tempdir().unwrap());
        files.iter().for_each(|file| host.write(file, ""));
        // This machine's own is none of the tests'.
        host.program(&format!("{STAND_INS}/aa-enabled"), "#!/bin/sh\nexit 1\n");
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

    fn output(&self, script: &str, arguments: &[&str]) -> Output {
        let script = source("packaging").join(script);
        let path = format!("{}:{}", self.path(STAND_INS).display(), std::env::var("PATH").unwrap());
        let mut command = Command::new("sh");
        command.arg(script).args(arguments).env("VOLCRYPT_ROOT", self.0.path()).env("PATH", path).output().unwrap()
    }

    fn run(&self, script: &str, arguments: &[&str]) {
        let output = self.output(script, arguments);
        assert!(output.status.success() && output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
    }

    /// Puts a program there. It is not this process that writes it: what another thread starts meanwhile would have it
    /// open for writing, and nobody may run it.
    fn program(&self, path: &str, content: &str) {
        let draft = format!("{path}.draft");
        self.write(&draft, content);
        let mut install = Command::new("install");
        let status = install.arg("--mode=755").arg(self.path(&draft)).arg(self.path(path)).status().unwrap();
        assert!(status.success());
        fs::remove_file(self.path(&draft)).unwrap();
    }

    /// What the package brings and its scripts call, in the place of the programs something that leaves a trace.
    fn installed() -> Self {
        let host = Host::new(&[WRAPPER, "usr/bin/qemu-system-x86_64", "etc/apparmor.d/usr.sbin.libvirtd"]);
        for script in ["link-emulators", "apparmor-rules", "check-removal"] {
            let content = fs::read_to_string(source("packaging").join(script)).unwrap();
            host.program(&format!("usr/libexec/volcrypt/{script}"), &content);
        }
        host.program(
            "usr/libexec/volcrypt/volcryptd",
            "#!/bin/sh\necho \"$1\" >\"$VOLCRYPT_ROOT/volcryptd-was-run\"\n",
        );
        host.run("rpm/post", &["1"]);
        host
    }

    /// Has systemd run there, with a libvirtd that was started before volcrypt was installed. Only the units
    /// in the file `enabled` are enabled.
    fn with_systemd(self) -> Self {
        fs::create_dir_all(self.path("run/systemd/system")).unwrap();
        let systemctl = "#!/bin/sh
            case $* in
            'show libvirtd.service '*) echo PID ;;
            show*) echo 0 ;;
            'is-enabled --quiet '*) grep -qsx \"$3\" \"$VOLCRYPT_ROOT/enabled\" ;;
            *) echo \"$*\" >>\"$VOLCRYPT_ROOT/systemctl\" ;;
            esac\n"
            .replace("PID", &std::process::id().to_string());
        self.program(&format!("{STAND_INS}/systemctl"), &systemctl);
        self.program(&format!("{STAND_INS}/systemd-tmpfiles"), "#!/bin/sh\n");
        self
    }

    /// What systemd was told to do since this was last asked.
    fn told_systemd(&self) -> Vec<String> {
        let told = self.read("systemctl").lines().map(str::to_owned).collect();
        fs::remove_file(self.path("systemctl")).unwrap();
        told
    }

    /// Whether everything is there that the scripts made at the installation.
    fn is_in_force(&self) -> bool {
        self.path(HOOK).is_symlink()
            && self.path("usr/libexec/volcrypt/emulators/qemu-system-x86_64").is_symlink()
            && self.read(LOCAL).contains("PUx,")
            && !self.path("volcryptd-was-run").exists()
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
/// Programs that are found before those of the system.
const STAND_INS: &str = "stand-ins";
const HOOK: &str = "etc/libvirt/hooks/qemu.d/50-volcrypt";

/// A path of the source.
fn source(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

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
fn rules_that_apparmor_has_refused_are_loaded_at_the_next_attempt() {
    let host = Host::new(&["etc/apparmor.d/usr.sbin.libvirtd"]);
    host.program(&format!("{STAND_INS}/aa-enabled"), "#!/bin/sh\n");
    let parser = format!("{STAND_INS}/apparmor_parser");
    host.program(&parser, "#!/bin/sh\nexit 1\n");
    for _ in 0..2 {
        let output = host.output("apparmor-rules", &["add"]);
        assert!(!output.status.success());
        assert!(String::from_utf8_lossy(&output.stderr).contains("AppArmor refused"));
    }
    host.program(&parser, "#!/bin/sh\necho \"$*\" >\"$VOLCRYPT_ROOT/loaded\"\n");
    host.run("apparmor-rules", &["add"]);
    assert!(host.read("loaded").ends_with("/etc/apparmor.d/usr.sbin.libvirtd\n"));
}

#[test]
fn a_libvirt_that_comes_later_finds_its_rules() {
    let host = Host::new(&["etc/apparmor.d/abstractions/libvirt-qemu.d/volcrypt"]);
    host.program(&format!("{STAND_INS}/aa-enabled"), "#!/bin/sh\n");
    host.program(&format!("{STAND_INS}/apparmor_parser"), "#!/bin/sh\nexit 1\n");
    let locals = || fs::read_dir(host.path("etc/apparmor.d/local")).unwrap().count();
    host.run("apparmor-rules", &["add"]);
    assert!(host.read(LOCAL).contains("/usr/libexec/volcrypt/volcrypt-hook PUx,"));
    assert_eq!(locals(), 2);
    host.run("apparmor-rules", &["remove"]);
    assert_eq!(locals(), 0);
}

#[test]
fn a_debian_package_asks_for_the_systemd_that_keeps_the_guests_listeners() {
    let manifest = fs::read_to_string(source("Cargo.toml")).unwrap();
    let asks = |line: &str| line.starts_with("depends = ") && line.contains("systemd (>= 254)");
    assert!(manifest.lines().any(asks) && manifest.lines().any(|line| line == "systemd = \">= 254\""));
}

#[test]
fn an_upgrade_by_rpm_takes_nothing_away() {
    let host = Host::installed();
    assert!(host.is_in_force());
    // In RPM's order: the newer package comes before the older one goes.
    host.run("rpm/post", &["2"]);
    host.run("rpm/preun", &["1"]);
    host.run("rpm/postun", &["1"]);
    assert!(host.is_in_force());
}

#[test]
fn a_libvirt_whose_profile_apparmor_refuses_keeps_no_other_package_from_being_installed() {
    let host = Host::installed();
    host.program(&format!("{STAND_INS}/aa-enabled"), "#!/bin/sh\n");
    host.program(&format!("{STAND_INS}/apparmor_parser"), "#!/bin/sh\nexit 1\n");
    fs::remove_dir_all(host.path("usr/libexec/volcrypt/emulators")).unwrap();
    let output = host.output("debian/postinst", &["triggered", "/usr/bin/qemu-system-x86_64"]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{said}");
    assert!(
        said.contains("AppArmor refused") && said.contains("run '/usr/libexec/volcrypt/apparmor-rules add'"),
        "{said}"
    );
    assert_eq!(host.links().len(), 1);
    host.program(&format!("{STAND_INS}/apparmor_parser"), "#!/bin/sh\n");
    host.run("debian/postinst", &["triggered", "/usr/bin/qemu-system-x86_64"]);
}

#[test]
fn an_rpm_has_its_daemon_but_no_hook_if_apparmor_refuses() {
    let host = Host::installed().with_systemd();
    fs::remove_file(host.path(HOOK)).unwrap();
    for broken in ["apparmor-rules", "link-emulators"] {
        let script = format!("usr/libexec/volcrypt/{broken}");
        host.program(&script, "#!/bin/sh\nexit 1\n");
        let output = host.output("rpm/post", &["1"]);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{broken}: {said}");
        assert!(said.starts_with("volcrypt: ") && said.contains(&format!("run '/{script}")), "{broken}: {said}");
        // libvirt would stop the guests whose hook it may not run.
        assert!(!host.path(HOOK).is_symlink(), "{broken}");
        let told =
            ["daemon-reload", "start volcryptd.socket", "start volcryptd-control.socket", "restart volcryptd.service"];
        assert_eq!(host.told_systemd(), told, "{broken}");
        host.program(&script, "#!/bin/sh\n");
    }
    host.run("rpm/post", &["1"]);
    assert_eq!(host.told_systemd().last().unwrap(), "try-restart libvirtd.service");
}

#[test]
fn an_upgrade_by_rpm_starts_nothing_that_the_operator_stopped() {
    let host = Host::installed().with_systemd();
    let upgraded = || {
        host.run("rpm/post", &["2"]);
        host.told_systemd()
    };
    let [reload, service, libvirt] = ["daemon-reload", "try-restart volcryptd.service", "try-restart libvirtd.service"];
    assert_eq!(upgraded(), [reload, service, libvirt]);
    host.write("enabled", "volcryptd-control.socket\n");
    assert_eq!(upgraded(), [reload, "start volcryptd-control.socket", service, libvirt]);
    host.write("enabled", "volcryptd.socket\nvolcryptd-control.socket\n");
    let sockets = ["start volcryptd.socket", "start volcryptd-control.socket"];
    assert_eq!(upgraded(), [reload, sockets[0], sockets[1], service, libvirt]);
}

#[test]
fn a_removal_by_rpm_leaves_no_trace() {
    let host = Host::installed();
    host.write("var/lib/volcrypt/volcrypt.db", "");
    host.program("usr/bin/volcrypt", "#!/bin/sh\necho '[{\"state\": \"destroyed\"}]'\n");
    host.run("rpm/preun", &["0"]);
    assert!(!host.path("etc/libvirt/hooks/qemu.d").exists());
    assert!(!host.path("usr/libexec/volcrypt/emulators").exists());
    assert_eq!(host.read(LOCAL), "");
    assert_eq!(host.read("volcryptd-was-run"), "--remove-guard\n");
    fs::remove_dir_all(host.path("usr/libexec/volcrypt")).unwrap();
    host.run("rpm/postun", &["0"]);
    assert!(host.path("var/lib/volcrypt/volcrypt.db").exists());
}

#[test]
fn nothing_is_removed_while_it_is_needed() {
    let listing = |host: &Host, state: &str| {
        host.write("var/lib/volcrypt/volcrypt.db", "");
        host.program("usr/bin/volcrypt", &format!("#!/bin/sh\necho '[{{\"state\": \"{state}\"}}]'\n"));
    };
    let configured = |host: &Host, text: &str| host.write("etc/volcrypt/volcrypt.toml", text);
    let needed: [&dyn Fn(&Host); 7] = [
        &|host| listing(host, "enrolled"),
        &|host| listing(host, "retired"),
        // What cannot be asked for may be there.
        &|host| {
            listing(host, "destroyed");
            host.program("usr/bin/volcrypt", "#!/bin/sh\nexit 1\n");
        },
        &|host| configured(host, "[key_manager]\n  directory = '/srv/keys'\n"),
        &|host| configured(host, "key_manager.directory = '/srv/keys'\n"),
        &|host| configured(host, "key_manager = { type = 'embedded', directory = '/srv/keys' }\n"),
        &|host| host.write("sys/block/dm-3/dm/uuid", "VOLCRYPT-plain-v1\n"),
    ];
    for (number, need) in needed.iter().enumerate() {
        let host = Host::installed();
        need(&host);
        let output = host.output("rpm/preun", &["0"]);
        assert!(!output.status.success(), "need {number}");
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(said.starts_with("volcrypt: not removed, because"), "need {number}: {said}");
        assert!(host.is_in_force(), "need {number}");
    }
    let host = Host::installed();
    host.write("sys/block/dm-3/dm/uuid", "LVM-x\n");
    configured(&host, "#directory = '/srv/a'\n  # key_manager.directory = '/srv/b'\n[hook] # no directory\n");
    host.run("check-removal", &[]);
}

/// A file of a package.
#[derive(Debug, PartialEq, Eq)]
struct Packaged {
    source: String,
    mode: String,
    /// Whether a changed one of the operator's stays.
    is_kept: bool,
}

fn metadata(kind: &str) -> Value {
    let manifest: Value = toml::from_str(&fs::read_to_string(source("Cargo.toml")).unwrap()).unwrap();
    manifest["package"]["metadata"][kind].clone()
}

fn text(value: &Value) -> String {
    value.as_str().unwrap().to_owned()
}

fn files_of_the_deb() -> BTreeMap<String, Packaged> {
    let deb = metadata("deb");
    let conf_files: Vec<String> = deb["conf-files"].as_array().unwrap().iter().map(text).collect();
    let file = |asset: &Value| {
        let (source, mut place, mode) = (text(&asset[0]), format!("/{}", text(&asset[1])), text(&asset[2]));
        if place.ends_with('/') {
            place.push_str(source.rsplit('/').next().unwrap());
        }
        let is_kept = conf_files.contains(&place);
        (place, Packaged { source, mode, is_kept })
    };
    let mut files: BTreeMap<_, _> = deb["assets"].as_array().unwrap().iter().map(file).collect();
    // Debian's packages have it as their file `copyright`.
    let license = Packaged { source: text(&deb["license-file"][0]), mode: "644".to_owned(), is_kept: false };
    files.insert("/usr/share/licenses/volcrypt/LICENSE".to_owned(), license);
    files
}

fn files_of_the_rpm() -> BTreeMap<String, Packaged> {
    let file = |asset: &Value| {
        let is_kept = asset.get("config").is_some_and(|config| config.as_str() == Some("noreplace"));
        (text(&asset["dest"]), Packaged { source: text(&asset["source"]), mode: text(&asset["mode"]), is_kept })
    };
    metadata("generate-rpm")["assets"].as_array().unwrap().iter().map(file).collect()
}

#[test]
fn both_packages_bring_the_same_files() {
    let (deb, rpm) = (files_of_the_deb(), files_of_the_rpm());
    assert_eq!(deb, rpm);
    for (place, file) in rpm {
        assert!(file.source.starts_with("target/release/") || source(&file.source).is_file(), "{place}");
        assert_eq!(place.starts_with("/etc/"), file.is_kept, "{place}");
    }
}

/// cargo-generate-rpm takes the path of a script that is not there for the script itself.
#[test]
fn the_rpm_has_its_scripts() {
    let rpm = metadata("generate-rpm");
    for (key, name) in
        [("post_install_script", "post"), ("pre_uninstall_script", "preun"), ("post_uninstall_script", "postun")]
    {
        let path = text(&rpm[key]);
        assert_eq!(path, format!("packaging/rpm/{name}"));
        assert!(source(&path).is_file(), "{path}");
    }
}
