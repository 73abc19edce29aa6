//! What becomes of a key that a KMIP server makes when that breaks off.

use std::time::Duration;

use volcrypt::keys::KeyManager;
use volcrypt::keys::kmip::message::tag;
use volcrypt::keys::kmip::ttlv::Writer;
use volcrypt::keys::kmip::{KeyOrigin, KmipConfig, KmipKeyManager};
use volcrypt::refusal::Reason;

use super::faults::{create, volume};
use super::proxy::{Fault, Proxy};
use super::pykmip::PyKmip;

const CREATE: u8 = 0x01;
const LOCATE: u8 = 0x08;
const GET: u8 = 0x0a;
const MODIFY_ATTRIBUTE: u8 = 0x0e;
const ACTIVATE: u8 = 0x12;
const DESTROY: u8 = 0x14;

/// A host that reaches a server through a proxy, and the like of it that reaches it directly.
fn host(server: &PyKmip, proxy: &Proxy, deadline: Duration) -> KmipKeyManager {
    let config = server.config("client", vec![proxy.address()]);
    KmipKeyManager::new(KmipConfig { key_origin: KeyOrigin::Server, deadline, ..config })
}

fn direct(server: &PyKmip) -> KmipKeyManager {
    let config = server.config("client", vec![server.address()]);
    KmipKeyManager::new(KmipConfig { key_origin: KeyOrigin::Server, ..config })
}

#[test]
fn a_key_whose_making_breaks_off_at_any_step_is_made_once_and_nothing_is_left() {
    let server = PyKmip::start();
    let proxy = Proxy::start(server.authority(), "server", server.address());
    let steps = [
        // The key was made, and this host does not know of it.
        (CREATE, Fault::CutAfter(0)),
        // It was not handed out.
        (GET, Fault::CutAfter(0)),
        // It was described, and then named; the answers are lost.
        (MODIFY_ATTRIBUTE, Fault::CutAfter(0)),
        (MODIFY_ATTRIBUTE, Fault::CutAfter(1)),
        // It was described, the answer is lost, and the server is asked for the same once more.
        (MODIFY_ATTRIBUTE, Fault::CutOnce),
        (ACTIVATE, Fault::CutAfter(0)),
        // After it was activated.
        (GET, Fault::CutAfter(1)),
    ];
    for (number, (operation, fault)) in steps.into_iter().enumerate() {
        let id = volume(&format!("broken-{number}"));
        proxy.spoil(operation, fault.clone());
        let broken = create(&host(&server, &proxy, Duration::from_secs(20)), &id);
        if let Err(refusal) = &broken {
            assert_eq!(refusal.reason(), Reason::TimedOut, "{operation} {fault:?}: {refusal}");
        }
        proxy.spoil(operation, Fault::None);
        let key = create(&direct(&server), &id).unwrap();
        assert!(broken.map_or(true, |broken| broken.same_as(&key)), "{operation} {fault:?}");
        assert!(direct(&server).get(&id).unwrap().same_as(&key));
        assert_eq!(server.objects(), number + 1, "{operation} {fault:?}: something is left");
    }
}

#[test]
fn a_host_that_ends_while_a_key_is_being_made_leaves_none_that_could_be_used() {
    let server = PyKmip::start();
    let proxy = Proxy::start(server.authority(), "server", server.address());
    let id = volume("ended");
    for (operation, fault) in [(GET, Fault::Hang), (MODIFY_ATTRIBUTE, Fault::Hang)] {
        proxy.spoil(operation, fault);
        assert!(create(&host(&server, &proxy, Duration::from_secs(8)), &id).is_err());
    }
    assert_eq!(server.objects(), 2, "unfinished");
    // The hanging proxy handed on what it was asked: the second was described, and has no name yet.
    assert!(direct(&server).described(&id).unwrap().is_none());
    assert_eq!(direct(&server).get(&id).err().unwrap().reason(), Reason::NoKey);
    assert!(direct(&server).list().unwrap().is_empty());
    let key = create(&direct(&server), &id).unwrap();
    assert_eq!(server.objects(), 1);
    assert!(server.manager().get(&id).unwrap().same_as(&key));
    // Destroying a volume takes what is unfinished with it.
    proxy.spoil(GET, Fault::Hang);
    let other = volume("ended.too");
    assert!(create(&host(&server, &proxy, Duration::from_secs(8)), &other).is_err());
    assert_eq!(server.objects(), 2);
    assert_eq!(direct(&server).destroy(&other).err().unwrap().reason(), Reason::NoKey);
    assert_eq!(server.objects(), 1);
}

#[test]
fn a_host_whose_unfinished_key_was_cleared_away_takes_the_other_ones() {
    let server = PyKmip::start();
    for (number, operation) in [GET, MODIFY_ATTRIBUTE].into_iter().enumerate() {
        let proxy = Proxy::start(server.authority(), "server", server.address());
        proxy.spoil(operation, Fault::LateOnce(Duration::from_secs(15)));
        let id = volume(&format!("cleared-{number}"));
        let (slow, quick) = std::thread::scope(|scope| {
            let slow = scope.spawn(|| create(&host(&server, &proxy, Duration::from_secs(60)), &id).unwrap());
            while server.objects() == number && !slow.is_finished() {
                std::thread::sleep(Duration::from_millis(10));
            }
            let quick = create(&direct(&server), &id).unwrap();
            assert_eq!(server.objects(), number + 1, "not cleared");
            (slow.join().unwrap(), quick)
        });
        assert!(slow.same_as(&quick));
        assert_eq!(server.objects(), number + 1);
    }
}

#[test]
fn what_a_server_refuses_to_finish_is_undone() {
    let server = PyKmip::start();
    let proxy = Proxy::start(server.authority(), "server", server.address());
    let mut refused = Vec::new();
    Writer::new(&mut refused).structure(tag::RESPONSE_MESSAGE, |message| {
        message.structure(tag::BATCH_ITEM, |item| {
            item.enumeration(tag::OPERATION, MODIFY_ATTRIBUTE.into());
            item.enumeration(tag::RESULT_STATUS, 1);
            item.enumeration(tag::RESULT_REASON, 0x0c);
            item.text(tag::RESULT_MESSAGE, "not for you");
        });
    });
    proxy.spoil(MODIFY_ATTRIBUTE, Fault::Refused(refused));
    let refusal = create(&host(&server, &proxy, Duration::from_secs(20)), &volume("refused")).err().unwrap();
    assert_eq!(refusal.reason(), Reason::NotAllowed);
    assert!(refusal.to_string().contains("not for you"), "{refusal}");
    assert_eq!(server.objects(), 0);
    // Looking for one, and clearing away what is left of it, is not what makes it fail.
    for operation in [LOCATE, DESTROY] {
        proxy.spoil(operation, Fault::None);
    }
    create(&host(&server, &proxy, Duration::from_secs(20)), &volume("refused")).unwrap();
}
