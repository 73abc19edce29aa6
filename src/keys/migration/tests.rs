use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use tempfile::TempDir;

use super::*;
use crate::audit::Kind;
use crate::keys::{
    Capabilities, Description, EmbeddedKeyManager, ForeignKey, KeyFileManager, KeyHandle, KeyInfo, Leaving,
    OneKeyForEveryVolume, RecordedKey,
};
use crate::policy::{KeySize, Profile};
use crate::store::tests::private_directory;
use crate::store::{AuditQuery, EnrolledDevice};

const ROUTE: Route = Route { from: ManagerKind::Embedded, to: ManagerKind::Kmip };
const BACK: Route = Route { from: ManagerKind::Kmip, to: ManagerKind::Embedded };
/// Tells the test program that it is to migrate, and between which directories.
const CHILD: &str = "VOLCRYPT_TEST_MIGRATE_IN";

fn id(name: &str) -> VolumeId {
    name.parse().unwrap()
}

/// As which host keys are moved.
fn called(name: &str) -> super::Host {
    super::Host { name: name.to_owned(), id: format!("id-of-{name}") }
}

fn size(bits: u32) -> KeySize {
    bits.try_into().unwrap()
}

fn description(name: &str, bits: u32, owner: Option<&str>) -> Description {
    let device = EnrolledDevice { wwid: Some(format!("naa.{name}")), ..EnrolledDevice::default() };
    let profile = Profile { key_size: size(bits), ..Profile::default() };
    Description::new(device, 4096, ("default", &profile), owner, 1_790_000_000)
}

fn copy_of(bytes: &[u8]) -> Key {
    Key::filled(bytes.len(), |room| {
        room.copy_from_slice(bytes);
        Ok(())
    })
    .unwrap()
}

/// A database with the embedded key manager and enrolled volumes.
struct Host {
    folder: TempDir,
    /// One for all, as the daemon has it.
    store: Arc<Store>,
    keys: BTreeMap<String, Vec<u8>>,
    locks: VolumeLocks,
}

impl Host {
    fn with_volumes(count: usize) -> Self {
        let mut host = Host::at(private_directory(), BTreeMap::new());
        (0..count).for_each(|number| host.enrol(&format!("volume-{number:03}"), [128, 256, 512][number % 3]));
        host
    }

    fn at(folder: TempDir, keys: BTreeMap<String, Vec<u8>>) -> Self {
        let store = Arc::new(Store::open(folder.path()).unwrap());
        Host { folder, store, keys, locks: VolumeLocks::default() }
    }

    /// What a power cut leaves of it now.
    fn after_power_cut(&self) -> Self {
        let copy = private_directory();
        for name in ["volcrypt.db", "volcrypt.db-wal", "kek"] {
            let path = self.folder.path().join(name);
            if path.exists() {
                std::fs::copy(path, copy.path().join(name)).unwrap();
            }
        }
        Host::at(copy, self.keys.clone())
    }

    fn embedded(&self) -> EmbeddedKeyManager {
        EmbeddedKeyManager::open(Arc::clone(&self.store), None, self.folder.path()).unwrap()
    }

    fn enrol(&mut self, name: &str, bits: u32) {
        let key = self.embedded().make(&id(name), size(bits)).unwrap();
        self.store.enrol(&description(name, bits, Some("p1")).record(&id(name), &key)).unwrap();
        self.keys.insert(name.to_owned(), key.bytes().to_vec());
    }

    /// Takes all steps from the start.
    fn migrate(&self, route: Route, aim: Aim, pair: (&dyn KeyManager, &dyn KeyManager)) -> Result<Sum, Refusal> {
        let migration = KeyMigration::new(&self.store, &self.locks, route, pair, called("here"))?.in_small_steps();
        let mut sum = Sum::default();
        let mut after = None;
        loop {
            let came = migration.take(aim, after.as_ref())?;
            sum.stored += came.stored;
            sum.present += came.present;
            sum.removed += came.removed;
            sum.resumed |= came.resumed;
            sum.skipped.extend(came.skipped);
            sum.refused.extend(came.refused);
            match came.after {
                Some(place) => after = Some(place),
                None => {
                    assert!(came.remaining as usize <= sum.refused.len());
                    return Ok(sum);
                }
            }
        }
    }

