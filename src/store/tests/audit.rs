use std::sync::Arc;

use proptest::prelude::*;
use rusqlite::params;

use super::*;
use crate::audit::{Asker, Entry, Event, Hash, Kind, Link, Record, Role};
use crate::keys::EmbeddedKeyManager;

fn event(kind: Kind, volume: &str) -> Event {
    Event::new(kind, &volume.parse().unwrap(), "some detail")
}

/// A store whose log has `number` records.
fn store_with(directory: &TempDir, number: usize) -> Store {
    let store = Store::open(directory.path()).unwrap();
    for _ in 0..number {
        store.append_audit(event(Kind::KeyUsed, "one")).unwrap();
    }
    store
}

/// Everything that `query` finds, the newest first.
fn found(store: &Store, mut query: AuditQuery) -> Vec<Record> {
    let mut records = Vec::new();
    loop {
        let page = store.audit(&query).unwrap();
        records.extend(page.entries.into_iter().map(|entry| match entry {
            Entry::Record { record, .. } => *record,
            Entry::Damaged { seq, .. } => panic!("record {seq} is damaged"),
        }));
        match page.before {
            Some(_) => query.before = page.before,
            None => return records,
        }
    }
}

/// Where the chain ends, and what is wrong there.
fn verified(store: &Store) -> (i64, Option<String>) {
    let mut from = Link::default();
    loop {
        let Verified { end, broken, complete } = store.verify_audit(from).unwrap();
        if complete || broken.is_some() {
            return (end.seq, broken);
        }
        from = end;
    }
}

/// What verifying says after `change`, which somebody makes who stops at nothing; it is taken back.
fn said_after(store: &Store, change: impl FnOnce(&Connection)) -> String {
    let begin = "BEGIN; DROP TRIGGER audit_is_not_changed; DROP TRIGGER audit_is_not_shortened;
                 DROP TRIGGER audit_has_no_gap;";
    store.connection().execute_batch("PRAGMA ignore_check_constraints = ON").unwrap();
    store.connection().execute_batch(begin).unwrap();
    change(&store.connection());
    let (end, broken) = verified(store);
    store.connection().execute_batch("ROLLBACK; PRAGMA ignore_check_constraints = OFF").unwrap();
    broken.unwrap_or_else(|| format!("nothing is wrong with {end} records"))
}

#[test]
fn records_are_a_chain_that_sha256sum_can_follow() {
    let directory = private_directory();
    let store = store_with(&directory, 2);
    let end = Asker::hook("vm", Some("0b1f")).ask(|| store.append_audit(event(Kind::Enrolled, "two"))).unwrap();
    let rows: Vec<(String, String)> = store
        .connection()
        .prepare("SELECT record, hash FROM audit ORDER BY seq")
        .unwrap()
        .query_map([], |row| Ok((row.get(0)?, row.get(1)?)))
        .unwrap()
        .collect::<Result<_, _>>()
        .unwrap();
    let (start, rest) = rows[2].0.split_once(",\"kind\"").unwrap();
    assert!(start.starts_with("{\"v\":1,\"seq\":3,\"time\":"), "{start}");
    assert_eq!(
        rest,
        format!(
            ":\"enrolled\",\"volume\":\"two\",\"domain\":\"vm\",\"domain_uuid\":\"0b1f\",\"by\":\"hook\",\"outcome\":\"done\",\
             \"detail\":\"some detail\",\"previous\":\"{}\"}}",
            rows[1].1
        )
    );
    assert!(rows[0].0.ends_with(&format!("\"previous\":\"{}\"}}", "0".repeat(64))));
    for (record, hash) in &rows {
        assert_eq!(Hash::of(record.as_bytes()).to_string(), *hash);
    }
    assert_eq!((end.seq, end.hash.to_string()), (3, rows[2].1.clone()));
    assert_eq!(verified(&store), (3, None));
}

