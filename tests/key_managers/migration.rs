//! Keys that come from every key manager to every other one.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;

use volcrypt::encryptor::VolumeLocks;
use volcrypt::keys::{
    Aim, Description, EmbeddedKeyManager, Key, KeyManager, KeyMigration, ManagerKind, MigrationProgress, Route,
};
use volcrypt::policy::Profile;
use volcrypt::refusal::{Reason, Refusal};
use volcrypt::store::{EnrolledDevice, Store};
use volcrypt::volume::VolumeId;

use super::barbican::Barbican;
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
    locks: VolumeLocks,
    kmip: PyKmip,
    barbican: Barbican,
}

impl Fleet {
    fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o700)).unwrap();
        let store = Arc::new(Store::open(folder.path()).unwrap());
        Fleet { folder, store, locks: VolumeLocks::default(), kmip: PyKmip::start(), barbican: Barbican::start() }
    }

    fn manager(&self, kind: ManagerKind) -> Box<dyn KeyManager> {
        match kind {
            ManagerKind::Kmip => Box::new(self.kmip.manager()),
            ManagerKind::Barbican => Box::new(self.barbican.manager("host1")),
            _ => Box::new(EmbeddedKeyManager::open(Arc::clone(&self.store), None, self.folder.path()).unwrap()),
        }
    }

    fn migrate(&self, route: Route, aim: Aim) -> Result<MigrationProgress, Refusal> {
        let (source, target) = (self.manager(route.from), self.manager(route.to));
        let migration = KeyMigration::new(&self.store, &self.locks, route, (&*source, &*target))?;
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
