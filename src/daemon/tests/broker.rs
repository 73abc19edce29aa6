use super::super::broker::Verdict;
use super::super::holds::{Mapped, Until};
use super::*;

fn refusal(outcome: Result<Verdict, Refusal>) -> Refusal {
    outcome.expect_err("this has to be refused")
}

#[test]
fn an_enrolled_volume_is_opened_through_its_mapping() {
    let world = World::new();
    let device = world.add_volume("one", 0);
    let broker = world.broker(false);
    broker.enrol(device, None).unwrap();
    assert!(
        matches!(broker.open(device, true, OFlags::RDWR, &vm()).unwrap(), Verdict::Mapping(volume, ..) if volume.as_str() == "one")
    );
    assert_eq!(world.opened(), ["250:0"]);
}

#[test]
fn a_device_that_no_rule_names_is_let_through() {
    let world = World::new();
    let device = world.add_volume("one", 0);
    world.change(device, |identity| identity.lun = Some(2));
    assert!(matches!(world.broker(false).open(device, false, OFlags::RDWR, &vm()).unwrap(), Verdict::LetThrough));
}

#[test]
fn without_a_key_and_without_the_right_to_make_one_there_is_no_open() {
    let world = World::new();
    let device = world.add_volume("one", 0);
    let refusal = refusal(world.broker(false).open(device, true, OFlags::RDWR, &vm()));
    assert_eq!(refusal.errno(), libc::ENOKEY);
    assert!(refusal.to_string().contains("volcrypt volume enrol /dev/sd0"), "{refusal}");
    assert!(world.opened().is_empty());
}

#[test]
fn a_rule_may_have_blank_volumes_enrolled_at_first_use() {
    let world = World::new();
    let (blank, used) = (world.add_volume("blank", 0), world.add_volume("used", 1));
    world.write(used, b"somebody's data");
    let broker = world.broker(true);
    assert!(matches!(broker.open(blank, true, OFlags::RDWR, &vm()).unwrap(), Verdict::Mapping(..)));
    let refusal = refusal(broker.open(used, true, OFlags::RDWR, &vm()));
    assert_eq!(refusal.errno(), libc::EMEDIUMTYPE);
    assert!(refusal.to_string().contains("data at byte 0"), "{refusal}");
    assert_eq!(world.opened(), ["250:0"]);
}

#[test]
fn another_device_in_the_place_of_an_enrolled_one_is_refused() {
    let world = World::new();
    let device = world.add_volume("one", 0);
    let broker = world.broker(true);
    broker.enrol(device, None).unwrap();
    world.change(device, |identity| identity.wwid = Some("naa.other".to_owned()));
    let refusal = refusal(broker.open(device, true, OFlags::RDWR, &vm()));
    assert_eq!(refusal.errno(), libc::EMEDIUMTYPE);
    assert!(refusal.to_string().contains("naa.0") && refusal.to_string().contains("naa.other"), "{refusal}");
    assert!(world.opened().is_empty());
}

/// Makes `map` a multipath map over the disks of `paths`, as sysfs shows it.
fn join(world: &World, map: DeviceNumber, paths: &[DeviceNumber]) {
    let names = crate::volume::Mapping { name: "mpatha".to_owned(), uuid: "mpath-3".to_owned() };
    for path in paths {
        world.change(*path, |identity| {
            identity.wwid = Some("naa.0".to_owned());
            identity.path_of = Some(names.clone());
        });
    }
    let underlying = paths.iter().map(|path| world.identify(*path).unwrap()).collect();
    world.change(map, |identity| {
        (identity.mapping, identity.underlying) = (Some(names), underlying);
        identity.wwid = Some("naa.0".to_owned());
    });
}

#[test]
fn a_volume_is_the_same_through_one_path_and_through_the_multipath_map() {
    for through_map in [false, true] {
        let world = World::new();
        let (disk, other, map) = (world.add_volume("one", 0), world.add_volume("one", 1), world.add_volume("one", 2));
        let broker = world.broker(false);
        if through_map {
            join(&world, map, &[disk, other]);
            broker.enrol(map, None).unwrap();
            assert_eq!(refusal(broker.open(disk, true, OFlags::RDWR, &vm())).errno(), libc::EACCES);
            world.change(disk, |identity| identity.path_of = None);
            assert!(broker.open(disk, true, OFlags::RDWR, &vm()).is_ok());
        } else {
            broker.enrol(disk, None).unwrap();
            join(&world, map, &[disk, other]);
            assert!(broker.open(map, true, OFlags::RDWR, &vm()).is_ok());
            world.change(map, |identity| identity.wwid = Some("naa.9".to_owned()));
            world.change(map, |identity| {
                identity.underlying.iter_mut().for_each(|path| path.wwid = Some("naa.9".to_owned()));
            });
            let refusal = refusal(broker.open(map, true, OFlags::RDWR, &vm()));
            assert_eq!(refusal.errno(), libc::EMEDIUMTYPE);
            assert!(refusal.to_string().contains("its WWID was \"naa.0\" and is \"naa.9\""), "{refusal}");
        }
    }
}

