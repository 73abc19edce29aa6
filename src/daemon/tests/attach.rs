//! Devices that `volcrypt` attaches and detaches.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use super::super::control::Control;
use super::super::guests::Guests;
use super::by_xml::{XML, domain};
use super::*;
use crate::protocol::{GuardStatus, HookOperation, Reply, Request, Response};

const OPEN: &str = "";
const MAPPED: &str = "/dev/mapper/volcrypt-";

fn disk(path: &str) -> String {
    format!("<disk type='block' device='disk'><source dev='{path}'/><target dev='sdb'/></disk>")
}

struct Daemon {
    broker: Arc<Broker>,
    control: Arc<Control>,
}

impl Daemon {
    fn new(world: &World, more: &str) -> Self {
        Daemon::with(world.broker_saying(false, more))
    }

    fn with(broker: Broker) -> Self {
        let broker = Arc::new(broker);
        let guests = Arc::new(Guests::new(Arc::new(World::new())).unwrap());
        let control = Control::new(Arc::clone(&broker), guests, Box::new(GuardStatus::default));
        Daemon { broker, control }
    }

    /// The answer, and the connection that it came by.
    fn ask(&self, request: &Request) -> (Result<Reply, String>, UnixStream) {
        let (mut client, server) = UnixStream::pair().unwrap();
        client.write_all(&serde_json::to_vec(request).unwrap()).unwrap();
        client.write_all(b"\n").unwrap();
        self.control.converse(&server).expect("run the tests as root");
        let mut line = String::new();
        BufReader::new(&client).read_line(&mut line).unwrap();
        let answer = match serde_json::from_str(&line).unwrap() {
            Response::Done(reply) => Ok(reply),
            Response::Refused { sentence, .. } => Err(sentence),
            Response::Working { .. } => panic!("nothing takes long here"),
        };
        (answer, client)
    }

    fn attach(&self, device: &str) -> (Result<(String, Option<String>), String>, UnixStream) {
        self.attach_to(&domain(&[]), device, true, false)
    }

    fn attach_to(
        &self,
        domain: &str,
        device: &str,
        live: bool,
        keep: bool,
    ) -> (Result<(String, Option<String>), String>, UnixStream) {
        let request = Request::Attach { domain: domain.to_owned(), device: device.to_owned(), live, keep };
        let (answer, connection) = self.ask(&request);
        (answer.map(device_of), connection)
    }

    fn refused(&self, device: &str) -> String {
        let sentence = self.attach(device).0.expect_err(device);
        assert_eq!(self.held(), 0, "something is held for what is refused");
        sentence
    }

    fn held(&self) -> usize {
        self.broker.holds().by_volume().len()
    }
}

fn device_of(reply: Reply) -> (String, Option<String>) {
    match reply {
        Reply::Device { xml, volume } => (xml, volume.map(String::from)),
        other => panic!("{other:?}"),
    }
}

/// Hangs up, as a client that is killed does, and waits for the daemon to do so.
fn hang_up(connection: &UnixStream) {
    connection.shutdown(Shutdown::Write).unwrap();
    assert_eq!((&*connection).read(&mut [0]).unwrap(), 0);
}

#[test]
fn a_mapping_is_held_as_long_as_the_caller_is_connected() {
    let world = World::new();
    let number = world.add_volume("plug", 100);
    let node = Node::new("/dev", number);
    let daemon = Daemon::new(&world, XML);
    daemon.broker.enrol(number, None).unwrap();
    let raw = disk(&node.0.display().to_string());
    let expected = (disk(&format!("{MAPPED}plug")), Some("plug".to_owned()));
    for device in [&raw, &disk(&format!("{MAPPED}plug"))] {
        let (answer, connection) = daemon.attach(device);
        assert_eq!(answer.unwrap(), expected);
        assert_eq!(daemon.broker.holds().by_volume()[&"plug".parse().unwrap()], ["vm"]);
        hang_up(&connection);
        assert_eq!(daemon.held(), 0);
    }
    assert_eq!(world.opened(), ["250:100", "250:100"]);

    // For its next start it is only looked at.
    let (answer, connection) = daemon.attach_to(&domain(&[]), &raw, false, false);
    assert_eq!((answer.unwrap(), daemon.held()), (expected, 0));
    drop(connection);
    assert_eq!(world.opened().len(), 2);
}

#[test]
fn who_does_not_wait_for_the_answer_has_nothing_held() {
    let world = World::new();
    let daemon = Daemon::new(&world, XML);
    daemon.broker.enrol(world.add_volume("late", 108), None).unwrap();
    let device = disk(&format!("{MAPPED}late"));
    let prepare = Request::Hook { operation: HookOperation::Prepare, domain: "vm".to_owned(), xml: domain(&[&device]) };
    let hold = Request::Attach { domain: domain(&[]), device, live: true, keep: true };
    for (request, opened) in [(prepare, 1), (hold, 2)] {
        let (mut client, server) = UnixStream::pair().unwrap();
        client.write_all(&serde_json::to_vec(&request).unwrap()).unwrap();
        client.write_all(b"\n").unwrap();
        drop(client);
        daemon.control.converse(&server).unwrap_err();
        assert_eq!((world.opened().len(), daemon.held()), (opened, 0));
    }
}