    fn assert_all_in(&self, manager: &dyn KeyManager) {
        for (name, bytes) in &self.keys {
            assert_eq!(manager.get(&id(name)).unwrap().bytes(), bytes, "{name}");
        }
    }

    fn recorded(&self, kind: Kind) -> usize {
        let query = AuditQuery { kind: Some(kind), ..AuditQuery::default() };
        self.store.audit(&query).unwrap().entries.len()
    }
}

#[derive(Debug, Default, PartialEq, Eq)]
struct Sum {
    stored: u64,
    present: u64,
    removed: u64,
    resumed: bool,
    skipped: Vec<String>,
    refused: Vec<String>,
}

fn embedded(folder: &Path) -> EmbeddedKeyManager {
    EmbeddedKeyManager::open(Arc::new(Store::open(folder).unwrap()), None, folder).unwrap()
}

/// A key server that several hosts ask, and that can fail.
#[derive(Default)]
struct Server {
    keys: Mutex<BTreeMap<VolumeId, (Vec<u8>, Description)>>,
    /// How many calls it still answers; then it is dead.
    calls: Option<AtomicUsize>,
    /// Whether it does what it is asked for in the call whose answer does not come any more.
    does_it: bool,
    /// How often each volume's key was stored.
    stored: Mutex<BTreeMap<VolumeId, usize>>,
    marks: Mutex<BTreeMap<VolumeId, Leaving>>,
    forgotten: Mutex<BTreeSet<VolumeId>>,
    /// Whether another host uses every key.
    in_use: bool,
    /// Whether its list is empty still.
    lags: bool,
}

impl Server {
    fn dead() -> Refusal {
        Refusal::new(Reason::TimedOut, "no KMIP server could be asked")
    }

    /// Whether there is an answer to the present call.
    fn answers(&self) -> Result<(), Refusal> {
        let Some(calls) = &self.calls else { return Ok(()) };
        let left = calls.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| Some(left.saturating_sub(1)));
        if left == Ok(0) { Err(Server::dead()) } else { Ok(()) }
    }

    fn dying_after(self, calls: usize, does_it: bool) -> Self {
        Server { calls: Some(AtomicUsize::new(calls)), does_it, ..self }
    }

    fn alive(self) -> Self {
        Server { calls: None, ..self }
    }

    fn put(&self, name: &str, bytes: &[u8], description: Description) {
        self.keys.lock().unwrap().insert(id(name), (bytes.to_vec(), description));
    }
}

impl KeyManager for Server {
    fn get(&self, volume: &VolumeId) -> Result<Key, Refusal> {
        self.described(volume)?.map(|(key, _)| key).ok_or_else(|| Refusal::new(Reason::NoKey, "the server has no key"))
    }

    fn get_enrolled(&self, key: &RecordedKey) -> Result<Key, Refusal> {
        match self.described(&key.volume)? {
            Some((found, said)) if said.key_version() == key.handle.version => Ok(found),
            Some(_) => Err(Refusal::new(Reason::WrongKey, "the server has another version")),
            None => Err(Refusal::new(Reason::NoKey, "the server has no key")),
        }
    }

    fn create(&self, _: &VolumeId, _: &Description) -> Result<(Key, Description), Refusal> {
        panic!("no key is made by moving")
    }