#[test]
fn records_are_found_by_volume_kind_and_time_the_newest_first() {
    let directory = private_directory();
    let store = store_with(&directory, 3);
    store.append_audit(event(Kind::OwnerChanged, "two")).unwrap();
    store.append_audit(event(Kind::KeyUsed, "two")).unwrap();
    let numbers = |query| found(&store, query).iter().map(|record| record.seq).collect::<Vec<_>>();
    let all = AuditQuery::default;
    assert_eq!(numbers(all()), [5, 4, 3, 2, 1]);
    assert_eq!(numbers(AuditQuery { before: Some(3), ..all() }), [2, 1]);
    assert_eq!(numbers(AuditQuery { volume: "two".parse().ok(), ..all() }), [5, 4]);
    assert_eq!(numbers(AuditQuery { volume: "two".parse().ok(), kind: Some(Kind::KeyUsed), ..all() }), [5]);
    let newest = found(&store, all())[0].time;
    assert_eq!(numbers(AuditQuery { since: Some(newest + 1), ..all() }), [0; 0]);
    assert_eq!(numbers(AuditQuery { since: Some(newest - 3600), ..all() }).len(), 5);
}

#[test]
fn a_long_log_is_read_and_verified_in_parts() {
    let directory = private_directory();
    let store = Store::open(directory.path()).unwrap();
    let mut link = Link::default();
    let connection = store.connection();
    connection.execute_batch("BEGIN").unwrap();
    for number in 0..2500 {
        let (record, next) = link.append(event(Kind::KeyUsed, if number == 7 { "old" } else { "one" }), 0).unwrap();
        let values = params![next.seq, record, next.hash.to_string()];
        connection.execute("INSERT INTO audit VALUES (?1, ?2, ?3)", values).unwrap();
        link = next;
    }
    connection.execute_batch("COMMIT").unwrap();
    drop(connection);
    assert!(!store.verify_audit(Link::default()).unwrap().complete);
    assert_eq!(verified(&store), (2500, None));
    let page = store.audit(&AuditQuery::default()).unwrap();
    assert_eq!((page.entries.len(), page.before), (1000, Some(1501)));
    assert_eq!(found(&store, AuditQuery { volume: "old".parse().ok(), ..AuditQuery::default() })[0].seq, 8);
    assert_eq!(found(&store, AuditQuery::default()).len(), 2500);
}

#[test]
fn a_page_of_long_records_is_short() {
    let directory = private_directory();
    let store = Store::open(directory.path()).unwrap();
    for _ in 0..60 {
        let long = Event { detail: "\0".repeat(10_000), ..event(Kind::Refused, "one") };
        store.append_audit(long).unwrap();
    }
    let page = store.audit(&AuditQuery::default()).unwrap();
    assert!(page.before.is_some() && serde_json::to_string(&page).unwrap().len() < 3 << 20);
    assert_eq!(found(&store, AuditQuery::default()).len(), 60);
    assert_eq!(verified(&store), (60, None));
}

#[test]
fn every_changed_byte_is_found_and_its_record_named() {
    let directory = private_directory();
    let store = store_with(&directory, 7);
    let (record, hash): (Vec<u8>, Vec<u8>) = store
        .connection()
        .query_row("SELECT CAST(record AS BLOB), CAST(hash AS BLOB) FROM audit WHERE seq = 5", [], |row| {
            Ok((row.get(0)?, row.get(1)?))
        })
        .unwrap();
    assert!(record.len() > 150 && hash.len() == 64);
    for (column, original) in [("record", record), ("hash", hash)] {
        for position in 0..original.len() {
            for bit in [0x01, 0x80] {
                let mut changed = original.clone();
                changed[position] ^= bit;
                let change = format!("UPDATE audit SET {column} = CAST(?1 AS TEXT) WHERE seq = 5");
                let said = said_after(&store, |connection| assert_eq!(connection.execute(&change, [&changed]), Ok(1)));
                assert!(said.starts_with("record 5 was changed: "), "{column}, byte {position}: {said}");
            }
        }
        let emptied = format!("UPDATE audit SET {column} = '' WHERE seq = 5");
        let said = said_after(&store, |connection| connection.execute_batch(&emptied).unwrap());
        assert!(said.starts_with("record 5 was changed: "), "{said}");
    }
    assert_eq!(verified(&store), (7, None));
}

