//! Keys that are not, or not only, this host's to move.

use super::*;

/// A server that remembers which keys were destroyed, or has them in use by another host.
#[derive(Default)]
struct Strict {
    server: Server,
    in_use: bool,
    uses: Mutex<Vec<HashSet<VolumeId>>>,
}

impl KeyManager for Strict {
    fn get(&self, volume: &VolumeId) -> Result<Key, Refusal> {
        self.described(volume)?.map(|(key, _)| key).ok_or_else(|| Refusal::new(Reason::NoKey, "the server has no key"))
    }

    fn get_enrolled(&self, key: &RecordedKey) -> Result<Key, Refusal> {
        self.get(&key.volume)
    }

    fn create(&self, volume: &VolumeId, wanted: &Description) -> Result<(Key, Description), Refusal> {
        self.server.create(volume, wanted)
    }

    fn import(&self, volume: &VolumeId, key: &Key, description: &Description) -> Result<Imported, Refusal> {
        self.server.import(volume, key, description)
    }

    fn capabilities(&self) -> Capabilities {
        self.server.capabilities()
    }

    fn described(&self, volume: &VolumeId) -> Result<Option<(Key, Description)>, Refusal> {
        match self.server.forgotten.lock().unwrap().contains(volume) {
            true => Err(Refusal::new(Reason::KeyDestroyed, "the key was destroyed on the server")),
            false => self.server.described(volume),
        }
    }

    fn destroy(&self, volume: &VolumeId) -> Result<(), Refusal> {
        match self.in_use {
            true => Err(Refusal::new(Reason::NotAllowed, "the key is in use by host b")),
            false => self.server.destroy(volume),
        }
    }

    fn leaving(&self, volume: &VolumeId) -> Result<Option<Leaving>, Refusal> {
        self.server.leaving(volume)
    }

    fn note_leaving(&self, volume: &VolumeId, leaving: Option<&Leaving>) -> Result<(), Refusal> {
        self.server.note_leaving(volume, leaving)
    }

    fn list(&self) -> Result<Vec<KeyInfo>, Refusal> {
        self.server.list()
    }

    fn note_uses(&self, in_use: &HashSet<VolumeId>) -> Result<(), Refusal> {
        self.uses.lock().unwrap().push(in_use.clone());
        Ok(())
    }
}

#[test]
fn a_key_of_a_volume_that_only_another_host_has_enrolled_is_not_taken_into_the_database() {
    const STAYS: &str =
        "volume of-host-b has no record on this host, and embedded keeps none of other hosts: its key stays in kmip";
    let mut host = Host::with_volumes(0);
    host.enrol("own", 512);
    let (old, new) = (Server::default(), host.embedded());
    old.put("of-host-b", &[7; 64], description("of-host-b", 512, Some("p1")));
    old.put("own", &host.keys["own"].clone(), description("own", 512, Some("p1")));
    let sum = host.migrate(BACK, Aim::Copy, (&old, &new)).unwrap();
    assert_eq!(sum, Sum { present: 1, skipped: vec![STAYS.to_owned()], ..Sum::default() });
    assert!(new.get(&id("of-host-b")).is_err());
    // An earlier release may have copied it.
    new.import(&id("of-host-b"), &copy_of(&[7; 64]), &description("of-host-b", 512, None)).unwrap();
    for is_noted in [true, false] {
        if is_noted {
            host.store.plan_copies(BACK, &[id("of-host-b")]).unwrap();
            host.store.note_move(BACK, &id("of-host-b"), MoveState::Copied, None).unwrap();
        }
        let sum = host.migrate(BACK, Aim::DestroyOld, (&old, &new)).unwrap();
        assert_eq!(sum, Sum { removed: u64::from(is_noted), skipped: vec![STAYS.to_owned()], ..Sum::default() });
        old.get(&id("of-host-b")).unwrap();
    }
}

