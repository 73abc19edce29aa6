//! The files for vdsm, run as vdsm runs them: by the folder of the event, with what it puts into the environment,
//! with the meaning that it gives to exit codes.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

const BEFORE: &str = "<domain>\n  <source dev='/dev/sda'/>\n</domain>";
const AFTER: &str = "<domain>\n  <source dev='/dev/mapper/volcrypt-a'/>\n</domain>";
const MACHINE: &str = "0b1f7c1e-1111-4222-8333-444455556666";
/// vdsm's user, here nobody.
const USER: u32 = 65534;

/// A host with stand-ins for `volcrypt` and `sudo`, which write down how they were called.
struct Host(TempDir);

impl Host {
    /// `volcrypt` does what `script` says.
    fn new(script: &str) -> Self {
        let host = Host(tempfile::tempdir().unwrap());
        fs::set_permissions(host.0.path(), fs::Permissions::from_mode(0o777)).unwrap();
        let log = host.path("log");
        fs::write(&log, "").unwrap();
        fs::set_permissions(&log, fs::Permissions::from_mode(0o666)).unwrap();
        let say = format!("#!/bin/sh\necho \"${{0##*/}} $*\" >>{}\n", log.display());
        host.program("volcrypt", &format!("{say}{script}\n"));
        host.program("sudo", &format!("{say}[ \"$1\" = -n ] && shift && exec \"$@\"\n"));
        let hook = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("hooks/vdsm/50_volcrypt")).unwrap();
        let here = |name: &str| host.path(name).display().to_string();
        let hook = hook.replace("/usr/bin/volcrypt", &here("volcrypt")).replace("/usr/bin/sudo", &here("sudo"));
        for event in ["before_vm_start", "before_disk_hotplug", "after_disk_hotplug", "after_disk_hotunplug", "other"] {
            fs::create_dir(host.path(event)).unwrap();
            host.program(&format!("{event}/50_volcrypt"), &hook);
        }
        fs::create_dir(host.path("tmp")).unwrap();
        fs::set_permissions(host.path("tmp"), fs::Permissions::from_mode(0o1777)).unwrap();
        fs::write(host.xml(), BEFORE).unwrap();
        fs::set_permissions(host.xml(), fs::Permissions::from_mode(0o600)).unwrap();
        chown(host.xml(), Some(USER), Some(USER)).expect("run the tests as root");
        host
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Puts a program there. It is not this process that writes it: what another thread starts meanwhile would have it
    /// open for writing, and nobody may run it.
    fn program(&self, name: &str, text: &str) {
        let draft = self.path(&format!("{name}.draft"));
        fs::write(&draft, text).unwrap();
        let status = Command::new("install").arg("--mode=755").arg(&draft).arg(self.path(name)).status().unwrap();
        assert!(status.success());
        fs::remove_file(draft).unwrap();
    }

    fn xml(&self) -> PathBuf {
        self.path("tmp/domxml")
    }

    /// What vdsm does at `event`, as its user; gives the exit code and what is said.
    fn call(&self, event: &str, change: impl FnOnce(&mut Command)) -> (i32, String) {
        let mut command = Command::new(self.path(event).join("50_volcrypt"));
        command.uid(USER).gid(USER).env("_hook_domxml", self.xml()).env("vmId", MACHINE);
        change(&mut command);
        let output = command.output().unwrap();
        assert!(output.stdout.is_empty());
        (output.status.code().unwrap(), String::from_utf8(output.stderr).unwrap())
    }

    fn log(&self) -> String {
        fs::read_to_string(self.path("log")).unwrap().replace(&format!("{}/", self.0.path().display()), "")
    }

    /// The XML, which is as vdsm made it but for its content, and alone.
    fn content(&self) -> String {
        let metadata = fs::metadata(self.xml()).unwrap();
        assert_eq!((metadata.uid(), metadata.gid(), metadata.mode() & 0o7777), (USER, USER, 0o600));
        assert_eq!(fs::read_dir(self.path("tmp")).unwrap().count(), 1, "a file is left");
        fs::read_to_string(self.xml()).unwrap()
    }
}