#[test]
fn what_is_missing_moved_or_forged_is_named() {
    let directory = private_directory();
    let store = store_with(&directory, 7);
    let run = |sql: &'static str| said_after(&store, |connection| connection.execute_batch(sql).unwrap());
    assert_eq!(run("DELETE FROM audit WHERE seq = 4"), "record 4 is missing: record 5 comes in its place");
    assert_eq!(run("DELETE FROM audit WHERE seq < 4"), "record 1 is missing: record 4 comes in its place");
    assert_eq!(run("UPDATE audit SET seq = 9 WHERE seq = 4"), "record 4 is missing: record 5 comes in its place");
    assert_eq!(run("UPDATE audit SET seq = -4 WHERE seq = 4"), "record 1 is missing: record -4 comes in its place");
    let swapped =
        "UPDATE audit SET (record, hash) = (SELECT record, hash FROM audit AS other WHERE other.seq = 9 - audit.seq)
                   WHERE seq IN (4, 5)";
    assert!(run(swapped).starts_with("record 4 was changed: it is record 5 in another place"));
    let copied = "UPDATE audit SET (record, hash) = (SELECT record, hash FROM audit WHERE seq = 3) WHERE seq = 4";
    assert!(run(copied).starts_with("record 4 was changed: it is record 3 in another place"));
    let forged = said_after(&store, |connection| {
        let text: String =
            connection.query_row("SELECT record FROM audit WHERE seq = 4", [], |row| row.get(0)).unwrap();
        let text = text.replace("\"volume\":\"one\"", "\"volume\":\"two\"");
        let values = params![text, Hash::of(text.as_bytes()).to_string()];
        connection.execute("UPDATE audit SET record = ?1, hash = ?2 WHERE seq = 4", values).unwrap();
    });
    assert!(forged.starts_with("record 5 does not follow record 4: "), "{forged}");
    // What only the journal can tell.
    assert_eq!(run("DELETE FROM audit WHERE seq = 7"), "nothing is wrong with 6 records");
}

#[test]
fn damaged_records_are_shown_as_what_they_are() {
    let directory = private_directory();
    let store = store_with(&directory, 3);
    store
        .connection()
        .execute_batch("PRAGMA ignore_check_constraints = ON; DROP TRIGGER audit_is_not_changed")
        .unwrap();
    store.connection().execute_batch("UPDATE audit SET record = 'x' WHERE seq = 2").unwrap();
    let query = AuditQuery { volume: "other".parse().ok(), ..AuditQuery::default() };
    assert_eq!(store.audit(&query).unwrap().entries, [Entry::Damaged { seq: 2, damaged: "x".to_owned() }]);
    assert_eq!(verified(&store).0, 1);
    // The log goes on all the same.
    assert_eq!(store.append_audit(event(Kind::KeyUsed, "one")).unwrap().seq, 4);
}

#[test]
fn the_table_can_only_be_appended_to() {
    let directory = private_directory();
    let store = store_with(&directory, 3);
    let valid = format!("'{{\"seq\":4}}', '{}'", "0".repeat(64));
    for (sql, expected) in [
        ("UPDATE audit SET hash = hash".to_owned(), "can only be appended to"),
        ("DELETE FROM audit".to_owned(), "can only be appended to"),
        ("DELETE FROM audit WHERE seq = 3".to_owned(), "can only be appended to"),
        (format!("INSERT OR REPLACE INTO audit VALUES (3, {valid})"), "can only be appended to"),
        (format!("INSERT INTO audit VALUES (5, {valid})"), "can only be appended to"),
        (format!("INSERT INTO audit (record, hash) VALUES ({valid})"), "can only be appended to"),
        (format!("INSERT INTO audit VALUES (4, 'x', '{}')", "0".repeat(64)), "CHECK"),
        (format!("INSERT INTO audit VALUES (4, '{{\"seq\":5}}', '{}')", "0".repeat(64)), "CHECK"),
        (format!("INSERT INTO audit VALUES (4, '{{\"seq\":\n4}}', '{}')", "0".repeat(64)), "CHECK"),
        (format!("INSERT INTO audit VALUES (4, '{{\"seq\":4}}', '{}')", "0".repeat(63)), "CHECK"),
    ] {
        let error = store.connection().execute_batch(&sql).unwrap_err().to_string();
        assert!(error.contains(expected), "{sql}: {error}");
    }
    assert_eq!(verified(&store), (3, None));
    store.connection().execute_batch(&format!("INSERT INTO audit VALUES (4, {valid})")).unwrap();
    assert_eq!(verified(&store).0, 3, "what is no record is found");
}

