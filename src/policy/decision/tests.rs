use proptest::prelude::*;

use super::*;
use crate::domain::{Facts, Nobody};
use crate::volume::{DeviceNumber, Iscsi, Mapping};

const CINDER: &str = r#"
    [[rules]]
    name = "cinder"
    iscsi_target = 'iqn\.2010-10\.org\.openstack:volume-(?<id>[0-9a-f-]{36})'
    create_keys = true
"#;
const ID: &str = "0b1f7c1e-1111-4222-8333-444455556666";

fn config(text: &str) -> Config {
    Config::parse(text, "test.toml").unwrap()
}

fn device(name: &str) -> Identity {
    Identity {
        number: DeviceNumber { major: 8, minor: 0 },
        name: name.to_owned(),
        size: 1 << 30,
        read_only: false,
        sequence: None,
        partition: None,
        iscsi: None,
        lun: None,
        wwid: None,
        mapping: None,
        path_of: None,
        underlying: Vec::new(),
    }
}

fn disk(target: &str) -> Identity {
    Identity {
        iscsi: Some(Iscsi { target: target.to_owned(), portal: None }),
        lun: Some(1),
        wwid: Some("naa.6001405aaaa".to_owned()),
        ..device("sda")
    }
}

fn cinder_disk() -> Identity {
    disk(&format!("iqn.2010-10.org.openstack:volume-{ID}"))
}

fn mapping(name: &str, uuid: &str, below: Identity) -> Identity {
    let names = Mapping { name: name.to_owned(), uuid: uuid.to_owned() };
    Identity { mapping: Some(names), underlying: vec![below], ..device("dm-0") }
}

fn partition(below: Identity) -> Identity {
    Identity { partition: Some(1), underlying: vec![below], ..device("sda1") }
}

/// The volume's id, `pass`, or the refusal's reason.
fn outcome(config: &Config, device: &Identity) -> String {
    match config.decide(device, &Nobody) {
        Decision::Pass => "pass".to_owned(),
        Decision::Protect(protection) => protection.volume.to_string(),
        Decision::Refuse(refusal) => format!("{:?}", refusal.reason()),
    }
}

#[test]
fn nothing_is_protected_by_default() {
    let config = config("");
    assert_eq!(outcome(&config, &cinder_disk()), "pass");
    assert_eq!(outcome(&config, &partition(cinder_disk())), "pass");
}

#[test]
fn a_match_names_the_volume_the_rule_and_the_profile() {
    let config = config(&format!("{CINDER}\nprofile = \"fast\"\n[profiles.fast]\nsector_size = 4096\n"));
    let disk = cinder_disk();
    let Decision::Protect(protection) = config.decide(&disk, &Nobody) else { panic!("not protected") };
    assert_eq!(protection.volume.as_str(), ID);
    assert_eq!((protection.rule.name(), protection.create_keys), ("cinder", true));
    assert_eq!((protection.profile_name, protection.profile.sector_size), ("fast", 4096));
}

#[test]
fn only_whole_names_match() {
    let config = config(CINDER);
    let name = format!("iqn.2010-10.org.openstack:volume-{ID}");
    for other in
        [format!("x{name}"), format!("{name}x"), format!("{name}\n"), format!("\n{name}"), format!("{name}\nx{name}")]
    {
        assert_eq!(outcome(&config, &disk(&other)), "pass", "{other:?}");
    }
    assert_eq!(outcome(&config, &device("sdb")), "pass");
}

#[test]
fn an_alternative_is_anchored_like_the_rest() {
    let config = config("[[rules]]\nname = 'a'\niscsi_target = 'x|(?<id>ab|a)'\n");
    assert_eq!(outcome(&config, &disk("ab")), "ab");
    for other in ["abc", "xab", "cx"] {
        assert_eq!(outcome(&config, &disk(other)), "pass", "{other}");
    }
    // The pattern matches, but by the branch without the capture.
    assert_eq!(outcome(&config, &disk("x")), "Configuration");
}

#[test]
fn the_first_rule_that_matches_wins() {
    let rule = |name: &str, lun: &str| {
        format!("[[rules]]\nname = '{name}'\niscsi_target = '(?<id>.*)'\nvolume_id = '{name}-${{id}}'\n{lun}\n")
    };
    let config = config(&[rule("lun2", "lun = 2"), rule("any", ""), rule("late", "lun = 1")].concat());
    assert_eq!(outcome(&config, &disk("a")), "any-a");
    assert_eq!(outcome(&config, &Identity { lun: Some(2), ..disk("a") }), "lun2-a");
}

