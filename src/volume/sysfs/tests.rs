mod multipath;

use std::ffi::OsStr;
use std::fs::File;
use std::os::unix::fs::symlink;
use std::path::Path;

use proptest::prelude::*;
use tempfile::TempDir;

use super::attributes::ATTRIBUTE_LIMIT;
use super::*;
use crate::volume::Mapping;

/// A small sysfs under a temporary directory, linked up as the kernel does it.
struct Tree {
    directory: TempDir,
}

impl Tree {
    fn new() -> Self {
        // The name of the directory itself must never pass for a session.
        let directory = tempfile::Builder::new().prefix("session9").tempdir().unwrap();
        for class in ["dev/block", "class/iscsi_session", "class/iscsi_connection"] {
            fs::create_dir_all(directory.path().join(class)).unwrap();
        }
        Tree { directory }
    }

    fn write(&self, path: &str, bytes: impl AsRef<[u8]>) {
        let path = self.directory.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }

    fn device(&self, number: &str, path: &str) {
        self.write(&format!("{path}/dev"), format!("{number}\n"));
        self.write(&format!("{path}/size"), "2048\n");
        self.write(&format!("{path}/ro"), "0\n");
        let link = self.directory.path().join("dev/block").join(number);
        symlink(format!("../../{path}"), link).unwrap();
    }

    fn below(&self, path: &str, slave: &str) {
        let slaves = self.directory.path().join(path).join("slaves");
        fs::create_dir_all(&slaves).unwrap();
        let target = self.directory.path().join(slave);
        symlink(&target, slaves.join(target.file_name().unwrap())).unwrap();
    }

    /// An iSCSI disk with LUN 1 of session 1.
    fn iscsi_disk(&self, target: &[u8]) {
        let session = "devices/platform/host2/session1";
        self.device("8:0", DISK);
        self.write(&format!("{DISK}/diskseq"), "12\n");
        self.write("devices/platform/host2/session1/target2:0:0/2:0:0:1/wwid", "naa.6001405aaaa\n");
        symlink("../../../2:0:0:1", self.directory.path().join(DISK).join("device")).unwrap();
        self.write(&format!("{session}/iscsi_session/session1/targetname"), [target, b"\n"].concat());
        let connection = format!("{session}/connection1:0/iscsi_connection/connection1:0");
        self.write(&format!("{connection}/persistent_address"), "10.0.0.1\n");
        self.write(&format!("{connection}/persistent_port"), "3260\n");
        let class = self.directory.path().join("class");
        symlink(format!("../../{session}/iscsi_session/session1"), class.join("iscsi_session/session1")).unwrap();
        symlink(format!("../../{connection}"), class.join("iscsi_connection/connection1:0")).unwrap();
    }

    fn identify(&self, major: u32, minor: u32) -> Result<Identity, Refusal> {
        Sysfs::at(self.directory.path()).identify(DeviceNumber { major, minor })
    }
}

const DISK: &str = "devices/platform/host2/session1/target2:0:0/2:0:0:1/block/sda";

#[test]
fn an_iscsi_disk_is_known_by_target_lun_and_wwid() {
    let tree = Tree::new();
    tree.iscsi_disk(b"iqn.2026-11.org.lab:v0");
    let disk = tree.identify(8, 0).unwrap();
    assert_eq!((disk.name.as_str(), disk.size, disk.read_only), ("sda", 1 << 20, false));
    let iscsi = disk.iscsi.as_ref().unwrap();
    assert_eq!(iscsi.target, "iqn.2026-11.org.lab:v0");
    assert_eq!(iscsi.portal.as_deref(), Some("10.0.0.1:3260"));
    assert_eq!((disk.lun, disk.wwid.as_deref(), disk.sequence), (Some(1), Some("naa.6001405aaaa"), Some(12)));
    assert!(disk.underlying.is_empty() && disk.mapping.is_none() && disk.partition.is_none());
    assert_eq!(disk.to_string(), "/dev/sda");
}

#[test]
fn read_only_and_ipv6_are_seen() {
    let tree = Tree::new();
    tree.iscsi_disk(b"iqn.2026-11.org.lab:v0");
    tree.write(&format!("{DISK}/ro"), "1\n");
    tree.write("class/iscsi_connection/connection1:0/persistent_address", "fd00::1\n");
    let disk = tree.identify(8, 0).unwrap();
    assert!(disk.read_only);
    assert_eq!(disk.iscsi.unwrap().portal.as_deref(), Some("[fd00::1]:3260"));
}

