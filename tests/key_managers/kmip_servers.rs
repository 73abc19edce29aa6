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

#[test]
fn what_is_waited_costs_none_of_two_servers_its_time() {
    let server = PyKmip::start();
    let proxy = Proxy::start(server.authority(), "server", server.address());
    let servers = server.config("client", vec![server.address(), proxy.address()]);
    let manager = KmipKeyManager::new(KmipConfig { deadline: Duration::from_secs(2), ..servers });
    let key = create(&manager, &volume("patient")).unwrap();
    assert!(server.manager().get(&volume("patient")).unwrap().same_as(&key));
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
