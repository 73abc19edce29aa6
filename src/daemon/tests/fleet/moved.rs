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
    broker.destroy(&id).unwrap();
    assert_eq!(broker.volume(&id).unwrap().state, VolumeState::Destroyed);
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
    assert_eq!(
        broker.destroy(&id).unwrap().unwrap(),
        "kmip may have its key as well, from moving keys, and barbican may have its key as well, from moving keys: run \
         'volcrypt key migrate --from kmip --to embedded --destroy-old'"
    );
    let last = destruction(&broker).pop().unwrap();
    assert!(
        last.ends_with(
            "; kmip may have its key as well, from moving keys; barbican may have its key as well, from moving keys"
        ),
        "{last}"
    );
    store.note_move(route, &id, MoveState::Moved, None).unwrap();
    broker.destroy(&id).unwrap();
    let last = destruction(&broker).pop().unwrap();
    assert!(last.ends_with("in the key manager; barbican may have its key as well, from moving keys"), "{last}");
}

#[test]
fn a_volume_whose_key_was_not_copied_is_not_marked_as_destroyed() {
    let keys = Shared::default();
    let (world, device, broker, id) = switched(&keys, false);
    for state in [VolumeState::Enrolled, VolumeState::Retired] {
        if state == VolumeState::Retired {
            broker.retire(&id).unwrap();
        }
        let refusal = broker.destroy(&id).unwrap_err();
        assert!(
            refusal.to_string().starts_with(
                "nothing was destroyed, because the key of volume one is in the database and was not copied to the key \
                 manager in use: run 'volcrypt key migrate --from embedded --to "
            ),
            "{refusal}"
        );
        assert_eq!(broker.volume(&id).unwrap().state, state);
    }
    assert!(in_database(&world, &id));
    assert_eq!(destruction(&broker), ["retired, volume one, by daemon: done, its key stays"]);
    world.broker(true).enrol(device, None).unwrap();
}

#[test]
fn a_volume_of_which_no_key_was_found_is_not_marked_as_destroyed() {
    let keys = Shared::default();
    let [(_, here, one), _] = hosts_with(&keys);
    let record = one.enrol(here, None).unwrap();
    let kept = keys.0.lock().unwrap().clone();
    keys.0.lock().unwrap().clear();
    keys.1.lock().unwrap().destroy = Some((Reason::NoKey, true));
    assert_eq!(one.destroy(&record.id).unwrap_err().reason(), Reason::NoKey);
    assert_eq!(one.volume(&record.id).unwrap().state, VolumeState::Enrolled);
    assert_eq!(
        destruction(&one)[1..],
        ["reinstated, volume one, by daemon: done, because the key manager has no key of it"]
    );
    // The server is restored, and the volume opens.
    *keys.0.lock().unwrap() = kept;
    assert!(matches!(one.open(here, true, OFlags::RDWR, &vm()), Ok(Verdict::Mapping(..))));
}

#[test]
fn a_volume_of_which_no_key_was_found_needs_the_operators_word_also_after_the_server_was_away() {
    let keys = Shared::default();
    let [(_, here, one), _] = hosts_with(&keys);
    let record = one.enrol(here, None).unwrap();
    keys.0.lock().unwrap().clear();
    keys.1.lock().unwrap().destroy = Some((Reason::TimedOut, false));
    assert_eq!(one.destroy(&record.id).unwrap_err().reason(), Reason::TimedOut);
    assert_eq!(one.volume(&record.id).unwrap().state, VolumeState::Enrolled);
    keys.1.lock().unwrap().destroy = Some((Reason::NoKey, true));
    let refusal = one.destroy(&record.id).unwrap_err();
    assert!(refusal.to_string().ends_with("repeat with --gone, which records that"), "{refusal}");
}

#[test]
fn a_key_that_was_revoked_is_not_gone_and_can_be_destroyed() {
    let keys = Shared::default();
    let [(_, here, one), _] = hosts_with(&keys);
    let record = one.enrol(here, None).unwrap();
    keys.1.lock().unwrap().get = Some(Reason::KeyRevoked);
    let refusal = one.record_gone(&record.id).unwrap_err();
    assert!(refusal.to_string().ends_with("has one that was revoked: repeat without --gone"), "{refusal}");
    assert_eq!(one.volume(&record.id).unwrap().state, VolumeState::Enrolled);
    keys.1.lock().unwrap().get = Some(Reason::KeyRevoked);
    one.destroy(&record.id).unwrap();
    assert!(keys.get(&record.id).is_err());
}