/// A broker with a rule that knows volumes by their WWID.
fn by_wwid(world: &World) -> Broker {
    let state = world.path().join("state");
    let rule = "[[rules]]\nname = \"wwid\"\nwwid = 'naa\\..*'\nvolume_id = \"array\"\n";
    world.broker_with(&format!("[key_manager]\ndirectory = {state:?}\n{rule}"))
}

#[test]
fn a_volume_is_the_same_at_every_target_of_its_array() {
    let world = World::new();
    let (disk, other, map) = (world.add_volume("one", 0), world.add_volume("two", 1), world.add_volume("map", 2));
    let broker = by_wwid(&world);
    broker.enrol(disk, None).unwrap();
    let open = |device| broker.open(device, true, OFlags::RDWR, &vm());
    join(&world, map, &[disk, other]);
    world.change(map, |identity| identity.iscsi = None);
    assert!(open(map).is_ok());
    // Only the path to the other target is up, where the volume has another number.
    world.change(other, |identity| identity.lun = Some(7));
    join(&world, map, &[other]);
    world.change(map, |identity| identity.lun = Some(7));
    assert!(open(map).is_ok());
    // Without a map nothing says that this target is the array's.
    world.change(other, |identity| identity.path_of = None);
    let refused = refusal(open(other));
    assert_eq!(refused.errno(), libc::EMEDIUMTYPE);
    assert!(refused.to_string().contains("its iSCSI target was "), "{refused}");
}

#[test]
fn a_volume_that_was_enrolled_as_a_map_opens_by_one_path() {
    let world = World::new();
    let (disk, other, map) = (world.add_volume("one", 0), world.add_volume("two", 1), world.add_volume("map", 2));
    let broker = by_wwid(&world);
    world.change(other, |identity| identity.lun = Some(7));
    join(&world, map, &[disk, other]);
    world.change(map, |identity| identity.iscsi = None);
    let record = broker.enrol(map, None).unwrap();
    assert_eq!((record.device.iscsi_target, record.device.lun), (None, Some(1)));
    for path in [disk, other] {
        world.change(path, |identity| identity.path_of = None);
        assert!(broker.open(path, true, OFlags::RDWR, &vm()).is_ok());
    }
    // A disk of the host has no target either, and its number counts.
    world.change(other, |identity| identity.iscsi = None);
    assert!(refusal(broker.open(other, true, OFlags::RDWR, &vm())).to_string().contains("its LUN was 1 and is 7"));
}

#[test]
fn a_target_and_lun_that_lead_to_another_volume_now_are_refused() {
    let world = World::new();
    let (disk, other, map) = (world.add_volume("one", 0), world.add_volume("two", 1), world.add_volume("map", 2));
    let broker = by_wwid(&world);
    broker.enrol(disk, None).unwrap();
    for paths in [&[disk][..], &[disk, other], &[other]] {
        join(&world, map, paths);
        for wwid in [Some("naa.new"), None] {
            for device in paths.iter().chain([&map]) {
                world.change(*device, |identity| {
                    identity.wwid = wwid.map(str::to_owned);
                    identity.path_of = None;
                    identity.underlying.iter_mut().for_each(|path| path.wwid = wwid.map(str::to_owned));
                });
            }
            let refused = refusal(broker.open(map, true, OFlags::RDWR, &vm()));
            let expected = if wwid.is_some() { libc::EMEDIUMTYPE } else { libc::EACCES };
            assert_eq!(refused.errno(), expected, "{refused}");
        }
    }
    // Nor is it enrolled as another volume while the first one is.
    let state = world.path().join("state");
    let anew = world.broker_with(&format!(
        "[key_manager]\ndirectory = {state:?}\n[[rules]]\nname = \"w\"\nwwid = 'naa\\.(?<id>.*)'\n"
    ));
    world.change(disk, |identity| identity.wwid = Some("naa.new".to_owned()));
    let refused = anew.enrol(disk, None).unwrap_err();
    assert!(refused.errno() == libc::EMEDIUMTYPE && refused.to_string().contains("as volume array"), "{refused}");
}

