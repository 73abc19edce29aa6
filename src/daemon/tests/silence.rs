//! A key server that accepts questions and never answers, one that cannot be reached, and keys that are fetched ahead.

use std::sync::Condvar;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc;
use std::time::Instant;

use super::super::auditing::with_source;
use super::super::broker::Verdict;
use super::super::guests::Guests;
use super::super::pool::Pool;
use super::super::server::Server;
use super::fleet::Shared;
use super::server::{guest_of, open_errno};
use super::*;
use crate::keys::cached::{Cache, CachedKeyManager, KeyCache};
use crate::keys::{Capabilities, Description, Imported, KeyInfo, KeyManager, RecordedKey};
use crate::volume::VolumeId;

/// Says nothing of volumes whose names begin with `hung`, while it is shut.
#[derive(Clone, Default)]
struct Gate {
    keys: Shared,
    shut: Arc<(Mutex<bool>, Condvar)>,
    waiting: Arc<AtomicUsize>,
}

impl Gate {
    fn shut(&self, shut: bool) {
        *self.shut.0.lock().unwrap() = shut;
        self.shut.1.notify_all();
    }
}

impl KeyManager for Gate {
    fn get(&self, volume: &VolumeId) -> Result<Key, Refusal> {
        if volume.as_str().starts_with("hung") {
            let mut shut = self.shut.0.lock().unwrap();
            if *shut {
                self.waiting.fetch_add(1, Ordering::SeqCst);
            }
            while *shut {
                shut = self.shut.1.wait(shut).unwrap();
            }
        }
        self.keys.get(volume)
    }

    fn get_enrolled(&self, key: &RecordedKey) -> Result<Key, Refusal> {
        self.get(&key.volume)
    }

    fn create(&self, volume: &VolumeId, wanted: &Description) -> Result<(Key, Description), Refusal> {
        self.keys.create(volume, wanted)
    }

    fn import(&self, volume: &VolumeId, key: &Key, description: &Description) -> Result<Imported, Refusal> {
        self.keys.import(volume, key, description)
    }

    fn capabilities(&self) -> Capabilities {
        self.keys.capabilities()
    }

    fn described(&self, volume: &VolumeId) -> Result<Option<(Key, Description)>, Refusal> {
        self.keys.described(volume)
    }

    fn destroy(&self, volume: &VolumeId) -> Result<(), Refusal> {
        self.keys.destroy(volume)
    }

    fn list(&self) -> Result<Vec<KeyInfo>, Refusal> {
        self.keys.list()
    }
}

#[test]
fn opens_that_wait_for_a_silent_key_server_keep_no_other_from_its_answer() {
    const THREADS: usize = 4;
    const HUNG: u32 = 20;
    let world = World::new();
    let gate = Gate::default();
    let broker = world.broker(true).with_keys(Box::new(gate.clone()));
    let add = |name: &str, minor| {
        let device = world.add_volume(name, minor);
        broker.enrol(device, None).unwrap();
        Node::new("/dev", device)
    };
    let hung: Vec<Node> = (0..HUNG).map(|number| add(&format!("hung-{number}"), 200 + number)).collect();
    let fine = add("fine", 199);
    let unprotected = Node::new("/dev", {
        let device = world.add_volume("none", 198);
        world.change(device, |identity| (identity.iscsi, identity.wwid) = (None, None));
        device
    });
    gate.shut(true);

    let guests = Arc::new(Guests::new(Arc::new(world.clone())).unwrap());
    let deadline = Duration::from_secs(120);
    let server = Server::new(Arc::new(broker), Arc::clone(&guests), Pool::new(THREADS), deadline);
    std::thread::spawn(move || server.serve());
    let (done, finished) = mpsc::channel();
    // Every volume twice: the second open waits for the first one's key.
    for node in hung.iter().chain(&hung) {
        let (guests, path, done) = (Arc::clone(&guests), node.0.clone(), done.clone());
        std::thread::spawn(move || done.send(guest_of(&guests, move || open_errno(&path))).unwrap());
    }
    let end = Instant::now() + Duration::from_secs(60);
    while gate.waiting.load(Ordering::SeqCst) < HUNG as usize {
        assert!(Instant::now() < end, "{} wait for their keys", gate.waiting.load(Ordering::SeqCst));
        std::thread::sleep(Duration::from_millis(5));
    }
    for _ in 0..10 {
        let path = fine.0.clone();
        assert_eq!(guest_of(&guests, move || open_errno(&path)), None, "its key is there");
        let path = unprotected.0.clone();
        // There is no such device behind the node.
        assert_eq!(guest_of(&guests, move || open_errno(&path)), Some(libc::ENXIO));
        assert!(guest_of(&guests, || std::fs::read_to_string("/etc/passwd").is_ok()));
    }
    assert!(finished.try_recv().is_err(), "nobody has answered the others yet");
    gate.shut(false);
    for _ in 0..2 * HUNG {
        assert_eq!(finished.recv_timeout(Duration::from_secs(120)).unwrap(), None);
    }
}

