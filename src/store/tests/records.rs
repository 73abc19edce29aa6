use rusqlite::{TransactionBehavior, ffi};

use super::*;
use crate::domain::Facts;
use crate::keys::{ForeignKey, PassphraseHash, SecretId};

#[test]
fn records_survive_and_are_read_as_written() {
    let directory = private_directory();
    let bare = VolumeRecord { device: EnrolledDevice::default(), ..record("bare") };
    let also_bare = VolumeRecord { device: EnrolledDevice::default(), ..record("bare2") };
    let store = Store::open(directory.path()).unwrap();
    for record in [&record("one"), &bare, &also_bare] {
        store.enrol(record).unwrap();
    }
    drop(store);
    let store = Store::open(directory.path()).unwrap();
    assert_eq!(store.volumes().unwrap(), [bare, also_bare, record("one")]);
    assert_eq!(store.volume(&record("one").id).unwrap(), Some(record("one")));
    assert_eq!(store.volume(&record("two").id).unwrap(), None);
    let json = serde_json::to_value(record("one")).unwrap();
    assert_eq!(json["device"]["lun"], 1);
    assert_eq!(json["provider"], "plain");
}

#[test]
fn the_same_record_may_be_repeated_and_no_other() {
    let directory = private_directory();
    let store = Store::open(directory.path()).unwrap();
    store.enrol(&record("one")).unwrap();
    store.enrol(&VolumeRecord { enrolled_at: 5, ..record("one") }).unwrap();
    type Change = fn(&mut VolumeRecord);
    let changes: [(&str, Change); 11] = [
        ("device", |record| record.device.lun = Some(2)),
        ("device", |record| record.device.wwid = None),
        ("size_bytes", |record| record.size_bytes += 512),
        ("profile", |record| record.profile.push('x')),
        ("cipher", |record| record.cipher = "aes-cbc-essiv:sha256".to_owned()),
        ("key_size", |record| record.key_size = 256.try_into().unwrap()),
        ("sector_size", |record| record.sector_size = 512),
        ("key", |record| record.key.version = 2),
        ("key", |record| record.key.id = "0b1f7c1e-1111-4222-8333-444455556666".parse().unwrap()),
        ("check_value", |record| record.check_value = "0".repeat(32).try_into().unwrap()),
        ("size_bytes, sector_size", |record| (record.size_bytes, record.sector_size) = (512, 512)),
    ];
    for (field, change) in changes {
        let mut changed = record("one");
        change(&mut changed);
        let refusal = store.enrol(&changed).unwrap_err();
        assert_eq!(refusal.reason(), Reason::ForeignData);
        assert!(
            refusal.to_string().contains(&format!("volume one is enrolled already with another {field}:")),
            "{refusal}"
        );
    }
    assert_eq!(store.volumes().unwrap(), [record("one")]);
}

#[test]
fn a_device_is_enrolled_once() {
    let directory = private_directory();
    let store = Store::open(directory.path()).unwrap();
    store.enrol(&record("one")).unwrap();
    let EnrolledDevice { iscsi_target, lun, wwid, .. } = record("one").device;
    let same_lun =
        EnrolledDevice { iscsi_target: iscsi_target.clone(), lun, wwid: Some("naa.other".to_owned()), dm_uuid: None };
    let same_wwid = EnrolledDevice { wwid, ..EnrolledDevice::default() };
    for device in [same_lun, same_wwid, record("one").device] {
        let refusal = store.enrol(&VolumeRecord { device, ..record("two") }).unwrap_err();
        assert_eq!(refusal.reason(), Reason::ForeignData);
        assert!(refusal.to_string().contains("two") && refusal.to_string().contains("volume one"), "{refusal}");
    }
    let next_lun = EnrolledDevice { iscsi_target, lun: Some(2), ..EnrolledDevice::default() };
    store.enrol(&VolumeRecord { device: next_lun, ..record("two") }).unwrap();
    // The table itself refuses it too, whoever writes.
    let connection = store.connection();
    assert!(connection.execute_batch("UPDATE volumes SET lun = 1 WHERE id = 'two'").is_err());
    assert!(connection.execute_batch("UPDATE volumes SET wwid = 'naa.one' WHERE id = 'two'").is_err());
}

