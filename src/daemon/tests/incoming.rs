use std::sync::mpsc;

use super::super::incoming::{admit, restore};
use super::super::pool::Pool;
use super::super::prepare::prepare;
use super::super::rewrite::rewrite;
use super::*;
use crate::audit::Entry;
use crate::store::AuditQuery;

const WRAPPER: &str = "/usr/libexec/volcrypt/emulators/qemu-system-x86_64";
const BARE: &str = "/usr/bin/qemu-system-x86_64";

fn disk(target: &str, path: &Path) -> String {
    format!("<disk type='block' device='disk'><source dev='{}'/><target dev='{target}'/></disk>", path.display())
}

fn domain(emulator: &str, disks: &str) -> String {
    format!("<domain type='kvm'><name>vm</name><devices><emulator>{emulator}</emulator>{disks}</devices></domain>")
}

fn refused(broker: &Broker, xml: &str) -> String {
    admit(broker, "vm", xml).expect_err("this has to be refused").to_string()
}

/// What is in the audit log of each kind, the newest first.
fn recorded(broker: &Broker) -> Vec<String> {
    let page = broker.vault().unwrap().store.audit(&AuditQuery::default()).unwrap();
    let kind = |entry| match entry {
        Entry::Record { record, .. } => record.event.kind.to_string(),
        Entry::Damaged { damaged, .. } => panic!("{damaged}"),
    };
    page.entries.into_iter().map(kind).collect()
}

#[test]
fn a_domain_whose_disks_are_here_may_come_as_it_is() {
    let world = World::new();
    let device = world.add_volume("here", 70);
    let node = Node::new("/dev", device);
    let broker = world.broker(false);
    broker.enrol(device, None).unwrap();
    let image = disk("sdb", Path::new("/srv/nowhere.img"));
    assert_eq!(admit(&broker, "vm", &domain(WRAPPER, &(disk("sda", &node.0) + &image))).unwrap(), None);
    assert!(world.opened().is_empty(), "a mapping is made by QEMU's open only");
    assert_eq!(recorded(&broker), ["enrolled"], "no key was used yet");
}

#[test]
fn a_volume_that_looks_blank_is_not_enrolled_for_a_domain_that_comes() {
    let world = World::new();
    let node = Node::new("/dev", world.add_volume("elsewhere", 71));
    let broker = world.broker(true);
    let xml = domain(WRAPPER, &disk("sda", &node.0));
    let sentence = refused(&broker, &xml);
    assert!(sentence.starts_with("disk sda: volume elsewhere on /dev/sd71 has no key on this host"), "{sentence}");
    assert!(sentence.contains("copy the key store"), "{sentence}");
    assert!(broker.vault().unwrap().store.volumes().unwrap().is_empty());
    assert_eq!(recorded(&broker), ["refused"]);
    // One that starts is another matter.
    prepare(&broker, "vm", &xml).unwrap();
    assert_eq!(admit(&broker, "vm", &xml).unwrap(), None);
}

