//! The operator's command: what it says, where it says it, and with which exit code. The daemon is a
//! thread that answers one request.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread::{self, JoinHandle};

use assert_cmd::cargo::CommandCargoExt;
use clap::Parser;
use serde_json::{Value, json};
use tempfile::TempDir;
use volcrypt::cli::doctor::LibvirtView;
use volcrypt::cli::{self, Arguments, Libvirt, Outcome};
use volcrypt::protocol::registration::receive_with_descriptors;

/// Runs the program itself; gives exit code, stdout and stderr.
fn volcrypt(arguments: &[&str]) -> (i32, String, String) {
    let output = Command::cargo_bin("volcrypt").unwrap().args(arguments).output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
}

/// A daemon that answers one request with `answer`, after it wrote `content` to the descriptor that came
/// with it, if one did. Ends with the request.
struct FakeDaemon {
    folder: TempDir,
    thread: JoinHandle<Value>,
}

impl FakeDaemon {
    /// One that answers as many requests; gives them all at the end.
    fn answering(answers: Vec<Value>) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(folder.path().join("control.sock")).unwrap();
        let thread = thread::spawn(move || {
            let requests = answers.into_iter().map(|answer| {
                let (mut stream, _) = listener.accept().unwrap();
                let mut buffer = [0; 4096];
                let (length, _) = receive_with_descriptors(&stream, &mut buffer).unwrap();
                writeln!(stream, "{answer}").unwrap();
                serde_json::from_slice(&buffer[..length]).unwrap()
            });
            Value::Array(requests.collect())
        });
        FakeDaemon { folder, thread }
    }

    fn new(answer: Value, content: &'static str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(folder.path().join("control.sock")).unwrap();
        let thread = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut buffer = [0; 4096];
            let (length, mut descriptors) = receive_with_descriptors(&stream, &mut buffer).unwrap();
            if let Some(descriptor) = descriptors.pop() {
                fill(descriptor, content);
            }
            writeln!(stream, "{answer}").unwrap();
            serde_json::from_slice(&buffer[..length]).unwrap()
        });
        FakeDaemon { folder, thread }
    }

    fn run(&self, arguments: &[&str]) -> Result<Outcome, String> {
        run(arguments, &self.folder.path().join("control.sock"))
    }

    fn request(self) -> Value {
        self.thread.join().unwrap()
    }
}

fn fill(descriptor: OwnedFd, content: &str) {
    File::from(descriptor).write_all(content.as_bytes()).unwrap();
}

fn run(arguments: &[&str], socket: &Path) -> Result<Outcome, String> {
    let arguments = Arguments::try_parse_from([&["volcrypt"], arguments].concat()).unwrap();
    let libvirt = Libvirt {
        survey: no_libvirt,
        look: |_| Err("libvirt is not part of this test".into()),
        define: |_| Err("libvirt is not part of this test".into()),
        find: |_| Err("libvirt is not part of this test".into()),
        change: |_, _, _, _| Err("libvirt is not part of this test".into()),
    };
    cli::run(&arguments, socket, libvirt).map_err(|error| error.to_string())
}

fn no_libvirt() -> Result<LibvirtView, String> {
    Err("libvirt is not part of this test".into())
}

fn record() -> Value {
    json!({
        "id": "vol-1", "device": { "iscsi_target": "iqn.2026-11.org.lab:v0", "lun": 0, "wwid": null },
        "size_bytes": 1 << 20, "profile": "default", "provider": "plain", "cipher": "aes-xts-plain64",
        "key_size": 512, "sector_size": 512, "key": { "id": "vol-1", "version": 1 }, "check_value": "000102030405060708090a0b0c0d0e0f",
        "enrolled_at": 0, "state": "enrolled", "owner": null, "mapped": false, "domains": []
    })
}