#[test]
fn the_connection_of_another_session_is_not_taken() {
    let tree = Tree::new();
    tree.iscsi_disk(b"iqn.2026-11.org.lab:v0");
    fs::remove_file(tree.directory.path().join("class/iscsi_connection/connection1:0")).unwrap();
    tree.write("class/iscsi_connection/connection11:0/persistent_address", "10.9.9.9");
    tree.write("class/iscsi_connection/connection11:0/persistent_port", "3260");
    assert_eq!(tree.identify(8, 0).unwrap().iscsi.unwrap().portal, None);
}

#[test]
fn a_local_disk_has_no_session() {
    let tree = Tree::new();
    tree.device("8:16", "devices/pci0000:00/ata1/host0/target0:0:0/0:0:0:0/block/sdb");
    tree.device("259:0", "devices/pci0000:00/nvme/nvme0/nvme0n1");
    tree.write("devices/pci0000:00/nvme/nvme0/nvme0n1/wwid", "eui.0025385\n");
    let disk = tree.identify(8, 16).unwrap();
    assert_eq!((disk.iscsi, disk.lun, disk.wwid), (None, Some(0), None));
    let nvme = tree.identify(259, 0).unwrap();
    assert_eq!((nvme.iscsi, nvme.lun, nvme.wwid.as_deref()), (None, None, Some("eui.0025385")));
}

#[test]
fn a_partition_points_to_its_disk_and_is_not_the_disk() {
    let tree = Tree::new();
    tree.iscsi_disk(b"iqn.2026-11.org.lab:v0");
    tree.device("8:1", &format!("{DISK}/sda1"));
    tree.write(&format!("{DISK}/sda1/partition"), "1\n");
    let partition = tree.identify(8, 1).unwrap();
    assert_eq!((partition.partition, &partition.iscsi, partition.lun, &partition.wwid), (Some(1), &None, None, &None));
    assert_eq!(partition.underlying, [tree.identify(8, 0).unwrap()]);
}

#[test]
fn a_stack_is_followed_to_its_disks() {
    let tree = Tree::new();
    tree.iscsi_disk(b"iqn.2026-11.org.lab:v0");
    let (multipath, volume) = ("devices/virtual/block/dm-0", "devices/virtual/block/dm-1");
    for (number, path, name, uuid) in
        [("253:0", multipath, "mpatha", "mpath-36001405"), ("253:1", volume, "vg-lv", "LVM-abc")]
    {
        tree.device(number, path);
        tree.write(&format!("{path}/dm/name"), format!("{name}\n"));
        tree.write(&format!("{path}/dm/uuid"), format!("{uuid}\n"));
    }
    tree.below(multipath, DISK);
    tree.below(volume, multipath);
    let top = tree.identify(253, 1).unwrap();
    assert_eq!(top.mapping, Some(Mapping { name: "vg-lv".to_owned(), uuid: "LVM-abc".to_owned() }));
    assert_eq!(top.to_string(), "/dev/mapper/vg-lv");
    assert!(top.own_mappings().is_empty());
    assert_eq!(top.underlying[0].underlying[0].name, "sda");
}

#[test]
fn too_many_layers_are_refused() {
    let tree = Tree::new();
    for index in 0..=9 {
        tree.device(&format!("253:{index}"), &format!("devices/virtual/block/dm-{index}"));
    }
    for index in 1..=9 {
        tree.below(&format!("devices/virtual/block/dm-{index}"), &format!("devices/virtual/block/dm-{}", index - 1));
    }
    assert!(tree.identify(253, 8).is_ok());
    assert_eq!(tree.identify(253, 9).unwrap_err().reason(), Reason::NotAllowed);
}

#[test]
fn layers_that_share_their_parts_do_not_multiply() {
    let tree = Tree::new();
    let path = |layer: usize, index: usize| format!("devices/virtual/block/dm-{}", layer * 8 + index);
    for layer in 0..8 {
        for index in 0..8 {
            tree.device(&format!("253:{}", layer * 8 + index), &path(layer, index));
            if layer > 0 {
                (0..8).for_each(|below| tree.below(&path(layer, index), &path(layer - 1, below)));
            }
        }
    }
    assert_eq!(tree.identify(253, 56).unwrap_err().reason(), Reason::NotAllowed);
}

#[test]
fn a_missing_device_is_gone() {
    let error = Tree::new().identify(8, 0).unwrap_err();
    assert_eq!(error.reason(), Reason::DeviceGone);
    assert!(error.to_string().contains("8:0"), "{error}");
}

