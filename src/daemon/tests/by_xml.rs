//! Domains whose XML names their mappings.

use super::super::incoming::{admit, restore};
use super::super::prepare::prepare;
use super::audit::fill;
use super::*;
use crate::audit::{Entry, Kind};
use crate::domain::{Adoption, adopt};
use crate::store::AuditQuery;

pub(super) const XML: &str = "[hook]\nintercept = \"xml\"\n";

fn disk(path: &str) -> String {
    format!("<disk type='block' device='disk'><source dev='{path}'/><target dev='sda'/></disk>")
}

fn on_mapping(volume: &str) -> String {
    disk(&format!("/dev/mapper/volcrypt-{volume}"))
}

/// Without an emulator, for it does not matter.
pub(super) fn domain(disks: &[&str]) -> String {
    format!("<domain type='kvm'><name>vm</name><devices>{}</devices></domain>", disks.concat())
}

/// The same with a note of where a volume was.
fn noted(domain: &str, volume: &str, path: &str) -> String {
    let note = format!(
        "<metadata><volcrypt:disks xmlns:volcrypt='https://volcrypt.org/xmlns/libvirt/disks/1'>\
         <volcrypt:disk volume='{volume}' dev='{path}'/></volcrypt:disks></metadata><devices>"
    );
    domain.replacen("<devices>", &note, 1)
}

fn refused(broker: &Broker, xml: &str) -> String {
    let sentence = prepare(broker, "vm", xml).expect_err("this has to be refused").to_string();
    assert!(broker.holds().by_volume().is_empty(), "something is held for a domain that may not start");
    sentence
}

fn held(broker: &Broker) -> Vec<String> {
    let mut held: Vec<_> = broker
        .holds()
        .by_volume()
        .into_iter()
        .map(|(volume, domains)| format!("{volume}: {}", domains.join(",")))
        .collect();
    held.sort();
    held
}

#[test]
fn a_device_that_the_daemon_cannot_see_is_refused() {
    let broker = World::new().broker_saying(false, XML);
    let sentence = refused(&broker, &domain(&[&disk("/var/tmp/volcrypt-none/lun")]));
    assert!(
        sentence.starts_with("disk sda: /var/tmp/volcrypt-none/lun is or leads to where volcryptd sees"),
        "{sentence}"
    );
    prepare(&broker, "vm", &domain(&[&disk("/var/tmp/x").replace("dev='/", "file='/").replace("block", "file")]))
        .unwrap();
}

#[test]
fn the_mappings_that_a_domain_names_are_held_until_it_has_started() {
    let world = World::new();
    let broker = world.broker_saying(false, XML);
    for (volume, minor) in [("one", 80), ("two", 81)] {
        broker.enrol(world.add_volume(volume, minor), None).unwrap();
    }
    prepare(&broker, "vm", &domain(&[&on_mapping("one"), &on_mapping("two"), &disk("/dev/null")])).unwrap();
    assert_eq!(world.opened(), ["250:80", "250:81"]);
    assert_eq!(held(&broker), ["one: vm", "two: vm"]);
    broker.holds().started("other");
    assert_eq!(held(&broker).len(), 2);
    broker.holds().started("vm");
    assert!(held(&broker).is_empty());

    let recorded = broker.vault().unwrap().store.audit(&AuditQuery::default()).unwrap().entries;
    let uses: Vec<_> = recorded
        .into_iter()
        .filter_map(|entry| match entry {
            Entry::Record { record, .. } if record.event.kind == Kind::KeyUsed => Some(record.event),
            _ => None,
        })
        .collect();
    assert_eq!(uses.len(), 2);
    assert!(uses.iter().all(|event| event.asker.domain.as_deref() == Some("vm")), "{uses:?}");
    assert_eq!(uses[1].detail, "mapped for disk sda");
}

#[test]
fn a_volume_without_its_record_is_not_mapped() {
    let world = World::new();
    let broker = world.broker_saying(false, XML);
    broker.enrol(world.add_volume("unsaid", 82), None).unwrap();
    fill(&broker);
    let sentence = refused(&broker, &domain(&[&on_mapping("unsaid")]));
    assert!(sentence.contains("the audit log cannot be written"), "{sentence}");
    assert!(world.opened().is_empty());
}

