//! The promises, and each key manager that has to keep them.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Barrier, Mutex};
use std::time::{Duration, Instant};

use volcrypt::keys::kmip::{KeyOrigin, KmipConfig, KmipKeyManager};
use volcrypt::keys::{
    Capabilities, Description, EmbeddedKeyManager, Imported, Key, KeyFileManager, KeyHandle, KeyManager,
    OneKeyForEveryVolume, RecordedKey,
};
use volcrypt::policy::{KeySize, Profile};
use volcrypt::refusal::{Reason, Refusal};
use volcrypt::store::{EnrolledDevice, Store};
use volcrypt::volume::VolumeId;

use super::barbican::Barbican;
use super::cache;
use super::kmip_wrapped::Wrapping;
use super::pykmip::PyKmip;

/// Makes a key manager as another host or another start of the daemon would.
type Host<'a> = dyn Fn() -> Box<dyn KeyManager> + Sync + 'a;

pub fn volume(name: &str) -> VolumeId {
    name.parse().unwrap()
}

fn size(bits: u32) -> KeySize {
    bits.try_into().unwrap()
}

/// A volume whose key has so many bits.
fn wanted(bits: u32, owner: Option<&str>) -> Description {
    let device = EnrolledDevice { wwid: Some("naa.6".to_owned()), ..EnrolledDevice::default() };
    let profile = Profile { key_size: size(bits), ..Profile::default() };
    Description::new(device, 4096, ("default", &profile), owner, 7)
}

pub fn create(manager: &dyn KeyManager, volume: &VolumeId, bits: u32) -> Result<Key, Refusal> {
    patiently(|| manager.create(volume, &wanted(bits, None)).map(|(key, _)| key))
}

/// What `make` comes to; once more where the machine was too busy to choose a key in time.
pub fn patiently<T>(make: impl Fn() -> Result<T, Refusal>) -> Result<T, Refusal> {
    let end = Instant::now() + Duration::from_secs(120);
    loop {
        match make() {
            Err(refusal) if refusal.reason() == Reason::TimedOut && Instant::now() < end => {}
            outcome => return outcome,
        }
    }
}

/// `key` as the record of `volume` names it, if it is its first one.
pub fn recorded(volume: &VolumeId, key: &Key) -> RecordedKey {
    recorded_as(volume, 1, key)
}

/// The same, if it is the volume's key number `version`.
pub fn recorded_as(volume: &VolumeId, version: u32, key: &Key) -> RecordedKey {
    RecordedKey { volume: volume.clone(), handle: KeyHandle::of(volume, version), check_value: key.check_value(volume) }
}

/// `said` of `volume`, where `key` is its second one.
pub fn second(said: Description, volume: &VolumeId, key: &Key) -> Description {
    let mut record = said.record(volume, key);
    record.key = KeyHandle::of(volume, 2);
    Description::of(&record)
}

pub fn reason<T>(outcome: Result<T, Refusal>) -> Reason {
    outcome.err().expect("must be refused").reason()
}

fn a_key_is_the_same_for_all_and_for_ever(host: &Host<'_>, bits: u32) {
    let (one, other) = (host(), host());
    let id = volume(&format!("same-{bits}"));
    let made = create(&*one, &id, bits).unwrap();
    assert_eq!(made.bits(), bits as usize);
    assert!(made.bytes().iter().any(|&byte| byte != made.bytes()[0]), "no random key");
    for manager in [&one, &other, &host()] {
        assert!(manager.get(&id).unwrap().same_as(&made));
        assert!(create(&**manager, &id, bits).unwrap().same_as(&made), "never replaced");
    }
}

fn keys_of_two_volumes_differ(host: &Host<'_>) {
    let manager = host();
    let (one, other) = (volume("differ.1"), volume("differ.10"));
    let key = create(&*manager, &one, 256).unwrap();
    assert!(!create(&*manager, &other, 256).unwrap().same_as(&key));
    assert!(manager.get(&one).unwrap().same_as(&key));
    let listed: Vec<_> =
        manager.list().unwrap().into_iter().filter(|info| info.volume.as_str().starts_with("differ")).collect();
    assert_eq!(listed.iter().map(|info| info.volume.as_str()).collect::<Vec<_>>(), ["differ.1", "differ.10"]);
    assert!(listed.iter().all(|info| info.key_size == size(256) && !info.destroyed && info.created_at > 1_700_000_000));
}

fn what_is_not_there_is_told_from_the_rest(host: &Host<'_>) {
    let manager = host();
    assert_eq!(reason(manager.get(&volume("nowhere"))), Reason::NoKey);
    assert_eq!(reason(manager.destroy(&volume("nowhere"))), Reason::NoKey);
}