    fn import(&self, volume: &VolumeId, key: &Key, description: &Description) -> Result<Imported, Refusal> {
        let answers = self.answers();
        if answers.is_err() && !self.does_it {
            return Err(Server::dead());
        }
        let mut keys = self.keys.lock().unwrap();
        let imported = match keys.get(volume) {
            Some((bytes, _)) if bytes == key.bytes() => Imported::Present,
            Some(_) => return Err(Refusal::new(Reason::WrongKey, "the server has another key")),
            None => {
                *self.stored.lock().unwrap().entry(volume.clone()).or_default() += 1;
                keys.insert(volume.clone(), (key.bytes().to_vec(), description.clone()));
                Imported::Stored
            }
        };
        answers.map(|()| imported)
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities { lists: true, imports: true, destroys: true, describes: true }
    }

    fn described(&self, volume: &VolumeId) -> Result<Option<(Key, Description)>, Refusal> {
        self.answers()?;
        let keys = self.keys.lock().unwrap();
        Ok(keys.get(volume).map(|(bytes, description)| (copy_of(bytes), description.clone())))
    }

    fn destroy(&self, volume: &VolumeId) -> Result<(), Refusal> {
        let answers = self.answers();
        if answers.is_err() && !self.does_it {
            return Err(Server::dead());
        }
        let removed = self.keys.lock().unwrap().remove(volume);
        self.marks.lock().unwrap().remove(volume);
        self.forgotten.lock().unwrap().insert(volume.clone());
        answers?;
        removed.map(drop).ok_or_else(|| Refusal::new(Reason::NoKey, "the server has no key"))
    }

    fn check_destroyable(&self, _: &VolumeId) -> Result<(), Refusal> {
        match self.in_use {
            true => Err(Refusal::new(Reason::NotAllowed, "another host uses it")),
            false => Ok(()),
        }
    }

    fn leaving(&self, volume: &VolumeId) -> Result<Option<Leaving>, Refusal> {
        self.answers()?;
        Ok(self.marks.lock().unwrap().get(volume).cloned())
    }

    fn note_leaving(&self, volume: &VolumeId, leaving: Option<&Leaving>) -> Result<(), Refusal> {
        let answers = self.answers();
        if answers.is_ok() || self.does_it {
            let mut marks = self.marks.lock().unwrap();
            match leaving {
                Some(leaving) => drop(marks.insert(volume.clone(), leaving.clone())),
                None => drop(marks.remove(volume)),
            }
        }
        answers
    }

    fn list(&self) -> Result<Vec<KeyInfo>, Refusal> {
        self.answers()?;
        let keys = self.keys.lock().unwrap();
        let info = |(volume, (bytes, _)): (&VolumeId, &(Vec<u8>, Description))| KeyInfo {
            volume: volume.clone(),
            key: KeyHandle::first(volume),
            key_size: size(bytes.len() as u32 * 8),
            created_at: 0,
            destroyed: false,
            hosts: Vec::new(),
        };
        Ok(keys.iter().filter(|_| !self.lags).map(info).collect())
    }
}

#[test]
fn every_key_is_copied_with_what_is_known_of_its_volume_and_the_old_ones_stay() {
    let host = Host::with_volumes(40);
    let (old, new) = (host.embedded(), Server::default());
    let sum = host.migrate(ROUTE, Aim::Copy, (&old, &new)).unwrap();
    assert_eq!(sum, Sum { stored: 40, ..Sum::default() });
    host.assert_all_in(&new);
    host.assert_all_in(&old);
    let (_, said) = new.described(&id("volume-001")).unwrap().unwrap();
    assert_eq!(said, description("volume-001", 256, Some("p1")));
    assert_eq!(host.recorded(Kind::KeyMoved), 40);
    // Once more, all are compared.
    let sum = host.migrate(ROUTE, Aim::Copy, (&old, &new)).unwrap();
    assert_eq!(sum, Sum { present: 40, ..Sum::default() });
}

