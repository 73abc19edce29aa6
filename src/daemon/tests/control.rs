use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use super::super::control::Control;
use super::super::guests::Guests;
use super::super::identify::identify;
use super::super::keys::Listing;
use super::*;
use crate::audit::Kind;
use crate::keys::{Aim, KekHome, KekRotation, KeyHandle, ManagerKind, MigrationStep, Place, RotationStep, Route};
use crate::policy::Outcome;
use crate::protocol::{GuardStatus, Identification, Reply, Request, Response};
use crate::store::VolumeRecord;

/// What the control socket of a daemon with `broker` says to `request`.
fn answer(broker: Broker, request: &[u8]) -> Response {
    let control = Control::new(
        Arc::new(broker),
        Arc::new(Guests::new(Arc::new(World::new())).unwrap()),
        Box::new(GuardStatus::default),
    );
    let (mut client, server) = UnixStream::pair().unwrap();
    client.write_all(request).unwrap();
    client.write_all(b"\n").unwrap();
    control.converse(&server).expect("run the tests as root");
    drop(server);
    let mut answer = String::new();
    client.read_to_string(&mut answer).unwrap();
    serde_json::from_str(&answer).unwrap()
}

fn ask(broker: Broker, request: &Request) -> Result<Reply, (String, i32)> {
    match answer(broker, &serde_json::to_vec(request).unwrap()) {
        Response::Done(reply) => Ok(reply),
        Response::Refused { sentence, errno } => Err((sentence, errno)),
        Response::Working { .. } => panic!("nothing takes long here"),
    }
}

#[test]
fn a_request_of_another_version_gets_a_sentence() {
    for request in ["", "{}", "\"fly\"", "{\"status\":{\"more\":1}}", "{\"volume\":{\"id\":\"../x\"}}", "[1", "\0"] {
        let Response::Refused { sentence, .. } = answer(World::new().broker(false), request.as_bytes()) else {
            panic!("{request:?} was carried out");
        };
        assert!(sentence.contains("systemctl restart volcryptd"), "{sentence}");
    }
}

#[test]
fn the_status_says_what_is_wrong_with_the_configuration() {
    let Ok(Reply::Status(status)) = ask(World::new().broker_with("nonsense"), &Request::Status) else { panic!() };
    assert!(status.configuration_error.unwrap().starts_with("volcrypt.toml:1:"));
}

#[test]
fn a_volume_is_told_with_its_state_and_its_use() {
    let mut world = World::new();
    let device = world.add_volume("one", 0);
    world.broker(false).enrol(device, None).unwrap();
    for mapped in [false, true] {
        world.mapped = mapped;
        let request = Request::Volume { id: "one".parse().unwrap() };
        let Ok(Reply::Volumes(volumes)) = ask(world.broker(false), &request) else { panic!() };
        let volume = serde_json::to_value(&volumes[0]).unwrap();
        assert_eq!((&volume["state"], &volume["mapped"]), (&"enrolled".into(), &mapped.into()));
        assert_eq!(volume["domains"], serde_json::json!([]));
    }
}

#[test]
fn xml_is_rewritten_or_refused_with_a_sentence() {
    let world = World::new();
    let node = Node::new("/dev", world.add_volume("asked", 34));
    let xml = format!("<disk type='block'><source dev='{}'/></disk>\r\n", node.0.display());
    let Ok(Reply::Xml(answer)) = ask(world.broker(false), &Request::Rewrite { xml }) else { panic!() };
    assert_eq!(answer, "<disk type='block'><source dev='/dev/mapper/volcrypt-asked'/></disk>\r\n");
    let (sentence, errno) = ask(world.broker(false), &Request::Rewrite { xml: "<x/>".to_owned() }).unwrap_err();
    assert!(sentence.contains("the root element is <x>") && errno == libc::ENOTSUP, "{sentence}");
}

#[test]
fn a_device_and_a_file_are_identified_through_a_handle_alone() {
    let world = World::new();
    let device = world.add_volume("one", 33);
    let node = Node::new("/dev", device);
    let identify = |broker: &Broker, path: &Path| {
        let flags = rustix::fs::OFlags::PATH | rustix::fs::OFlags::CLOEXEC;
        identify(broker, rustix::fs::open(path, flags, Mode::empty()).unwrap())
    };
    let Ok(Identification::Device { device, policy, configuration_error: None }) =
        identify(&world.broker(false), &node.0)
    else {
        panic!("not identified");
    };
    assert_eq!(device.identity.name, "sd33");
    let protected = Outcome::Protected { volume: "one".parse().unwrap(), rule: "lab".to_owned() };
    assert_eq!(policy.unwrap().outcome, protected);

    let found = identify(&world.broker_with("nonsense"), &node.0).unwrap();
    assert!(
        matches!(&found, Identification::Device { policy: None, configuration_error: Some(error), .. } if error.starts_with("volcrypt.toml:1:")),
        "{found:?}"
    );
    let image = world.path().join("sd33");
    let inode = std::os::unix::fs::MetadataExt::ino(&std::fs::metadata(&image).unwrap());
    let found = identify(&world.broker(false), &image).unwrap();
    assert!(matches!(found, Identification::File { inode: found, size: SIZE, .. } if found == inode), "{found:?}");
    assert!(identify(&world.broker(false), world.path()).is_err());
    // Without a handle there is nothing to look at.
    assert!(ask(world.broker(false), &Request::Identify).is_err());
}