#[test]
fn a_key_that_is_gone_everywhere_is_recorded_as_that_on_request() {
    let keys = Shared::default();
    let [(mut world, here, one), (_, there, other)] = hosts_with(&keys);
    let record = one.enrol(here, None).unwrap();
    let id = &record.id;
    other.enrol(there, None).unwrap();
    let refusal = one.record_gone(id).unwrap_err();
    assert!(refusal.to_string().ends_with("has one: repeat without --gone"), "{refusal}");
    other.destroy(id).unwrap();
    // What the server does not say, and what is elsewhere, is not gone.
    keys.1.lock().unwrap().get = Some(Reason::TimedOut);
    assert_eq!(one.record_gone(id).unwrap_err().reason(), Reason::TimedOut);
    let store = Arc::clone(&one.vault().unwrap().store);
    let route = Route { from: ManagerKind::Kmip, to: ManagerKind::Barbican };
    store.plan_copies(route, std::slice::from_ref(id)).unwrap();
    let refusal = one.record_gone(id).unwrap_err();
    assert!(refusal.to_string().contains("because kmip may have its key as well"), "{refusal}");
    store.drop_move(id).unwrap();
    world.mapped = true;
    assert!(world.broker(true).with_keys(Box::new(keys.clone())).record_gone(id).is_err(), "it is in use");
    assert_eq!(one.volume(id).unwrap().state, VolumeState::Enrolled);
    // By itself it is not taken for gone, but the way to say so is told.
    keys.1.lock().unwrap().destroy = Some((Reason::NoKey, true));
    let refusal = one.destroy(id).unwrap_err();
    assert!(refusal.to_string().ends_with("repeat with --gone, which records that"), "{refusal}");
    one.record_gone(id).unwrap();
    assert_eq!(one.volume(id).unwrap().state, VolumeState::Destroyed);
    let last = destruction(&one).pop().unwrap();
    assert!(last.starts_with("destroyed, volume one, by daemon: done, it was gone already in "), "{last}");
    assert_eq!(one.open(here, true, OFlags::RDWR, &vm()).unwrap_err().errno(), libc::EKEYREVOKED);
    // To say it again changes nothing.
    one.record_gone(id).unwrap();
}

#[test]
fn a_destruction_that_was_cut_off_after_the_key_went_is_recorded_at_the_next_attempt() {
    let keys = Shared::default();
    let (world, _, broker, id) = switched(&keys, true);
    let store = &broker.vault().unwrap().store;
    store.change_state(&id, &[VolumeState::Enrolled], VolumeState::Destroyed, None).unwrap();
    keys.0.lock().unwrap().clear();
    keys.1.lock().unwrap().destroy = Some((Reason::NoKey, true));
    broker.destroy(&id).unwrap();
    assert_eq!(broker.volume(&id).unwrap().state, VolumeState::Destroyed);
    let last = destruction(&broker).pop().unwrap();
    assert!(last.starts_with("destroyed, volume one, by daemon: done, it was gone already"), "{last}");
    assert!(!in_database(&world, &id));
}

#[test]
fn what_is_not_known_of_a_key_is_not_said() {
    struct Dies(Shared);
    impl KeyManager for Dies {
        fn get(&self, volume: &VolumeId) -> Result<Key, Refusal> {
            self.0.get(volume)
        }
        fn get_enrolled(&self, key: &RecordedKey) -> Result<Key, Refusal> {
            self.get(&key.volume)
        }

        fn create(&self, volume: &VolumeId, wanted: &Description) -> Result<(Key, Description), Refusal> {
            self.0.create(volume, wanted)
        }
        fn described(&self, volume: &VolumeId) -> Result<Option<(Key, Description)>, Refusal> {
            self.0.described(volume)
        }
        fn import(&self, volume: &VolumeId, key: &Key, description: &Description) -> Result<Imported, Refusal> {
            self.0.import(volume, key, description)
        }
        fn capabilities(&self) -> Capabilities {
            self.0.capabilities()
        }
        fn destroy(&self, volume: &VolumeId) -> Result<(), Refusal> {
            self.0.1.lock().unwrap().get = Some(Reason::TimedOut);
            self.0.destroy(volume).and(Err(Refusal::new(Reason::TimedOut, "no answer")))
        }
        fn list(&self) -> Result<Vec<KeyInfo>, Refusal> {
            self.0.list()
        }
    }
    let world = World::new();
    let device = world.add_volume("one", 3);
    let broker = world.broker(true).with_keys(Box::new(Dies(Shared::default())));
    let record = broker.enrol(device, None).unwrap();
    broker.destroy(&record.id).unwrap_err();
    assert_eq!(
        destruction(&broker)[1..],
        ["reinstated, volume one, by daemon: done, because it is not known whether its key was destroyed"]
    );
}