fn another_size_is_refused(host: &Host<'_>) {
    let manager = host();
    let id = volume("sized");
    let key = create(&*manager, &id, 256).unwrap();
    let refusal = create(&*manager, &id, 512).err().unwrap();
    assert_eq!(refusal.reason(), Reason::Configuration);
    assert!(refusal.to_string().contains("256") && refusal.to_string().contains("512"), "{refusal}");
    assert!(manager.get(&id).unwrap().same_as(&key));
}

fn two_hosts_that_make_a_key_at_once_have_the_same(host: &Host<'_>, rounds: usize, bits: u32) {
    for round in 0..rounds {
        let id = volume(&format!("race-{bits}-{round}"));
        // What fails before the barrier would leave the others waiting at it.
        let managers = [host(), host(), host(), host()];
        let barrier = Barrier::new(managers.len());
        let keys: Vec<Vec<u8>> = std::thread::scope(|scope| {
            let threads: Vec<_> = managers
                .iter()
                .enumerate()
                .map(|(number, manager)| {
                    let (barrier, id) = (&barrier, &id);
                    scope.spawn(move || {
                        barrier.wait();
                        // Not all quite at the same moment.
                        std::thread::sleep(Duration::from_millis((number * round * 97 % 900) as u64));
                        create(&**manager, id, bits).unwrap().bytes().to_vec()
                    })
                })
                .collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        assert!(keys.iter().all(|key| *key == keys[0]), "round {round}");
        assert_eq!(host().get(&id).unwrap().bytes(), keys[0]);
        assert_eq!(host().list().unwrap().iter().filter(|info| info.volume == id).count(), 1, "no other key is left");
    }
}

/// Whether the manager remembers what it destroyed decides what it says of it.
fn what_was_destroyed_is_gone_for_everybody(host: &Host<'_>, said: Reason) {
    let (one, other) = (host(), host());
    let (gone, stays) = (volume("gone"), volume("stays"));
    create(&*one, &gone, 256).unwrap();
    let key = create(&*one, &stays, 256).unwrap();
    other.get(&gone).unwrap();
    one.destroy(&gone).unwrap();
    for manager in [&one, &other, &host()] {
        assert_eq!(reason(manager.get(&gone)), said);
        assert!(manager.get(&stays).unwrap().same_as(&key));
    }
    assert!(one.list().unwrap().iter().all(|info| info.volume != gone || info.destroyed));
}

fn a_key_that_is_brought_is_kept_and_never_replaces_another(host: &Host<'_>, bits: u32) {
    let (one, other) = (host(), host());
    let id = volume(&format!("brought-{bits}"));
    let (key, another) = (Key::random(size(bits)).unwrap(), Key::random(size(bits)).unwrap());
    assert_eq!(one.import(&id, &key, &wanted(bits, None)).unwrap(), Imported::Stored);
    // Another host may know the volume with another owner.
    for (manager, owner) in [(&one, None), (&other, Some("p1")), (&host(), None)] {
        assert!(manager.get(&id).unwrap().same_as(&key));
        assert_eq!(manager.import(&id, &key, &wanted(bits, owner)).unwrap(), Imported::Present);
        let refusal = manager.import(&id, &another, &wanted(bits, None)).unwrap_err();
        assert_eq!(refusal.reason(), Reason::WrongKey);
        assert!(refusal.to_string().contains(&format!("has another key of volume {id} already")), "{refusal}");
        assert!(manager.get(&id).unwrap().same_as(&key), "never replaced");
        assert!(create(&**manager, &id, bits).unwrap().same_as(&key), "nor made anew");
    }
    if one.capabilities().describes {
        let (found, said) = other.described(&id).unwrap().unwrap();
        assert!(found.same_as(&key) && said == wanted(bits, None));
        let profile = Profile { key_size: size(bits), sector_size: 4096, ..Profile::default() };
        let device = EnrolledDevice { wwid: Some("naa.6".to_owned()), ..EnrolledDevice::default() };
        let otherwise = Description::new(device, 4096, ("default", &profile), None, 7);
        assert_eq!(reason(other.import(&id, &key, &otherwise)), Reason::WrongKey, "the same key in other sectors");
    }
    let info = one.list().unwrap().into_iter().filter(|info| info.volume == id).collect::<Vec<_>>();
    assert_eq!(info.len(), 1, "no other key is left");
    // One that is elsewhere as well can be taken away, and brought again where the manager does not remember it.
    one.forget(&id).unwrap();
    one.forget(&id).unwrap();
    assert_eq!(reason(other.get(&id)), Reason::NoKey);
    assert_eq!(other.import(&id, &key, &wanted(bits, None)).unwrap(), Imported::Stored);
    assert!(one.get(&id).unwrap().same_as(&key));
}

fn a_record_gets_the_version_that_it_names(host: &Host<'_>) {
    let (one, other) = (host(), host());
    let (id, nowhere) = (volume("re-encrypted"), volume("never-encrypted"));
    let key = Key::random(size(512)).unwrap();
    let said = second(wanted(512, None), &id, &key);
    assert_eq!(one.import(&id, &key, &said).unwrap(), Imported::Stored);
    for manager in [&one, &other, &host()] {
        assert!(manager.get_enrolled(&recorded_as(&id, 2, &key)).unwrap().same_as(&key));
        for version in [1, 3] {
            let refusal =
                manager.get_enrolled(&recorded_as(&id, version, &key)).err().expect("another version was used");
            assert_eq!(refusal.reason(), Reason::WrongKey, "{refusal}");
            assert!(refusal.to_string().contains(&format!("version {version}")), "{refusal}");
        }
        let foreign = KeyHandle { id: "0b1f7c1e-1111-4222-8333-444455556666".parse().unwrap(), version: 2 };
        let foreign = RecordedKey { handle: foreign, ..recorded(&id, &key) };
        assert_eq!(reason(manager.get_enrolled(&foreign)), Reason::WrongKey);
        assert_eq!(reason(manager.get_enrolled(&recorded(&nowhere, &key))), Reason::NoKey);
        assert_eq!(manager.import(&id, &key, &said).unwrap(), Imported::Present);
        assert_eq!(reason(manager.import(&id, &key, &wanted(512, None))), Reason::WrongKey, "it is the second one");
        let (found, kept) = manager.create(&id, &wanted(512, None)).unwrap();
        assert!(found.same_as(&key) && kept.key_version() == 2);
    }
    if one.capabilities().describes {
        assert_eq!(other.described(&id).unwrap().unwrap().1, said);
    }
    let listed = other.list().unwrap().into_iter().filter(|info| info.volume == id).map(|info| info.key);
    assert_eq!(listed.collect::<Vec<_>>(), [KeyHandle::of(&id, 2)]);
}

fn hosts_that_bring_the_same_key_at_once_have_it_once(host: &Host<'_>, rounds: usize) {
    for round in 0..rounds {
        let id = volume(&format!("brought-at-once-{round}"));
        let bytes = Key::random(size(512)).unwrap().bytes().to_vec();
        let managers = [host(), host(), host(), host()];
        let barrier = Barrier::new(managers.len());
        std::thread::scope(|scope| {
            for (number, manager) in managers.iter().enumerate() {
                let (barrier, id, bytes) = (&barrier, &id, &bytes);
                scope.spawn(move || {
                    barrier.wait();
                    std::thread::sleep(std::time::Duration::from_millis((number * round * 97 % 900) as u64));
                    let said = wanted(512, [None, Some("p1")][number % 2]);
                    patiently(|| manager.import(id, &key_of(bytes), &said)).unwrap();
                    assert_eq!(manager.get(id).unwrap().bytes(), bytes);
                });
            }
        });
        assert_eq!(host().get(&id).unwrap().bytes(), bytes);
        assert_eq!(host().list().unwrap().iter().filter(|info| info.volume == id).count(), 1, "no other key is left");
    }
}

fn of_hosts_that_bring_different_keys_at_once_one_has_its_way(host: &Host<'_>) {
    let id = volume("brought-differing");
    let keys: Vec<Vec<u8>> = (0..3).map(|_| Key::random(size(256)).unwrap().bytes().to_vec()).collect();
    let managers = [host(), host(), host()];
    let barrier = Barrier::new(keys.len());
    let bring = |manager: &dyn KeyManager, bytes: &[u8]| {
        barrier.wait();
        match patiently(|| manager.import(&id, &key_of(bytes), &wanted(256, None))) {
            Ok(_) => true,
            Err(refusal) => {
                assert_eq!(refusal.reason(), Reason::WrongKey, "{refusal}");
                false
            }
        }
    };
    let outcomes: Vec<bool> = std::thread::scope(|scope| {
        let threads: Vec<_> = keys
            .iter()
            .zip(&managers)
            .map(|(bytes, manager)| {
                let bring = &bring;
                scope.spawn(move || bring(&**manager, bytes))
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    let kept = host().get(&id).unwrap();
    for (bytes, brought) in keys.iter().zip(&outcomes) {
        assert_eq!(*brought, kept.bytes() == bytes);
    }
    assert_eq!(outcomes.iter().filter(|&&brought| brought).count(), 1);
}

fn key_of(bytes: &[u8]) -> Key {
    Key::filled(bytes.len(), |room| {
        room.copy_from_slice(bytes);
        Ok(())
    })
    .unwrap()
}

#[test]
fn the_embedded_manager() {
    let folder = tempfile::tempdir().unwrap();
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o700)).unwrap();
    let host = || -> Box<dyn KeyManager> {
        let store = Arc::new(Store::open(folder.path()).unwrap());
        Box::new(EmbeddedKeyManager::open(store, None, folder.path()).unwrap())
    };
    a_key_is_the_same_for_all_and_for_ever(&host, 256);
    a_key_is_the_same_for_all_and_for_ever(&host, 512);
    keys_of_two_volumes_differ(&host);
    what_is_not_there_is_told_from_the_rest(&host);
    another_size_is_refused(&host);
    two_hosts_that_make_a_key_at_once_have_the_same(&host, 10, 512);
    a_key_that_is_brought_is_kept_and_never_replaces_another(&host, 256);
    hosts_that_bring_the_same_key_at_once_have_it_once(&host, 10);
    of_hosts_that_bring_different_keys_at_once_one_has_its_way(&host);
    what_was_destroyed_is_gone_for_everybody(&host, Reason::KeyDestroyed);
    let gone = host().import(&volume("gone"), &Key::random(size(256)).unwrap(), &wanted(256, None));
    assert_eq!(reason(gone), Reason::KeyDestroyed, "destroyed for good");
}

#[test]
fn the_key_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("fixed.key");
    fs::write(&path, (0..64).collect::<Vec<u8>>()).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    let host = || -> Box<dyn KeyManager> { Box::new(KeyFileManager::open(&path, OneKeyForEveryVolume).unwrap()) };
    a_key_is_the_same_for_all_and_for_ever(&host, 512);
    // One key for every volume: none is ever missing, and none can be destroyed for one.
    assert_eq!(reason(host().destroy(&volume("one"))), Reason::Configuration);
    assert_eq!(reason(host().forget(&volume("one"))), Reason::Configuration);
    // Nor can another one be taken for one.
    let none = Capabilities { lists: false, imports: false, destroys: false, describes: false };
    assert_eq!(host().capabilities(), none);
    assert_eq!(reason(host().import(&volume("one"), &key_of(&[7; 64]), &wanted(512, None))), Reason::Configuration);
}

fn what_is_said_of_a_volume_is_what_the_first_host_said(host: &Host<'_>) {
    let id = volume("described");
    assert!(host().described(&id).unwrap().is_none());
    let (key, kept) = host().create(&id, &wanted(512, Some("one"))).unwrap();
    assert_eq!(kept, wanted(512, Some("one")));
    for (found, kept) in
        [host().described(&id).unwrap().unwrap(), host().create(&id, &wanted(512, Some("two"))).unwrap()]
    {
        assert!(found.same_as(&key));
        assert_eq!(kept, wanted(512, Some("one")));
    }
}

/// Hosts that speak these versions of KMIP with `server`, one after the other.
fn speaking<'a>(
    server: &'a PyKmip,
    versions: &'a [&'a str],
    key_origin: KeyOrigin,
) -> impl Fn() -> Box<dyn KeyManager> + Sync + 'a {
    let made = AtomicUsize::new(0);
    move || {
        let newest_version = versions[made.fetch_add(1, Ordering::Relaxed) % versions.len()].parse().unwrap();
        let config = server.config("client", vec![server.address()]);
        Box::new(KmipKeyManager::new(KmipConfig { newest_version, key_origin, ..config }))
    }
}