#[test]
fn the_key_encryption_key_is_replaced_step_by_step() {
    let world = World::new();
    let device = world.add_volume("one", 0);
    world.broker(false).enrol(device, None).unwrap();
    let rotate = |step| ask(world.broker(false), &Request::RotateKek(step));
    let begun = rotate(RotationStep::Begin).unwrap();
    let Reply::KekRotation(KekRotation::UnderWay { old, new, resumed: false, remaining: 1, after: None }) = begun
    else {
        panic!("{begun:?}")
    };
    // Each request is a daemon's that was started meanwhile.
    let again = rotate(RotationStep::Begin).unwrap();
    let resumed = KekRotation::UnderWay { old, new, resumed: true, remaining: 1, after: None };
    assert!(matches!(again, Reply::KekRotation(again) if again == resumed));
    for _ in 0..2 {
        let ended = rotate(RotationStep::GoOn { after: None }).unwrap();
        let finished = KekRotation::Finished { new, home: KekHome::File, keys: 1 };
        assert!(matches!(ended, Reply::KekRotation(ended) if ended == finished));
    }
    let broker = world.broker(false);
    let record = broker.volume(&"one".parse().unwrap()).unwrap();
    broker.key(&record).unwrap();
}

#[test]
fn a_key_manager_without_a_key_encryption_key_has_none_to_replace() {
    let world = World::new();
    let file = world.folder.path().join("fixed.key");
    std::fs::write(&file, [7; 64]).unwrap();
    std::fs::set_permissions(&file, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    let keys = crate::keys::KeyFileManager::open(&file, crate::keys::OneKeyForEveryVolume).unwrap();
    let broker = world.broker(false).with_keys(Box::new(keys));
    let (sentence, _) = ask(broker, &Request::RotateKek(RotationStep::Begin)).unwrap_err();
    assert!(sentence.contains("has no key-encryption key to replace"), "{sentence}");
}

#[test]
fn keys_are_moved_only_where_the_configuration_says_how_and_old_ones_go_only_after_the_switch() {
    let world = World::new();
    let step = |from, to, aim| Request::MigrateKeys(MigrationStep { route: Route { from, to }, aim, after: None });
    let refused = |more: &str, request| ask(world.broker_saying(false, more), &request).unwrap_err().0;
    let (embedded, kmip, barbican) = (ManagerKind::Embedded, ManagerKind::Kmip, ManagerKind::Barbican);
    assert_eq!(
        refused("", step(embedded, kmip, Aim::Copy)),
        "the configuration does not say how kmip is reached: add a section [kmip], and run 'systemctl reload volcryptd'"
    );
    assert_eq!(
        refused("", step(kmip, barbican, Aim::Copy)),
        "the keys that are in use are those of embedded, so none are moved from kmip to barbican: name embedded with \
         --from or --to"
    );
    assert_eq!(
        refused("", step(embedded, ManagerKind::KeyFile, Aim::Copy)),
        "keys are not moved to or from a key-file, which holds one key for all volumes: name another key manager"
    );
    let section = "[kmip]\nservers = [\"127.0.0.1:1\"]\nca = \"/x\"\ncertificate = \"/x\"\nkey = \"/x\"\n";
    assert_eq!(
        refused(section, step(embedded, kmip, Aim::DestroyOld)),
        "the keys in embedded are the ones in use, so none is destroyed: copy them (without --destroy-old), set type = \
         \"kmip\" in the section [key_manager] on every host that uses them, run 'systemctl restart volcryptd' there, and \
         repeat once the volumes open"
    );
    let broker = world.broker_saying(true, section);
    let device = world.add_volume("one", 3);
    broker.enrol(device, None).unwrap();
    assert_eq!(broker.keys_left_behind(), None, "they are in use");
    let Reply::KeyMigration(begun) = ask(broker, &step(embedded, kmip, Aim::Copy)).unwrap() else { panic!() };
    assert_eq!((begun.remaining, begun.after.as_ref()), (1, Some(&Place::Start)));
    // Nobody listens there.
    let go_on = Request::MigrateKeys(MigrationStep {
        route: Route { from: embedded, to: kmip },
        aim: Aim::Copy,
        after: Some(Place::Start),
    });
    let sentence = refused(section, go_on);
    assert!(sentence.ends_with("; what was done is noted: run the same command again to go on"), "{sentence}");
    // Whoever switches all the same is told.
    let state = world.folder.path().join("state");
    let switched = world.broker_with(&format!("[key_manager]\ntype = \"kmip\"\ndirectory = {state:?}\n{section}"));
    assert_eq!(
        switched.keys_left_behind().unwrap(),
        "the keys of 1 enrolled or retired volumes were not copied from the database to kmip, which is in use, and they may \
         not open: run 'volcrypt key migrate --from embedded --to kmip'"
    );
}

#[test]
fn keys_are_listed_some_at_a_time_with_their_age_and_last_use() {
    let world = World::new();
    let device = world.add_volume("used", 3);
    let broker = world.broker_saying(true, "[policy]\nkey_age_days = 30\n");
    let record = broker.enrol(device, None).unwrap();
    broker.record_use(Kind::KeyUsed, &record.id, "opened").unwrap();
    let vault = broker.vault().unwrap();
    // What was enrolled long ago, and a hundred thousand others that somebody else has.
    let store = &vault.store;
    let kek = store.keks().unwrap().current.unwrap();
    let state = world.folder.path().join("state").join("volcrypt.db");
    rusqlite::Connection::open(state)
        .unwrap()
        .execute_batch(&format!(
            "WITH RECURSIVE numbers (number) AS (SELECT 0 UNION ALL SELECT number + 1 FROM numbers LIMIT 100000)
             INSERT INTO keys (volume_id, version, key_size, wrapped, created_at, kek)
             SELECT format('other-%06d', number), 1, 512, x'00', unixepoch() - 86400 * (number % 60), '{kek}' FROM numbers"
        ))
        .unwrap();
    let control = Control::new(
        Arc::new(broker),
        Arc::new(Guests::new(Arc::new(World::new())).unwrap()),
        Box::new(GuardStatus::default),
    );
    let mut keys = Vec::new();
    let mut after = None;
    let mut pages = 0;
    loop {
        let (mut client, server) = UnixStream::pair().unwrap();
        client.write_all(&serde_json::to_vec(&Request::Keys { after: after.clone() }).unwrap()).unwrap();
        client.write_all(b"\n").unwrap();
        let reading = std::thread::spawn(move || {
            let mut answer = String::new();
            client.read_to_string(&mut answer).unwrap();
            answer
        });
        control.converse(&server).expect("run the tests as root");
        drop(server);
        let answer = reading.join().unwrap();
        assert!(answer.len() < 2 << 20, "{}", answer.len());
        let Response::Done(Reply::Keys(page)) = serde_json::from_str(&answer).unwrap() else { panic!("{answer}") };
        keys.extend(page.keys);
        pages += 1;
        match page.after {
            Some(last) => after = Some(last),
            None => break,
        }
    }
    assert_eq!((keys.len(), pages), (100_001, 51));
    assert!(keys.is_sorted_by(|one, other| one.info.volume < other.info.volume), "each once");
    assert_eq!(keys.iter().filter(|key| key.old).count(), 100_000 / 60 * 29 + (100_000 % 60 - 31));
    let used = keys.iter().find(|key| key.info.volume.as_str() == "used").unwrap();
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap();
    assert_eq!((used.info.hosts.as_slice(), used.manager), (&[host.trim().to_owned()][..], ManagerKind::Embedded));
    assert!((0..3600).contains(&(crate::store::seconds_now() - used.last_use.unwrap())));
    assert_eq!((&used.info.key, used.volumes.as_slice()), (&KeyHandle::first(&record.id), &[record.id][..]));
    let other = keys.iter().find(|key| key.info.volume.as_str() == "other-000059").unwrap();
    assert_eq!(other.volumes, []);
    assert_eq!((other.age_days, other.old, other.last_use, other.info.hosts.len()), (59, true, None, 0));
}

#[test]
fn the_key_that_a_record_names_is_the_one_that_is_used() {
    let world = World::new();
    let device = world.add_volume("one", 3);
    let broker = world.broker(true);
    let VolumeRecord { id, enrolled_at, .. } = broker.enrol(device, None).unwrap();
    broker.record_use(Kind::KeyUsed, &id, "opened").unwrap();
    let kek = broker.vault().unwrap().store.keks().unwrap().current.unwrap();
    let day = 24 * 3600;
    rusqlite::Connection::open(world.folder.path().join("state").join("volcrypt.db"))
        .unwrap()
        .execute_batch(&format!(
            "INSERT INTO keys (volume_id, version, key_size, wrapped, created_at, kek)
                 VALUES ('one', 2, 512, x'00', {enrolled_at} - 3 * {day}, '{kek}');
             UPDATE volumes SET key_version = 2, enrolled_at = enrolled_at - 100 * {day}"
        ))
        .unwrap();
    let keys = Listing::default().page(&broker, None).unwrap().keys;
    let [first, second] = keys.as_slice() else { panic!("{keys:?}") };
    assert_eq!((first.info.key.version, first.volumes.len(), first.last_use, first.age_days), (1, 0, None, 0));
    assert_eq!((second.info.key.version, second.volumes.as_slice()), (2, &[id][..]));
    assert!(second.last_use.is_some());
    assert_eq!(second.age_days, 3, "it is younger than the volume");
}
