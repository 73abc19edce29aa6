//! What `volcrypt volume identify` says of real devices: trees of sysfs, captured by
//! tests/lab/guest/capture-sysfs, and the text that each of them has to give.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use proptest::prelude::*;
use tempfile::TempDir;
use volcrypt::cli::identify::describe;
use volcrypt::domain::Nobody;
use volcrypt::policy::{Config, Decision, Outcome};
use volcrypt::protocol::Identification;
use volcrypt::volume::{DeviceNumber, Identity, Sysfs};

/// A captured tree, unpacked.
struct Captured {
    folder: TempDir,
    /// The device that it was captured for.
    device: DeviceNumber,
}

impl Captured {
    fn new(text: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut device = None;
        for line in text.lines() {
            let [path, what, value] = line.split('\t').collect::<Vec<_>>()[..] else { panic!("{line}") };
            let place = folder.path().join(path);
            fs::create_dir_all(place.parent().unwrap()).unwrap();
            match what {
                "device" => device = Some(number(value)),
                "link" => symlink(value, place).unwrap(),
                "text" => fs::write(place, format!("{value}\n")).unwrap(),
                "hex" => fs::write(place, bytes(value)).unwrap(),
                _ => panic!("{line}"),
            }
        }
        Captured { folder, device: device.expect("a tree says for which device it was captured") }
    }

    fn named(name: &str) -> Self {
        Captured::new(&fs::read_to_string(file(&format!("{name}.tree"))).unwrap())
    }

    fn sysfs(&self) -> Sysfs {
        Sysfs::at(self.folder.path())
    }

    fn identity(&self) -> Identity {
        self.sysfs().identify(self.device).unwrap()
    }

    /// Replaces an attribute that is there.
    fn change(&self, path: &str, content: impl AsRef<[u8]>) {
        let path = self.folder.path().join(path);
        assert!(path.is_file(), "{}", path.display());
        fs::write(path, content).unwrap();
    }
}

fn file(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/sysfs").join(name)
}

fn number(text: &str) -> DeviceNumber {
    let (major, minor) = text.split_once(':').unwrap();
    DeviceNumber { major: major.parse().unwrap(), minor: minor.parse().unwrap() }
}

fn bytes(digits: &str) -> Vec<u8> {
    let digit = |index: usize| u8::from_str_radix(&digits[index..index + 2], 16).unwrap();
    (0..digits.len()).step_by(2).map(digit).collect()
}

fn rules() -> Config {
    Config::load(&file("rules.toml")).unwrap()
}

#[test]
fn every_captured_device_is_identified_as_expected() {
    let mut names: Vec<PathBuf> = fs::read_dir(file("")).unwrap().map(|entry| entry.unwrap().path()).collect();
    names.retain(|path| path.extension().is_some_and(|extension| extension == "tree"));
    assert!(names.len() >= 7, "only {} trees", names.len());
    for path in names {
        let captured = Captured::new(&fs::read_to_string(&path).unwrap());
        let device = captured.sysfs().portray(captured.device).unwrap();
        assert_eq!(device.judged(), captured.identity());
        let policy = Some(rules().trace(&device.judged(), &Nobody));
        let text = describe(&Identification::Device { device: Box::new(device), policy, configuration_error: None });
        let expected = path.with_extension("expected");
        assert_eq!(text, fs::read_to_string(&expected).unwrap(), "{}", expected.display());
    }
}

/// The volume's id, or the sentence.
fn outcome(captured: &Captured) -> String {
    match captured.sysfs().identify(captured.device) {
        Ok(identity) => match rules().trace(&identity, &Nobody).outcome {
            Outcome::Protected { volume, .. } => volume.to_string(),
            Outcome::Refused { sentence } => sentence,
            outcome => format!("{outcome:?}"),
        },
        Err(refusal) => refusal.to_string(),
    }
}

const FIRST: &str = "devices/platform/host0/session1";
const SECOND: &str = "devices/platform/host1/session2";

#[test]
fn the_disk_and_the_map_are_one_volume() {
    assert_eq!(outcome(&Captured::named("iscsi")), "ms");
    assert_eq!(outcome(&Captured::named("multipath")), "ms");
}