#[test]
fn a_protected_volume_by_its_own_device_is_refused() {
    let world = World::new();
    let number = world.add_volume("raw", 83);
    let node = Node::new("/dev", number);
    let broker = world.broker_saying(true, XML);
    let sentence = refused(&broker, &domain(&[&disk(&node.0.display().to_string())]));
    assert!(sentence.starts_with(&format!("disk sda: {} is the protected volume raw", node.0.display())), "{sentence}");
    assert!(sentence.ends_with("run 'volcrypt domain rewrite vm'"), "{sentence}");
    // Though its rule would have it enrolled.
    assert!(broker.vault().unwrap().store.volumes().unwrap().is_empty());

    broker.enrol(number, None).unwrap();
    let lun = on_mapping("raw").replace("device='disk'", "device='lun'");
    assert!(refused(&broker, &domain(&[&lun])).contains("device='lun' passes SCSI commands"));
    let unit = "<disk type='network'><source protocol='iscsi' name='iqn.2026-11.org.lab:volume-x/1'/></disk>";
    assert!(refused(&broker, &domain(&[unit])).contains("QEMU's own iSCSI client"));
}

#[test]
fn one_disk_that_is_refused_leaves_none_held() {
    let world = World::new();
    let broker = world.broker_saying(false, XML);
    broker.enrol(world.add_volume("good", 84), None).unwrap();
    world.add_volume("keyless", 85);
    let sentence = refused(&broker, &domain(&[&on_mapping("good"), &on_mapping("keyless")]));
    assert!(sentence.contains("volume keyless on /dev/sd85 has no key"), "{sentence}");
    assert_eq!(world.opened(), ["250:84"]);
}

#[test]
fn a_volume_is_for_its_owners_domains_only() {
    let world = World::new();
    let broker = world.broker_saying(false, XML);
    broker.enrol(world.add_volume("theirs", 86), Some("p1")).unwrap();
    let sentence = refused(&broker, &domain(&[&on_mapping("theirs")]));
    assert!(sentence.contains("belongs to \"p1\" and domain vm to nobody"), "{sentence}");
    let owner = "<metadata><owner xmlns='https://volcrypt.org/xmlns/libvirt/owner/1'>p1</owner></metadata><devices>";
    prepare(&broker, "vm", &domain(&[&on_mapping("theirs")]).replacen("<devices>", owner, 1)).unwrap();
    assert_eq!(held(&broker), ["theirs: vm"]);
}

#[test]
fn without_the_guard_no_domain_starts() {
    let world = World { guard_fault: Some("there is no cgroup: run this"), ..World::new() };
    let number = world.add_volume("open", 87);
    let (image, mapped) = (domain(&[&disk("/dev/null")]), domain(&[&on_mapping("open")]));
    let strict = world.broker_saying(false, XML);
    strict.enrol(number, None).unwrap();
    for xml in [&image, &mapped] {
        let sentence = refused(&strict, xml);
        assert!(sentence.contains("and it is off: there is no cgroup: run this"), "{sentence}");
    }
    let lax = world.broker_saying(false, &format!("{XML}other_emulators = \"start\"\n"));
    prepare(&lax, "vm", &image).unwrap();
    assert!(refused(&lax, &mapped).contains("and it is off"));
    // Where nothing is protected, nothing is asked.
    prepare(&world.broker_with(XML), "vm", &image).unwrap();
    assert!(world.opened().is_empty());
}

#[test]
fn a_volumes_device_is_found_by_what_the_rules_call_it() {
    let world = World::new();
    let broker = world.broker_saying(false, XML);
    let sentence = refused(&broker, &domain(&[&on_mapping("far")]));
    assert!(sentence.contains("no block device of this host is protected as volume far for domain vm"), "{sentence}");
    assert!(sentence.contains("log in to its target, or"), "{sentence}");
    let first = world.add_volume("far", 88);
    broker.enrol(first, None).unwrap();
    prepare(&broker, "vm", &domain(&[&on_mapping("far")])).unwrap();
    broker.holds().ended("vm");
    world.devices.lock().unwrap().remove(&first);
    let sentence = refused(&broker, &domain(&[&on_mapping("far")]));
    assert!(sentence.contains("log in to its target iqn.2026-11.org.lab:volume-far"), "{sentence}");
}