#[test]
fn ciphertext_that_no_rule_is_about_keeps_its_domain_where_it_is() {
    let world = World::new();
    let device = world.add_volume("of-another-rule", 73);
    world.change(device, |identity| identity.iscsi.as_mut().unwrap().target = "iqn.2026-11.org.lab:other".to_owned());
    let node = Node::new("/dev", device);
    let xml = domain(WRAPPER, &disk("sda", &node.0));
    let by_xml = "[hook]\nintercept = \"xml\"\n";
    let pass = "[[rules]]\nname = \"own\"\niscsi_target = 'iqn\\.2026-11\\.org\\.lab:other'\naction = \"pass\"\n";
    let without_rules = format!("[key_manager]\ndirectory = {:?}\n", world.path().join("state"));
    let brokers = |more: &str| [world.broker_saying(false, more), world.broker_with(&format!("{more}{without_rules}"))];
    for broker in ["", by_xml].into_iter().flat_map(brokers) {
        assert_eq!(admit(&broker, "vm", &xml).unwrap(), None, "it is blank");
    }
    let mut noise = vec![0; SIZE as usize];
    aws_lc_rs::rand::fill(&mut noise).unwrap();
    std::fs::write(world.path().join("sd73"), noise).unwrap();
    for broker in ["", by_xml].into_iter().flat_map(brokers) {
        let sentence = refused(&broker, &xml);
        assert!(sentence.starts_with("disk sda: /dev/sd73 holds what looks like ciphertext"), "{sentence}");
        assert_eq!(recorded(&broker)[0], "refused");
        // Its start is another matter, and comes after a restore.
        assert!(restore(&broker, "vm", &xml, &|_| true).is_ok());
    }
    for broker in [pass.to_owned(), format!("{by_xml}{pass}")].iter().flat_map(|more| brokers(more)) {
        assert_eq!(admit(&broker, "vm", &xml).unwrap(), None);
    }
}

#[test]
fn a_disk_that_is_not_here_is_named() {
    let broker = World::new().broker(false);
    let missing = disk("sda", Path::new("/dev/disk/by-path/none"));
    let sentence = refused(&broker, &domain(WRAPPER, &missing));
    assert_eq!(sentence, "disk sda: /dev/disk/by-path/none does not exist: log in to its target first");
    // A drive goes on without its medium, and about anything else libvirt says its own.
    let drive = missing.replace("device='disk'", "device='cdrom'");
    for disks in [drive, disk("sda", Path::new("/srv/none")), disk("sda", Path::new("/dev/null"))] {
        assert_eq!(admit(&broker, "vm", &domain(WRAPPER, &disks)).unwrap(), None, "{disks}");
    }
    assert_eq!(admit(&World::new().broker_with(""), "vm", &domain(BARE, &missing)).unwrap(), None);
}

#[test]
fn what_would_refuse_its_start_refuses_a_domain_that_comes() {
    let world = World::new();
    let device = world.add_volume("mine", 72);
    let node = Node::new("/dev", device);
    let broker = world.broker(false);
    let mine = disk("sda", &node.0);
    broker.enrol(device, Some("p1")).unwrap();
    let sentence = refused(&broker, &domain(WRAPPER, &mine));
    assert!(sentence.starts_with("disk sda: volume mine belongs to \"p1\" and domain vm to nobody"), "{sentence}");
    broker.set_owner(&"mine".parse().unwrap(), None).unwrap();

    for disks in [&mine, ""] {
        let sentence = refused(&broker, &domain(BARE, disks));
        assert!(
            sentence.contains("unencrypted: give virsh an XML (--xml)") && sentence.ends_with(WRAPPER),
            "{sentence}"
        );
    }
    let sentence = refused(&broker, &domain(WRAPPER, &mine.replace("device='disk'", "device='lun'")));
    assert!(sentence.contains("device='lun'"), "{sentence}");
    let unit = "<disk type='network'><source protocol='iscsi' name='iqn.2026-11.org.lab:volume-x/1'/></disk>";
    assert!(refused(&broker, &domain(WRAPPER, unit)).contains("QEMU's own iSCSI client"));
    assert!(refused(&world.broker_with("nonsense"), &domain(WRAPPER, &mine)).contains("volcrypt.toml:1:"));

    broker.retire(&"mine".parse().unwrap()).unwrap();
    assert!(refused(&broker, &domain(WRAPPER, &mine)).contains("volume mine is retired"));
    for xml in ["", "<domain>", "<x/>"] {
        assert!(refused(&broker, xml).starts_with("the domain's XML cannot be read: "));
    }
}

