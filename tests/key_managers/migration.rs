//! Keys that come from every key manager to every other one.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;

use volcrypt::encryptor::VolumeLocks;
use volcrypt::keys::{
    Aim, Description, EmbeddedKeyManager, Host, Key, KeyManager, KeyMigration, Leaving, ManagerKind, MigrationProgress,
    Route,
};
use volcrypt::policy::Profile;
use volcrypt::refusal::{Reason, Refusal};
use volcrypt::store::{EnrolledDevice, Store};
use volcrypt::volume::VolumeId;

use super::barbican::Barbican;
use super::conformance::recorded;
use super::pykmip::PyKmip;

const VOLUMES: usize = 3;

fn volume(number: usize) -> VolumeId {
    format!("moving-{number}").parse().unwrap()
}

fn wanted(number: usize) -> Description {
    let device = EnrolledDevice { wwid: Some(format!("naa.{number}")), ..EnrolledDevice::default() };
    Description::new(device, 4096, ("default", &Profile::default()), Some("p1"), 1_790_000_000)
}

struct Fleet {
    folder: tempfile::TempDir,
    store: Arc<Store>,
    kmip: PyKmip,
    barbican: Barbican,
}

impl Fleet {
    fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o700)).unwrap();
        let store = Arc::new(Store::open(folder.path()).unwrap());
        Fleet { folder, store, kmip: PyKmip::start(), barbican: Barbican::start() }
    }

    fn manager(&self, kind: ManagerKind) -> Box<dyn KeyManager> {
        match kind {
            ManagerKind::Kmip => Box::new(self.kmip.manager()),
            ManagerKind::Barbican => Box::new(self.barbican.manager("host1")),
            _ => Box::new(EmbeddedKeyManager::open(Arc::clone(&self.store), None, self.folder.path()).unwrap()),
        }
    }

    fn migrate(&self, route: Route, aim: Aim) -> Result<MigrationProgress, Refusal> {
        self.migrate_as("host1", &self.store, route, aim)
    }

    /// What a host of that name does, which has this database and locks of its own.
    fn migrate_as(&self, name: &str, store: &Store, route: Route, aim: Aim) -> Result<MigrationProgress, Refusal> {
        let (source, target) = (self.manager(route.from), self.manager(route.to));
        let (host, locks) = (Host { name: name.to_owned(), id: format!("id-of-{name}") }, VolumeLocks::default());
        let migration = KeyMigration::new(store, &locks, route, (&*source, &*target), host)?;
        let mut all = MigrationProgress::default();
        let mut after = None;
        loop {
            let came = migration.take(aim, after.as_ref())?;
            all.stored += came.stored;
            all.present += came.present;
            all.removed += came.removed;
            all.refused.extend(came.refused);
            all.skipped.extend(came.skipped);
            all.remaining = came.remaining;
            match came.after {
                Some(place) => after = Some(place),
                None => return Ok(all),
            }
        }
    }
}

#[test]
fn keys_come_from_every_key_manager_to_every_other_and_back() {
    use ManagerKind::{Barbican, Embedded, Kmip};
    let mut fleet = Fleet::start();
    let mut keys = Vec::new();
    for number in 0..VOLUMES {
        let (key, said) = fleet.manager(Embedded).create(&volume(number), &wanted(number)).unwrap();
        fleet.store.enrol(&said.record(&volume(number), &key)).unwrap();
        keys.push(key);
    }
    let is_all_in = |fleet: &Fleet, kind| {
        let manager = fleet.manager(kind);
        keys.iter().enumerate().all(|(number, key)| manager.get(&volume(number)).is_ok_and(|found| found.same_as(key)))
    };
    // Each pair once.
    for (from, to) in [
        (Embedded, Kmip),
        (Kmip, Barbican),
        (Barbican, Embedded),
        (Embedded, Barbican),
        (Barbican, Kmip),
        (Kmip, Embedded),
    ] {
        let route = Route { from, to };
        if from == Embedded && to == Kmip {
            // The server dies in between, with nothing lost.
            fleet.kmip.stop();
            assert_eq!(fleet.migrate(route, Aim::Copy).unwrap_err().reason(), Reason::TimedOut);
            fleet.kmip.start_again();
        }
        let came = fleet.migrate(route, Aim::Copy).unwrap();
        assert_eq!((came.stored, came.refused.len(), came.remaining), (VOLUMES as u64, 0, 0), "{route:?}: {came:?}");
        assert!(is_all_in(&fleet, from) && is_all_in(&fleet, to), "{route:?}");
        if fleet.manager(to).capabilities().describes {
            for number in 0..VOLUMES {
                let (_, said) = fleet.manager(to).described(&volume(number)).unwrap().unwrap();
                assert_eq!(said, wanted(number), "another host takes the volume over by this");
            }
        }
        let again = fleet.migrate(route, Aim::Copy).unwrap();
        assert_eq!((again.stored, again.present), (0, VOLUMES as u64), "{route:?}: {again:?}");
        let removed = fleet.migrate(route, Aim::DestroyOld).unwrap();
        assert_eq!((removed.removed, removed.refused.len()), (VOLUMES as u64, 0), "{route:?}: {removed:?}");
        assert!(is_all_in(&fleet, to), "{route:?}");
        assert!(fleet.manager(from).list().unwrap().iter().all(|info| info.destroyed), "{route:?}");
    }
}