#[test]
fn a_change_and_its_record_are_one() {
    let directory = private_directory();
    let store = Store::open(directory.path()).unwrap();
    store.enrol(&record("one")).unwrap();
    store.enrol(&record("one")).unwrap();
    assert!(store.enrol(&VolumeRecord { size_bytes: 512, ..record("one") }).is_err());
    Asker::operator(1, 0).ask(|| store.set_owner(&record("one").id, Some("p1"))).unwrap();
    assert_eq!(store.set_owner(&record("two").id, None), Ok(false));
    let records = found(&store, AuditQuery::default());
    let kinds: Vec<Kind> = records.iter().map(|record| record.event.kind).collect();
    assert_eq!(kinds, [Kind::OwnerChanged, Kind::Enrolled], "what changes nothing is no event");
    assert_eq!((records[0].event.asker.by, records[1].event.asker.by), (Role::Operator, Role::Daemon));
    assert_eq!(records[1].event.detail, "target iqn.2026-11.org.lab:one, LUN 1, WWID naa.one");

    let info = crate::keys::KeyInfo {
        volume: record("one").id,
        key: record("one").key,
        key_size: 512.try_into().unwrap(),
        created_at: 5,
        destroyed: false,
        hosts: Vec::new(),
    };
    let kek = store.tie_to_kek(record("one").check_value).unwrap();
    store.insert_key(&info, &[1, 2], kek).unwrap();
    for _ in 0..2 {
        assert_eq!(store.destroy_keys(&info.volume, 6), Ok(true));
    }
    let events: Vec<String> =
        found(&store, AuditQuery::default()).iter().map(|record| record.event.to_string()).collect();
    assert_eq!((events.len(), events[0].as_str()), (3, "destroyed, volume one, by daemon: done"));

    // Where the record cannot be written, nothing is changed.
    store.connection().execute_batch("DROP TRIGGER audit_has_no_gap").unwrap();
    let full = "CREATE TRIGGER full BEFORE INSERT ON audit BEGIN SELECT RAISE (ABORT, 'full'); END";
    store.connection().execute_batch(full).unwrap();
    assert!(store.enrol(&record("two")).is_err());
    assert_eq!(names(&store), ["one"]);
}

#[test]
fn a_full_disk_refuses_records_until_there_is_room() {
    let directory = private_directory();
    let store = store_with(&directory, 1);
    store.fill_disk(true);
    let mut end = 1;
    let sentence = loop {
        match store.append_audit(event(Kind::KeyUsed, "one")) {
            Ok(link) => end = link.seq,
            Err(refusal) => break refused::<()>(Err(refusal)),
        }
    };
    assert!(sentence.contains("disk is full"), "{sentence}");
    store.fill_disk(false);
    assert_eq!(store.append_audit(event(Kind::KeyUsed, "one")).unwrap().seq, end + 1);
    assert_eq!(verified(&store), (end + 1, None));
}

#[test]
fn a_record_is_on_the_disk_before_it_is_in_the_file() {
    let directory = private_directory();
    let store = Store::open(directory.path()).unwrap();
    let in_the_file = || {
        let backup = private_directory();
        fs::copy(directory.path().join("volcrypt.db"), backup.path().join("volcrypt.db")).unwrap();
        found(&Store::open(backup.path()).unwrap(), AuditQuery::default()).len()
    };
    store.append_audit(event(Kind::KeyUsed, "one")).unwrap();
    let cut = after_power_cut(directory.path());
    assert_eq!(found(&Store::open(cut.path()).unwrap(), AuditQuery::default()).len(), 1);
    assert_eq!(in_the_file(), 0);
    store.merge_audit();
    assert_eq!(in_the_file(), 1);
    store.append_audit(event(Kind::KeyUsed, "one")).unwrap();
    // A change of what cannot be lost brings everything there.
    store.enrol(&record("one")).unwrap();
    assert_eq!(in_the_file(), 3);
}

#[test]
fn what_is_merged_when_it_can_be_waits_for_no_reader() {
    let directory = private_directory();
    let store = store_with(&directory, 1);
    let reader = Connection::open(store.path()).unwrap();
    reader.execute_batch("BEGIN; SELECT * FROM audit").unwrap();
    let began = Instant::now();
    store.append_audit(event(Kind::KeyUsed, "one")).unwrap();
    assert!(!store.merge_audit(), "the reader is not in the way");
    store.enrol(&record("one")).unwrap();
    let another = Store::open(directory.path()).unwrap();
    assert!(began.elapsed() < BUSY_TIMEOUT / 2, "it took {:?}", began.elapsed());
    drop((reader, another));
    assert!(store.merge_audit());
    assert_eq!(fs::metadata(directory.path().join("volcrypt.db-wal")).unwrap().len(), 0);
    let patience: u32 = store.connection().pragma_query_value(None, "busy_timeout", |row| row.get(0)).unwrap();
    assert_eq!(Duration::from_millis(patience.into()), BUSY_TIMEOUT, "what has to wait still does");
}