#[test]
fn a_domain_from_a_host_that_names_mappings_gets_its_volumes_and_the_wrapper() {
    let world = World::new();
    let devices = [world.add_volume("first", 73), world.add_volume("second", 74)];
    let nodes = devices.map(|device| Node::new("/dev", device));
    let broker = world.broker(false);
    for device in devices {
        broker.enrol(device, None).unwrap();
    }
    let disks = disk("sda", &nodes[0].0) + &disk("sdb", &nodes[1].0);
    let there = rewrite(&broker, &domain(BARE, &disks)).unwrap();
    assert!(there.contains("/dev/mapper/volcrypt-first") && there.contains("/dev/mapper/volcrypt-second"), "{there}");

    let here = admit(&broker, "vm", &there).unwrap().expect("libvirt is to use another XML");
    assert!(here.contains(&format!("<emulator>{WRAPPER}</emulator>{disks}</devices>")), "{here}");
    assert!(here.contains(&format!("emulator=\"{BARE}\"")), "what it had is kept: {here}");
    assert!(!here.contains("/dev/mapper") && !here.contains("volcrypt:disks"), "{here}");
    assert_eq!(admit(&broker, "vm", &here).unwrap(), None, "it needs no more");

    // The same path is another volume on this host.
    let swapped = there.replace(&nodes[0].0.display().to_string(), &nodes[1].0.display().to_string());
    let sentence = refused(&broker, &swapped);
    assert!(
        sentence.starts_with("disk sda: it is on volume first, and ") && sentence.contains("is volume second"),
        "{sentence}"
    );
    let gone = there.replace(&nodes[0].0.display().to_string(), "/dev/null");
    assert!(refused(&broker, &gone).contains("/dev/null is no protected volume on this host"));
}

#[test]
fn a_mapping_of_which_nothing_says_what_it_is_does_not_come() {
    let world = World::new();
    let device = world.add_volume("noted", 75);
    let node = Node::new("/dev", device);
    let broker = world.broker(false);
    broker.enrol(device, None).unwrap();
    let mapped = disk("sdb", Path::new("/dev/mapper/volcrypt-other"));
    let sentence = refused(&broker, &domain(WRAPPER, &mapped));
    assert!(sentence.starts_with("disk sdb: it is on /dev/mapper/volcrypt-other, and no note"), "{sentence}");
    assert!(sentence.contains("--xml") && sentence.contains("volume other"), "{sentence}");
    // Nor does one beside another of which a note says it.
    let beside = rewrite(&broker, &domain(WRAPPER, &disk("sda", &node.0)))
        .unwrap()
        .replace("</devices>", &(mapped + "</devices>"));
    assert!(refused(&broker, &beside).starts_with("disk sdb: it is on /dev/mapper/volcrypt-other"));
}

#[test]
fn what_is_restored_is_looked_at_when_it_starts_unless_it_names_mappings() {
    let world = World::new();
    let node = Node::new("/dev", world.add_volume("saved", 76));
    let broker = world.broker(true);
    let before = domain(WRAPPER, &disk("sda", &node.0));
    let saved = rewrite(&broker, &before).unwrap();
    for xml in [&before, "", "<domain>"] {
        assert_eq!(restore(&broker, "vm", xml, &|_| true).ok().flatten(), None);
    }
    // It would be given another XML, and has no key.
    assert!(restore(&broker, "vm", &saved, &|_| true).unwrap_err().to_string().contains("has no key on this host"));
    assert!(broker.vault().unwrap().store.volumes().unwrap().is_empty());
    broker.enrol(DeviceNumber { major: 250, minor: 76 }, None).unwrap();
    assert_eq!(restore(&broker, "vm", &saved, &|_| true).unwrap().as_deref(), Some(before.as_str()));
    // libvirt would delete a managed save that names an emulator which is not there.
    assert_eq!(restore(&broker, "vm", &saved, &|_| false).unwrap(), None);
}