#[test]
fn kmip_2_0() {
    kmip(&["2.0"]);
}

#[test]
fn kmip_2_0_and_1_4() {
    kmip(&["2.0", "1.4"]);
}

fn kmip(versions: &[&str]) {
    let server = PyKmip::start();
    let host = speaking(&server, versions, KeyOrigin::Host);
    a_key_is_the_same_for_all_and_for_ever(&host, 256);
    a_key_is_the_same_for_all_and_for_ever(&host, 512);
    keys_of_two_volumes_differ(&host);
    what_is_not_there_is_told_from_the_rest(&host);
    another_size_is_refused(&host);
    two_hosts_that_make_a_key_at_once_have_the_same(&host, 3, 256);
    two_hosts_that_make_a_key_at_once_have_the_same(&host, 3, 512);
    what_is_said_of_a_volume_is_what_the_first_host_said(&host);
    a_key_that_is_brought_is_kept_and_never_replaces_another(&host, 512);
    a_record_gets_the_version_that_it_names(&host);
    hosts_that_bring_the_same_key_at_once_have_it_once(&host, 2);
    of_hosts_that_bring_different_keys_at_once_one_has_its_way(&host);
    // PyKMIP forgets what it destroyed.
    what_was_destroyed_is_gone_for_everybody(&host, Reason::NoKey);
}

