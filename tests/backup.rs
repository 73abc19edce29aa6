//! Backups of the database and their way back, through the command.

use std::collections::BTreeMap;
use std::fs::{self, Permissions};
use std::hash::{DefaultHasher, Hasher};
use std::io::{BufRead, BufReader};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use assert_cmd::cargo::CommandCargoExt;
use rusqlite::Connection;
use tempfile::TempDir;
use volcrypt::audit::{Entry, Kind, Link, Role};
use volcrypt::keys::{EmbeddedKeyManager, Key, KeyEncryptionKey, KeyHandle, KeyManager, RotationStep};
use volcrypt::policy::Provider;
use volcrypt::store::{AuditQuery, EnrolledDevice, Grant, Staged, Store, VolumeRecord, VolumeState};
use volcrypt::volume::VolumeId;

/// A host's database, key-encryption key and configuration.
struct Host(TempDir);

/// Every key, by volume.
type Keys = BTreeMap<String, Vec<u8>>;

impl Host {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let host = Host(folder);
        fs::create_dir(host.state()).unwrap();
        fs::set_permissions(host.state(), Permissions::from_mode(0o700)).unwrap();
        fs::write(host.path("volcrypt.toml"), format!("[key_manager]\ndirectory = {:?}\n", host.state())).unwrap();
        host
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn state(&self) -> PathBuf {
        self.path("state")
    }

    fn database(&self) -> PathBuf {
        self.state().join("volcrypt.db")
    }

    fn open(&self) -> (Arc<Store>, EmbeddedKeyManager) {
        let store = Arc::new(Store::open(&self.state()).unwrap());
        (Arc::clone(&store), EmbeddedKeyManager::open(store, None, &self.state()).unwrap())
    }

    /// Enrols volumes and returns their keys.
    fn enrol(&self, names: &[&str]) -> Keys {
        let (store, keys) = self.open();
        names.iter().map(|name| (name.to_string(), enrol(&store, &keys, name))).collect()
    }

    /// Runs the command; gives exit code, and standard output or error.
    fn volcrypt(&self, arguments: &[&str]) -> (i32, String) {
        let mut command = Command::cargo_bin("volcrypt").unwrap();
        let output = command.arg("--config").arg(self.path("volcrypt.toml")).args(arguments).output().unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        match output.status.code().unwrap() {
            0 => (0, text(output.stdout)),
            code => {
                assert!(output.stdout.is_empty());
                (code, text(output.stderr))
            }
        }
    }

    fn back_up(&self, name: &str) -> PathBuf {
        let to = self.path(name);
        let (code, text) = self.volcrypt(&["key", "backup", to.to_str().unwrap()]);
        assert_eq!(code, 0, "{text}");
        to
    }

    fn try_restore(&self, backup: &Path) -> (i32, String) {
        self.volcrypt(&["key", "restore", backup.to_str().unwrap()])
    }

    /// Restores and returns what is said.
    fn restore(&self, backup: &Path) -> String {
        let (code, text) = self.try_restore(backup);
        assert_eq!(code, 0, "{text}");
        text
    }

    /// It is refused with one sentence that has `said` in it, and every file is as it was.
    fn assert_refused(&self, backup: &Path, said: &str) {
        let before = contents(&self.state());
        let (code, text) = self.try_restore(backup);
        assert_eq!((code, text.lines().count()), (1, 1), "{text}");
        assert!(text.contains(said), "{said}: {text}");
        assert_eq!(contents(&self.state()), before, "{said}");
    }

    fn assert_has(&self, keys: &Keys) {
        let (store, manager) = self.open();
        assert_eq!(store.volumes().unwrap().iter().map(|volume| volume.id.as_str()).collect::<Vec<_>>(), names(keys));
        for (name, key) in keys {
            let record = store.volume(&id(name)).unwrap().unwrap();
            assert_eq!(record.key, KeyHandle::first(&record.id));
            assert_eq!(manager.get_enrolled(&record.recorded_key()).unwrap().bytes(), key);
        }
        assert_eq!(store.verify_audit(Default::default()).unwrap().broken, None);
    }

    /// Puts so much into the audit log that it takes a while to copy.
    fn fill(&self) {
        let many = "WITH RECURSIVE numbers (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM numbers WHERE n < 1500)
                    INSERT INTO audit (seq, record, hash) SELECT n + 1, json_object('seq', n + 1, 'text', hex(zeroblob(50000))), hex(zeroblob(32)) FROM numbers";
        Connection::open(self.database()).unwrap().execute_batch(many).unwrap();
    }

    /// The files of the databases that were replaced.
    fn kept(&self) -> Vec<PathBuf> {
        let mut kept: Vec<_> = fs::read_dir(self.state()).unwrap().map(|entry| entry.unwrap().path()).collect();
        kept.retain(|path| path.to_str().unwrap().contains(".replaced-"));
        kept.sort();
        kept
    }
}

fn id(name: &str) -> VolumeId {
    name.parse().unwrap()
}

fn names(keys: &Keys) -> Vec<&str> {
    keys.keys().map(String::as_str).collect()
}

fn enrol(store: &Store, keys: &EmbeddedKeyManager, name: &str) -> Vec<u8> {
    let key = keys.make(&id(name), 512.try_into().unwrap()).unwrap();
    store.enrol(&record(name, &key)).unwrap();
    key.bytes().to_vec()
}

fn record(name: &str, key: &Key) -> VolumeRecord {
    VolumeRecord {
        id: id(name),
        device: EnrolledDevice { wwid: Some(format!("naa.{name}")), ..EnrolledDevice::default() },
        size_bytes: 1 << 30,
        profile: "default".to_owned(),
        provider: Provider::Plain,
        cipher: "aes-xts-plain64".to_owned(),
        key_size: 512.try_into().unwrap(),
        sector_size: 4096,
        key: KeyHandle::first(&id(name)),
        check_value: key.check_value(&id(name)),
        enrolled_at: 1_790_000_000,
        state: VolumeState::Enrolled,
        owner: None,
    }
}

