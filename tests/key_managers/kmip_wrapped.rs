//! Keys that a KMIP server wraps before it hands them out, and all that can stand in the way.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::time::Duration;

use volcrypt::keys::kmip::message::{Answer, Operation, Request, Version, tag};
use volcrypt::keys::kmip::ttlv::Writer;
use volcrypt::keys::kmip::{KeyOrigin, KmipConfig, KmipKeyManager, WrappingKey};
use volcrypt::keys::{Key, KeyManager};
use volcrypt::refusal::{Reason, Refusal};
use zeroize::Zeroizing;

use super::conformance::recorded;
use super::faults::{create, volume};
use super::proxy::{Fault, Proxy, exchange};
use super::pykmip::PyKmip;

const GET: u8 = 0x0a;
const REGISTER: u32 = 0x03;
/// Wrap Key and Unwrap Key.
const WRAPS: i32 = 0x10 | 0x20;

/// A key on the server that wraps others, and the file with it on a host.
pub struct Wrapping<'a> {
    server: &'a PyKmip,
    identifier: String,
    file: PathBuf,
}

impl<'a> Wrapping<'a> {
    /// One of `length` bytes that may be used as `usage` says, and was not activated.
    fn registered(server: &'a PyKmip, length: usize, usage: i32) -> Self {
        let bytes: Vec<u8> = (0..length as u8).map(|byte| byte ^ 0x5a).collect();
        let mut request = Vec::new();
        Writer::new(&mut request).structure(tag::REQUEST_MESSAGE, |message| {
            message.structure(tag::REQUEST_HEADER, |header| {
                header.structure(tag::PROTOCOL_VERSION, |version| {
                    version.integer(tag::PROTOCOL_VERSION_MAJOR, 2);
                    version.integer(tag::PROTOCOL_VERSION_MINOR, 0);
                });
                header.integer(tag::BATCH_COUNT, 1);
            });
            message.structure(tag::BATCH_ITEM, |item| {
                item.enumeration(tag::OPERATION, REGISTER);
                item.structure(tag::REQUEST_PAYLOAD, |payload| {
                    payload.enumeration(tag::OBJECT_TYPE, 2);
                    payload.structure(tag::ATTRIBUTES, |all| all.integer(tag::CRYPTOGRAPHIC_USAGE_MASK, usage));
                    payload.structure(tag::SYMMETRIC_KEY, |key| {
                        key.structure(tag::KEY_BLOCK, |block| {
                            block.enumeration(tag::KEY_FORMAT_TYPE, 1);
                            block.structure(tag::KEY_VALUE, |value| value.bytes(tag::KEY_MATERIAL, &bytes));
                            block.enumeration(tag::CRYPTOGRAPHIC_ALGORITHM, 3);
                            block.integer(tag::CRYPTOGRAPHIC_LENGTH, 8 * length as i32);
                        });
                    });
                });
            });
        });
        let answer = exchange(server.authority(), &server.address(), &request);
        let answer = Answer::new(Zeroizing::new(answer), Version::NEWEST);
        assert_eq!(answer.outcome(Operation::Register), Ok(Ok(())));
        let identifier = answer.identifiers().unwrap().remove(0);
        let file = server.authority().path(&format!("wrapping-{identifier}.key"));
        fs::write(&file, bytes).unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
        Wrapping { server, identifier, file }
    }

    /// One of 256 bits that wraps keys.
    pub fn active(server: &'a PyKmip) -> Self {
        let wrapping = Wrapping::registered(server, 32, WRAPS);
        wrapping.ask(&Request::activate(&wrapping.identifier));
        wrapping
    }

    fn ask(&self, request: &Request<'_>) {
        let request_bytes = request.encode(Version::NEWEST);
        let answer = exchange(self.server.authority(), &self.server.address(), &request_bytes);
        let answer = Answer::new(Zeroizing::new(answer), Version::NEWEST);
        assert_eq!(answer.outcome(request.operation), Ok(Ok(())));
    }

    /// How a host reaches `servers` that is told to have keys wrapped.
    pub fn config(&self, servers: Vec<String>) -> KmipConfig {
        let wrapping_key = Some(WrappingKey { identifier: self.identifier.clone(), file: self.file.clone() });
        KmipConfig { wrapping_key, ..self.server.config("client", servers) }
    }

    fn host(&self) -> KmipKeyManager {
        KmipKeyManager::new(self.config(vec![self.server.address()]))
    }
}

fn refused(outcome: Result<Key, Refusal>, reason: Reason, words: &[&str]) {
    let refusal = outcome.err().expect("must be refused");
    assert_eq!(refusal.reason(), reason, "{refusal}");
    for words in words {
        assert!(refusal.to_string().contains(words), "{words:?}: {refusal}");
    }
}

