//! A key server that says what it is told to say, and a clock that shows what it is told to show.

use std::path::Path;
use std::sync::Condvar;
use std::sync::atomic::{AtomicI64, AtomicUsize};

use tempfile::TempDir;

use super::cache::latest_seen;
use super::clock::Clock;
use super::*;
use crate::policy::Profile;
use crate::store::tests::private_directory;
use crate::store::{EnrolledDevice, Store, VolumeState};

const DAY: i64 = 24 * 3600;
const NOW: i64 = 1_790_000_000;
const LIFETIME: Duration = Duration::from_secs(7 * 24 * 3600);

/// What the server says to a question for a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Answer {
    /// The key, whose bytes are all this one.
    Key(u8),
    No(Reason),
    /// Neither yes nor no.
    Silence,
    /// Nothing until it says something else.
    Hang,
}

#[derive(Clone)]
struct Script {
    answer: Arc<(Mutex<Answer>, Condvar)>,
    asked: Arc<AtomicUsize>,
    /// The volumes that it was told of as in use.
    used: Arc<Mutex<HashSet<VolumeId>>>,
    /// The keys that it was asked for by whoever has a record.
    known: Arc<Mutex<Vec<RecordedKey>>>,
}

impl Script {
    fn say(&self, answer: Answer) {
        *self.answer.0.lock().unwrap() = answer;
        self.answer.1.notify_all();
    }

    fn asked(&self) -> usize {
        self.asked.load(Ordering::SeqCst)
    }