#[test]
fn kmip_with_a_cache_on_every_host() {
    let server = PyKmip::start();
    let hosts = Mutex::new(Vec::new());
    // Another host each time.
    let host = || -> Box<dyn KeyManager> {
        let host = cache::Host::new();
        let manager = host.start(server.manager(), Duration::from_secs(3600));
        hosts.lock().unwrap().push(host);
        Box::new(manager)
    };
    a_key_is_the_same_for_all_and_for_ever(&host, 512);
    keys_of_two_volumes_differ(&host);
    what_is_not_there_is_told_from_the_rest(&host);
    another_size_is_refused(&host);
    two_hosts_that_make_a_key_at_once_have_the_same(&host, 1, 256);
    what_is_said_of_a_volume_is_what_the_first_host_said(&host);
    a_record_gets_the_version_that_it_names(&host);
    what_was_destroyed_is_gone_for_everybody(&host, Reason::NoKey);
}

#[test]
fn kmip_with_keys_that_are_wrapped_for_some_hosts() {
    let server = PyKmip::start();
    let wrapping = Wrapping::active(&server);
    let made = AtomicUsize::new(0);
    let host = || -> Box<dyn KeyManager> {
        let number = made.fetch_add(1, Ordering::Relaxed);
        let servers = vec![server.address()];
        let config = if number % 3 == 2 { server.config("client", servers) } else { wrapping.config(servers) };
        let key_origin = if number % 3 == 1 { KeyOrigin::Server } else { KeyOrigin::Host };
        Box::new(KmipKeyManager::new(KmipConfig { key_origin, ..config }))
    };
    a_key_is_the_same_for_all_and_for_ever(&host, 256);
    a_key_is_the_same_for_all_and_for_ever(&host, 512);
    keys_of_two_volumes_differ(&host);
    another_size_is_refused(&host);
    two_hosts_that_make_a_key_at_once_have_the_same(&host, 2, 512);
    what_is_said_of_a_volume_is_what_the_first_host_said(&host);
    a_key_that_is_brought_is_kept_and_never_replaces_another(&host, 512);
    what_was_destroyed_is_gone_for_everybody(&host, Reason::NoKey);
}

