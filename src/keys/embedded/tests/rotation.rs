//! One key-encryption key takes another's place, whatever happens meanwhile.

use std::collections::BTreeMap;
use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use super::*;
use crate::audit::{Event, Kind};

const KEYS: usize = 12;
/// Tells the test program that it is to rotate, and where.
const CHILD: &str = "VOLCRYPT_TEST_ROTATE_IN";

/// Every key of a place, by volume.
type Keys = BTreeMap<String, Vec<u8>>;

impl Place {
    fn kek_new(&self) -> PathBuf {
        self.path().join("kek.new")
    }

    /// What a power cut leaves of it now.
    fn after_power_cut(&self) -> Place {
        let copy = Place::new();
        for name in ["volcrypt.db", "volcrypt.db-wal", "kek", "kek.new"] {
            if self.path().join(name).exists() {
                fs::copy(self.path().join(name), copy.path().join(name)).unwrap();
            }
        }
        copy
    }

    fn with_keys(count: usize) -> (Place, Keys) {
        let place = Place::new();
        let manager = place.open();
        let keys = (0..count).map(|number| {
            let name = format!("volume-{number:03}");
            let bits = [128, 256, 512][number % 3];
            let key = manager.make(&id(&name), size(bits)).unwrap().bytes().to_vec();
            (name, key)
        });
        let keys = keys.collect();
        // A destroyed one has nothing to be rewrapped.
        manager.make(&id("destroyed"), size(512)).unwrap();
        manager.destroy(&id("destroyed")).unwrap();
        drop(manager);
        (place, keys)
    }

    fn put(&self, name: &str, content: &[u8]) {
        let path = self.path().join(name);
        fs::write(&path, content).unwrap();
        fs::set_permissions(path, Permissions::from_mode(0o600)).unwrap();
    }
}

fn assert_all_open(manager: &EmbeddedKeyManager, keys: &Keys) {
    for (name, bytes) in keys {
        assert_eq!(manager.get(&id(name)).unwrap().bytes(), bytes, "{name}");
    }
    refused(manager.get(&id("destroyed")), Reason::KeyDestroyed);
}

/// The same, rewrapping one key a step.
fn slowly(manager: EmbeddedKeyManager) -> EmbeddedKeyManager {
    EmbeddedKeyManager { pace: Pace { at_a_time: 1, step: Duration::ZERO }, ..manager }
}

fn next(step: &RotationStep, manager: &EmbeddedKeyManager) -> Result<Option<RotationStep>, Refusal> {
    Ok(match manager.rotate_kek(step)? {
        KekRotation::UnderWay { after, .. } => Some(RotationStep::GoOn { after }),
        KekRotation::Finished { .. } => None,
    })
}

fn rotate(manager: &EmbeddedKeyManager) -> Result<(), Refusal> {
    let mut step = RotationStep::Begin;
    while let Some(following) = next(&step, manager)? {
        step = following;
    }
    Ok(())
}

/// Nothing is left of the old one, and the new one alone opens all.
fn assert_rotated(place: &Place, old: &[u8], keys: &Keys) {
    assert!(!place.kek_new().exists());
    assert_ne!(fs::read(place.kek()).unwrap(), old);
    let names = fs::read_dir(place.path()).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    assert_eq!(names.filter(|name| !name.starts_with("volcrypt.db")).collect::<Vec<_>>(), ["kek"]);
    let alone = Place::new();
    for name in ["volcrypt.db", "kek"] {
        fs::copy(place.path().join(name), alone.path().join(name)).unwrap();
    }
    assert_all_open(&alone.open(), keys);
    assert_eq!(alone.store().keks().unwrap().outgoing, None);
}