#[test]
fn without_a_daemon_there_is_one_sentence_and_exit_code_1() {
    for arguments in [&["status"][..], &["volume", "list"], &["key", "list"], &["volume", "enrol", "/dev/sda"]] {
        let (code, stdout, stderr) = volcrypt(arguments);
        assert_eq!((code, stdout.as_str()), (1, ""), "{arguments:?}");
        assert!(
            stderr.starts_with("volcrypt: volcryptd cannot be reached on /run/volcrypt/control.sock ("),
            "{stderr}"
        );
        assert_eq!(stderr.lines().count(), 1, "{stderr}");
    }
}

/// Runs the program itself with `input`, without a daemon.
fn filtered(arguments: &[&str], input: &[u8]) -> (i32, String, String) {
    let mut command = Command::cargo_bin("volcrypt").unwrap();
    let mut child =
        command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    // It may have refused the rest already.
    let _ = child.stdin.take().unwrap().write_all(input);
    let output = child.wait_with_output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
}

#[test]
fn xml_goes_back_through_a_filter_that_asks_nobody() {
    let folder = Path::new("xml-fixtures/rewrite");
    let read = |name: &str| fs::read_to_string(folder.join(name)).unwrap();
    for name in ["nova-instance-live", "mark-and-declaration", "crlf-and-a-file", "nothing-protected"] {
        let (code, stdout, stderr) =
            filtered(&["rewrite", "--reverse"], read(&format!("{name}.expected.xml")).as_bytes());
        assert_eq!((code, stderr.as_str()), (0, ""), "{name}");
        assert_eq!(stdout, read(&format!("{name}.xml")));
    }
}

#[test]
fn a_filter_that_refuses_prints_one_sentence_and_no_xml() {
    let lone = fs::read("xml-fixtures/rewrite/lone-disk.expected.xml").unwrap();
    for (arguments, input, sentence) in [
        (&["rewrite", "--reverse"][..], &lone[..], "volcrypt: disk vdb: a lone <disk> has no metadata"),
        (&["rewrite", "--reverse"], b"<domain>", "volcrypt: the domain's XML cannot be read: "),
        (&["rewrite", "--reverse"], b"<domain xmlns='a&#10;b'/>", "volcrypt: the domain's XML cannot be read: "),
        (&["rewrite"], b"<disk\xff/>", "volcrypt: standard input is not UTF-8"),
        (&["rewrite"], b"<disk/>", "volcrypt: volcryptd cannot be reached on "),
    ] {
        let (code, stdout, stderr) = filtered(arguments, input);
        assert_eq!((code, stdout.as_str(), stderr.lines().count()), (1, "", 1), "{stderr}");
        assert!(stderr.starts_with(sentence), "{stderr}");
    }
}

#[test]
fn wrong_usage_is_exit_code_2() {
    for arguments in
        [&[][..], &["frobnicate"], &["volume", "show"], &["volume", "show", "../x"], &["volume", "export-key", "a"]]
    {
        let (code, stdout, stderr) = volcrypt(arguments);
        assert_eq!((code, stdout.as_str()), (2, ""), "{arguments:?}: {stderr}");
    }
}

#[test]
fn a_sound_configuration_is_explained() {
    let (code, stdout, stderr) = volcrypt(&["config", "check", "--config", "packaging/volcrypt.toml"]);
    assert_eq!((code, stderr.as_str()), (0, ""));
    assert!(!stdout.is_empty());
}

#[test]
fn a_broken_configuration_is_one_sentence_that_names_the_line() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("volcrypt.toml");
    fs::write(&path, "\nno_such_section = 1\n").unwrap();
    let (code, stdout, stderr) = volcrypt(&["--config", path.to_str().unwrap(), "config", "check"]);
    assert_eq!((code, stdout.as_str()), (1, ""));
    assert!(stderr.starts_with(&format!("volcrypt: {}:2: ", path.display())), "{stderr}");
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
}