/// Every file of `directory` with its length and a hash; without the log's index, which every reader writes to.
fn contents(directory: &Path) -> BTreeMap<String, (usize, u64)> {
    let entries = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap());
    let entries = entries.map(|entry| {
        let content = fs::read(entry.path()).unwrap();
        let mut hasher = DefaultHasher::new();
        hasher.write(&content);
        (entry.file_name().into_string().unwrap(), (content.len(), hasher.finish()))
    });
    entries.filter(|(name, _)| !name.ends_with("-shm")).collect()
}

#[test]
fn a_backup_comes_back_and_what_was_there_is_kept() {
    let host = Host::new();
    let keys = host.enrol(&["one", "two"]);
    let backup = host.back_up("backup.db");
    assert_eq!(fs::metadata(&backup).unwrap().mode() & 0o7777, 0o600);
    let later = host.enrol(&["three"]);
    let text = host.restore(&backup);
    assert!(text.contains("2 volumes; 2 keys were opened") && text.contains("systemctl start"), "{text}");
    host.assert_has(&keys);
    assert!(host.state().join("kek").exists() && !host.state().join(".restore").exists());
    // And back again.
    let kept = host.kept();
    assert_eq!(kept.len(), 1);
    assert!(text.contains(kept[0].to_str().unwrap()), "{text}");
    host.restore(&kept[0]);
    host.assert_has(&keys.into_iter().chain(later).collect());
    assert_eq!(fs::metadata(host.database()).unwrap().mode() & 0o7777, 0o600);
}

#[test]
fn a_backup_is_of_one_moment_though_the_database_is_in_use() {
    let host = Host::new();
    let (store, keys) = host.open();
    std::thread::scope(|scope| {
        // Dropped also where a backup fails: the threads would be waited for forever.
        let backing_up = Arc::new(());
        let (store, keys, enrolled, rotated) =
            (&store, &keys, Arc::downgrade(&backing_up), Arc::downgrade(&backing_up));
        let enrolling = scope.spawn(move || {
            let mut number = 0;
            while enrolled.strong_count() > 0 {
                let began = Instant::now();
                enrol(store, keys, &format!("volume-{number}"));
                number += 1;
                // Whoever writes without a pause leaves the backup no moment for its own record.
                std::thread::sleep(began.elapsed());
            }
        });
        let rotating = scope.spawn(move || {
            let mut step = RotationStep::Begin;
            while rotated.strong_count() > 0 {
                let began = Instant::now();
                // What is hindered by the backup that reads goes on afterwards.
                step = match keys.rotate_kek(&step) {
                    Ok(volcrypt::keys::KekRotation::UnderWay { after, .. }) => RotationStep::GoOn { after },
                    _ => RotationStep::Begin,
                };
                std::thread::sleep(began.elapsed());
            }
        });
        for number in 0..10 {
            let backup = host.back_up(&format!("{number}.db"));
            let database = Connection::open(&backup).unwrap();
            let lone: i64 = database
                .query_row("SELECT count(*) FROM volumes WHERE id NOT IN (SELECT volume_id FROM keys)", [], |row| {
                    row.get(0)
                })
                .unwrap();
            assert_eq!(lone, 0, "a volume is enrolled after its key is stored");
            let verdict: String = database.query_row("PRAGMA integrity_check", [], |row| row.get(0)).unwrap();
            assert_eq!(verdict, "ok");
        }
        drop(backing_up);
        enrolling.join().unwrap();
        rotating.join().unwrap();
    });
}

#[test]
fn a_backup_says_what_else_is_needed() {
    let host = Host::new();
    host.enrol(&["one"]);
    let kek = KeyEncryptionKey::load(None, &host.state(), false).unwrap().check_value().to_string();
    let folder = host.path("backups");
    fs::create_dir(&folder).unwrap();
    let (code, text) = host.volcrypt(&["key", "backup", folder.to_str().unwrap()]);
    assert_eq!(code, 0);
    assert!(text.contains("NOT in it") && text.contains("/state/kek") && text.contains(&kek), "{text}");
    let made: Vec<_> = fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert_eq!(made.len(), 1);
    assert!(text.starts_with(made[0].to_str().unwrap()), "{text}");
    let backup = fs::read(&made[0]).unwrap();
    let kek = fs::read(host.state().join("kek")).unwrap();
    assert!(kek.chunks(8).all(|part| !backup.windows(8).any(|window| window == part)));
}

#[test]
fn no_backup_overwrites_anything_or_leaves_half_a_file() {
    let host = Host::new();
    let names: Vec<String> = (0..100).map(|number| format!("volume-{number}")).collect();
    host.enrol(&names.iter().map(String::as_str).collect::<Vec<_>>());
    let to = host.path("there");
    fs::write(&to, "precious").unwrap();
    let before = contents(&host.state());
    let (code, text) = host.volcrypt(&["key", "backup", to.to_str().unwrap()]);
    assert_eq!(code, 1);
    assert!(text.contains("exists already"), "{text}");
    assert_eq!(fs::read(&to).unwrap(), b"precious");
    let (code, text) = host.volcrypt(&["key", "backup", host.path("nowhere/x").to_str().unwrap()]);
    assert_eq!((code, text.lines().count()), (1, 1), "{text}");
    assert_eq!(contents(&host.state()), before);

    // A disk of 64 KiB, and a limit of 40 on the way to it.
    let full = host.path("full");
    fs::create_dir(&full).unwrap();
    let volcrypt = Command::cargo_bin("volcrypt").unwrap();
    for limit in ["mount -t tmpfs -o size=64k tmpfs \"$0\"", "trap '' XFSZ; ulimit -f 40"] {
        let script =
            format!("{limit} || exit 9; \"$1\" --config \"$2\" key backup \"$0/backup\"; echo \"$?\" $(ls -A \"$0\")");
        let output = Command::new("unshare")
            .args(["--mount", "--propagation", "private", "bash", "-c", &script])
            .args([full.as_os_str(), volcrypt.get_program(), host.path("volcrypt.toml").as_os_str()])
            .output()
            .unwrap();
        let error = String::from_utf8(output.stderr).unwrap();
        assert_eq!(String::from_utf8(output.stdout).unwrap(), "1\n", "nothing is left; {error}");
        assert!(error.contains("/full/backup cannot be written") && error.lines().count() == 1, "{error}");
    }
}