#[test]
fn all_keys_are_rewrapped_and_the_old_key_is_dropped() {
    let (place, keys) = Place::with_keys(KEYS);
    let old = fs::read(place.kek()).unwrap();
    let manager = place.open();
    let wrapped: Vec<_> =
        keys.keys().map(|name| manager.store.wrapped_key(&id(name)).unwrap().unwrap().wrapped.unwrap()).collect();
    rotate(&manager).unwrap();
    assert_all_open(&manager, &keys);
    assert_rotated(&place, &old, &keys);
    for wrapped in wrapped {
        assert_eq!(place.count("volcrypt.db", &wrapped[1..29]), 0, "its old form is in no file");
    }
    assert_eq!(fs::metadata(place.kek()).unwrap().permissions().mode() & 0o7777, 0o600);

    // And once more, from a manager that was open all the time.
    let old = fs::read(place.kek()).unwrap();
    rotate(&manager).unwrap();
    assert_rotated(&place, &old, &keys);
    assert_all_open(&manager, &keys);
}

#[test]
fn a_power_cut_at_any_moment_costs_no_key_and_the_rotation_goes_on() {
    let (place, mut keys) = Place::with_keys(KEYS);
    let old = fs::read(place.kek()).unwrap();
    let manager = slowly(place.open());
    let mut moments = vec![place.after_power_cut()];

    let from = manager.ring().current.0;
    let to = manager.places.successor(from).unwrap();
    moments.push(place.after_power_cut());
    let mut step = next(&RotationStep::Begin, &manager).unwrap().unwrap();
    assert_eq!(
        manager.store.keks().unwrap(),
        Keks { current: Some(to), outgoing: Some(from) },
        "it takes what is there"
    );
    let reader = manager.store.keep_log();
    for _ in 0..KEYS {
        moments.push(place.after_power_cut());
        step = next(&step, &manager).unwrap().unwrap();
    }
    drop(reader);
    assert_eq!(manager.store.count_keys_wrapped_by(from), Ok(0));
    moments.push(place.after_power_cut());
    manager.store.merge_before_dropping(from).unwrap();
    moments.push(place.after_power_cut());
    manager.places.drop_old(from, to).unwrap();
    moments.push(place.after_power_cut());
    manager.store.finish_kek_rotation().unwrap();
    moments.push(place.after_power_cut());
    assert_rotated(&place, &old, &keys);

    assert_eq!(moments.len(), KEYS + 6);
    for (number, place) in moments.iter().enumerate() {
        let manager = place.open();
        assert_all_open(&manager, &keys);
        let made = manager.make(&id("made-after"), size(256)).unwrap().bytes().to_vec();
        keys.insert("made-after".to_owned(), made);
        // The last one is a rotation of its own.
        rotate(&manager).unwrap_or_else(|refusal| panic!("moment {number}: {refusal}"));
        assert_all_open(&manager, &keys);
        assert_rotated(place, &old, &keys);
        keys.remove("made-after");
    }
}

#[test]
fn a_rotation_that_is_killed_over_and_over_comes_to_its_end() {
    if let Some(folder) = std::env::var_os(CHILD) {
        let folder = PathBuf::from(folder);
        let store = Arc::new(Store::open(&folder).unwrap());
        rotate(&slowly(EmbeddedKeyManager::open(store, None, &folder).unwrap())).unwrap();
        return;
    }
    let (place, keys) = Place::with_keys(60);
    let old = fs::read(place.kek()).unwrap();
    let name = "keys::embedded::tests::rotation::a_rotation_that_is_killed_over_and_over_comes_to_its_end";
    let mut kills = 0;
    loop {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", name])
            .env(CHILD, place.path())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        // Longer each time: on a busy machine it takes a while until the child begins.
        thread::sleep(Duration::from_millis(20 + 7 * kills % 90 + 5 * kills));
        child.kill().unwrap();
        let ended = child.wait().unwrap().success();
        assert_all_open(&place.open(), &keys);
        // Not before the child got anywhere.
        if ended || (place.store().keks().unwrap().outgoing.is_none() && fs::read(place.kek()).unwrap() != old) {
            break;
        }
        kills += 1;
        assert!(kills < 2000, "it never ends");
    }
    // It may have been killed between its last two steps, or have begun another one.
    rotate(&place.open()).unwrap();
    assert_rotated(&place, &old, &keys);
    println!("killed {kills} times");
}