#[test]
fn the_key_of_a_retired_volume_that_a_server_does_not_list_is_looked_for_all_the_same() {
    let host = Host::with_volumes(2);
    let (old, new) = (Server::default(), Server::default());
    host.migrate(ROUTE, Aim::Copy, (&host.embedded(), &old)).unwrap();
    host.store.change_state(&id("volume-001"), &[VolumeState::Enrolled], VolumeState::Retired, None).unwrap();
    let route = Route { from: ManagerKind::Kmip, to: ManagerKind::Barbican };
    let old = Server { lags: true, ..old };
    let sum = host.migrate(route, Aim::Copy, (&old, &new)).unwrap();
    assert_eq!(sum, Sum { stored: 2, ..Sum::default() });
    host.assert_all_in(&new);
}

#[test]
fn a_key_that_another_host_uses_stays_and_has_no_mark() {
    let host = Host::with_volumes(2);
    let (old, new) = (Server::default(), host.embedded());
    host.migrate(ROUTE, Aim::Copy, (&new, &old)).unwrap();
    host.migrate(BACK, Aim::Copy, (&old, &new)).unwrap();
    let old = Server { in_use: true, ..old };
    let sum = host.migrate(BACK, Aim::DestroyOld, (&old, &new)).unwrap();
    assert_eq!((sum.removed, sum.refused.len()), (0, 2));
    assert!(old.marks.lock().unwrap().is_empty());
    host.assert_all_in(&old);
    assert_eq!(host.recorded(Kind::DestructionStarted), 0);
}

#[test]
fn what_was_enrolled_meanwhile_is_caught_up_with_also_after_the_switch() {
    let mut host = Host::with_volumes(3);
    let (old, new) = (host.embedded(), Server::default());
    host.migrate(ROUTE, Aim::Copy, (&old, &new)).unwrap();
    host.enrol("late", 512);
    // Enrolled with the new key manager: the old one never had its key.
    let key = Key::random(size(512)).unwrap();
    let said = description("newer", 512, None);
    host.store.enrol(&said.clone().record(&id("newer"), &key)).unwrap();
    new.put("newer", key.bytes(), said);
    let sum = host.migrate(ROUTE, Aim::Copy, (&old, &new)).unwrap();
    assert_eq!(sum, Sum { stored: 1, present: 4, ..Sum::default() });
    host.assert_all_in(&new);
    // One that neither has is told of.
    new.keys.lock().unwrap().remove(&id("newer"));
    let sum = host.migrate(ROUTE, Aim::Copy, (&old, &new)).unwrap();
    assert_eq!(sum.refused, ["the server has no key"]);
}

#[test]
fn destroyed_volumes_and_keys_of_none_are_passed_over() {
    let host = Host::with_volumes(3);
    let (old, new) = (host.embedded(), Server::default());
    let store = &host.store;
    let enrolled = [VolumeState::Enrolled];
    store.change_state(&id("volume-001"), &enrolled, VolumeState::Destroyed, None).unwrap();
    old.make(&id("stray"), size(512)).unwrap();
    let sum = host.migrate(ROUTE, Aim::Copy, (&old, &new)).unwrap();
    assert_eq!(
        sum.skipped,
        [
            "volume volume-001 was destroyed, and embedded has a key of it still, which goes with --destroy-old",
            "the key of volume stray stays in embedded: the volume was never enrolled with it",
        ]
    );
    assert_eq!((sum.stored, sum.refused.len()), (2, 0));
    assert_eq!(new.keys.lock().unwrap().keys().collect::<Vec<_>>(), [&id("volume-000"), &id("volume-002")]);
    // Nor are they destroyed with the old ones, but what is left of the one that was.
    let sum = host.migrate(ROUTE, Aim::DestroyOld, (&old, &new)).unwrap();
    assert_eq!((sum.removed, sum.skipped.len()), (3, 0));
    assert_eq!(
        sum.refused,
        [
            "the key of volume stray in embedded was not copied to kmip by this host and stays: run 'volcrypt key migrate \
          --from embedded --to kmip' first"
        ]
    );
    old.get(&id("stray")).unwrap();
    assert!(old.get(&id("volume-001")).is_err());
}

