use std::fmt::Write;

use super::*;

fn rules(rules: &[&str]) -> Config {
    let mut text = String::new();
    for (index, rule) in rules.iter().enumerate() {
        let _ = writeln!(text, "[[rules]]\nname = 'r{index}'\n{}", rule.replace("; ", "\n"));
    }
    Config::parse(&text, "test.toml").unwrap()
}

/// Which rules never match and because of which, and the overlaps.
fn compared(of: &[&str]) -> (Vec<(usize, usize)>, Vec<String>) {
    let comparison = rules(of).compare_rules_within(Duration::from_secs(60));
    assert!(!comparison.incomplete && !comparison.more_overlaps, "{of:?}");
    let taken = comparison.taken_by.into_iter().enumerate();
    (taken.filter_map(|(later, earlier)| Some((later, earlier?))).collect(), comparison.overlaps)
}

fn taken(of: &[&str]) -> Vec<(usize, usize)> {
    compared(of).0
}

fn overlaps(of: &[&str]) -> Vec<String> {
    compared(of).1
}

#[test]
fn a_rule_never_matches_when_every_part_of_it_is_taken() {
    assert_eq!(taken(&["iscsi_target = '(?<id>.*)'", "iscsi_target = 'iqn\\.(?<id>.*)'"]), [(1, 0)]);
    assert_eq!(taken(&["iscsi_target = 'iqn\\.(?<id>.*)'", "iscsi_target = '(?<id>.*)'"]), []);
    let any = "iscsi_target = '(?<id>.*)'";
    for (first, second, never) in [
        ("lun = 1", "lun = 1", true),
        ("", "lun = 1", true),
        ("lun = 1", "", false),
        ("lun = 1", "lun = 2", false),
        ("domain = 'w.*'", "domain = 'web'", true),
        ("domain = 'web'", "domain = 'w.*'", false),
        ("domain = 'web'", "", false),
        ("owner = 'p[12]'", "owner = 'p1'; domain = 'x'", true),
        ("owner = 'p[12]'; domain = 'y'", "owner = 'p1'; domain = 'x'", false),
        ("wwid = 'naa.*'", "wwid = 'NAA.*'", false),
        ("wwid = '(?i)naa.*'", "wwid = 'NAA.*'", true),
        ("dm_uuid = '.+'", "dm_uuid = '.*'", false),
        ("wwid = '.+'", "wwid = '.*'", true),
    ] {
        let found = taken(&[&format!("{any}; {first}"), &format!("{any}; {second}")]);
        assert_eq!(!found.is_empty(), never, "{first:?} and {second:?}");
    }
    // Whoever is not known for sure is not let through by the first one, and comes to the second.
    for (condition, never) in [("domain = 'w.*'", false), ("owner = 'p'", false), ("wwid = 'naa.*'", false), ("", true)]
    {
        let passes = format!("iscsi_target = '.*'; action = 'pass'; {condition}");
        let found = taken(&[&passes, &format!("{any}; {condition}")]);
        assert_eq!(!found.is_empty(), never, "{condition:?}");
    }
    // The first one that takes it is named.
    assert_eq!(taken(&[any, any, "iscsi_target = 'x'; volume_id = 'x'"]), [(1, 0), (2, 0)]);
}

#[test]
fn no_pair_is_left_out() {
    let target = ["", "iscsi_target = 'iqn\\.a.*'; ", "iscsi_target = 'iqn\\.ab'; ", "iscsi_target = 'iqn|iqn\\.ab'; "];
    let wwid = ["wwid = 'naa.*'", "wwid = 'naa\\.6'", "wwid = '.+'", "wwid = 'x'"];
    let all: Vec<String> =
        target.iter().rev().flat_map(|target| wwid.map(|wwid| format!("action = 'deny'; {target}{wwid}"))).collect();
    let all: Vec<&str> = all.iter().map(String::as_str).collect();
    let first = |later: usize| (0..later).find(|&earlier| !taken(&[all[earlier], all[later]]).is_empty());
    let expected: Vec<(usize, usize)> = (0..all.len()).filter_map(|later| Some((later, first(later)?))).collect();
    assert!(expected.len() > 4);
    assert_eq!(taken(&all), expected);
}