#[test]
fn two_callers_with_the_same_volume_hold_each_their_own() {
    let world = World::new();
    let daemon = Daemon::new(&world, XML);
    daemon.broker.enrol(world.add_volume("both", 101), None).unwrap();
    let device = disk(&format!("{MAPPED}both"));
    let (one, first) = daemon.attach(&device);
    let (other, second) = daemon.attach(&device);
    assert!(one.is_ok() && other.is_ok());
    hang_up(&first);
    assert_eq!(daemon.held(), 1);
    hang_up(&second);
    assert_eq!(daemon.held(), 0);
}

#[test]
fn what_is_kept_is_held_until_it_is_released() {
    let world = World::new();
    let number = world.add_volume("kept", 102);
    let node = Node::new("/dev", number);
    let daemon = Daemon::new(&world, XML);
    daemon.broker.enrol(number, None).unwrap();
    let raw = disk(&node.0.display().to_string());
    let mapped = disk(&format!("{MAPPED}kept"));
    for released_by in [&raw, &mapped] {
        let (answer, connection) = daemon.attach_to(&domain(&[]), &raw, true, true);
        assert_eq!(answer.unwrap().0, mapped);
        drop(connection);
        let release = |device: &str| Request::Release { domain: domain(&[]), device: device.to_owned() };
        daemon.ask(&release(&disk("/dev/null"))).0.unwrap();
        assert_eq!(daemon.held(), 1);
        daemon.ask(&release(released_by)).0.unwrap();
        assert_eq!(daemon.held(), 0);
    }
}

#[test]
fn what_the_domain_may_not_have_is_refused_with_nothing_held() {
    let world = World::new();
    let (theirs, keyless) = (world.add_volume("theirs", 103), world.add_volume("keyless", 104));
    let nodes = [Node::new("/dev", theirs), Node::new("/dev", keyless)];
    let daemon = Daemon::new(&world, XML);
    daemon.broker.enrol(theirs, Some("p1")).unwrap();
    let device = |at: usize| disk(&nodes[at].0.display().to_string());
    let sentence = daemon.refused(&device(0));
    assert!(sentence.starts_with("disk sdb: volume theirs belongs to \"p1\" and domain vm to nobody"), "{sentence}");
    let sentence = daemon.refused(&device(1));
    assert!(sentence.starts_with("disk sdb: volume keyless on /dev/sd104 has no key"), "{sentence}");
    let sentence = daemon.refused(&device(0).replace("device='disk'", "device='lun'"));
    assert!(sentence.starts_with("disk sdb: volume theirs is protected, and device='lun'"), "{sentence}");
    let unit = "<hostdev mode='subsystem' type='scsi'><source protocol='iscsi' \
                name='iqn.2026-11.org.lab:volume-x/1'/></hostdev>";
    assert!(daemon.refused(unit).contains("QEMU's own iSCSI client"));
    let sentence = daemon.refused(&disk("/var/tmp/volcrypt-none"));
    assert!(sentence.starts_with("disk sdb: /var/tmp/volcrypt-none is or leads to where volcryptd sees"), "{sentence}");
    for alike in ["<x:disk xmlns:x='y'/>", "<disk xmlns='y'/>"] {
        assert!(daemon.refused(alike).starts_with("the device is a <disk> of the namespace y"));
    }
    assert!(daemon.refused("<disk>").starts_with("the domain's XML cannot be read"));

    let owner = "<metadata><owner xmlns='https://volcrypt.org/xmlns/libvirt/owner/1'>p1</owner></metadata><devices>";
    let owned = domain(&[]).replacen("<devices>", owner, 1);
    let (answer, connection) = daemon.attach_to(&owned, &device(0), true, false);
    answer.unwrap();
    hang_up(&connection);
    // It has the volume already.
    let present = owned.replacen("<devices>", &format!("<devices>{}", disk(&format!("{MAPPED}theirs"))), 1);
    let sentence = daemon.attach_to(&present, &device(0), true, false).0.unwrap_err();
    assert!(sentence.contains("domain vm has volume theirs already, as disk sdb"), "{sentence}");
    daemon.attach_to(&present, &device(0), false, false).0.unwrap();
    assert_eq!(daemon.held(), 0);
    // So may another domain have, as long as it does not share it.
    let other = owned.replace("<name>vm", "<name>other");
    let (answer, kept) = daemon.attach_to(&other, &device(0), true, false);
    answer.unwrap();
    let sentence = daemon.attach_to(&owned, &device(0), true, false).0.unwrap_err();
    assert!(
        sentence.starts_with("disk sdb: domain other has volume theirs, and the two would overwrite"),
        "{sentence}"
    );
    let shared = device(0).replace("</disk>", "<shareable/></disk>");
    let sentence = daemon.attach_to(&owned, &shared, true, false).0.unwrap_err();
    assert!(
        sentence.starts_with("disk sdb: domain other has volume theirs, and the two would overwrite"),
        "{sentence}"
    );
    hang_up(&kept);
    let (answer, kept) = daemon.attach_to(&other, &shared, true, false);
    answer.unwrap();
    daemon.attach_to(&owned, &device(0), true, false).0.unwrap_err();
    daemon.attach_to(&owned, &shared, true, false).0.unwrap();
    hang_up(&kept);
}

