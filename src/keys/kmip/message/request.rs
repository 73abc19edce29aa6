//! What is asked: KMIP 1.4, sections 4 (operations) and 7 (messages).

use zeroize::Zeroizing;

use super::{AES, APPLICATION, DESCRIPTION, GROUP, Operation, RAW, SYMMETRIC_KEY_OBJECT, VERSIONS, Version, tag};
use crate::keys::Key;
use crate::keys::kmip::ttlv::Writer;
use crate::policy::KeySize;

/// The longest answer, in bytes, that concerns one key.
const LONGEST_ANSWER: usize = 64 << 10;
/// The longest list of keys, in bytes. The identifiers of ten thousand need about half a megabyte.
const LONGEST_LIST: usize = 8 << 20;
/// The space for a request: the largest one registers a key of 512 bits with a description of 1 KiB or so.
pub(super) const REQUEST_SPACE: usize = 8192;

/// On-line and archival storage: what was archived is no reason to make another key.
const ANYWHERE: i32 = 1 | 2;
const UNINTERPRETED_TEXT: u32 = 1;
/// Encrypt and Decrypt.
const USAGE: i32 = 4 | 8;
const CESSATION_OF_OPERATION: u32 = 6;

/// What a new key is to be called, and what is to be kept beside it.
pub struct Label<'a> {
    /// Its name.
    pub name: &'a str,
    /// The volume whose key it is.
    pub volume: &'a str,
    /// What other hosts have to know of the volume.
    pub description: &'a str,
}

/// An encoded request, wiped when dropped.
pub struct Request {
    /// What it asks for.
    pub operation: Operation,
    /// The longest answer that is taken, in bytes.
    pub longest_answer: usize,
    pub(super) payload: Zeroizing<Vec<u8>>,
}

