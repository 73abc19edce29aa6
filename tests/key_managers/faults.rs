//! What becomes of a KMIP server that fails, and of one that lies.

use std::time::{Duration, Instant};

use volcrypt::keys::kmip::message::tag;
use volcrypt::keys::kmip::ttlv::Writer;
use volcrypt::keys::kmip::{KmipConfig, KmipKeyManager};
use volcrypt::keys::{Description, Key, KeyManager};
use volcrypt::policy::Profile;
use volcrypt::refusal::{Reason, Refusal};
use volcrypt::store::EnrolledDevice;
use volcrypt::volume::VolumeId;

use super::authority::Authority;
use super::conformance::{patiently, recorded, recorded_as, second};
use super::many::copy_in_pykmip;
use super::proxy::{Fault, Proxy};
use super::pykmip::{PyKmip, config};

const LOCATE: u8 = 0x08;
const GET: u8 = 0x0a;
const REGISTER: u8 = 0x03;
const ACTIVATE: u8 = 0x12;
const DISCOVER_VERSIONS: u8 = 0x1e;

pub(super) fn volume(name: &str) -> VolumeId {
    name.parse().unwrap()
}

/// A volume of whatever kind.
pub(super) fn wanted() -> Description {
    let device = EnrolledDevice { wwid: Some("naa.6".to_owned()), ..EnrolledDevice::default() };
    Description::new(device, 4096, ("default", &Profile::default()), None, 7)
}

pub(super) fn create(manager: &KmipKeyManager, volume: &VolumeId) -> Result<Key, Refusal> {
    manager.create(volume, &wanted()).map(|(key, _)| key)
}

fn with_deadline(config: KmipConfig, milliseconds: u64) -> KmipKeyManager {
    KmipKeyManager::new(KmipConfig { deadline: Duration::from_millis(milliseconds), ..config })
}

fn refused(outcome: Result<Key, Refusal>) -> (Reason, String) {
    let refusal = outcome.err().expect("must be refused");
    (refusal.reason(), refusal.to_string())
}

#[test]
fn an_answer_that_is_cut_off_at_any_byte_is_no_key_and_another_server_is_asked() {
    let server = PyKmip::start();
    let proxy = Proxy::start(server.authority(), "server", server.address());
    let id = volume("cut");
    let key = create(&server.manager(), &id).unwrap();
    let alone = || KmipKeyManager::new(server.config("client", vec![proxy.address()]));
    let both = || KmipKeyManager::new(server.config("client", vec![proxy.address(), server.address()]));
    proxy.spoil(GET, Fault::None);
    assert!(alone().get(&id).unwrap().same_as(&key));
    let whole = proxy.longest_answer();
    assert!(whole > 200, "{whole}");
    for length in 0..whole {
        proxy.spoil(GET, Fault::Cut(length));
        let (reason, sentence) = refused(alone().get(&id));
        assert_eq!(reason, Reason::TimedOut, "{length}: {sentence}");
        if length % 16 == 0 {
            assert!(both().get(&id).unwrap().same_as(&key), "{length}");
        }
    }
    assert!(sentence_of(&alone().get(&id)).contains("it broke off the connection"));
}

fn sentence_of(outcome: &Result<Key, Refusal>) -> String {
    outcome.as_ref().err().map(ToString::to_string).unwrap_or_default()
}

#[test]
fn a_slow_or_silent_server_costs_the_deadline_and_no_more() {
    let server = PyKmip::start();
    let id = volume("slow");
    let key = create(&server.manager(), &id).unwrap();
    for fault in [Fault::Slow(Duration::from_millis(50)), Fault::Hang] {
        for operation in [DISCOVER_VERSIONS, LOCATE, GET] {
            let proxy = Proxy::start(server.authority(), "server", server.address());
            proxy.spoil(operation, fault.clone());
            let started = Instant::now();
            let (reason, sentence) =
                refused(with_deadline(server.config("client", vec![proxy.address()]), 1500).get(&id));
            assert_eq!(reason, Reason::TimedOut);
            assert!(sentence.contains("did not answer in time"), "{sentence}");
            // Each question has its own deadline; those before were answered at once.
            assert!(started.elapsed() < Duration::from_secs(20), "{operation} {fault:?}: {:?}", started.elapsed());
            let servers = vec![proxy.address(), server.address()];
            assert!(with_deadline(server.config("client", servers), 10_000).get(&id).unwrap().same_as(&key));
        }
    }
}

