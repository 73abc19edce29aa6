use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;

use zeroize::Zeroizing;

use super::*;
use crate::keys::kmip::message::{Operation, Version, tag};
use crate::keys::kmip::ttlv::Writer;

/// RFC 3394, sections 4.1 and 4.6: the other key, the key, and the key wrapped by the other.
const EXAMPLES: [[&str; 3]; 2] = [
    [
        "000102030405060708090a0b0c0d0e0f",
        "00112233445566778899aabbccddeeff",
        "1fa68b0a8112b447aef34bd8fb5a7b829d3e862371d2cfe5",
    ],
    [
        "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f",
        "00112233445566778899aabbccddeeff000102030405060708090a0b0c0d0e0f",
        "28c9f404c4b810f4cbccb35cfb87f8263f5786e2d80ed326cbc7f0e71a99f43bfb988b9b7a02dd21",
    ],
];

fn bytes(digits: &str) -> Vec<u8> {
    (0..digits.len() / 2).map(|place| u8::from_str_radix(&digits[2 * place..][..2], 16).unwrap()).collect()
}

struct Host {
    folder: tempfile::TempDir,
}

impl Host {
    fn with(content: &[u8]) -> Self {
        let host = Host { folder: tempfile::tempdir().unwrap() };
        let file = host.wrapping().file;
        fs::write(&file, content).unwrap();
        fs::set_permissions(&file, Permissions::from_mode(0o600)).unwrap();
        host
    }

    fn wrapping(&self) -> WrappingKey {
        WrappingKey { identifier: "1".to_owned(), file: self.folder.path().join("wrapping.key") }
    }

    fn unwrap(&self, wrapped: &[u8]) -> Result<Key, Fault> {
        let mut message = Vec::new();
        Writer::new(&mut message).structure(tag::RESPONSE_MESSAGE, |message| {
            message.structure(tag::BATCH_ITEM, |item| {
                item.enumeration(tag::OPERATION, Operation::Get as u32);
                item.structure(tag::RESPONSE_PAYLOAD, |payload| {
                    payload.enumeration(tag::OBJECT_TYPE, 2);
                    payload.text(tag::UNIQUE_IDENTIFIER, "7");
                    payload.structure(tag::SYMMETRIC_KEY, |object| {
                        object.structure(tag::KEY_BLOCK, |block| {
                            block.enumeration(tag::KEY_FORMAT_TYPE, 1);
                            block.bytes(tag::KEY_VALUE, wrapped);
                            block.structure(tag::KEY_WRAPPING_DATA, |data| {
                                data.enumeration(tag::WRAPPING_METHOD, 1);
                                data.structure(tag::ENCRYPTION_KEY_INFORMATION, |key| {
                                    key.text(tag::UNIQUE_IDENTIFIER, "1");
                                });
                                data.enumeration(tag::ENCODING_OPTION, 1);
                            });
                        });
                    });
                });
            });
        });
        let answer = Answer::new(Zeroizing::new(message), Version::NEWEST);
        let wrapping = self.wrapping();
        unwrap(wrapping.read().unwrap(), &answer, &"one".parse().unwrap(), "7", &wrapping)
    }
}

fn sentence(outcome: Result<Key, Fault>) -> String {
    match outcome {
        Err(Fault::Server(Trouble::Unwrapped(sentence))) => sentence,
        _ => panic!("must be refused"),
    }
}

#[test]
fn the_specifications_examples_are_unwrapped_and_nothing_else() {
    for [other, key, wrapped] in EXAMPLES.map(|example| example.map(bytes)) {
        let host = Host::with(&other);
        assert_eq!(host.unwrap(&wrapped).ok().unwrap().bytes(), key);
        for place in 0..wrapped.len() {
            let mut changed = wrapped.clone();
            changed[place] ^= 1;
            assert!(sentence(host.unwrap(&changed)).contains("put the bytes of key 1 into that file"));
        }
        for length in (0..wrapped.len()).chain([wrapped.len() + 1, wrapped.len() + 8]) {
            let mut changed = wrapped.clone();
            changed.resize(length, 0);
            sentence(host.unwrap(&changed));
        }
        let said = sentence(Host::with(&[9; 32]).unwrap(&wrapped));
        assert!(said.contains("wrapping.key") && said.contains("(object 7)"), "{said}");
    }
}

#[test]
fn a_file_that_cannot_be_the_key_is_refused_with_its_name() {
    let refused = |host: &Host| {
        let sentence = host.wrapping().read().expect_err("must be refused");
        assert!(sentence.contains("wrapping.key (the key that the KMIP server wraps others by)"), "{sentence}");
        sentence
    };
    for length in [1, 15, 17, 24, 31, 33, 64] {
        assert!(refused(&Host::with(&vec![7; length])).contains("has 16 or 32"), "{length}");
    }
    for length in [0, LONGEST_FILE + 1] {
        refused(&Host::with(&vec![7; length]));
    }
    let host = Host::with(&[7; 32]);
    assert!(host.wrapping().read().is_ok());
    fs::set_permissions(host.wrapping().file, Permissions::from_mode(0o640)).unwrap();
    assert!(refused(&host).contains("chmod 0600"));
    fs::remove_file(host.wrapping().file).unwrap();
    assert!(refused(&host).contains("is not there"));
}
