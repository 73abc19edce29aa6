use super::*;

#[test]
fn a_new_database_is_private_and_durable() {
    let directory = private_directory();
    let store = Store::open(directory.path()).unwrap();
    store.enrol(&record("one")).unwrap();
    for name in ["volcrypt.db", "volcrypt.db-wal", "volcrypt.db-shm"] {
        let metadata = fs::metadata(directory.path().join(name)).unwrap();
        assert_eq!(metadata.mode() & 0o7777, 0o600, "{name}");
    }
    let pragma = |name: &str| -> String {
        let value = store.connection().pragma_query_value(None, name, |row| row.get::<_, rusqlite::types::Value>(0));
        format!("{:?}", value.unwrap())
    };
    assert_eq!(pragma("journal_mode"), r#"Text("wal")"#);
    for (name, value) in [("synchronous", 2), ("foreign_keys", 1), ("secure_delete", 1), ("trusted_schema", 0)] {
        assert_eq!(pragma(name), format!("Integer({value})"), "{name}");
    }
    assert_eq!(pragma("busy_timeout"), format!("Integer({})", BUSY_TIMEOUT.as_millis()));
    assert!(!store.is_read_only().unwrap());
}

#[test]
fn a_database_that_was_closed_before_the_disk_was_full_is_opened_and_read_and_written_once_there_is_space() {
    let directory = private_directory();
    let disk = SmallDisk::new(directory.path());
    Store::open(directory.path()).unwrap().enrol(&record("one")).unwrap();
    disk.fill();
    let store = Store::open(directory.path()).unwrap();
    assert_eq!(names(&store), ["one"]);
    let sentence = refused(store.enrol(&record("two")));
    assert!(sentence.contains("disk is full: free some space"), "{sentence}");
    assert_eq!(store.volume(&record("one").id).unwrap(), Some(record("one")));
    // Another writer would not be seen, and none gets at it.
    let copy = private_directory();
    assert!(refused(back_up(directory.path(), &copy.path().join("copy"))).contains("held by another process"));

    disk.free();
    store.enrol(&record("two")).unwrap();
    assert_eq!(names(&store), ["one", "two"]);
    drop(store);
    assert_eq!(names(&Store::open(directory.path()).unwrap()), ["one", "two"]);
}

#[test]
fn what_is_in_the_log_alone_is_read_on_a_full_disk_and_stays() {
    let (directory, small) = (private_directory(), private_directory());
    let store = Store::open(directory.path()).unwrap();
    let reader = store.keep_log();
    store.enrol(&record("in-the-log")).unwrap();
    let disk = SmallDisk::new(small.path());
    for name in ["volcrypt.db", "volcrypt.db-wal"] {
        fs::copy(directory.path().join(name), small.path().join(name)).unwrap();
    }
    drop((reader, store));
    disk.fill();
    for _ in 0..2 {
        assert_eq!(names(&Store::open(small.path()).unwrap()), ["in-the-log"]);
    }
}

#[test]
fn a_new_database_on_a_full_disk_is_refused_with_that() {
    let directory = private_directory();
    let disk = SmallDisk::new(directory.path());
    disk.fill();
    let sentence = refused(Store::open(directory.path()));
    assert!(sentence.contains("disk is full: free some space"), "{sentence}");
}

#[test]
fn a_restore_that_was_broken_off_leaves_the_database_with_its_log_and_one_name() {
    let (directory, copy) = (private_directory(), private_directory());
    let store = Store::open(directory.path()).unwrap();
    let reader = store.keep_log();
    store.enrol(&record("in-the-log")).unwrap();
    // As a power cut leaves it before the backup has the database's name.
    let path = |name: &str| copy.path().join(name);
    fs::copy(directory.path().join("volcrypt.db"), path("volcrypt.db")).unwrap();
    fs::hard_link(path("volcrypt.db"), path("volcrypt.db.replaced-x")).unwrap();
    fs::copy(directory.path().join("volcrypt.db-wal"), path("volcrypt.db.replaced-x-wal")).unwrap();
    // Another restore came to its end.
    fs::write(path("volcrypt.db.replaced-earlier"), "other").unwrap();
    drop(reader);
    {
        // A restore that is under way looks after its names itself.
        let turn = fs::File::open(copy.path()).unwrap();
        rustix::fs::flock(&turn, rustix::fs::FlockOperation::LockExclusive).unwrap();
        restore::recover(&path("volcrypt.db")).unwrap();
        assert!(path("volcrypt.db.replaced-x").exists());
    }
    let store = Store::open(copy.path()).unwrap();
    assert_eq!(store.volumes().unwrap().len(), 1, "what is in the log alone is missed");
    drop(store);
    assert!(contents(copy.path()).keys().eq(["volcrypt.db", "volcrypt.db.replaced-earlier"]));
}

#[test]
fn a_restore_that_was_broken_off_leaves_the_database_its_journal() {
    let directory = private_directory();
    drop(Store::open(directory.path()).unwrap());
    let path = |name: &str| directory.path().join(name);
    fs::hard_link(path("volcrypt.db"), path("volcrypt.db.replaced-x")).unwrap();
    fs::write(path("volcrypt.db.replaced-x-journal"), "a journal").unwrap();
    // One whose database was not there is no affair of this one.
    fs::write(path("volcrypt.db.replaced-y-wal"), "another's").unwrap();
    restore::recover(&path("volcrypt.db")).unwrap();
    let left = contents(directory.path());
    assert!(left.keys().eq(["volcrypt.db", "volcrypt.db-journal", "volcrypt.db.replaced-y-wal"]), "{:?}", left.keys());
    assert_eq!(left["volcrypt.db-journal"], b"a journal");
}

#[test]
fn a_log_without_its_database_is_refused_and_kept() {
    let directory = private_directory();
    let store = Store::open(directory.path()).unwrap();
    let _reader = store.keep_log();
    store.enrol(&record("in-the-log")).unwrap();
    let (copy, away) = (after_power_cut(directory.path()), private_directory());
    let (database, moved) = (copy.path().join("volcrypt.db"), away.path().join("moved"));
    fs::rename(&database, &moved).unwrap();
    refused_untouched(copy.path(), "volcrypt.db-wal has the last changes of ");
    assert!(!database.exists());
    assert!(Store::is_in(copy.path()) && !Store::is_in(away.path()));
    fs::rename(&moved, &database).unwrap();
    assert_eq!(names(&Store::open(copy.path()).unwrap()), ["in-the-log"]);
}

#[test]
fn a_journal_without_its_database_is_refused_and_kept() {
    let (directory, copy) = (private_directory(), private_directory());
    // As a process leaves it that was killed amid a transaction.
    let other = Connection::open(directory.path().join("other.db")).unwrap();
    other
        .execute_batch(
            "CREATE TABLE t (a); WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 300)
             INSERT INTO t SELECT zeroblob(4000) FROM n; PRAGMA cache_size = 1; BEGIN; UPDATE t SET a = zeroblob(4001)",
        )
        .unwrap();
    let journal = copy.path().join("volcrypt.db-journal");
    fs::copy(directory.path().join("other.db-journal"), &journal).unwrap();
    refused_untouched(copy.path(), "volcrypt.db-journal has the last changes of ");
    assert!(!copy.path().join("volcrypt.db").exists());
    // An empty one has nothing.
    fs::write(&journal, "").unwrap();
    assert_eq!(names(&Store::open(copy.path()).unwrap()), [] as [&str; 0]);
}

#[test]
fn where_a_restore_without_a_database_was_broken_off_none_is_made() {
    let (directory, backup) = (private_directory(), private_directory());
    Store::open(backup.path()).unwrap().enrol(&record("one")).unwrap();
    let staged = Staged::new(&backup.path().join("volcrypt.db"), directory.path()).unwrap();
    let sentence = refused(Store::open(directory.path()));
    assert!(
        sentence.contains("a restore of it is under way or was broken off: run 'volcrypt key restore'"),
        "{sentence}"
    );
    assert!(!directory.path().join("volcrypt.db").exists());
    assert!(Store::is_in(directory.path()), "what is enrolled is not told yet");
    staged.put_in_place("now").unwrap();
    assert_eq!(names(&Store::open(directory.path()).unwrap()), ["one"]);
}

#[test]
fn a_database_that_is_gone_is_told_from_one_that_was_replaced() {
    let (directory, away) = (private_directory(), private_directory());
    let store = Store::open(directory.path()).unwrap();
    let (path, moved) = (directory.path().join("volcrypt.db"), away.path().join("moved"));
    fs::rename(&path, &moved).unwrap();
    let sentence = refused(store.enrol(&record("one")));
    assert!(sentence.contains("volcrypt.db is gone"), "{sentence}");
    assert!(sentence.contains("do not restart volcryptd before"), "{sentence}");
    fs::copy(&moved, &path).unwrap();
    let sentence = refused(store.enrol(&record("one")));
    assert!(sentence.contains("was replaced while volcryptd had it open"), "{sentence}");
    fs::rename(&moved, &path).unwrap();
    store.enrol(&record("one")).unwrap();
}

#[test]
fn a_directory_or_file_that_others_can_enter_is_refused() {
    let directory = private_directory();
    for mode in [0o755, 0o701, 0o770, 0o702] {
        fs::set_permissions(directory.path(), Permissions::from_mode(mode)).unwrap();
        assert!(refused(Store::open(directory.path())).contains("chmod 0700"), "{mode:o}");
        assert!(contents(directory.path()).is_empty());
    }
    fs::set_permissions(directory.path(), Permissions::from_mode(0o750)).unwrap();
    drop(Store::open(directory.path()).unwrap());
    for mode in [0o640, 0o604, 0o620] {
        fs::set_permissions(directory.path().join("volcrypt.db"), Permissions::from_mode(mode)).unwrap();
        assert!(refused(Store::open(directory.path())).contains("chmod 0600"), "{mode:o}");
    }
}

#[test]
fn what_belongs_to_somebody_else_is_refused() {
    let directory = private_directory();
    drop(Store::open(directory.path()).unwrap());
    for path in [directory.path().join("volcrypt.db"), directory.path().to_owned()] {
        std::os::unix::fs::chown(&path, Some(65534), None).expect("only root can give a file away");
        assert!(refused(Store::open(directory.path())).contains("belongs to user 65534"));
        std::os::unix::fs::chown(&path, Some(0), None).unwrap();
    }
    drop(Store::open(directory.path()).unwrap());
}

#[test]
fn what_is_no_database_file_is_refused() {
    let directory = private_directory();
    let missing = directory.path().join("missing");
    assert!(refused(Store::open(&missing)).contains(missing.to_str().unwrap()));
    let elsewhere = private_directory();
    drop(Store::open(elsewhere.path()).unwrap());
    symlink(elsewhere.path().join("volcrypt.db"), directory.path().join("volcrypt.db")).unwrap();
    assert!(refused(Store::open(directory.path())).contains("not a regular file"));
    assert!(refused(Store::open(&directory.path().join("volcrypt.db"))).contains("not a directory"));
}

/// Refused with a sentence that contains `expected`, and not a byte is changed.
fn refused_untouched(directory: &Path, expected: &str) {
    let before = contents(directory);
    let sentence = refused(Store::open(directory));
    assert!(sentence.contains(expected), "{sentence}");
    let mut after = contents(directory);
    // The shared-memory file only says who looked.
    after.remove("volcrypt.db-shm");
    let mut before = before;
    before.remove("volcrypt.db-shm");
    after.retain(|name, content| before.contains_key(name) || !content.is_empty());
    assert!(before == after, "a refused database was changed: {:?}", after.keys());
}

#[test]
fn a_file_that_is_no_database_is_refused_and_kept() {
    let directory = private_directory();
    let path = directory.path().join("volcrypt.db");
    fs::write(&path, "my notes ".repeat(1000)).unwrap();
    fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
    refused_untouched(directory.path(), "not a database");
    refused_untouched(directory.path(), "run 'volcrypt key restore' with a backup, which keeps this file beside it");
}

#[test]
fn another_programs_database_is_refused_and_kept() {
    for mark in ["PRAGMA application_id = 7", "PRAGMA user_version = 1", "CREATE TABLE notes (text)"] {
        let directory = private_directory();
        let path = directory.path().join("volcrypt.db");
        Connection::open(&path).unwrap().execute_batch(mark).unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
        refused_untouched(directory.path(), "another program");
    }
}

#[test]
fn a_newer_database_is_refused_and_kept() {
    let directory = private_directory();
    let store = Store::open(directory.path()).unwrap();
    store.enrol(&record("one")).unwrap();
    store.connection().execute_batch("PRAGMA user_version = 99").unwrap();
    // With a log left behind, which opening and closing must not merge.
    let copy = after_power_cut(directory.path());
    assert!(!fs::read(copy.path().join("volcrypt.db-wal")).unwrap().is_empty());
    refused_untouched(copy.path(), "newer volcrypt (version 99");
    store.connection().execute_batch("PRAGMA user_version = -1").unwrap();
    drop(store);
    refused_untouched(directory.path(), "newer volcrypt");
}

#[test]
fn a_damaged_database_is_refused_and_kept() {
    let directory = private_directory();
    let store = Store::open(directory.path()).unwrap();
    for number in 0..100 {
        store.enrol(&record(&format!("volume-{number}"))).unwrap();
    }
    drop(store);
    let path = directory.path().join("volcrypt.db");
    let sound = fs::read(&path).unwrap();
    // Every page after the first, wiped one at a time.
    let mut pages_of_the_log = 0;
    for page in 1..sound.len() / 4096 {
        let mut damaged = sound.clone();
        damaged[page * 4096..(page + 1) * 4096].fill(0xa5);
        fs::write(&path, &damaged).unwrap();
        match Store::open(directory.path()) {
            Err(_) => refused_untouched(directory.path(), "is damaged"),
            // The audit log is checked when it is asked for; volumes are found all the same.
            Ok(store) => {
                assert!(refused(store.verify_audit(Default::default())).contains("is damaged"));
                assert_eq!(names(&store).len(), 100);
                pages_of_the_log += 1;
            }
        }
    }
    let pages = sound.len() / 4096;
    assert!((10..pages / 2).contains(&pages_of_the_log), "{pages_of_the_log} of {pages}");
    fs::write(&path, &sound[..sound.len() / 2]).unwrap();
    refused_untouched(directory.path(), "is damaged");
    fs::write(&path, &sound).unwrap();
    assert_eq!(names(&Store::open(directory.path()).unwrap()).len(), 100);
}

const NOTES: Migration = "ALTER TABLE volumes ADD COLUMN note TEXT; SELECT 1;";
const BROKEN: Migration = "ALTER TABLE volumes ADD COLUMN note TEXT; CREATE TABLE volumes (a);";

/// The steps there are, and one more.
fn and_then(step: Migration) -> Vec<Migration> {
    [schema::MIGRATIONS, &[step]].concat()
}

#[test]
fn an_older_database_is_brought_forward_with_its_records() {
    let directory = private_directory();
    Store::open(directory.path()).unwrap().enrol(&record("one")).unwrap();
    let store = Store::open_with(directory.path(), &and_then(NOTES)).unwrap();
    assert_eq!(schema::version(&store.connection()).unwrap(), schema::MIGRATIONS.len() + 1);
    store.connection().execute_batch("UPDATE volumes SET note = 'kept'").unwrap();
    assert_eq!(store.volume(&record("one").id).unwrap(), Some(record("one")));
    drop(store);
    drop(Store::open_with(directory.path(), &and_then(NOTES)).unwrap());
    assert!(refused(Store::open(directory.path())).contains("newer"), "and there is no way back");
}

#[test]
fn a_step_that_fails_changes_nothing() {
    let directory = private_directory();
    Store::open(directory.path()).unwrap().enrol(&record("one")).unwrap();
    refused(Store::open_with(directory.path(), &and_then(BROKEN)));
    let store = Store::open(directory.path()).unwrap();
    assert_eq!(schema::version(&store.connection()).unwrap(), schema::MIGRATIONS.len());
    assert!(store.connection().prepare("SELECT note FROM volumes").is_err());
    assert_eq!(names(&store), ["one"]);
}

#[test]
fn an_older_database_that_cannot_be_written_is_refused() {
    let directory = private_directory();
    drop(Store::open(directory.path()).unwrap());
    let path = directory.path().join("volcrypt.db");
    assert!(refused(connect_for_reading(&path, &and_then(NOTES))).contains("must be brought to version"));
}

#[test]
fn threads_that_open_a_new_database_at_once_all_succeed() {
    for _ in 0..10 {
        let directory = private_directory();
        thread::scope(|scope| {
            let threads: Vec<_> = (0..8)
                .map(|number| {
                    let directory = directory.path();
                    scope.spawn(move || Store::open(directory)?.enrol(&record(&format!("volume-{number}"))))
                })
                .collect();
            for thread in threads {
                assert_eq!(thread.join().unwrap(), Ok(()));
            }
        });
        assert_eq!(names(&Store::open(directory.path()).unwrap()).len(), 8);
    }
}

#[test]
fn a_database_of_the_first_version_keeps_its_volumes_and_keys() {
    let directory = private_directory();
    let store = Store::open_with(directory.path(), &schema::MIGRATIONS[..1]).unwrap();
    let rows = "INSERT INTO volumes VALUES ('one', 'iqn.2026-11.org.lab:one', 1, 'naa.one', 1073741824, 'default',
                    'plain', 'aes-xts-plain64', 512, 4096, '00112233445566778899aabbccddeeff', 1790000000);
                INSERT INTO keys VALUES ('one', 1, 512, x'0102', 5, NULL);";
    store.connection().execute_batch(rows).unwrap();
    drop(store);
    let store = Store::open(directory.path()).unwrap();
    assert_eq!(store.volumes().unwrap(), [record("one")]);
    let key = store.wrapped_key(&record("one").id).unwrap().unwrap();
    assert_eq!((key.wrapped.unwrap(), key.info.created_at), (vec![1, 2], 5));
    assert_eq!(store.verify_audit(Default::default()).unwrap().end.seq, 0);
    assert_eq!(store.set_owner(&record("one").id, None), Ok(true));
    assert_eq!(store.verify_audit(Default::default()).unwrap().end.seq, 1);
}

