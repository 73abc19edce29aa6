//! Two hosts that ask one key manager.

use std::collections::BTreeMap;

use super::super::broker::Verdict;
use super::*;
use crate::audit::{Entry, Kind};
use crate::keys::cached::{Cache, CachedKeyManager};
use crate::keys::{Capabilities, Description, Imported, KeyHandle, KeyInfo, KeyManager, RecordedKey};
use crate::store::{VolumeRecord, VolumeState};
use crate::volume::VolumeId;

/// A key manager of both.
#[derive(Clone, Default)]
pub(super) struct Shared(Arc<Mutex<Keys>>, Arc<Mutex<Faults>>);

/// What the next requests come to instead of an answer.
#[derive(Default)]
struct Faults {
    get: Option<Reason>,
    /// Before or after the key is gone.
    destroy: Option<(Reason, bool)>,
}

type Keys = BTreeMap<VolumeId, (Vec<u8>, Description)>;

impl KeyManager for Shared {
    fn get(&self, volume: &VolumeId) -> Result<Key, Refusal> {
        self.described(volume)?.map(|(key, _)| key).ok_or_else(|| Refusal::new(Reason::NoKey, "no key"))
    }

    fn get_enrolled(&self, key: &RecordedKey) -> Result<Key, Refusal> {
        match self.described(&key.volume)? {
            Some((found, said)) if said.key_version() == key.handle.version => Ok(found),
            Some(_) => Err(Refusal::new(Reason::WrongKey, "another version")),
            None => Err(Refusal::new(Reason::NoKey, "no key")),
        }
    }

    fn create(&self, volume: &VolumeId, wanted: &Description) -> Result<(Key, Description), Refusal> {
        let key = Key::random(wanted.key_size)?;
        let kept = (key.bytes().to_vec(), wanted.clone());
        self.0.lock().unwrap().entry(volume.clone()).or_insert(kept);
        Ok(self.described(volume)?.unwrap())
    }

    fn described(&self, volume: &VolumeId) -> Result<Option<(Key, Description)>, Refusal> {
        if let Some(reason) = self.1.lock().unwrap().get.take() {
            return Err(Refusal::new(reason, "no answer"));
        }
        let keys = self.0.lock().unwrap();
        let Some((bytes, description)) = keys.get(volume) else { return Ok(None) };
        let key = Key::filled(bytes.len(), |room| {
            room.copy_from_slice(bytes);
            Ok(())
        })?;
        Ok(Some((key, description.clone())))
    }

    fn import(&self, volume: &VolumeId, key: &Key, description: &Description) -> Result<Imported, Refusal> {
        let kept = (key.bytes().to_vec(), description.clone());
        match self.0.lock().unwrap().insert(volume.clone(), kept) {
            None => Ok(Imported::Stored),
            Some(_) => Ok(Imported::Present),
        }
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities { lists: false, imports: true, destroys: true, describes: true }
    }

    fn destroy(&self, volume: &VolumeId) -> Result<(), Refusal> {
        let fault = self.1.lock().unwrap().destroy.take();
        if !matches!(fault, Some((_, false))) {
            self.0.lock().unwrap().remove(volume);
        }
        fault.map_or(Ok(()), |(reason, _)| Err(Refusal::new(reason, "no answer")))
    }

    fn list(&self) -> Result<Vec<KeyInfo>, Refusal> {
        Ok(Vec::new())
    }
}

/// Two hosts that see the same LUN, under different names.
fn hosts() -> [(World, DeviceNumber, Broker); 2] {
    hosts_with(&Shared::default())
}

fn hosts_with(keys: &Shared) -> [(World, DeviceNumber, Broker); 2] {
    [3, 8].map(|minor| {
        let world = World::new();
        let device = world.add_volume("one", minor);
        world.change(device, |identity| identity.wwid = Some("naa.same".to_owned()));
        let broker = world.broker(true).with_keys(Box::new(keys.clone()));
        (world, device, broker)
    })
}

#[test]
fn a_volume_that_another_host_has_enrolled_is_opened_with_its_key_though_it_is_not_blank() {
    let [(_, here, one), (world, there, other)] = hosts();
    let record = one.enrol(here, Some("p1")).unwrap();
    world.write(there, b"ciphertext by now");
    assert!(matches!(other.open(there, true, OFlags::RDWR, &vm_of("p1")), Ok(Verdict::Mapping(..))));
    assert_eq!(other.volume(&record.id).unwrap(), record);
    let refusal = other.open(there, true, OFlags::RDWR, &vm_of("p2")).unwrap_err();
    assert_eq!(refusal.errno(), libc::EACCES);
}