#[test]
fn keys_open_and_are_made_while_a_rotation_runs() {
    let (place, keys) = Place::with_keys(200);
    let manager = EmbeddedKeyManager { pace: Pace { at_a_time: 2, step: Duration::ZERO }, ..place.open() };
    // Another handle, which learns of it only by what it finds.
    let other = place.open();
    let made = thread::scope(|scope| {
        // Dropped also where a rotation fails: the threads would be waited for forever.
        let rotating = Arc::new(());
        let opening: Vec<_> = [&manager, &other]
            .into_iter()
            .map(|manager| {
                let (keys, rotating) = (&keys, Arc::downgrade(&rotating));
                scope.spawn(move || {
                    let mut rounds = 0;
                    while rotating.strong_count() > 0 {
                        assert_all_open(manager, keys);
                        rounds += 1;
                    }
                    rounds
                })
            })
            .collect();
        let (other, still_rotating) = (&other, Arc::downgrade(&rotating));
        let making = scope.spawn(move || {
            let mut made = Keys::new();
            while still_rotating.strong_count() > 0 {
                let (name, began) = (format!("made-{}", made.len()), Instant::now());
                made.insert(name.clone(), other.make(&id(&name), size(512)).unwrap().bytes().to_vec());
                // SQLite's lock goes to whoever asks while it is free, and on a slow disk it would hardly ever be.
                thread::sleep(began.elapsed());
            }
            made
        });
        for _ in 0..3 {
            rotate(&manager).unwrap();
        }
        drop(rotating);
        assert!(opening.into_iter().all(|thread| thread.join().unwrap() > 0));
        making.join().unwrap()
    });
    assert!(!made.is_empty());
    let (place_keys, manager) = (keys.into_iter().chain(made).collect::<Keys>(), place.open());
    assert_all_open(&manager, &place_keys);
    let current = manager.ring().current.0;
    assert_eq!(manager.store.count_keys_wrapped_by(current), Ok(place_keys.len() as u64));
}

#[test]
fn what_is_made_while_a_rotation_is_broken_off_is_wrapped_by_the_new_key() {
    let (place, keys) = Place::with_keys(3);
    let manager = place.open();
    next(&RotationStep::Begin, &manager).unwrap();
    let (old, new) = (manager.store.keks().unwrap().outgoing.unwrap(), manager.ring().current.0);
    manager.make(&id("made"), size(512)).unwrap();
    let by = |name: &str| manager.store.wrapped_key(&id(name)).unwrap().unwrap().kek.unwrap();
    assert_eq!((by("made"), by("volume-000")), (new, old));
    // The old one is needed, and missed by those keys only.
    let copy = place.after_power_cut();
    fs::remove_file(copy.kek()).unwrap();
    let without = copy.open();
    without.get(&id("made")).unwrap();
    let sentence = refused(without.get(&id("volume-000")), Reason::NoKey);
    assert!(sentence.contains(&old.to_string()) && sentence.contains("from backup"), "{sentence}");
    let sentence = refused(rotate(&without), Reason::NoKey);
    assert!(sentence.contains(&old.to_string()), "{sentence}");
    // A daemon that has it in memory still opens them, and ends the rotation.
    fs::remove_file(place.kek()).unwrap();
    assert_all_open(&manager, &keys);
    rotate(&manager).unwrap();
    assert_all_open(&place.open(), &keys);

    // Without the new one nothing goes on.
    let (place, _) = Place::with_keys(3);
    let manager = place.open();
    next(&RotationStep::Begin, &manager).unwrap();
    fs::remove_file(place.kek_new()).unwrap();
    let go_on = RotationStep::GoOn { after: None };
    let sentence = refused(manager.rotate_kek(&go_on), Reason::NoKey);
    assert!(sentence.contains(&manager.ring().current.0.to_string()), "{sentence}");
    assert_eq!(manager.store.count_keys_wrapped_by(manager.ring().current.0), Ok(0));
    refused(place.try_open(), Reason::NoKey);
}