#[test]
fn where_virshs_commands_are_meant_the_exit_codes_are_virshs() {
    for (arguments, expected) in [
        (["attach-device", "--help"].as_slice(), 0),
        (&["attach-device", "vm", "/nowhere", "--frobnicate"], 1),
        (&["detach-device", "vm"], 1),
        (&["attach-device", "vm", "/nowhere", "--live", "--current"], 1),
        (&["attach-device", "vm", "/nowhere"], 1),
        (&["status", "--frobnicate"], 2),
    ] {
        let (code, stdout, stderr) = volcrypt(arguments);
        assert_eq!(code, expected, "{arguments:?}: {stderr}");
        assert_eq!((stdout.is_empty(), stderr.is_empty()), (code != 0, code == 0), "{arguments:?}");
    }
}

#[test]
fn a_reader_that_left_gets_no_panic() {
    let (reader, writer) = io::pipe().unwrap();
    drop(reader);
    let output = Command::cargo_bin("volcrypt")
        .unwrap()
        .args(["config", "check", "--config", "packaging/volcrypt.toml"])
        .stdout(writer)
        .stderr(Stdio::piped())
        .output()
        .unwrap();
    assert_eq!((output.status.code(), String::from_utf8_lossy(&output.stderr).as_ref()), (Some(0), ""));
}

#[test]
fn the_status_is_what_the_daemon_says() {
    let status = json!({
        "version": "9.9.9", "configuration_error": null, "key_store_error": null, "keys_left_behind": null, "mappings": [],
        "guests": [{ "pid": 42, "domain": "web1" }], "intercept": "xml",
        "guard": { "on": true, "cgroup": "machine.slice", "devices": 2, "fault": null, "all_because": null }
    });
    let daemon = FakeDaemon::new(json!({ "done": { "status": status } }), "");
    let outcome = daemon.run(&["status", "--json"]).unwrap();
    assert_eq!(serde_json::from_str::<Value>(&outcome.text).unwrap(), status);
    assert_eq!(daemon.request(), json!("status"));
}

#[test]
fn enrol_names_the_device_from_the_root_and_shows_the_record() {
    let daemon = FakeDaemon::new(json!({ "done": { "volumes": [record()] } }), "");
    let outcome = daemon.run(&["volume", "enrol", "disk"]).unwrap();
    assert!(outcome.text.contains("device:          target iqn.2026-11.org.lab:v0, LUN 0\n"), "{}", outcome.text);
    let here = std::env::current_dir().unwrap().join("disk");
    assert_eq!(daemon.request(), json!({ "enrol": { "device": here, "owner": null, "secret": null } }));
}

#[test]
fn nothing_is_destroyed_that_was_not_named_twice() {
    for arguments in [&["volume", "destroy", "vol-1", "--confirm", "vol-2"][..], &["volume", "destroy", "vol-1"]] {
        // Asked for the record, and not for more: standard input is at its end here.
        let daemon = FakeDaemon::new(json!({ "done": { "volumes": [record()] } }), "");
        let sentence = daemon.run(arguments).unwrap_err();
        assert_eq!(sentence, "nothing was destroyed: type the volume's id when asked, or add --confirm vol-1");
    }
    let daemon = FakeDaemon::new(json!({ "done": { "destroyed": { "elsewhere": null } } }), "");
    let outcome = daemon.run(&["volume", "destroy", "vol-1", "--confirm", "vol-1"]).unwrap();
    assert!(outcome.text.starts_with("The key of volume vol-1 is destroyed"), "{}", outcome.text);
    assert_eq!(daemon.request(), json!({ "destroy": { "id": "vol-1", "is_gone": false } }));
}

#[test]
fn a_destroyed_key_that_another_manager_may_have_is_told() {
    let elsewhere = "the embedded store still holds it: run this again there";
    let daemon = FakeDaemon::new(json!({ "done": { "destroyed": { "elsewhere": elsewhere } } }), "");
    let outcome = daemon.run(&["volume", "destroy", "vol-1", "--confirm", "vol-1"]).unwrap();
    let expected = format!("The key of volume vol-1 is destroyed in the key manager in use, but {elsewhere}.\n");
    assert_eq!(outcome.text, expected);
    daemon.request();
}