#[test]
fn a_shrunk_volume_is_refused_and_a_grown_one_is_not() {
    let world = World::new();
    let device = world.add_volume("one", 0);
    let broker = world.broker(true);
    broker.enrol(device, None).unwrap();
    world.change(device, |identity| identity.size = SIZE - 512);
    assert_eq!(refusal(broker.open(device, true, OFlags::RDWR, &vm())).errno(), libc::EMEDIUMTYPE);
    world.change(device, |identity| identity.size = SIZE * 2);
    assert!(broker.open(device, true, OFlags::RDWR, &vm()).is_ok());
}

#[test]
fn a_guest_that_was_not_given_the_node_gets_nothing() {
    let world = World::new();
    let device = world.add_volume("one", 0);
    let broker = world.broker(true);
    broker.enrol(device, None).unwrap();
    assert_eq!(refusal(broker.open(device, false, OFlags::RDWR, &vm())).errno(), libc::EACCES);
    assert!(world.opened().is_empty());
}

#[test]
fn a_volume_that_can_only_be_read_is_not_opened_for_writing() {
    let world = World::new();
    let device = world.add_volume("one", 0);
    let broker = world.broker(true);
    broker.enrol(device, None).unwrap();
    world.change(device, |identity| identity.read_only = true);
    assert_eq!(refusal(broker.open(device, true, OFlags::RDWR, &vm())).errno(), libc::EACCES);
    assert!(broker.open(device, true, OFlags::RDONLY, &vm()).is_ok());
}

#[test]
fn with_a_faulty_configuration_every_device_is_refused() {
    let world = World::new();
    let device = world.add_volume("one", 0);
    let refusal = refusal(world.broker_with("[[rules]]\nname = 1\n").open(device, true, OFlags::RDWR, &vm()));
    assert_eq!(refusal.errno(), libc::ENOTSUP);
    assert!(refusal.to_string().starts_with("volcrypt.toml:2:"), "{refusal}");
}

#[test]
fn enrolling_twice_keeps_the_key() {
    let world = World::new();
    let device = world.add_volume("one", 0);
    let broker = world.broker(false);
    let record = broker.enrol(device, None).unwrap();
    world.write(device, b"ciphertext by now");
    assert_eq!(broker.enrol(device, None).unwrap(), record);
    // So does a daemon that starts anew.
    assert_eq!(world.broker(false).enrol(device, None).unwrap(), record);
}

#[test]
fn concurrent_first_opens_enrol_once() {
    let world = World::new();
    let device = world.add_volume("one", 0);
    let broker = world.broker(true);
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| broker.open(device, true, OFlags::RDWR, &vm()).unwrap());
        }
    });
    assert_eq!(broker.vault().unwrap().store.volumes().unwrap().len(), 1);
    assert_eq!(world.opened().len(), 8);
}

#[test]
fn a_size_that_is_no_multiple_of_the_sector_size_is_refused_before_anything_is_kept() {
    let world = World::new();
    let device = world.add_volume("one", 0);
    world.change(device, |identity| identity.size = SIZE - 512);
    let state = world.path().join("state");
    let broker = world.broker_with(&format!(
        "[key_manager]\ndirectory = {state:?}\n[profiles.large]\nsector_size = 4096\n[[rules]]\nname = \"lab\"\n\
         iscsi_target = '.*:volume-(?<id>.*)'\nlun = 1\nprofile = \"large\"\n"
    ));
    let refusal = broker.enrol(device, None).unwrap_err();
    assert!(refusal.to_string().contains("sector_size = 4096"), "{refusal}");
    assert!(broker.vault().unwrap().keys.list().unwrap().is_empty());
}

#[test]
fn a_device_that_somebody_has_open_is_not_enrolled() {
    let mut world = World::new();
    let device = world.add_volume("one", 0);
    world.in_use = true;
    let refusal = world.broker(true).enrol(device, None).unwrap_err();
    assert_eq!(refusal.errno(), libc::EMEDIUMTYPE);
    assert!(refusal.to_string().starts_with("process 1 has /dev/sd0 open"), "{refusal}");
    assert!(world.broker(true).vault().unwrap().keys.list().unwrap().is_empty());
}

#[test]
fn scsi_commands_reach_no_protected_volume() {
    let world = World::new();
    let (device, other) = (world.add_volume("one", 0), world.add_volume("two", 1));
    world.change(other, |identity| identity.lun = Some(2));
    let broker = world.broker(true);
    assert_eq!(refusal(broker.pass_commands(device, &vm())).errno(), libc::EACCES);
    assert!(matches!(broker.pass_commands(other, &vm()).unwrap(), Verdict::LetThrough));
}