#[test]
fn a_new_key_that_cannot_be_one_is_refused() {
    let (place, keys) = Place::with_keys(2);
    let old = fs::read(place.kek()).unwrap();
    let manager = place.open();
    for (content, said) in [
        (&old[..], "is the one in use"),
        (b"short", "holds no key"),
        (&[0; 32], "one byte over and over"),
        (b"", "from backup"),
    ] {
        place.put("kek.new", content);
        let refusal = rotate(&manager).unwrap_err().to_string();
        assert!(refusal.contains(said), "{refusal}");
        assert_eq!(fs::read(place.kek()).unwrap(), old);
        // What is not needed keeps nobody from starting.
        assert_all_open(&place.open(), &keys);
    }
    // One that an operator put there is taken.
    let own: Vec<u8> = (0..32).collect();
    place.put("kek.new", &own);
    rotate(&manager).unwrap();
    assert_eq!(fs::read(place.kek()).unwrap(), own);
    // And one that was replaced before is not.
    place.put("kek.new", &old);
    let sentence = refused(rotate(&manager), Reason::Configuration);
    assert!(sentence.contains("was replaced before"), "{sentence}");
    fs::remove_file(place.kek_new()).unwrap();
    // The one in use has to be there, lest its keys open only as long as this process lives.
    fs::rename(place.kek(), place.path().join("away")).unwrap();
    assert!(refused(rotate(&manager), Reason::NoKey).contains("only in the daemon's memory"));
    assert_eq!(manager.store.keks().unwrap().outgoing, None);
}

/// A folder of credentials.
fn credentials(all: &[(&str, &[u8])]) -> Place {
    let place = Place::new();
    all.iter().for_each(|(name, content)| place.put(name, content));
    place
}

#[test]
fn credentials_take_each_others_place() {
    let place = Place::new();
    let [one, two, three] = [1_u8, 2, 3].map(|seed| (seed..seed + 32).collect::<Vec<u8>>());
    let open = |folder: &Place| EmbeddedKeyManager::open(place.store(), Some(folder.path()), place.path());
    let manager = open(&credentials(&[("volcrypt.kek", &one)])).unwrap();
    let key = manager.make(&id("one"), size(512)).unwrap();
    let folder = credentials(&[("volcrypt.kek", &one)]);
    let manager = open(&folder).unwrap();
    let sentence = refused(rotate(&manager), Reason::NoKey);
    assert!(sentence.contains("volcrypt.kek.new") && sentence.contains("systemctl restart volcryptd"), "{sentence}");
    // What was sealed is not laid open in a file.
    place.put("kek.new", &two);
    assert!(refused(rotate(&manager), Reason::Configuration).contains("mere file"));
    fs::remove_file(place.kek_new()).unwrap();

    let folder = credentials(&[("volcrypt.kek", &one), ("volcrypt.kek.new", &two)]);
    let manager = open(&folder).unwrap();
    rotate(&manager).unwrap();
    assert!(!place.kek().exists() && !place.kek_new().exists());
    // As the operator will find it: at once, with the old one dropped, and under the usual name.
    for all in [
        &[("volcrypt.kek", &one[..]), ("volcrypt.kek.new", &two[..])][..],
        &[("volcrypt.kek.new", &two)],
        &[("volcrypt.kek", &two)],
        &[("volcrypt.kek", &two), ("volcrypt.kek.new", &three)],
    ] {
        assert!(open(&credentials(all)).unwrap().get(&id("one")).unwrap().same_as(&key));
    }
    refused(open(&credentials(&[("volcrypt.kek", &one)])), Reason::NoKey);
    refused(open(&credentials(&[("volcrypt.kek", &three)])), Reason::NoKey);
}