#[test]
fn what_is_no_kmip_is_no_answer() {
    let server = PyKmip::start();
    let proxy = Proxy::start(server.authority(), "server", server.address());
    let id = volume("garbage");
    let key = create(&server.manager(), &id).unwrap();
    let manager = || KmipKeyManager::new(server.config("client", vec![proxy.address()]));
    let oversized = [0x42, 0, 0x7b, 1, 0xff, 0xff, 0xff, 0xff].to_vec();
    for (bytes, what) in [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n".to_vec(), "no KMIP message"),
        (oversized, "too long"),
        ([0x42, 0, 0x7b, 1, 0, 0, 0, 0].to_vec(), "a part that KMIP requires is missing"),
        ([0x42, 0, 0x7b, 1, 0, 0, 0, 8, 0x42, 0, 0x0f, 1, 0, 0, 0, 1].to_vec(), "another length than its type"),
    ] {
        for operation in [DISCOVER_VERSIONS, LOCATE, GET] {
            proxy.spoil(operation, Fault::Instead(bytes.clone()));
            let (reason, sentence) = refused(manager().get(&id));
            assert_eq!(reason, Reason::KeyManager, "{sentence}");
            assert!(sentence.contains(what), "{sentence}");
        }
    }
    // No byte of an answer that is another one makes anything but a refusal or, where it means nothing, the key.
    proxy.spoil(GET, Fault::None);
    manager().get(&id).unwrap();
    for place in 0..proxy.longest_answer() {
        proxy.spoil(GET, Fault::Byte(place, 0x7f));
        if let Ok(found) = with_deadline(server.config("client", vec![proxy.address()]), 500).get(&id) {
            assert_eq!(found.bits(), 512);
        }
    }
    proxy.spoil(GET, Fault::None);
    assert!(manager().get(&id).unwrap().same_as(&key));
}

#[test]
fn a_key_whose_making_breaks_off_is_made_once() {
    let server = PyKmip::start();
    let proxy = Proxy::start(server.authority(), "server", server.address());
    let manager = KmipKeyManager::new(server.config("client", vec![proxy.address()]));
    for (number, operation) in [REGISTER, ACTIVATE].into_iter().enumerate() {
        let id = volume(&format!("broken-{number}"));
        // The server has done it; only its answer is lost.
        proxy.spoil(operation, Fault::Cut(0));
        let key = create(&manager, &id).unwrap();
        proxy.spoil(operation, Fault::None);
        assert!(create(&manager, &id).unwrap().same_as(&key));
        assert!(server.manager().get(&id).unwrap().same_as(&key));
        assert_eq!(server.manager().list().unwrap().iter().filter(|info| info.volume == id).count(), 1);
    }
    let id = volume("broken");
    proxy.spoil(LOCATE, Fault::Cut(0));
    assert_eq!(refused(create(&manager, &id)).0, Reason::TimedOut);
    proxy.spoil(LOCATE, Fault::None);
    assert!(server.manager().described(&id).unwrap().is_none(), "nothing is half done");
    create(&manager, &id).unwrap();
}

/// The server tells ages in whole seconds, and PyKMIP numbers objects: as texts, "10" comes before "9". The quick host
/// makes the ninth object, and takes its time to choose it. The slow one has seen none, and its own comes as the tenth.
fn race(slow_by: Duration, with_third: bool) {
    let server = PyKmip::start();
    let direct = server.manager();
    std::thread::scope(|scope| {
        for number in 0..8 {
            let direct = &direct;
            scope.spawn(move || patiently(|| create(direct, &volume(&format!("filler-{number}")))).unwrap());
        }
    });
    let behind = |operation, pause| {
        let proxy = Proxy::start(server.authority(), "server", server.address());
        proxy.spoil(operation, Fault::Late(pause));
        let manager = KmipKeyManager::new(server.config("client", vec![proxy.address()]));
        assert!(manager.get(&volume("filler-0")).is_ok(), "connected");
        manager
    };
    let (quick, slow) = (behind(ACTIVATE, Duration::from_millis(700)), behind(REGISTER, slow_by));
    let into_the_second = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().subsec_millis();
    std::thread::sleep(Duration::from_millis(u64::from(1000 - into_the_second)));
    let id = volume("raced");
    let (slow, quick, found) = std::thread::scope(|scope| {
        let slow = scope.spawn(|| patiently(|| create(&slow, &id)).unwrap());
        // One that makes none takes what is there, from the moment on that there is one.
        let take = || {
            loop {
                if let Some((key, _)) = patiently(|| direct.described(&id)).unwrap() {
                    return key;
                }
            }
        };
        let found = if with_third { Some(scope.spawn(take)) } else { None };
        std::thread::sleep(Duration::from_millis(100));
        let quick = patiently(|| create(&quick, &id)).unwrap();
        (slow.join().unwrap(), quick, found.map(|thread| thread.join().unwrap()))
    });
    assert!(slow.same_as(&quick));
    assert!(found.is_none_or(|found| found.same_as(&quick)));
    assert!(server.manager().get(&id).unwrap().same_as(&quick));
    assert_eq!(server.manager().list().unwrap().iter().filter(|info| info.volume == id).count(), 1);
}