#[test]
fn what_is_no_whole_backup_is_not_restored() {
    let host = Host::new();
    host.enrol(&["one"]);
    let names: Vec<String> = (0..200).map(|number| format!("volume-{number}")).collect();
    host.enrol(&names.iter().map(String::as_str).collect::<Vec<_>>());
    let backup = host.back_up("backup.db");
    let sound = fs::read(&backup).unwrap();
    let write = |name: &str, content: &[u8]| {
        let path = host.path(name);
        fs::write(&path, content).unwrap();
        path
    };
    host.assert_refused(&host.path("nowhere"), "cannot be read");
    host.assert_refused(host.0.path(), "is no file");
    host.assert_refused(&write("text", b"this is no database at all, by no means whatsoever"), "is no database");
    host.assert_refused(&write("empty", b""), "is no database of volcrypt's");
    host.assert_refused(&write("half", &sound[..sound.len() / 2]), "is damaged");
    // Each page's header in its turn: no page of it goes unlooked at.
    for page in (4096..sound.len()).step_by(4096) {
        let mut damaged = sound.clone();
        damaged[page..page + 8].fill(0xa5);
        host.assert_refused(&write("damaged", &damaged), "is damaged");
    }
    let changed = |name: &str, sql: &str| {
        let path = write(name, &sound);
        Connection::open(&path).unwrap().execute_batch(sql).unwrap();
        path
    };
    host.assert_refused(&changed("foreign", "PRAGMA application_id = 7"), "is no database of volcrypt's");
    host.assert_refused(&changed("newer", "PRAGMA user_version = 99"), "newer volcrypt (version 99");
    // A key's bytes are no business of SQLite's check.
    let flipped = "UPDATE keys SET wrapped = zeroblob(length(wrapped)) WHERE volume_id = 'volume-7'";
    host.assert_refused(&changed("flipped", flipped), "volume-7");
    let swapped = "UPDATE volumes SET check_value = '00000000000000000000000000000000' WHERE id = 'volume-9'";
    host.assert_refused(&changed("swapped", swapped), "volume volume-9 is not the one it was enrolled with");
    let live = write("live", &sound);
    write("live-wal", b"x");
    host.assert_refused(&live, "live-wal holds changes");
    host.restore(&backup);
}

#[test]
fn a_backup_needs_its_key_encryption_key() {
    let host = Host::new();
    let keys = host.enrol(&["one"]);
    let backup = host.back_up("backup.db");
    let old = fs::read(host.state().join("kek")).unwrap();
    let (_, manager) = host.open();
    let mut step = RotationStep::Begin;
    while let volcrypt::keys::KekRotation::UnderWay { after, .. } = manager.rotate_kek(&step).unwrap() {
        step = RotationStep::GoOn { after };
    }
    drop(manager);
    host.assert_refused(&backup, "needs the key-encryption key of when it was made");
    let new = fs::read(host.state().join("kek")).unwrap();
    fs::remove_file(host.state().join("kek")).unwrap();
    let command = "systemd-run --pipe --wait --property=LoadCredentialEncrypted=volcrypt.kek:FILE volcrypt key restore";
    // systemd runs it in the root directory.
    let here = std::env::current_dir().unwrap();
    let relative: PathBuf = here.iter().skip(1).map(|_| "..").chain([&backup.to_str().unwrap()[1..]]).collect();
    host.assert_refused(&relative, &format!("{command} {}'", here.join(&relative).display()));
    assert!(!host.state().join("kek").exists(), "none is made");
    fs::write(host.state().join("kek"), &old).unwrap();
    fs::set_permissions(host.state().join("kek"), Permissions::from_mode(0o600)).unwrap();
    host.restore(&backup);
    host.assert_has(&keys);
    assert_ne!(old, new);
}

#[test]
fn a_database_in_use_is_not_replaced() {
    let host = Host::new();
    let keys = host.enrol(&["one"]);
    let backup = host.back_up("backup.db");
    let (store, manager) = host.open();
    let inode = fs::metadata(host.database()).unwrap().ino();
    // To read the file here would drop the locks of this process on it.
    let (code, text) = host.try_restore(&backup);
    assert_eq!((code, text.lines().count()), (1, 1), "{text}");
    assert!(text.contains("volcrypt.db is in use: stop volcryptd"), "{text}");
    assert_eq!(fs::metadata(host.database()).unwrap().ino(), inode);
    assert!(host.kept().is_empty());
    assert_eq!(manager.get(&id("one")).unwrap().bytes(), keys["one"]);
    enrol(&store, &manager, "two");
    drop((store, manager));
    host.restore(&backup);
    host.assert_has(&keys);
}

/// A host whose daemon was killed when the log held all of the volume `two`; a backup of before, its keys, and that of
/// `two`.
struct Killed {
    killed: Host,
    backup: PathBuf,
    keys: Keys,
    later: Vec<u8>,
    /// Where the backup is.
    _host: Host,
}