/// libvirt starts it from the XML in the file, whatever is defined since then.
#[test]
fn what_was_saved_before_it_was_adopted_is_restored_with_the_wrapper() {
    let world = World::new();
    let device = world.add_volume("before", 77);
    let node = Node::new("/dev", device);
    let broker = world.broker(false);
    let with =
        |broker: &Broker, xml: &str| restore(broker, "vm", xml, &|program| program == Path::new(WRAPPER)).unwrap();
    for disks in [disk("sda", &node.0), disk("sda", Path::new("/srv/nowhere.img")), String::new()] {
        let saved = domain(BARE, &disks);
        assert!(prepare(&broker, "vm", &saved).unwrap_err().to_string().contains("volcrypt domain adopt vm"));
        let restored = with(&broker, &saved).expect("libvirt is to use another XML");
        assert!(restored.contains(&format!("<emulator>{WRAPPER}</emulator>{disks}</devices>")), "{restored}");
        assert!(restored.contains(&format!("emulator=\"{BARE}\"")), "what it had is kept: {restored}");
        assert_eq!(with(&broker, &restored), None, "it needs no more");
        // libvirt would delete a managed save that names an emulator which is not there.
        assert_eq!(restore(&broker, "vm", &saved, &|_| false).unwrap(), None);
        // With a faulty configuration only what runs the wrapper starts.
        assert!(with(&world.broker_with("nonsense"), &saved).is_some());
        assert_eq!(with(&world.broker_with(""), &saved), None);
    }
    // Its start still needs all that a start needs.
    let saved = domain(BARE, &disk("sda", &node.0));
    let restored = with(&broker, &saved).unwrap();
    assert!(
        prepare(&broker, "vm", &restored).unwrap_err().to_string().contains("volume before on /dev/sd77 has no key")
    );
    broker.enrol(device, None).unwrap();
    prepare(&broker, "vm", &restored).unwrap();

    let lax = world.broker_saying(false, "[hook]\nother_emulators = \"start\"\n");
    assert_eq!(with(&lax, &saved).as_ref(), Some(&restored));
    for disks in ["", &disk("sda", Path::new("/dev/null"))] {
        assert_eq!(with(&lax, &domain(BARE, disks)), None);
    }
    // What names no program cannot be adopted, and is refused when it starts.
    assert_eq!(with(&broker, &domain("", "")), None);
    assert_eq!(with(&broker, &domain("/usr/bin/..", "")), None);
}

fn noise() -> Vec<u8> {
    let mut noise = vec![0; SIZE as usize];
    aws_lc_rs::rand::fill(&mut noise).unwrap();
    noise
}

