use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

use proptest::prelude::*;

use super::super::incoming::admit;
use super::super::prepare::prepare;
use super::*;

const WRAPPER: &str = "/usr/libexec/volcrypt/emulators/qemu-system-x86_64";

fn domain(emulator: &str, disk: &str) -> String {
    format!("<domain type='kvm'><name>vm</name><devices><emulator>{emulator}</emulator>{disk}</devices></domain>")
}

fn block_disk(device: &str, path: &Path) -> String {
    format!(
        "<disk type='block' device='{device}'><source dev='{}'/><target dev='sda' bus='scsi'/></disk>",
        path.display()
    )
}

fn refused(broker: &Broker, xml: &str) -> String {
    prepare(broker, "vm", xml).expect_err("this has to be refused").to_string()
}

#[test]
fn a_domain_whose_disks_are_ready_may_start() {
    let world = World::new();
    let device = world.add_volume("ready", 21);
    let node = Node::new("/dev", device);
    let broker = world.broker(false);
    broker.enrol(device, None).unwrap();
    prepare(&broker, "vm", &domain(WRAPPER, &block_disk("disk", &node.0))).unwrap();
    assert!(world.opened().is_empty(), "a mapping is made by QEMU's open only");
}

#[test]
fn a_protected_disk_without_a_key_is_named() {
    let world = World::new();
    let node = Node::new("/dev", world.add_volume("keyless", 22));
    let sentence = refused(&world.broker(false), &domain(WRAPPER, &block_disk("disk", &node.0)));
    assert!(sentence.starts_with("disk sda: volume keyless on /dev/sd22 has no key"), "{sentence}");
}

#[test]
fn an_emulator_that_is_not_the_wrapper_would_write_in_clear() {
    let world = World::new();
    let node = Node::new("/dev", world.add_volume("unwrapped", 23));
    let other = block_disk("disk", Path::new("/dev/null"));
    let lax = || world.broker_saying(true, "[hook]\nother_emulators = \"start\"\n");
    for emulator in ["/usr/bin/qemu-system-x86_64", "/usr/libexec/volcrypt/emulators/../qemu", ""] {
        let sentence = refused(&world.broker(true), &domain(emulator, &other));
        assert!(sentence.contains("attached to it") && sentence.contains("volcrypt domain adopt vm"), "{sentence}");
        prepare(&lax(), "vm", &domain(emulator, &other)).unwrap();
        let sentence = refused(&lax(), &domain(emulator, &block_disk("disk", &node.0)));
        assert!(sentence.contains("the protected volume unwrapped"), "{sentence}");
    }
    // Where nothing is protected, nothing is asked.
    prepare(&world.broker_with(""), "vm", &domain("/usr/bin/qemu-system-x86_64", &other)).unwrap();
}

#[test]
fn with_a_faulty_configuration_only_what_runs_the_wrapper_starts() {
    let world = World::new();
    let node = Node::new("/dev", world.add_volume("unknown", 25));
    let image = block_disk("disk", Path::new("/dev/null"));
    let faulty = || world.broker_with("nonsense");
    for emulator in ["/usr/bin/qemu-system-x86_64", ""] {
        for disk in ["", &image] {
            let sentence = refused(&faulty(), &domain(emulator, disk));
            for part in ["domain vm does not run volcrypt's wrapper", "volcrypt.toml:1:", "systemctl reload volcryptd"]
            {
                assert!(sentence.contains(part), "{sentence}");
            }
        }
    }
    prepare(&faulty(), "vm", &domain(WRAPPER, &image)).unwrap();
    let sentence = refused(&faulty(), &domain(WRAPPER, &block_disk("disk", &node.0)));
    assert!(sentence.starts_with("disk sda: volcrypt.toml:1:"), "{sentence}");
}