impl Killed {
    fn new() -> Self {
        let (host, killed) = (Host::new(), Host::new());
        let keys = host.enrol(&["one"]);
        let backup = host.back_up("backup.db");
        let (store, manager) = host.open();
        let reader = Connection::open(host.database()).unwrap();
        reader.execute_batch("BEGIN; SELECT * FROM volumes").unwrap();
        let later = enrol(&store, &manager, "two");
        for entry in fs::read_dir(host.state()).unwrap() {
            let entry = entry.unwrap();
            fs::copy(entry.path(), killed.state().join(entry.file_name())).unwrap();
        }
        Killed { killed, backup, keys, later, _host: host }
    }
}

#[test]
fn what_a_killed_daemon_left_is_kept_whole_and_does_not_touch_the_new_database() {
    let Killed { killed, backup, keys, later, _host } = Killed::new();
    assert!(fs::metadata(killed.state().join("volcrypt.db-wal")).unwrap().len() > 0);
    killed.restore(&backup);
    assert_eq!(killed.kept().len(), 1, "its log is merged into it");
    killed.assert_has(&keys);
    killed.restore(&killed.kept()[0]);
    killed.assert_has(&keys.into_iter().chain([("two".to_owned(), later)]).collect());
}

#[test]
fn what_a_killed_daemon_left_of_a_database_that_was_moved_away_does_not_touch_the_new_one() {
    let Killed { killed, backup, keys, later, _host } = Killed::new();
    let (log, index) = (killed.state().join("volcrypt.db-wal"), killed.state().join("volcrypt.db-shm"));
    let content = fs::read(&log).unwrap();
    assert!(!content.is_empty() && index.exists());
    fs::rename(killed.database(), killed.path("moved-away")).unwrap();
    let text = killed.restore(&backup);
    assert!(!log.exists() && !index.exists(), "{:?}", contents(&killed.state()));
    killed.assert_has(&keys);
    let kept = killed.kept();
    assert_eq!(kept.len(), 1, "{kept:?}");
    let said = format!("A log was there without its database and is kept as {}. ", kept[0].display());
    assert!(text.contains(&said), "{text}");
    // What is in it comes back with the database whose log it is.
    assert_eq!(fs::read(&kept[0]).unwrap(), content);
    fs::rename(killed.path("moved-away"), killed.database()).unwrap();
    fs::rename(&kept[0], &log).unwrap();
    killed.assert_has(&keys.into_iter().chain([("two".to_owned(), later)]).collect());
}

#[test]
fn a_log_whose_database_was_moved_away_outlives_a_start_of_the_daemon_and_is_kept_by_a_restore() {
    let Killed { killed, backup, keys, later, _host } = Killed::new();
    fs::rename(killed.database(), killed.path("moved-away")).unwrap();
    let before = contents(&killed.state());
    let sentence = Store::open(&killed.state()).err().unwrap().to_string();
    assert!(sentence.contains("'volcrypt key restore'"), "{sentence}");
    assert_eq!(contents(&killed.state()), before);
    let text = killed.restore(&backup);
    killed.assert_has(&keys);
    // The way back that it names.
    let (database, log) = (killed.database(), killed.state().join("volcrypt.db-wal"));
    let said = format!("put both back, as {} and {}", database.display(), log.display());
    assert!(text.contains(&said), "{text}");
    fs::remove_file(&database).unwrap();
    fs::rename(killed.path("moved-away"), &database).unwrap();
    fs::rename(&killed.kept()[0], &log).unwrap();
    killed.assert_has(&keys.into_iter().chain([("two".to_owned(), later)]).collect());
}

#[test]
fn a_journal_that_was_left_does_not_touch_the_new_database() {
    let host = Host::new();
    let keys = host.enrol(&["one"]);
    let backup = host.back_up("backup.db");
    // As a process leaves it that was killed amid a transaction.
    let other = Connection::open(host.path("other.db")).unwrap();
    other
        .execute_batch(
            "CREATE TABLE t (a); WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 300)
             INSERT INTO t SELECT zeroblob(4000) FROM n; PRAGMA cache_size = 1; BEGIN; UPDATE t SET a = zeroblob(4001)",
        )
        .unwrap();
    let journal = host.state().join("volcrypt.db-journal");
    for is_lost in [false, true] {
        fs::copy(host.path("other.db-journal"), &journal).unwrap();
        match is_lost {
            false => fs::write(host.database(), "garbage").unwrap(),
            true => fs::remove_file(host.database()).unwrap(),
        }
        let before = host.kept();
        let text = host.restore(&backup);
        host.assert_has(&keys);
        let kept: Vec<_> = host.kept().into_iter().filter(|path| !before.contains(path)).collect();
        assert!(!journal.exists());
        let kept = kept.iter().find(|path| path.to_str().unwrap().ends_with("-journal")).unwrap();
        assert_eq!(fs::read(kept).unwrap(), fs::read(host.path("other.db-journal")).unwrap());
        assert_eq!(text.contains("A log was there without its database and is kept as"), is_lost, "{text}");
        if is_lost {
            assert!(text.contains(kept.to_str().unwrap()), "{text}");
        }
    }
    // What is not whole without it is no backup.
    fs::copy(&backup, host.path("copy.db")).unwrap();
    fs::copy(host.path("other.db-journal"), host.path("copy.db-journal")).unwrap();
    host.assert_refused(&host.path("copy.db"), "copy.db-journal holds changes of it");
}