#[test]
fn another_volume_behind_one_path_is_refused_with_both_wwids() {
    let captured = Captured::named("multipath");
    captured.change(&format!("{SECOND}/target1:0:0/1:0:0:0/wwid"), "naa.6001405ffffffffffffffffffffffff0\n");
    let said = outcome(&captured);
    for part in ["/dev/sda", "/dev/sdb", "naa.60014056e9a919cf79f655659bbaa08c", "naa.6001405ffffffffffffffffffffffff0"]
    {
        assert!(said.contains(part), "{part} is not in: {said}");
    }
}

#[test]
fn a_map_with_a_path_that_the_rule_does_not_see_is_not_let_through() {
    for session in [FIRST, SECOND] {
        let captured = Captured::named("multipath");
        let name = session.rsplit('/').next().unwrap();
        captured.change(&format!("{session}/iscsi_session/{name}/targetname"), "iqn.2001-04.com.example:array\n");
        let said = outcome(&captured);
        assert!(said.contains("write a rule that knows them by their WWID"), "{said}");
    }
}

#[test]
fn an_nvme_namespace_is_known_by_its_uuid() {
    assert_eq!(outcome(&Captured::named("nvme")), "0b1f7c1e-1111-4222-8333-444455556666");
}

/// What a storage server or a user of dmsetup can put into a name.
fn hostile() -> impl Strategy<Value = Vec<u8>> {
    let pieces: Vec<&[u8]> =
        vec![b"\0", b"\n", b"..", b"/", b"\x1b[2J", b"\xff\xfe", "\u{9b}".as_bytes(), b"iqn.", b"naa.", b"a"];
    let pieces = prop::collection::vec(prop::sample::select(pieces), 0..40).prop_map(|pieces| pieces.concat());
    prop_oneof![pieces, prop::collection::vec(any::<u8>(), 0..4096), Just(vec![b'x'; 4096]), Just(vec![b'x'; 4097])]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn hostile_names_of_the_network_neither_pass_nor_reach_the_terminal(
        target in hostile(), wwid in hostile(), serial in hostile(), map in hostile(),
    ) {
        let captured = Captured::named("multipath");
        let unit = format!("{FIRST}/target0:0:0/0:0:0:0");
        captured.change(&format!("{FIRST}/iscsi_session/session1/targetname"), &target);
        captured.change(&format!("{unit}/wwid"), &wwid);
        captured.change(&format!("{unit}/vpd_pg80"), [b"\0\x80", (serial.len() as u16).to_be_bytes().as_slice(), &serial].concat());
        captured.change(&format!("{unit}/vpd_pg83"), &serial);
        captured.change("devices/virtual/block/dm-0/dm/name", &map);
        let disk = captured.sysfs().portray(DeviceNumber { major: 8, minor: 0 });
        let map = captured.sysfs().portray(captured.device);
        for outcome in [disk, map] {
            match outcome {
                Ok(device) => {
                    let policy = Some(rules().trace(&device.judged(), &Nobody));
                    let identification = Identification::Device { device: Box::new(device), policy, configuration_error: None };
                    let text = describe(&identification);
                    prop_assert!(!text.chars().any(|character| character.is_control() && character != '\n'), "{text:?}");
                    prop_assert!(serde_json::to_string(&identification).is_ok());
                }
                Err(refusal) => prop_assert!(!refusal.to_string().contains(char::is_control), "{refusal:?}"),
            }
        }
        // The second path is protected, so that the map never passes.
        if let Ok(identity) = captured.sysfs().identify(captured.device) {
            prop_assert!(!matches!(rules().decide(&identity, &Nobody), Decision::Pass));
        }
    }

    #[test]
    fn a_page_of_any_bytes_is_told_or_called_malformed(page in prop::collection::vec(any::<u8>(), 0..300)) {
        let captured = Captured::named("iscsi");
        captured.change(&format!("{FIRST}/target0:0:0/0:0:0:0/vpd_pg83"), &page);
        let portrait = captured.sysfs().portray(captured.device).unwrap();
        // What an open goes by does not hang on the page.
        prop_assert_eq!(portrait.identity.wwid.as_deref(), Some("naa.60014056e9a919cf79f655659bbaa08c"));
    }
}