/// A key server's key manager with a cache, as the daemon has it.
fn with_cache(world: &World, broker: Broker, server: &Reachable) -> Broker {
    let state = world.path().join("state");
    let store = Arc::clone(&broker.vault().unwrap().store);
    let cache = KeyCache::open(store, None, &state, "server", Duration::from_secs(24 * 3600)).unwrap();
    broker.with_keys(Box::new(CachedKeyManager::new(Box::new(server.clone()), Cache::On(Box::new(cache)))))
}

/// Answers as long as it is there.
#[derive(Clone, Default)]
struct Reachable {
    keys: Shared,
    gone: Arc<AtomicBool>,
    asked: Arc<AtomicUsize>,
}

impl KeyManager for Reachable {
    fn get(&self, volume: &VolumeId) -> Result<Key, Refusal> {
        self.asked.fetch_add(1, Ordering::SeqCst);
        match self.gone.load(Ordering::SeqCst) {
            true => Err(Refusal::unanswered("nobody answers")),
            false => self.keys.get(volume),
        }
    }

    fn get_enrolled(&self, key: &RecordedKey) -> Result<Key, Refusal> {
        self.get(&key.volume)
    }

    fn create(&self, volume: &VolumeId, wanted: &Description) -> Result<(Key, Description), Refusal> {
        self.keys.create(volume, wanted)
    }

    fn import(&self, volume: &VolumeId, key: &Key, description: &Description) -> Result<Imported, Refusal> {
        self.keys.import(volume, key, description)
    }

    fn capabilities(&self) -> Capabilities {
        self.keys.capabilities()
    }

    fn described(&self, volume: &VolumeId) -> Result<Option<(Key, Description)>, Refusal> {
        self.keys.described(volume)
    }

    fn destroy(&self, volume: &VolumeId) -> Result<(), Refusal> {
        match self.gone.load(Ordering::SeqCst) {
            true => Err(Refusal::unanswered("nobody answers")),
            false => self.keys.destroy(volume),
        }
    }

    fn list(&self) -> Result<Vec<KeyInfo>, Refusal> {
        self.keys.list()
    }
}

fn open(broker: &Broker, device: DeviceNumber) -> Result<Option<i64>, i32> {
    match broker.open(device, true, OFlags::RDWR, &vm()) {
        Ok(Verdict::Mapping(_, _, cached_since)) => Ok(cached_since),
        Ok(other) => panic!("{other:?}"),
        Err(refusal) => Err(refusal.errno()),
    }
}

#[test]
fn a_volume_opens_from_the_cache_while_the_server_is_gone_and_the_log_says_so() {
    let world = World::new();
    let device = world.add_volume("one", 3);
    let server = Reachable::default();
    let broker = with_cache(&world, world.broker(true), &server);
    broker.enrol(device, None).unwrap();
    assert_eq!(open(&broker, device), Ok(None), "the server gave it");
    server.gone.store(true, Ordering::SeqCst);
    let opened = open(&broker, device).unwrap();
    assert!(opened.is_some());
    let said = with_source("opened as /dev/sda", opened);
    assert_eq!(
        said,
        "opened as /dev/sda, with the key from this host's cache, which a key server last gave 0 minutes before"
    );
    let ready = broker.make_ready(&world.identify(device).unwrap(), &vm()).unwrap();
    assert_eq!(ready.cached_since, opened);
    let kept = broker.vault().unwrap().keys.kept().unwrap();
    assert!(kept.until[&"one".parse().unwrap()].1 > opened.unwrap());
}