#[test]
fn another_key_on_a_server_stays_and_so_does_the_old_one() {
    let fleet = Fleet::start();
    let route = Route { from: ManagerKind::Embedded, to: ManagerKind::Kmip };
    let (key, said) = fleet.manager(route.from).create(&volume(0), &wanted(0)).unwrap();
    fleet.store.enrol(&said.record(&volume(0), &key)).unwrap();
    let (other, _) = fleet.manager(route.to).create(&volume(0), &wanted(0)).unwrap();
    let came = fleet.migrate(route, Aim::Copy).unwrap();
    let value = |key: &Key| key.check_value(&volume(0)).to_string();
    assert_eq!(came.refused.len(), 1);
    assert!(came.refused[0].contains(&value(&key)) && came.refused[0].contains(&value(&other)), "{}", came.refused[0]);
    let removed = fleet.migrate(route, Aim::DestroyOld).unwrap();
    assert_eq!((removed.removed, removed.refused.len()), (0, 1));
    assert!(fleet.manager(route.from).get(&volume(0)).unwrap().same_as(&key));
    assert!(fleet.manager(route.to).get(&volume(0)).unwrap().same_as(&other));
}

/// With what every host asks, on real servers.
#[test]
fn two_hosts_that_destroy_old_keys_in_opposite_directions_leave_each_key_in_one_place() {
    let fleet = Fleet::start();
    let there = Route { from: ManagerKind::Kmip, to: ManagerKind::Barbican };
    let back = Route { from: there.to, to: there.from };
    let folder = tempfile::tempdir().unwrap();
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o700)).unwrap();
    let other = Store::open(folder.path()).unwrap();
    let mut keys = Vec::new();
    for number in 0..VOLUMES {
        let (key, said) = fleet.manager(there.from).create(&volume(number), &wanted(number)).unwrap();
        for store in [&fleet.store, &other] {
            store.enrol(&said.clone().record(&volume(number), &key)).unwrap();
        }
        keys.push(key);
    }
    fleet.migrate_as("host1", &fleet.store, there, Aim::Copy).unwrap();
    fleet.migrate_as("host2", &other, back, Aim::Copy).unwrap();
    let is_in =
        |kind, number: usize| fleet.manager(kind).get(&volume(number)).is_ok_and(|found| found.same_as(&keys[number]));
    let places = |number| [there.from, there.to].into_iter().filter(|&kind| is_in(kind, number)).count();
    let (one, two) = std::thread::scope(|scope| {
        let one = scope.spawn(|| fleet.migrate_as("host1", &fleet.store, there, Aim::DestroyOld).unwrap());
        let two = scope.spawn(|| fleet.migrate_as("host2", &other, back, Aim::DestroyOld).unwrap());
        (one.join().unwrap(), two.join().unwrap())
    });
    eprintln!("host1: {} gone, {:?}; host2: {} gone, {:?}", one.removed, one.refused, two.removed, two.refused);
    assert!((0..VOLUMES).all(|number| places(number) > 0), "{one:?}, {two:?}");
    assert!(one.removed + two.removed < 2 * VOLUMES as u64);
    // No mark is left of it, or one whose host goes on: then one of them alone comes to the end.
    let again = fleet.migrate_as("host1", &fleet.store, there, Aim::DestroyOld).unwrap();
    let gone_before = two.removed as usize;
    assert_eq!(again.refused.len(), gone_before, "{again:?}");
    assert!((0..VOLUMES).all(|number| places(number) == 1), "{again:?}");
}

/// A host ends when it has set its mark.
#[test]
fn a_mark_is_in_nobodys_way_who_uses_the_key_and_is_taken_back_by_its_host() {
    let fleet = Fleet::start();
    for (from, to) in [(ManagerKind::Kmip, ManagerKind::Barbican), (ManagerKind::Barbican, ManagerKind::Kmip)] {
        let (number, route) = (usize::from(from == ManagerKind::Barbican), Route { from, to });
        let back = Route { from: to, to: from };
        let (key, said) = fleet.manager(from).create(&volume(number), &wanted(number)).unwrap();
        fleet.store.enrol(&said.record(&volume(number), &key)).unwrap();
        fleet.migrate(route, Aim::Copy).unwrap();
        let manager = fleet.manager(from);
        for is_asked in [false, true] {
            let host = Host { name: "host1".to_owned(), id: "id-of-host1".to_owned() };
            let mark = Leaving { host, is_asked };
            manager.note_leaving(&volume(number), Some(&mark)).unwrap();
            assert_eq!(fleet.manager(from).leaving(&volume(number)).unwrap(), Some(mark));
            assert!(manager.get(&volume(number)).unwrap().same_as(&key));
            assert!(manager.get_enrolled(&recorded(&volume(number), &key)).unwrap().same_as(&key));
            assert_eq!(manager.described(&volume(number)).unwrap().unwrap().1, wanted(number));
            assert!(manager.create(&volume(number), &wanted(number)).unwrap().0.same_as(&key));
            assert!(manager.list().unwrap().iter().any(|info| info.volume == volume(number) && !info.destroyed));
            let elsewhere = fleet.migrate_as("host2", &fleet.store, back, Aim::Copy).unwrap();
            assert!(elsewhere.refused[0].starts_with("host host1 has begun to destroy the key"), "{elsewhere:?}");
            let here = fleet.migrate(back, Aim::Copy).unwrap();
            assert_eq!(here.refused.len(), usize::from(is_asked), "{here:?}");
            assert_eq!(manager.leaving(&volume(number)).unwrap().is_some(), is_asked);
        }
        // What was begun comes to its end.
        fleet.migrate(route, Aim::Copy).unwrap();
        // The first volume has come here with the second.
        assert_eq!(fleet.migrate(route, Aim::DestroyOld).unwrap().removed, number as u64 + 1);
        assert_eq!(manager.get(&volume(number)).err().unwrap().reason(), Reason::NoKey);
        assert!(fleet.manager(to).get(&volume(number)).unwrap().same_as(&key));
    }
}