#[test]
fn nothing_that_was_kept_is_overwritten() {
    let host = Host::new();
    let keys = host.enrol(&["one"]);
    let backup = host.back_up("backup.db");
    let restore = || Staged::new(&backup, &host.state()).unwrap().put_in_place("now").unwrap();
    for content in ["first", "second"] {
        fs::remove_file(host.database()).unwrap();
        fs::write(host.state().join("volcrypt.db-wal"), content).unwrap();
        restore();
    }
    // Neither is a database put beside the log of another.
    restore();
    let kept = |end: &str| fs::read(host.state().join(format!("volcrypt.db.replaced-now{end}")));
    assert_eq!((kept("-wal").unwrap(), kept("-2-wal").unwrap()), (b"first".to_vec(), b"second".to_vec()));
    assert!(kept("-3").unwrap().starts_with(b"SQLite format 3"));
    assert_eq!(host.kept().len(), 3);
    // An empty log is no loss.
    fs::remove_file(host.database()).unwrap();
    fs::write(host.state().join("volcrypt.db-wal"), "").unwrap();
    assert_eq!(restore(), None);
    assert_eq!(host.kept().len(), 3);
    host.assert_has(&keys);
}

#[test]
fn a_database_that_is_damaged_or_lost_is_replaced() {
    let host = Host::new();
    let keys = host.enrol(&["one"]);
    let backup = host.back_up("backup.db");
    fs::write(host.database(), "garbage").unwrap();
    fs::write(host.state().join("volcrypt.db-wal"), "more of it").unwrap();
    fs::create_dir(host.state().join(".restore")).unwrap();
    host.restore(&backup);
    host.assert_has(&keys);
    let kept = host.kept();
    assert_eq!(fs::read(&kept[0]).unwrap(), b"garbage");
    assert_eq!(fs::read(&kept[1]).unwrap(), b"more of it");
    fs::remove_file(host.database()).unwrap();
    let text = host.restore(&backup);
    assert!(!text.contains("is kept"), "{text}");
    host.assert_has(&keys);
}

#[test]
fn an_older_volcrypts_backup_is_brought_to_this_version() {
    let host = Host::new();
    let kek = KeyEncryptionKey::load(None, &host.state(), true).unwrap();
    let key = Key::random(512.try_into().unwrap()).unwrap();
    let wrapped = kek.wrap(&id("one"), 1, &key).unwrap();
    let path = host.path("old.db");
    let old = Connection::open(&path).unwrap();
    for step in [
        include_str!("../src/store/schema/1.sql"),
        include_str!("../src/store/schema/2.sql"),
        include_str!("../src/store/schema/3.sql"),
    ] {
        old.execute_batch(step).unwrap();
    }
    old.execute_batch(&format!("PRAGMA application_id = {}; PRAGMA user_version = 3", i32::from_be_bytes(*b"vlcr")))
        .unwrap();
    old.execute("INSERT INTO meta VALUES ('kek_check_value', ?1)", [kek.check_value().to_string()]).unwrap();
    old.execute("INSERT INTO keys VALUES ('one', 1, 512, ?1, 5, NULL), ('gone', 1, 512, NULL, 5, 6)", [wrapped])
        .unwrap();
    let check_value = key.check_value(&id("one")).to_string();
    old.execute(
        "INSERT INTO volumes VALUES ('one', NULL, NULL, 'naa.one', 1073741824, 'default', 'plain', 'aes-xts-plain64', 512,
             4096, ?1, 1790000000, 'enrolled', NULL, NULL)",
        [check_value],
    )
    .unwrap();
    drop(old);
    let before = fs::read(&path).unwrap();
    host.restore(&path);
    assert_eq!(fs::read(&path).unwrap(), before, "the backup is as it was");
    host.assert_has(&Keys::from([("one".to_owned(), key.bytes().to_vec())]));
    // The other way round there is no way.
    let newest = host.back_up("backup.db");
    let version: i64 =
        Connection::open(newest).unwrap().query_row("PRAGMA user_version", [], |row| row.get(0)).unwrap();
    assert!(version > 3);
}

#[test]
fn a_backup_and_a_restore_are_in_the_audit_log() {
    let host = Host::new();
    host.enrol(&["one"]);
    let backup = host.back_up("backup.db");
    host.restore(&backup);
    let (store, _) = host.open();
    let entries = store.audit(&AuditQuery::default()).unwrap().entries;
    let Some(Entry::Record { record, .. }) = entries.first() else { panic!("{entries:?}") };
    let said = format!("from {}, with 1 volumes; 1 keys were opened", backup.display());
    assert_eq!((record.event.kind, record.event.detail.as_str()), (Kind::DatabaseRestored, said.as_str()));
    assert_eq!((record.event.asker.by, record.event.asker.uid), (Role::Operator, Some(0)));
    assert!(store.verify_audit(Link::default()).unwrap().broken.is_none());
    // The one that was copied is recorded where it was copied from.
    let kept = Connection::open(&host.kept()[0]).unwrap();
    let newest: String =
        kept.query_row("SELECT record FROM audit ORDER BY seq DESC LIMIT 1", [], |row| row.get(0)).unwrap();
    assert!(newest.contains("database-backed-up") && newest.contains("backup.db, with 1 volumes"), "{newest}");
}

/// What `Staged::put_in_place` does from its lock on, slowly: `volcrypt.db` in `$1`, and the copy in `$2`.
const SLOW_RESTORE: &str = "
import fcntl, os, sys, time
path, copy = sys.argv[1] + '/volcrypt.db', sys.argv[2]
turn = os.open(sys.argv[1], os.O_RDONLY)
fcntl.flock(turn, fcntl.LOCK_EX)
file = open(path, 'r+b')
fcntl.lockf(file, fcntl.LOCK_EX)
print('locked', flush=True)
time.sleep(0.5)
os.link(path, path + '.replaced-x')
for suffix in ('-wal', '-shm'):
    if os.path.exists(path + suffix):
        os.rename(path + suffix, path + '.replaced-x' + suffix)