#[test]
fn hosts_that_look_before_another_ones_key_is_there_have_the_same_in_the_end() {
    race(Duration::from_millis(400), false);
}

#[test]
fn a_key_that_comes_while_another_is_chosen_does_not_count() {
    race(Duration::from_millis(2900), false);
}

#[test]
fn a_host_that_takes_a_new_key_over_takes_the_one_that_counts() {
    race(Duration::from_millis(400), true);
}

#[test]
fn a_server_that_is_too_slow_to_choose_by_is_told_of_in_time() {
    let server = PyKmip::start();
    let proxy = Proxy::start(server.authority(), "server", server.address());
    let id = volume("late");
    proxy.spoil(LOCATE, Fault::Late(Duration::from_millis(1100)));
    let started = Instant::now();
    let (reason, sentence) =
        refused(create(&with_deadline(server.config("client", vec![proxy.address()]), 60_000), &id));
    assert_eq!(reason, Reason::TimedOut);
    assert!(sentence.contains("longer than 1000 ms"), "{sentence}");
    assert!(started.elapsed() < Duration::from_secs(25), "{:?}", started.elapsed());
    // One that was chosen is used all the same.
    let key = create(&server.manager(), &id).unwrap();
    let slow = with_deadline(server.config("client", vec![proxy.address()]), 60_000);
    assert!(slow.get(&id).unwrap().same_as(&key));
}

#[test]
fn a_new_key_is_made_only_while_every_server_says_that_there_is_none() {
    let server = PyKmip::start();
    let id = volume("everywhere");
    let unreachable = "127.0.0.1:1".to_owned();
    let manager = KmipKeyManager::new(server.config("client", vec![server.address(), unreachable.clone()]));
    let (reason, sentence) = refused(create(&manager, &id));
    assert_eq!(reason, Reason::TimedOut);
    assert!(sentence.contains(&unreachable), "{sentence}");
    assert_eq!(server.manager().list().unwrap(), []);
    // One that is there is used all the same.
    let key = create(&server.manager(), &id).unwrap();
    assert!(manager.get(&id).unwrap().same_as(&key));
    assert!(create(&manager, &id).unwrap().same_as(&key));
}

#[test]
fn a_key_counts_as_kept_when_every_server_has_it_and_is_destroyed_on_each() {
    let server = PyKmip::start();
    let other = server.twin();
    let id = volume("both");
    let key = create(&server.manager(), &id).unwrap();
    let both = KmipKeyManager::new(server.config("client", vec![server.address(), other.address()]));
    assert!(both.get(&id).unwrap().same_as(&key));
    let refusal = both.check_everywhere(&id, &key).unwrap_err();
    assert_eq!(refusal.reason(), Reason::KeyManager);
    assert!(refusal.to_string().contains(&other.address()), "{refusal}");
    other.manager().import(&id, &key, &wanted()).unwrap();
    both.check_everywhere(&id, &key).unwrap();

    let unreachable = KmipKeyManager::new(server.config("client", vec![server.address(), "127.0.0.1:1".to_owned()]));
    assert_eq!(unreachable.destroy(&id).unwrap_err().reason(), Reason::TimedOut);
    assert!(server.manager().get(&id).unwrap().same_as(&key), "none was destroyed while one could not be asked");
    both.destroy(&id).unwrap();
    for each in [&server, &other] {
        assert!(each.manager().get(&id).is_err());
    }
}