#[test]
fn a_wrapped_key_is_never_in_clear_on_the_way() {
    let server = PyKmip::start();
    let wrapping = Wrapping::active(&server);
    let proxy = Proxy::start(server.authority(), "server", server.address());
    for newest in ["1.1", "1.4", "2.0"] {
        let config = KmipConfig {
            newest_version: newest.parse().unwrap(),
            key_origin: KeyOrigin::Server,
            ..wrapping.config(vec![proxy.address()])
        };
        let id = volume(&format!("wrapped-{newest}"));
        let key = create(&KmipKeyManager::new(config.clone()), &id).unwrap();
        assert!(KmipKeyManager::new(config).get(&id).unwrap().same_as(&key));
        assert!(!proxy.has_carried(key.bytes()), "{newest}");
        assert!(server.manager().get(&id).unwrap().same_as(&key), "what is on the server is the key itself");
    }
    // What would be seen of one that is not wrapped.
    let id = volume("in.clear");
    let key = create(&server.manager(), &id).unwrap();
    let wrapped = KmipKeyManager::new(wrapping.config(vec![proxy.address()]));
    assert!(wrapped.get(&id).unwrap().same_as(&key));
    assert!(!proxy.has_carried(key.bytes()));
    KmipKeyManager::new(server.config("client", vec![proxy.address()])).get(&id).unwrap();
    assert!(proxy.has_carried(key.bytes()));
    // One of 128 bits wraps as well.
    let short = Wrapping::registered(&server, 16, WRAPS);
    short.ask(&Request::activate(&short.identifier));
    assert!(short.host().get(&id).unwrap().same_as(&key));
}

#[test]
fn what_is_wrong_with_the_wrapping_key_is_said() {
    let server = PyKmip::start();
    let id = volume("one");
    let key = create(&server.manager(), &id).unwrap();
    let wrapping = Wrapping::registered(&server, 32, WRAPS);
    let fault = |wrapping: &Wrapping<'_>, words: &str| {
        let by = format!("wrap the key of volume one by its key {}", wrapping.identifier);
        refused(wrapping.host().get(&id), Reason::KeyManager, &[words, &by]);
        refused(wrapping.host().get_enrolled(&recorded(&id, &key)), Reason::KeyManager, &[words]);
    };
    fault(&wrapping, "was not activated: have its administrator activate it");
    wrapping.ask(&Request::activate(&wrapping.identifier));
    assert!(wrapping.host().get(&id).unwrap().same_as(&key));
    wrapping.ask(&Request::revoke(&wrapping.identifier));
    fault(&wrapping, "was revoked: have its administrator make another one");
    wrapping.ask(&Request::destroy(&wrapping.identifier));
    fault(&wrapping, "no such key that this host may see: correct wrapping_key");
    let unfit = Wrapping::registered(&server, 32, 4 | 8);
    unfit.ask(&Request::activate(&unfit.identifier));
    fault(&unfit, "add Wrap Key to its cryptographic usage mask");
    // The volume's key itself: that is no fault of the other one's.
    let wrapping = Wrapping::active(&server);
    refused(wrapping.host().get(&volume("two")), Reason::NoKey, &["no key of volume two"]);
}

#[test]
fn a_file_with_another_key_or_none_unwraps_nothing() {
    let server = PyKmip::start();
    let wrapping = Wrapping::active(&server);
    let id = volume("one");
    let key = create(&wrapping.host(), &id).unwrap();
    let file = wrapping.file.to_str().unwrap();
    let right = fs::read(&wrapping.file).unwrap();
    for wrong in [vec![7; 32], right[..16].to_vec()] {
        fs::write(&wrapping.file, wrong).unwrap();
        let words = ["cannot be unwrapped with", "put the bytes of key", file];
        refused(wrapping.host().get(&id), Reason::KeyManager, &words);
        refused(wrapping.host().get_enrolled(&recorded(&id, &key)), Reason::KeyManager, &words);
    }
    fs::write(&wrapping.file, &right[..31]).unwrap();
    refused(wrapping.host().get(&id), Reason::Configuration, &["has 31 bytes", file]);
    fs::remove_file(&wrapping.file).unwrap();
    refused(wrapping.host().get(&id), Reason::Configuration, &["is not there", file]);
    // Nor is one made that this host could not have back.
    let objects = server.objects();
    refused(create(&wrapping.host(), &volume("new")), Reason::Configuration, &["is not there", file]);
    assert_eq!(server.objects(), objects);
    // It is read anew each time.
    let host = wrapping.host();
    fs::write(&wrapping.file, &right).unwrap();
    refused(host.get(&id), Reason::Configuration, &["chmod 0600", file]);
    fs::set_permissions(&wrapping.file, fs::Permissions::from_mode(0o400)).unwrap();
    assert!(host.get(&id).unwrap().same_as(&key));
}