#[test]
fn ciphertext_keeps_its_domain_where_it_is_whatever_brings_the_device() {
    let world = World::new();
    let namespace = world.add_volume("namespace", 901);
    world.change(namespace, |identity| (identity.iscsi, identity.lun) = (None, None));
    let on = |below: DeviceNumber, minor: u32, change: fn(&mut Identity)| {
        let (below, number) = (world.identify(below).unwrap(), world.add_volume("none", minor));
        world.change(number, |identity| {
            (identity.iscsi, identity.lun, identity.wwid) = (None, None, None);
            identity.underlying = vec![below];
            change(identity);
        });
        number
    };
    let logical = |identity: &mut Identity| {
        let (name, uuid) = ("vg-lv".to_owned(), "LVM-x".to_owned());
        identity.mapping = Some(crate::volume::Mapping { name, uuid });
    };
    let (partition, logical_volume) =
        (on(namespace, 902, |identity| identity.partition = Some(1)), on(namespace, 903, logical));
    let mine = world.add_volume("mine", 904);
    let on_a_mapping = on(world.add_mapping("mine", mine, 905), 906, logical);
    let by_kpartx = on(namespace, 912, |identity| {
        let (name, uuid) = ("mpatha-part1".to_owned(), "part1-mpath-x".to_owned());
        identity.mapping = Some(crate::volume::Mapping { name, uuid });
    });
    let nameless = world.add_volume("nameless", 913);
    world.change(nameless, |identity| (identity.iscsi, identity.lun, identity.wwid) = (None, None, None));
    let devices = [namespace, partition, logical_volume, by_kpartx, on_a_mapping, nameless];
    let nodes = devices.map(|device| Node::new("/dev", device));
    let xmls = nodes.each_ref().map(|node| domain(WRAPPER, &disk("sda", &node.0)));
    world.broker(false).enrol(mine, None).unwrap();
    // Which of them come, and which are refused for what is on them.
    let come = |more: &str| {
        let broker = world.broker_saying(false, more);
        xmls.each_ref().map(|xml| match admit(&broker, "vm", xml) {
            Ok(None) => true,
            Err(refusal) => {
                let sentence = refusal.to_string();
                assert!(sentence.contains(" holds what looks like ciphertext, and no rule here says"), "{sentence}");
                false
            }
            admitted => panic!("{admitted:?}"),
        })
    };
    assert_eq!(come(""), [true; 6], "they are blank");
    devices.iter().for_each(|device| world.write(*device, &noise()));
    let encrypted = "what stands on a mapping is encrypted, and no host has a rule about what has no name";
    assert_eq!(come(""), [false, false, false, false, true, true], "{encrypted}");
    let by_wwid = "[[rules]]\nname = \"local\"\nwwid = 'naa\\.901'\naction = \"pass\"\n";
    assert_eq!(come(by_wwid), [true, true, false, false, true, true], "a rule may be about a logical volume by itself");
    let by_uuid = "[[rules]]\nname = \"logical\"\ndm_uuid = 'LVM-x'\naction = \"pass\"\n";
    assert_eq!(come(by_uuid), [false, false, true, false, true, true]);
    // A partition table makes a disk of it, as of every disk of the host.
    let mut table = [0; 512];
    table[446..462].copy_from_slice(&[0, 0, 2, 0, 0x83, 0, 0, 0, 8, 0, 0, 0, 0, 16, 0, 0]);
    table[510..].copy_from_slice(&[0x55, 0xaa]);
    world.write(namespace, &table);
    assert_eq!(come(""), [true, false, false, false, true, true]);
}

#[test]
fn ciphertext_that_no_rule_is_about_keeps_a_saved_domain_in_its_file() {
    let world = World::new();
    let device = world.add_volume("saved", 907);
    world.change(device, |identity| (identity.iscsi, identity.lun) = (None, None));
    world.write(device, &noise());
    let node = Node::new("/dev", device);
    let called = |uuid: &str| {
        domain(WRAPPER, &disk("sda", &node.0)).replace("<devices>", &format!("<uuid>{uuid}</uuid><devices>"))
    };
    let xml = called("0b1f7c1e-0000-4000-8000-000000000001");
    let other = called("0b1f7c1e-0000-4000-8000-000000000002");
    for more in ["", "[hook]\nintercept = \"xml\"\n"] {
        let broker = world.broker_saying(false, more);
        prepare(&broker, "vm", &xml).expect("one that is not restored starts");
        for _ in 0..2 {
            assert_eq!(restore(&broker, "vm", &xml, &|_| false).unwrap(), None, "libvirt would delete a managed save");
            prepare(&broker, "vm", &other).expect("it is the start of another domain");
            let sentence = prepare(&broker, "vm", &xml).unwrap_err().to_string();
            assert!(sentence.starts_with("disk sda: /dev/sd907 holds what looks like ciphertext"), "{sentence}");
            assert_eq!(recorded(&broker)[0], "refused");
            prepare(&broker, "vm", &xml).expect("it was asked for one start");
        }
        // What is in a managed save has run on this host, whose own database knows its volumes.
        let managed = |path: &Path| path == Path::new("/var/lib/libvirt/qemu/save/vm.save");
        restore(&broker, "vm", &xml, &managed).unwrap();
        prepare(&broker, "vm", &xml).unwrap();
        let pass = "[[rules]]\nname = \"own\"\nwwid = 'naa\\.907'\naction = \"pass\"\n";
        let broker = world.broker_saying(false, &format!("{more}{pass}"));
        restore(&broker, "vm", &xml, &|_| false).unwrap();
        prepare(&broker, "vm", &xml).unwrap();
    }
    // One whose rule was lost on this host is named.
    let enrolled = world.add_volume("enrolled", 909);
    world.broker(false).enrol(enrolled, None).unwrap();
    world.write(enrolled, &noise());
    let node = Node::new("/dev", enrolled);
    let xml = domain(WRAPPER, &disk("sda", &node.0));
    let broker = world.broker_with(&format!("[key_manager]\ndirectory = {:?}\n", world.path().join("state")));
    restore(&broker, "vm", &xml, &|_| false).unwrap();
    let sentence = prepare(&broker, "vm", &xml).unwrap_err().to_string();
    assert!(
        sentence.starts_with("disk sda: /dev/sd909 holds the volume enrolled, and no rule protects it"),
        "{sentence}"
    );
}