#[test]
fn a_host_that_has_used_a_key_has_it_whatever_else_has_its_name() {
    let server = PyKmip::start();
    let id = volume("one");
    let key = create(&server.manager(), &id).unwrap();
    let enrolled = || server.manager().get_enrolled(&recorded(&id, &key));
    // Three more that say they are the key; on either side of the one that is.
    copy_in_pykmip(&server, 3, "name", "application_data");
    let database = rusqlite::Connection::open(server.authority().path("pykmip.db")).unwrap();
    let forge = |values: &str| database.execute_batch(&format!("UPDATE managed_objects SET value = {values}")).unwrap();
    forge("CASE uid WHEN 3 THEN value WHEN 2 THEN X'' ELSE randomblob(64) END");
    assert!(server.manager().get(&id).is_err());
    assert!(enrolled().unwrap().same_as(&key));
    // Where none is the right one, what was wrong with the first is told.
    forge("randomblob(64)");
    let (reason, sentence) = refused(enrolled());
    assert_eq!(reason, Reason::WrongKey);
    assert!(sentence.contains("have its administrator restore the key that was made"), "{sentence}");
}

#[test]
fn of_two_keys_that_a_volume_has_a_record_gets_the_one_that_it_names() {
    let server = PyKmip::start();
    let id = volume("one");
    let (first, other) = (create(&server.manager(), &id).unwrap(), Key::random(512.try_into().unwrap()).unwrap());
    let text = second(wanted(), &id, &other).to_text(&id, &other).unwrap();
    copy_in_pykmip(&server, 1, "name", &format!("'{id} {text}'"));
    let database = rusqlite::Connection::open(server.authority().path("pykmip.db")).unwrap();
    database.execute("UPDATE managed_objects SET value = ?1 WHERE uid = 2", [other.bytes()]).unwrap();
    let get = |version, key: &Key| server.manager().get_enrolled(&recorded_as(&id, version, key));
    assert!(get(1, &first).unwrap().same_as(&first));
    assert!(get(2, &other).unwrap().same_as(&other));
    for (version, key) in [(2, &first), (1, &other), (3, &other)] {
        assert!(get(version, key).is_err());
    }
    let versions = server.manager().list().unwrap().into_iter().map(|info| info.key.version).collect::<Vec<_>>();
    assert_eq!(versions, [1, 2]);
    assert_eq!(refused(server.manager().get(&id)).0, Reason::KeyManager, "nobody says which one counts");
    // A server that lags behind has the first one only. Another one is asked for the second, and that is no wrong key.
    let proxy = Proxy::start(server.authority(), "server", server.address());
    proxy.spoil(LOCATE, has_only("1"));
    let behind = |more: &[String]| {
        let servers = [&[proxy.address()], more].concat();
        KmipKeyManager::new(server.config("client", servers)).get_enrolled(&recorded_as(&id, 2, &other))
    };
    assert_eq!(refused(behind(&[])).0, Reason::WrongKey);
    assert!(behind(&[server.address()]).unwrap().same_as(&other));
    let (reason, sentence) = refused(behind(&["127.0.0.1:1".to_owned()]));
    assert_eq!(reason, Reason::TimedOut, "the one that is down may have it: {sentence}");
}

/// An answer to Locate by a server that has no other object.
fn has_only(identifier: &str) -> Fault {
    let mut answer = Vec::new();
    Writer::new(&mut answer).structure(tag::RESPONSE_MESSAGE, |message| {
        message.structure(tag::BATCH_ITEM, |item| {
            item.enumeration(tag::OPERATION, LOCATE.into());
            item.enumeration(tag::RESULT_STATUS, 0);
            item.structure(tag::RESPONSE_PAYLOAD, |payload| payload.text(tag::UNIQUE_IDENTIFIER, identifier));
        });
    });
    Fault::Instead(answer)
}

#[test]
fn an_idle_connection_that_was_forgotten_costs_a_part_of_the_time_only() {
    let server = PyKmip::start();
    let proxy = Proxy::start(server.authority(), "server", server.address());
    let manager = with_deadline(server.config("client", vec![proxy.address()]), 30_000);
    let id = volume("quiet");
    let key = create(&server.manager(), &id).unwrap();
    assert!(manager.get(&id).unwrap().same_as(&key));
    proxy.forget_connections();
    for _ in 0..3 {
        assert!(manager.get(&id).unwrap().same_as(&key));
    }
}

#[test]
fn connections_are_used_again_and_opened_again() {
    let mut server = PyKmip::start();
    let proxy = Proxy::start(server.authority(), "server", server.address());
    let manager = KmipKeyManager::new(server.config("client", vec![proxy.address()]));
    let id = volume("again");
    let key = create(&manager, &id).unwrap();
    // While it was made, one that was slow may have been given up.
    let connections = proxy.connections();
    for _ in 0..20 {
        assert!(manager.get(&id).unwrap().same_as(&key));
    }
    assert_eq!(proxy.connections(), connections);
    server.stop();
    assert_eq!(refused(manager.get(&id)).0, Reason::TimedOut);
    server.start_again();
    assert!(manager.get(&id).unwrap().same_as(&key));
}