#[test]
fn keys_that_another_program_has_made_stay_where_they_are() {
    let host = Host::with_volumes(1);
    let (embedded, server) = (host.embedded(), Server::default());
    let key = Key::random(size(512)).unwrap();
    let foreign = ForeignKey::itself("dfe2418f-8205-4e90-816a-4e8ea2366b48".parse().unwrap());
    let described = description("cinders", 512, None).with_foreign(foreign);
    host.store.enrol(&described.record(&id("cinders"), &key)).unwrap();
    // Even where there is a key that is called as its volume is.
    server.put("cinders", key.bytes(), description("cinders", 512, None));
    for (route, pair) in
        [(ROUTE, (&embedded as &dyn KeyManager, &server as &dyn KeyManager)), (BACK, (&server, &embedded))]
    {
        let sum = host.migrate(route, Aim::Copy, pair).unwrap();
        assert_eq!((sum.stored + sum.present, sum.skipped.len(), sum.refused.len()), (1, 1, 0), "{route:?}");
        assert!(sum.skipped[0].contains("was not made by volcrypt, and stays in"), "{:?}", sum.skipped);
    }
    // Not even if it was noted as copied.
    host.store.plan_copies(BACK, &[id("cinders")]).unwrap();
    host.store.note_move(BACK, &id("cinders"), MoveState::Copied, None).unwrap();
    let sum = host.migrate(BACK, Aim::DestroyOld, (&server, &embedded)).unwrap();
    assert_eq!((sum.removed, sum.skipped.len()), (1, 1));
    assert!(server.get(&id("cinders")).is_ok());
}

#[test]
fn another_key_in_the_target_is_refused_for_that_volume_and_nothing_is_destroyed() {
    let host = Host::with_volumes(20);
    let (old, new) = (host.embedded(), Server::default());
    let other = Key::random(size(512)).unwrap();
    new.put("volume-002", other.bytes(), description("volume-002", 512, None));
    let sum = host.migrate(ROUTE, Aim::Copy, (&old, &new)).unwrap();
    assert_eq!((sum.stored, sum.present, sum.refused.len()), (19, 0, 1));
    let own = old.get(&id("volume-002")).unwrap().check_value(&id("volume-002"));
    assert_eq!(
        sum.refused[0],
        format!(
            "volume volume-002 has a key in embedded (check value {own}) and another in kmip (check value {}), and both \
             were left as they are (the server has another key)",
            other.check_value(&id("volume-002"))
        )
    );
    let sum = host.migrate(ROUTE, Aim::DestroyOld, (&old, &new)).unwrap();
    assert_eq!((sum.removed, sum.refused.len()), (19, 1));
    assert_eq!(old.get(&id("volume-002")).unwrap().bytes(), host.keys["volume-002"]);
    assert!(new.get(&id("volume-002")).unwrap().same_as(&other));
}

#[test]
fn a_key_that_its_volume_was_not_enrolled_with_is_not_spread() {
    let host = Host::with_volumes(2);
    let (old, new) = (host.embedded(), Server::default());
    old.forget(&id("volume-001")).unwrap();
    old.make(&id("volume-001"), size(256)).unwrap();
    let sum = host.migrate(ROUTE, Aim::Copy, (&old, &new)).unwrap();
    assert_eq!((sum.stored, sum.refused.len()), (1, 1));
    assert!(sum.refused[0].contains("is not the one that the volume was enrolled with"), "{}", sum.refused[0]);
    assert_eq!(new.keys.lock().unwrap().len(), 1);
}