#[test]
fn a_key_that_is_gone_is_only_recorded_as_destroyed() {
    let daemon = FakeDaemon::new(json!({ "done": { "destroyed": { "elsewhere": null } } }), "");
    daemon.run(&["volume", "destroy", "vol-1", "--gone", "--confirm", "vol-1"]).unwrap();
    assert_eq!(daemon.request(), json!({ "destroy": { "id": "vol-1", "is_gone": true } }));
}

#[test]
fn a_grant_ends_when_its_time_is_over() {
    let daemon = FakeDaemon::new(json!({ "done": "nothing" }), "");
    let uuid = "0B1F7C1E-1111-4222-8333-444455556666";
    daemon.run(&["grant", "add", "vol-1", uuid, "--for", "2h"]).unwrap();
    let request = daemon.request();
    let grant = &request["grant"]["grant"];
    assert_eq!(grant["domain"], uuid.to_lowercase());
    assert_eq!(grant["expires_at"].as_i64().unwrap() - grant["created_at"].as_i64().unwrap(), 7200);
}

#[test]
fn a_policy_can_be_tried_without_a_daemon() {
    let (code, stdout, stderr) =
        volcrypt(&["--config", "packaging/volcrypt.toml", "policy", "test", "--device", "/dev/null"]);
    assert_eq!((code, stdout.as_str()), (1, ""));
    assert_eq!(stderr, "volcrypt: /dev/null is no block device: give one, for example /dev/sda\n");
}

#[test]
fn an_exported_key_is_a_new_file_for_its_owner_only() {
    let daemon = FakeDaemon::new(json!({ "done": "nothing" }), "the key");
    let file = daemon.folder.path().join("key");
    let outcome = daemon.run(&["volume", "export-key", "vol-1", "--to", file.to_str().unwrap()]).unwrap();
    assert_eq!(fs::read_to_string(&file).unwrap(), "the key");
    assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
    assert!(!outcome.text.contains("the key") && outcome.text.contains("vol-1"), "{}", outcome.text);
    assert_eq!(daemon.request(), json!({ "export-key": { "id": "vol-1" } }));
}

#[test]
fn a_refused_export_leaves_no_file() {
    let refusal = json!({ "refused": { "sentence": "no such volume: enrol it first", "errno": 126 } });
    let daemon = FakeDaemon::new(refusal, "half a k");
    let file = daemon.folder.path().join("key");
    let error = daemon.run(&["volume", "export-key", "vol-1", "--to", file.to_str().unwrap()]).unwrap_err();
    assert_eq!(error, "no such volume: enrol it first");
    assert!(!file.exists());
}

#[test]
fn what_the_daemon_quotes_stays_on_one_line() {
    let sentence = "disk sda: /dev/a\nb\u{1b}[2J does not exist: log in to its target first";
    let daemon = FakeDaemon::new(json!({ "refused": { "sentence": sentence, "errno": 19 } }), "");
    let error = daemon.run(&["key", "list"]).unwrap_err();
    assert_eq!(error, "disk sda: /dev/a?b?[2J does not exist: log in to its target first");
}

#[test]
fn an_export_overwrites_nothing() {
    let daemon = FakeDaemon::new(json!({ "done": "nothing" }), "the key");
    let file = daemon.folder.path().join("key");
    fs::write(&file, "precious").unwrap();
    let error = daemon.run(&["volume", "export-key", "vol-1", "--to", file.to_str().unwrap()]).unwrap_err();
    assert!(error.contains("exists already"), "{error}");
    assert_eq!(fs::read_to_string(&file).unwrap(), "precious");
}

#[test]
fn an_answer_to_another_question_is_refused() {
    for answer in [json!({ "done": "nothing" }), json!({ "done": { "volumes": [] } })] {
        let error = FakeDaemon::new(answer, "").run(&["volume", "show", "vol-1"]).unwrap_err();
        assert!(error.contains("does not fit the question"), "{error}");
    }
}