#[test]
fn every_condition_of_a_rule_has_to_hold() {
    let config = config(
        "[[rules]]\nname = 'a'\niscsi_target = '(?<id>.*)'\nwwid = 'naa\\.(?<w>.*)'\nvolume_id = '${id}.${w}.${lun}'\n",
    );
    assert_eq!(outcome(&config, &disk("v")), "v.6001405aaaa.1");
    assert_eq!(outcome(&config, &Identity { wwid: Some("t10.x".to_owned()), ..disk("v") }), "pass");
    assert_eq!(outcome(&config, &Identity { iscsi: None, ..disk("v") }), "pass");
    assert_eq!(outcome(&config, &Identity { lun: None, ..disk("v") }), "Configuration");
}

#[test]
fn a_capture_that_is_no_volume_id_is_refused() {
    let config = config("[[rules]]\nname = 'a'\niscsi_target = '(?s)v:(?<id>.*)'\n");
    assert_eq!(outcome(&config, &disk("v:good")), "good");
    for hostile in ["v:", "v:..", "v:a/b", "v:a\nb", "v:a\0b", "v:é", &format!("v:{}", "x".repeat(4096))] {
        assert_eq!(outcome(&config, &disk(hostile)), "Configuration", "{hostile:?}");
    }
}

#[test]
fn a_part_of_a_protected_volume_is_refused_with_both_names() {
    let config = config(CINDER);
    let sentence = |device: &Identity| match config.decide(device, &Nobody) {
        Decision::Refuse(refusal) => {
            assert_eq!(refusal.reason(), Reason::NotAllowed);
            refusal.to_string()
        }
        other => panic!("{other:?}"),
    };
    assert_eq!(
        sentence(&partition(cinder_disk())),
        format!("/dev/sda1 is a partition of the protected volume {ID}; give the guest the whole volume")
    );
    let half = mapping("half", "", cinder_disk());
    assert_eq!(
        sentence(&half),
        format!("/dev/mapper/half stands on the protected volume {ID}; give the guest the whole volume")
    );
    sentence(&mapping("vg-lv", "LVM-x", partition(cinder_disk())));
    // One protected disk among others is enough.
    let mut raid = mapping("raid", "", device("sdb"));
    raid.underlying.push(cinder_disk());
    sentence(&raid);
    // A rule of its own does not make a stack on a protected volume a volume.
    let mut claimed = half;
    claimed.iscsi = cinder_disk().iscsi;
    sentence(&claimed);
}

#[test]
fn own_mappings_pass_and_so_does_what_stands_on_them() {
    let config = config(CINDER);
    let own_uuid = format!("VOLCRYPT-PLAIN-{ID}");
    let own = mapping("volcrypt-x", &own_uuid, cinder_disk());
    assert_eq!(outcome(&config, &own), "pass");
    assert_eq!(outcome(&config, &mapping("vg-lv", "LVM-x", own.clone())), "pass");
    for forged in
        ["VOLCRYPT-PLAIN", &own_uuid.to_lowercase(), &format!("x{own_uuid}"), "VOLCRYPT-PLAIN-..", "VOLCRYPT", ""]
    {
        assert_eq!(outcome(&config, &mapping("volcrypt-x", forged, cinder_disk())), "NotAllowed", "{forged}");
    }
    // A mapping of ours next to a raw protected disk hides nothing.
    let mut mixed = mapping("raid", "", own);
    mixed.underlying.push(cinder_disk());
    assert_eq!(outcome(&config, &mixed), "NotAllowed");
}

