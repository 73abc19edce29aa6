//! What a KMIP server may answer: any bytes, alone or in the frame of an answer. Nothing is taken for a key but what is
//! one.

#![no_main]

use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;
use volcrypt::keys::kmip::message::{Answer, Operation, VERSIONS, tag};
use volcrypt::keys::kmip::ttlv::{HEADER, Writer, message_length};

#[derive(Arbitrary, Debug)]
struct Input<'a> {
    framed: bool,
    version: u8,
    operation: u8,
    bytes: &'a [u8],
}

const OPERATIONS: [Operation; 10] = [
    Operation::Create,
    Operation::ModifyAttribute,
    Operation::Register,
    Operation::Locate,
    Operation::Get,
    Operation::GetAttributes,
    Operation::Activate,
    Operation::Revoke,
    Operation::Destroy,
    Operation::DiscoverVersions,
];

fuzz_target!(|input: Input<'_>| {
    let operation = OPERATIONS[usize::from(input.operation) % OPERATIONS.len()];
    let version = VERSIONS[usize::from(input.version) % VERSIONS.len()];
    let mut message = input.bytes.to_vec();
    if input.framed {
        message.clear();
        Writer::new(&mut message).structure(tag::RESPONSE_MESSAGE, |message| {
            message.structure(tag::BATCH_ITEM, |item| {
                item.enumeration(tag::OPERATION, operation as u32);
                item.enumeration(tag::RESULT_STATUS, 0);
                item.structure(tag::RESPONSE_PAYLOAD, |payload| payload.encoded(input.bytes));
            });
        });
    }
    if let Some(header) = message.first_chunk::<HEADER>()
        && let Ok(length) = message_length(*header, tag::RESPONSE_MESSAGE, 1 << 20)
    {
        assert!((HEADER..=1 << 20).contains(&length));
    }
    let longest = message.len();
    let answer = Answer::new(message.into(), version);
    let _ = (answer.outcome(operation), answer.versions());
    if let Ok(identifiers) = answer.identifiers() {
        assert!(identifiers.iter().map(String::len).sum::<usize>() <= longest);
    }
    let _ = answer.attributes("");
    let _ = answer.usage("");
    // No key is both.
    let (key, wrapped) = (answer.key(""), answer.wrapped_key("", ""));
    assert!(key.is_err() || wrapped.is_err());
    if let Ok(key) = key {
        assert!(key.len() <= longest);
    }
    if let Ok(wrapped) = wrapped {
        assert!([24, 40, 72].contains(&wrapped.len()));
    }
});