#[test]
fn a_credential_takes_a_files_place() {
    let (place, keys) = Place::with_keys(3);
    let new: Vec<u8> = (7..39).collect();
    let open = |folder: &Place| EmbeddedKeyManager::open(place.store(), Some(folder.path()), place.path());
    // Half way through, the credential may already have its final name.
    let folder = credentials(&[("volcrypt.kek.new", &new)]);
    let manager = slowly(open(&folder).unwrap());
    let step = next(&RotationStep::Begin, &manager).unwrap().unwrap();
    next(&step, &manager).unwrap().unwrap();
    assert!(place.kek().exists());
    let folder = credentials(&[("volcrypt.kek", &new)]);
    let manager = open(&folder).unwrap();
    assert_all_open(&manager, &keys);
    rotate(&manager).unwrap();
    assert!(!place.kek().exists(), "the file is removed");
    assert_all_open(&open(&folder).unwrap(), &keys);
}

#[test]
fn a_key_that_cannot_be_unwrapped_keeps_the_old_one_and_no_other_from_being_rewrapped() {
    let (place, mut keys) = Place::with_keys(KEYS);
    place.sql("UPDATE keys SET wrapped = zeroblob(length(wrapped)) WHERE volume_id = 'volume-004'");
    let old = fs::read(place.kek()).unwrap();
    let manager = slowly(place.open());
    let sentence = refused(rotate(&manager), Reason::NoKey);
    assert!(sentence.starts_with("1 keys cannot be unwrapped") && sentence.contains("volume-004"), "{sentence}");
    assert_eq!(fs::read(place.kek()).unwrap(), old);
    keys.remove("volume-004");
    assert_all_open(&manager, &keys);
    manager.destroy(&id("volume-004")).unwrap();
    rotate(&manager).unwrap();
    assert_rotated(&place, &old, &keys);
}

#[test]
fn a_full_disk_or_a_reader_stops_a_rotation_that_then_goes_on() {
    let (place, keys) = Place::with_keys(KEYS);
    let old = fs::read(place.kek()).unwrap();
    let manager = place.open();
    manager.store.fill_disk(true);
    // In the same table as what a rotation records first.
    while manager.store.append_audit(Event::of_the_host(Kind::PolicyReloaded, "x")).is_ok() {}
    assert!(refused(rotate(&manager), Reason::StoreUnavailable).contains("disk is full"));
    assert_all_open(&place.open(), &keys);
    manager.store.fill_disk(false);
    let reader = manager.store.keep_log();
    let sentence = refused(rotate(&manager), Reason::StoreUnavailable);
    assert!(sentence.contains("another process reads"), "{sentence}");
    assert_eq!(fs::read(place.kek()).unwrap(), old);
    assert_all_open(&manager, &keys);
    drop(reader);
    rotate(&manager).unwrap();
    assert_rotated(&place, &old, &keys);

    let store = Arc::new(Store::open_for_reading(place.path()).unwrap());
    let manager = EmbeddedKeyManager::open(store, None, place.path()).unwrap();
    assert!(refused(rotate(&manager), Reason::StoreUnavailable).contains("read-only"));
    assert_all_open(&place.open(), &keys);
}

#[test]
fn another_file_in_the_old_ones_place_is_left_alone() {
    let (place, keys) = Place::with_keys(2);
    let manager = place.open();
    next(&RotationStep::Begin, &manager).unwrap();
    place.put("kek", &[5; 32]);
    assert!(refused(rotate(&manager), Reason::NoKey).contains("move it away"));
    assert_eq!(fs::read(place.kek()).unwrap(), [5; 32]);
    fs::remove_file(place.kek()).unwrap();
    rotate(&manager).unwrap();
    assert_all_open(&place.open(), &keys);
}

#[test]
fn a_rotation_is_recorded_from_its_start_to_its_end() {
    let (place, _) = Place::with_keys(3);
    let manager = place.open();
    rotate(&manager).unwrap();
    let page = manager.store.audit(&Default::default()).unwrap();
    let records: Vec<String> = page.entries.iter().rev().map(|entry| serde_json::to_string(entry).unwrap()).collect();
    let of = |kind: &str| records.iter().find(|record| record.contains(kind)).unwrap();
    assert!(of("kek-rotation-started").contains("3 keys to rewrap"), "{records:?}");
    assert!(of("\"kek-rotated\"").contains("which wraps 3 keys; the old one wraps none"), "{records:?}");
    assert_eq!(records.iter().filter(|record| record.contains("kek-rot")).count(), 2);
}