#[test]
fn a_volume_that_another_domain_has_by_its_xml_is_not_written_past_that() {
    let world = World { by_xml: true, ..World::new() };
    let disk = world.add_volume("one", 0);
    let broker = world.broker(true);
    let mapping = world.add_mapping("one", disk, 100);
    let open = |device, flags| broker.open(device, true, flags, &vm());
    open(disk, OFlags::RDWR).unwrap();
    assert_eq!(world.asked.load(Ordering::Relaxed), 0, "nobody has it open");
    world.users.lock().unwrap().push("vm".to_owned());
    open(disk, OFlags::RDWR).unwrap();

    world.users.lock().unwrap().push("other".to_owned());
    let refused = |device| {
        let refusal = refusal(open(device, OFlags::RDWR));
        assert_eq!((refusal.errno(), refusal.volume().unwrap().as_str()), (libc::EBUSY, "one"));
        refusal.to_string()
    };
    for device in [disk, mapping] {
        let expected = "domain other has volume one by its XML, where QEMU's locks do not keep two domains from overwriting \
                        each other's data: shut that one down or detach the volume from it first";
        assert_eq!(refused(device), expected);
        open(device, OFlags::RDONLY).unwrap();
        // Both have to share it, and of this one it is not known yet.
        let shared = "<domain><devices><disk type='block'><source dev='/dev/mapper/volcrypt-one'/><shareable/></disk>\
                      </devices></domain>";
        *world.given.lock().unwrap() = shared.to_owned();
        assert_eq!(refused(device), expected);
        let guest = broker.guest(std::process::id());
        broker.open(device, true, OFlags::RDWR, &guest).unwrap();
        *world.given.lock().unwrap() = shared.replace("<shareable/>", "");
        assert_eq!(refusal(broker.open(device, true, OFlags::RDWR, &guest)).to_string(), expected);
        *world.given.lock().unwrap() = shared.to_owned();
        hold(&broker, &world, "vm", false);
        open(device, OFlags::RDWR).unwrap();
        broker.holds().ended("vm");
    }

    // One that is about to open it.
    let world = World { by_xml: false, ..world };
    let broker = world.broker(true);
    broker.open(disk, true, OFlags::RDWR, &vm()).unwrap();
    hold(&broker, &world, "third", false);
    broker.open(disk, true, OFlags::RDWR, &vm()).unwrap();
    hold(&broker, &world, "third", true);
    let refusal = refusal(broker.open(disk, true, OFlags::RDWR, &vm()));
    assert!(refusal.to_string().starts_with("domain third has volume one by its XML"), "{refusal}");
}

/// Has the mapping of volume `one` held for `domain`.
fn hold(broker: &Broker, world: &World, domain: &str, is_written_alone: bool) {
    let opened = File::open(world.path().join("mapping")).unwrap().into();
    let mapped = Mapped { volume: "one".parse().unwrap(), is_written_alone, opened };
    broker.holds().hold(domain, vec![mapped], Until::Started);
}

/// Adds what stands on `below`.
fn add_stack(world: &World, below: &[DeviceNumber], minor: u32) -> DeviceNumber {
    let number = world.add_mapping("x", below[0], minor);
    let underlying = below.iter().map(|number| world.identify(*number).unwrap()).collect();
    world.change(number, |identity| {
        identity.mapping = Some(crate::volume::Mapping { name: "vg-lv".to_owned(), uuid: "LVM-x".to_owned() });
        identity.underlying = underlying;
    });
    number
}