#[test]
fn another_lifetime_takes_a_restart() {
    let broker = World::new().broker(false);
    let reload = |days: u32| {
        let directory = broker.config().unwrap().key_manager.directory().to_owned();
        let text = format!("[key_manager]\ndirectory = {directory:?}\n[key_cache]\nlifetime_days = {days}\n");
        broker.reload(Config::parse(&text, "volcrypt.toml")).err()
    };
    assert_eq!(reload(0), None);
    assert!(reload(7).unwrap().contains("[key_cache] has changed, which takes 'systemctl restart volcryptd'"));
}

#[test]
fn a_volume_that_is_retired_or_that_nobody_could_destroy_leaves_the_cache() {
    for retire in [true, false] {
        let world = World::new();
        let device = world.add_volume("one", 3);
        let server = Reachable::default();
        let broker = with_cache(&world, world.broker(true), &server);
        broker.enrol(device, None).unwrap();
        let id = "one".parse().unwrap();
        server.gone.store(true, Ordering::SeqCst);
        assert!(open(&broker, device).unwrap().is_some());
        if retire {
            broker.retire(&id).unwrap();
            assert_eq!(open(&broker, device), Err(libc::ENOKEY));
        } else {
            assert_eq!(broker.destroy(&id).unwrap_err().errno(), libc::ETIMEDOUT);
            assert_eq!(open(&broker, device), Err(libc::ETIMEDOUT), "whether it is destroyed is not known");
        }
        assert!(broker.vault().unwrap().keys.kept().unwrap().until.is_empty());
    }
}

#[test]
fn the_key_of_an_announced_volume_is_fetched_ahead_and_no_other() {
    let world = World::new();
    let device = world.add_volume("one", 3);
    let server = Reachable::default();
    let broker = with_cache(&world, world.broker(false), &server);
    let stranger = world.add_volume("stranger", 4);
    let other_device = world.add_volume("one", 5);
    let unprotected = world.add_volume("none", 6);
    world.change(unprotected, |identity| (identity.iscsi, identity.wwid) = (None, None));
    broker.enrol(device, None).unwrap();
    let asked = |number: usize| {
        let end = Instant::now() + Duration::from_secs(60);
        while server.asked.load(Ordering::SeqCst) < number && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(1));
        }
        server.asked.load(Ordering::SeqCst)
    };
    for nothing in [stranger, other_device, unprotected, DeviceNumber { major: 9, minor: 9 }] {
        broker.fetch_ahead(nothing);
        world.devices.lock().unwrap().remove(&nothing);
    }
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(server.asked.load(Ordering::SeqCst), 0);
    broker.fetch_ahead(device);
    assert_eq!(asked(1), 1);
    let records = || broker.vault().unwrap().store.audit(&crate::store::AuditQuery::default()).unwrap().entries.len();
    let before = records();
    // The answer may still be on its way.
    let end = Instant::now() + Duration::from_secs(60);
    loop {
        let asked = server.asked.load(Ordering::SeqCst);
        assert_eq!(open(&broker, device), Ok(None));
        if server.asked.load(Ordering::SeqCst) == asked {
            break;
        }
        assert!(Instant::now() < end, "each open asks the server");
    }
    assert_eq!(records(), before, "to fetch a key ahead is no use of it");
    // Not for what is retired, nor for what a guest has.
    let mut mapped = world.clone();
    mapped.mapped = true;
    let server = Reachable { keys: server.keys.clone(), ..Reachable::default() };
    let busy = with_cache(&mapped, mapped.broker(false), &server);
    busy.fetch_ahead(device);
    broker.retire(&"one".parse().unwrap()).unwrap();
    let retired = with_cache(&world, world.broker(false), &server);
    retired.fetch_ahead(device);
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(server.asked.load(Ordering::SeqCst), 0);
}