#[test]
fn what_a_guest_wrote_into_its_volume_names_no_image_for_the_one_it_is_attached_to() {
    let world = World::new();
    let daemon = Daemon::new(&world, XML);
    daemon.broker.enrol(world.add_volume("written", 110), None).unwrap();
    let with = |chain: &str| {
        disk(&format!("{MAPPED}written"))
            .replace("</disk>", &format!("<driver name='qemu' type='qcow2'/>{chain}</disk>"))
    };
    for live in [true, false] {
        let sentence = daemon.attach_to(&domain(&[]), &with(""), live, false).0.unwrap_err();
        assert!(sentence.starts_with("disk sdb: libvirt would look into the protected volume written"), "{sentence}");
        daemon.attach_to(&domain(&[]), &with("<backingStore/>"), live, false).0.unwrap();
    }
}

#[test]
fn of_two_domains_that_get_a_volume_at_once_not_both_do() {
    let world = World { delay: Duration::from_millis(300), ..World::new() };
    let daemon = Daemon::new(&world, XML);
    daemon.broker.enrol(world.add_volume("race", 109), None).unwrap();
    let device = disk(&format!("{MAPPED}race"));
    let attach = |name: &str| {
        let domain = domain(&[]).replace("<name>vm", &format!("<name>{name}"));
        daemon.attach_to(&domain, &device, true, true).0
    };
    let outcomes = std::thread::scope(|scope| {
        let others = scope.spawn(|| attach("other"));
        [attach("vm"), others.join().unwrap()]
    });
    let attached = outcomes.iter().filter(|outcome| outcome.is_ok()).count();
    let holders = daemon.broker.holds().by_volume().into_values().next().unwrap_or_default();
    assert!(attached < 2 && holders.len() == attached, "{outcomes:?} {holders:?}");
}

#[test]
fn without_the_guard_nothing_is_attached() {
    let world = World { guard_fault: Some("no cgroup"), ..World::new() };
    let daemon = Daemon::new(&world, XML);
    daemon.broker.enrol(world.add_volume("open", 105), None).unwrap();
    let sentence = daemon.refused(&disk(&format!("{MAPPED}open")));
    assert!(sentence.contains("and it is off: no cgroup"), "{sentence}");
    assert!(world.opened().is_empty());
}

#[test]
fn what_is_no_protected_disk_stays_as_it_is() {
    let world = World::new();
    for more in [XML, OPEN] {
        let daemon = Daemon::new(&world, more);
        for device in ["<interface type='network'/>", "<domain/>", "<?xml version='1.0'?>\n<rng/>", &disk("/dev/null")]
        {
            assert_eq!(daemon.attach(device).0.unwrap(), (device.to_owned(), None));
        }
    }
}

#[test]
fn with_the_wrapper_a_disk_stays_as_it_is_and_without_it_is_refused() {
    let world = World::new();
    let number = world.add_volume("wrapped", 106);
    let node = Node::new("/dev", number);
    let daemon = Daemon::new(&world, OPEN);
    daemon.broker.enrol(number, None).unwrap();
    let device = disk(&node.0.display().to_string());
    let sentence = daemon.refused(&device);
    assert!(sentence.starts_with("disk sdb: domain vm runs the emulator \"\" and would write"), "{sentence}");
    let emulator = "<devices><emulator>/usr/libexec/volcrypt/emulators/qemu-system-x86_64</emulator>";
    let wrapped = domain(&[]).replacen("<devices>", emulator, 1);
    let (answer, _connection) = daemon.attach_to(&wrapped, &device, true, false);
    assert_eq!(answer.unwrap(), (device, None));
    assert!(world.opened().is_empty() && daemon.held() == 0);
}

#[test]
fn a_disk_is_detached_by_what_it_was_attached_with() {
    let world = World::new();
    let number = world.add_volume("out", 107);
    let node = Node::new("/dev", number);
    let daemon = Daemon::new(&world, XML);
    let (raw, mapped) = (disk(&node.0.display().to_string()), disk(&format!("{MAPPED}out")));
    let detach = |device: &str| {
        let request = Request::Detach { domain: domain(&[&mapped]), device: device.to_owned() };
        device_of(daemon.ask(&request).0.unwrap())
    };
    let expected = (mapped.clone(), Some("out".to_owned()));
    assert_eq!(detach(&raw), expected);
    assert_eq!(detach(&mapped), expected);
    // Its device is gone, and libvirt has the disk all the same.
    let gone = disk("/dev/disk/by-path/gone");
    assert_eq!(detach(&gone), (gone.clone(), Some("out".to_owned())));
    let other = disk("/dev/null").replace("sdb", "sdc");
    assert_eq!(detach(&other), (other.clone(), None));
}