#[test]
fn a_retired_volume_makes_room_and_comes_back_only_to_room() {
    use VolumeState::{Destroyed, Enrolled, Retired};
    let directory = private_directory();
    let store = Store::open(directory.path()).unwrap();
    store.enrol(&record("one")).unwrap();
    let one = record("one").id;
    assert_eq!(store.change_state(&one, &[Enrolled], Retired, None), Ok(Some(Enrolled)));
    assert_eq!(store.change_state(&one, &[Enrolled], Retired, None), Ok(None));
    assert_eq!(store.volume(&one).unwrap(), Some(VolumeRecord { state: Retired, ..record("one") }));
    store.enrol(&VolumeRecord { device: record("one").device, ..record("two") }).unwrap();
    let refusal = store.change_state(&one, &[Retired], Enrolled, None).unwrap_err();
    assert_eq!(refusal.reason(), Reason::ForeignData);
    assert!(refusal.to_string().contains("enrolled as another volume"), "{refusal}");
    assert_eq!(store.change_state(&record("two").id, &[Enrolled], Destroyed, None), Ok(Some(Enrolled)));
    assert_eq!(store.change_state(&one, &[Retired], Enrolled, None), Ok(Some(Retired)));
    assert_eq!(store.change_state(&record("none").id, &[Enrolled], Retired, None), Ok(None));
}

#[test]
fn an_owner_can_be_changed() {
    let directory = private_directory();
    let store = Store::open(directory.path()).unwrap();
    store.enrol(&record("one")).unwrap();
    let one = record("one").id;
    for owner in [Some("p1"), None, Some("p2")] {
        assert_eq!(store.set_owner(&one, owner), Ok(true));
        assert_eq!(store.volume(&one).unwrap().unwrap().owner.as_deref(), owner);
    }
    assert_eq!(store.set_owner(&record("two").id, None), Ok(false));
    assert!(store.set_owner(&one, Some("")).is_err());
}

#[test]
fn a_grant_holds_for_one_domain_until_its_time_is_over() {
    let directory = private_directory();
    let store = Store::open(directory.path()).unwrap();
    store.enrol(&record("one")).unwrap();
    store.enrol(&VolumeRecord { device: EnrolledDevice::default(), ..record("two") }).unwrap();
    let (one, two) = (record("one").id, record("two").id);
    let grant =
        |domain: &str, expires_at| Grant { volume: one.clone(), domain: domain.to_owned(), expires_at, created_at: 1 };
    let facts = |name: &str, uuid: &str| Facts { name: name.to_owned(), uuid: Some(uuid.to_owned()), owner: None };
    let uuid = "0b1f7c1e-1111-4222-8333-444455556666";
    let (web, db) = (facts("web", uuid), facts("db", "0b1f7c1e-1111-4222-8333-000000000000"));
    store.grant(&grant("db", 10)).unwrap();
    store.grant(&grant("db", 20)).unwrap();
    assert_eq!(store.grants().unwrap(), [grant("db", 20)]);
    assert_eq!(store.is_granted(&one, &db, 19), Ok(true));
    assert_eq!(store.is_granted(&one, &db, 20), Ok(false));
    assert_eq!(store.is_granted(&two, &db, 19), Ok(false));
    assert_eq!(store.is_granted(&one, &web, 19), Ok(false));
    store.grant(&grant(uuid, 20)).unwrap();
    assert_eq!(store.is_granted(&one, &web, 19), Ok(true));
    // Whoever calls himself by another's UUID is not the other.
    assert_eq!(store.is_granted(&one, &facts(uuid, ""), 19), Ok(false));
    assert_eq!((store.revoke(&one, uuid), store.revoke(&one, uuid)), (Ok(true), Ok(false)));
    assert_eq!(store.is_granted(&one, &web, 19), Ok(false));
    let unknown = Grant { volume: record("none").id, ..grant("db", 20) };
    assert_eq!(store.grant(&unknown).unwrap_err().reason(), Reason::NoKey);
}