#[test]
fn of_two_devices_that_are_one_volume_the_noted_one_is_taken() {
    let mut world = World::new();
    let broker = world.broker_saying(false, XML);
    let (first, second) = (world.add_volume("twice", 89), world.add_volume("twice", 90));
    world.change(second, |identity| identity.wwid = Some("naa.89".to_owned()));
    broker.enrol(first, None).unwrap();
    let xml = domain(&[&on_mapping("twice")]);
    assert!(refused(&broker, &xml).contains("both /dev/sd89 and /dev/sd90 lead to volume twice"));
    let node = Node::new("/dev", second);
    let at = node.0.display().to_string();
    prepare(&broker, "vm", &noted(&xml, "twice", &at)).unwrap();
    assert_eq!(world.opened(), ["250:90"]);
    // What is there now is another volume.
    world
        .change(second, |identity| identity.iscsi.as_mut().unwrap().target = "iqn.2026-11.org.lab:volume-x".to_owned());
    prepare(&broker, "vm", &noted(&xml, "twice", &at)).unwrap();
    assert_eq!(world.opened(), ["250:90", "250:89"]);
    // A damaged note is no more than none.
    prepare(&broker, "vm", &noted(&xml, "../", &at)).unwrap();

    // What is mapped already decides by itself.
    let same = Identity { number: second, ..world.identify(first).unwrap() };
    world.change(second, |identity| *identity = same);
    world.devices.lock().unwrap().remove(&first);
    world.mapped = true;
    let broker = world.broker_saying(false, XML);
    prepare(&broker, "vm", &xml).unwrap();
    assert_eq!(world.opened().last().unwrap(), "250:90");
}

#[test]
fn a_path_of_a_multipath_map_is_not_the_volume() {
    let world = World::new();
    let broker = world.broker_saying(false, XML);
    let (path, map) = (world.add_volume("map", 91), world.add_volume("map", 92));
    broker.enrol(path, None).unwrap();
    let names = crate::volume::Mapping { name: "mpatha".to_owned(), uuid: "mpath-3".to_owned() };
    world.change(path, |identity| identity.path_of = Some(names.clone()));
    let beneath = world.identify(path).unwrap();
    world.change(map, |identity| {
        (identity.mapping, identity.underlying) = (Some(names), vec![beneath]);
        identity.wwid = Some("naa.91".to_owned());
    });
    let node = Node::new("/dev", path);
    let xml = noted(&domain(&[&on_mapping("map")]), "map", &node.0.display().to_string());
    prepare(&broker, "vm", &xml).unwrap();
    assert_eq!(world.opened(), ["250:92"]);
}

#[test]
fn a_faulty_configuration_starts_nothing_without_the_wrapper() {
    let world = World::new();
    let sentence = refused(&world.broker_with("nonsense"), &domain(&[&on_mapping("any")]));
    assert!(sentence.contains("does not run volcrypt's wrapper"), "{sentence}");
}

#[test]
fn a_domain_that_comes_gets_its_mappings_and_its_own_emulator() {
    let world = World::new();
    let device = world.add_volume("one", 90);
    let node = Node::new("/dev", device);
    let broker = world.broker_saying(false, XML);
    broker.enrol(device, Some("p1")).unwrap();
    let emulator = "<emulator>/usr/bin/qemu-system-x86_64</emulator>";
    let elsewhere = domain(&[emulator, &disk(node.0.to_str().unwrap())]);
    let Adoption::Changed { xml: elsewhere, .. } = adopt(&elsewhere).unwrap() else { panic!("is adopted") };
    let owner = "<metadata><v:owner xmlns:v='https://volcrypt.org/xmlns/libvirt/owner/1'>p1</v:owner>";
    let owned = elsewhere.replacen("<metadata>", owner, 1);
    let restore = |broker: &Broker, name: &str, xml: &str| restore(broker, name, xml, &|_| true);
    for come in [admit as fn(&Broker, &str, &str) -> _, restore] {
        let here = come(&broker, "vm", &owned).unwrap().expect("another XML");
        assert!(here.contains("<source dev='/dev/mapper/volcrypt-one'/>") && here.contains(emulator), "{here}");
        // What names its mappings comes as it is.
        assert_eq!(come(&broker, "vm", &here).unwrap(), None);
        // That is what starts then.
        prepare(&broker, "vm", &here).unwrap();
        assert_eq!(held(&broker), ["one: vm"]);
        broker.holds().ended("vm");
    }
    assert!(admit(&broker, "vm", &elsewhere).unwrap_err().to_string().contains("belongs to \"p1\""));
}