os.rename(copy, path)
";

#[test]
fn a_daemon_that_starts_while_a_backup_takes_the_place_uses_the_backup() {
    let host = Host::new();
    let mut keys = host.enrol(&["early"]);
    let copy = host.path("copy.db");
    fs::copy(host.database(), &copy).unwrap();
    let kept = host.enrol(&["replaced"]);
    let mut restoring = Command::new("python3")
        .args(["-c", SLOW_RESTORE])
        .args([host.state(), copy])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    BufReader::new(restoring.stdout.take().unwrap()).read_line(&mut String::new()).unwrap();
    let (store, manager) = host.open();
    assert!(restoring.wait().unwrap().success());
    for name in ["late", "later"] {
        keys.insert(name.to_owned(), enrol(&store, &manager, name));
    }
    drop((store, manager));
    host.assert_has(&keys);
    // Nothing of what the daemon wrote went to the other one.
    let old = Host::new();
    fs::copy(&host.kept()[0], old.database()).unwrap();
    fs::copy(host.state().join("kek"), old.state().join("kek")).unwrap();
    let names = |host: &Host| host.open().0.volumes().unwrap().len();
    assert_eq!((names(&old), kept.len()), (2, 1));
}

#[test]
fn one_restore_at_a_time() {
    let host = Host::new();
    let keys = host.enrol(&["one"]);
    let (backup, other) = (host.back_up("backup.db"), host.back_up("other.db"));
    let staged = Staged::new(&backup, &host.state()).unwrap();
    let (code, text) = host.try_restore(&other);
    assert_eq!((code, text.lines().count()), (1, 1), "{text}");
    assert!(text.contains("another 'volcrypt key restore' is under way"), "{text}");
    assert!(staged.put_in_place("now").unwrap().is_some());
    host.assert_has(&keys);
    host.restore(&other);
    host.assert_has(&keys);
}

#[test]
fn a_backup_that_is_broken_off_leaves_nothing() {
    use rustix::process::Signal;
    let host = Host::new();
    host.enrol(&["one"]);
    host.fill();
    let folder = host.path("backups");
    fs::create_dir(&folder).unwrap();
    let listed = || fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()).collect::<Vec<_>>();
    let volcrypt = || {
        // Whoever runs this in the background may have it ignore some of them.
        let mut command = Command::new("env");
        command.arg("--default-signal=INT,TERM,HUP").arg(Command::cargo_bin("volcrypt").unwrap().get_program());
        command.arg("--config").arg(host.path("volcrypt.toml")).args(["key", "backup"]).arg(folder.join("b.db"));
        command
    };
    let break_off = |signal: Signal| {
        // On a busy machine it may come to its end before anybody has looked.
        for _ in 0..100 {
            let mut backup = volcrypt().spawn().unwrap();
            // The journal says that the copying has begun.
            let has_begun = || listed().iter().any(|path| path.to_str().unwrap().ends_with("-journal"));
            while backup.try_wait().unwrap().is_none() && !has_begun() {}
            if backup.try_wait().unwrap().is_none() {
                rustix::process::kill_process(rustix::process::Pid::from_child(&backup), signal).unwrap();
            }
            let status = backup.wait().unwrap();
            if status.signal() == Some(signal.as_raw()) {
                return;
            }
            assert!(status.success(), "{status}");
            fs::remove_file(folder.join("b.db")).unwrap();
        }
        panic!("it always ended too early");
    };
    for signal in [Signal::TERM, Signal::INT, Signal::HUP] {
        break_off(signal);
        assert!(listed().is_empty(), "{signal:?}: {:?}", listed());
    }
    // Nothing can be done about that; the next one names it.
    break_off(Signal::KILL);
    let left = listed();
    assert_eq!(left.len(), 2);
    let output = volcrypt().output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    for left in left {
        assert!(text.contains(&format!("{} is what is left of a backup that was killed", left.display())), "{text}");
    }
    assert_eq!(listed().len(), 3);
}

#[test]
fn a_backup_during_a_rotation_names_both_key_encryption_keys() {
    let host = Host::new();
    let keys = host.enrol(&["one"]);
    let rotated = Host::new();
    let (_, manager) = host.open();
    manager.rotate_kek(&RotationStep::Begin).unwrap();
    let values = ["kek.new", "kek"].map(|name| {
        fs::copy(host.state().join(name), rotated.state().join("kek")).unwrap();
        KeyEncryptionKey::load(None, &rotated.state(), false).unwrap().check_value().to_string()
    });
    let to = host.path("during.db");
    let (_, text) = host.volcrypt(&["key", "backup", to.to_str().unwrap()]);
    for (name, value) in ["kek.new", "kek"].iter().zip(&values) {
        let place = host.state().join(name);
        assert!(text.contains(&format!("{} (check value {value})", place.display())), "{text}");
    }
    // To restore it where the rotation has ended says where each of them goes, and so it does.
    let copies = ["kek.new", "kek"].map(|name| (name, fs::read(host.state().join(name)).unwrap()));
    let mut step = RotationStep::Begin;
    while let volcrypt::keys::KekRotation::UnderWay { after, .. } = manager.rotate_kek(&step).unwrap() {
        step = RotationStep::GoOn { after };
    }
    drop(manager);
    fs::write(host.state().join("kek"), [7; 32]).unwrap();
    let kek = host.state().join("kek");
    let said = format!("check value {} as {1} and {2} as {1}.new", values[1], kek.display(), values[0]);
    host.assert_refused(&to, &said);
    host.assert_refused(&to, "kept under another name first");
    for (name, content) in copies {
        fs::write(host.state().join(name), content).unwrap();
        fs::set_permissions(host.state().join(name), Permissions::from_mode(0o600)).unwrap();
    }
    host.restore(&to);
    host.assert_has(&keys);
}