/// An answer to Get with these bytes: in clear, or wrapped by the key `by`.
fn handed_out(identifier: &str, bytes: &[u8], by: Option<&str>) -> Fault {
    let mut answer = Vec::new();
    Writer::new(&mut answer).structure(tag::RESPONSE_MESSAGE, |message| {
        message.structure(tag::BATCH_ITEM, |item| {
            item.enumeration(tag::OPERATION, GET.into());
            item.enumeration(tag::RESULT_STATUS, 0);
            item.structure(tag::RESPONSE_PAYLOAD, |payload| {
                payload.enumeration(tag::OBJECT_TYPE, 2);
                payload.text(tag::UNIQUE_IDENTIFIER, identifier);
                payload.structure(tag::SYMMETRIC_KEY, |object| {
                    object.structure(tag::KEY_BLOCK, |block| {
                        block.enumeration(tag::KEY_FORMAT_TYPE, 1);
                        block.structure(tag::KEY_VALUE, |value| value.bytes(tag::KEY_MATERIAL, bytes));
                        let Some(by) = by else { return };
                        block.structure(tag::KEY_WRAPPING_DATA, |data| {
                            data.enumeration(tag::WRAPPING_METHOD, 1);
                            data.structure(tag::ENCRYPTION_KEY_INFORMATION, |key| {
                                key.text(tag::UNIQUE_IDENTIFIER, by);
                            });
                            data.enumeration(tag::ENCODING_OPTION, 1);
                        });
                    });
                });
            });
        });
    });
    Fault::Refused(answer)
}

fn says_no(reason: u32, words: &str) -> Fault {
    let mut answer = Vec::new();
    Writer::new(&mut answer).structure(tag::RESPONSE_MESSAGE, |message| {
        message.structure(tag::BATCH_ITEM, |item| {
            item.enumeration(tag::OPERATION, GET.into());
            item.enumeration(tag::RESULT_STATUS, 1);
            item.enumeration(tag::RESULT_REASON, reason);
            item.text(tag::RESULT_MESSAGE, words);
        });
    });
    Fault::Refused(answer)
}

#[test]
fn what_is_not_wrapped_as_it_was_asked_for_is_no_key_and_another_server_is_asked() {
    let server = PyKmip::start();
    let id = volume("one");
    let key = create(&server.manager(), &id).unwrap();
    let wrapping = Wrapping::active(&server);
    let proxy = Proxy::start(server.authority(), "server", server.address());
    let alone = || KmipKeyManager::new(wrapping.config(vec![proxy.address()]));
    let both = || KmipKeyManager::new(wrapping.config(vec![proxy.address(), server.address()]));
    let by = wrapping.identifier.as_str();
    for (answer, words) in [
        (handed_out("1", key.bytes(), None), "the key came in clear, so it was not used: have its administrator see"),
        (handed_out("1", &[9; 72], Some("4712")), "wrapped by another one than was asked for"),
        (handed_out("1", key.bytes(), Some(by)), "a length that no wrapped one has"),
        (handed_out("1", &[], Some(by)), "a length that no wrapped one has"),
        (handed_out("1", &[9; 72], Some(by)), "cannot be unwrapped with"),
        (says_no(5, "no wrapping here"), "does not wrap by it (reason 5: no wrapping here)"),
    ] {
        proxy.spoil(GET, answer);
        refused(alone().get(&id), Reason::KeyManager, &[words]);
        assert!(both().get(&id).unwrap().same_as(&key), "{words}");
    }
    // A right that is missing is one all the same.
    for reason in [0x03, 0x0c, 0x39] {
        proxy.spoil(GET, says_no(reason, "not for you"));
        refused(alone().get(&id), Reason::NotAllowed, &["not for you"]);
    }
    // And who has not asked for a wrapped key takes none.
    proxy.spoil(GET, handed_out("1", &[9; 72], Some(by)));
    let raw = KmipKeyManager::new(server.config("client", vec![proxy.address()]));
    refused(raw.get(&id), Reason::KeyManager, &["wrapped by another one, which nobody has asked for"]);
    // KMIP 1.0 cannot say how.
    let config = KmipConfig { newest_version: "1.0".parse().unwrap(), ..wrapping.config(vec![server.address()]) };
    refused(KmipKeyManager::new(config).get(&id), Reason::KeyManager, &["it speaks no KMIP 1.1 or newer"]);
}

#[test]
fn an_answer_with_a_wrapped_key_that_was_changed_at_any_byte_is_no_other_key() {
    let server = PyKmip::start();
    let id = volume("one");
    let key = create(&server.manager(), &id).unwrap();
    let wrapping = Wrapping::active(&server);
    let proxy = Proxy::start(server.authority(), "server", server.address());
    let config = KmipConfig { deadline: Duration::from_millis(500), ..wrapping.config(vec![proxy.address()]) };
    let host = || KmipKeyManager::new(config.clone());
    proxy.spoil(GET, Fault::None);
    assert!(KmipKeyManager::new(wrapping.config(vec![proxy.address()])).get(&id).unwrap().same_as(&key));
    for place in 0..proxy.longest_answer() {
        proxy.spoil(GET, Fault::Byte(place, 0x7f));
        assert!(host().get(&id).map_or(true, |found| found.same_as(&key)), "{place}");
    }
}
