use zeroize::Zeroizing;

use super::request::{REQUEST_SPACE, attribute, name_value};
use super::*;
use crate::keys::Key;
use crate::keys::kmip::ttlv::Writer;

fn answer(fill: impl FnOnce(&mut Writer<'_>)) -> Answer {
    let mut message = Vec::new();
    Writer::new(&mut message).structure(tag::RESPONSE_MESSAGE, |message| message.structure(tag::BATCH_ITEM, fill));
    Answer::new(Zeroizing::new(message))
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

#[test]
fn a_state_that_is_not_known_lets_no_key_be_used() {
    let with_state = |state| {
        done(Operation::GetAttributes, |payload| {
            payload.text(tag::UNIQUE_IDENTIFIER, "7");
            attribute(payload, "Name", |value| name_value(value, "volcrypt/x"));
            attribute(payload, "State", |value| value.enumeration(tag::ATTRIBUTE_VALUE, state));
            attribute(payload, "Cryptographic Length", |value| value.integer(tag::ATTRIBUTE_VALUE, 512));
            attribute(payload, "Initial Date", |value| value.date_time(tag::ATTRIBUTE_VALUE, 1_800_000_000));
            attribute(payload, "Vendor Thing", |value| value.text(tag::ATTRIBUTE_VALUE, "x"));
        })
    };
    for (number, state) in [(1, State::PreActive), (2, State::Active), (4, State::Revoked), (6, State::Destroyed)] {
        let names = vec!["volcrypt/x".to_owned()];
        let expected =
            Attributes { names, state, initial_date: 1_800_000_000, bits: 512, volume: None, description: None };
        assert_eq!(with_state(number).attributes("7"), Ok(expected));
    }
    assert!(with_state(7).attributes("7").is_err());
    assert!(with_state(2).attributes("8").is_err());
    assert!(done(Operation::GetAttributes, |_| {}).attributes("7").is_err());
}

#[test]
fn a_request_never_outgrows_the_space_that_is_set_aside_for_its_key() {
    let key = Key::random(512.try_into().unwrap()).unwrap();
    let longest = "v".repeat(64);
    let name = format!("volcrypt/{longest}");
    let label = Label { name: &name, volume: &longest, description: &"d".repeat(1024) };
    let request = Request::register(&label, 512.try_into().unwrap(), &key);
    assert!(request.payload.len() < REQUEST_SPACE, "{}", request.payload.len());
    let message = request.encode(VERSIONS[0]);
    assert!(message.len() < REQUEST_SPACE);
    assert!(message.windows(64).any(|bytes| bytes == key.bytes()));
}

#[test]
fn a_key_that_is_to_be_made_has_no_description_yet() {
    let label = Label { name: "volcrypt/x (unfinished)", volume: "x", description: "unfinished" };
    let request = Request::create(&label, 256.try_into().unwrap());
    let is_in = |text: &[u8]| request.payload.windows(text.len()).any(|bytes| bytes == text);
    assert!(is_in(b"volcrypt/x (unfinished)") && is_in(b"Cryptographic Length"));
    // The length in bits, as an integer of KMIP's.
    assert!(is_in(&[0x42, 0, 0x0b, 2, 0, 0, 0, 4, 0, 0, 1, 0, 0, 0, 0, 0]));
}