#[test]
fn old_keys_go_only_when_the_new_one_is_the_same_at_that_moment() {
    let host = Host::with_volumes(20);
    let (old, new) = (host.embedded(), Server::default());
    host.migrate(ROUTE, Aim::Copy, (&old, &new)).unwrap();
    new.keys.lock().unwrap().remove(&id("volume-003"));
    new.put("volume-005", &[7; 64], description("volume-005", 512, None));
    let sum = host.migrate(ROUTE, Aim::DestroyOld, (&old, &new)).unwrap();
    assert_eq!((sum.removed, sum.refused.len()), (18, 2));
    assert_eq!(
        sum.refused[0],
        "kmip has no key of volume volume-003 any more, so that in embedded was not destroyed: run 'volcrypt key migrate \
         --from embedded --to kmip' again (the server has no key)"
    );
    assert!(sum.refused[1].starts_with("the key of volume volume-005 in kmip (check value "), "{}", sum.refused[1]);
    for (name, bytes) in &host.keys {
        match name.as_str() {
            "volume-003" | "volume-005" => assert_eq!(old.get(&id(name)).unwrap().bytes(), bytes),
            _ => assert_eq!(old.get(&id(name)).err().unwrap().reason(), Reason::NoKey),
        }
    }
    assert_eq!(host.recorded(Kind::OldKeyDestroyed), 18);
    // What was told to run again mends the one that was lost.
    let sum = host.migrate(ROUTE, Aim::Copy, (&old, &new)).unwrap();
    assert_eq!((sum.stored, sum.present, sum.refused.len()), (1, 18, 1));
    let sum = host.migrate(ROUTE, Aim::DestroyOld, (&old, &new)).unwrap();
    assert_eq!((sum.removed, sum.refused.len()), (1, 1));
}

#[test]
fn keys_can_come_back() {
    let host = Host::with_volumes(10);
    let (old, new) = (host.embedded(), Server::default());
    for _ in 0..2 {
        host.migrate(ROUTE, Aim::Copy, (&old, &new)).unwrap();
        assert_eq!(host.migrate(ROUTE, Aim::DestroyOld, (&old, &new)).unwrap().removed, 10);
        host.assert_all_in(&new);
        assert_eq!(old.list().unwrap(), []);
        assert_eq!(host.migrate(BACK, Aim::Copy, (&new, &old)).unwrap().stored, 10);
        assert_eq!(host.migrate(BACK, Aim::DestroyOld, (&new, &old)).unwrap().removed, 10);
        host.assert_all_in(&old);
        assert!(new.keys.lock().unwrap().is_empty());
    }
    // A key is as old as its volume, wherever it was meanwhile.
    assert!(old.list().unwrap().iter().all(|info| info.created_at == 1_790_000_000));
}

#[test]
fn a_server_that_dies_at_any_call_costs_no_key_and_the_next_run_goes_on() {
    let made = Host::with_volumes(18);
    for does_it in [false, true] {
        for calls in (0..54).step_by(6) {
            let host = made.after_power_cut();
            let old = host.embedded();
            let mut new = Server::default().dying_after(calls, does_it);
            match host.migrate(ROUTE, Aim::Copy, (&old, &new)) {
                Ok(sum) => assert_eq!(sum.stored, 18),
                Err(refusal) => {
                    assert_eq!(refusal.reason(), Reason::TimedOut);
                    assert_eq!(
                        refusal.to_string(),
                        "no KMIP server could be asked; what was done is noted: run the same command again to go on"
                    );
                }
            }
            host.assert_all_in(&old);
            new = new.alive();
            let sum = host.migrate(ROUTE, Aim::Copy, (&old, &new)).unwrap();
            assert!(sum.refused.is_empty(), "{sum:?}");
            host.assert_all_in(&new);
            assert!(new.stored.lock().unwrap().values().all(|&stored| stored == 1), "done twice");
        }
    }
}

