//! Several KMIP servers that are to hold the same keys: one that can be reached in two ways, and ones that do not.

use std::time::Duration;

use rusqlite::Connection;
use volcrypt::keys::KeyManager;
use volcrypt::keys::kmip::{KmipConfig, KmipKeyManager};
use volcrypt::refusal::Reason;

use super::conformance::recorded;
use super::faults::{create, volume, wanted};
use super::proxy::Proxy;
use super::pykmip::PyKmip;

const PRE_ACTIVE: i64 = 1;
const ACTIVE: i64 = 2;
const NOBODY: &str = "127.0.0.1:1";

fn asking(servers: &[&PyKmip]) -> KmipKeyManager {
    let addresses = servers.iter().map(|server| server.address()).collect();
    KmipKeyManager::new(servers[0].config("client", addresses))
}

fn asking_with_one_down(server: &PyKmip) -> KmipKeyManager {
    KmipKeyManager::new(server.config("client", vec![server.address(), NOBODY.to_owned()]))
}

fn change(server: &PyKmip, statement: &str) {
    let database = Connection::open(server.authority().path("pykmip.db")).unwrap();
    database.execute_batch(statement).unwrap();
}

/// The state of the last object that was made.
fn state(server: &PyKmip) -> i64 {
    let database = Connection::open(server.authority().path("pykmip.db")).unwrap();
    let query = "SELECT state FROM crypto_objects ORDER BY uid DESC LIMIT 1";
    database.query_row(query, [], |row| row.get(0)).unwrap()
}

#[test]
fn what_is_waited_costs_none_of_two_servers_its_time() {
    let server = PyKmip::start();
    let proxy = Proxy::start(server.authority(), "server", server.address());
    let servers = server.config("client", vec![server.address(), proxy.address()]);
    // Less than what is waited. A busy machine may need more for what is asked.
    let manager = KmipKeyManager::new(KmipConfig { deadline: Duration::from_secs(4), ..servers });
    let volumes = (0..5).map(|number| volume(&format!("patient-{number}")));
    let (id, key) = volumes.into_iter().find_map(|id| create(&manager, &id).ok().map(|key| (id, key))).unwrap();
    assert!(server.manager().get(&id).unwrap().same_as(&key));
}

#[test]
fn a_server_with_a_damaged_or_another_key_does_not_answer_for_one_that_has_it() {
    let damaged = PyKmip::start();
    let (good, other) = (damaged.twin(), damaged.twin());
    let id = volume("damaged");
    let key = create(&damaged.manager(), &id).unwrap();
    good.manager().import(&id, &key, &wanted()).unwrap();
    change(&damaged, "UPDATE managed_objects SET value = randomblob(64)");
    let another = create(&other.manager(), &id).unwrap();
    assert!(!another.same_as(&key));
    let recorded = recorded(&id, &key);
    for wrong in [&damaged, &other] {
        assert!(asking(&[wrong, &good]).get_enrolled(&recorded).unwrap().same_as(&key));
        // The one that is down may have it: that is no reason to wipe a key that is kept.
        let refusal = asking_with_one_down(wrong).get_enrolled(&recorded).err().unwrap();
        assert_eq!(refusal.reason(), Reason::TimedOut, "{refusal}");
        assert!(!refusal.is_unanswered(), "one has answered");
    }
    assert_eq!(damaged.manager().get_enrolled(&recorded).err().unwrap().reason(), Reason::WrongKey);
    assert!(other.manager().get_enrolled(&recorded).unwrap().same_as(&another), "whoever asks sees that it is another");
    let refusal = asking(&[&damaged, &damaged]).get_enrolled(&recorded).err().unwrap();
    assert_eq!(refusal.reason(), Reason::WrongKey, "each was asked: {refusal}");
}

