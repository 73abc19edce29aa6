//! What is asked: KMIP 1.4, sections 4 (operations) and 7 (messages).

use zeroize::Zeroizing;

use super::answer::Attributes;
use super::attribute::{self, Attribute, Kept, Kind};
use super::{AES, ENCRYPT, NIST_KEY_WRAP, NO_ENCODING, Operation, RAW, SYMMETRIC_KEY_OBJECT, VERSIONS, Version, tag};
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

impl<'a> Label<'a> {
    fn attributes(&self) -> [Attribute<'a>; 4] {
        [Attribute::Usage, Attribute::Name(self.name), Attribute::Group, self.kept()]
    }

    fn kept(&self) -> Attribute<'a> {
        let Label { volume, description, .. } = *self;
        Attribute::Kept(Kept { volume, description: Some(description), leaving: None })
    }
}

/// Writes what a request says, in a version of the protocol.
type Fill<'a> = Box<dyn Fn(&mut Writer<'_>, Version) + 'a>;

/// A request. It is written when it is known which version of the protocol the server speaks.
pub struct Request<'a> {
    /// What it asks for.
    pub operation: Operation,
    /// The longest answer that is taken, in bytes.
    pub longest_answer: usize,
    /// The first version of the protocol that has what it asks for.
    pub since: Version,
    fill: Fill<'a>,
}