#[test]
fn a_grant_does_not_hold_where_the_clock_stands_before_it_was_made() {
    const MADE: i64 = 1_790_000_000;
    let directory = private_directory();
    let store = Store::open(directory.path()).unwrap();
    store.enrol(&record("one")).unwrap();
    let grant = Grant { volume: record("one").id, domain: "db".to_owned(), expires_at: MADE + 3600, created_at: MADE };
    store.grant(&grant).unwrap();
    let db = Facts { name: "db".to_owned(), uuid: None, owner: None };
    let holds_at = |now| store.is_granted(&grant.volume, &db, now).unwrap();
    for now in [MADE - 300, MADE, MADE + 3599] {
        assert!(holds_at(now), "{now}: clocks are corrected a little");
    }
    for now in [i64::MIN, -1, 0, MADE - 301, MADE + 3600, i64::MAX] {
        assert!(!holds_at(now), "{now}");
    }
}

#[test]
fn the_tables_refuse_what_makes_no_sense() {
    let directory = private_directory();
    let store = Store::open(directory.path()).unwrap();
    store.enrol(&record("one")).unwrap();
    for change in [
        "id = '../one'",
        "id = ''",
        "lun = -1",
        "lun = 'x'",
        "size_bytes = 0",
        "key_size = 192",
        "sector_size = 513",
        "check_value = 'x'",
        "cipher = ''",
        "profile = NULL",
        "key_id = ''",
        "key_id = '../one'",
        "key_version = 0",
        "key_version = 4294967296",
        "key_version = NULL",
    ] {
        assert!(store.connection().execute_batch(&format!("UPDATE volumes SET {change}")).is_err(), "{change}");
    }
    let too_large = VolumeRecord { size_bytes: u64::MAX, ..record("two") };
    assert!(refused(store.enrol(&too_large)).contains("size_bytes"));
    // A volume of which nobody says which key it has gets none.
    for id in ["NULL", "'-one'"] {
        store.connection().execute_batch(&format!("UPDATE volumes SET key_id = {id}")).unwrap();
        assert!(refused(store.volume(&record("one").id)).contains("the record of volume \"one\" cannot be understood"));
    }
}

#[test]
fn a_record_names_a_key_and_a_key_the_volumes_that_have_it() {
    let directory = private_directory();
    let store = Store::open(directory.path()).unwrap();
    let foreign = KeyHandle { id: "a-key-of-another".parse().unwrap(), version: 1 };
    let with = |name: &str, key: &KeyHandle| VolumeRecord { key: key.clone(), ..record(name) };
    let second = KeyHandle::of(&record("one").id, 2);
    for record in [with("one", &second), with("two", &foreign), with("three", &foreign), with("four", &foreign)] {
        store.enrol(&record).unwrap();
        assert_eq!(store.volume(&record.id).unwrap(), Some(record));
    }
    let destroyed = VolumeState::Destroyed;
    store.change_state(&record("four").id, &[VolumeState::Enrolled], destroyed, None).unwrap();
    store.change_state(&record("two").id, &[VolumeState::Enrolled], VolumeState::Retired, None).unwrap();
    let with = |key: &KeyHandle| store.volumes_with(key).unwrap().into_iter().map(String::from).collect::<Vec<_>>();
    assert_eq!(with(&second), ["one"]);
    assert_eq!(with(&foreign), ["three", "two"]);
    assert_eq!(with(&record("one").key), [""; 0], "the first one is nobody's any more");
}

