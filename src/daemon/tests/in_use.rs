//! Which volumes are in use here, as a key manager is told of it.

use std::collections::HashSet;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::super::in_use::{keep, tell};
use super::*;
use crate::keys::{Capabilities, Description, Imported, KeyInfo, KeyManager, RecordedKey};
use crate::volume::VolumeId;

/// Notes what it is told, and refuses as often as it is to.
#[derive(Clone, Default)]
pub(super) struct Notes {
    /// What it does before it says that it has no keys.
    before_list: Option<fn()>,
    told: Arc<Mutex<Vec<HashSet<VolumeId>>>>,
    refusals: Arc<Mutex<u32>>,
}

impl Notes {
    /// Does this before it says that it has no keys.
    pub(super) fn that_looks_first(before_list: fn()) -> Self {
        Notes { before_list: Some(before_list), ..Notes::default() }
    }
}

impl KeyManager for Notes {
    fn get(&self, _: &VolumeId) -> Result<Key, Refusal> {
        Key::filled(64, |bytes| {
            bytes.fill(7);
            Ok(())
        })
    }

    fn get_enrolled(&self, key: &RecordedKey) -> Result<Key, Refusal> {
        self.get(&key.volume)
    }

    fn create(&self, volume: &VolumeId, wanted: &Description) -> Result<(Key, Description), Refusal> {
        Ok((self.get(volume)?, wanted.clone()))
    }

    fn import(&self, _: &VolumeId, _: &Key, _: &Description) -> Result<Imported, Refusal> {
        Ok(Imported::Present)
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities { lists: true, imports: true, destroys: true, describes: false }
    }

    fn destroy(&self, _: &VolumeId) -> Result<(), Refusal> {
        Ok(())
    }

    fn list(&self) -> Result<Vec<KeyInfo>, Refusal> {
        self.before_list.inspect(|wait| wait());
        Ok(Vec::new())
    }

    fn note_uses(&self, in_use: &HashSet<VolumeId>) -> Result<(), Refusal> {
        self.told.lock().unwrap().push(in_use.clone());
        let mut refusals = self.refusals.lock().unwrap();
        match refusals.checked_sub(1) {
            None => Ok(()),
            Some(left) => {
                *refusals = left;
                Err(Refusal::new(Reason::TimedOut, "nobody answers"))
            }
        }
    }
}

pub(super) fn with_barbican(world: &World, keys: Box<dyn KeyManager>) -> Broker {
    let state = world.path().join("state");
    let text = format!(
        "[key_manager]\ntype = \"barbican\"\ndirectory = {state:?}\n[barbican]\nauth_url = \"http://127.0.0.1:1/v3\"\n\
         application_credential_id = \"x\"\nsecret = \"/nowhere\"\n[[rules]]\nname = \"lab\"\n\
         iscsi_target = 'iqn\\.2026-11\\.org\\.lab:volume-(?<id>.*)'\nlun = 1\ncreate_keys = true\n"
    );
    world.broker_with(&text).with_keys(keys)
}

#[test]
fn a_key_manager_that_keeps_it_is_told_what_is_mapped() {
    let notes = Notes::default();
    let mut world = World::new();
    world.add_volume("one", 1);
    world.add_volume("two", 2);
    assert!(tell(&with_barbican(&world, Box::new(notes.clone()))).unwrap());
    world.mapped = true;
    assert!(tell(&with_barbican(&world, Box::new(notes.clone()))).unwrap());
    let both = ["one", "two"].map(|id| id.parse().unwrap());
    assert_eq!(*notes.told.lock().unwrap(), [HashSet::new(), HashSet::from(both)]);
    // The others are not, and nothing waits for the sake of them.
    let broker = world.broker(false).with_keys(Box::new(notes.clone()));
    keep(&broker);
    assert_eq!(notes.told.lock().unwrap().len(), 2);
}

#[test]
fn it_is_told_soon_after_an_open_also_where_that_went_wrong_before() {
    let notes = Notes::default();
    *notes.refusals.lock().unwrap() = 1;
    let world = World::new();
    let device = world.add_volume("one", 1);
    let broker = Arc::new(with_barbican(&world, Box::new(notes.clone())));
    let told = Arc::clone(&broker);
    // It goes on as long as the test does.
    std::thread::spawn(move || keep(&told));
    let until = |count: usize| {
        let started = Instant::now();
        while notes.told.lock().unwrap().len() < count {
            assert!(started.elapsed() < Duration::from_secs(60), "not told");
            std::thread::sleep(Duration::from_millis(10));
        }
    };
    until(1);
    broker.enrol(device, None).unwrap();
    // Many at once are one.
    let began = Instant::now();
    for _ in 0..5 {
        broker.open(device, true, OFlags::RDWR, &vm()).unwrap();
    }
    // On a busy machine they are not at once: it is told once more for each moment that they took.
    let opened = began.elapsed().as_secs() as usize;
    until(2);
    std::thread::sleep(Duration::from_millis(1500));
    let most = 2 + opened + began.elapsed().as_secs() as usize / 10;
    let count = notes.told.lock().unwrap().len();
    assert!(count <= most, "{count} times, which is more than {most}");
}