const REWRITES: &str = "sed s,/dev/sda,/dev/mapper/volcrypt-a,";
const REFUSES: &str = "echo '<half'; echo 'volcrypt: disk sda: no key' >&2; exit 1";

#[test]
fn xml_is_rewritten_in_its_place() {
    for (event, called) in [("before_vm_start", "rewrite"), ("before_disk_hotplug", "hold -- ID")] {
        let called = called.replace("ID", MACHINE);
        let host = Host::new(REWRITES);
        assert_eq!(host.call(event, |_| ()), (0, String::new()));
        assert_eq!(host.content(), AFTER);
        assert_eq!(host.log(), format!("sudo -n volcrypt {called}\nvolcrypt {called}\n"));
        // Root needs nobody's leave.
        let host = Host::new(REWRITES);
        assert_eq!(
            host.call(event, |command| {
                command.uid(0).gid(0);
            }),
            (0, String::new())
        );
        assert_eq!((host.content().as_str(), host.log()), (AFTER, format!("volcrypt {called}\n")));
    }
}

#[test]
fn what_needs_no_change_is_not_touched() {
    let host = Host::new("cat");
    let inode = fs::metadata(host.xml()).unwrap().ino();
    assert_eq!(host.call("before_vm_start", |_| ()), (0, String::new()));
    assert_eq!((host.content().as_str(), fs::metadata(host.xml()).unwrap().ino()), (BEFORE, inode));
}

#[test]
fn a_refusal_stops_vdsm_and_leaves_the_xml() {
    for event in ["before_vm_start", "before_disk_hotplug"] {
        let host = Host::new(REFUSES);
        assert_eq!(host.call(event, |_| ()), (2, "volcrypt: disk sda: no key\n".to_owned()));
        assert_eq!(host.content(), BEFORE);
        // Neither does it take nothing for XML.
        let host = Host::new("exit 0");
        let (code, said) = host.call(event, |_| ());
        assert!(code == 2 && said.starts_with("volcrypt: there is no XML"), "{said}");
        assert_eq!(host.content(), BEFORE);
    }
}

#[test]
fn what_is_plugged_is_held_no_longer() {
    for event in ["after_disk_hotplug", "after_disk_hotunplug"] {
        let host = Host::new("cat >/dev/null");
        assert_eq!(host.call(event, |_| ()), (0, String::new()));
        assert_eq!(host.log().lines().last().unwrap(), format!("volcrypt hold --release -- {MACHINE}"));
        let host = Host::new(REFUSES.trim_start_matches("echo '<half'; "));
        assert_eq!(host.call(event, |_| ()), (1, "volcrypt: disk sda: no key\n".to_owned()));
        assert_eq!(host.content(), BEFORE);
    }
}

#[test]
fn what_vdsm_does_not_say_is_named() {
    let host = Host::new(REWRITES);
    for (event, expected) in [("before_vm_start", 2), ("before_disk_hotplug", 2), ("after_disk_hotplug", 1)] {
        let (code, said) = host.call(event, |command| {
            command.env_remove("_hook_domxml");
        });
        assert_eq!((code, said.contains("_hook_domxml")), (expected, true), "{event}: {said}");
    }
    for (event, expected) in [("before_disk_hotplug", 2), ("after_disk_hotunplug", 1)] {
        let (code, said) = host.call(event, |command| {
            command.env_remove("vmId");
        });
        assert_eq!((code, said.contains("vmId")), (expected, true), "{event}: {said}");
    }
    let (code, said) = host.call("other", |_| ());
    assert!(code == 1 && said.contains("not into other"), "{said}");
    assert_eq!((host.content().as_str(), host.log().as_str()), (BEFORE, ""));
}

#[test]
fn custom_properties_choose_no_program() {
    let host = Host::new(REWRITES);
    let path = host.path("tmp");
    assert_eq!(
        host.call("before_vm_start", |command| {
            command.env("PATH", path).env("new", "x");
        }),
        (0, String::new())
    );
    assert_eq!(host.content(), AFTER);
}
