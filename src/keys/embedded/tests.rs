use std::fs;
use std::path::PathBuf;
use std::sync::Barrier;
use std::thread;

use rusqlite::Connection;
use tempfile::TempDir;

use super::*;
use crate::store::tests::private_directory;

mod rotation;

/// A directory with a database and a key-encryption key.
struct Place(TempDir);

impl Place {
    fn new() -> Self {
        Place(private_directory())
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    fn kek(&self) -> PathBuf {
        self.path().join("kek")
    }

    fn store(&self) -> Arc<Store> {
        Arc::new(Store::open(self.path()).unwrap())
    }

    fn try_open(&self) -> Result<EmbeddedKeyManager, Refusal> {
        EmbeddedKeyManager::open(self.store(), None, self.path())
    }

    fn open(&self) -> EmbeddedKeyManager {
        self.try_open().unwrap()
    }

    /// Changes the database behind the key manager's back.
    fn sql(&self, statements: &str) {
        Connection::open(self.path().join("volcrypt.db")).unwrap().execute_batch(statements).unwrap();
    }

    /// How often `bytes` stand in the files whose names begin with `prefix`.
    fn count(&self, prefix: &str, bytes: &[u8]) -> usize {
        fs::read_dir(self.path())
            .unwrap()
            .map(|entry| entry.unwrap())
            .filter(|entry| entry.file_name().to_str().unwrap().starts_with(prefix))
            .map(|entry| fs::read(entry.path()).unwrap().windows(bytes.len()).filter(|window| *window == bytes).count())
            .sum()
    }
}

fn id(name: &str) -> VolumeId {
    name.parse().unwrap()
}

fn size(bits: u32) -> KeySize {
    bits.try_into().unwrap()
}

fn refused<T>(result: Result<T, Refusal>, reason: Reason) -> String {
    let refusal = result.err().expect("must be refused");
    assert_eq!(refusal.reason(), reason, "{refusal}");
    refusal.to_string()
}

#[test]
fn a_key_is_made_once_and_outlives_the_daemon() {
    let place = Place::new();
    let manager = place.open();
    for bits in [128, 256, 512] {
        let volume = id(&format!("volume-{bits}"));
        let sentence = refused(manager.get(&volume), Reason::NoKey);
        assert!(sentence.contains(&format!("volume {volume} has no key")), "{sentence}");
        let key = manager.make(&volume, size(bits)).unwrap();
        assert_eq!(key.bits(), bits as usize);
        assert!(manager.make(&volume, size(bits)).unwrap().same_as(&key));
        assert!(place.open().get(&volume).unwrap().same_as(&key));
    }
    let infos = manager.list().unwrap();
    assert_eq!(infos.len(), 3);
    assert!(infos.iter().all(|info| !info.destroyed && info.key.version == 1 && info.created_at > 1_700_000_000));
}

#[test]
fn a_key_of_another_size_is_not_replaced() {
    let place = Place::new();
    let manager = place.open();
    let key = manager.make(&id("one"), size(256)).unwrap();
    let sentence = refused(manager.make(&id("one"), size(512)), Reason::Configuration);
    assert!(sentence.contains("256 bits") && sentence.contains("512"), "{sentence}");
    assert!(manager.get(&id("one")).unwrap().same_as(&key));
}

#[test]
fn threads_and_handles_that_create_at_once_get_one_key() {
    for _ in 0..10 {
        let place = Place::new();
        let start = Barrier::new(8);
        let shared = place.open();
        // What fails before the barrier would leave the others waiting at it.
        let own: Vec<_> = (0..8).map(|number| (number % 2 == 1).then(|| place.open())).collect();
        let keys: Vec<Key> = thread::scope(|scope| {
            let threads: Vec<_> = own
                .iter()
                .map(|own| {
                    let (start, shared) = (&start, &shared);
                    scope.spawn(move || {
                        start.wait();
                        own.as_ref().unwrap_or(shared).make(&id("one"), size(512)).unwrap()
                    })
                })
                .collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        assert!(keys.iter().all(|key| key.same_as(&keys[0])));
        assert_eq!(shared.list().unwrap().len(), 1);
    }
}

#[test]
fn handles_that_open_a_new_database_at_once_agree_on_the_key_encryption_key() {
    for _ in 0..10 {
        let place = Place::new();
        let start = Barrier::new(8);
        let values: Vec<_> = thread::scope(|scope| {
            let open = || {
                start.wait();
                place.open().ring().current.0
            };
            let threads: Vec<_> = (0..8).map(|_| scope.spawn(open)).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        assert!(values.iter().all(|value| *value == values[0]));
    }
}

#[test]
fn no_key_comes_out_of_a_changed_record() {
    let place = Place::new();
    let manager = place.open();
    for bits in [128, 256, 512] {
        let volume = id(&format!("volume-{bits}"));
        manager.make(&volume, size(bits)).unwrap();
        let wrapped = manager.store.wrapped_key(&volume).unwrap().unwrap().wrapped.unwrap();
        for at in 0..wrapped.len() {
            let mut changed = wrapped.clone();
            changed[at] ^= 1;
            let hex: String = changed.iter().map(|byte| format!("{byte:02x}")).collect();
            place.sql(&format!("UPDATE keys SET wrapped = x'{hex}' WHERE volume_id = '{volume}'"));
            for result in [manager.get(&volume), manager.make(&volume, size(bits))] {
                let sentence = refused(result, Reason::NoKey);
                assert!(sentence.contains(volume.as_str()) && sentence.contains("from backup"), "{sentence}");
            }
        }
    }
}

#[test]
fn no_key_comes_out_of_a_misplaced_record() {
    for change in [
        "CREATE TEMP TABLE old AS SELECT * FROM keys;
         UPDATE keys SET wrapped = (SELECT wrapped FROM old WHERE old.volume_id <> keys.volume_id)",
        "UPDATE keys SET volume_id = CASE volume_id WHEN 'one' THEN 'three' ELSE 'one' END;
         UPDATE keys SET volume_id = 'two' WHERE volume_id = 'three'",
        "UPDATE keys SET version = 2",
        "UPDATE keys SET key_size = 512",
        "UPDATE keys SET key_size = 128",
        "UPDATE keys SET wrapped = x''",
        "UPDATE keys SET wrapped = substr(wrapped, 2)",
    ] {
        let place = Place::new();
        let manager = place.open();
        for name in ["one", "two"] {
            manager.make(&id(name), size(256)).unwrap();
        }
        place.sql(change);
        for name in ["one", "two"] {
            refused(manager.get(&id(name)), Reason::NoKey);
            refused(manager.make(&id(name), size(256)), Reason::NoKey);
        }
    }
}

#[test]
fn a_missing_key_encryption_key_is_never_made_anew() {
    let place = Place::new();
    // Nothing is wrapped yet, but the database is tied to the key already.
    drop(place.open());
    fs::rename(place.kek(), place.path().join("away")).unwrap();
    let sentence = refused(place.try_open(), Reason::NoKey);
    assert!(sentence.contains(place.kek().to_str().unwrap()) && sentence.contains("backup"), "{sentence}");
    assert!(!place.kek().exists());
    fs::rename(place.path().join("away"), place.kek()).unwrap();

    place.open().make(&id("one"), size(512)).unwrap();
    fs::remove_file(place.kek()).unwrap();
    refused(place.try_open(), Reason::NoKey);
    // Not even when somebody has deleted the check value.
    place.sql("PRAGMA foreign_keys = OFF; DELETE FROM keks");
    refused(place.try_open(), Reason::NoKey);
    assert!(!place.kek().exists());
}

#[test]
fn another_key_encryption_key_is_refused() {
    let (place, other) = (Place::new(), Place::new());
    place.open().make(&id("one"), size(512)).unwrap();
    drop(other.open());
    fs::copy(other.kek(), place.kek()).unwrap();
    let sentence = refused(place.try_open(), Reason::NoKey);
    assert!(sentence.contains("volcrypt.kek") && sentence.contains(place.kek().to_str().unwrap()), "{sentence}");
    // Without the check value the keys would be orphaned silently: refused as well.
    place.sql("PRAGMA foreign_keys = OFF; DELETE FROM keks");
    refused(place.try_open(), Reason::StoreUnavailable);
    // As a credential it is no better.
    fs::rename(place.kek(), other.path().join("volcrypt.kek")).unwrap();
    refused(EmbeddedKeyManager::open(place.store(), Some(other.path()), place.path()), Reason::StoreUnavailable);
}

#[test]
fn a_destroyed_key_is_gone_and_stays_known() {
    let place = Place::new();
    let manager = place.open();
    for name in ["one", "two"] {
        manager.make(&id(name), size(512)).unwrap();
    }
    let kept = manager.get(&id("two")).unwrap();
    let wrapped = manager.store.wrapped_key(&id("one")).unwrap().unwrap().wrapped.unwrap();
    assert!(place.count("volcrypt.db", &wrapped[13..]) > 0, "it is in the files before");
    manager.destroy(&id("one")).unwrap();
    for part in [&wrapped[1..13], &wrapped[13..29], &wrapped[wrapped.len() - 16..]] {
        assert_eq!(place.count("volcrypt.db", part), 0, "it is in no file after");
    }
    refused(manager.get(&id("one")), Reason::KeyDestroyed);
    refused(manager.make(&id("one"), size(512)), Reason::KeyDestroyed);
    refused(place.open().get(&id("one")), Reason::KeyDestroyed);
    assert_eq!(manager.destroy(&id("one")), Ok(()));
    refused(manager.destroy(&id("three")), Reason::NoKey);
    assert_eq!(manager.list().unwrap().iter().map(|info| info.destroyed).collect::<Vec<_>>(), [true, false]);
    assert!(manager.get(&id("two")).unwrap().same_as(&kept));
    // A database whose keys are all destroyed is still tied to its key-encryption key.
    manager.destroy(&id("two")).unwrap();
    fs::remove_file(place.kek()).unwrap();
    refused(place.try_open(), Reason::NoKey);
}

#[test]
fn a_reader_that_keeps_the_wrapped_key_alive_is_reported() {
    let place = Place::new();
    let manager = place.open();
    manager.make(&id("one"), size(512)).unwrap();
    let wrapped = manager.store.wrapped_key(&id("one")).unwrap().unwrap().wrapped.unwrap();
    let reader = manager.store.keep_log();
    let sentence = refused(manager.destroy(&id("one")), Reason::StoreUnavailable);
    assert!(sentence.contains("destroyed, but"), "{sentence}");
    refused(manager.get(&id("one")), Reason::KeyDestroyed);
    drop(reader);
    manager.destroy(&id("one")).unwrap();
    assert_eq!(place.count("volcrypt.db", &wrapped[13..]), 0);
}

#[test]
fn no_part_of_a_key_stands_in_the_database() {
    let place = Place::new();
    let manager = place.open();
    for number in 0..20 {
        let key = manager.make(&id(&format!("volume-{number}")), size(512)).unwrap();
        for part in key.bytes().chunks(8) {
            assert_eq!(place.count("", part), 0);
        }
    }
    let kek = fs::read(place.kek()).unwrap();
    for part in kek.chunks(8) {
        assert_eq!(place.count("volcrypt.db", part), 0);
    }
}

#[test]
fn a_confirmed_key_survives_a_power_cut() {
    let place = Place::new();
    let manager = place.open();
    let _reader = manager.store.keep_log();
    let key = manager.make(&id("one"), size(512)).unwrap();
    let copy = Place::new();
    for name in ["volcrypt.db", "volcrypt.db-wal", "kek"] {
        fs::copy(place.path().join(name), copy.path().join(name)).unwrap();
    }
    assert!(fs::metadata(copy.path().join("volcrypt.db-wal")).unwrap().len() > 0);
    assert!(copy.open().get(&id("one")).unwrap().same_as(&key));
}

#[test]
fn a_key_that_reached_the_disk_wrong_is_not_handed_out() {
    let place = Place::new();
    let manager = place.open();
    let key = Key::random(size(512)).unwrap();
    let ring = manager.ring();
    let wrapped = ring.current.1.wrap(&id("one"), FIRST_VERSION, &key).unwrap();
    let info = KeyInfo {
        volume: id("one"),
        key: KeyHandle::first(&id("one")),
        key_size: size(512),
        created_at: seconds_now(),
        destroyed: false,
        hosts: Vec::new(),
    };
    assert_eq!(manager.store.insert_key(&info, &wrapped, ring.current.0), Ok(Inserted::Stored));
    // The disk changes a bit behind everybody's back.
    let log = place.path().join("volcrypt.db");
    let mut content = fs::read(&log).unwrap();
    let starts: Vec<_> = content.windows(wrapped.len()).enumerate().filter(|(_, window)| *window == wrapped).collect();
    let starts: Vec<usize> = starts.into_iter().map(|(start, _)| start + 20).collect();
    assert!(!starts.is_empty());
    starts.into_iter().for_each(|at| content[at] ^= 1);
    // In place: SQLite has the file open.
    fs::write(&log, &content).unwrap();
    let record = manager.store.wrapped_key_from_disk(&id("one"), None).unwrap().unwrap();
    refused(manager.unwrap(&record), Reason::NoKey);
}

#[test]
fn a_full_disk_leaves_no_key_behind() {
    let place = Place::new();
    let manager = place.open();
    manager.store.fill_disk(true);
    let mut made = 0;
    let volume = loop {
        let volume = id(&format!("volume-{made}"));
        match manager.make(&volume, size(512)) {
            Ok(_) => made += 1,
            Err(refusal) => {
                assert!(refused::<()>(Err(refusal), Reason::StoreUnavailable).contains("disk is full"));
                break volume;
            }
        }
    };
    refused(manager.get(&volume), Reason::NoKey);
    assert_eq!(manager.list().unwrap().len(), made);
    manager.store.fill_disk(false);
    let key = manager.make(&volume, size(512)).unwrap();
    assert!(manager.get(&volume).unwrap().same_as(&key));
}

#[test]
fn a_read_only_database_still_hands_out_its_keys() {
    let place = Place::new();
    let key = place.open().make(&id("one"), size(512)).unwrap();
    let store = Arc::new(Store::open_for_reading(place.path()).unwrap());
    let manager = EmbeddedKeyManager::open(store, None, place.path()).unwrap();
    assert!(manager.get(&id("one")).unwrap().same_as(&key));
    assert!(manager.make(&id("one"), size(512)).unwrap().same_as(&key));
    refused(manager.make(&id("two"), size(512)), Reason::StoreUnavailable);
    refused(manager.destroy(&id("one")), Reason::StoreUnavailable);
}

/// The key number `version` of volume one, as a record of that names it.
fn recorded(version: u32, key: &Key) -> RecordedKey {
    RecordedKey {
        volume: id("one"),
        handle: KeyHandle::of(&id("one"), version),
        check_value: key.check_value(&id("one")),
    }
}

impl EmbeddedKeyManager {
    /// Another key of volume one, beside those that are there.
    fn add_version(&self, version: u32) -> Key {
        let (volume, key, ring) = (id("one"), Key::random(size(512)).unwrap(), self.ring());
        let wrapped = ring.current.1.wrap(&volume, version, &key).unwrap();
        let row = rusqlite::params![volume.as_str(), version, wrapped, ring.current.0.to_string()];
        let insert =
            "INSERT INTO keys (volume_id, version, key_size, wrapped, created_at, kek) VALUES (?1, ?2, 512, ?3, 5, ?4)";
        Connection::open(self.store.path()).unwrap().execute(insert, row).unwrap();
        key
    }
}

#[test]
fn a_record_gets_the_version_that_it_names_and_no_other() {
    let place = Place::new();
    let manager = place.open();
    let first = manager.make(&id("one"), size(512)).unwrap();
    let sentence = refused(manager.get_enrolled(&recorded(2, &first)), Reason::WrongKey);
    assert!(
        sentence.contains("volume one names version 2 of its key") && sentence.contains("has version 1"),
        "{sentence}"
    );
    let second = manager.add_version(2);
    for manager in [manager, place.open()] {
        assert!(manager.get_enrolled(&recorded(1, &first)).unwrap().same_as(&first));
        assert!(manager.get_enrolled(&recorded(2, &second)).unwrap().same_as(&second));
        refused(manager.get_enrolled(&recorded(3, &second)), Reason::WrongKey);
        let foreign = KeyHandle { id: "another".parse().unwrap(), version: 1 };
        let sentence =
            refused(manager.get_enrolled(&RecordedKey { handle: foreign, ..recorded(1, &first) }), Reason::WrongKey);
        assert!(sentence.contains("names the key another"), "{sentence}");
        let nowhere = RecordedKey { volume: id("two"), handle: KeyHandle::first(&id("two")), ..recorded(1, &first) };
        refused(manager.get_enrolled(&nowhere), Reason::NoKey);
    }
    let manager = place.open();
    let versions = manager.list().unwrap().into_iter().map(|info| info.key.to_string()).collect::<Vec<_>>();
    assert_eq!(versions, ["one, version 1", "one, version 2"]);
    manager.destroy(&id("one")).unwrap();
    for version in [1, 2] {
        refused(manager.get_enrolled(&recorded(version, &first)), Reason::KeyDestroyed);
    }
}

#[test]
fn a_key_that_was_rewrapped_since_it_was_looked_for_is_the_same_version() {
    let place = Place::new();
    let manager = place.open();
    let first = manager.make(&id("one"), size(512)).unwrap();
    manager.add_version(2);
    let before = manager.store.wrapped_key_of(&id("one"), 1).unwrap().unwrap();
    let other = place.open();
    let mut step = RotationStep::Begin;
    while let KekRotation::UnderWay { after, .. } = other.rotate_kek(&step).unwrap() {
        step = RotationStep::GoOn { after };
    }
    // It knows of the new key-encryption key alone.
    manager.reload().unwrap();
    assert!(manager.unwrap(&before).unwrap().same_as(&first));
}

#[test]
fn a_key_that_is_brought_keeps_its_version() {
    let place = Place::new();
    let manager = place.open();
    let device = crate::store::EnrolledDevice { wwid: Some("naa.6".to_owned()), ..Default::default() };
    let said = Description::new(device, 4096, ("default", &crate::policy::Profile::default()), None, 7);
    let key = Key::random(size(512)).unwrap();
    let second = said.clone().with_key_version(2);
    assert_eq!(manager.import(&id("one"), &key, &second), Ok(Imported::Stored));
    assert_eq!(manager.import(&id("one"), &key, &second), Ok(Imported::Present));
    refused(manager.import(&id("one"), &key, &said), Reason::WrongKey);
    assert!(manager.get_enrolled(&recorded(2, &key)).unwrap().same_as(&key));
    refused(manager.get_enrolled(&recorded(1, &key)), Reason::WrongKey);
    // Whoever enrols the volume anew names the key that there is.
    let (found, kept) = manager.create(&id("one"), &said).unwrap();
    assert!(found.same_as(&key));
    assert_eq!(kept.record(&id("one"), &found).key, KeyHandle::of(&id("one"), 2));
    manager.destroy(&id("one")).unwrap();
    refused(manager.import(&id("one"), &key, &said), Reason::KeyDestroyed);
}

#[test]
fn all_versions_are_checked_and_the_record_has_the_one_that_it_names() {
    let place = Place::new();
    let manager = place.open();
    let first = manager.make(&id("one"), size(512)).unwrap();
    manager.add_version(2);
    let device = crate::store::EnrolledDevice { wwid: Some("naa.6".to_owned()), ..Default::default() };
    let said = Description::new(device, 4096, ("default", &crate::policy::Profile::default()), None, 7);
    manager.store.enrol(&said.record(&id("one"), &first)).unwrap();
    assert_eq!(manager.check_all(true), Ok(2));
    place.sql("UPDATE volumes SET key_version = 2");
    assert!(refused(manager.check_all(true), Reason::WrongKey).contains("not the one it was enrolled with"));
    // Which does not matter where another key manager has the volumes' keys.
    assert_eq!(manager.check_all(false), Ok(2));
    place.sql("UPDATE volumes SET key_version = 3");
    assert!(refused(manager.check_all(true), Reason::WrongKey).contains("names version 3 of its key"));
    place.sql("UPDATE volumes SET key_version = 1; UPDATE keys SET wrapped = zeroblob(93) WHERE version = 1");
    refused(manager.check_all(true), Reason::NoKey);
    refused(manager.check_all(false), Reason::NoKey);
}