#[test]
fn a_session_without_a_readable_target_does_not_pass_for_a_local_disk() {
    let tree = Tree::new();
    tree.iscsi_disk(b"iqn.2026-11.org.lab:v0");
    fs::remove_file(tree.directory.path().join("class/iscsi_session/session1")).unwrap();
    assert_eq!(tree.identify(8, 0).unwrap_err().reason(), Reason::DeviceGone);
    let tree = Tree::new();
    tree.iscsi_disk(b"");
    assert_eq!(tree.identify(8, 0).unwrap_err().reason(), Reason::DeviceGone);
}

#[test]
fn a_number_that_goes_to_another_disk_meanwhile_is_refused() {
    let tree = Tree::new();
    tree.iscsi_disk(b"iqn.2026-11.org.lab:v0");
    // A FIFO stops the reader at an attribute that is read after the first look at the number.
    let wwid = tree.directory.path().join("devices/platform/host2/session1/target2:0:0/2:0:0:1/wwid");
    fs::remove_file(&wwid).unwrap();
    rustix::fs::mknodat(rustix::fs::CWD, &wwid, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
    let identified = std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut fifo = File::options().write(true).open(&wwid).unwrap();
            tree.write(&format!("{DISK}/diskseq"), "13\n");
            fs::remove_file(&wwid).unwrap();
            std::io::Write::write_all(&mut fifo, b"naa.6001405aaaa\n").unwrap();
        });
        tree.identify(8, 0)
    });
    assert_eq!(identified.unwrap_err().reason(), Reason::DeviceGone);
}

#[test]
fn what_no_kernel_writes_is_refused() {
    let page = vec![b'x'; ATTRIBUTE_LIMIT + 1];
    for (attribute, bytes) in [("size", b"many".as_slice()), ("ro", b"-1"), ("diskseq", b"1 2"), ("size", &page)] {
        let tree = Tree::new();
        tree.iscsi_disk(b"iqn.2026-11.org.lab:v0");
        tree.write(&format!("{DISK}/{attribute}"), bytes);
        assert_eq!(tree.identify(8, 0).unwrap_err().reason(), Reason::Kernel, "{attribute}");
    }
}

#[test]
fn a_link_out_of_the_tree_is_refused() {
    let (tree, other) = (Tree::new(), Tree::new());
    other.device("8:0", DISK);
    let name = other.directory.path().file_name().unwrap();
    for target in [
        other.directory.path().join(DISK),
        Path::new("../../..").join(name).join(DISK),
        Path::new("../../x/../..").join(name).join(DISK),
        PathBuf::from("../.."),
        PathBuf::from("8:16"),
    ] {
        let link = tree.directory.path().join("dev/block/8:0");
        symlink(&target, &link).unwrap();
        let error = tree.identify(8, 0).unwrap_err();
        assert_eq!(error.reason(), Reason::Kernel, "{error}");
        assert!(error.to_string().contains("leads out of the tree"), "{error}");
        fs::remove_file(link).unwrap();
    }
}

#[test]
fn names_that_are_no_text_are_escaped() {
    let tree = Tree::new();
    tree.iscsi_disk(b"iqn\xff\xfe");
    assert_eq!(tree.identify(8, 0).unwrap().iscsi.unwrap().target, r"iqn\xff\xfe");
    let name = OsStr::from_bytes(b"sd\xff\na");
    let path = tree.directory.path().join("devices").join(name);
    fs::create_dir_all(&path).unwrap();
    fs::write(path.join("size"), "1").unwrap();
    fs::write(path.join("ro"), "0").unwrap();
    symlink(Path::new("../../devices").join(name), tree.directory.path().join("dev/block/8:32")).unwrap();
    assert_eq!(tree.identify(8, 32).unwrap().name, r"sd\xff\na");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn hostile_attributes_never_panic(
        target in prop::collection::vec(any::<u8>(), 0..5000),
        wwid in prop::collection::vec(any::<u8>(), 0..5000),
    ) {
        let tree = Tree::new();
        tree.iscsi_disk(&target);
        tree.write("devices/platform/host2/session1/target2:0:0/2:0:0:1/wwid", &wwid);
        match tree.identify(8, 0) {
            Ok(disk) => {
                prop_assert!(target.len() <= ATTRIBUTE_LIMIT && wwid.len() <= ATTRIBUTE_LIMIT);
                prop_assert!(disk.iscsi.is_some());
            }
            Err(error) => prop_assert!(!error.to_string().contains('\n')),
        }
    }

    #[test]
    fn hostile_session_names_never_panic(name in "[^/\0]{1,40}") {
        let tree = Tree::new();
        let name = format!("x{name}");
        tree.device("8:0", &format!("devices/{name}/target2:0:0/{name}/block/sda"));
        let _ = tree.identify(8, 0);
    }
}