#[test]
fn ways_around_the_mapping_are_refused() {
    let world = World::new();
    let node = Node::new("/dev", world.add_volume("around", 24));
    let broker = world.broker(true);
    let sentence = refused(&broker, &domain(WRAPPER, &block_disk("lun", &node.0)));
    assert!(sentence.contains("device='lun'"), "{sentence}");

    let unit = "<disk type='network' device='disk'><source protocol='iscsi' name='iqn.2026-11.org.lab:volume-x/1'>\
                <host name='storage'/></source><target dev='sdb'/></disk>";
    let sentence = refused(&broker, &domain(WRAPPER, unit));
    assert!(sentence.contains("QEMU's own iSCSI client"), "{sentence}");
    prepare(&broker, "vm", &domain(WRAPPER, &unit.replace("/1'", "/2'"))).unwrap();

    let state = world.path().join("state");
    let by_wwid = format!("[key_manager]\ndirectory = {state:?}\n[[rules]]\nname = 'w'\nwwid = '(?<id>.*)'\n");
    let sentence = refused(&world.broker_with(&by_wwid), &domain(WRAPPER, unit));
    assert!(sentence.contains("may be a protected volume"), "{sentence}");

    let host_device = "<hostdev mode='subsystem' type='scsi'>\
                       <source protocol='iscsi' name='iqn.2026-11.org.lab:volume-x/1'/></hostdev>";
    let sentence = refused(&broker, &domain(WRAPPER, host_device));
    assert!(sentence.contains("QEMU's own iSCSI client"), "{sentence}");
}

#[test]
fn what_is_no_domain_is_refused_in_one_sentence() {
    let world = World::new();
    let broker = world.broker(true);
    for xml in ["", "<domain>", "<domain/><domain/>", "<!DOCTYPE domain []><domain/>", "<x/>", "<a:domain/>", "\0"] {
        let sentence = refused(&broker, xml);
        assert!(sentence.starts_with("the domain's XML cannot be read: ") && !sentence.contains('\n'), "{sentence}");
    }
}

/// What the author of a domain can put into a name.
fn hostile() -> impl Strategy<Value = String> {
    let pieces = vec![
        "&#10;",
        "&#x9b;",
        "&#27;[2J",
        "&amp;",
        "&lt;",
        "&quot;",
        "&#0;",
        "&x;",
        "..",
        "/",
        "-",
        "é",
        "\n",
        "\t",
        "sda",
        "volcrypt-",
        "%s",
        "'",
        "<",
    ];
    let pieces = prop::collection::vec(prop::sample::select(pieces), 0..12).prop_map(|pieces| pieces.concat());
    prop_oneof![4 => pieces, 1 => "\\PC{0,40}", 1 => Just("x".repeat(4096)), 1 => any::<String>()]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn hostile_names_in_a_domain_neither_pass_nor_reach_the_terminal(
        name in hostile(), owner in hostile(), target in hostile(), path in hostile(), emulator in hostile(),
    ) {
        let world = World::new();
        let node = Node::new("/dev", world.add_volume("hostile", 52));
        let protected = node.0.display();
        let broker = world.broker_saying(false, "[hook]\nother_emulators = \"start\"\n");
        let xml = format!(
            "<domain type='kvm'><name>{name}</name><metadata><owner xmlns='https://volcrypt.org/xmlns/libvirt/owner/1'>{owner}\
             </owner></metadata><devices><emulator>{emulator}</emulator>\
             <disk type='block'><source dev='/{path}'/><target dev='{target}'/></disk>\
             <disk type='block'><source dev='{protected}'/><target dev='{target}'/></disk></devices></domain>"
        );
        // The volume is not enrolled, so the domain may not start, whatever else is in its XML.
        let sentence = refused(&broker, &xml);
        prop_assert!(!sentence.contains(char::is_control), "{sentence:?}");
    }

    #[test]
    fn hostile_paths_of_an_operator_are_refused_in_one_line(path in prop::collection::vec(any::<u8>(), 0..300)) {
        let path = [b"/nowhere/".as_slice(), &path].concat();
        let sentence = match std::fs::metadata(OsStr::from_bytes(&path)) {
            Ok(_) => return Ok(()),
            Err(error) => super::super::broker::no_such_device(Path::new(OsStr::from_bytes(&path)), &error).to_string(),
        };
        prop_assert!(!sentence.contains(char::is_control), "{sentence:?}");
    }
}