#[test]
fn what_was_left_of_a_file_that_was_being_written_is_removed() {
    let (place, _) = Place::with_keys(1);
    for name in [".new-0123456789abcdef", ".new-not", ".newer"] {
        place.put(name, b"x");
    }
    rotate(&place.open()).unwrap();
    assert!(!place.path().join(".new-0123456789abcdef").exists());
    assert!(place.path().join(".new-not").exists() && place.path().join(".newer").exists());
}

#[test]
fn a_credential_takes_the_place_of_a_key_that_wraps_nothing() {
    let place = Place::new();
    let with_credential = |folder: &Place| EmbeddedKeyManager::open(place.store(), Some(folder.path()), place.path());
    // Whoever asks a new daemon for its status has this made.
    let made = place.open().ring().current.0;
    let folder = credentials(&[("volcrypt.kek", &[7; 32])]);
    let manager = with_credential(&folder).unwrap();
    assert_ne!(manager.ring().current.0, made);
    let key = manager.make(&id("one"), size(512)).unwrap();
    drop(manager);
    fs::remove_file(place.kek()).unwrap();
    assert!(with_credential(&folder).unwrap().get(&id("one")).unwrap().same_as(&key));
    // Now it wraps something, and no other one comes in its place by itself.
    let other = credentials(&[("volcrypt.kek", &[8; 32])]);
    refused(with_credential(&other), Reason::NoKey);
    assert!(with_credential(&folder).unwrap().get(&id("one")).unwrap().same_as(&key));
}

#[test]
fn a_key_from_before_is_not_taken_up_from_a_credential() {
    let place = Place::new();
    let manager = place.open();
    let old = fs::read(place.kek()).unwrap();
    rotate(&manager).unwrap();
    let folder = credentials(&[("volcrypt.kek", &old)]);
    let now = manager.ring().current.0;
    let manager = EmbeddedKeyManager::open(place.store(), Some(folder.path()), place.path()).unwrap();
    assert_eq!(manager.ring().current.0, now);
}

#[test]
fn the_file_that_wraps_keys_is_used_in_spite_of_another_credential() {
    let place = Place::new();
    let key = place.open().make(&id("one"), size(512)).unwrap();
    let folder = credentials(&[("volcrypt.kek", &(7..39).collect::<Vec<u8>>())]);
    let manager = EmbeddedKeyManager::open(place.store(), Some(folder.path()), place.path()).unwrap();
    assert!(manager.get(&id("one")).unwrap().same_as(&key));
    // A new file would be passed over for the credential, and is not made.
    let old = fs::read(place.kek()).unwrap();
    for new in [None, Some([3; 32])] {
        new.inspect(|new| place.put("kek.new", new));
        let sentence = refused(rotate(&manager), Reason::Configuration);
        assert!(sentence.contains("name that credential volcrypt.kek.new"), "{sentence}");
        assert_eq!((fs::read(place.kek()).unwrap(), place.kek_new().exists()), (old.clone(), new.is_some()));
    }
    fs::remove_file(place.kek_new()).unwrap();
    // One that had begun before the credential was there is ended, and says so.
    let copy = place.after_power_cut();
    let manager = slowly(copy.open());
    let step = next(&RotationStep::Begin, &manager).unwrap().unwrap();
    let manager = EmbeddedKeyManager::open(copy.store(), Some(folder.path()), copy.path()).unwrap();
    assert_eq!(next(&step, &manager), Ok(None));
    assert!(manager.get(&id("one")).unwrap().same_as(&key));
    // The way out that the log names.
    fs::rename(folder.path().join("volcrypt.kek"), folder.path().join("volcrypt.kek.new")).unwrap();
    let manager = EmbeddedKeyManager::open(place.store(), Some(folder.path()), place.path()).unwrap();
    rotate(&manager).unwrap();
    assert!(!place.kek().exists());
    fs::rename(folder.path().join("volcrypt.kek.new"), folder.path().join("volcrypt.kek")).unwrap();
    let manager = EmbeddedKeyManager::open(place.store(), Some(folder.path()), place.path()).unwrap();
    assert!(manager.get(&id("one")).unwrap().same_as(&key));
}