#[test]
fn an_own_mapping_passes_only_as_the_volume_that_the_rules_protect() {
    let own = mapping("volcrypt-x", &format!("VOLCRYPT-PLAIN-{ID}"), cinder_disk());
    let on_it = mapping("vg-lv", "LVM-x", own.clone());
    let by_domain = config(BY_DOMAIN);
    for device in [&own, &on_it] {
        let said = |domain: &Facts| outcome_for(&by_domain, device, domain);
        assert_eq!(said(&domain("web", Some("p1"))), "pass");
        assert_eq!(
            said(&domain("web", Some("p9"))),
            format!(
                "/dev/mapper/volcrypt-x is volcrypt's own mapping of volume {ID}, and rule \"foreign\" denies /dev/sda to \
                 domain web"
            )
        );
        // Whom a rule gives the ciphertext does not get what it holds.
        assert!(said(&domain("backup-1", None)).contains("no rule protects /dev/sda beneath it for this domain"));
        assert_eq!(outcome(&config(""), device), "NotAllowed");
        let other = config("[[rules]]\nname = 'a'\niscsi_target = '.*'\nvolume_id = 'other'\n");
        assert_eq!(outcome(&other, device), "Configuration");
    }
    let half_made = Identity { underlying: Vec::new(), ..own };
    assert_eq!(outcome(&config(CINDER), &half_made), "DeviceGone");
}

#[test]
fn a_trace_says_whose_mapping_it_is() {
    let own = mapping("volcrypt-x", &format!("VOLCRYPT-PLAIN-{ID}"), cinder_disk());
    let expected = super::super::Outcome::Mapped { volumes: vec![ID.parse().unwrap()] };
    assert_eq!(config(CINDER).trace(&own, &Nobody).outcome, expected);
    assert_eq!(config(CINDER).trace(&mapping("vg-lv", "LVM-x", own), &Nobody).outcome, expected);
}

#[test]
fn what_cannot_be_named_below_is_refused_above() {
    let config = config("[[rules]]\nname = 'a'\niscsi_target = 'v:(?<id>.*)'\n");
    assert_eq!(outcome(&config, &partition(disk("v:a/b"))), "Configuration");
}

/// Bytes as they arrive from a hostile storage server, in the text that sysfs is read into.
fn hostile() -> impl Strategy<Value = String> {
    let bytes =
        prop::collection::vec(any::<u8>(), 0..4096).prop_map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
    let pieces = prop::collection::vec(
        prop::sample::select(vec!["\0", "\n", "..", "/", "${id}", "$", "\\xff", "a", "é", "\u{fffd}", "naa.", "v:"]),
        0..20,
    );
    prop_oneof![bytes, pieces.prop_map(|pieces| pieces.concat())]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn hostile_names_make_valid_ids_or_none(target in hostile(), wwid in hostile()) {
        let config = config(
            "[[rules]]\nname = 'a'\niscsi_target = '(?s)(?<id>.*)'\nwwid = '(?s)(?<w>.*)'\nvolume_id = '${id}${w}'\n",
        );
        let disk = Identity { wwid: Some(wwid.clone()), ..disk(&target) };
        let expected = format!("{target}{wwid}").parse::<VolumeId>().ok();
        match config.decide(&disk, &Nobody) {
            Decision::Protect(protection) => prop_assert_eq!(Some(&protection.volume), expected.as_ref()),
            Decision::Refuse(refusal) => {
                prop_assert!(expected.is_none());
                prop_assert!(!refusal.to_string().contains(['\n', '\0']));
            }
            Decision::Pass => prop_assert!(false, "a name that the pattern matches passed"),
        }
        for above in [partition(disk.clone()), mapping(&target, &wwid, disk)] {
            let passes = matches!(config.decide(&above, &Nobody), Decision::Pass);
            // A map may be called so by chance, and may then be the mapping of the very volume.
            prop_assert!(!passes || (expected.is_some() && above.own_volume() == expected));
        }
    }
}

#[test]
fn an_iscsi_volume_that_hides_its_wwid_is_refused_where_a_rule_asks_for_it() {
    let hidden = Identity { wwid: None, ..disk("v") };
    let map = Identity { iscsi: hidden.iscsi.clone(), lun: Some(1), ..mapping("mpatha", "mpath-3600", hidden.clone()) };
    let elsewhere = Identity { iscsi: None, ..hidden.clone() };
    let lv = mapping("vg-lv", "LVM-x", map.clone());
    let by_wwid = "[[rules]]\nname = 'wwid'\nwwid = 'naa\\.(?<id>.*)'\n";
    let denied = "[[rules]]\nname = 'no'\naction = 'deny'\nwwid = 'naa\\..*'\nlun = 1\niscsi_target = 'v'\n";
    for text in [by_wwid, denied] {
        let config = config(text);
        for device in [&hidden, &partition(hidden.clone()), &map, &lv] {
            assert_eq!(outcome(&config, device), "NotAllowed", "{device}: {text}");
            assert!(config.is_guarded(device), "{device}: {text}");
        }
        for other in [&elsewhere, &partition(elsewhere.clone()), &device("sdb")] {
            assert_eq!(outcome(&config, other), "pass", "{other}: {text}");
            assert!(!config.is_guarded(other), "{other}: {text}");
        }
    }
    assert_eq!(
        outcome_for(&config(by_wwid), &map, &Nobody),
        "/dev/mapper/mpatha reports no WWID, so it cannot be told whether rule \"wwid\" is about it: run 'echo 1 \
         >/sys/block/sda/device/rescan' or log in to its target again; or put a rule with action = \"pass\" that knows it \
         by its target before that one"
    );
    let unit = outcome_for(&config(by_wwid), &Identity::of_iscsi_unit("v", 1), &Nobody);
    assert!(unit.contains(": log in to its target on the host; or"), "{unit}");
}

