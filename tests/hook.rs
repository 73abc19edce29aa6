//! libvirt's hook while no daemon listens: what it refuses, and that its standard output, which would be the domain's
//! XML, stays empty.

use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use assert_cmd::cargo::CommandCargoExt;

/// Runs the hook as libvirt does; gives exit code, stdout and stderr.
fn hook(operation: &str, sub_operation: &str, xml: &str) -> (i32, String, String) {
    run(Command::cargo_bin("volcrypt-hook").unwrap(), operation, sub_operation, xml)
}

fn run(mut hook: Command, operation: &str, sub_operation: &str, xml: &str) -> (i32, String, String) {
    hook.args(["vm", operation, sub_operation, "-"]);
    let mut child = hook.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    // A hook that does not read its input may be gone by now.
    let _ = child.stdin.take().unwrap().write_all(xml.as_bytes());
    let output = child.wait_with_output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
}

const DOMAIN: &str = "<domain type='kvm'><name>vm</name><devices/></domain>";

#[test]
fn a_domain_neither_starts_nor_comes_without_the_daemon() {
    let (code, output, sentence) = hook("prepare", "begin", DOMAIN);
    assert_eq!((code, output.as_str()), (1, ""));
    assert!(sentence.starts_with("volcrypt: volcryptd cannot be reached on "), "{sentence}");
    // virsh shows this one on another host.
    let (code, output, sentence) = hook("migrate", "begin", DOMAIN);
    assert_eq!((code, output.as_str()), (1, ""));
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap();
    let expected = format!("volcrypt: host {}: volcryptd cannot be reached on ", host.trim());
    assert!(sentence.starts_with(&expected) && sentence.trim_end().lines().count() == 1, "{sentence}");
}

/// libvirt deletes a managed save whose restoring a hook refuses, and kills a guest to which it reconnects.
#[test]
fn what_must_never_fail_does_not() {
    for xml in [DOMAIN, "<domain>", ""] {
        for (operation, sub_operation) in [("restore", "begin"), ("reconnect", "begin"), ("stopped", "end")] {
            let (code, output, _) = hook(operation, sub_operation, xml);
            assert_eq!((code, output.as_str()), (0, ""), "{operation} of {xml:?}");
        }
    }
    let (_, _, sentence) = hook("restore", "begin", DOMAIN);
    assert!(sentence.starts_with("volcrypt: volcryptd cannot be reached on "), "{sentence}");
}

/// Whose libvirtd runs as a user.
#[test]
fn a_session_of_a_user_is_none_of_its_business() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::set_permissions(folder.path(), PermissionsExt::from_mode(0o755)).unwrap();
    let program = folder.path().join("volcrypt-hook");
    // Not by this process: what another thread starts meanwhile would have the copy open for writing, and nobody may run it.
    let built = Command::cargo_bin("volcrypt-hook").unwrap();
    assert!(Command::new("cp").arg(built.get_program()).arg(&program).status().unwrap().success());
    for (operation, sub_operation) in
        [("prepare", "begin"), ("migrate", "begin"), ("restore", "begin"), ("started", "begin"), ("release", "end")]
    {
        let mut command = Command::new(&program);
        command.uid(65534).gid(65534);
        let outcome = run(command, operation, sub_operation, DOMAIN);
        assert_eq!(outcome, (0, String::new(), String::new()), "{operation}");
    }
}