impl Request {
    fn new(operation: Operation, fill: impl FnOnce(&mut Writer<'_>)) -> Self {
        let mut payload = Zeroizing::new(Vec::with_capacity(REQUEST_SPACE));
        Writer::new(&mut payload).structure(tag::REQUEST_PAYLOAD, fill);
        Request { operation, longest_answer: LONGEST_ANSWER, payload }
    }

    /// The whole message in the protocol's `version`.
    pub fn encode(&self, version: Version) -> Zeroizing<Vec<u8>> {
        let mut message = Zeroizing::new(Vec::with_capacity(REQUEST_SPACE + self.payload.len()));
        Writer::new(&mut message).structure(tag::REQUEST_MESSAGE, |message| {
            message.structure(tag::REQUEST_HEADER, |header| {
                protocol_version(header, version);
                // It fits: 8 MiB at most.
                header.integer(tag::MAXIMUM_RESPONSE_SIZE, self.longest_answer as i32);
                header.integer(tag::BATCH_COUNT, 1);
            });
            message.structure(tag::BATCH_ITEM, |item| {
                item.enumeration(tag::OPERATION, self.operation as u32);
                item.encoded(&self.payload);
            });
        });
        message
    }

    /// Asks for the versions that the server speaks, of those that are spoken here.
    pub fn discover_versions() -> Self {
        Request::new(Operation::DiscoverVersions, |payload| {
            VERSIONS.into_iter().for_each(|version| protocol_version(payload, version));
        })
    }

    /// Hands `key` to the server.
    pub fn register(label: &Label<'_>, size: KeySize, key: &Key) -> Self {
        Request::new(Operation::Register, |payload| {
            payload.enumeration(tag::OBJECT_TYPE, SYMMETRIC_KEY_OBJECT);
            payload.structure(tag::TEMPLATE_ATTRIBUTE, |template| describe(template, label));
            payload.structure(tag::SYMMETRIC_KEY, |object| {
                object.structure(tag::KEY_BLOCK, |block| {
                    block.enumeration(tag::KEY_FORMAT_TYPE, RAW);
                    block.structure(tag::KEY_VALUE, |value| value.bytes(tag::KEY_MATERIAL, key.bytes()));
                    block.enumeration(tag::CRYPTOGRAPHIC_ALGORITHM, AES);
                    block.integer(tag::CRYPTOGRAPHIC_LENGTH, bits(size));
                });
            });
        })
    }

    /// Has the server make a key of `size`.
    pub fn create(label: &Label<'_>, size: KeySize) -> Self {
        Request::new(Operation::Create, |payload| {
            payload.enumeration(tag::OBJECT_TYPE, SYMMETRIC_KEY_OBJECT);
            payload.structure(tag::TEMPLATE_ATTRIBUTE, |template| {
                attribute(template, "Cryptographic Algorithm", |value| value.enumeration(tag::ATTRIBUTE_VALUE, AES));
                attribute(template, "Cryptographic Length", |value| value.integer(tag::ATTRIBUTE_VALUE, bits(size)));
                describe(template, label);
            });
        })
    }

    /// Replaces what is kept beside a key of the volume.
    pub fn describe_anew(identifier: &str, description: &str) -> Self {
        Request::new(Operation::ModifyAttribute, |payload| {
            payload.text(tag::UNIQUE_IDENTIFIER, identifier);
            application(payload, 1, DESCRIPTION, description);
        })
    }

    /// Replaces a key's name.
    pub fn rename(identifier: &str, name: &str) -> Self {
        Request::new(Operation::ModifyAttribute, |payload| {
            payload.text(tag::UNIQUE_IDENTIFIER, identifier);
            attribute(payload, "Name", |value| name_value(value, name));
        })
    }

    /// Looks for the keys called `name`.
    pub fn locate_name(name: &str) -> Self {
        Request::new(Operation::Locate, |payload| {
            payload.integer(tag::STORAGE_STATUS_MASK, ANYWHERE);
            attribute(payload, "Object Type", |value| value.enumeration(tag::ATTRIBUTE_VALUE, SYMMETRIC_KEY_OBJECT));
            attribute(payload, "Name", |value| name_value(value, name));
        })
    }

    /// Looks for all of volcrypt's keys.
    pub fn locate_all() -> Self {
        let request = Request::new(Operation::Locate, |payload| {
            payload.integer(tag::STORAGE_STATUS_MASK, ANYWHERE);
            attribute(payload, "Object Group", |value| value.text(tag::ATTRIBUTE_VALUE, GROUP));
        });
        Request { longest_answer: LONGEST_LIST, ..request }
    }

    /// Has an object handed out.
    pub fn get(identifier: &str) -> Self {
        Request::new(Operation::Get, |payload| {
            payload.text(tag::UNIQUE_IDENTIFIER, identifier);
            payload.enumeration(tag::KEY_FORMAT_TYPE, RAW);
        })
    }

    /// Asks for all that [`Attributes`] holds.
    pub fn get_attributes(identifier: &str) -> Self {
        Request::new(Operation::GetAttributes, |payload| {
            payload.text(tag::UNIQUE_IDENTIFIER, identifier);
            for name in ["Name", "Object Type", "State", "Initial Date", "Cryptographic Length", APPLICATION] {
                payload.text(tag::ATTRIBUTE_NAME, name);
            }
        })
    }

    /// Allows a key's use.
    pub fn activate(identifier: &str) -> Self {
        Request::new(Operation::Activate, |payload| payload.text(tag::UNIQUE_IDENTIFIER, identifier))
    }

    /// Ends a key's use.
    pub fn revoke(identifier: &str) -> Self {
        Request::new(Operation::Revoke, |payload| {
            payload.text(tag::UNIQUE_IDENTIFIER, identifier);
            payload.structure(tag::REVOCATION_REASON, |reason| {
                reason.enumeration(tag::REVOCATION_REASON_CODE, CESSATION_OF_OPERATION);
            });
        })
    }

    /// Ends a key.
    pub fn destroy(identifier: &str) -> Self {
        Request::new(Operation::Destroy, |payload| payload.text(tag::UNIQUE_IDENTIFIER, identifier))
    }
}

fn bits(size: KeySize) -> i32 {
    // 512 at most.
    size.bits() as i32
}

fn protocol_version(writer: &mut Writer<'_>, version: Version) {
    writer.structure(tag::PROTOCOL_VERSION, |writer| {
        writer.integer(tag::PROTOCOL_VERSION_MAJOR, version.major);
        writer.integer(tag::PROTOCOL_VERSION_MINOR, version.minor);
    });
}

pub(super) fn attribute(writer: &mut Writer<'_>, name: &str, value: impl FnOnce(&mut Writer<'_>)) {
    writer.structure(tag::ATTRIBUTE, |attribute| {
        attribute.text(tag::ATTRIBUTE_NAME, name);
        value(attribute);
    });
}

pub(super) fn name_value(writer: &mut Writer<'_>, name: &str) {
    writer.structure(tag::ATTRIBUTE_VALUE, |value| {
        value.text(tag::NAME_VALUE, name);
        value.enumeration(tag::NAME_TYPE, UNINTERPRETED_TEXT);
    });
}

/// What every key of volcrypt's says of itself, beside what it is.
fn describe(template: &mut Writer<'_>, label: &Label<'_>) {
    attribute(template, "Cryptographic Usage Mask", |value| value.integer(tag::ATTRIBUTE_VALUE, USAGE));
    attribute(template, "Name", |value| name_value(value, label.name));
    attribute(template, "Object Group", |value| value.text(tag::ATTRIBUTE_VALUE, GROUP));
    application(template, 0, GROUP, label.volume);
    application(template, 1, DESCRIPTION, label.description);
}

/// What an application keeps beside an object. What can be there more than once is numbered (section 2.1.1).
fn application(writer: &mut Writer<'_>, index: i32, namespace: &str, data: &str) {
    attribute(writer, APPLICATION, |value| {
        value.integer(tag::ATTRIBUTE_INDEX, index);
        value.structure(tag::ATTRIBUTE_VALUE, |value| {
            value.text(tag::APPLICATION_NAMESPACE, namespace);
            value.text(tag::APPLICATION_DATA, data);
        });
    });
}