#[test]
fn a_mapping_that_is_named_is_its_volume_and_goes_to_the_same_domains() {
    let world = World::new();
    let disk = world.add_volume("one", 0);
    let broker = world.broker(false);
    let mapping = world.add_mapping("one", disk, 100);
    for device in [mapping, add_stack(&world, &[mapping], 101)] {
        let open = |guest: &Facts| broker.open(device, true, OFlags::RDWR, guest);
        let ready = |guest: &Facts| broker.make_ready(&world.identify(device).unwrap(), guest);
        if broker.volume(&"one".parse().unwrap()).is_err() {
            assert_eq!(refusal(open(&vm_of("p1"))).errno(), libc::ENOKEY);
            broker.enrol(disk, Some("p1")).unwrap();
        }
        // The mapping itself is opened as the host's own node, where QEMU's locks meet those of others.
        match open(&vm_of("p1")).unwrap() {
            Verdict::Named(volume, _) => assert_eq!((volume.as_str(), device), ("one", mapping)),
            Verdict::OnMapping => assert_ne!(device, mapping),
            other => panic!("{other:?}"),
        }
        let ready_one = ready(&vm_of("p1")).unwrap();
        assert_eq!((ready_one.volume, ready_one.mapped), (None, vec!["one".parse().unwrap()]));

        for other in [vm_of("p2"), vm()] {
            let refusal = refusal(open(&other));
            assert_eq!((refusal.errno(), refusal.volume().unwrap().as_str()), (libc::EACCES, "one"));
            assert!(refusal.to_string().contains("volcrypt grant add one vm"), "{refusal}");
            assert_eq!(ready(&other).unwrap_err(), refusal);
        }
        let until = crate::store::seconds_now() + 60;
        let grant = crate::store::Grant {
            volume: "one".parse().unwrap(),
            domain: "vm".into(),
            expires_at: until,
            created_at: 0,
        };
        broker.grant(&grant).unwrap();
        assert!(open(&vm_of("p2")).is_ok());
        broker.revoke(&"one".parse().unwrap(), "vm").unwrap();
        assert_eq!(refusal(broker.open(device, true, OFlags::RDWR, &crate::domain::Nobody)).errno(), libc::EACCES);
        let not_given = refusal(broker.open(device, false, OFlags::RDWR, &vm_of("p1")));
        assert!(not_given.to_string().contains("libvirt has not given it to this QEMU"), "{not_given}");

        broker.retire(&"one".parse().unwrap()).unwrap();
        assert_eq!(refusal(open(&vm_of("p1"))).errno(), libc::ENOKEY);
        broker.enrol(disk, None).unwrap();
    }
    assert_eq!(world.opened(), ["one at 250:100"; 2]);
    world.change(mapping, |identity| identity.read_only = true);
    let read_only = refusal(broker.open(mapping, true, OFlags::RDWR, &vm_of("p1")));
    assert_eq!(read_only.errno(), libc::EACCES);
    assert!(read_only.to_string().ends_with("can only be read: mark the disk <readonly/>"), "{read_only}");
    broker.open(mapping, true, OFlags::RDONLY, &vm_of("p1")).unwrap();
}

#[test]
fn a_mapping_on_another_device_than_was_enrolled_is_refused() {
    let world = World::new();
    let disk = world.add_volume("one", 0);
    let broker = world.broker(false);
    broker.enrol(disk, None).unwrap();
    world.change(disk, |identity| identity.wwid = Some("naa.other".to_owned()));
    let mapping = world.add_mapping("one", disk, 100);
    assert_eq!(refusal(broker.open(mapping, true, OFlags::RDWR, &vm())).errno(), libc::EMEDIUMTYPE);
}

#[test]
fn what_stands_on_two_mappings_is_for_who_may_have_both() {
    let world = World::new();
    let disks = [world.add_volume("one", 0), world.add_volume("two", 1)];
    let broker = world.broker(false);
    broker.enrol(disks[0], Some("p1")).unwrap();
    broker.enrol(disks[1], Some("p2")).unwrap();
    let mappings = [world.add_mapping("one", disks[0], 100), world.add_mapping("two", disks[1], 101)];
    let stack = add_stack(&world, &mappings, 102);
    for owner in ["p1", "p2"] {
        assert_eq!(refusal(broker.open(stack, true, OFlags::RDWR, &vm_of(owner))).errno(), libc::EACCES);
    }
    broker.set_owner(&"two".parse().unwrap(), Some("p1")).unwrap();
    assert!(broker.open(stack, true, OFlags::RDWR, &vm_of("p1")).is_ok());
}

#[test]
fn a_rule_that_denies_a_volume_denies_its_mapping() {
    let world = World::new();
    let disk = world.add_volume("one", 0);
    let denying = "[[rules]]\nname = \"no\"\naction = \"deny\"\niscsi_target = '.*'\ndomain = 'vm'\n";
    let broker = world.broker_saying(false, "");
    broker.enrol(disk, None).unwrap();
    let mapping = world.add_mapping("one", disk, 100);
    assert!(broker.open(mapping, true, OFlags::RDWR, &vm()).is_ok());
    let state = world.path().join("state");
    let rules = |rules: &str| world.broker_with(&format!("[key_manager]\ndirectory = {state:?}\n{rules}"));
    for broker in [rules(denying), rules("")] {
        let refusal = refusal(broker.open(mapping, true, OFlags::RDWR, &vm()));
        assert_eq!((refusal.errno(), refusal.volume().unwrap().as_str()), (libc::EACCES, "one"));
    }
}