#[test]
fn a_secret_of_another_programs_is_one_volumes_key() {
    let directory = private_directory();
    let store = Store::open(directory.path()).unwrap();
    let secret: SecretId = "0b1f7c1e-1111-4222-8333-444455556666".parse().unwrap();
    let hashed = ForeignKey::hashed(secret.clone(), PassphraseHash::Sha256, record("one").key_size);
    let with = |name: &str, key: KeyHandle| VolumeRecord { key, ..record(name) };
    let one = with("one", hashed.handle());
    store.enrol(&one).unwrap();
    store.enrol(&one).unwrap();
    store.enrol(&record("own")).unwrap();
    for state in [VolumeState::Enrolled, VolumeState::Retired] {
        for key in [hashed.handle(), ForeignKey::itself(secret.clone()).handle()] {
            let refusal = store.enrol(&with("two", key)).unwrap_err();
            assert_eq!(refusal.reason(), Reason::WrongKey);
            assert!(refusal.to_string().contains("is the key of volume one"), "{state}: {refusal}");
        }
        assert_eq!(store.foreign_keys().unwrap(), [(one.id.clone(), hashed.clone())]);
        store.change_state(&one.id, &[VolumeState::Enrolled], VolumeState::Retired, None).unwrap();
    }
    store.change_state(&one.id, &[VolumeState::Retired], VolumeState::Destroyed, None).unwrap();
    assert!(store.foreign_keys().unwrap().is_empty());
    store.enrol(&with("two", hashed.handle())).unwrap();
}

#[test]
fn two_handles_see_each_others_records() {
    let directory = private_directory();
    let (one, other) = (Store::open(directory.path()).unwrap(), Store::open(directory.path()).unwrap());
    one.enrol(&record("one")).unwrap();
    other.enrol(&record("two")).unwrap();
    assert_eq!(names(&one), ["one", "two"]);
    assert_eq!(names(&other), ["one", "two"]);
    assert!(other.enrol(&VolumeRecord { size_bytes: 512, ..record("one") }).is_err());
}

#[test]
fn a_power_cut_loses_nothing_that_was_confirmed() {
    let directory = private_directory();
    let store = Store::open(directory.path()).unwrap();
    let _reader = store.keep_log();
    let mut cuts = Vec::new();
    for number in 0..5 {
        store.enrol(&record(&format!("volume-{number}"))).unwrap();
        cuts.push(after_power_cut(directory.path()));
    }
    for (number, cut) in cuts.iter().enumerate() {
        assert_eq!(names(&Store::open(cut.path()).unwrap()).len(), number + 1);
    }
}

#[test]
fn a_torn_log_leaves_whole_records_only() {
    let directory = private_directory();
    let store = Store::open(directory.path()).unwrap();
    // The tables are merged already, so only records are torn.
    let _reader = store.keep_log();
    let expected: Vec<_> = (0..3).map(|number| record(&format!("volume-{number}"))).collect();
    for record in &expected {
        store.enrol(record).unwrap();
    }
    let length = fs::metadata(directory.path().join("volcrypt.db-wal")).unwrap().len();
    assert!(length > 0);
    for cut in (0..=length).step_by(1021) {
        let copy = after_power_cut(directory.path());
        let log = fs::OpenOptions::new().write(true).open(copy.path().join("volcrypt.db-wal")).unwrap();
        log.set_len(cut).unwrap();
        let found = Store::open(copy.path()).unwrap().volumes().unwrap();
        assert_eq!(found, expected[..found.len()]);
    }
}

#[test]
fn a_read_only_database_is_read_and_not_written() {
    let directory = private_directory();
    Store::open(directory.path()).unwrap().enrol(&record("one")).unwrap();
    let before = contents(directory.path());
    let store = Store::open_for_reading(directory.path()).unwrap();
    assert!(store.is_read_only().unwrap());
    assert_eq!(store.volumes().unwrap(), [record("one")]);
    for sentence in [refused(store.enrol(&record("two"))), refused(store.set_owner(&record("one").id, None))] {
        assert!(sentence.contains("volcrypt.db is read-only") && sentence.contains("mounted writable"), "{sentence}");
    }
    assert!(contents(directory.path()) == before);
}

#[test]
fn a_log_that_cannot_be_merged_is_not_passed_over() {
    let directory = private_directory();
    let store = Store::open(directory.path()).unwrap();
    let reader = store.keep_log();
    store.enrol(&record("one")).unwrap();
    drop(reader);
    let copy = after_power_cut(directory.path());
    assert!(refused(Store::open_for_reading(copy.path())).contains("volcrypt.db-wal holds changes"));
    fs::write(copy.path().join("volcrypt.db-wal"), b"").unwrap();
    assert_eq!(names(&Store::open_for_reading(copy.path()).unwrap()), [] as [&str; 0], "an empty log holds none");
}

