use std::io::{IoSlice, Read, Seek};
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::Instant;

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

use super::super::control::Control;
use super::super::guests::Guests;
use super::super::prepare::prepare;
use super::super::uses::UseLimit;
use super::server::{as_guest, open_errno};
use super::*;
use crate::audit::{Entry, Event, Kind, Link, Record, Role};
use crate::protocol::{GuardStatus, Reply, Request, Response};
use crate::store::tests::SmallDisk;
use crate::store::{AuditQuery, Store};

const CONTINUE: &str = "[audit]\nwhen_unwritable = \"continue\"\n";
const EXPORT: &str = "[policy]\nexport_keys = true\n";
const DEADLINE: Duration = Duration::from_secs(60);

/// The log of a world, the oldest record first, as soon as it has so many.
fn log(world: &World, number: usize) -> Vec<Record> {
    let end = Instant::now() + Duration::from_secs(60);
    loop {
        let records = present(world);
        if records.len() >= number || Instant::now() > end {
            assert_eq!(records.len(), number, "{:#?}", texts(&records));
            return records;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// What is in the log of a world right now.
fn present(world: &World) -> Vec<Record> {
    let store = Store::open(&world.path().join("state")).unwrap();
    let entries = store.audit(&AuditQuery::default()).unwrap().entries.into_iter().rev();
    let record = |entry| match entry {
        Entry::Record { record, .. } => *record,
        Entry::Damaged { damaged, .. } => panic!("{damaged}"),
    };
    entries.map(record).collect()
}

fn texts(records: &[Record]) -> Vec<String> {
    records.iter().map(|record| record.event.to_string()).collect()
}

/// Lets the log take no record more.
pub(super) fn fill(broker: &Broker) {
    let vault = broker.vault().unwrap();
    vault.store.fill_disk(true);
    while vault.store.append_audit(Event::new(Kind::KeyUsed, &"filler".parse().unwrap(), "")).is_ok() {}
}

#[test]
fn a_guests_use_of_a_key_is_recorded_before_it_has_the_mapping() {
    let world = World::new();
    let device = world.add_volume("used", 41);
    let node = Node::new("/dev", device);
    let (path, state) = (node.0.clone(), world.path().join("state"));
    // The guest itself looks, as soon as it has the descriptor.
    let seen = as_guest(world.broker(true), DEADLINE, move || {
        let opened = File::open(path).unwrap();
        let seen = Store::open(&state).unwrap().verify_audit(Link::default()).unwrap();
        drop(opened);
        seen.end.seq
    });
    assert_eq!(seen, 2);
    let records = log(&world, 2);
    let pid = std::process::id();
    let of_guest = format!("volume used, domain \"vm\", pid {pid}, by guest: done");
    assert_eq!(texts(&records), [format!("enrolled, {of_guest}"), format!("key-used, {of_guest}")]);
    assert_eq!(records[1].event.detail, format!("opened as {}", node.0.display()));
}

#[test]
fn a_guest_that_opens_its_disk_in_a_loop_is_counted() {
    let world = World::new();
    let node = Node::new("/dev", world.add_volume("looped", 49));
    let path = node.0.clone();
    let broker = world.broker(true).limiting_uses(UseLimit::new(Duration::from_secs(5), 4));
    let errnos = as_guest(broker, DEADLINE, move || (0..30).map(|_| open_errno(&path)).collect::<Vec<_>>());
    assert!(errnos.iter().all(Option::is_none), "every one gets its mapping");
    // Nobody opens it any more, and still every open is told of.
    let number = |record: &Record| match record.event.detail.split_once(" times more") {
        Some((start, _)) => {
            let number: u32 = start.rsplit([' ', '(']).next().unwrap().parse().unwrap();
            number + u32::from(start.starts_with("opened as"))
        }
        None => 1,
    };
    let used = |records: &[Record]| records.iter().skip(1).map(number).sum::<u32>();
    let end = Instant::now() + Duration::from_secs(60);
    loop {
        let records = present(&world);
        assert!(records.len() < 15, "{:#?}", texts(&records));
        assert!(records.iter().skip(1).all(|record| record.event.kind == Kind::KeyUsed));
        if used(&records) == 30 {
            assert!(records.iter().skip(1).all(|record| record.event.asker.domain.as_deref() == Some("vm")));
            break;
        }
        assert!(Instant::now() < end, "{} opens are told of", used(&records));
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn what_was_counted_is_not_lost_and_the_next_use_refused_if_the_log_cannot_be_written() {
    unwritten("", 50, true);
}

#[test]
fn what_was_counted_is_not_lost_either_if_keys_may_be_used_without_a_record() {
    unwritten(CONTINUE, 52, false);
}

fn unwritten(configuration: &str, minor: u32, refused: bool) {
    let world = World::new();
    let device = world.add_volume("unwritten", minor);
    // Three of these uses have to come within that time, also where a disk is slow.
    let every = Duration::from_secs(3);
    let broker = world.broker_saying(true, configuration).limiting_uses(UseLimit::new(every, 2));
    broker.enrol(device, None).unwrap();
    let volume = "unwritten".parse().unwrap();
    let use_it = || broker.record_use(Kind::KeyUsed, &volume, "");
    (0..20).for_each(|_| use_it().unwrap());
    fill(&broker);
    let end = Instant::now() + Duration::from_secs(120);
    while refused && use_it().is_ok() {
        assert!(Instant::now() < end, "the log is full");
        std::thread::sleep(Duration::from_millis(10));
    }
    std::thread::sleep(every + Duration::from_millis(100));
    assert_eq!(use_it().is_err(), refused);
    broker.vault().unwrap().store.fill_disk(false);
    let is_counted =
        |record: &Record| record.event.detail.contains("times more") && record.event.volume.as_ref() == Some(&volume);
    while !present(&world).iter().any(is_counted) {
        assert!(Instant::now() < end, "what was counted is lost");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn records_come_into_the_file_by_themselves() {
    let world = World::new();
    let device = world.add_volume("merged", 48);
    let broker = world.broker(true);
    broker.enrol(device, None).unwrap();
    let log = world.path().join("state/volcrypt.db-wal");
    let length = || std::fs::metadata(&log).unwrap().len();
    for _ in 0..2 {
        broker.record_use(Kind::KeyUsed, &"merged".parse().unwrap(), "").unwrap();
        assert!(length() > 0);
        broker.merge_audit_soon();
        let end = Instant::now() + Duration::from_secs(60);
        while length() > 0 {
            assert!(Instant::now() < end, "the log is not merged");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

#[test]
fn records_come_into_the_file_once_nobody_reads_it_any_more() {
    let world = World::new();
    let device = world.add_volume("read", 49);
    let broker = world.broker(true);
    broker.enrol(device, None).unwrap();
    let reader = rusqlite::Connection::open(world.path().join("state/volcrypt.db")).unwrap();
    reader.execute_batch("BEGIN; SELECT * FROM audit").unwrap();
    broker.record_use(Kind::KeyUsed, &"read".parse().unwrap(), "").unwrap();
    broker.merge_audit_soon();
    std::thread::sleep(Duration::from_millis(1500));
    let length = || std::fs::metadata(world.path().join("state/volcrypt.db-wal")).unwrap().len();
    assert!(length() > 0, "the reader was not in the way");
    drop(reader);
    let end = Instant::now() + Duration::from_secs(60);
    while length() > 0 {
        assert!(Instant::now() < end, "nobody has tried it again");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn a_refused_guest_is_recorded_with_errno_and_sentence_and_only_once() {
    let world = World::new();
    let node = Node::new("/dev", world.add_volume("refused", 42));
    let path = node.0.clone();
    let errnos = as_guest(world.broker(false), DEADLINE, move || [open_errno(&path), open_errno(&path)]);
    assert_eq!(errnos, [Some(libc::ENOKEY); 2]);
    let records = log(&world, 1);
    let pid = std::process::id();
    assert_eq!(texts(&records), [format!("refused, volume refused, domain \"vm\", pid {pid}, by guest: ENOKEY")]);
    assert!(records[0].event.detail.starts_with("volume refused on /dev/sd42 has no key"));
}

#[test]
fn without_a_record_there_is_no_use_of_a_key() {
    let world = World::new();
    let device = world.add_volume("full", 43);
    let node = Node::new("/dev", device);
    let broker = world.broker(true);
    broker.enrol(device, None).unwrap();
    fill(&broker);
    let store = Arc::clone(&broker.vault().unwrap().store);
    let refusal = broker.record_use(Kind::KeyUsed, &"full".parse().unwrap(), "").unwrap_err();
    for part in ["the audit log cannot be written", "when_unwritable", "the disk is full: free some space there"] {
        assert!(refusal.to_string().contains(part), "{refusal}");
    }
    let path = node.0.clone();
    let errnos = as_guest(broker, DEADLINE, move || {
        let refused = open_errno(&path);
        store.fill_disk(false);
        (refused, open_errno(&path))
    });
    assert_eq!(errnos, (Some(libc::EROFS), None));

    let broker = world.broker(true);
    fill(&broker);
    let xml = format!(
        "<domain><name>vm</name><devices><emulator>/usr/libexec/volcrypt/emulators/qemu-system-x86_64</emulator>\
         <disk type='block' device='disk'><source dev='{}'/><target dev='sda'/></disk></devices></domain>",
        node.0.display()
    );
    let refusal = prepare(&broker, "vm", &xml).unwrap_err();
    assert!(refusal.to_string().starts_with("disk sda: the key of volume full is not used because"), "{refusal}");
    assert_eq!(refusal.volume(), Some(&"full".parse().unwrap()));
}

#[test]
fn the_configuration_can_let_keys_be_used_without_a_record() {
    let world = World::new();
    let device = world.add_volume("lax", 44);
    let node = Node::new("/dev", device);
    let broker = world.broker_saying(true, CONTINUE);
    broker.enrol(device, None).unwrap();
    let full = world.broker_saying(true, CONTINUE);
    full.vault().unwrap().store.fill_disk(true);
    while full.vault().unwrap().store.append_audit(Event::new(Kind::KeyUsed, &"filler".parse().unwrap(), "")).is_ok() {}
    let path = node.0.clone();
    assert_eq!(as_guest(full, DEADLINE, move || open_errno(&path)), None);
    assert_eq!(world.opened(), ["250:44"]);
}

#[test]
fn a_disk_that_was_full_before_the_daemon_started_is_like_one_that_fills_later() {
    let world = World::new();
    let device = world.add_volume("early", 196);
    let node = Node::new("/dev", device);
    let state = world.path().join("state");
    std::fs::create_dir(&state).unwrap();
    let disk = SmallDisk::new(&state);
    world.broker(true).enrol(device, None).unwrap();
    disk.wait_until_closed();
    disk.fill();

    let volume = "early".parse().unwrap();
    let broker = world.broker(true);
    let refusal = broker.record_use(Kind::KeyUsed, &volume, "").unwrap_err();
    for part in ["the audit log cannot be written", "when_unwritable", "the disk is full: free some space there"] {
        assert!(refusal.to_string().contains(part), "{refusal}");
    }
    drop(broker);
    disk.wait_until_closed();

    // Once there is space again, the same daemon records what it does.
    let broker = world.broker_saying(true, CONTINUE);
    broker.record_use(Kind::KeyUsed, &volume, "unrecorded").unwrap();
    disk.free();
    broker.record_use(Kind::KeyUsed, &volume, "recorded").unwrap();
    drop(broker);
    disk.wait_until_closed();
    let details: Vec<_> = log(&world, 2).into_iter().map(|record| record.event.detail).collect();
    assert_eq!(details[1], "recorded");
    disk.wait_until_closed();

    disk.fill();
    let path = node.0.clone();
    assert_eq!(as_guest(world.broker_saying(true, CONTINUE), DEADLINE, move || open_errno(&path)), None);
    assert_eq!(world.opened(), ["250:196"]);
}

#[test]
fn the_hook_is_recorded_with_the_domain() {
    let world = World::new();
    let node = Node::new("/dev", world.add_volume("started", 45));
    let xml = |emulator: &str| {
        format!(
            "<domain><name>vm</name><uuid>0b1f7c1e-1111-4222-8333-444455556666</uuid><devices>\
             <emulator>{emulator}</emulator>\
             <disk type='block' device='disk'><source dev='{}'/><target dev='sda'/></disk></devices></domain>",
            node.0.display()
        )
    };
    let broker = world.broker_saying(true, "[hook]\nother_emulators = \"start\"\n");
    prepare(&broker, "vm", &xml("/usr/libexec/volcrypt/emulators/qemu-system-x86_64")).unwrap();
    prepare(&broker, "vm", &xml("/usr/bin/qemu-system-x86_64")).unwrap_err();
    prepare(&broker, "v\nm", "<x/>").unwrap_err();
    let records = log(&world, 4);
    let domain = "volume started, domain \"vm\", by hook";
    assert_eq!(
        texts(&records),
        [
            format!("enrolled, {domain}: done"),
            format!("key-used, {domain}: done"),
            format!("refused, {domain}: EACCES"),
            "refused, domain \"v\\nm\", by hook: ENOTSUP".to_owned(),
        ]
    );
    let uuid = records[2].event.asker.domain_uuid.as_deref();
    assert_eq!(uuid, Some("0b1f7c1e-1111-4222-8333-444455556666"));
    assert_eq!(records[1].event.detail, "made ready for disk sda");
}

#[test]
fn a_use_of_a_volume_by_the_name_of_its_mapping_is_recorded() {
    let world = World::new();
    let (disk, mapping) = (world.add_volume("named", 49), world.add_volume("mapping", 50));
    let node = Node::new("/dev", mapping);
    let below = world.identify(disk).unwrap();
    world.change(mapping, |identity| {
        let (name, uuid) = ("volcrypt-named".to_owned(), "VOLCRYPT-PLAIN-named".to_owned());
        identity.mapping = Some(crate::volume::Mapping { name, uuid });
        (identity.iscsi, identity.lun, identity.wwid, identity.underlying) = (None, None, None, vec![below]);
    });
    let broker = world.broker_saying(false, "[hook]\nother_emulators = \"start\"\n");
    broker.enrol(disk, Some("p1")).unwrap();
    let xml = |owner: &str| {
        format!(
            "<domain><name>vm</name><metadata><o:owner xmlns:o='https://volcrypt.org/xmlns/libvirt/owner/1'>{owner}\
             </o:owner></metadata><devices><emulator>/usr/bin/qemu</emulator><disk type='block' device='disk'>\
             <source dev='{}'/><target dev='sda'/></disk></devices></domain>",
            node.0.display()
        )
    };
    prepare(&broker, "vm", &xml("p1")).unwrap();
    prepare(&broker, "vm", &xml("p2")).unwrap_err();
    let path = node.0.clone();
    assert_eq!(as_guest(broker, DEADLINE, move || open_errno(&path)), Some(libc::EACCES));
    let mut world = world;
    world.domain = Some(vm_of("p1"));
    let broker = world.broker(false);
    let path = node.0.clone();
    assert_eq!(as_guest(broker, DEADLINE, move || open_errno(&path)), None);
    let records = log(&world, 5);
    let guest = format!("volume named, domain \"vm\", pid {}, by guest", std::process::id());
    assert_eq!(
        texts(&records)[1..],
        [
            "key-used, volume named, domain \"vm\", by hook: done".to_owned(),
            "refused, volume named, domain \"vm\", by hook: EACCES".to_owned(),
            format!("refused, {guest}: EACCES"),
            format!("key-used, {guest}: done"),
        ]
    );
    assert_eq!(records[1].event.detail, format!("made ready for disk sda as {}", node.0.display()));
    assert_eq!(records[4].event.detail, "opened as /dev/mapper/volcrypt-named");
}

/// What the control socket says to `request`, which may come with a file.
fn ask(control: &Control, request: &Request, file: Option<&File>) -> Response {
    let (client, server) = UnixStream::pair().unwrap();
    let mut message = serde_json::to_vec(request).unwrap();
    message.push(b'\n');
    let descriptors: Vec<_> = file.iter().map(|file| file.as_fd()).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() {
        ancillary.push(SendAncillaryMessage::ScmRights(&descriptors));
    }
    let parts = [IoSlice::new(&message)];
    sendmsg(&client, &parts, &mut ancillary, SendFlags::empty()).unwrap();
    control.converse(&server).expect("run the tests as root");
    drop(server);
    let mut answer = String::new();
    (&client).read_to_string(&mut answer).unwrap();
    serde_json::from_str(&answer).unwrap()
}

#[test]
fn what_operators_do_is_recorded_and_they_can_read_it() {
    let world = World::new();
    let node = Node::new("/dev", world.add_volume("kept", 46));
    let control = Control::new(
        Arc::new(world.broker_saying(false, EXPORT)),
        Arc::new(Guests::new(Arc::new(World::new())).unwrap()),
        Box::new(GuardStatus::default),
    );
    let id = || "kept".parse().unwrap();
    let file = tempfile::tempfile().unwrap();
    assert!(matches!(
        ask(&control, &Request::Enrol { device: node.0.clone(), owner: None, secret: None }, None),
        Response::Done(_)
    ));
    assert!(matches!(ask(&control, &Request::ExportKey { id: id() }, Some(&file)), Response::Done(_)));
    assert!(matches!(ask(&control, &Request::ExportKey { id: id() }, None), Response::Refused { .. }));
    assert!(matches!(ask(&control, &Request::Destroy { id: id(), is_gone: false }, None), Response::Done(_)));
    assert!(matches!(ask(&control, &Request::Retire { id: id() }, None), Response::Refused { .. }));
    let of = format!("volume kept, pid {}, by operator", std::process::id());
    let expected = [
        format!("enrolled, {of}: done"),
        format!("key-exported, {of}: done"),
        format!("refused, {of}: ENOTSUP"),
        format!("destroyed, {of}: done"),
        format!("refused, {of}: EKEYREVOKED"),
    ];
    let records = log(&world, 5);
    assert_eq!(texts(&records), expected);
    assert!(records.iter().all(|record| record.event.asker.by == Role::Operator && record.event.asker.uid == Some(0)));

    let query = AuditQuery { before: Some(3), ..AuditQuery::default() };
    let Response::Done(Reply::Audit(page)) = ask(&control, &Request::Audit(query), None) else { panic!() };
    assert_eq!((page.entries.len(), page.before), (2, None));
    let request = Request::VerifyAudit { from: Link::default() };
    let Response::Done(Reply::AuditVerified(verified)) = ask(&control, &request, None) else { panic!() };
    assert_eq!((verified.end.seq, verified.broken, verified.complete), (5, None, true));
}

#[test]
fn no_record_holds_a_byte_of_a_key() {
    let world = World::new();
    let device = world.add_volume("secret", 47);
    let node = Node::new("/dev", device);
    let broker = world.broker(true);
    let path = node.0.clone();
    let key = {
        let record = broker.enrol(device, None).unwrap();
        broker.key(&record).unwrap().bytes().to_vec()
    };
    let control = Control::new(
        Arc::new(world.broker_saying(true, EXPORT)),
        Arc::new(Guests::new(Arc::new(World::new())).unwrap()),
        Box::new(GuardStatus::default),
    );
    let mut file = tempfile::tempfile().unwrap();
    let request = || Request::ExportKey { id: "secret".parse().unwrap() };
    ask(&control, &request(), Some(&file));
    file.rewind().unwrap();
    let mut exported = Vec::new();
    file.read_to_end(&mut exported).unwrap();
    assert!(exported == key && key.len() == 64);
    as_guest(broker, DEADLINE, move || open_errno(&path));
    // The file of this one cannot be written.
    let full = OpenOptions::new().write(true).open("/dev/full").unwrap();
    assert!(matches!(ask(&control, &request(), Some(&full)), Response::Refused { .. }));
    let log: Vec<u8> = log(&world, 5).iter().flat_map(|record| serde_json::to_vec(record).unwrap()).collect();
    let text = String::from_utf8_lossy(&log).to_lowercase();
    for part in key.windows(5) {
        let hex: String = part.iter().map(|byte| format!("{byte:02x}")).collect();
        assert!(!log.windows(part.len()).any(|bytes| bytes == part), "a part of the key is in the log");
        assert!(!text.contains(&hex), "a part of the key is in the log: {hex}");
    }
}