#[test]
fn an_overlap_is_told_with_an_example_and_what_differs() {
    let general = "iscsi_target = 'iqn\\.a:(?<id>.+)'";
    assert_eq!(
        overlaps(&["action = 'pass'; iscsi_target = 'iqn\\..*'; domain = 'b.*'; lun = 3", general]),
        [
            "rules r0 and r1 both match iSCSI target \"iqn.a:a\", domain \"b\", LUN 3; r0 comes first, r1 would protect it"
        ]
    );
    for (second, what) in [
        ("action = 'deny'; iscsi_target = '.*1'", "iSCSI target \"iqn.a:1\"; r0 comes first, r1 would deny it"),
        (
            "action = 'pass'; wwid = 'naa.*'",
            "iSCSI target \"iqn.a:a\", WWID \"naa\"; r0 comes first, r1 would let it pass",
        ),
        (
            "iscsi_target = 'iqn\\.(?<id>.+)'",
            "iSCSI target \"iqn.a:a\"; r0 comes first, r1 would give it another volume id",
        ),
        (
            "iscsi_target = 'iqn.a:(?<id>.+)'; create_keys = true",
            "iSCSI target \"iqn.a:a\"; r0 comes first, r1 would create a key for it",
        ),
    ] {
        assert_eq!(overlaps(&[general, second]), [format!("rules r0 and r1 both match {what}")]);
    }
}

#[test]
fn only_rules_that_would_not_do_the_same_overlap() {
    for (first, second) in [
        ("iscsi_target = 'iqn\\.a:(?<id>.*)'", "iscsi_target = 'iqn\\.b:(?<id>.*)'"),
        ("iscsi_target = 'iqn\\.a:(?<id>[0-9]+)'", "iscsi_target = 'iqn\\.a:(?<id>.*)'"),
        ("iscsi_target = 'iqn\\.a:(?<id>.*)'; lun = 1", "iscsi_target = 'iqn\\.(?<id>.*)'; lun = 2"),
        ("action = 'deny'; iscsi_target = 'iqn\\.a:.*'", "action = 'deny'; wwid = 'naa.*'"),
        // A logical volume has no target of its own.
        ("iscsi_target = 'iqn\\.a:(?<id>.*)'", "dm_uuid = 'LVM-(?<id>.*)'"),
        ("wwid = '(?<id>.*)'", "dm_uuid = 'LVM-(?<id>.*)'"),
    ] {
        assert_eq!(overlaps(&[first, second]), Vec::<String>::new(), "{first} {second}");
    }
    // A multipath map has one.
    let map = ["iscsi_target = 'iqn\\.a:(?<id>.*)'", "dm_uuid = 'mpath-(?<id>.*)'"];
    assert_eq!(overlaps(&map).len(), 1);
    // What never matches takes nothing.
    let shadowed = [
        "action = 'pass'; iscsi_target = '.*'",
        "action = 'deny'; iscsi_target = 'n.*'",
        "iscsi_target = '(?<id>.*)'; lun = 1",
    ];
    assert_eq!(overlaps(&shadowed), Vec::<String>::new());
}

fn many(number: usize, rule: impl Fn(usize) -> String) -> Config {
    let texts: Vec<String> = (0..number).map(rule).collect();
    rules(&texts.iter().map(String::as_str).collect::<Vec<_>>())
}

#[test]
fn many_rules_take_no_longer_than_they_may() {
    let apart = many(300, |index| format!("iscsi_target = 'iqn\\.a:{index}-(?<id>.*)'"));
    let comparison = apart.compare_rules_within(Duration::from_secs(60));
    assert!(!comparison.incomplete && comparison.overlaps.is_empty());
    let alike = many(300, |index| format!("wwid = '(?<id>.*)x{index}(a|b)*a(a|b){{9}}'"));
    let began = Instant::now();
    assert!(alike.compare_rules_within(Duration::from_millis(300)).incomplete);
    assert!(began.elapsed() < Duration::from_secs(20), "{:?}", began.elapsed());
}

#[test]
fn no_more_overlaps_are_told_than_can_be_read() {
    let denied = many(30, |index| match index {
        0 => "action = 'deny'; wwid = '.*z.*'".to_owned(),
        _ => format!("action = 'pass'; wwid = '.*x{index}y.*'"),
    });
    let comparison = denied.compare_rules_within(Duration::from_secs(60));
    assert_eq!((comparison.overlaps.len(), comparison.more_overlaps, comparison.incomplete), (MOST_SHOWN, true, false));
}