#[test]
fn the_key_that_opens_a_database_kept_by_a_restore_is_not_dropped() {
    let place = Place::new();
    let manager = place.open();
    for name in ["one", "two"] {
        manager.make(&id(name), size(512)).unwrap();
    }
    let kept = place.path().join("volcrypt.db.replaced-20261128T090000Z");
    place.sql(&format!("VACUUM INTO '{}'", kept.display()));
    let old = fs::read(place.kek()).unwrap();
    // All its keys are here as well.
    rotate(&manager).unwrap();
    assert_ne!(fs::read(place.kek()).unwrap(), old);

    fs::remove_file(&kept).unwrap();
    place.sql(&format!("VACUUM INTO '{}'", kept.display()));
    place.sql("PRAGMA foreign_keys = OFF; DELETE FROM keys WHERE volume_id = 'two'");
    let old = fs::read(place.kek()).unwrap();
    let sentence = refused(rotate(&manager), Reason::Configuration);
    assert!(sentence.contains("has the keys of these volumes alone: two"), "{sentence}");
    assert!(!place.kek_new().exists());
    // What cannot be looked at may have some.
    fs::rename(&kept, place.path().join("away")).unwrap();
    fs::write(&kept, "no database").unwrap();
    let sentence = refused(rotate(&manager), Reason::Configuration);
    assert!(sentence.contains("may have keys"), "{sentence}");
    assert_eq!(fs::read(place.kek()).unwrap(), old);

    fs::remove_file(&kept).unwrap();
    rotate(&manager).unwrap();
    assert_ne!(fs::read(place.kek()).unwrap(), old);
}

#[test]
fn the_key_that_a_log_kept_without_its_database_needs_is_not_dropped() {
    let place = Place::new();
    let manager = place.open();
    manager.make(&id("one"), size(512)).unwrap();
    let old = fs::read(place.kek()).unwrap();
    for end in ["-wal", "-journal"] {
        let kept = place.path().join(format!("volcrypt.db.replaced-x{end}"));
        fs::write(&kept, "a log").unwrap();
        let sentence = refused(next(&RotationStep::Begin, &manager), Reason::Configuration);
        assert!(sentence.contains(&format!("{} is the log of a database", kept.display())), "{sentence}");
        assert!(sentence.contains("with a copy of that key-encryption key"), "{sentence}");
        assert!(!place.kek_new().exists());
        fs::remove_file(&kept).unwrap();
    }
    assert_eq!(fs::read(place.kek()).unwrap(), old);
    // What is empty, or has nothing of its own.
    for end in ["-wal", "-shm"] {
        let content = if end == "-wal" { "" } else { "an index" };
        fs::write(place.path().join(format!("volcrypt.db.replaced-x{end}")), content).unwrap();
    }
    rotate(&manager).unwrap();
    assert_ne!(fs::read(place.kek()).unwrap(), old);
}

#[test]
fn a_key_from_before_is_taken_up_where_there_is_no_other_and_nothing_is_wrapped() {
    let place = Place::new();
    let manager = place.open();
    let old = fs::read(place.kek()).unwrap();
    rotate(&manager).unwrap();
    let now = manager.ring().current.0;
    drop(manager);
    // The new one is lost, and what it wrapped is given up.
    place.store().untie_from_kek().unwrap();
    place.put("kek", &old);
    let manager = place.open();
    assert_ne!(manager.ring().current.0, now);
    let key = manager.make(&id("one"), size(512)).unwrap();
    assert!(place.open().get(&id("one")).unwrap().same_as(&key));
}
