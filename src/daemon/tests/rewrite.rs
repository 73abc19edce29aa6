use super::super::rewrite::{rewrite, unrewrite};
use super::*;

fn disk(path: &Path) -> String {
    format!("<disk type='block'><source dev='{}'/><target dev='sda'/></disk>", path.display())
}

fn domain(disk: &str) -> String {
    format!("<domain type='kvm'><name>vm</name><metadata/><devices>{disk}</devices></domain>")
}

fn refused(broker: &Broker, xml: &str) -> String {
    rewrite(broker, xml).expect_err(xml).to_string()
}

#[test]
fn a_protected_disk_is_pointed_to_its_mapping_and_nothing_is_done() {
    let world = World::new();
    let node = Node::new("/dev", world.add_volume("paper", 60));
    // Though it has no key yet, and its rule would have it make one.
    let broker = world.broker(true);
    let rewritten = rewrite(&broker, &disk(&node.0)).unwrap();
    assert_eq!(rewritten, disk(Path::new("/dev/mapper/volcrypt-paper")));
    let rewritten = rewrite(&broker, &domain(&disk(&node.0))).unwrap();
    assert!(rewritten.contains(&disk(Path::new("/dev/mapper/volcrypt-paper"))), "{rewritten}");
    assert_eq!(crate::domain::unrewrite(&rewritten).unwrap(), domain(&disk(&node.0)));
    assert!(world.opened().is_empty() && broker.vault().unwrap().store.volumes().unwrap().is_empty());
}

#[test]
fn what_no_rule_protects_stays() {
    let world = World::new();
    let node = Node::new("/dev", world.add_volume("other", 61));
    let lax = world.broker_with("");
    for path in [&node.0, Path::new("/dev/null"), Path::new("/srv/nowhere.img"), Path::new("/etc/passwd")] {
        assert_eq!(rewrite(&lax, &domain(&disk(path))).unwrap(), domain(&disk(path)));
    }
    let unit = "<disk type='network'><source protocol='iscsi' name='iqn.2026-11.org.lab:volume-x/2'/></disk>";
    assert_eq!(rewrite(&world.broker(true), unit).unwrap(), unit);
    assert!(refused(&world.broker(true), &unit.replace("/2'", "/1'")).contains("QEMU's own iSCSI client"));
    // An enrolled volume whose rule is lost.
    world.broker(false).enrol(DeviceNumber { major: 250, minor: 61 }, None).unwrap();
    let state = world.path().join("state");
    let forgetful = world.broker_with(&format!("[key_manager]\ndirectory = {state:?}\n"));
    assert!(refused(&forgetful, &domain(&disk(&node.0))).contains("holds the volume other, and no rule protects it"));
}

#[test]
fn a_device_that_is_not_there_could_be_protected() {
    let broker = World::new().broker(true);
    let sentence = refused(&broker, &domain(&disk(Path::new("/dev/disk/by-path/none"))));
    assert_eq!(sentence, "disk sda: /dev/disk/by-path/none does not exist: log in to its target first");
    // A mapping that nobody has open is not there either.
    let mapped = domain(&disk(Path::new("/dev/mapper/volcrypt-volume-that-is-not-open")));
    assert_eq!(rewrite(&broker, &mapped).unwrap(), mapped);
}

#[test]
fn a_lone_disk_may_be_any_domains() {
    let world = World::new();
    let node = Node::new("/dev", world.add_volume("theirs", 62));
    let for_some = world.broker_with(
        "[[rules]]\nname = 'some'\ndomain = 'vm'\niscsi_target = 'iqn\\.2026-11\\.org\\.lab:volume-(?<id>.*)'\n",
    );
    let mapped = disk(Path::new("/dev/mapper/volcrypt-theirs"));
    assert_eq!(rewrite(&for_some, &disk(&node.0)).unwrap(), mapped);
    assert!(rewrite(&for_some, &domain(&disk(&node.0))).unwrap().contains(&mapped));
    let other = domain(&disk(&node.0)).replace("<name>vm", "<name>other");
    assert_eq!(rewrite(&for_some, &other).unwrap(), other);
}

#[test]
fn a_faulty_configuration_refuses_every_device() {
    let world = World::new();
    let node = Node::new("/dev", world.add_volume("faulty", 63));
    let sentence = refused(&world.broker_with("nonsense"), &disk(&node.0));
    assert!(sentence.starts_with("disk sda: volcrypt.toml:1:"), "{sentence}");
}

#[test]
fn a_disk_gets_its_own_volume_back_or_nothing_is_put_back() {
    let world = World::new();
    let (own, other) = (world.add_volume("own", 64), world.add_volume("other", 65));
    let (own, other) = (Node::new("/dev", own), Node::new("/dev", other));
    let broker = world.broker(true);
    let before = domain(&disk(&own.0));
    let rewritten = rewrite(&broker, &before).unwrap();
    assert_eq!(unrewrite(&broker, &rewritten).unwrap(), before);
    assert_eq!(unrewrite(&broker, &before).unwrap(), before);

    // After a reboot, devices have other names.
    let refused = |path: &str| {
        let moved = rewritten.replace(&own.0.display().to_string(), path);
        assert!(moved.contains(&format!("dev=\"{path}\"")), "{moved}");
        unrewrite(&broker, &moved).expect_err(path).to_string()
    };
    let path = other.0.display().to_string();
    assert_eq!(
        refused(&path),
        format!(
            "disk sda: it is on volume own, and {path}, which it was before, is volume other now: have the disk name the \
             device of volume own ('virsh edit vm'), and run the command again for the others"
        )
    );
    for path in ["/dev/null", "/srv/nowhere"] {
        let sentence = refused(path);
        assert!(
            sentence.contains(&format!("and {path}, which it was before, is no protected volume now")),
            "{sentence}"
        );
    }
    assert_eq!(refused("/dev/none"), "disk sda: /dev/none does not exist: log in to its target first");
    world.change(DeviceNumber { major: 250, minor: 64 }, |identity| identity.lun = Some(2));
    assert!(unrewrite(&broker, &rewritten).unwrap_err().to_string().contains("is no protected volume now"));
}

/// A disk that was detached, and attached again on its mapping, leaves what it was in the note.
#[test]
fn what_the_note_says_of_an_earlier_disk_is_held_against_the_volume_too() {
    let world = World::new();
    let (own, other) = (world.add_volume("stale", 66), world.add_volume("newer", 67));
    let (own, other) = (Node::new("/dev", own), Node::new("/dev", other));
    let broker = world.broker(true);
    let rewritten = rewrite(&broker, &domain(&disk(&own.0))).unwrap();
    let again = rewritten.replace("<target dev='sda'/>", "<target dev='sdq'/>");
    assert_eq!(unrewrite(&broker, &again).unwrap(), domain(&disk(&own.0).replace("sda", "sdq")));
    let moved = again.replace(&own.0.display().to_string(), &other.0.display().to_string());
    assert!(unrewrite(&broker, &moved).unwrap_err().to_string().starts_with("disk sdq: it is on volume stale, and "));
}