#[test]
fn old_keys_that_go_from_a_server_that_dies_at_any_call_are_all_in_the_new_place() {
    let made = Host::with_volumes(18);
    let server = Server::default();
    made.migrate(ROUTE, Aim::Copy, (&made.embedded(), &server)).unwrap();
    made.migrate(BACK, Aim::Copy, (&server, &made.embedded())).unwrap();
    let kept = server.keys.into_inner().unwrap();
    for does_it in [false, true] {
        for calls in (0..120).step_by(7) {
            let host = made.after_power_cut();
            let new = host.embedded();
            let server = Server { keys: Mutex::new(kept.clone()), ..Server::default() }.dying_after(calls, does_it);
            let outcome = host.migrate(BACK, Aim::DestroyOld, (&server, &new));
            assert!(outcome.is_ok() || outcome.is_err_and(|refusal| refusal.reason() == Reason::TimedOut));
            host.assert_all_in(&new);
            let server = server.alive();
            let sum = host.migrate(BACK, Aim::DestroyOld, (&server, &new)).unwrap();
            assert!(sum.refused.is_empty(), "{sum:?}");
            host.assert_all_in(&new);
            assert!(server.keys.lock().unwrap().is_empty());
            assert_eq!(server.forgotten.lock().unwrap().len(), 18);
        }
    }
}

#[test]
fn a_power_cut_between_any_two_steps_costs_no_key() {
    let mut host = Host::with_volumes(40);
    let new = Server::default();
    let mut steps = 0;
    for aim in [Aim::Copy, Aim::DestroyOld] {
        loop {
            // What a power cut leaves; whoever goes on knows nothing of where the earlier run was.
            host = host.after_power_cut();
            let old = host.embedded();
            let migration = KeyMigration::new(&host.store, &host.locks, ROUTE, (&old, &new), called("here"))
                .unwrap()
                .in_small_steps();
            let begun = migration.take(aim, None).unwrap();
            assert!(begun.refused.is_empty(), "{begun:?}");
            let came = migration.take(aim, begun.after.as_ref()).unwrap();
            steps += 1;
            for (name, bytes) in &host.keys {
                let places: [&dyn KeyManager; 2] = [&old, &new];
                let found: Vec<_> = places.iter().filter_map(|place| place.get(&id(name)).ok()).collect();
                assert!(!found.is_empty() && found.iter().all(|key| key.bytes() == bytes), "{name}");
            }
            // A run that begins anew after the last one would compare all of them again.
            if came.remaining == 0 {
                break;
            }
        }
    }
    assert_eq!(steps, 6);
    host.assert_all_in(&new);
    assert_eq!(host.embedded().list().unwrap(), []);
    assert!(new.stored.lock().unwrap().values().all(|&stored| stored == 1), "done twice");
}

#[test]
fn a_run_that_is_killed_over_and_over_comes_to_its_end() {
    if let Some(folders) = std::env::var_os(CHILD) {
        let (from, to) = folders.to_str().unwrap().split_once(':').unwrap();
        let (store, locks) = (Arc::new(Store::open(Path::new(from)).unwrap()), VolumeLocks::default());
        let old = EmbeddedKeyManager::open(Arc::clone(&store), None, Path::new(from)).unwrap();
        let new = embedded(Path::new(to));
        let migration = KeyMigration::new(&store, &locks, ROUTE, (&old, &new), called("here")).unwrap();
        for aim in [Aim::DestroyOld, Aim::Copy, Aim::DestroyOld] {
            let mut after = None;
            while let came @ MigrationProgress { after: Some(_), .. } = migration.take(aim, after.as_ref()).unwrap() {
                after = came.after;
            }
        }
        return;
    }
    let host = Host::with_volumes(24);
    let target = private_directory();
    drop(embedded(target.path()));
    let name = "keys::migration::tests::a_run_that_is_killed_over_and_over_comes_to_its_end";
    let mut kills = 0;
    loop {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", name])
            .env(CHILD, format!("{}:{}", host.folder.path().display(), target.path().display()))
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        // Longer each time: on a busy machine it takes a while until the child begins.
        std::thread::sleep(Duration::from_millis(30 + 37 * kills % 600 + 10 * kills));
        child.kill().unwrap();
        let ended = child.wait().unwrap().success();
        let (old, new) = (host.embedded(), embedded(target.path()));
        for (name, bytes) in &host.keys {
            let places = [&old, &new];
            let found: Vec<_> = places.iter().filter_map(|place| place.get(&id(name)).ok()).collect();
            assert!(!found.is_empty() && found.iter().all(|key| key.bytes() == bytes), "{name}");
        }
        if ended || old.list().unwrap().is_empty() {
            break;
        }
        kills += 1;
        assert!(kills < 2000, "it never ends");
    }
    let (old, new) = (host.embedded(), embedded(target.path()));
    assert!(host.migrate(ROUTE, Aim::DestroyOld, (&old, &new)).unwrap().refused.is_empty());
    host.assert_all_in(&new);
    println!("killed {kills} times");
}

