//! Volumes whose keys are, or were, in another key manager too.

use super::*;
use crate::keys::{ManagerKind, Route};
use crate::store::MoveState;

/// A host whose volume was enrolled with the database, and that asks `keys` now.
fn switched(keys: &Shared, is_copied: bool) -> (World, DeviceNumber, Broker, VolumeId) {
    let world = World::new();
    let device = world.add_volume("one", 3);
    let before = world.broker(true);
    let record = before.enrol(device, None).unwrap();
    if is_copied {
        keys.import(&record.id, &before.key(&record).unwrap(), &Description::of(&record)).unwrap();
    }
    let after = world.broker(true).with_keys(Box::new(keys.clone()));
    (world, device, after, record.id)
}

fn in_database(world: &World, id: &VolumeId) -> bool {
    world.broker(true).vault().unwrap().keys.get(id).is_ok()
}

#[test]
fn a_volume_that_is_destroyed_after_the_switch_leaves_no_key_in_the_database() {
    let keys = Shared::default();
    let (world, _, broker, id) = switched(&keys, true);
    assert!(in_database(&world, &id));
    assert_eq!(broker.destroy(&id).unwrap().state, VolumeState::Destroyed);
    assert!(!in_database(&world, &id));
    assert_eq!(
        destruction(&broker)[1..],
        ["destroyed, volume one, by daemon: done, in the key manager, and the one in the database with it"]
    );
}

#[test]
fn the_log_of_a_destruction_names_the_place_that_the_key_was_moved_from() {
    let keys = Shared::default();
    let (_world, _, broker, id) = switched(&keys, true);
    let store = &broker.vault().unwrap().store;
    let route = Route { from: ManagerKind::Kmip, to: ManagerKind::Barbican };
    store.plan_copies(route, std::slice::from_ref(&id)).unwrap();
    store.note_move(route, &id, MoveState::Copied, None).unwrap();
    broker.destroy(&id).unwrap();
    let last = destruction(&broker).pop().unwrap();
    assert!(last.ends_with("; kmip and barbican may have it as well, from moving keys"), "{last}");
}