#[test]
fn enrolling_it_once_more_takes_the_first_record_over() {
    let [(_, here, one), (world, there, other)] = hosts();
    let record = one.enrol(here, Some("p1")).unwrap();
    world.write(there, b"ciphertext by now");
    assert_eq!(other.enrol(there, None).unwrap(), record);
    assert_eq!(other.enrol(there, Some("p2")).unwrap_err().errno(), libc::EACCES);
}

#[test]
fn another_device_with_the_same_id_is_refused_on_the_other_host() {
    let [(_, here, one), (world, there, other)] = hosts();
    one.enrol(here, None).unwrap();
    world.change(there, |identity| identity.wwid = Some("naa.other".to_owned()));
    for refusal in [other.open(there, true, OFlags::RDWR, &vm()).unwrap_err(), other.enrol(there, None).unwrap_err()] {
        assert_eq!(refusal.errno(), libc::EMEDIUMTYPE);
        assert!(refusal.to_string().contains("naa.same"), "{refusal}");
    }
    assert!(world.opened().is_empty());
    assert!(other.volume(&"one".parse().unwrap()).is_err(), "nothing was taken over");
}

#[test]
fn two_hosts_that_enrol_a_blank_volume_at_once_keep_the_same_record() {
    let [(_, here, one), (_, there, other)] = hosts();
    let (first, second) = std::thread::scope(|scope| {
        let first = scope.spawn(|| one.enrol(here, None).unwrap());
        let second = scope.spawn(|| other.enrol(there, None).unwrap());
        (first.join().unwrap(), second.join().unwrap())
    });
    assert_eq!(first, second);
}

/// What the log has of volume one's key, the oldest first: kinds and outcomes.
fn destruction(broker: &Broker) -> Vec<String> {
    let page = broker.vault().unwrap().store.audit(&Default::default()).unwrap();
    let events = page.entries.iter().rev().filter_map(|entry| match entry {
        Entry::Record { record, .. } => Some(&record.event),
        Entry::Damaged { .. } => None,
    });
    events.filter(|event| event.kind != Kind::Enrolled).map(|event| format!("{}, {}", event, event.detail)).collect()
}

#[test]
fn another_hosts_key_is_not_destroyed_because_the_key_manager_does_not_say_whose_it_is() {
    for reason in [Reason::TimedOut, Reason::KeyManager, Reason::NotAllowed, Reason::WrongKey, Reason::StoreUnavailable]
    {
        let keys = Shared::default();
        let [(_, here, one), (_, there, other)] = hosts_with(&keys);
        one.enrol(here, None).unwrap();
        // The server was restored from a backup without the key; the other host made another one, and uses it.
        keys.0.lock().unwrap().clear();
        other.enrol(there, None).unwrap();
        keys.1.lock().unwrap().get = Some(reason);
        let refusal = one.destroy(&"one".parse().unwrap()).unwrap_err();
        assert_eq!(refusal.reason(), reason);
        assert!(
            refusal.to_string().starts_with("nothing was destroyed, because the key manager does not"),
            "{refusal}"
        );
        assert!(matches!(other.open(there, true, OFlags::RDWR, &vm()), Ok(Verdict::Mapping(..))));
        assert_eq!(one.volume(&"one".parse().unwrap()).unwrap().state, VolumeState::Enrolled);
        assert_eq!(destruction(&one), [""; 0]);
    }
}

#[test]
fn a_volume_whose_record_names_another_version_than_there_is_does_not_open() {
    let [(world, here, one), (_, there, other)] = hosts();
    let record = one.enrol(here, None).unwrap();
    assert_eq!(record.key, KeyHandle::first(&record.id));
    let set_version = |version: u32| {
        let path = one.vault().unwrap().store.path().to_owned();
        let change = format!("UPDATE volumes SET key_version = {version}");
        rusqlite::Connection::open(path).unwrap().execute_batch(&change).unwrap();
    };
    set_version(2);
    let refusal = one.open(here, true, OFlags::RDWR, &vm()).unwrap_err();
    assert_eq!(refusal.errno(), libc::EKEYREJECTED, "{refusal}");
    assert!(world.opened().is_empty());
    set_version(1);
    assert!(matches!(one.open(here, true, OFlags::RDWR, &vm()), Ok(Verdict::Mapping(..))));

    // Another host takes the version over that is kept beside the key.
    let (key, _) = one.vault().unwrap().keys.described(&record.id).unwrap().unwrap();
    let second = VolumeRecord { key: KeyHandle::of(&record.id, 2), ..record.clone() };
    one.vault().unwrap().keys.import(&record.id, &key, &Description::of(&second)).unwrap();
    assert!(matches!(other.open(there, true, OFlags::RDWR, &vm()), Ok(Verdict::Mapping(..))));
    assert_eq!(other.volume(&record.id).unwrap(), second);
    assert_eq!(one.open(here, true, OFlags::RDWR, &vm()).unwrap_err().errno(), libc::EKEYREJECTED);
}