#[test]
fn kmip_with_keys_of_the_servers_making() {
    let server = PyKmip::start();
    let host = speaking(&server, &["1.4", "2.0"], KeyOrigin::Server);
    a_key_is_the_same_for_all_and_for_ever(&host, 256);
    a_key_is_the_same_for_all_and_for_ever(&host, 512);
    keys_of_two_volumes_differ(&host);
    what_is_not_there_is_told_from_the_rest(&host);
    another_size_is_refused(&host);
    two_hosts_that_make_a_key_at_once_have_the_same(&host, 3, 512);
    what_is_said_of_a_volume_is_what_the_first_host_said(&host);
    what_was_destroyed_is_gone_for_everybody(&host, Reason::NoKey);
    // Hosts of both kinds have the same keys.
    let id = volume("described");
    assert!(server.manager().get(&id).unwrap().same_as(&host().get(&id).unwrap()));
    assert_eq!(server.objects(), host().list().unwrap().len(), "something unfinished is left");
}

#[test]
fn barbican() {
    let servers = Barbican::start();
    let host = || -> Box<dyn KeyManager> { Box::new(servers.manager("host1")) };
    a_key_is_the_same_for_all_and_for_ever(&host, 256);
    a_key_is_the_same_for_all_and_for_ever(&host, 512);
    keys_of_two_volumes_differ(&host);
    what_is_not_there_is_told_from_the_rest(&host);
    another_size_is_refused(&host);
    two_hosts_that_make_a_key_at_once_have_the_same(&host, 2, 512);
    what_is_said_of_a_volume_is_what_the_first_host_said(&host);
    a_key_that_is_brought_is_kept_and_never_replaces_another(&host, 512);
    a_record_gets_the_version_that_it_names(&host);
    hosts_that_bring_the_same_key_at_once_have_it_once(&host, 2);
    of_hosts_that_bring_different_keys_at_once_one_has_its_way(&host);
    // Barbican forgets what it deleted.
    what_was_destroyed_is_gone_for_everybody(&host, Reason::NoKey);
}
