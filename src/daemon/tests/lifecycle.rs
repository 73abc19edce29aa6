use super::super::broker::Verdict;
use super::*;
use crate::domain::Nobody;
use crate::store::{Grant, VolumeState};
use crate::volume::VolumeId;

fn id(text: &str) -> VolumeId {
    text.parse().unwrap()
}

fn errno(outcome: Result<Verdict, Refusal>) -> i32 {
    outcome.err().map_or(0, |refusal| refusal.errno())
}

#[test]
fn a_retired_volume_is_not_opened_and_comes_back_with_its_key() {
    let world = World::new();
    let device = world.add_volume("one", 0);
    let broker = world.broker(true);
    let record = broker.enrol(device, None).unwrap();
    for _ in 0..2 {
        assert_eq!(broker.retire(&id("one")).unwrap().state, VolumeState::Retired);
    }
    // Not even a rule that enrols by itself brings it back.
    let refusal = broker.open(device, true, OFlags::RDWR, &vm()).unwrap_err();
    assert_eq!(refusal.errno(), libc::ENOKEY);
    assert!(refusal.to_string().contains("volcrypt volume enrol /dev/sd0"), "{refusal}");
    world.write(device, b"ciphertext by now");
    assert_eq!(broker.enrol(device, None).unwrap(), record);
    assert!(matches!(broker.open(device, true, OFlags::RDWR, &vm()), Ok(Verdict::Mapping(..))));
}

#[test]
fn a_retired_volume_does_not_come_back_on_another_device() {
    let world = World::new();
    let device = world.add_volume("one", 0);
    let broker = world.broker(false);
    broker.enrol(device, None).unwrap();
    broker.retire(&id("one")).unwrap();
    world.change(device, |identity| identity.wwid = Some("naa.other".to_owned()));
    let refusal = broker.enrol(device, None).unwrap_err();
    assert!(refusal.to_string().contains("naa.0") && refusal.to_string().contains("naa.other"), "{refusal}");
    assert_eq!(broker.volume(&id("one")).unwrap().state, VolumeState::Retired);
}

#[test]
fn a_volume_without_a_wwid_is_not_enrolled() {
    let world = World::new();
    let device = world.add_volume("one", 0);
    world.change(device, |identity| identity.wwid = None);
    let broker = world.broker(true);
    let refusals = [
        broker.enrol(device, None).unwrap_err(),
        // Nor by itself.
        broker.open(device, true, OFlags::RDWR, &vm()).unwrap_err(),
    ];
    for refusal in refusals {
        assert!(refusal.to_string().contains("reports no WWID"), "{refusal}");
        assert!(refusal.to_string().contains("run 'echo 1 >/sys/block/sd0/device/rescan'"), "{refusal}");
    }
    world.change(device, |identity| identity.wwid = Some("naa.0".to_owned()));
    broker.enrol(device, None).unwrap();
}

#[test]
fn a_key_that_does_not_open_is_not_gone() {
    let world = World::new();
    let device = world.add_volume("one", 0);
    let broker = world.broker(true);
    broker.enrol(device, None).unwrap();
    rusqlite::Connection::open(world.path().join("state/volcrypt.db"))
        .unwrap()
        .execute_batch("UPDATE keys SET wrapped = zeroblob(length(wrapped))")
        .unwrap();
    assert_eq!(errno(broker.open(device, true, OFlags::RDWR, &vm())), libc::ENOKEY);
    let refusal = broker.record_gone(&id("one")).unwrap_err();
    assert!(refusal.to_string().contains("the database has one that does not open"), "{refusal}");
    assert_eq!(broker.volume(&id("one")).unwrap().state, VolumeState::Enrolled);
    // Whoever means it says so without --gone.
    broker.destroy(&id("one")).unwrap();
    assert_eq!(broker.volume(&id("one")).unwrap().state, VolumeState::Destroyed);
}

#[test]
fn what_was_destroyed_stays_so() {
    let world = World::new();
    let device = world.add_volume("one", 0);
    let broker = world.broker(true);
    broker.enrol(device, None).unwrap();
    for _ in 0..2 {
        broker.destroy(&id("one")).unwrap();
        assert_eq!(broker.volume(&id("one")).unwrap().state, VolumeState::Destroyed);
    }
    assert_eq!(errno(broker.open(device, true, OFlags::RDWR, &vm())), libc::EKEYREVOKED);
    for refusal in [broker.enrol(device, None).unwrap_err(), broker.retire(&id("one")).unwrap_err()] {
        assert_eq!(refusal.errno(), libc::EKEYREVOKED);
        assert!(refusal.to_string().contains("another id"), "{refusal}");
    }
    let keys = broker.vault().unwrap().keys.list().unwrap();
    assert_eq!((keys.len(), keys[0].destroyed), (1, true));
    assert!(world.opened().is_empty());
}