#[test]
fn doctor_reports_every_check_even_when_nothing_answers() {
    let folder = tempfile::tempdir().unwrap();
    let missing = folder.path().join("volcrypt.toml");
    let outcome = run(&["doctor", "--config", missing.to_str().unwrap()], &folder.path().join("control.sock")).unwrap();
    assert_eq!(outcome.code, 1);
    for line in ["FAIL  configuration: ", "FAIL  daemon: volcryptd cannot be reached", "FAIL  libvirt: qemu:///system"]
    {
        assert!(outcome.text.contains(line), "{line} is missing in:\n{}", outcome.text);
    }
    assert!(outcome.text.lines().all(|line| line.starts_with("ok    ") || line.contains("; to mend it: ")));
}

fn audit_record(seq: u32) -> Value {
    json!({
        "v": 1, "seq": seq, "time": 0, "kind": "key-used", "volume": "vol-1", "domain": "web1", "pid": 42, "by": "guest",
        "outcome": "done", "detail": "opened as /dev/sda", "previous": "0".repeat(64), "hash": "1".repeat(64)
    })
}

#[test]
fn audit_records_are_shown_with_the_newest_last() {
    let page = json!({ "entries": [audit_record(3), audit_record(2), audit_record(1)], "before": null });
    let answer = json!({ "done": { "audit": page } });
    let daemon = FakeDaemon::new(answer.clone(), "");
    let arguments =
        ["audit", "show", "--volume", "vol-1", "--kind", "key-used", "--since", "1970-01-02", "--limit", "2"];
    let outcome = daemon.run(&arguments).unwrap();
    let numbers: Vec<&str> = outcome.text.lines().map(|line| line.split(' ').next().unwrap()).collect();
    assert_eq!(numbers, ["NUMBER", "2", "3"]);
    let query = json!({ "before": null, "volume": "vol-1", "kind": "key-used", "since": 86_400 });
    assert_eq!(daemon.request(), json!({ "audit": query }));
    let outcome = FakeDaemon::new(answer, "").run(&["audit", "show", "--json"]).unwrap();
    let shown: Value = serde_json::from_str(&outcome.text).unwrap();
    assert_eq!(shown, json!([audit_record(1), audit_record(2), audit_record(3)]));
}

#[test]
fn a_broken_chain_is_exit_code_1_and_names_the_record() {
    let hash = "1".repeat(64);
    let verified = |broken: Option<&str>| {
        let end = json!({ "seq": 4, "hash": hash });
        json!({ "done": { "audit-verified": { "end": end, "broken": broken, "complete": broken.is_none() } } })
    };
    let daemon = FakeDaemon::new(verified(None), "");
    let outcome = daemon.run(&["audit", "verify"]).unwrap();
    assert_eq!((outcome.code, outcome.text), (0, format!("4 records, newest hash {hash}\n")));
    assert_eq!(daemon.request(), json!({ "verify-audit": { "from": { "seq": 0, "hash": "0".repeat(64) } } }));
    let outcome = FakeDaemon::new(verified(Some("record 5 was changed")), "").run(&["audit", "verify"]).unwrap();
    let text = "record 5 was changed; the 4 records before it are as they were written\n";
    assert_eq!((outcome.code, outcome.text.as_str()), (1, text));
    // A daemon that never comes to an end is not asked for ever.
    let stuck = json!({ "end": { "seq": 0, "hash": "0".repeat(64) }, "broken": null, "complete": false });
    let daemon = FakeDaemon::new(json!({ "done": { "audit-verified": stuck } }), "");
    assert!(daemon.run(&["audit", "verify"]).unwrap_err().contains("does not fit the question"));
}

#[test]
fn a_place_is_identified_by_a_handle_on_it() {
    let answer = json!({ "done": { "identification": { "file": {
        "device": { "major": 254, "minor": 0 }, "inode": 12, "size": 1 << 20
    } } } });
    let daemon = FakeDaemon::new(answer, "");
    let image = daemon.folder.path().join("image");
    fs::write(&image, "").unwrap();
    let outcome = daemon.run(&["volume", "identify", image.to_str().unwrap()]).unwrap();
    assert_eq!(
        outcome.text,
        "image file:      inode 12 of device 254:0\n\
         size:            1 MiB (1048576 bytes)\n\
         outcome:         not protected: no rule protects image files\n"
    );
    assert_eq!(daemon.request(), json!("identify"));

    let missing = run(&["volume", "identify", "/nowhere"], Path::new("/nowhere")).unwrap_err();
    assert!(missing.starts_with("/nowhere cannot be looked at"), "{missing}");
}