/// The rows of each table, without those of SQLite's own.
fn rows(store: &Store) -> BTreeMap<String, Vec<Vec<rusqlite::types::Value>>> {
    let connection = store.connection();
    let query = "SELECT name FROM sqlite_schema WHERE type = 'table' AND name NOT LIKE 'sqlite_%'";
    let mut names = connection.prepare(query).unwrap();
    let names: Vec<String> = names.query_map([], |row| row.get(0)).unwrap().map(Result::unwrap).collect();
    let all = |name: &String| {
        let mut statement = connection.prepare(&format!("SELECT * FROM {name} ORDER BY 1, 2")).unwrap();
        let columns = statement.column_count();
        let rows = statement.query_map([], |row| (0..columns).map(|column| row.get(column)).collect()).unwrap();
        rows.map(Result::unwrap).collect()
    };
    names.iter().map(|name| (name.clone(), all(name))).collect()
}

#[test]
fn what_was_enrolled_before_keys_had_names_has_the_first_key_of_its_volume_and_nothing_else_changes() {
    let directory = private_directory();
    let older = &schema::MIGRATIONS[..6];
    let store = Store::open_with(directory.path(), older).unwrap();
    let check_value = "00112233445566778899aabbccddeeff";
    store
        .connection()
        .execute_batch(&format!(
            "INSERT INTO keks VALUES ('{check_value}', 'current', 5);
             INSERT INTO volumes VALUES ('one', 'iqn.2026-11.org.lab:one', 1, 'naa.one', 1073741824, 'default', 'plain',
                     'aes-xts-plain64', 512, 4096, '{check_value}', 1790000000, 'enrolled', NULL, NULL),
                 ('two.b_c-d', NULL, NULL, NULL, 512, 'p', 'plain', 'aes-xts-plain64', 256, 512, '{check_value}', 7,
                     'retired', 'p1', 'LVM-x'),
                 ('three', NULL, NULL, 'naa.3', 512, 'p', 'plain', 'aes-xts-plain64', 256, 512, '{check_value}', 7,
                     'destroyed', NULL, NULL);
             INSERT INTO grants VALUES ('one', 'web', 8, 7);
             INSERT INTO keys VALUES ('one', 1, 512, x'0102', 5, NULL, '{check_value}'), ('three', 1, 256, NULL, 5, 6, NULL);
             INSERT INTO key_cache VALUES ('one', hex(zeroblob(32)), 512, x'0304', '{check_value}', 9);
             INSERT INTO key_moves VALUES ('one', 'embedded', 'kmip', 'copied', 9);
             INSERT INTO key_uses VALUES ('one', 9);
             INSERT INTO meta VALUES ('key_cache_seen_at', '9');"
        ))
        .unwrap();
    store.append_audit(crate::audit::Event::of_the_host(crate::audit::Kind::KekRotated, "x")).unwrap();
    let before = rows(&store);
    drop(store);

    let store = Store::open(directory.path()).unwrap();
    let mut after = rows(&store);
    for (table, named) in [("volumes", 0), ("key_cache", 0)] {
        for row in after.get_mut(table).unwrap() {
            let (version, id) = (row.pop().unwrap(), row.pop().unwrap());
            assert_eq!((&id, version), (&row[named], 1.into()), "{table}");
        }
    }
    assert!(before.values().all(|rows| !rows.is_empty()), "{before:?}");
    assert_eq!(after, before);
    let records = store.volumes().unwrap();
    assert!(records.iter().all(|record| record.key == KeyHandle::first(&record.id)));
    assert_eq!(records[0], record("one"));
    let kept = store.cached_key(&record("one").id).unwrap().unwrap();
    assert_eq!((kept.key, kept.wrapped), (record("one").key, vec![3, 4]));
    drop(store);

    let newest = schema::MIGRATIONS.len();
    let sentence = refused(Store::open_with(directory.path(), older));
    assert!(sentence.contains(&format!("by a newer volcrypt (version {newest}, this one knows 6)")), "{sentence}");
    assert_eq!(Store::open(directory.path()).unwrap().volumes().unwrap(), records, "and it was left as it is");
}

#[test]
fn a_name_that_something_has_is_not_given_anew() {
    let directory = private_directory();
    let [from, to] = ["from", "to"].map(|name| directory.path().join(name));
    fs::write(&from, "new").unwrap();
    fs::write(&to, "precious").unwrap();
    assert_eq!(files::name_anew(&from, &to).unwrap_err().kind(), std::io::ErrorKind::AlreadyExists);
    assert_eq!(fs::read(&to).unwrap(), b"precious");
    fs::remove_file(&to).unwrap();
    files::name_anew(&from, &to).unwrap();
    assert_eq!(fs::read(&to).unwrap(), b"new");
}