#[test]
fn what_is_in_the_replaced_database_alone_is_named() {
    let host = Host::new();
    host.enrol(&["one", "gone"]);
    let backup = host.back_up("backup.db");
    host.enrol(&["two", "three"]);
    let (_, manager) = host.open();
    manager.make(&id("four"), 512.try_into().unwrap()).unwrap();
    // One that was destroyed later is nothing to be missed.
    manager.destroy(&id("gone")).unwrap();
    drop(manager);
    let kek = KeyEncryptionKey::load(None, &host.state(), false).unwrap().check_value();
    let text = host.restore(&backup);
    assert!(text.contains("IN IT ALONE: four, three, two. Do not remove it while you need them"), "{text}");
    assert!(text.contains(&format!("the key-encryption key that opens it (check value {kek})")), "{text}");
    // Back again, nothing is missing; and what cannot be read is not called needless.
    let text = host.restore(&host.kept()[0]);
    assert!(text.contains("ALONE: gone. Do not"), "a key that the backup still had: {text}");
    let text = host.restore(&host.back_up("same.db"));
    assert!(text.contains("has no key that is not here: remove it once all is well"), "{text}");
    fs::write(host.database(), "garbage").unwrap();
    let text = host.restore(&backup);
    assert!(text.contains("cannot be told") && text.contains("do not remove it"), "{text}");
    // The same volume with another key.
    let other = Host::new();
    other.enrol(&["one", "gone"]);
    fs::copy(host.state().join("kek"), other.state().join("kek.before")).unwrap();
    fs::rename(other.state().join("kek"), other.state().join("kek.own")).unwrap();
    fs::rename(other.state().join("kek.before"), other.state().join("kek")).unwrap();
    assert!(other.restore(&backup).contains("ALONE: gone, one. Do not"));
}

#[test]
fn what_a_restore_takes_back_is_named() {
    let host = Host::new();
    host.enrol(&["destroyed", "given", "granted", "left", "retired", "same"]);
    let (store, _) = host.open();
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs() as i64;
    let grant = |volume: &str, domain: &str, expires_at| {
        store
            .grant(&Grant { volume: id(volume), domain: domain.to_owned(), expires_at, created_at: now - 900 })
            .unwrap();
    };
    store.set_owner(&id("given"), Some("p1")).unwrap();
    store.set_owner(&id("same"), Some("p1")).unwrap();
    for (domain, expires_at) in [("web 1", 900), ("db", 900), ("shorter", 9000), ("longer", 900), ("over", -1)] {
        grant("granted", domain, now + expires_at);
    }
    let backup = host.back_up("backup.db");
    store.set_owner(&id("given"), Some("p 2")).unwrap();
    store.set_owner(&id("left"), Some("p1")).unwrap();
    for (volume, state) in [("retired", VolumeState::Retired), ("destroyed", VolumeState::Destroyed)] {
        store.change_state(&id(volume), &[VolumeState::Enrolled], state, None).unwrap();
    }
    store.revoke(&id("granted"), "web 1").unwrap();
    store.revoke(&id("granted"), "over").unwrap();
    grant("granted", "shorter", now + 5000);
    grant("granted", "longer", now + 5000);
    drop(store);
    let text = host.restore(&backup);
    let named: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix("  ")).collect();
    assert_eq!(named.len(), 6, "{text}");
    for (line, (begin, end)) in named.iter().zip([
        ("volume destroyed is enrolled, and was destroyed before: ", "volcrypt volume destroy destroyed"),
        ("volume given belongs to \"p1\", and to \"p 2\" before: ", "volcrypt volume set-owner given 'p 2'"),
        ("volume left belongs to nobody, and to \"p1\" before: ", "volcrypt volume set-owner left p1"),
        ("volume retired is enrolled, and was retired before: ", "volcrypt volume retire retired"),
        ("domain \"shorter\" may have volume granted until ", "s"),
        ("domain \"web 1\" may have volume granted until ", "before: volcrypt grant revoke granted 'web 1'"),
    ]) {
        assert!(line.starts_with(begin) && line.ends_with(end), "{begin}: {line}");
    }
    assert!(named[4].contains(" before: volcrypt grant add granted shorter --for "), "{text}");
    assert!(text.contains("put them right as soon as volcryptd runs:\n  volume destroyed"), "{text}");
    // The other way round.
    let text = host.restore(&host.kept()[0]);
    assert!(
        text.contains("  volume left belongs to \"p1\", and to nobody before: volcrypt volume set-owner left\n"),
        "{text}"
    );
    assert!(
        text.contains("  volume retired is retired, and was enrolled before: volcrypt volume enrol with"),
        "{text}"
    );
    // What is as it was is not mentioned, and what cannot be compared is not passed over.
    let text = host.restore(&host.back_up("same.db"));
    assert!(!text.contains("OWNERS") && !text.contains("cannot be told"), "{text}");
    for damage in ["DROP TABLE grants", "not a database"] {
        match damage.strip_prefix("DROP") {
            Some(_) => Connection::open(host.database()).unwrap().execute_batch(damage).unwrap(),
            None => fs::write(host.database(), damage).unwrap(),
        }
        let text = host.restore(&backup);
        assert!(
            text.contains("grants are those of the backup, and which were changed later cannot be told ("),
            "{text}"
        );
    }
}