#[test]
fn the_old_key_of_a_destroyed_volume_goes_with_the_others_if_it_is_that_volumes() {
    let host = Host::with_volumes(4);
    let (old, new) = (host.embedded(), Server::default());
    // One is destroyed without having been copied, and one after it.
    let destroyed = |name: &str| {
        let enrolled = [VolumeState::Enrolled];
        host.store.change_state(&id(name), &enrolled, VolumeState::Destroyed, None).unwrap();
        new.keys.lock().unwrap().remove(&id(name));
    };
    destroyed("volume-000");
    destroyed("volume-003");
    old.forget(&id("volume-003")).unwrap();
    old.make(&id("volume-003"), size(128)).unwrap();
    host.migrate(ROUTE, Aim::Copy, (&old, &new)).unwrap();
    destroyed("volume-001");
    let sum = host.migrate(ROUTE, Aim::DestroyOld, (&old, &new)).unwrap();
    assert_eq!(
        sum.skipped,
        ["volume volume-003 was destroyed, and the key of that id in embedded is not the one it had: it stays there"]
    );
    assert_eq!((sum.removed, sum.refused.len()), (3, 0));
    let left: Vec<_> = old.list().unwrap().into_iter().map(|info| info.volume).collect();
    assert_eq!(left, [id("volume-003")]);
    assert_eq!(host.recorded(Kind::OldKeyDestroyed), 3);
}

#[test]
fn the_key_of_a_retired_volume_is_moved_with_the_others() {
    let host = Host::with_volumes(2);
    let (old, new) = (host.embedded(), Server::default());
    host.store.change_state(&id("volume-000"), &[VolumeState::Enrolled], VolumeState::Retired, None).unwrap();
    assert_eq!(host.store.count_keys_left_here().unwrap(), 2);
    let sum = host.migrate(ROUTE, Aim::Copy, (&old, &new)).unwrap();
    assert_eq!(sum, Sum { stored: 2, ..Sum::default() });
    assert_eq!(host.store.count_keys_left_here().unwrap(), 0);
    host.assert_all_in(&new);
    assert_eq!(host.migrate(ROUTE, Aim::DestroyOld, (&old, &new)).unwrap().removed, 2);
    host.assert_all_in(&new);
}

#[test]
fn what_a_server_remembers_as_destroyed_is_compared_in_its_new_place() {
    let mut host = Host::with_volumes(0);
    let (old, new) = (Strict::default(), host.embedded());
    for name in ["lost", "moved"] {
        host.enrol(name, 512);
        old.server.put(name, &host.keys[name].clone(), description(name, 512, Some("p1")));
    }
    host.migrate(BACK, Aim::Copy, (&old, &new)).unwrap();
    assert_eq!(host.migrate(BACK, Aim::DestroyOld, (&old, &new)).unwrap().removed, 2);
    new.forget(&id("lost")).unwrap();
    let sum = host.migrate(BACK, Aim::Copy, (&old, &new)).unwrap();
    assert_eq!((sum.present, sum.refused), (1, vec!["the key was destroyed on the server".to_owned()]));
}

#[test]
fn an_old_key_is_recorded_as_destroyed_only_when_it_is() {
    let mut host = Host::with_volumes(0);
    let (mut old, new) = (Strict { in_use: true, ..Strict::default() }, host.embedded());
    host.enrol("v", 512);
    old.server.put("v", &host.keys["v"].clone(), description("v", 512, Some("p1")));
    host.migrate(BACK, Aim::Copy, (&old, &new)).unwrap();
    let sum = host.migrate(BACK, Aim::DestroyOld, (&old, &new)).unwrap();
    assert_eq!(sum.refused, ["the key is in use by host b"]);
    assert_eq!((host.recorded(Kind::DestructionStarted), host.recorded(Kind::OldKeyDestroyed)), (1, 0));
    old.in_use = false;
    assert_eq!(host.migrate(BACK, Aim::DestroyOld, (&old, &new)).unwrap().removed, 1);
    assert_eq!((host.recorded(Kind::DestructionStarted), host.recorded(Kind::OldKeyDestroyed)), (2, 1));
}

#[test]
fn a_host_that_has_switched_ends_its_uses_of_the_old_keys() {
    let mut host = Host::with_volumes(0);
    let (old, new) = (Strict::default(), host.embedded());
    host.enrol("v", 512);
    old.server.put("v", &host.keys["v"].clone(), description("v", 512, Some("p1")));
    for (is_switched, told) in [(false, vec![]), (true, vec![HashSet::new()])] {
        let migration = KeyMigration::new(&host.store, &host.locks, BACK, (&old, &new), called("here"))
            .unwrap()
            .after_switch(is_switched);
        let begun = migration.take(Aim::Copy, None).unwrap();
        migration.take(Aim::Copy, begun.after.as_ref()).unwrap();
        assert_eq!(*old.uses.lock().unwrap(), told);
    }
}