#[test]
fn a_volume_in_use_is_neither_retired_nor_destroyed() {
    let mut world = World::new();
    let device = world.add_volume("one", 0);
    let record = world.broker(false).enrol(device, None).unwrap();
    world.mapped = true;
    let broker = world.broker(false);
    for refusal in [broker.retire(&id("one")).unwrap_err(), broker.destroy(&id("one")).unwrap_err()] {
        assert!(refusal.to_string().contains("in use on this host"), "{refusal}");
        assert_eq!(broker.volume(&id("one")).unwrap(), record);
    }
    assert!(broker.key(&record).is_ok());
}

#[test]
fn a_destruction_that_was_cut_off_does_not_go_on_under_a_guest() {
    let mut world = World::new();
    let device = world.add_volume("one", 0);
    let record = world.broker(false).enrol(device, None).unwrap();
    let store = Arc::clone(&world.broker(false).vault().unwrap().store);
    store.change_state(&id("one"), &[VolumeState::Enrolled], VolumeState::Destroyed, None).unwrap();
    world.mapped = true;
    let broker = world.broker(false);
    assert!(broker.destroy(&id("one")).unwrap_err().to_string().contains("in use on this host"));
    assert!(broker.key(&record).is_ok());
    world.mapped = false;
    world.broker(false).destroy(&id("one")).unwrap();
    assert!(world.broker(false).key(&record).is_err());
}

#[test]
fn an_enrolled_volume_does_not_pass_because_its_rule_is_lost() {
    let world = World::new();
    let (device, other) = (world.add_volume("one", 0), world.add_volume("two", 1));
    world.broker(false).enrol(device, None).unwrap();
    let state = world.path().join("state");
    let rules = |rules: &str| world.broker_with(&format!("[key_manager]\ndirectory = {state:?}\n{rules}"));
    for broker in
        [rules(""), rules("[[rules]]\nname = 'web'\niscsi_target = '.*:volume-(?<id>.*)'\nlun = 1\ndomain = 'web'\n")]
    {
        let refusal = broker.open(device, true, OFlags::RDWR, &vm()).unwrap_err();
        assert_eq!(refusal.errno(), libc::EACCES);
        assert!(refusal.to_string().contains("/dev/sd0 holds the volume one, and no rule protects it"), "{refusal}");
        assert_eq!(broker.make_ready(&broker.identify(device).unwrap(), &vm()).unwrap_err(), refusal);
        assert!(broker.pass_commands(device, &vm()).is_err());
        // The guard, which no rule tells, hears it from here.
        let is_enrolled = |number| broker.is_enrolled(&broker.identify(number).unwrap());
        assert_eq!((is_enrolled(device), is_enrolled(other)), (Some(true), Some(false)));
        assert!(matches!(broker.open(other, true, OFlags::RDWR, &vm()), Ok(Verdict::LetThrough)));
    }
    let passes = rules("[[rules]]\nname = 'all'\naction = 'pass'\niscsi_target = '.*'\n");
    assert!(matches!(passes.open(device, true, OFlags::RDWR, &vm()), Ok(Verdict::LetThrough)));
    assert_eq!(world.ended.load(Ordering::Relaxed), 0);
    world.broker(false).destroy(&id("one")).unwrap();
    assert_eq!(world.ended.load(Ordering::Relaxed), 1, "the guard has to look again");
    assert_eq!(rules("").is_enrolled(&rules("").identify(device).unwrap()), Some(false));
    assert!(matches!(rules("").open(device, true, OFlags::RDWR, &vm()), Ok(Verdict::LetThrough)));
}

#[test]
fn a_volume_of_an_owner_is_for_his_domains() {
    let world = World::new();
    let device = world.add_volume("one", 0);
    let broker = world.broker(false);
    broker.enrol(device, Some("p1")).unwrap();
    let open = |domain: &Facts| broker.open(device, true, OFlags::RDWR, domain);
    assert_eq!(errno(open(&vm_of("p1"))), 0);
    for (other, whom) in [(vm_of("p2"), "domain vm to \"p2\""), (vm(), "domain vm to nobody")] {
        let refusal = open(&other).unwrap_err();
        assert_eq!(refusal.errno(), libc::EACCES);
        assert!(
            refusal.to_string().contains(whom) && refusal.to_string().contains("volcrypt grant add one vm"),
            "{refusal}"
        );
        let identity = broker.identify(device).unwrap();
        assert_eq!(broker.make_ready(&identity, &other).unwrap_err(), refusal);
    }
    broker.set_owner(&id("one"), None).unwrap();
    assert_eq!(errno(open(&vm_of("p2"))), 0);
    broker.set_owner(&id("one"), Some("p2")).unwrap();
    assert_eq!((errno(open(&vm_of("p2"))), errno(open(&vm_of("p1")))), (0, libc::EACCES));
    assert_eq!(world.opened().len(), 3);
}

