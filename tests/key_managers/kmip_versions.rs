//! Which version of KMIP is spoken, and that hosts that speak different ones have the same keys.

use volcrypt::keys::KeyManager;
use volcrypt::keys::kmip::message::tag;
use volcrypt::keys::kmip::ttlv::Writer;
use volcrypt::keys::kmip::{KmipConfig, KmipKeyManager};
use volcrypt::refusal::Reason;

use super::faults::{create, volume};
use super::proxy::{Fault, Proxy};
use super::pykmip::PyKmip;

const DISCOVER_VERSIONS: u8 = 0x1e;

fn host(server: &PyKmip, address: String, newest: &str) -> KmipKeyManager {
    let config = server.config("client", vec![address]);
    KmipKeyManager::new(KmipConfig { newest_version: newest.parse().unwrap(), ..config })
}

/// What a server says that speaks these versions; or what one says that does not know the question.
fn speaks(versions: &[(i32, i32)]) -> Fault {
    let mut answer = Vec::new();
    Writer::new(&mut answer).structure(tag::RESPONSE_MESSAGE, |message| {
        message.structure(tag::BATCH_ITEM, |item| {
            item.enumeration(tag::OPERATION, DISCOVER_VERSIONS.into());
            item.enumeration(tag::RESULT_STATUS, u32::from(versions.is_empty()));
            if versions.is_empty() {
                // The operation is not supported.
                return item.enumeration(tag::RESULT_REASON, 5);
            }
            item.structure(tag::RESPONSE_PAYLOAD, |payload| {
                for (major, minor) in versions {
                    payload.structure(tag::PROTOCOL_VERSION, |version| {
                        version.integer(tag::PROTOCOL_VERSION_MAJOR, *major);
                        version.integer(tag::PROTOCOL_VERSION_MINOR, *minor);
                    });
                }
            });
        });
    });
    Fault::Instead(answer)
}

#[test]
fn the_newest_version_that_both_sides_speak_is_spoken() {
    let server = PyKmip::start();
    let proxy = Proxy::start(server.authority(), "server", server.address());
    let id = volume("versions");
    let key = create(&server.manager(), &id).unwrap();
    let spoken = |newest: &str| {
        proxy.versions();
        assert!(host(&server, proxy.address(), newest).get(&id).unwrap().same_as(&key), "{newest}");
        proxy.versions()
    };
    // The question itself is put in one that most servers know.
    assert_eq!(spoken("2.0"), [(1, 4), (2, 0)]);
    assert_eq!(spoken("1.4"), [(1, 4)]);
    assert_eq!(spoken("1.1"), [(1, 1)]);
    assert_eq!(spoken("1.0"), [(1, 0)]);
    proxy.spoil(DISCOVER_VERSIONS, speaks(&[(1, 0), (3, 0), (1, 2), (1, 1)]));
    assert_eq!(spoken("2.0"), [(1, 4), (1, 2)]);
    // One that does not know the question speaks 1.0, if anything.
    proxy.spoil(DISCOVER_VERSIONS, speaks(&[]));
    assert_eq!(spoken("2.0"), [(1, 4), (1, 3), (1, 2), (1, 1), (2, 0), (1, 0)]);
    for none in [&[(3, 0)][..], &[(2, 0)]] {
        proxy.spoil(DISCOVER_VERSIONS, speaks(none));
        let refusal = host(&server, proxy.address(), "1.4").get(&id).err().unwrap();
        assert_eq!(refusal.reason(), Reason::KeyManager);
        assert!(refusal.to_string().contains("no version of KMIP that this host may speak"), "{refusal}");
    }
}

#[test]
fn every_version_has_the_keys_of_every_other_one() {
    let server = PyKmip::start();
    let hosts = ["1.0", "1.1", "1.2", "1.3", "1.4", "2.0"].map(|newest| host(&server, server.address(), newest));
    for (number, maker) in hosts.iter().enumerate() {
        let id = volume(&format!("made-{number}"));
        let key = create(maker, &id).unwrap();
        let (_, description) = maker.described(&id).unwrap().unwrap();
        for reader in &hosts {
            let (same, said) = reader.described(&id).unwrap().unwrap();
            assert!(same.same_as(&key) && said == description, "{number}");
        }
        let destroyer = &hosts[hosts.len() - 1 - number];
        destroyer.destroy(&id).unwrap();
        assert_eq!(maker.get(&id).err().unwrap().reason(), Reason::NoKey);
    }
    assert_eq!(server.objects(), 0);
}
