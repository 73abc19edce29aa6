use super::*;

/// Two paths to one LUN, as the sessions 1 and 2, with a map on top.
fn multipath(second: &[u8], wwid: &str) -> Tree {
    let tree = Tree::new();
    tree.iscsi_disk(b"iqn.2026-11.org.lab:v0");
    tree.device("8:16", OTHER);
    let session = "devices/platform/host3/session2";
    tree.write(&format!("{session}/target3:0:0/3:0:0:1/wwid"), wwid);
    symlink("../../../3:0:0:1", tree.directory.path().join(OTHER).join("device")).unwrap();
    tree.write(&format!("{session}/iscsi_session/session2/targetname"), second);
    let class = tree.directory.path().join("class/iscsi_session/session2");
    symlink(format!("../../{session}/iscsi_session/session2"), class).unwrap();
    tree.device("253:0", MAP);
    tree.write(&format!("{MAP}/dm/name"), "mpatha\n");
    tree.write(&format!("{MAP}/dm/uuid"), "mpath-36001405aaaa\n");
    for path in [DISK, OTHER] {
        tree.below(MAP, path);
        fs::create_dir_all(tree.directory.path().join(path).join("holders")).unwrap();
        symlink(tree.directory.path().join(MAP), tree.directory.path().join(path).join("holders/dm-0")).unwrap();
    }
    tree
}

const OTHER: &str = "devices/platform/host3/session2/target3:0:0/3:0:0:1/block/sdb";
const MAP: &str = "devices/virtual/block/dm-0";

#[test]
fn a_multipath_map_is_known_by_what_its_paths_have_in_common() {
    let tree = multipath(b"iqn.2026-11.org.lab:v0", "naa.6001405aaaa");
    let map = tree.identify(253, 0).unwrap();
    assert!(map.is_multipath() && map.path_of.is_none());
    assert_eq!((map.iscsi_target(), map.lun), (Some("iqn.2026-11.org.lab:v0"), Some(1)));
    assert_eq!((map.wwid.as_deref(), &map.iscsi.as_ref().unwrap().portal), (Some("naa.6001405aaaa"), &None));
    let path = tree.identify(8, 0).unwrap();
    assert_eq!(path.path_of.as_ref(), map.mapping.as_ref());
    assert_eq!(map.underlying[0], path);

    let map = multipath(b"iqn.2026-11.org.lab:other", "naa.6001405aaaa").identify(253, 0).unwrap();
    assert_eq!((map.iscsi.as_ref(), map.lun, map.wwid.as_deref()), (None, Some(1), Some("naa.6001405aaaa")));
    assert_eq!(map.at_address(Some("iqn.2026-11.org.lab:other"), Some(1)).name, "sdb");
    assert_eq!(map.at_address(Some("iqn.2026-11.org.lab:other"), Some(2)).name, "dm-0");
}

#[test]
fn a_map_whose_paths_lead_to_two_volumes_is_refused() {
    let refusal = multipath(b"iqn.2026-11.org.lab:v0", "naa.6001405bbbb").identify(253, 0).unwrap_err();
    assert_eq!(refusal.reason(), Reason::ForeignData);
    assert_eq!(
        refusal.to_string(),
        "the paths of the multipath map /dev/mapper/mpatha do not lead to one volume: /dev/sda is WWID \
         \"naa.6001405aaaa\", LUN 1, target \"iqn.2026-11.org.lab:v0\", and /dev/sdb is WWID \"naa.6001405bbbb\", LUN 1, \
         target \"iqn.2026-11.org.lab:v0\"; nothing is written to it, run 'multipath -ll' and mend the map"
    );
    let reason = |tree: &Tree| tree.identify(253, 0).unwrap_err().reason();
    assert_eq!(reason(&multipath(b"iqn.2026-11.org.lab:v0", "")), Reason::ForeignData);
    // Without any WWID, target and LUN have to be the same.
    let no_wwid = |target: &[u8]| {
        let tree = multipath(target, "");
        tree.write("devices/platform/host2/session1/target2:0:0/2:0:0:1/wwid", "");
        tree
    };
    assert_eq!(reason(&no_wwid(b"iqn.2026-11.org.lab:other")), Reason::ForeignData);
    assert_eq!(no_wwid(b"iqn.2026-11.org.lab:v0").identify(253, 0).unwrap().lun, Some(1));
}

#[test]
fn a_map_without_a_path_is_refused() {
    let tree = multipath(b"iqn.2026-11.org.lab:v0", "naa.6001405aaaa");
    fs::remove_dir_all(tree.directory.path().join(MAP).join("slaves")).unwrap();
    let refusal = tree.identify(253, 0).unwrap_err();
    assert_eq!(refusal.reason(), Reason::DeviceGone);
    assert!(refusal.to_string().starts_with("the multipath map /dev/mapper/mpatha has no path"), "{refusal}");
}

#[test]
fn only_a_multipath_map_makes_a_path_of_a_disk() {
    let tree = multipath(b"iqn.2026-11.org.lab:v0", "naa.6001405aaaa");
    tree.write(&format!("{MAP}/dm/uuid"), "CRYPT-PLAIN-x\n");
    assert_eq!(tree.identify(8, 0).unwrap().path_of, None);
    assert_eq!(tree.identify(253, 0).unwrap().iscsi, None);
}

#[test]
fn malformed_pages_are_told_and_do_not_hide_the_rest() {
    let tree = Tree::new();
    tree.iscsi_disk(b"iqn.2026-11.org.lab:v0");
    let unit = "devices/platform/host2/session1/target2:0:0/2:0:0:1";
    tree.write(&format!("{unit}/vpd_pg80"), b"\0\x80\0\x04 ab\0");
    tree.write(&format!("{unit}/vpd_pg83"), b"\0\x83\0\x05\x01\x03\0\x09x");
    let portrait = Sysfs::at(tree.directory.path()).portray(DeviceNumber { major: 8, minor: 0 }).unwrap();
    assert_eq!(portrait.details.serial.as_deref(), Some("ab"));
    assert_eq!(portrait.details.faults, ["VPD page 0x83 is cut off in the designator at byte 4"]);
    tree.write(&format!("{unit}/vpd_pg83"), vec![0; crate::volume::vpd::PAGE_LIMIT + 1]);
    assert!(Sysfs::at(tree.directory.path()).portray(DeviceNumber { major: 8, minor: 0 }).is_err());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn hostile_names_of_maps_and_serials_never_panic(
        name in prop::collection::vec(any::<u8>(), 0..5000),
        uuid in prop::collection::vec(any::<u8>(), 0..200),
        page in prop::collection::vec(any::<u8>(), 0..5000),
        second in prop_oneof![Just(b"iqn.2026-11.org.lab:v0".to_vec()), prop::collection::vec(any::<u8>(), 1..5000)],
    ) {
        let tree = multipath(&second, "naa.6001405aaaa");
        tree.write(&format!("{MAP}/dm/name"), &name);
        tree.write(&format!("{MAP}/dm/uuid"), [b"mpath-".as_slice(), &uuid].concat());
        for attribute in ["vpd_pg80", "vpd_pg83"] {
            tree.write(&format!("devices/platform/host2/session1/target2:0:0/2:0:0:1/{attribute}"), &page);
        }
        match Sysfs::at(tree.directory.path()).portray(DeviceNumber { major: 253, minor: 0 }) {
            Ok(portrait) => prop_assert!(!portrait.identity.to_string().contains(['\n', '\0'])),
            Err(error) => prop_assert!(!error.to_string().contains(['\n', '\0'])),
        }
    }
}