#[test]
fn to_read_a_key_chooses_none_that_another_server_knows_nothing_of() {
    for with_same_number in [false, true] {
        let used = PyKmip::start();
        let other = used.twin();
        let id = volume("chosen");
        if !with_same_number {
            create(&other.manager(), &volume("filler")).unwrap();
        }
        let key = create(&used.manager(), &id).unwrap();
        let unused = create(&other.manager(), &id).unwrap();
        change(&other, "UPDATE crypto_objects SET state = 1");
        let manager = asking(&[&other, &used]);
        let (found, _) = manager.described(&id).unwrap().unwrap();
        assert!(found.same_as(&key), "it was chosen");
        assert!(manager.get_enrolled(&recorded(&id, &key)).unwrap().same_as(&key));
        assert_eq!(state(&other), PRE_ACTIVE);
        // The one that is down may have one that was chosen.
        let refusal = asking_with_one_down(&other).described(&id).err().unwrap();
        assert_eq!(refusal.reason(), Reason::TimedOut);
        assert!(refusal.to_string().contains(NOBODY) && !refusal.is_unanswered(), "{refusal}");
        let refusal = other.manager().get_enrolled(&recorded(&id, &key)).err().unwrap();
        assert_eq!(refusal.reason(), Reason::NoKey, "{refusal}");
        assert_eq!(state(&other), PRE_ACTIVE);
        // Nobody has chosen any: then none is, as long as one server knows nothing of it.
        change(&used, "UPDATE crypto_objects SET state = 1");
        let refusal = manager.described(&id).err().unwrap();
        assert_eq!(refusal.reason(), Reason::KeyManager);
        let named = [&used, &other].map(|server| refusal.to_string().contains(&server.address()));
        assert_eq!(named, [true; 2], "{refusal}");
        assert_eq!([&used, &other].map(state), [PRE_ACTIVE; 2]);
        // What a record names was chosen before it was recorded, as where the server was restored from a backup since.
        let recorded = recorded(&id, &unused);
        assert!(asking(&[&used, &other]).get_enrolled(&recorded).unwrap().same_as(&unused));
        assert_eq!([&used, &other].map(state), [PRE_ACTIVE, ACTIVE]);
    }
}

#[test]
fn a_new_key_is_used_only_when_every_server_has_it() {
    let server = PyKmip::start();
    let mut other = server.twin();
    let id = volume("lonely");
    // Whoever tries again, in whatever way, is told the same.
    for _ in 0..2 {
        for outcome in [
            asking(&[&server, &other]).create(&id, &wanted()).map(|_| ()),
            asking(&[&server, &other]).described(&id).map(|_| ()),
            asking(&[&other, &server]).create(&id, &wanted()).map(|_| ()),
        ] {
            let refusal = outcome.unwrap_err();
            assert_eq!(refusal.reason(), Reason::KeyManager);
            assert!(refusal.to_string().contains(&format!("{} does not have", other.address())), "{refusal}");
        }
    }
    assert_eq!((server.objects(), other.objects(), state(&server)), (1, 0, PRE_ACTIVE));
    other.stop();
    std::fs::copy(server.authority().path("pykmip.db"), other.authority().path("pykmip.db")).unwrap();
    other.start_again();
    create(&asking(&[&server, &other]), &id).unwrap();
    assert_eq!((server.objects(), state(&server)), (1, ACTIVE));
}

/// A server whose key of the volume was damaged is asked by hosts that have not used the volume yet.
#[test]
fn a_damaged_key_hides_none_that_another_server_has_from_a_host_that_is_new_to_the_volume() {
    for damage in [
        "UPDATE managed_objects SET value = randomblob(64)",
        "UPDATE app_specific_info SET application_data = 'damaged' WHERE length(application_data) > 40",
    ] {
        let damaged = PyKmip::start();
        let (good, empty) = (damaged.twin(), damaged.twin());
        let id = volume("damaged");
        let key = create(&damaged.manager(), &id).unwrap();
        good.manager().import(&id, &key, &wanted()).unwrap();
        change(&damaged, damage);
        let alone = damaged.manager().described(&id).err().unwrap();
        let fresh = || asking(&[&damaged, &good]);
        assert!(fresh().get(&id).unwrap().same_as(&key));
        let (found, said) = fresh().described(&id).unwrap().unwrap();
        assert!(found.same_as(&key) && said == wanted());
        assert!(create(&fresh(), &id).unwrap().same_as(&key), "no second one");
        // One that has none, and one that does not say, do not make up for what is damaged.
        for servers in [[&damaged, &empty], [&empty, &damaged]] {
            for refusal in [asking(&servers).described(&id).err(), create(&asking(&servers), &id).err()] {
                assert_eq!(refusal.unwrap(), alone);
            }
        }
        let refusal = create(&asking_with_one_down(&damaged), &id).err().unwrap();
        assert_eq!(refusal.reason(), Reason::TimedOut, "{refusal}");
        let is_told = refusal.to_string().contains(NOBODY) && refusal.to_string().contains(&alone.to_string());
        assert!(is_told && !refusal.is_unanswered(), "{refusal}");
        // The damaged one was chosen, and may be another one: none is chosen in its place.
        change(&good, "UPDATE crypto_objects SET state = 1");
        for refusal in [fresh().described(&id).err(), create(&fresh(), &id).err()] {
            assert_eq!(refusal.unwrap(), alone);
        }
        assert_eq!(state(&good), PRE_ACTIVE);
        change(&good, "UPDATE crypto_objects SET state = 3");
        assert_eq!(fresh().get(&id).err().unwrap().reason(), Reason::KeyRevoked);
        assert_eq!([&damaged, &good, &empty].map(PyKmip::objects), [1, 1, 0]);
    }
}