#[test]
fn a_volume_that_is_enrolled_at_its_first_use_belongs_to_who_uses_it() {
    let world = World::new();
    let device = world.add_volume("one", 0);
    let broker = world.broker(true);
    assert_eq!(errno(broker.open(device, true, OFlags::RDWR, &vm_of("p1"))), 0);
    assert_eq!(broker.volume(&id("one")).unwrap().owner.as_deref(), Some("p1"));
    assert_eq!(errno(broker.open(device, true, OFlags::RDWR, &vm_of("p2"))), libc::EACCES);
    let refusal = broker.enrol(device, Some("p2")).unwrap_err();
    assert!(refusal.to_string().contains("belongs to \"p1\""), "{refusal}");
}

#[test]
fn a_grant_opens_a_volume_for_one_domain_and_a_time() {
    let world = World::new();
    let device = world.add_volume("one", 0);
    let broker = world.broker(false);
    broker.enrol(device, Some("p1")).unwrap();
    let grant =
        |domain: &str, expires_at| Grant { volume: id("one"), domain: domain.to_owned(), expires_at, created_at: 0 };
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs() as i64;
    broker.grant(&grant("vm", now + 60)).unwrap();
    assert_eq!(errno(broker.open(device, true, OFlags::RDWR, &vm())), 0);
    let other = Facts { name: "other".to_owned(), ..vm() };
    assert_eq!(errno(broker.open(device, true, OFlags::RDWR, &other)), libc::EACCES);
    broker.revoke(&id("one"), "vm").unwrap();
    assert_eq!(errno(broker.open(device, true, OFlags::RDWR, &vm())), libc::EACCES);
    assert!(broker.revoke(&id("one"), "vm").unwrap_err().to_string().contains("volcrypt grant list"));
    for (domain, expires_at) in [("vm", now), ("", now + 60), ("a\nb", now + 60), (&*"x".repeat(256), now + 60)] {
        assert!(broker.grant(&grant(domain, expires_at)).is_err(), "{domain:?} until {expires_at}");
    }
}

#[test]
fn who_is_no_domain_gets_no_protected_volume() {
    let world = World::new();
    let (device, other) = (world.add_volume("one", 0), world.add_volume("two", 1));
    world.change(other, |identity| identity.lun = Some(2));
    let broker = world.broker(true);
    let refusal = broker.open(device, true, OFlags::RDWR, &Nobody).unwrap_err();
    assert_eq!(refusal.errno(), libc::EACCES);
    assert!(refusal.to_string().contains("/run/libvirt/qemu"), "{refusal}");
    assert!(broker.vault().unwrap().store.volumes().unwrap().is_empty(), "nothing is enrolled for nobody");
    assert!(matches!(broker.open(other, true, OFlags::RDWR, &Nobody), Ok(Verdict::LetThrough)));
}

#[test]
fn a_faulty_configuration_does_not_take_the_place_of_a_sound_one() {
    let world = World::new();
    let device = world.add_volume("one", 0);
    let broker = world.broker(false);
    let state = world.path().join("state");
    let parse = |text: &str| Config::parse(text, "volcrypt.toml");
    let opens = || errno(broker.open(device, true, OFlags::RDWR, &vm()));
    assert_eq!(opens(), libc::ENOKEY);
    assert!(broker.reload(parse("nonsense")).unwrap_err().starts_with("volcrypt.toml:1:"));
    assert!(broker.configuration_error().unwrap().ends_with("; the earlier configuration is in force"));
    assert!(broker.reload(parse("")).unwrap_err().contains("[key_manager]"));
    assert_eq!(opens(), libc::ENOKEY);
    broker.reload(parse(&format!("[key_manager]\ndirectory = {state:?}\n"))).unwrap();
    assert_eq!((opens(), broker.configuration_error()), (0, None), "nothing was enrolled");
    // A daemon that started with a faulty file takes any sound one.
    let broker = world.broker_with("nonsense");
    assert_eq!(errno(broker.open(device, true, OFlags::RDWR, &vm())), libc::ENOTSUP);
    broker.reload(parse("")).unwrap();
    assert_eq!(errno(broker.open(device, true, OFlags::RDWR, &vm())), 0);
}