#[test]
fn a_hidden_wwid_matters_only_where_nothing_else_decides() {
    let hidden = Identity { wwid: None, ..disk("v") };
    let by_wwid = "[[rules]]\nname = 'wwid'\nwwid = 'naa\\.(?<id>.*)'\n";
    let first = |rule: &str| config(&format!("[[rules]]\nname = 'first'\niscsi_target = 'v'\n{rule}\n{by_wwid}"));
    assert_eq!(outcome(&first("volume_id = 'x'"), &hidden), "x");
    assert_eq!(outcome(&first("action = 'pass'"), &hidden), "pass");
    assert!(!first("action = 'pass'").is_guarded(&hidden));
    // What else is asked for does not hold.
    for more in ["lun = 2", "iscsi_target = 'w'", "dm_uuid = 'LVM-.*'"] {
        assert_eq!(outcome(&config(&format!("{by_wwid}{more}\n")), &hidden), "pass", "{more}");
        assert!(!config(&format!("{by_wwid}{more}\n")).is_guarded(&hidden), "{more}");
    }
    let for_web = config(&format!("{by_wwid}domain = 'web'\n"));
    assert_ne!(outcome_for(&for_web, &hidden, &domain("web", None)), "pass");
    assert_eq!(outcome_for(&for_web, &hidden, &domain("db", None)), "pass");
    // A rule that lets pass has to know the device for sure.
    let passing = "[[rules]]\nname = 'p'\naction = 'pass'\nwwid = 'naa\\..*'\n";
    assert_eq!(outcome(&config(passing), &hidden), "pass");
    assert_eq!(outcome(&config(&format!("{passing}{CINDER}")), &Identity { wwid: None, ..cinder_disk() }), ID);
    assert!(!config(passing).lets_pass(&hidden, &Nobody));
}

/// Rules for some domains only, after the words that stand for domains.
const BY_DOMAIN: &str = r#"
    [[rules]]
    name = "backup"
    action = "pass"
    iscsi_target = 'iqn\..*'
    domain = 'backup-.*'
    [[rules]]
    name = "foreign"
    action = "deny"
    iscsi_target = 'iqn\..*'
    owner = 'p9'
    [[rules]]
    name = "cinder"
    iscsi_target = 'iqn\.2010-10\.org\.openstack:volume-(?<id>.*)'
"#;

fn domain(name: &str, owner: Option<&str>) -> Facts {
    Facts { name: name.to_owned(), uuid: None, owner: owner.map(str::to_owned) }
}

fn outcome_for(config: &Config, device: &Identity, requester: &dyn Requester) -> String {
    match config.decide(device, requester) {
        Decision::Pass => "pass".to_owned(),
        Decision::Protect(protection) => protection.volume.to_string(),
        Decision::Refuse(refusal) => refusal.to_string(),
    }
}

#[test]
fn the_first_rule_for_the_device_and_the_domain_decides() {
    let config = config(BY_DOMAIN);
    let disk = cinder_disk();
    assert_eq!(outcome_for(&config, &disk, &domain("backup-1", None)), "pass");
    assert_eq!(outcome_for(&config, &disk, &domain("backup-1", Some("p9"))), "pass");
    let denied = outcome_for(&config, &disk, &domain("web", Some("p9")));
    assert_eq!(denied, "rule \"foreign\" denies /dev/sda to domain web");
    assert_eq!(outcome_for(&config, &disk, &domain("web", Some("p1"))), ID);
    assert_eq!(outcome_for(&config, &disk, &domain("not-backup-1", None)), ID);
    let part = outcome_for(&config, &partition(disk.clone()), &domain("web", None));
    assert!(part.contains("is a partition of the protected volume"), "{part}");
}