#[test]
fn two_keys_that_were_chosen_are_not_used_where_one_is_damaged() {
    let damaged = PyKmip::start();
    let other = damaged.twin();
    let id = volume("two");
    create(&damaged.manager(), &id).unwrap();
    create(&other.manager(), &id).unwrap();
    change(&damaged, "UPDATE managed_objects SET value = randomblob(64)");
    let manager = asking(&[&damaged, &other]);
    for refusal in [manager.described(&id).err(), create(&manager, &id).err(), manager.get(&id).err()] {
        assert_eq!(refusal.unwrap().reason(), Reason::WrongKey, "nothing tells which one the volume was written with");
    }
}

#[test]
fn an_object_that_only_has_its_name_hides_no_key_beside_it() {
    let first = PyKmip::start();
    let other = first.twin();
    let id = volume("beside");
    create(&first.manager(), &id).unwrap();
    create(&other.manager(), &id).unwrap();
    create(&first.manager(), &volume("strange")).unwrap();
    change(&first, "UPDATE managed_object_names SET name = 'volcrypt/beside' WHERE name = 'volcrypt/strange'");
    let manager = || asking(&[&first, &other]);
    for refusal in [manager().described(&id).err(), create(&manager(), &id).err(), manager().get(&id).err()] {
        let refusal = refusal.unwrap();
        assert_eq!(refusal.reason(), Reason::KeyManager, "another key was chosen there: {refusal}");
        assert!(refusal.to_string().contains("was not made for that volume"), "{refusal}");
    }
    change(&first, "UPDATE crypto_objects SET state = 3 WHERE uid = 1");
    for refusal in [manager().described(&id).err(), create(&manager(), &id).err(), manager().get(&id).err()] {
        let refusal = refusal.unwrap();
        assert_eq!(refusal.reason(), Reason::KeyManager, "what is not read may be the same key, made anew: {refusal}");
        let said = refusal.to_string();
        assert!(said.contains("was not made for that volume") && said.contains("was revoked"), "{said}");
    }
    // The other server knows of both, and its own is whole.
    let again = other.manager().get(&id).unwrap();
    change(
        &other,
        "UPDATE crypto_objects SET state = 3;
         UPDATE managed_object_names SET name = 'volcrypt/ended' WHERE name = 'volcrypt/beside'",
    );
    other.manager().import(&id, &again, &wanted()).unwrap();
    change(&other, "UPDATE managed_object_names SET name = 'volcrypt/beside' WHERE name = 'volcrypt/ended'");
    assert!(manager().get(&id).unwrap().same_as(&again));
}

#[test]
fn a_key_that_one_of_two_servers_has_lost_is_given_by_the_other() {
    let one = PyKmip::start();
    let other = one.twin();
    let id = volume("lost");
    let key = create(&one.manager(), &id).unwrap();
    other.manager().import(&id, &key, &wanted()).unwrap();
    let (manager, recorded) = (asking(&[&one, &other]), recorded(&id, &key));
    assert!(manager.get_enrolled(&recorded).unwrap().same_as(&key));
    let lose = |server| change(server, "PRAGMA foreign_keys = OFF; DELETE FROM managed_objects");
    lose(&one);
    for manager in [&manager, &asking(&[&one, &other]), &asking(&[&other, &one])] {
        assert!(manager.get_enrolled(&recorded).unwrap().same_as(&key));
    }
    lose(&other);
    for manager in [&manager, &asking(&[&one, &other])] {
        assert_eq!(manager.get_enrolled(&recorded).err().unwrap().reason(), Reason::NoKey);
    }
}
