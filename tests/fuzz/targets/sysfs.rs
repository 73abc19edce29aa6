//! The attributes and names of a sysfs tree with a disk, a partition of it and a multipath map over it, any
//! bytes: identified or refused, and what is said of them is safe to print.

#![no_main]

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;
use volcrypt::cli::identify::describe;
use volcrypt::domain::Nobody;
use volcrypt::policy::Config;
use volcrypt::protocol::Identification;
use volcrypt::volume::{DeviceNumber, Sysfs};

#[derive(Arbitrary, Debug)]
struct Tree<'a> {
    session: &'a [u8],
    target: &'a [u8],
    unit: &'a [u8],
    disk: &'a [u8],
    target_name: &'a [u8],
    address: &'a [u8],
    port: &'a [u8],
    wwid: &'a [u8],
    size: &'a [u8],
    read_only: &'a [u8],
    sequence: &'a [u8],
    partition: &'a [u8],
    number: &'a [u8],
    map: &'a [u8],
    map_uuid: &'a [u8],
    serial: &'a [u8],
    page: &'a [u8],
    nguid: &'a [u8],
    /// What is not arbitrary, so that the rest is reached.
    usual: u16,
}

/// A name that a directory can have.
fn name(bytes: &[u8], usual: &str, is_usual: bool) -> PathBuf {
    let name: Vec<u8> = bytes.iter().copied().filter(|byte| !matches!(byte, 0 | b'/')).take(60).collect();
    match is_usual || matches!(&name[..], b"" | b"." | b"..") {
        true => usual.into(),
        false => OsStr::from_bytes(&name).into(),
    }
}

fn make(root: &Path, tree: &Tree<'_>) -> std::io::Result<()> {
    let usual = |bit: u32| tree.usual & 1 << bit != 0;
    let value =
        |bytes: &[u8], expected: &str, bit| if usual(bit) { expected.as_bytes().to_vec() } else { bytes.to_vec() };
    let session = name(tree.session, "session1", usual(0));
    let unit = Path::new("devices/platform/host0")
        .join(&session)
        .join(name(tree.target, "target0:0:0", usual(1)))
        .join(name(tree.unit, "0:0:0:1", usual(2)));
    let disk = unit.join("block").join(name(tree.disk, "sda", usual(3)));
    let map = Path::new("devices/virtual/block/dm-0");
    let write = |path: PathBuf, bytes: &[u8]| {
        let path = root.join(path);
        fs::create_dir_all(path.parent().unwrap_or(root))?;
        fs::write(path, bytes)
    };
    let number = value(tree.number, "8:0", 4);
    for (place, dev) in [(disk.as_path(), number.as_slice()), (map, b"253:0"), (&disk.join("part"), b"8:1")] {
        write(place.join("dev"), dev)?;
        write(place.join("size"), &value(tree.size, "2048", 5))?;
        write(place.join("ro"), &value(tree.read_only, "0", 6))?;
        write(place.join("diskseq"), &value(tree.sequence, "3", 7))?;
    }
    write(disk.join("part/partition"), &value(tree.partition, "1", 8))?;
    write(unit.join("wwid"), tree.wwid)?;
    write(unit.join("vpd_pg80"), tree.serial)?;
    write(unit.join("vpd_pg83"), tree.page)?;
    write(disk.join("nguid"), tree.nguid)?;
    write(map.join("dm/name"), tree.map)?;
    write(map.join("dm/uuid"), &[if usual(9) { b"mpath-".as_slice() } else { b"LVM-" }, tree.map_uuid].concat())?;
    write(Path::new("class/iscsi_session").join(&session).join("targetname"), &value(tree.target_name, "iqn.a:v", 10))?;
    write("class/iscsi_connection/connection1:0/persistent_address".into(), tree.address)?;
    write("class/iscsi_connection/connection1:0/persistent_port".into(), tree.port)?;
    symlink(root.join(&unit), root.join(&disk).join("device"))?;
    fs::create_dir_all(root.join(map).join("slaves"))?;
    symlink(root.join(&disk), root.join(map).join("slaves/sda"))?;
    fs::create_dir_all(root.join(&disk).join("holders"))?;
    symlink(root.join(map), root.join(&disk).join("holders/dm-0"))?;
    fs::create_dir_all(root.join("dev/block"))?;
    for (dev, place) in [("8:0", disk.as_path()), ("8:1", &disk.join("part")), ("253:0", map)] {
        symlink(Path::new("../..").join(place), root.join("dev/block").join(dev))?;
    }
    Ok(())
}

/// Two rules that match nearly everything. To compile them takes longer than all the rest.
static CONFIG: LazyLock<Config> = LazyLock::new(|| {
    let rules =
        "[[rules]]\nname = 'a'\niscsi_target = '(?s)(?<id>.*)'\n[[rules]]\nname = 'b'\nwwid = '(?s)(?<id>.+)'\n";
    Config::parse(rules, "rules.toml").expect("rules")
});

fuzz_target!(|tree: Tree<'_>| {
    let folder = tempfile::tempdir_in("/dev/shm").expect("room in /dev/shm");
    make(folder.path(), &tree).expect("a tree");
    for (major, minor) in [(8, 0), (8, 1), (253, 0)] {
        match Sysfs::at(folder.path()).portray(DeviceNumber { major, minor }) {
            Ok(device) => {
                let policy = Some(CONFIG.trace(&device.judged(), &Nobody));
                let text =
                    describe(&Identification::Device { device: Box::new(device), policy, configuration_error: None });
                assert!(!text.chars().any(|character| character.is_control() && character != '\n'), "{text:?}");
            }
            Err(refusal) => assert!(!refusal.to_string().contains(char::is_control), "{refusal:?}"),
        }
    }
});