#[test]
fn a_domain_whose_volumes_are_not_here_does_not_come() {
    let world = World::new();
    world.add_volume("blank", 91);
    let broker = world.broker_saying(true, XML);
    let refused = |xml: &str| admit(&broker, "vm", xml).unwrap_err().to_string();
    let nowhere = refused(&domain(&[&on_mapping("nowhere")]));
    assert!(nowhere.starts_with("disk sda: no block device of this host is protected as volume nowhere"), "{nowhere}");
    // However blank it looks: it may have been used elsewhere.
    assert!(refused(&domain(&[&on_mapping("blank")])).contains("has no key on this host"));
    let missing = refused(&domain(&[&disk("/dev/disk/by-path/none")]));
    assert!(missing.contains("does not exist: log in to its target first"), "{missing}");
    assert!(world.opened().is_empty());

    let guardless = World { guard_fault: Some("it is switched off"), ..World::new() };
    let sentence = admit(&guardless.broker_saying(false, XML), "vm", &domain(&[])).unwrap_err().to_string();
    assert!(sentence.contains("it is switched off"), "{sentence}");
}

#[test]
fn a_domain_in_a_cgroup_without_the_guard_is_refused() {
    let world = World::new();
    let broker = world.broker_saying(false, XML);
    broker.enrol(world.add_volume("far", 98), None).unwrap();
    let within = |partition: &str| {
        let resource = format!("<resource><partition>{partition}</partition></resource><devices>");
        domain(&[&on_mapping("far")]).replacen("<devices>", &resource, 1)
    };
    let expected = "with intercept = \"xml\" the guard alone keeps domain vm from the raw devices of protected volumes, and \
                    it is for the cgroup machine.slice only, which the domain's <partition> \"/other\" is not in: change \
                    the partition, or cgroup in [guard]";
    assert_eq!(refused(&broker, &within("/other")), expected);
    assert_eq!(admit(&broker, "vm", &within("/other")).unwrap_err().to_string(), expected);
    assert!(world.opened().is_empty());
    prepare(&broker, "vm", &within("/machine/web")).unwrap();
    broker.holds().ended("vm");

    // One that has no volume yet, for one can be attached to it; unless other emulators may do as they like.
    let without = within("/other").replace(&on_mapping("far"), "");
    assert_eq!(refused(&broker, &without), expected);
    let lenient = World::new();
    let lenient = lenient.broker_saying(false, &format!("{XML}other_emulators = \"start\"\n"));
    prepare(&lenient, "vm", &without).unwrap();
}

#[test]
fn a_domain_of_the_default_partition_needs_the_guard_there() {
    let world = World::new();
    let broker = world.broker_saying(false, &format!("{XML}[guard]\ncgroup = 'production.slice'\n"));
    broker.enrol(world.add_volume("far", 98), None).unwrap();
    let sentence = refused(&broker, &domain(&[&on_mapping("far")]));
    assert!(sentence.contains("is for the cgroup production.slice only, which the domain's <partition> \"/machine\""));
}