#[test]
fn a_rotation_goes_on_step_by_step_to_its_end() {
    let under_way = |remaining: u64, after: Value| {
        json!({ "done": { "kek-rotation": { "under-way": {
            "old": "0".repeat(32), "new": "1".repeat(32), "resumed": false, "remaining": remaining, "after": after
        } } } })
    };
    let finished = |home: &str| json!({ "done": { "kek-rotation": { "finished": { "new": "1".repeat(32), "home": home, "keys": 3 } } } });
    for (home, said) in [("file", "The old one is removed"), ("credential", "volcrypt.kek, in the drop-in")] {
        let answers = vec![under_way(3, Value::Null), under_way(1, json!(["two", 1])), finished(home)];
        let daemon = FakeDaemon::answering(answers);
        let outcome = daemon.run(&["key", "rotate-kek"]).unwrap();
        assert!(outcome.text.contains("wraps all 3 keys") && outcome.text.contains(said), "{}", outcome.text);
        assert!(outcome.text.contains("backups of the database") || outcome.text.contains("Backups of the database"));
        let go_on = |after: Value| json!({ "rotate-kek": { "go-on": { "after": after } } });
        assert_eq!(daemon.request(), json!([{ "rotate-kek": "begin" }, go_on(Value::Null), go_on(json!(["two", 1]))]));
    }
    let refusal = json!({ "refused": { "sentence": "one key cannot be unwrapped: destroy it", "errno": 126 } });
    let daemon = FakeDaemon::answering(vec![under_way(1, Value::Null), refusal]);
    assert_eq!(daemon.run(&["key", "rotate-kek"]).unwrap_err(), "one key cannot be unwrapped: destroy it");
}

#[test]
fn keys_are_moved_step_by_step_and_what_was_not_done_is_the_exit_code() {
    let came = |remaining: u64, stored: u64, refused: Value, after: Value| {
        json!({ "done": { "key-migration": {
            "resumed": false, "remaining": remaining, "stored": stored, "present": 0, "removed": 0, "skipped": [],
            "refused": refused, "after": after
        } } })
    };
    let volume = json!({ "volume": "two" });
    let line = ["key", "migrate", "--from", "embedded", "--to", "kmip"];
    for (refused, code) in [(json!([]), 0), (json!(["volume one has another"]), 1)] {
        let daemon = FakeDaemon::answering(vec![
            came(3, 0, json!([]), json!("start")),
            came(1, 2, refused, volume.clone()),
            came(0, 1, json!([]), Value::Null),
        ]);
        let outcome = daemon.run(&line).unwrap();
        assert!(outcome.text.starts_with("3 keys copied from embedded to kmip"), "{}", outcome.text);
        assert_eq!(outcome.code, code);
        let step = |after: Value| {
            let route = json!({ "from": "embedded", "to": "kmip" });
            json!({ "migrate-keys": { "route": route, "aim": "copy", "after": after } })
        };
        assert_eq!(daemon.request(), json!([step(Value::Null), step(json!("start")), step(volume.clone())]));
    }
    // Nothing is destroyed by a slip of the finger.
    let daemon = FakeDaemon::answering(vec![]);
    let wrong = [&line[..], &["--destroy-old", "--confirm", "kmip"]].concat();
    assert_eq!(
        daemon.run(&wrong).unwrap_err(),
        "nothing was destroyed: type embedded when asked, or add --confirm embedded"
    );
    let daemon = FakeDaemon::answering(vec![came(0, 0, json!([]), Value::Null)]);
    let right = [&line[..], &["--destroy-old", "--confirm", "embedded"]].concat();
    assert_eq!(daemon.run(&right).unwrap().text, "0 keys destroyed in embedded; kmip has each of them.\n");
}