#[test]
fn a_backup_goes_on_where_hanging_up_is_ignored() {
    use rustix::process::Signal;
    let host = Host::new();
    host.enrol(&["one"]);
    host.fill();
    let folder = host.path("backups");
    fs::create_dir(&folder).unwrap();
    let volcrypt = Command::cargo_bin("volcrypt").unwrap();
    // On a busy machine it may come to its end before anybody has looked.
    for _ in 0..100 {
        let mut backup = Command::new("nohup")
            .args([volcrypt.get_program(), "--config".as_ref(), host.path("volcrypt.toml").as_os_str()])
            .args(["key".as_ref(), "backup".as_ref(), folder.join("b.db").as_os_str()])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        while backup.try_wait().unwrap().is_none() && fs::read_dir(&folder).unwrap().count() < 2 {}
        let hung_up = backup.try_wait().unwrap().is_none();
        if hung_up {
            rustix::process::kill_process(rustix::process::Pid::from_child(&backup), Signal::HUP).unwrap();
        }
        assert!(backup.wait().unwrap().success());
        if hung_up {
            assert!(folder.join("b.db").exists());
            return;
        }
        fs::remove_file(folder.join("b.db")).unwrap();
    }
    panic!("it always ended too early");
}

#[test]
fn keys_that_have_not_left_for_a_server_need_their_key_encryption_key() {
    let host = Host::new();
    host.enrol(&["one"]);
    let kek = KeyEncryptionKey::load(None, &host.state(), false).unwrap().check_value().to_string();
    let path = host.state();
    let kmip = format!(
        "[key_manager]\ntype = 'kmip'\ndirectory = {path:?}\n[kmip]\nservers = ['kmip1.example:5696']\nca = '/a.pem'\n\
         certificate = '/b.pem'\nkey = '/b.key'\n"
    );
    fs::write(host.path("volcrypt.toml"), kmip).unwrap();
    let backup = host.path("backup.db");
    let (code, text) = host.volcrypt(&["key", "backup", backup.to_str().unwrap()]);
    assert_eq!(code, 0, "{text}");
    assert!(text.contains("NOT in it") && text.contains("/state/kek") && text.contains(&kek), "{text}");
    assert!(text.contains("Keys that are on the KMIP server are not in it."), "{text}");
    assert!(host.restore(&backup).contains("1 volumes; 1 keys were opened"));
    fs::remove_file(host.state().join("kek")).unwrap();
    host.assert_refused(&backup, "needs the key-encryption key of when it was made");
    // Where all have left, none is needed.
    let all_left = "DELETE FROM keys; DELETE FROM volumes";
    Connection::open(host.database()).unwrap().execute_batch(all_left).unwrap();
    let backup = host.path("later.db");
    let (_, text) = host.volcrypt(&["key", "backup", backup.to_str().unwrap()]);
    assert!(text.contains("The keys are not in it: they are on the KMIP server."), "{text}");
    host.restore(&backup);
}

#[test]
fn what_other_hosts_are_writing_to_a_shared_folder_is_no_leftover() {
    let host = Host::new();
    host.enrol(&["one"]);
    let folder = host.path("backups");
    fs::create_dir(&folder).unwrap();
    let own = fs::read_to_string("/proc/sys/kernel/hostname").unwrap().trim().to_owned();
    // No process has that number.
    for name in [&own, "another-host"] {
        fs::write(folder.join(format!(".b.db.partial-{name}-4194305")), "").unwrap();
    }
    let (code, text) = host.volcrypt(&["key", "backup", folder.join("b.db").to_str().unwrap()]);
    assert_eq!(code, 0, "{text}");
    assert!(text.contains(&format!(".b.db.partial-{own}-4194305 is what is left of a backup")), "{text}");
    assert!(!text.contains("another-host"), "{text}");
}

#[test]
fn what_is_replaced_has_no_kept_key_in_it() {
    const WRAPPED: &[u8] = b"a key of the server's, which is wrapped";
    let keep = "INSERT INTO key_cache SELECT 'one', hex(zeroblob(32)), 512, ?1, check_value, 7, 'one', 1 FROM keks";
    let holds = |path: &Path| fs::read(path).unwrap().windows(WRAPPED.len()).any(|window| window == WRAPPED);
    let (host, killed) = (Host::new(), Host::new());
    host.enrol(&["one"]);
    let backup = host.back_up("backup.db");
    Connection::open(host.database()).unwrap().execute(keep, [WRAPPED]).unwrap();
    assert!(holds(&host.database()));
    // The same where it is still in the log that a killed daemon has left.
    let reader = Connection::open(host.database()).unwrap();
    reader.execute_batch("BEGIN; SELECT * FROM volumes").unwrap();
    Connection::open(host.database()).unwrap().execute("UPDATE key_cache SET fetched_at = 8", []).unwrap();
    for entry in fs::read_dir(host.state()).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), killed.state().join(entry.file_name())).unwrap();
    }
    assert!(holds(&killed.state().join("volcrypt.db-wal")));
    drop(reader);
    // What is refused has wiped nothing.
    let reader = Connection::open(host.database()).unwrap();
    reader.execute_batch("BEGIN; SELECT * FROM volumes").unwrap();
    assert!(host.try_restore(&backup).1.contains("is in use"));
    drop(reader);
    assert!(holds(&host.database()));
    for host in [&host, &killed] {
        let text = host.restore(&backup);
        assert!(!text.contains("could not be wiped"), "{text}");
        assert_eq!(host.kept().len(), 1);
        assert!(!holds(&host.kept()[0]));
    }
    // One that cannot be wiped is told of, and one of an older volcrypt's has none.
    for (change, is_told) in [
        ("CREATE TRIGGER hinder BEFORE DELETE ON key_cache BEGIN SELECT RAISE(ABORT, 'hindered'); END", true),
        ("DROP TABLE key_cache", false),
    ] {
        let database = Connection::open(host.database()).unwrap();
        database.execute(keep, [WRAPPED]).unwrap();
        database.execute_batch(change).unwrap();
        drop(database);
        let text = host.restore(&backup);
        assert_eq!(text.contains("could not be wiped from it (hindered)"), is_told, "{text}");
    }
}
