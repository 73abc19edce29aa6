use zeroize::Zeroizing;

use super::request::REQUEST_SPACE;
use super::*;
use crate::keys::Key;
use crate::keys::kmip::ttlv::{Malformed, Writer};

const OLD: Version = VERSIONS[1];
const NEW: Version = Version::NEWEST;

fn answer(fill: impl FnOnce(&mut Writer<'_>)) -> Answer {
    Answer::new(Zeroizing::new(message(fill)), OLD)
}

fn message(fill: impl FnOnce(&mut Writer<'_>)) -> Vec<u8> {
    let mut message = Vec::new();
    Writer::new(&mut message).structure(tag::RESPONSE_MESSAGE, |message| message.structure(tag::BATCH_ITEM, fill));
    message
}

fn done(operation: Operation, payload: impl FnOnce(&mut Writer<'_>)) -> Answer {
    answer(|item| {
        item.enumeration(tag::OPERATION, operation as u32);
        item.enumeration(tag::RESULT_STATUS, 0);
        item.structure(tag::RESPONSE_PAYLOAD, payload);
    })
}

#[test]
fn an_answer_is_to_the_question_that_was_asked() {
    let located = done(Operation::Locate, |payload| payload.text(tag::UNIQUE_IDENTIFIER, "7"));
    assert_eq!(located.outcome(Operation::Locate), Ok(Ok(())));
    assert_eq!(located.identifiers().unwrap(), ["7"]);
    assert!(located.outcome(Operation::Get).is_err());
    let pending = answer(|item| {
        item.enumeration(tag::OPERATION, Operation::Get as u32);
        item.enumeration(tag::RESULT_STATUS, 2);
    });
    assert!(pending.outcome(Operation::Get).is_err());
    let refused = answer(|item| {
        item.enumeration(tag::RESULT_STATUS, 1);
        item.enumeration(tag::RESULT_REASON, Failure::ITEM_NOT_FOUND);
        item.text(tag::RESULT_MESSAGE, "no such object");
    });
    let failure = Failure { reason: Failure::ITEM_NOT_FOUND, message: "no such object".to_owned() };
    assert_eq!(refused.outcome(Operation::Get), Ok(Err(failure)));
}

#[test]
fn a_server_says_in_two_ways_that_there_is_nothing_and_in_three_that_this_host_may_not() {
    let failure = |reason| Failure { reason, message: String::new() };
    for reason in 0..0x60 {
        assert_eq!(failure(reason).is_not_found(), [0x01, 0x37].contains(&reason), "{reason:#x}");
        assert_eq!(failure(reason).is_not_allowed(), [0x03, 0x0c, 0x39].contains(&reason), "{reason:#x}");
    }
}

/// The payload of an answer to Get; `fill` may write into the key block first.
fn handed_out(identifier: &str, kind: u32, format: u32, fill: fn(&mut Writer<'_>)) -> Answer {
    done(Operation::Get, |payload| {
        payload.enumeration(tag::OBJECT_TYPE, kind);
        payload.text(tag::UNIQUE_IDENTIFIER, identifier);
        payload.structure(tag::SYMMETRIC_KEY, |object| {
            object.structure(tag::KEY_BLOCK, |block| {
                fill(block);
                block.enumeration(tag::KEY_FORMAT_TYPE, format);
                block.structure(tag::KEY_VALUE, |value| value.bytes(tag::KEY_MATERIAL, &[9; 64]));
            });
        });
    })
}

#[test]
fn only_a_raw_aes_key_that_was_asked_for_is_one() {
    assert_eq!(handed_out("7", SYMMETRIC_KEY_OBJECT, RAW, |_| {}).key("7").unwrap(), [9; 64]);
    let aes = handed_out("7", SYMMETRIC_KEY_OBJECT, RAW, |block| block.enumeration(tag::CRYPTOGRAPHIC_ALGORITHM, AES));
    assert!(aes.key("7").is_ok());
    let refused = |answer: Answer| answer.key("7").unwrap_err().0;
    assert!(refused(handed_out("8", SYMMETRIC_KEY_OBJECT, RAW, |_| {})).contains("another object"));
    assert!(refused(handed_out("7", 7, RAW, |_| {})).contains("no symmetric key"));
    assert!(refused(handed_out("7", SYMMETRIC_KEY_OBJECT, 2, |_| {})).contains("raw format"));
    let wrapped = handed_out("7", SYMMETRIC_KEY_OBJECT, RAW, |block| block.structure(tag::KEY_WRAPPING_DATA, |_| {}));
    assert!(refused(wrapped).contains("wrapped"));
    let triple_des =
        handed_out("7", SYMMETRIC_KEY_OBJECT, RAW, |block| block.enumeration(tag::CRYPTOGRAPHIC_ALGORITHM, 2));
    assert!(refused(triple_des).contains("another algorithm"));
}

/// How a key is said to be wrapped.
#[derive(Clone, Copy)]
struct Wrapped<'a> {
    method: u32,
    by: &'a str,
    mode: Option<u32>,
    encoding: Option<u32>,
    length: usize,
    /// Whether it stands where one in clear would.
    in_structure: bool,
}

const WRAPPED: Wrapped<'_> = Wrapped {
    method: ENCRYPT,
    by: "1",
    mode: Some(NIST_KEY_WRAP),
    encoding: Some(NO_ENCODING),
    length: 72,
    in_structure: false,
};

impl Wrapped<'_> {
    fn answer(self) -> Answer {
        done(Operation::Get, |payload| {
            payload.enumeration(tag::OBJECT_TYPE, SYMMETRIC_KEY_OBJECT);
            payload.text(tag::UNIQUE_IDENTIFIER, "7");
            payload.structure(tag::SYMMETRIC_KEY, |object| object.structure(tag::KEY_BLOCK, |block| self.write(block)));
        })
    }

    fn write(self, block: &mut Writer<'_>) {
        block.enumeration(tag::KEY_FORMAT_TYPE, RAW);
        let bytes = vec![9; self.length];
        match self.in_structure {
            true => block.structure(tag::KEY_VALUE, |value| value.bytes(tag::KEY_MATERIAL, &bytes)),
            false => block.bytes(tag::KEY_VALUE, &bytes),
        }
        block.structure(tag::KEY_WRAPPING_DATA, |data| {
            data.enumeration(tag::WRAPPING_METHOD, self.method);
            data.structure(tag::ENCRYPTION_KEY_INFORMATION, |key| {
                key.text(tag::UNIQUE_IDENTIFIER, self.by);
                key.structure(tag::CRYPTOGRAPHIC_PARAMETERS, |parameters| {
                    self.mode.into_iter().for_each(|mode| parameters.enumeration(tag::BLOCK_CIPHER_MODE, mode));
                });
            });
            self.encoding.into_iter().for_each(|encoding| data.enumeration(tag::ENCODING_OPTION, encoding));
        });
    }
}

#[test]
fn only_a_key_that_is_wrapped_as_was_asked_for_is_one() {
    for length in [24, 40, 72] {
        for wrapped in [Wrapped { length, ..WRAPPED }, Wrapped { length, in_structure: true, mode: None, ..WRAPPED }] {
            assert_eq!(wrapped.answer().wrapped_key("7", "1").unwrap(), vec![9; length]);
            assert!(wrapped.answer().key("7").unwrap_err().0.contains("nobody has asked for"));
        }
    }
    let refused = |wrapped: Wrapped<'_>| wrapped.answer().wrapped_key("7", "1").unwrap_err().0;
    assert!(refused(Wrapped { method: 2, ..WRAPPED }).contains("in another way than by encryption"));
    assert!(refused(Wrapped { by: "2", ..WRAPPED }).contains("by another one"));
    assert!(refused(Wrapped { mode: Some(1), ..WRAPPED }).contains("in another way"));
    for encoding in [None, Some(2)] {
        assert!(refused(Wrapped { encoding, ..WRAPPED }).contains("encoded before"));
    }
    for length in (0..=96).filter(|length| ![24, 40, 72].contains(length)) {
        assert!(refused(Wrapped { length, ..WRAPPED }).contains("a length that no wrapped one has"), "{length}");
    }
    let clear = handed_out("7", SYMMETRIC_KEY_OBJECT, RAW, |_| {});
    assert!(clear.wrapped_key("7", "1").unwrap_err().0.contains("came in clear"));
    let nothing = handed_out("7", SYMMETRIC_KEY_OBJECT, RAW, |block| block.structure(tag::KEY_WRAPPING_DATA, |_| {}));
    assert!(nothing.wrapped_key("7", "1").is_err());
    assert!(WRAPPED.answer().wrapped_key("8", "1").unwrap_err().0.contains("another object"));
}

#[test]
fn what_a_key_may_be_used_for_is_read_with_its_state() {
    let usage = |state: u32, usage: i32| {
        let answer = done(Operation::GetAttributes, |payload| {
            payload.text(tag::UNIQUE_IDENTIFIER, "1");
            for (name, write) in [
                ("State", &|value: &mut Writer<'_>| value.enumeration(tag::ATTRIBUTE_VALUE, state)),
                ("Cryptographic Usage Mask", &|value: &mut Writer<'_>| value.integer(tag::ATTRIBUTE_VALUE, usage)),
            ] as [(&str, &dyn Fn(&mut Writer<'_>)); 2]
            {
                payload.structure(tag::ATTRIBUTE, |attribute| {
                    attribute.text(tag::ATTRIBUTE_NAME, name);
                    write(attribute);
                });
            }
        });
        answer.usage("1")
    };
    assert_eq!(usage(2, WRAP_KEY | USAGE), Ok((State::Active, true)));
    assert_eq!(usage(4, USAGE), Ok((State::Revoked, false)));
    assert!(usage(7, USAGE).is_err());
}

/// What is said of a key: its state, and the text that is kept beside it. `unknown` writes what nobody asked for.
struct Said<'a> {
    state: u32,
    kept: &'a str,
    unknown: fn(&mut Writer<'_>),
}

impl Said<'_> {
    /// As it was written up to KMIP 1.4.
    fn named(&self, payload: &mut Writer<'_>) {
        let mut attribute = |name: &str, value: &dyn Fn(&mut Writer<'_>)| {
            payload.structure(tag::ATTRIBUTE, |attribute| {
                attribute.text(tag::ATTRIBUTE_NAME, name);
                value(attribute);
            });
        };
        attribute("Name", &|value| self.name(value, tag::ATTRIBUTE_VALUE));
        attribute("State", &|value| value.enumeration(tag::ATTRIBUTE_VALUE, self.state));
        attribute("Cryptographic Length", &|value| value.integer(tag::ATTRIBUTE_VALUE, 512));
        attribute("Initial Date", &|value| value.date_time(tag::ATTRIBUTE_VALUE, 1_800_000_000));
        attribute("Application Specific Information", &|value| self.application(value, tag::ATTRIBUTE_VALUE));
        attribute("Object Group", &|_| {});
        attribute("Vendor Thing", &|value| value.text(tag::ATTRIBUTE_VALUE, "x"));
    }

    /// As it is since KMIP 2.0.
    fn tagged(&self, payload: &mut Writer<'_>) {
        payload.structure(tag::ATTRIBUTES, |all| {
            self.name(all, tag::NAME);
            all.enumeration(tag::STATE, self.state);
            all.integer(tag::CRYPTOGRAPHIC_LENGTH, 512);
            all.date_time(tag::INITIAL_DATE, 1_800_000_000);
            self.application(all, tag::APPLICATION_SPECIFIC_INFORMATION);
            (self.unknown)(all);
        });
    }

    fn name(&self, writer: &mut Writer<'_>, tag: u32) {
        writer.structure(tag, |value| value.text(tag::NAME_VALUE, "volcrypt/x"));
    }

    fn application(&self, writer: &mut Writer<'_>, tag: u32) {
        writer.structure(tag, |value| {
            value.text(tag::APPLICATION_NAMESPACE, GROUP);
            value.text(tag::APPLICATION_DATA, self.kept);
        });
    }

    fn read(&self, written: Version, read: Version) -> Result<Attributes, Malformed> {
        let message = message(|item| {
            item.enumeration(tag::OPERATION, Operation::GetAttributes as u32);
            item.enumeration(tag::RESULT_STATUS, 0);
            item.structure(tag::RESPONSE_PAYLOAD, |payload| {
                payload.text(tag::UNIQUE_IDENTIFIER, "7");
                if written == OLD { self.named(payload) } else { self.tagged(payload) }
            });
        });
        let answer = Answer::new(Zeroizing::new(message), read);
        assert!(answer.attributes("8").is_err(), "another object");
        answer.attributes("7")
    }
}

fn said(state: u32, kept: &str) -> Said<'_> {
    // A vendor's attribute has the tag that every attribute had before.
    let unknown = |all: &mut Writer<'_>| all.structure(tag::ATTRIBUTE, |own| own.text(tag::ATTRIBUTE_NAME, "Name"));
    Said { state, kept, unknown }
}

#[test]
fn attributes_are_read_as_their_version_writes_them_and_an_unknown_state_lets_no_key_be_used() {
    for version in [OLD, NEW] {
        for (number, state) in [(1, State::PreActive), (2, State::Active), (4, State::Revoked), (6, State::Destroyed)] {
            let expected = Attributes {
                names: vec!["volcrypt/x".to_owned()],
                state,
                initial_date: 1_800_000_000,
                bits: 512,
                volume: Some("x".to_owned()),
                leaving: None,
                description: Some("{} 7f".to_owned()),
            };
            assert_eq!(said(number, "x {} 7f").read(version, version), Ok(expected));
        }
        assert!(said(7, "x {} 7f").read(version, version).is_err());
        let without = said(2, "x").read(version, version).unwrap();
        assert_eq!((without.volume.as_deref(), without.description), (Some("x"), None));
    }
    assert!(said(2, "x {} 7f").read(OLD, NEW).is_err());
    assert!(said(2, "x {} 7f").read(NEW, OLD).is_err());
    let twice = |all: &mut Writer<'_>| all.text(tag::STATE, "Active");
    assert!(Said { unknown: twice, ..said(2, "x {} 7f") }.read(NEW, NEW).is_err(), "of another type");
    assert!(done(Operation::GetAttributes, |_| {}).attributes("7").is_err());
}

#[test]
fn a_mark_stands_behind_the_rest_and_changes_nothing_of_it() {
    for version in [OLD, NEW] {
        for (kept, description, leaving) in [
            ("x {} 7f", Some("{} 7f"), None),
            ("x {} 7f\nleaving 5f host a", Some("{} 7f"), Some("leaving 5f host a")),
            ("x\nasked 5f a", None, Some("asked 5f a")),
            ("x {} 7f\n", Some("{} 7f"), Some("")),
        ] {
            let read = said(2, kept).read(version, version).unwrap();
            assert_eq!((read.volume.as_deref(), read.description.as_deref()), (Some("x"), description));
            assert_eq!(read.leaving.as_deref(), leaving);
            // What stands there is named as it stands there, where that has to be named.
            let request = |leaving| Request::mark("7", "x", &read, leaving).encode(version);
            let holds = |request: &[u8], text: &str| request.windows(text.len()).any(|part| part == text.as_bytes());
            if leaving.is_some_and(|leaving| !leaving.is_empty()) {
                assert_eq!(holds(&request(Some("leaving 6 b")), kept), version == NEW);
            }
            let marked = [Some("x"), description].into_iter().flatten().collect::<Vec<_>>().join(" ");
            assert!(holds(&request(Some("leaving 6 b")), &format!("{marked}\nleaving 6 b")));
            assert!(holds(&request(None), &marked) && !holds(&request(None), "leaving 6"));
        }
    }
}

#[test]
fn a_request_never_outgrows_the_space_that_is_set_aside_for_its_key() {
    let key = Key::random(512.try_into().unwrap()).unwrap();
    let longest = "v".repeat(64);
    let name = format!("volcrypt/{longest}");
    let label = Label { name: &name, volume: &longest, description: &"d".repeat(1024) };
    let request = Request::register(&label, 512.try_into().unwrap(), &key);
    for version in VERSIONS {
        let message = request.encode(version);
        assert!(message.len() < REQUEST_SPACE, "{}", message.len());
        assert_eq!(message.capacity(), REQUEST_SPACE, "it was moved");
        assert!(message.windows(64).any(|bytes| bytes == key.bytes()));
    }
}

fn is_in(request: &Request<'_>, version: Version, bytes: &[u8]) -> bool {
    request.encode(version).windows(bytes.len()).any(|part| part == bytes)
}

#[test]
fn a_key_that_is_to_be_made_has_no_description_yet() {
    let label = Label { name: "volcrypt/x (unfinished)", volume: "x", description: "unfinished" };
    let request = Request::create(&label, 256.try_into().unwrap());
    let is_in = |version, bytes: &[u8]| is_in(&request, version, bytes);
    for version in [OLD, NEW] {
        assert!(is_in(version, b"volcrypt/x (unfinished)") && is_in(version, b"x unfinished"));
    }
    // The length in bits, as an integer of KMIP's, by its name and by its tag.
    assert!(is_in(OLD, b"Cryptographic Length") && is_in(OLD, &[0x42, 0, 0x0b, 2, 0, 0, 0, 4, 0, 0, 1, 0, 0, 0, 0, 0]));
    assert!(is_in(NEW, &[0x42, 0, 0x2a, 2, 0, 0, 0, 4, 0, 0, 1, 0, 0, 0, 0, 0]));
    assert!(!is_in(NEW, b"Cryptographic Length"));
}

#[test]
fn what_is_replaced_is_named_by_its_value_since_kmip_2() {
    let [old, new] = ["old", "new"].map(|name| Label { name, volume: "x", description: name });
    for request in [Request::rename("7", &old, &new), Request::describe_anew("7", &old, &new)] {
        assert!(is_in(&request, NEW, b"old") && is_in(&request, NEW, b"new"));
        assert!(!is_in(&request, OLD, b"old") && is_in(&request, OLD, b"new"));
        let current = [0x42, 0x01, 0x3c, 1];
        assert!(is_in(&request, NEW, &current) && !is_in(&request, OLD, &current));
    }
}

#[test]
fn a_server_is_asked_for_no_version_that_is_not_to_be_spoken() {
    let newest = |version: Version, two: bool| {
        let major = [0x42, 0, 0x6a, 2, 0, 0, 0, 4, 0, 0, 0, 2];
        assert_eq!(is_in(&Request::discover_versions(version), OLD, &major), two);
    };
    newest(NEW, true);
    newest(OLD, false);
}