#[test]
fn a_destruction_waits_for_a_reader() {
    let directory = private_directory();
    let store = Arc::new(Store::open(directory.path()).unwrap());
    let keys = EmbeddedKeyManager::open(Arc::clone(&store), None, directory.path()).unwrap();
    let volume = record("one").id;
    keys.make(&volume, 256.try_into().unwrap()).unwrap();
    store.append_audit(event(Kind::KeyUsed, "one")).unwrap();
    let reader = Connection::open(store.path()).unwrap();
    reader.execute_batch("BEGIN; SELECT * FROM audit").unwrap();
    let reading = thread::spawn(move || {
        thread::sleep(Duration::from_millis(500));
        drop(reader);
    });
    assert!(!store.merge_audit(), "it reads already");
    assert_eq!(store.destroy_keys(&volume, 7), Ok(true));
    assert_eq!(fs::metadata(directory.path().join("volcrypt.db-wal")).unwrap().len(), 0);
    reading.join().unwrap();
}

#[test]
fn a_read_only_or_replaced_file_takes_no_record() {
    let directory = private_directory();
    let store = store_with(&directory, 1);
    store.merge_audit();
    let reading = Store::open_for_reading(directory.path()).unwrap();
    assert!(refused(reading.append_audit(event(Kind::KeyUsed, "one"))).contains("is read-only"));
    assert_eq!(verified(&reading), (1, None));
    let (file, backup) = (directory.path().join("volcrypt.db"), directory.path().join("backup"));
    fs::copy(&file, &backup).unwrap();
    fs::rename(&backup, &file).unwrap();
    assert!(refused(store.append_audit(event(Kind::KeyUsed, "one"))).contains("was replaced"));
}

#[test]
fn threads_and_processes_append_to_one_chain() {
    let directory = private_directory();
    let stores: Vec<Store> = (0..3).map(|_| Store::open(directory.path()).unwrap()).collect();
    thread::scope(|scope| {
        for number in 0..9 {
            let store = &stores[number % 3];
            scope.spawn(move || {
                for _ in 0..20 {
                    store.append_audit(event(Kind::KeyUsed, "one")).unwrap();
                    if number == 8 {
                        store.merge_audit();
                    }
                }
            });
        }
    });
    assert_eq!(verified(&stores[0]), (180, None));
}

fn hostile_text() -> impl Strategy<Value = String> {
    let bytes =
        prop::collection::vec(any::<u8>(), 0..300).prop_map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
    let odd = prop::sample::select(vec![
        "\0",
        "\n",
        "\"",
        "\\",
        "\u{1b}[2J",
        "\u{7f}",
        "\u{2028}",
        "{\"seq\":1}",
        "💾",
        "\r",
    ]);
    let repeated = (odd, 0..5000_usize).prop_map(|(text, times)| text.repeat(times));
    prop_oneof![bytes, ".{0,100}", repeated]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn hostile_names_come_back_as_they_were(domain in hostile_text(), detail in hostile_text(), pid in any::<u32>()) {
        let directory = private_directory();
        let store = Store::open(directory.path()).unwrap();
        let asker = Asker { pid: Some(pid), ..Asker::hook(&domain, None) };
        let event = asker.ask(|| Event { detail: detail.clone(), ..event(Kind::Refused, "one") });
        store.append_audit(event.clone()).unwrap();
        store.append_audit(event.clone()).unwrap();
        prop_assert_eq!(verified(&store), (2, None));
        let read = found(&store, AuditQuery::default()).remove(0).event;
        for (read, written) in [(&read.detail, &detail), (read.asker.domain.as_ref().unwrap(), &domain)] {
            let whole = written.len() <= 4096;
            prop_assert!(read == written || !whole && read.len() <= 4096 && written.starts_with(read.trim_end_matches('…')));
        }
        prop_assert_eq!((read.asker.pid, read.volume), (Some(pid), event.volume));
        let lines: i64 = store.connection()
            .query_row("SELECT count(*) FROM audit WHERE instr(record, char(10))", [], |row| row.get(0)).unwrap();
        prop_assert_eq!(lines, 0);
    }
}