    fn wait_until_asked(&self, times: usize) {
        let end = Instant::now() + Duration::from_secs(60);
        while self.asked() < times {
            assert!(Instant::now() < end, "asked {} times", self.asked());
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

impl KeyManager for Script {
    fn get(&self, _volume: &VolumeId) -> Result<Key, Refusal> {
        self.asked.fetch_add(1, Ordering::SeqCst);
        let mut answer = self.answer.0.lock().unwrap();
        while *answer == Answer::Hang {
            answer = self.answer.1.wait(answer).unwrap();
        }
        match *answer {
            Answer::Key(byte) => Ok(key_of(byte)),
            Answer::No(reason) => Err(Refusal::new(reason, "no")),
            Answer::Silence | Answer::Hang => Err(Refusal::unanswered("nobody answers")),
        }
    }

    fn create(&self, volume: &VolumeId, wanted: &Description) -> Result<(Key, Description), Refusal> {
        Ok((self.get(volume)?, wanted.clone()))
    }

    fn import(&self, volume: &VolumeId, key: &Key, _description: &Description) -> Result<Imported, Refusal> {
        match self.get(volume)?.same_as(key) {
            true => Ok(Imported::Present),
            false => Err(Refusal::new(Reason::WrongKey, "no")),
        }
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities { lists: true, imports: true, destroys: true, describes: true }
    }

    fn get_enrolled(&self, key: &RecordedKey) -> Result<Key, Refusal> {
        self.known.lock().unwrap().push(key.clone());
        self.get(&key.volume)
    }

    fn note_uses(&self, in_use: &HashSet<VolumeId>) -> Result<(), Refusal> {
        self.used.lock().unwrap().clone_from(in_use);
        Ok(())
    }

    fn described(&self, volume: &VolumeId) -> Result<Option<(Key, Description)>, Refusal> {
        match self.get(volume) {
            Ok(key) => Ok(Some((key, wanted()))),
            Err(refusal) if refusal.reason() == Reason::NoKey => Ok(None),
            Err(refusal) => Err(refusal),
        }
    }

    fn destroy(&self, volume: &VolumeId) -> Result<(), Refusal> {
        self.get(volume).map(drop)
    }

    fn list(&self) -> Result<Vec<KeyInfo>, Refusal> {
        Ok(Vec::new())
    }
}

/// A host with its database, its clock and its key server.
struct Host {
    folder: TempDir,
    wall: Arc<AtomicI64>,
    script: Script,
}

impl Host {
    fn new() -> Self {
        let answer = Arc::new((Mutex::new(Answer::Key(1)), Condvar::new()));
        let script = Script { answer, asked: Arc::default(), used: Arc::default(), known: Arc::default() };
        Host { folder: private_directory(), wall: Arc::new(AtomicI64::new(NOW)), script }
    }

    fn path(&self) -> &Path {
        self.folder.path()
    }

    fn store(&self) -> Arc<Store> {
        Arc::new(Store::open(self.path()).unwrap())
    }

    /// As another start of the daemon.
    fn start(&self) -> CachedKeyManager {
        self.start_for("server")
    }

    fn start_for(&self, server: &str) -> CachedKeyManager {
        let cache = self.cache(self.store(), server).unwrap();
        CachedKeyManager::new(Box::new(self.script.clone()), Cache::On(Box::new(cache)))
    }

    fn cache(&self, store: Arc<Store>, server: &str) -> Result<KeyCache, Refusal> {
        let wall = Arc::clone(&self.wall);
        let clock = Clock::new(Box::new(move || wall.load(Ordering::SeqCst)), latest_seen(&store).unwrap());
        KeyCache::with_clock(store, (None, self.path()), server, LIFETIME, clock)
    }

    fn at(&self, time: i64) {
        self.wall.store(time, Ordering::SeqCst);
    }
}

fn key_of(byte: u8) -> Key {
    Key::filled(64, |bytes| {
        bytes.fill(byte);
        Ok(())
    })
    .unwrap()
}

fn wanted() -> Description {
    let device = EnrolledDevice { wwid: Some("naa.6".to_owned()), ..EnrolledDevice::default() };
    Description::new(device, 4096, ("default", &Profile::default()), None, 7)
}

fn one() -> VolumeId {
    "one".parse().unwrap()
}

/// The key of `volume` that is all ones, as a record names it.
fn recorded(volume: &VolumeId) -> RecordedKey {
    let check_value = key_of(1).check_value(volume);
    RecordedKey { volume: volume.clone(), handle: KeyHandle::first(volume), check_value }
}

fn get(manager: &CachedKeyManager, volume: &VolumeId) -> Result<Key, Refusal> {
    manager.get_enrolled(&recorded(volume))
}

fn refused(manager: &CachedKeyManager) -> Reason {
    get(manager, &one()).err().expect("must be refused").reason()
}

/// Has the server give the key once, and be silent from then on.
/// Nobody asks for the key of volume one behind those who do not wait.
fn wait_until_nobody_asks(manager: &CachedKeyManager) {
    let end = Instant::now() + Duration::from_secs(60);
    while manager.shared.jobs.is_asked_for(&one()) {
        assert!(Instant::now() < end, "somebody asks for ever");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn use_once(host: &Host, manager: &CachedKeyManager) {
    host.script.say(Answer::Key(1));
    let key = get(manager, &one()).unwrap();
    assert_eq!(key.from_cache(), None);
    host.script.say(Answer::Silence);
}

#[test]
fn a_kept_key_is_used_while_nobody_answers_also_after_a_restart() {
    let host = Host::new();
    let manager = host.start();
    host.script.say(Answer::Silence);
    assert_eq!(refused(&manager), Reason::TimedOut, "it was never used here");
    use_once(&host, &manager);
    for manager in [&manager, &host.start(), &host.start()] {
        let key = get(manager, &one()).unwrap();
        assert!(key.same_as(&key_of(1)));
        assert_eq!(key.from_cache(), Some(NOW));
    }
    let other = get(&manager, &"two".parse().unwrap()).err().unwrap();
    assert_eq!(other.to_string(), "nobody answers; this host's cache does not have it");
    assert_eq!(other.reason(), Reason::TimedOut);
}

#[test]
fn every_no_to_a_key_wipes_the_kept_one_and_nothing_else_that_goes_wrong_has_it_used() {
    for reason in [Reason::NoKey, Reason::KeyDestroyed, Reason::NotAllowed, Reason::WrongKey] {
        let host = Host::new();
        let manager = host.start();
        use_once(&host, &manager);
        host.script.say(Answer::No(reason));
        let before = Instant::now();
        while get(&manager, &one()).is_ok_and(|key| key.from_cache().is_some()) {
            assert!(before.elapsed() < Duration::from_secs(60));
        }
        host.script.say(Answer::Silence);
        for manager in [&manager, &host.start()] {
            assert_eq!(refused(manager), Reason::TimedOut, "{reason:?}");
        }
        assert!(host.store().cached_keys().unwrap().is_empty());
    }
    for reason in [Reason::KeyManager, Reason::TimedOut, Reason::Configuration] {
        let host = Host::new();
        let manager = host.start();
        use_once(&host, &manager);
        host.script.say(Answer::No(reason));
        assert_eq!(refused(&manager), reason, "it is not known that nobody answers");
        host.script.say(Answer::Silence);
        assert!(get(&manager, &one()).is_ok(), "and nobody said no");
    }
}

#[test]
fn a_key_that_is_created_or_described_is_kept_and_one_that_is_described_no_more_is_not() {
    let host = Host::new();
    let manager = host.start();
    manager.create(&one(), &wanted()).unwrap();
    manager.described(&"two".parse().unwrap()).unwrap().unwrap();
    let kept =
        |manager: &CachedKeyManager| manager.kept().unwrap().until.into_keys().map(String::from).collect::<Vec<_>>();
    assert_eq!(kept(&manager), ["one", "two"]);
    host.script.say(Answer::No(Reason::NoKey));
    assert!(manager.described(&one()).unwrap().is_none());
    assert_eq!(kept(&manager), ["two"]);
}

#[test]
fn the_lifetime_counts_from_the_servers_last_answer() {
    let host = Host::new();
    let manager = host.start();
    use_once(&host, &manager);
    host.at(NOW + 3 * DAY);
    use_once(&host, &manager);
    let end = NOW + 10 * DAY;
    assert_eq!(manager.kept().unwrap().until, BTreeMap::from([(one(), (KeyHandle::first(&one()), end))]));
    host.at(end - 1);
    assert!(get(&manager, &one()).is_ok());
    host.at(end);
    assert_eq!(refused(&manager), Reason::TimedOut);
    assert!(host.store().cached_keys().unwrap().is_empty(), "it is wiped, and not only passed over");
    assert!(manager.kept().unwrap().until.is_empty());
}

#[test]
fn what_is_over_is_wiped_at_the_next_start() {
    let host = Host::new();
    use_once(&host, &host.start());
    host.at(NOW + 7 * DAY);
    assert_eq!(host.store().cached_keys().unwrap().len(), 1);
    let manager = host.start();
    assert!(host.store().cached_keys().unwrap().is_empty());
    assert_eq!(refused(&manager), Reason::TimedOut);
}

#[test]
fn a_wrong_clock_makes_no_key_live_longer() {
    let host = Host::new();
    use_once(&host, &host.start());
    // It has been seen that its time was over; without that row it would be wiped.
    host.store().cache_has_seen(NOW + 8 * DAY).unwrap();
    for wrong in [0, NOW - 3600, NOW, NOW + DAY] {
        host.at(wrong);
        let manager = host.start();
        let refusal = get(&manager, &one()).err().unwrap();
        assert!(refusal.to_string().contains("clock is wrong: set it"), "{wrong}: {refusal}");
        assert!(manager.kept().unwrap().fault.unwrap().contains("clock"));
        assert_eq!(host.store().cached_keys().unwrap().len(), 1, "once the clock is right it is seen what is over");
    }
    // 1970 is no time to keep a key at either.
    host.at(1000);
    host.script.say(Answer::Key(1));
    let manager = host.start();
    assert_eq!(get(&manager, &one()).unwrap().from_cache(), None);
    assert_eq!(host.store().cached_keys().unwrap()[0].fetched_at, NOW);
    // A clock that was set back for good: nothing is known of what was kept before.
    host.at(NOW - DAY);
    get(&manager, &"two".parse().unwrap()).unwrap();
    let kept = host.store().cached_keys().unwrap();
    assert_eq!(
        kept.iter().map(|kept| (kept.volume.as_str(), kept.fetched_at)).collect::<Vec<_>>(),
        [("two", NOW - DAY)]
    );
}

#[test]
fn a_clock_that_was_set_back_is_not_believed_while_the_keys_of_before_cannot_be_wiped() {
    let host = Host::new();
    let sql = |statement: &str| {
        rusqlite::Connection::open(host.path().join("volcrypt.db")).unwrap().execute_batch(statement).unwrap();
    };
    host.at(NOW + 30 * DAY);
    let manager = host.start();
    use_once(&host, &manager);
    // It is corrected, and the next key cannot be kept.
    host.at(NOW);
    sql("CREATE TRIGGER full BEFORE DELETE ON key_cache BEGIN SELECT RAISE(ABORT, 'full'); END");
    let two: VolumeId = "two".parse().unwrap();
    for _ in 0..2 {
        host.script.say(Answer::Key(1));
        assert!(get(&manager, &two).is_ok(), "the server is there all the same");
        host.script.say(Answer::Silence);
        let refusal = get(&manager, &one()).err().expect("it would serve for a month more than its time");
        assert!(refusal.to_string().contains("clock is wrong"), "{refusal}");
        assert_eq!(host.store().cached_keys().unwrap().len(), 1);
    }
    sql("DROP TRIGGER full");
    host.script.say(Answer::Key(1));
    get(&manager, &two).unwrap();
    host.script.say(Answer::Silence);
    assert!(get(&manager, &two).is_ok(), "it is kept by the clock as it is now");
    assert_eq!(refused(&manager), Reason::TimedOut);
    assert!(host.store().cached_key(&one()).unwrap().is_none());
}

#[test]
fn a_key_that_was_kept_at_a_time_still_to_come_is_over() {
    let host = Host::new();
    let (manager, store) = (host.start(), host.store());
    let Cache::On(cache) = &manager.shared.cache else { panic!() };
    // Another process with another clock.
    let ahead = |seconds| {
        let clock = Clock::new(Box::new(move || NOW + seconds), 0);
        KeyCache::with_clock(host.store(), (None, host.path()), "server", LIFETIME, clock).unwrap()
    };
    let keep = |seconds| ahead(seconds).keep(&one(), &KeyHandle::first(&one()), &key_of(1));
    host.script.say(Answer::Silence);
    keep(200);
    assert!(get(&manager, &one()).is_ok(), "clocks are corrected a little");
    manager.wipe_copy(&one());
    keep(400);
    assert!(manager.kept().unwrap().until.is_empty());
    assert_eq!(store.cached_keys().unwrap().len(), 1);
    assert_eq!(refused(&manager), Reason::TimedOut);
    assert!(store.cached_keys().unwrap().is_empty(), "it is wiped by whoever finds it");
    keep(400);
    cache.tidy();
    assert!(store.cached_keys().unwrap().is_empty(), "and otherwise with what is over");
}

#[test]
fn a_changed_row_does_not_open() {
    let host = Host::new();
    let manager = host.start();
    use_once(&host, &manager);
    let connection = rusqlite::Connection::open(host.path().join("volcrypt.db")).unwrap();
    for change in [
        "UPDATE key_cache SET key_version = 2",
        "UPDATE key_cache SET key_version = 1, fetched_at = fetched_at + 1",
        "UPDATE key_cache SET fetched_at = fetched_at - 1, volume_id = 'two', key_id = 'two'",
        "UPDATE key_cache SET volume_id = 'one', key_id = 'one', wrapped = zeroblob(length(wrapped))",
    ] {
        connection.execute(change, []).unwrap();
        let row = host.store().cached_keys().unwrap().remove(0);
        let wanted = RecordedKey { handle: row.key, ..recorded(&row.volume) };
        let refusal = manager.get_enrolled(&wanted).err().expect(change);
        assert!(refusal.to_string().contains("its cached key does not open"), "{refusal}");
    }
}

#[test]
fn another_server_or_none_that_is_to_be_kept_wipes_all() {
    let host = Host::new();
    use_once(&host, &host.start());
    assert_eq!(refused(&host.start_for("another server")), Reason::TimedOut);
    assert!(host.store().cached_keys().unwrap().is_empty());
    use_once(&host, &host.start());
    KeyCache::wipe(&host.store()).unwrap();
    assert!(host.store().cached_keys().unwrap().is_empty());
}

#[test]
fn no_key_stands_in_the_files_and_a_wiped_one_not_even_wrapped() {
    let host = Host::new();
    let manager = host.start();
    use_once(&host, &manager);
    let store = host.store();
    let wrapped = store.cached_key(&one()).unwrap().unwrap().wrapped;
    let holds = |bytes: &[u8]| {
        let mut files =
            std::fs::read_dir(host.path()).unwrap().map(|entry| std::fs::read(entry.unwrap().path()).unwrap());
        files.any(|file| file.windows(bytes.len()).any(|window| window == bytes))
    };
    assert!(holds(&wrapped));
    assert!(!holds(key_of(1).bytes()));
    // Somebody reads as it was, for a moment.
    let reader = rusqlite::Connection::open(store.path()).unwrap();
    reader.execute_batch("BEGIN; SELECT * FROM key_cache").unwrap();
    let reading = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(500));
        drop(reader);
    });
    manager.wipe_copy(&one());
    assert!(!holds(&wrapped));
    reading.join().unwrap();
}

#[test]
fn what_cannot_be_wiped_is_not_used_all_the_same() {
    let host = Host::new();
    use_once(&host, &host.start());
    let store = Arc::new(Store::open_for_reading(host.path()).unwrap());
    let cache = Cache::On(Box::new(host.cache(store, "server").unwrap()));
    let manager = CachedKeyManager::new(Box::new(host.script.clone()), cache);
    assert!(get(&manager, &one()).is_ok(), "a read-only database is good enough to read it");
    manager.wipe_copy(&one());
    assert_eq!(host.store().cached_keys().unwrap().len(), 1);
    assert_eq!(refused(&manager), Reason::TimedOut);
    assert!(manager.kept().unwrap().until.is_empty());
}

#[test]
fn what_could_not_be_wiped_is_wiped_as_soon_as_that_can_be_done() {
    let host = Host::new();
    let manager = host.start();
    use_once(&host, &manager);
    let Cache::On(cache) = &manager.shared.cache else { panic!() };
    let trigger = |statement: &str| {
        rusqlite::Connection::open(host.path().join("volcrypt.db")).unwrap().execute_batch(statement).unwrap();
    };
    let full = "CREATE TRIGGER full BEFORE DELETE ON key_cache BEGIN SELECT RAISE(ABORT, 'full'); END";
    for wipes in ["tidy", "keep"] {
        trigger(full);
        manager.wipe_copy(&one());
        assert_eq!(host.store().cached_keys().unwrap().len(), 1);
        trigger("DROP TRIGGER full");
        match wipes {
            "tidy" => cache.tidy(),
            _ => cache.keep(&"two".parse().unwrap(), &KeyHandle::first(&"two".parse().unwrap()), &key_of(2)),
        }
        assert!(host.store().cached_key(&one()).unwrap().is_none(), "{wipes}");
        use_once(&host, &manager);
    }
}

#[test]
fn a_key_of_a_retired_or_destroyed_volume_is_not_kept() {
    for state in [VolumeState::Retired, VolumeState::Destroyed] {
        let host = Host::new();
        let (store, manager) = (host.store(), host.start());
        store.enrol(&wanted().record(&one(), &key_of(1))).unwrap();
        use_once(&host, &manager);
        store.change_state(&one(), &[VolumeState::Enrolled], state, None).unwrap();
        manager.wipe_copy(&one());
        use_once(&host, &manager);
        assert_eq!(refused(&manager), Reason::TimedOut);
        assert!(store.cached_keys().unwrap().is_empty());
    }
}

#[test]
fn an_answer_that_was_asked_for_before_the_key_was_destroyed_is_not_kept() {
    let host = Host::new();
    let manager = host.start();
    host.script.say(Answer::Hang);
    std::thread::scope(|scope| {
        let asking = scope.spawn(|| get(&manager, &one()));
        host.script.wait_until_asked(1);
        manager.wipe_copy(&one());
        host.script.say(Answer::Key(1));
        assert!(asking.join().unwrap().is_ok());
    });
    assert!(host.store().cached_keys().unwrap().is_empty());
    host.script.say(Answer::Key(1));
    get(&manager, &one()).unwrap();
    manager.destroy(&one()).unwrap();
    assert!(host.store().cached_keys().unwrap().is_empty());
}

#[test]
fn a_server_that_was_just_silent_is_not_waited_for_and_its_no_counts_when_it_comes() {
    let host = Host::new();
    let manager = host.start();
    use_once(&host, &manager);
    assert!(get(&manager, &one()).unwrap().from_cache().is_some());
    host.script.say(Answer::Hang);
    let asked = host.script.asked();
    for _ in 0..100 {
        // Nobody answers before this loop is over.
        assert!(get(&manager, &one()).unwrap().from_cache().is_some());
    }
    host.script.wait_until_asked(asked + 1);
    assert_eq!(host.script.asked(), asked + 1, "it is asked behind them, once at a time");
    host.script.say(Answer::No(Reason::KeyDestroyed));
    let end = Instant::now() + Duration::from_secs(60);
    while !host.store().cached_keys().unwrap().is_empty() {
        assert!(Instant::now() < end, "the server's no was not heard");
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(refused(&manager), Reason::KeyDestroyed);
}

#[test]
fn another_key_encryption_key_takes_the_kept_keys_along() {
    let host = Host::new();
    let manager = host.start();
    use_once(&host, &manager);
    let before = host.store().cached_key(&one()).unwrap().unwrap();
    let mut step = RotationStep::Begin;
    let new = loop {
        match manager.rotate_kek(&step).unwrap() {
            KekRotation::UnderWay { after, .. } => step = RotationStep::GoOn { after },
            KekRotation::Finished { new, .. } => break new,
        }
    };
    let after = host.store().cached_key(&one()).unwrap().unwrap();
    assert_ne!((before.kek, &before.wrapped), (after.kek, &after.wrapped));
    assert_eq!(after.kek, new);
    for manager in [&manager, &host.start()] {
        assert!(get(manager, &one()).unwrap().same_as(&key_of(1)));
    }
}

#[test]
fn without_its_key_encryption_key_the_cache_does_not_open() {
    let host = Host::new();
    use_once(&host, &host.start());
    std::fs::remove_file(host.path().join("kek")).unwrap();
    let refusal = host.cache(host.store(), "server").err().unwrap();
    assert_eq!(refusal.reason(), Reason::NoKey);
    let cache = Cache::Faulty(refusal.to_string());
    let manager = CachedKeyManager::new(Box::new(host.script.clone()), cache);
    assert_eq!(refused(&manager), Reason::TimedOut);
    host.script.say(Answer::Key(1));
    assert!(get(&manager, &one()).is_ok(), "the server is there all the same");
    assert!(manager.kept().unwrap().fault.is_some());
}

#[test]
fn a_cache_that_was_switched_off_may_have_another_key_encryption_key() {
    let host = Host::new();
    use_once(&host, &host.start());
    std::fs::remove_file(host.path().join("kek")).unwrap();
    KeyCache::switch_off(&host.store()).unwrap();
    use_once(&host, &host.start());
    assert!(get(&host.start(), &one()).is_ok());
    // Also where a key was destroyed before the keys went to the server.
    let path = host.path();
    let embedded = crate::keys::EmbeddedKeyManager::open(host.store(), None, path).unwrap();
    embedded.make(&"destroyed".parse().unwrap(), 256.try_into().unwrap()).unwrap();
    embedded.destroy(&"destroyed".parse().unwrap()).unwrap();
    std::fs::remove_file(path.join("kek")).unwrap();
    KeyCache::switch_off(&host.store()).unwrap();
    use_once(&host, &host.start());
    // But not where that would cost a key.
    let embedded = crate::keys::EmbeddedKeyManager::open(host.store(), None, host.path()).unwrap();
    embedded.make(&"two".parse().unwrap(), 256.try_into().unwrap()).unwrap();
    KeyCache::switch_off(&host.store()).unwrap();
    assert!(embedded.get(&"two".parse().unwrap()).is_ok());
    std::fs::remove_file(host.path().join("kek")).unwrap();
    assert!(host.cache(host.store(), "server").is_err());
}

#[test]
fn a_backup_has_no_kept_key_in_it_and_a_restored_database_forgets_them() {
    let host = Host::new();
    let manager = host.start();
    use_once(&host, &manager);
    let wrapped = host.store().cached_key(&one()).unwrap().unwrap().wrapped;
    let holds = |path: &Path| {
        let bytes = std::fs::read(path).unwrap();
        bytes.windows(wrapped.len()).any(|window| window == wrapped)
    };
    let (plain_copy, backup) = (host.path().join("copy.db"), host.path().join("backup.db"));
    std::fs::copy(host.path().join("volcrypt.db"), &plain_copy).unwrap();
    assert!(holds(&plain_copy));
    crate::store::back_up(host.path(), &backup).unwrap();
    assert!(!holds(&backup));
    for copy in [&plain_copy, &backup] {
        let elsewhere = private_directory();
        let staged = crate::store::Staged::new(copy, elsewhere.path()).unwrap();
        staged.put_in_place("x").unwrap();
        assert!(!holds(&elsewhere.path().join("volcrypt.db")));
        assert!(Store::open(elsewhere.path()).unwrap().cached_keys().unwrap().is_empty());
    }
    assert!(get(&manager, &one()).is_ok(), "those of the host itself stay");
}

#[test]
fn a_key_that_was_fetched_ahead_is_there_at_once() {
    for cached in [false, true] {
        let host = Host::new();
        let manager = match cached {
            true => host.start(),
            false => CachedKeyManager::new(Box::new(host.script.clone()), Cache::Off),
        };
        let fetch = || {
            host.script.say(Answer::Key(1));
            manager.fetch_ahead(&recorded(&one()));
            wait_until_nobody_asks(&manager);
        };
        fetch();
        host.script.say(Answer::Hang);
        let asked = host.script.asked();
        let key = get(&manager, &one()).unwrap();
        assert!(key.same_as(&key_of(1)) && key.from_cache().is_none());
        manager.fetch_ahead(&recorded(&one()));
        assert_eq!(host.script.asked(), asked, "neither is it asked for again");
        // Destroyed or retired on this host between the two.
        manager.wipe_copy(&one());
        host.script.say(Answer::No(Reason::NoKey));
        assert_eq!(refused(&manager), Reason::NoKey);
        fetch();
        manager.destroy(&one()).unwrap();
        host.script.say(Answer::No(Reason::KeyDestroyed));
        assert_eq!(refused(&manager), Reason::KeyDestroyed);
    }
}

#[test]
fn what_is_fetched_ahead_is_bounded_and_hurts_nobody_whatever_the_server_says() {
    let host = Host::new();
    let manager = CachedKeyManager::new(Box::new(host.script.clone()), Cache::Off);
    host.script.say(Answer::Hang);
    for number in 0..2000 {
        manager.fetch_ahead(&recorded(&format!("v{number}").parse().unwrap()));
    }
    host.script.wait_until_asked(4);
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(host.script.asked(), 4, "not more at once");
    host.script.say(Answer::Key(1));
    host.script.wait_until_asked(1024);
    host.script.say(Answer::No(Reason::NoKey));
    manager.fetch_ahead(&recorded(&one()));
    wait_until_nobody_asks(&manager);
    assert_eq!(refused(&manager), Reason::NoKey);
}

#[test]
fn the_server_hears_what_is_in_use() {
    let host = Host::new();
    let used = HashSet::from(["a".parse().unwrap()]);
    host.start().note_uses(&used).unwrap();
    assert_eq!(*host.script.used.lock().unwrap(), used);
}

#[test]
fn a_key_that_is_known_is_asked_for_by_its_check_value() {
    let host = Host::new();
    let (manager, known) = (host.start(), recorded(&one()));
    manager.get_enrolled(&known).unwrap();
    assert_eq!(*host.script.known.lock().unwrap(), std::slice::from_ref(&known));
    // Nobody waits for these: ahead of an open, and behind one that the kept key is enough for.
    manager.wipe_copy(&one());
    manager.fetch_ahead(&known);
    host.script.wait_until_asked(2);
    assert_eq!(*host.script.known.lock().unwrap(), [known.clone(), known]);
}

#[test]
fn another_key_is_neither_kept_nor_held() {
    let host = Host::new();
    let (manager, known) = (host.start(), recorded(&one()));
    manager.get_enrolled(&known).unwrap();
    host.script.say(Answer::Key(2));
    manager.fetch_ahead(&known);
    wait_until_nobody_asks(&manager);
    assert_eq!(host.script.asked(), 2);
    host.script.say(Answer::Key(1));
    assert!(manager.get_enrolled(&known).unwrap().same_as(&key_of(1)), "the other one is held");

    host.script.say(Answer::Key(2));
    assert!(manager.get_enrolled(&known).unwrap().same_as(&key_of(2)), "who asked has to see it");
    host.script.say(Answer::Silence);
    assert!(manager.get_enrolled(&known).is_err(), "it took the kept key's place");
}

#[test]
fn a_kept_key_that_was_wiped_while_it_was_waited_for_is_not_used() {
    let host = Host::new();
    let manager = host.start();
    get(&manager, &one()).unwrap();
    // Meanwhile the server says no to somebody, and then nothing more.
    host.script.say(Answer::Hang);
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| refused(&manager));
        host.script.wait_until_asked(2);
        manager.shared.evict(&one());
        host.script.say(Answer::Silence);
        assert_eq!(waiting.join().unwrap(), Reason::TimedOut);
    });
}