impl<'a> Request<'a> {
    fn new(operation: Operation, fill: impl Fn(&mut Writer<'_>, Version) + 'a) -> Self {
        Request { operation, longest_answer: LONGEST_ANSWER, since: Version::OLDEST, fill: Box::new(fill) }
    }

    /// The whole message in the protocol's `version`, wiped when dropped.
    pub fn encode(&self, version: Version) -> Zeroizing<Vec<u8>> {
        let mut message = Zeroizing::new(Vec::with_capacity(REQUEST_SPACE));
        Writer::new(&mut message).structure(tag::REQUEST_MESSAGE, |message| {
            message.structure(tag::REQUEST_HEADER, |header| {
                protocol_version(header, version);
                // It fits: 8 MiB at most.
                header.integer(tag::MAXIMUM_RESPONSE_SIZE, self.longest_answer as i32);
                header.integer(tag::BATCH_COUNT, 1);
            });
            message.structure(tag::BATCH_ITEM, |item| {
                item.enumeration(tag::OPERATION, self.operation as u32);
                item.structure(tag::REQUEST_PAYLOAD, |payload| (self.fill)(payload, version));
            });
        });
        message
    }

    /// Asks for the versions that the server speaks, of those up to `newest` that are spoken here.
    pub fn discover_versions(newest: Version) -> Self {
        Request::new(Operation::DiscoverVersions, move |payload, _| {
            let ours = VERSIONS.into_iter().filter(|version| *version <= newest);
            ours.for_each(|version| protocol_version(payload, version));
        })
    }

    /// Hands `key` to the server.
    pub fn register(label: &'a Label<'_>, size: KeySize, key: &'a Key) -> Self {
        Request::new(Operation::Register, move |payload, version| {
            payload.enumeration(tag::OBJECT_TYPE, SYMMETRIC_KEY_OBJECT);
            attribute::set(payload, version, &label.attributes());
            payload.structure(tag::SYMMETRIC_KEY, |object| {
                object.structure(tag::KEY_BLOCK, |block| {
                    block.enumeration(tag::KEY_FORMAT_TYPE, RAW);
                    block.structure(tag::KEY_VALUE, |value| value.bytes(tag::KEY_MATERIAL, key.bytes()));
                    block.enumeration(tag::CRYPTOGRAPHIC_ALGORITHM, AES);
                    // 512 at most.
                    block.integer(tag::CRYPTOGRAPHIC_LENGTH, size.bits() as i32);
                });
            });
        })
    }

    /// Has the server make a key of `size`.
    pub fn create(label: &'a Label<'_>, size: KeySize) -> Self {
        Request::new(Operation::Create, move |payload, version| {
            payload.enumeration(tag::OBJECT_TYPE, SYMMETRIC_KEY_OBJECT);
            let [usage, name, group, kept] = label.attributes();
            attribute::set(payload, version, &[Attribute::Aes, Attribute::Length(size), usage, name, group, kept]);
        })
    }

    /// Replaces what is kept beside a key, which is what `old` says, by what `new` says.
    pub fn describe_anew(identifier: &'a str, old: &'a Label<'_>, new: &'a Label<'_>) -> Self {
        Request::replace(identifier, old.kept(), new.kept())
    }

    /// Replaces a key's name, which is that of `old`, by that of `new`.
    pub fn rename(identifier: &'a str, old: &'a Label<'_>, new: &'a Label<'_>) -> Self {
        Request::replace(identifier, Attribute::Name(old.name), Attribute::Name(new.name))
    }

    /// Sets the mark of a host that is about to destroy a key of `volume`, of which `attributes` are known, in the place of
    /// any other, or takes it away.
    pub fn mark(identifier: &'a str, volume: &'a str, attributes: &'a Attributes, leaving: Option<&'a str>) -> Self {
        let description = attributes.description.as_deref();
        let kept = |leaving| Attribute::Kept(Kept { volume, description, leaving });
        Request::replace(identifier, kept(attributes.leaving.as_deref()), kept(leaving))
    }

    fn replace(identifier: &'a str, old: Attribute<'a>, new: Attribute<'a>) -> Self {
        Request::new(Operation::ModifyAttribute, move |payload, version| {
            payload.text(tag::UNIQUE_IDENTIFIER, identifier);
            attribute::replace(payload, version, &old, &new);
        })
    }

    /// Looks for the keys called `name`.
    pub fn locate_name(name: &'a str) -> Self {
        Request::locate(vec![Attribute::SymmetricKey, Attribute::Name(name)])
    }

    /// Looks for all of volcrypt's keys.
    pub fn locate_all() -> Self {
        Request { longest_answer: LONGEST_LIST, ..Request::locate(vec![Attribute::Group]) }
    }

    fn locate(attributes: Vec<Attribute<'a>>) -> Self {
        Request::new(Operation::Locate, move |payload, version| {
            payload.integer(tag::STORAGE_STATUS_MASK, ANYWHERE);
            attribute::search(payload, version, &attributes);
        })
    }

    /// Has an object handed out.
    pub fn get(identifier: &'a str) -> Self {
        Request::new(Operation::Get, move |payload, _| {
            payload.text(tag::UNIQUE_IDENTIFIER, identifier);
            payload.enumeration(tag::KEY_FORMAT_TYPE, RAW);
        })
    }

    /// Has an object handed out, wrapped by the key `wrapping_key` and by nothing else. That what is wrapped is not
    /// encoded before can be said since KMIP 1.1.
    pub fn get_wrapped(identifier: &'a str, wrapping_key: &'a str) -> Self {
        let request = Request::new(Operation::Get, move |payload, _| {
            payload.text(tag::UNIQUE_IDENTIFIER, identifier);
            payload.enumeration(tag::KEY_FORMAT_TYPE, RAW);
            payload.structure(tag::KEY_WRAPPING_SPECIFICATION, |wrapping| {
                wrapping.enumeration(tag::WRAPPING_METHOD, ENCRYPT);
                wrapping.structure(tag::ENCRYPTION_KEY_INFORMATION, |key| {
                    key.text(tag::UNIQUE_IDENTIFIER, wrapping_key);
                    key.structure(tag::CRYPTOGRAPHIC_PARAMETERS, |parameters| {
                        parameters.enumeration(tag::BLOCK_CIPHER_MODE, NIST_KEY_WRAP);
                    });
                });
                wrapping.enumeration(tag::ENCODING_OPTION, NO_ENCODING);
            });
        });
        Request { since: Version::WITH_ENCODING_OPTION, ..request }
    }

    /// Asks whether a key can be used and what for: see [`Answer::usage`](super::Answer::usage).
    pub fn get_usage(identifier: &'a str) -> Self {
        Request::get_some(identifier, &[Kind::ObjectType, Kind::State, Kind::Usage])
    }

    /// Asks for all that [`Attributes`](super::Attributes) holds.
    pub fn get_attributes(identifier: &'a str) -> Self {
        let all = &[Kind::Name, Kind::ObjectType, Kind::State, Kind::InitialDate, Kind::Length, Kind::Application];
        Request::get_some(identifier, all)
    }

    fn get_some(identifier: &'a str, kinds: &'static [Kind]) -> Self {
        Request::new(Operation::GetAttributes, move |payload, version| {
            payload.text(tag::UNIQUE_IDENTIFIER, identifier);
            kinds.iter().for_each(|kind| kind.refer(payload, version));
        })
    }

    /// Allows a key's use.
    pub fn activate(identifier: &'a str) -> Self {
        Request::about(Operation::Activate, identifier)
    }

    /// Ends a key's use.
    pub fn revoke(identifier: &'a str) -> Self {
        Request::new(Operation::Revoke, move |payload, _| {
            payload.text(tag::UNIQUE_IDENTIFIER, identifier);
            payload.structure(tag::REVOCATION_REASON, |reason| {
                reason.enumeration(tag::REVOCATION_REASON_CODE, CESSATION_OF_OPERATION);
            });
        })
    }

    /// Ends a key.
    pub fn destroy(identifier: &'a str) -> Self {
        Request::about(Operation::Destroy, identifier)
    }

    fn about(operation: Operation, identifier: &'a str) -> Self {
        Request::new(operation, move |payload, _| payload.text(tag::UNIQUE_IDENTIFIER, identifier))
    }
}

fn protocol_version(writer: &mut Writer<'_>, version: Version) {
    writer.structure(tag::PROTOCOL_VERSION, |writer| {
        writer.integer(tag::PROTOCOL_VERSION_MAJOR, version.major);
        writer.integer(tag::PROTOCOL_VERSION_MINOR, version.minor);
    });
}