#[test]
fn what_this_host_has_kept_says_nothing_of_another_hosts_key() {
    let keys = Shared::default();
    let [(world, here, _), (_, there, other)] = hosts_with(&keys);
    let id: VolumeId = "one".parse().unwrap();
    let one = world.broker(true).with_keys(Box::new(CachedKeyManager::new(Box::new(keys.clone()), Cache::Off)));
    one.enrol(here, None).unwrap();
    let (manager, known) = (&one.vault().unwrap().keys, one.volume(&id).unwrap().recorded_key());
    // Until it is held here, the server is asked.
    keys.1.lock().unwrap().get = None;
    manager.fetch_ahead(&known);
    let deadline = std::time::Instant::now() + Duration::from_secs(30);
    let is_held = || {
        keys.1.lock().unwrap().get = Some(Reason::KeyManager);
        let answered = manager.get_enrolled(&known).is_ok();
        keys.1.lock().unwrap().get = None;
        answered
    };
    while !is_held() {
        assert!(std::time::Instant::now() < deadline, "it is never held");
        manager.fetch_ahead(&known);
        std::thread::sleep(Duration::from_millis(20));
    }
    keys.0.lock().unwrap().clear();
    other.enrol(there, None).unwrap();
    let refusal = one.destroy(&id).unwrap_err();
    assert_eq!(refusal.reason(), Reason::WrongKey);
    assert!(matches!(other.open(there, true, OFlags::RDWR, &vm()), Ok(Verdict::Mapping(..))));
}

#[test]
fn a_key_that_another_place_destroys_is_in_the_audit_log_before_and_after() {
    const BEGUN: &str = "destruction-started, volume one, by daemon: done, the key manager is asked to destroy its key";
    let id: VolumeId = "one".parse().unwrap();
    let outcome = |fault, mapped| {
        let keys = Shared::default();
        let [(mut world, here, one), _] = hosts_with(&keys);
        one.enrol(here, None).unwrap();
        keys.1.lock().unwrap().destroy = fault;
        world.mapped = mapped;
        let one = world.broker(true).with_keys(Box::new(keys.clone()));
        let outcome = one.destroy(&id);
        (outcome.is_ok(), one.volume(&id).unwrap().state, destruction(&one))
    };
    let begun = |then: &str| vec![BEGUN.to_owned(), then.to_owned()];
    let (ok, state, records) = outcome(None, false);
    assert_eq!((ok, state), (true, VolumeState::Destroyed));
    assert_eq!(records, begun("destroyed, volume one, by daemon: done, in the key manager"));
    // Whatever came of it is said as well.
    let (ok, state, records) = outcome(Some((Reason::TimedOut, true)), false);
    assert_eq!((ok, state), (false, VolumeState::Destroyed));
    assert_eq!(records, begun("destroyed, volume one, by daemon: done, it is gone, though: no answer"));
    let (ok, state, records) = outcome(Some((Reason::TimedOut, false)), false);
    assert_eq!((ok, state), (false, VolumeState::Enrolled));
    assert_eq!(records, begun("reinstated, volume one, by daemon: done, because its key was not destroyed"));
    // What a guest uses is not marked as destroyed before that is seen.
    assert_eq!(outcome(None, true), (false, VolumeState::Enrolled, Vec::new()));
}

#[test]
fn a_key_whose_destruction_cannot_be_recorded_is_not_destroyed() {
    let keys = Shared::default();
    let [(_, here, one), _] = hosts_with(&keys);
    let record = one.enrol(here, None).unwrap();
    let path = one.vault().unwrap().store.path().to_owned();
    let blocks = |statement: &str| rusqlite::Connection::open(&path).unwrap().execute_batch(statement).unwrap();
    blocks("CREATE TRIGGER full BEFORE INSERT ON audit BEGIN SELECT RAISE(ABORT, 'full'); END");
    assert!(one.destroy(&record.id).is_err());
    // Nor one of which an earlier attempt did not get as far as the key.
    blocks("UPDATE volumes SET state = 'destroyed'");
    assert!(one.destroy(&record.id).is_err());
    assert!(keys.get(&record.id).is_ok());
    blocks("DROP TRIGGER full");
    one.destroy(&record.id).unwrap();
    assert!(keys.get(&record.id).is_err());
    assert_eq!(destruction(&one).len(), 2);
}

mod moved;