#[test]
fn a_volume_is_given_once() {
    let world = World::new();
    let broker = world.broker_saying(false, XML);
    for (volume, minor) in [("once", 99), ("top", 100), ("tip", 101)] {
        broker.enrol(world.add_volume(volume, minor), None).unwrap();
    }
    let as_second = |disk: String| disk.replace("'sda'", "'sdb'");
    assert_eq!(
        refused(&broker, &domain(&[&on_mapping("once"), &as_second(on_mapping("once"))])),
        "disk sdb: domain vm has volume once already, as disk sda, and the two would overwrite each other's data"
    );

    // What is only read, or made for it, may be there twice.
    let twice = |end: &str| {
        let disk = on_mapping("once").replace("</disk>", end);
        prepare(&broker, "vm", &domain(&[&disk, &as_second(disk.clone())])).unwrap();
        broker.holds().ended("vm");
    };
    twice("<readonly/></disk>");
    twice("<shareable/></disk>");
    let both = [on_mapping("once").replace("</disk>", "<shareable/></disk>"), as_second(on_mapping("once"))];
    for disks in [[&both[0], &both[1]], [&both[1], &both[0]]] {
        assert!(refused(&broker, &domain(&disks.map(String::as_str))).contains("domain vm has volume once already"));
    }
    let base = "<backingStore type='block'><format type='raw'/><source dev='/dev/mapper/volcrypt-once'/></backingStore></disk>";
    let overlays = ["top", "tip"].map(|volume| on_mapping(volume).replace("</disk>", base));
    prepare(&broker, "vm", &domain(&[&overlays[0], &as_second(overlays[1].clone())])).unwrap();
}

#[test]
fn a_volume_that_another_domain_has_is_refused_unless_it_is_shared() {
    let world = World { mapped: true, ..World::new() };
    let broker = world.broker_saying(false, XML);
    broker.enrol(world.add_volume("ours", 102), None).unwrap();
    world.users.lock().unwrap().extend(["vm".to_owned(), "clone".to_owned()]);
    let expected = "disk sda: domain clone has volume ours, and the two would overwrite each other's data: shut that one \
                    down or detach the volume from it, or mark the disk <shareable/> in both if what is in it is made for \
                    that";
    assert_eq!(refused(&broker, &domain(&[&on_mapping("ours")])), expected);
    let marked = |with: &str| domain(&[&on_mapping("ours").replace("</disk>", &format!("{with}</disk>"))]);
    let (shared, read_only) = (marked("<shareable/>"), marked("<readonly/>"));
    // What libvirt has of the other one does not say how it uses the volume, or that it writes there alone.
    let twice = shared.replace("</devices>", &format!("{}</devices>", on_mapping("ours")));
    for unshared in ["<domain/>", &marked(""), &shared.replace("ours", "other"), &twice] {
        *world.given.lock().unwrap() = unshared.to_owned();
        for xml in [&shared, &read_only] {
            assert_eq!(refused(&broker, xml), expected, "{unshared}");
        }
    }
    for live in [&shared, &read_only] {
        *world.given.lock().unwrap() = live.clone();
        assert_eq!(refused(&broker, &marked("")), expected, "{live}");
        prepare(&broker, "vm", &shared).unwrap();
        broker.holds().ended("vm");
    }

    // One that starts as well has not opened it yet.
    world.users.lock().unwrap().clear();
    let other = |xml: &str| {
        let started = prepare(&broker, "other", &xml.replace("<name>vm", "<name>other"));
        assert_eq!(held(&broker).len(), 1, "what the other one has stays");
        broker.holds().ended("other");
        started.map_err(|refusal| refusal.to_string())
    };
    for (first, second) in [(marked(""), marked("")), (marked(""), shared.clone()), (shared.clone(), marked(""))] {
        prepare(&broker, "vm", &first).unwrap();
        assert!(other(&second).unwrap_err().contains("domain vm has volume ours"), "{first} {second}");
        broker.holds().ended("vm");
    }
    prepare(&broker, "vm", &shared).unwrap();
    other(&shared).unwrap();
    broker.holds().ended("vm");
    other(&marked("")).unwrap();
}