#[test]
fn who_is_not_known_passes_nowhere_and_is_denied_what_anybody_is() {
    let config = config(BY_DOMAIN);
    let denied = outcome_for(&config, &cinder_disk(), &Nobody);
    assert_eq!(denied, "rule \"foreign\" denies /dev/sda to a process that is no known domain");
}

#[test]
fn only_what_no_domain_may_open_is_guarded() {
    let by_domain = config(BY_DOMAIN);
    assert!(!by_domain.is_guarded(&cinder_disk()), "backup domains have to be able to open it");
    assert!(!by_domain.is_guarded(&device("sdb")));
    let by_xml = config(&format!("[hook]\nintercept = 'xml'\n{BY_DOMAIN}"));
    assert!(by_xml.is_guarded(&cinder_disk()), "without the wrapper it would be open to every guest");
    assert!(!by_xml.is_guarded(&device("sdb")));
    let for_some = config(&format!("{CINDER}domain = 'web'\n"));
    assert!(for_some.is_guarded(&cinder_disk()), "what is protected for one is ciphertext to every other");
    let always = config(CINDER);
    for device in [cinder_disk(), partition(cinder_disk()), mapping("lv", "LVM-x", cinder_disk())] {
        assert!(always.is_guarded(&device), "{device}");
    }
    assert!(!always.is_guarded(&mapping("volcrypt-x", "VOLCRYPT-PLAIN-x", cinder_disk())));
    assert!(!always.is_guarded(&disk("iqn.other")));
    let strict = config("[policy]\nunmatched_iscsi = 'deny'\n");
    assert!(strict.is_guarded(&disk("iqn.other")) && !strict.is_guarded(&device("sdb")));
}

#[test]
fn only_a_rule_lets_pass_in_so_many_words() {
    let config = config(BY_DOMAIN);
    assert!(config.lets_pass(&cinder_disk(), &domain("backup-1", None)));
    assert!(!config.lets_pass(&cinder_disk(), &domain("web", None)));
    assert!(!config.lets_pass(&device("sdb"), &domain("backup-1", None)));
}

#[test]
fn iscsi_volumes_without_a_rule_can_be_denied() {
    let config = config(&format!("[policy]\nunmatched_iscsi = \"deny\"\n{CINDER}"));
    assert_eq!(outcome(&config, &cinder_disk()), ID);
    assert_eq!(outcome(&config, &disk("iqn.other")), "NotAllowed");
    assert_eq!(outcome(&config, &partition(disk("iqn.other"))), "NotAllowed");
    assert_eq!(outcome(&config, &device("sdb")), "pass");
}

#[test]
fn a_logical_volume_can_be_a_volume_of_its_own() {
    let config = config("[[rules]]\nname = 'lv'\ndm_uuid = 'LVM-(?<id>[A-Za-z0-9]{64})'\n");
    let uuid = "a".repeat(64);
    let logical = mapping("vg-lv", &format!("LVM-{uuid}"), device("sda"));
    assert_eq!(outcome(&config, &logical), uuid);
    assert_eq!(outcome(&config, &mapping("mpatha", "mpath-3600", device("sda"))), "pass");
}

#[test]
fn a_trace_says_for_whom_a_rule_is() {
    let config = config(BY_DOMAIN);
    let trace = config.trace(&cinder_disk(), &domain("web", None));
    let whys: Vec<&str> = trace.rules.iter().map(|rule| rule.why.as_str()).collect();
    let target = format!("iSCSI target \"iqn.2010-10.org.openstack:volume-{ID}\"");
    assert_eq!(
        whys,
        [
            "it would match, but is for domains called backup-.* and not for \"web\"".to_owned(),
            "it would match, but is for domains owned by p9 and not for \"web\"".to_owned(),
            format!("volume {ID}, because of {target}"),
        ]
    );
    let trace = config.trace(&cinder_disk(), &domain("backup-1", None));
    assert_eq!(trace.rules[0].why, format!("it passes, because of {target}"));
    assert_eq!(trace.outcome, super::super::Outcome::NotProtected);
}