#[test]
fn who_is_not_vouched_for_is_not_believed() {
    let server = PyKmip::start();
    let id = volume("vouched");
    let key = create(&server.manager(), &id).unwrap();
    let other = Authority::new("another");
    server.authority().issue("expired", "serverAuth", -1);
    for (authority, name, what) in
        [(&other, "server", "of an authority that is not among"), (server.authority(), "expired", "has expired")]
    {
        // Behind it stands nobody: no request may get that far.
        let proxy = Proxy::start(authority, name, "127.0.0.1:1".to_owned());
        let (reason, sentence) = refused(KmipKeyManager::new(server.config("client", vec![proxy.address()])).get(&id));
        assert_eq!(reason, Reason::TimedOut);
        assert!(sentence.contains(what), "{sentence}");
    }
    // This side's: unknown to the server, expired.
    let mut unknown = config(&other, "client", vec![server.address()]);
    unknown.ca = server.authority().path("ca.pem");
    let (reason, sentence) = refused(KmipKeyManager::new(unknown).get(&id));
    assert_eq!(reason, Reason::TimedOut, "{sentence}");
    assert!(sentence.contains("does not accept this host"), "{sentence}");
    // What is renewed counts at once.
    server.authority().issue("client2", "clientAuth", -1);
    let manager = KmipKeyManager::new(server.config("client2", vec![server.address()]));
    assert!(manager.get(&id).is_err());
    server.authority().issue("client2", "clientAuth", 30);
    // The same name, or PyKMIP takes it for another client.
    assert!(matches!(manager.get(&id).map_err(|refusal| refusal.reason()), Err(Reason::NoKey | Reason::NotAllowed)));
    std::fs::copy(server.authority().path("client.pem"), server.authority().path("client2.pem")).unwrap();
    std::fs::copy(server.authority().path("client.key"), server.authority().path("client2.key")).unwrap();
    assert!(manager.get(&id).unwrap().same_as(&key));
}

#[test]
fn a_certificate_that_comes_before_its_key_keeps_nobody_waiting() {
    let server = PyKmip::start();
    let authority = server.authority();
    let manager = server.manager();
    let id = volume("pair");
    let key = create(&manager, &id).unwrap();
    authority.issue("renewed", "clientAuth", 30);
    std::fs::copy(authority.path("renewed.pem"), authority.path("client.pem")).unwrap();
    assert!(manager.get(&id).unwrap().same_as(&key), "with the pair that was there before");
    let authorities = std::fs::read(authority.path("ca.pem")).unwrap();
    std::fs::write(authority.path("ca.pem"), &authorities[..authorities.len() / 2]).unwrap();
    assert!(manager.get(&id).unwrap().same_as(&key), "half written");
    // Who has read no others has none to go on with.
    assert_eq!(refused(server.manager().get(&id)).0, Reason::Configuration);
    std::fs::write(authority.path("ca.pem"), authorities).unwrap();
    std::fs::copy(authority.path("renewed.key"), authority.path("client.key")).unwrap();
    // It is in use at once: PyKMIP takes this one for another client, by its name.
    assert!(matches!(manager.get(&id).map_err(|refusal| refusal.reason()), Err(Reason::NoKey | Reason::NotAllowed)));
}

#[test]
fn files_that_cannot_be_used_are_named() {
    let authority = Authority::new("authority");
    let usable = config(&authority, "client", vec!["127.0.0.1:1".to_owned()]);
    let get = |config: KmipConfig| refused(KmipKeyManager::new(config).get(&volume("x")));
    let nowhere = authority.path("nowhere");
    for config in [
        KmipConfig { ca: nowhere.clone(), ..usable.clone() },
        KmipConfig { certificate: nowhere.clone(), ..usable.clone() },
        KmipConfig { key: nowhere.clone(), ..usable.clone() },
    ] {
        let (reason, sentence) = get(config);
        assert_eq!(reason, Reason::Configuration);
        assert!(sentence.contains("/nowhere"), "{sentence}");
    }
    let (reason, sentence) = get(KmipConfig { key: authority.path("server.key"), ..usable.clone() });
    assert_eq!(reason, Reason::Configuration, "a key that does not belong to the certificate: {sentence}");
    std::fs::set_permissions(&usable.key, std::os::unix::fs::PermissionsExt::from_mode(0o644)).unwrap();
    let (_, sentence) = get(usable);
    assert!(sentence.contains("chmod 0600"), "{sentence}");
}
