use super::*;
use crate::domain::Nobody;
use crate::volume::Iscsi;

const BY_TARGET: &str = "[[rules]]\nname = 'target'\niscsi_target = 'iqn\\.a:(?<id>.*)'\n";
const BY_WWID: &str = "[[rules]]\nname = 'wwid'\nwwid = 'naa\\.(?<id>.*)'\n";

fn map_of(paths: Vec<Identity>) -> Identity {
    let mut map = Identity::of_iscsi_unit("", 0);
    map.mapping = Some(Mapping { name: "mpatha".to_owned(), uuid: "mpath-36".to_owned() });
    map.wwid = paths[0].wwid.clone();
    map.lun = paths[0].lun;
    let target = paths[0].iscsi_target().filter(|target| paths.iter().all(|path| path.iscsi_target() == Some(*target)));
    map.iscsi = target.map(|target| Iscsi { target: target.to_owned(), portal: None });
    map.underlying = paths;
    map
}

fn path(target: &str) -> Identity {
    let mut path = Identity::of_iscsi_unit(target, 1);
    path.wwid = Some("naa.6".to_owned());
    path.path_of = Some(Mapping { name: "mpatha".to_owned(), uuid: "mpath-36".to_owned() });
    path
}

/// The volume's id, `pass`, or the sentence.
fn outcome(rules: &[&str], device: &Identity) -> String {
    match Config::parse(&rules.concat(), "test.toml").unwrap().decide(device, &Nobody) {
        Decision::Pass => "pass".to_owned(),
        Decision::Protect(protection) => protection.volume.to_string(),
        Decision::Refuse(refusal) => format!("{:?}: {refusal}", refusal.reason()),
    }
}

#[test]
fn a_map_is_the_volume_that_its_paths_are() {
    let map = map_of(vec![path("iqn.a:v"), path("iqn.a:v")]);
    assert_eq!(outcome(&[], &map), "pass");
    assert_eq!(outcome(&[BY_TARGET], &map), "v");
    assert_eq!(outcome(&[BY_WWID], &map), "6");
}

#[test]
fn a_path_is_refused_with_the_name_of_its_map() {
    let disk = path("iqn.a:v");
    assert_eq!(
        outcome(&[BY_TARGET], &disk),
        "NotAllowed: /dev/LUN 1 of iqn.a:v is one path of the multipath map /dev/mapper/mpatha to the protected volume v; \
         give the guest /dev/mapper/mpatha"
    );
    assert_eq!(outcome(&[], &disk), "pass");
}

#[test]
fn a_map_over_several_targets_is_known_by_its_wwid_only() {
    let map = map_of(vec![path("iqn.a:v"), path("iqn.a:w")]);
    assert_eq!(outcome(&[BY_WWID], &map), "6");
    assert_eq!(
        outcome(&[BY_TARGET], &map),
        "Configuration: the multipath map /dev/mapper/mpatha is protected by no rule and its path /dev/LUN 1 of iqn.a:v is \
         volume v by rule \"target\": write a rule that knows them by their WWID, which they have in common"
    );
    // By itself each path would be another volume than the map.
    assert!(outcome(&[BY_TARGET, BY_WWID], &map).starts_with("Configuration: "));
    // One protected path is enough.
    let map = map_of(vec![path("iqn.b:v"), path("iqn.a:v")]);
    assert!(outcome(&[BY_TARGET], &map).starts_with("Configuration: "));
    // What makes no volume id of a path makes none of the map.
    let map = map_of(vec![path("iqn.b:v"), path("iqn.a:..")]);
    assert!(outcome(&[BY_TARGET], &map).contains("makes no volume id"));
}

#[test]
fn what_stands_on_a_map_or_a_path_is_refused() {
    let map = map_of(vec![path("iqn.a:v"), path("iqn.a:v")]);
    for below in [map, path("iqn.a:v")] {
        let mut volume = map_of(vec![below]);
        volume.mapping = Some(Mapping { name: "vg-lv".to_owned(), uuid: "LVM-x".to_owned() });
        (volume.iscsi, volume.wwid) = (None, None);
        assert!(outcome(&[BY_TARGET], &volume).contains("stands on the protected volume v"));
    }
}

/// A logical volume on `below`.
fn logical_volume(below: Identity) -> Identity {
    let mut volume = map_of(vec![below]);
    volume.mapping = Some(Mapping { name: "vg-lv".to_owned(), uuid: "LVM-x".to_owned() });
    (volume.iscsi, volume.wwid, volume.lun) = (None, None, None);
    volume
}

#[test]
fn a_map_beneath_something_is_what_its_paths_are() {
    let differing = map_of(vec![path("iqn.b:v"), path("iqn.a:v")]);
    let part = Identity { partition: Some(1), mapping: None, ..logical_volume(differing.clone()) };
    for volume in [logical_volume(differing.clone()), part, logical_volume(logical_volume(differing.clone()))] {
        assert!(outcome(&[BY_TARGET], &volume).starts_with("Configuration: the multipath map /dev/mapper/mpatha is "));
        assert!(outcome(&[BY_WWID], &volume).contains("the protected volume 6; give the guest the whole volume"));
        assert_eq!(outcome(&[], &volume), "pass");
        for rules in [&[BY_TARGET], &[BY_WWID]] {
            assert!(Config::parse(&rules.concat(), "test.toml").unwrap().is_guarded(&volume), "{volume}");
        }
    }
    let strict = ["[policy]\nunmatched_iscsi = 'deny'\n"];
    assert!(outcome(&strict, &logical_volume(differing.clone())).starts_with("NotAllowed: no rule matches"));
    // A map that one rule lets pass and of which another protects a path is no way around.
    let passes = "[[rules]]\nname = 'p'\naction = 'pass'\niscsi_target = 'iqn.b:.*'\n";
    for device in [differing.clone(), logical_volume(differing)] {
        let config = Config::parse(&[passes, BY_TARGET].concat(), "test.toml").unwrap();
        assert!(!matches!(config.decide(&device, &Nobody), Decision::Pass) && config.is_guarded(&device));
    }
    // A map of a map is no volume by itself.
    let twice = map_of(vec![map_of(vec![path("iqn.b:v"), path("iqn.a:v")])]);
    assert!(outcome(&[BY_TARGET], &twice).starts_with("Configuration: "));
}

#[test]
fn a_path_that_stands_on_a_protected_volume_does_not_hide_it() {
    let mut partition = Identity::of_iscsi_unit("", 0);
    (partition.iscsi, partition.partition) = (None, Some(1));
    partition.underlying = vec![path("iqn.a:v")];
    assert!(outcome(&[BY_TARGET], &map_of(vec![partition])).contains("stands on the protected volume v"));
}