#[test]
fn what_an_image_in_a_protected_volume_stands_on_has_to_be_said() {
    let world = World::new();
    let (top, base) = (world.add_volume("top", 27), world.add_volume("base", 28));
    let (top, base) = (Node::new("/dev", top), Node::new("/dev", base));
    let broker = world.broker(true);
    let disk = |format: &str, backing: &str| {
        let disk = format!(
            "<disk type='block' device='disk'><driver name='qemu' type='{format}'/><source dev='{}'/>{backing}\
             <target dev='sda' bus='scsi'/></disk>",
            top.0.display()
        );
        prepare(&broker, "vm", &domain(WRAPPER, &disk)).map_err(|refusal| refusal.to_string())
    };
    let beneath = |format: &str, backing: &str| {
        let base = base.0.display();
        format!("<backingStore type='block'><format type='{format}'/><source dev='{base}'/>{backing}</backingStore>")
    };
    for (format, backing) in [
        ("raw", String::new()),
        ("qcow2", "<backingStore/>".to_owned()),
        ("qcow2", beneath("raw", "")),
        ("qcow2", beneath("qcow2", "<backingStore/>")),
    ] {
        assert_eq!(disk(format, &backing), Ok(()), "{format} {backing}");
    }
    for (backing, volume) in [(String::new(), "top"), (beneath("qcow2", ""), "base")] {
        let sentence = disk("qcow2", &backing).unwrap_err();
        let start =
            format!("disk sda: libvirt cannot see on which image the one in the protected volume {volume} stands");
        assert!(sentence.starts_with(&start), "{sentence}");
    }
    world.change(DeviceNumber { major: 250, minor: 28 }, |identity| identity.wwid = Some("naa.other".to_owned()));
    let sentence = disk("qcow2", &beneath("raw", "")).unwrap_err();
    assert!(sentence.contains("is not the device that volume base was enrolled on"), "{sentence}");
}

/// The unit's settings hide some folders from the daemon, and what is there may be a link to a volume.
#[test]
fn a_device_that_the_daemon_cannot_see_is_refused_and_an_image_file_there_is_not() {
    let broker = World::new().broker(true);
    let links = tempfile::tempdir_in("/dev/shm").unwrap();
    let link = links.path().join("lun");
    std::os::unix::fs::symlink("/var/tmp/volcrypt-none/lun", &link).unwrap();
    let overlay = |kind: &str, source: &str| {
        format!(
            "<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='/srv/o.qcow2'/><backingStore \
             type='{kind}'><format type='raw'/><source {source}/><backingStore/></backingStore><target dev='sda'/></disk>"
        )
    };
    for path in ["/var/tmp/lun", "/tmp/volcrypt-none", "/home/x/lun", "/root/x/lun", "/run/user/7/lun"] {
        for disk in [block_disk("disk", Path::new(path)), overlay("block", &format!("dev='{path}'"))] {
            let xml = domain(WRAPPER, &disk);
            let expected = format!(
                "disk sda: {path} is or leads to where volcryptd sees nothing of the host (/home, /root, /run/user, /tmp, \
                 /var/tmp), and may be a protected volume: name the device in /dev"
            );
            assert_eq!(refused(&broker, &xml), expected);
            assert_eq!(admit(&broker, "vm", &xml).unwrap_err().to_string(), expected);
            prepare(&World::new().broker_with(""), "vm", &xml).unwrap();
        }
        let file =
            block_disk("disk", Path::new(path)).replace("type='block'", "type='file'").replace("dev='/", "file='/");
        for disk in [file, overlay("file", &format!("file='{path}'"))] {
            prepare(&broker, "vm", &domain(WRAPPER, &disk)).unwrap();
            assert_eq!(admit(&broker, "vm", &domain(WRAPPER, &disk)).unwrap(), None);
        }
    }
    let sentence = refused(&broker, &domain(WRAPPER, &block_disk("disk", &link)));
    assert!(sentence.contains("lun is or leads to where volcryptd sees nothing"), "{sentence}");
    prepare(&broker, "vm", &domain(WRAPPER, &block_disk("disk", Path::new("/srv/none")))).unwrap();
}