#[test]
fn the_file_alone_is_the_whole_database() {
    let directory = private_directory();
    let store = Store::open(directory.path()).unwrap();
    store.enrol(&record("one")).unwrap();
    store.enrol(&record("two")).unwrap();
    store.set_owner(&record("two").id, Some("p1")).unwrap();
    let backup = private_directory();
    fs::copy(directory.path().join("volcrypt.db"), backup.path().join("volcrypt.db")).unwrap();
    let copied = Store::open(backup.path()).unwrap().volumes().unwrap();
    assert_eq!(copied, [record("one"), VolumeRecord { owner: Some("p1".to_owned()), ..record("two") }]);
}

#[test]
fn nothing_is_written_to_a_file_that_was_replaced() {
    let directory = private_directory();
    let store = Store::open(directory.path()).unwrap();
    store.enrol(&record("one")).unwrap();
    let (file, backup) = (directory.path().join("volcrypt.db"), directory.path().join("backup"));
    fs::copy(&file, &backup).unwrap();
    fs::rename(&backup, &file).unwrap();
    assert!(refused(store.enrol(&record("two"))).contains("was replaced"));
    assert!(refused(store.set_owner(&record("one").id, None)).contains("was replaced"));
}

#[test]
fn a_path_with_odd_characters_is_opened_for_reading_too() {
    let parent = private_directory();
    let directory = parent.path().join("a b?c#d%41é");
    fs::create_dir(&directory).unwrap();
    fs::set_permissions(&directory, Permissions::from_mode(0o700)).unwrap();
    Store::open(&directory).unwrap().enrol(&record("one")).unwrap();
    assert_eq!(names(&Store::open_for_reading(&directory).unwrap()), ["one"]);
}

#[test]
fn a_full_disk_is_named_and_harms_no_record() {
    let directory = private_directory();
    let store = Store::open(directory.path()).unwrap();
    store.fill_disk(true);
    let mut enrolled = Vec::new();
    let sentence = loop {
        let name = format!("volume-{:04}", enrolled.len());
        match store.enrol(&record(&name)) {
            Ok(()) => enrolled.push(name),
            Err(refusal) => break refused::<()>(Err(refusal)),
        }
    };
    assert!(sentence.contains("disk is full") && sentence.contains("volcrypt.db"), "{sentence}");
    assert_eq!(names(&store), enrolled);
    store.fill_disk(false);
    store.enrol(&record("after")).unwrap();
}

#[test]
fn a_held_database_is_named() {
    let directory = private_directory();
    let (store, other) = (Store::open(directory.path()).unwrap(), Store::open(directory.path()).unwrap());
    store.connection().busy_timeout(Duration::from_millis(20)).unwrap();
    let mut holder = other.connection();
    let _held = holder.transaction_with_behavior(TransactionBehavior::Immediate).unwrap();
    assert!(refused(store.enrol(&record("one"))).contains("held by another process"));
    assert_eq!(names(&store), [""; 0], "readers do not wait");
}

#[test]
fn every_failure_has_a_sentence_of_its_own() {
    let path = Path::new("/var/lib/volcrypt/volcrypt.db");
    let codes = [
        ffi::SQLITE_FULL,
        ffi::SQLITE_READONLY,
        ffi::SQLITE_BUSY,
        ffi::SQLITE_IOERR_FSYNC,
        ffi::SQLITE_CORRUPT,
        ffi::SQLITE_NOTADB,
        ffi::SQLITE_CANTOPEN,
        ffi::SQLITE_INTERNAL,
    ];
    let sentences: std::collections::BTreeSet<_> = codes
        .into_iter()
        .map(|code| {
            refused::<()>(Err(fault::refusal(path, &rusqlite::Error::SqliteFailure(ffi::Error::new(code), None))))
        })
        .collect();
    assert_eq!(sentences.len(), codes.len());
    assert!(sentences.iter().all(|sentence| sentence.contains("/var/lib/volcrypt/volcrypt.db")));
}