#[test]
fn a_device_that_does_not_answer_takes_no_thread_from_other_requests() {
    let world = World::new();
    let device = world.add_volume("hung", 908);
    world.change(device, |identity| identity.iscsi.as_mut().unwrap().target = "iqn.2026-11.org.lab:hung".to_owned());
    let (node, file) = (Node::new("/dev", device), world.path().join("sd908"));
    // Opening it waits for somebody who opens it for writing.
    std::fs::remove_file(&file).unwrap();
    rustix::fs::mknodat(CWD, &file, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
    let (broker, xml) = (world.broker(false), domain(WRAPPER, &disk("sda", &node.0)));
    let (pool, (done, finished)) = (Pool::new(1), mpsc::channel());
    let admitted = done.clone();
    pool.run(move || admitted.send(admit(&broker, "vm", &xml).unwrap_err().to_string()).unwrap());
    pool.run(move || done.send("another request".to_owned()).unwrap());
    assert_eq!(finished.recv_timeout(Duration::from_secs(60)).unwrap(), "another request");
    assert!(finished.try_recv().is_err(), "the device has not answered yet");
    drop(OpenOptions::new().write(true).open(&file).unwrap());
    let sentence = finished.recv_timeout(Duration::from_secs(60)).unwrap();
    assert!(
        sentence.contains("whether it holds ciphertext of the host that the domain comes from cannot be seen"),
        "{sentence}"
    );
}

/// As a second attempt while the first one waits for the device, or another guest that comes with the same disk.
#[test]
fn ciphertext_is_seen_on_what_somebody_has_claimed() {
    let mut world = World::new();
    world.is_claimed = true;
    let device = world.add_volume("claimed", 910);
    world.change(device, |identity| identity.iscsi.as_mut().unwrap().target = "iqn.2026-11.org.lab:other".to_owned());
    world.write(device, &noise());
    let node = Node::new("/dev", device);
    let sentence = admit(&world.broker(false), "vm", &domain(WRAPPER, &disk("sda", &node.0))).unwrap_err().to_string();
    assert!(sentence.contains("holds what looks like ciphertext"), "{sentence}");
}

#[test]
fn a_drive_whose_medium_cannot_be_read_comes_without_one() {
    let world = World::new();
    let device = world.add_volume("medium", 911);
    world.change(device, |identity| identity.iscsi.as_mut().unwrap().target = "iqn.2026-11.org.lab:other".to_owned());
    std::fs::remove_file(world.path().join("sd911")).unwrap();
    let node = Node::new("/dev", device);
    let xml = |kind: &str| domain(WRAPPER, &disk("sda", &node.0).replace("device='disk'", &format!("device='{kind}'")));
    assert!(admit(&world.broker(false), "vm", &xml("cdrom")).is_ok());
    let sentence = admit(&world.broker(false), "vm", &xml("disk")).unwrap_err().to_string();
    assert!(sentence.contains("it cannot be opened") && sentence.contains("action = \"pass\""), "{sentence}");
}