#[test]
fn what_cannot_be_moved_is_refused() {
    let host = Host::with_volumes(1);
    let path = host.folder.path().join("fixed.key");
    std::fs::write(&path, [7; 64]).unwrap();
    std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    let file = KeyFileManager::open(&path, OneKeyForEveryVolume).unwrap();
    let old = host.embedded();
    let (from, to) = (ManagerKind::Embedded, ManagerKind::KeyFile);
    let refused = |route, pair| host.migrate(route, Aim::Copy, pair).unwrap_err();
    for (refusal, sentence) in [
        (
            refused(Route { from, to }, (&old, &file)),
            "no keys are moved from embedded to key-file, because key-file has one key for all volumes, and takes no other",
        ),
        (
            refused(Route { from: to, to: from }, (&file, &old)),
            "no keys are moved from key-file to embedded, because key-file has one key for all volumes, and none that \
             could be moved",
        ),
        (
            refused(Route { from, to: from }, (&old, &old)),
            "no keys are moved from embedded to embedded, because embedded is both: name another key manager with --to",
        ),
    ] {
        assert_eq!(refusal.reason(), Reason::Configuration);
        assert_eq!(refusal.to_string(), sentence);
    }
}

mod interleaved;
mod whose;

#[test]
fn a_key_moves_as_the_version_that_its_record_names() {
    let host = Host::with_volumes(0);
    let (old, new, volume) = (host.embedded(), Server::default(), id("volume"));
    let key = Key::random(size(512)).unwrap();
    let second = description("volume", 512, None).with_key_version(2);
    old.import(&volume, &key, &second).unwrap();
    let record = second.clone().record(&volume, &key);
    host.store.enrol(&record).unwrap();
    let sum = host.migrate(ROUTE, Aim::Copy, (&old, &new)).unwrap();
    assert_eq!(sum, Sum { stored: 1, ..Sum::default() });
    assert_eq!(new.described(&volume).unwrap().unwrap().1, second);
    assert!(new.get_enrolled(&record.recorded_key()).unwrap().same_as(&key));
    // The same key as another version is not what opens ask for, so the old one stays.
    new.put("volume", key.bytes(), description("volume", 512, None));
    for aim in [Aim::DestroyOld, Aim::Copy] {
        let sum = host.migrate(ROUTE, aim, (&old, &new)).unwrap();
        assert_eq!((sum.refused, sum.removed), (vec!["the server has another version".to_owned()], 0));
        assert!(old.get_enrolled(&record.recorded_key()).unwrap().same_as(&key));
    }
}

#[test]
fn a_key_that_volcrypt_did_not_make_is_not_moved() {
    let host = Host::with_volumes(1);
    let (old, new) = (host.embedded(), Server::default());
    let change = "UPDATE volumes SET key_id = '0b1f7c1e-1111-4222-8333-444455556666'";
    rusqlite::Connection::open(host.store.path()).unwrap().execute_batch(change).unwrap();
    let sum = host.migrate(ROUTE, Aim::Copy, (&old, &new)).unwrap();
    let said = "the key 0b1f7c1e-1111-4222-8333-444455556666 of volume volume-000 was not made by volcrypt, and stays in \
                embedded";
    assert_eq!(sum, Sum { skipped: vec![said.to_owned()], ..Sum::default() });
    assert!(new.keys.lock().unwrap().is_empty());
}