#[test]
fn what_another_domain_writes_is_no_image_to_stand_on() {
    let world = World { mapped: true, ..World::new() };
    let broker = world.broker_saying(false, XML);
    for (volume, minor) in [("base", 104), ("top", 105)] {
        broker.enrol(world.add_volume(volume, minor), None).unwrap();
    }
    let base = "<backingStore type='block'><format type='raw'/><source dev='/dev/mapper/volcrypt-base'/></backingStore></disk>";
    let overlay = on_mapping("top").replace("</disk>", base);
    let writer = domain(&[&on_mapping("base")]).replace("<name>vm", "<name>writer");
    prepare(&broker, "writer", &writer).unwrap();
    let sentence = prepare(&broker, "vm", &domain(&[&overlay])).unwrap_err().to_string();
    assert!(sentence.starts_with("disk sda: domain writer has volume base"), "{sentence}");
    broker.holds().ended("writer");
    // Two may stand on it.
    prepare(&broker, "vm", &domain(&[&overlay])).unwrap();
    prepare(&broker, "other", &domain(&[&overlay.replace("-top", "-base")]).replace("<name>vm", "<name>other"))
        .unwrap_err();
}

#[test]
fn what_a_guest_wrote_into_its_volume_names_no_image() {
    let world = World::new();
    let broker = world.broker_saying(false, XML);
    for (volume, minor) in [("own", 106), ("below", 107)] {
        broker.enrol(world.add_volume(volume, minor), None).unwrap();
    }
    let with = |chain: &str| {
        let driver = format!("<driver name='qemu' type='qcow2'/>{chain}</disk>");
        domain(&[&on_mapping("own").replace("</disk>", &driver)])
    };
    let layer = |of: &str, inner: &str| {
        format!(
            "<backingStore type='block'><format type='{of}'/><source dev='/dev/mapper/volcrypt-below'/>{inner}</backingStore>"
        )
    };
    for (chain, volume) in [(String::new(), "own"), (layer("qcow2", ""), "below")] {
        let expected = format!(
            "disk sda: libvirt would look into the protected volume {volume} for the image on which the one there stands, and \
             give the guest whatever it finds named, which a guest may have written there itself: say it with \
             <backingStore> in the disk's XML, where <backingStore/> stands for none"
        );
        assert_eq!(refused(&broker, &with(&chain)), expected);
        // A chain of volumes does not come at all.
        if volume == "own" {
            assert_eq!(admit(&broker, "vm", &with(&chain)).unwrap_err().to_string(), expected);
        }
    }
    assert_eq!(admit(&broker, "vm", &with("<backingStore/>")).unwrap(), None);
    for chain in ["<backingStore/>", &layer("raw", ""), &layer("qcow2", "<backingStore/>")] {
        prepare(&broker, "vm", &with(chain)).unwrap();
        broker.holds().ended("vm");
    }
}

#[test]
fn a_device_that_passes_and_is_shut_by_the_guard_is_refused() {
    let world = World::new();
    let pass = "[[rules]]\nname = 'by-name'\niscsi_target = 'iqn.*'\ndomain = 'vm'\naction = 'pass'\n";
    let broker = world.broker_saying(false, &format!("{XML}{pass}"));
    let node = Node::new("/dev", world.add_volume("passes", 103));
    let sentence = refused(&broker, &domain(&[&disk(&node.0.display().to_string())]));
    assert!(sentence.contains("passes for this domain, and the guard shuts it to all of them"), "{sentence}");
    let off = world.broker_saying(
        false,
        &format!("[hook]\nintercept = \"xml\"\nother_emulators = \"start\"\n[guard]\nenabled = false\n{pass}"),
    );
    prepare(&off, "vm", &domain(&[&disk(&node.0.display().to_string())])).unwrap();
}

#[test]
fn a_drive_comes_without_a_medium_that_is_not_there() {
    let world = World::new();
    let broker = world.broker_saying(false, XML);
    let missing = disk("/dev/sr99");
    assert!(admit(&broker, "vm", &domain(&[&missing])).unwrap_err().to_string().contains("/dev/sr99 does not exist"));
    for kind in ["cdrom", "floppy"] {
        let drive = missing.replace("device='disk'", &format!("device='{kind}'"));
        assert_eq!(admit(&broker, "vm", &domain(&[&drive])).unwrap(), None);
    }
}