#[test]
fn who_has_a_kept_key_does_not_wait_as_long_as_others_who_have_none() {
    let host = Host::new();
    let manager = host.start();
    get(&manager, &one()).unwrap();
    host.script.say(Answer::Hang);
    let other = recorded(&"two".parse().unwrap());
    let waiting = manager.shared.silence.question(&other, Instant::now() - Duration::from_secs(3));
    for _ in 0..100 {
        // Nobody answers before this loop is over.
        assert!(get(&manager, &one()).unwrap().from_cache().is_some());
    }
    drop(waiting);
    host.script.say(Answer::Key(1));
    wait_until_nobody_asks(&manager);
    assert!(get(&manager, &one()).unwrap().from_cache().is_none());
}

#[test]
fn who_meets_a_silent_server_first_waits_for_it_a_moment() {
    let host = Host::new();
    let manager = host.start();
    get(&manager, &one()).unwrap();
    host.script.say(Answer::Hang);
    // For as long as its question has no answer, which in this test comes never.
    assert!(get(&manager, &one()).unwrap().from_cache().is_some());
    host.script.say(Answer::No(Reason::KeyDestroyed));
    let end = Instant::now() + Duration::from_secs(60);
    while !host.store().cached_keys().unwrap().is_empty() {
        assert!(Instant::now() < end, "the no that came late was not heard");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_silent_server_is_asked_again_although_nobody_needs_a_key() {
    let host = Host::new();
    let manager = host.start();
    get(&manager, &one()).unwrap();
    host.script.say(Answer::No(Reason::NotAllowed));
    let asked = host.script.asked();
    manager.shared.silence.begin(Instant::now() - Duration::from_secs(10));
    manager.shared.wake.send(()).unwrap();
    host.script.wait_until_asked(asked + 1);
    wait_until_nobody_asks(&manager);
    assert!(host.store().cached_keys().unwrap().is_empty());
    assert!(manager.shared.silence.patience(Instant::now()).is_some(), "and is silent no more");
}

#[test]
fn a_server_whose_answer_makes_no_sense_is_not_silent_any_more() {
    let host = Host::new();
    let manager = host.start();
    use_once(&host, &manager);
    assert!(get(&manager, &one()).is_ok());
    host.script.say(Answer::No(Reason::KeyManager));
    assert!(get(&manager, &one()).unwrap().from_cache().is_some(), "it is asked behind this one");
    wait_until_nobody_asks(&manager);
    assert_eq!(refused(&manager), Reason::KeyManager);
    assert!(!host.store().cached_keys().unwrap().is_empty(), "the kept key stays");
}

/// The key of volume one that is all twos, as a record names it that was re-encrypted.
fn second() -> RecordedKey {
    let check_value = key_of(2).check_value(&one());
    RecordedKey { handle: KeyHandle::of(&one(), 2), check_value, ..recorded(&one()) }
}

#[test]
fn a_kept_key_is_used_for_the_version_that_it_was_kept_as() {
    let host = Host::new();
    let manager = host.start();
    use_once(&host, &manager);
    // Also if it is the same key by its check value.
    for wanted in [second(), RecordedKey { handle: second().handle, ..recorded(&one()) }] {
        for manager in [&manager, &host.start()] {
            let refusal = manager.get_enrolled(&wanted).err().expect("version 1 was used");
            assert_eq!(
                refusal.to_string(),
                "nobody answers; this host's cache has another key of it (one, version 1, and not one, version 2)"
            );
            assert_eq!(refusal.reason(), Reason::TimedOut);
        }
    }
    assert!(get(&manager, &one()).is_ok(), "the kept one stays for whoever needs it");
    let record = wanted().record(&one(), &key_of(1));
    let starts_until = |version| {
        let record = crate::store::VolumeRecord { key: KeyHandle::of(&one(), version), ..record.clone() };
        host.start().kept().unwrap().until(&record)
    };
    assert!(starts_until(1).is_some() && starts_until(2).is_none());

    host.script.say(Answer::Key(2));
    let manager = host.start();
    assert!(manager.get_enrolled(&second()).unwrap().same_as(&key_of(2)));
    host.script.say(Answer::Silence);
    for manager in [&manager, &host.start()] {
        assert!(manager.get_enrolled(&second()).unwrap().same_as(&key_of(2)));
        assert_eq!(refused(manager), Reason::TimedOut, "the second one was kept in its place");
    }
    assert!(starts_until(1).is_none() && starts_until(2).is_some());
}

#[test]
fn a_key_that_is_held_is_not_another_version_of_it() {
    let host = Host::new();
    let manager = CachedKeyManager::new(Box::new(host.script.clone()), Cache::Off);
    manager.fetch_ahead(&recorded(&one()));
    wait_until_nobody_asks(&manager);
    host.script.say(Answer::Key(2));
    assert!(manager.get_enrolled(&second()).unwrap().same_as(&key_of(2)));
    let same = RecordedKey { handle: second().handle, ..recorded(&one()) };
    host.script.say(Answer::Silence);
    assert!(manager.get_enrolled(&same).is_err());
    assert!(get(&manager, &one()).unwrap().same_as(&key_of(1)), "it is held");
}

#[test]
fn who_names_no_version_hears_what_the_server_says_now() {
    let host = Host::new();
    let manager = host.start();
    assert!(manager.get(&one()).unwrap().same_as(&key_of(1)));
    assert!(host.store().cached_keys().unwrap().is_empty(), "which one it is nobody has said");
    use_once(&host, &manager);
    assert!(manager.get(&one()).is_err());
    host.script.say(Answer::No(Reason::NoKey));
    assert!(manager.get(&one()).is_err());
    host.script.say(Answer::Silence);
    assert_eq!(refused(&manager), Reason::TimedOut, "a no is a no");
}

#[test]
fn what_is_described_is_kept_as_the_version_that_was_described() {
    let host = Host::new();
    let manager = host.start();
    let wanted = wanted().with_key_version(2);
    host.script.say(Answer::Key(2));
    manager.create(&one(), &wanted).unwrap();
    host.script.say(Answer::Silence);
    assert!(manager.get_enrolled(&second()).unwrap().same_as(&key_of(2)));
    assert_eq!(refused(&manager), Reason::TimedOut);
}
