//! Requests and answers: KMIP 1.4, sections 4 (operations), 7 (messages) and 9.1.3 (numbers).

use zeroize::Zeroizing;

use super::ttlv::{Item, Malformed, Writer};
use crate::keys::Key;
use crate::policy::KeySize;

/// The longest answer, in bytes, that concerns one key.
const LONGEST_ANSWER: usize = 64 << 10;
/// The longest list of keys, in bytes. The identifiers of ten thousand need about half a megabyte.
const LONGEST_LIST: usize = 8 << 20;
/// The longest of what a server says in words, in characters.
const LONGEST_WORDS: usize = 200;
/// The space for a request: the largest one registers a key of 512 bits with a description of 1 KiB or so.
const REQUEST_SPACE: usize = 8192;

/// The tags that are used here (section 9.1.3.1).
pub mod tag {
    #![allow(missing_docs)]
    pub const APPLICATION_DATA: u32 = 0x42_0002;
    pub const APPLICATION_NAMESPACE: u32 = 0x42_0003;
    pub const ATTRIBUTE: u32 = 0x42_0008;
    pub const ATTRIBUTE_INDEX: u32 = 0x42_0009;
    pub const ATTRIBUTE_NAME: u32 = 0x42_000a;
    pub const ATTRIBUTE_VALUE: u32 = 0x42_000b;
    pub const BATCH_COUNT: u32 = 0x42_000d;
    pub const BATCH_ITEM: u32 = 0x42_000f;
    pub const CRYPTOGRAPHIC_ALGORITHM: u32 = 0x42_0028;
    pub const CRYPTOGRAPHIC_LENGTH: u32 = 0x42_002a;
    pub const KEY_BLOCK: u32 = 0x42_0040;
    pub const KEY_FORMAT_TYPE: u32 = 0x42_0042;
    pub const KEY_MATERIAL: u32 = 0x42_0043;
    pub const KEY_VALUE: u32 = 0x42_0045;
    pub const KEY_WRAPPING_DATA: u32 = 0x42_0046;
    pub const MAXIMUM_RESPONSE_SIZE: u32 = 0x42_0050;
    pub const NAME_TYPE: u32 = 0x42_0054;
    pub const NAME_VALUE: u32 = 0x42_0055;
    pub const OBJECT_TYPE: u32 = 0x42_0057;
    pub const OPERATION: u32 = 0x42_005c;
    pub const PROTOCOL_VERSION: u32 = 0x42_0069;
    pub const PROTOCOL_VERSION_MAJOR: u32 = 0x42_006a;
    pub const PROTOCOL_VERSION_MINOR: u32 = 0x42_006b;
    pub const REQUEST_HEADER: u32 = 0x42_0077;
    pub const REQUEST_MESSAGE: u32 = 0x42_0078;
    pub const REQUEST_PAYLOAD: u32 = 0x42_0079;
    pub const RESPONSE_MESSAGE: u32 = 0x42_007b;
    pub const RESPONSE_PAYLOAD: u32 = 0x42_007c;
    pub const RESULT_MESSAGE: u32 = 0x42_007d;
    pub const RESULT_REASON: u32 = 0x42_007e;
    pub const RESULT_STATUS: u32 = 0x42_007f;
    pub const REVOCATION_REASON: u32 = 0x42_0081;
    pub const REVOCATION_REASON_CODE: u32 = 0x42_0082;
    pub const STORAGE_STATUS_MASK: u32 = 0x42_008e;
    pub const SYMMETRIC_KEY: u32 = 0x42_008f;
    pub const TEMPLATE_ATTRIBUTE: u32 = 0x42_0091;
    pub const UNIQUE_IDENTIFIER: u32 = 0x42_0094;
}

const SYMMETRIC_KEY_OBJECT: u32 = 2;
const AES: u32 = 3;
const RAW: u32 = 1;
/// On-line and archival storage: what was archived is no reason to make another key.
const ANYWHERE: i32 = 1 | 2;
const UNINTERPRETED_TEXT: u32 = 1;
/// Encrypt and Decrypt.
const USAGE: i32 = 4 | 8;
/// The attribute that applications keep what they like in (section 3.36).
const APPLICATION: &str = "Application Specific Information";
const CESSATION_OF_OPERATION: u32 = 6;

/// The group that all of volcrypt's keys are in.
const GROUP: &str = "volcrypt";
/// The namespace of what is kept beside a key: see [`crate::keys::Description`].
const DESCRIPTION: &str = "volcrypt-volume";

/// What a new key is to be called, and what is to be kept beside it.
pub struct Label<'a> {
    /// Its name.
    pub name: &'a str,
    /// The volume whose key it is.
    pub volume: &'a str,
    /// What other hosts have to know of the volume.
    pub description: &'a str,
}

/// A version of the protocol. 1.0 to 1.4 are alike in what is used here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Version {
    /// 1.
    pub major: i32,
    /// 0 to 4.
    pub minor: i32,
}

/// The versions that are spoken here, the preferred one first.
pub const VERSIONS: [Version; 5] = [version(4), version(3), version(2), version(1), version(0)];

const fn version(minor: i32) -> Version {
    Version { major: 1, minor }
}

/// An operation (section 9.1.3.2.27).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Operation {
    /// Hand a key to the server.
    Register = 0x03,
    /// Find objects by their attributes.
    Locate = 0x08,
    /// Have an object handed out.
    Get = 0x0a,
    /// Ask what is known of an object.
    GetAttributes = 0x0b,
    /// Allow an object's use.
    Activate = 0x12,
    /// End an object's use, which has to come before its end.
    Revoke = 0x13,
    /// End an object.
    Destroy = 0x14,
    /// Ask for the versions that the server speaks; since KMIP 1.1.
    DiscoverVersions = 0x1e,
}

/// An encoded request, wiped when dropped.
pub struct Request {
    /// What it asks for.
    pub operation: Operation,
    /// The longest answer that is taken, in bytes.
    pub longest_answer: usize,
    payload: Zeroizing<Vec<u8>>,
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

fn attribute(writer: &mut Writer<'_>, name: &str, value: impl FnOnce(&mut Writer<'_>)) {
    writer.structure(tag::ATTRIBUTE, |attribute| {
        attribute.text(tag::ATTRIBUTE_NAME, name);
        value(attribute);
    });
}

fn name_value(writer: &mut Writer<'_>, name: &str) {
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
    let mut application = |index, namespace, data| {
        attribute(template, APPLICATION, |value| {
            // What can be there more than once is numbered (section 2.1.1).
            value.integer(tag::ATTRIBUTE_INDEX, index);
            value.structure(tag::ATTRIBUTE_VALUE, |value| {
                value.text(tag::APPLICATION_NAMESPACE, namespace);
                value.text(tag::APPLICATION_DATA, data);
            });
        });
    };
    application(0, GROUP, label.volume);
    application(1, DESCRIPTION, label.description);
}

/// The state of an object (section 9.1.3.2.18).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// It was made and not yet activated.
    PreActive,
    /// It can be used.
    Active,
    /// It was revoked, or its time is over.
    Revoked,
    /// It was destroyed; the server only remembers it.
    Destroyed,
}

/// What is known of a key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attributes {
    /// Its names.
    pub names: Vec<String>,
    /// Its state.
    pub state: State,
    /// When the server first had it, in seconds since 1970-01-01 UTC.
    pub initial_date: i64,
    /// Its length in bits.
    pub bits: i32,
    /// The volume it was made for, if volcrypt made it.
    pub volume: Option<String>,
    /// What is kept beside it of that volume.
    pub description: Option<String>,
}

/// Why the server refused (section 9.1.3.2.29).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// The number of the result's reason; 0 if the server gave none.
    pub reason: u32,
    /// What it said besides, in its own words.
    pub message: String,
}

impl Failure {
    /// There is no such object.
    pub const ITEM_NOT_FOUND: u32 = 0x01;
    /// The client could not prove who it is.
    pub const AUTHENTICATION_NOT_SUCCESSFUL: u32 = 0x03;
    /// The client may not do that.
    pub const PERMISSION_DENIED: u32 = 0x0c;
}

const ANOTHER_OBJECT: Malformed = Malformed("it is another object than was asked for");
const NO_SYMMETRIC_KEY: Malformed = Malformed("it is no symmetric key");

/// A server's answer, wiped when dropped.
pub struct Answer {
    message: Zeroizing<Vec<u8>>,
}

impl Answer {
    /// An answer that was received whole.
    pub fn new(message: Zeroizing<Vec<u8>>) -> Self {
        Answer { message }
    }

    /// Whether the server did what `operation` asks for, or why not.
    ///
    /// # Errors
    /// When it is no answer to `operation`.
    pub fn outcome(&self, operation: Operation) -> Result<Result<(), Failure>, Malformed> {
        let item = self.item()?;
        // A message that could not be read is answered without its operation.
        let said = item.find(tag::OPERATION)?.map(|said| said.enumeration()).transpose()?;
        match item.get(tag::RESULT_STATUS)?.enumeration()? {
            0 if said == Some(operation as u32) => Ok(Ok(())),
            1 if said.is_none_or(|said| said == operation as u32) => {
                let reason = item.find(tag::RESULT_REASON)?.map(|reason| reason.enumeration()).transpose()?;
                let message = item.find(tag::RESULT_MESSAGE)?.map(|message| message.text()).transpose()?;
                let message = message.unwrap_or_default().chars().take(LONGEST_WORDS).collect();
                Ok(Err(Failure { reason: reason.unwrap_or(0), message }))
            }
            0 | 1 => Err(Malformed("the answer is to another question")),
            _ => Err(Malformed("the server puts the answer off, which it was not allowed to")),
        }
    }

    /// The versions that the server speaks.
    ///
    /// # Errors
    /// When the answer holds none that make sense.
    pub fn versions(&self) -> Result<Vec<Version>, Malformed> {
        let versions = self.payload()?.items()?.map(|item| {
            let item = item?;
            let number = |tag| item.get(tag)?.integer();
            Ok(Version { major: number(tag::PROTOCOL_VERSION_MAJOR)?, minor: number(tag::PROTOCOL_VERSION_MINOR)? })
        });
        versions.collect()
    }

    /// The identifiers that the answer names: of what was found, or was made.
    ///
    /// # Errors
    /// When they are no texts.
    pub fn identifiers(&self) -> Result<Vec<String>, Malformed> {
        // Without any, some servers leave the payload out.
        let Some(payload) = self.item()?.find(tag::RESPONSE_PAYLOAD)? else { return Ok(Vec::new()) };
        let mut identifiers = Vec::new();
        for item in payload.items()? {
            let item = item?;
            if item.tag == tag::UNIQUE_IDENTIFIER {
                identifiers.push(item.text()?.to_owned());
            }
        }
        Ok(identifiers)
    }

    /// What is known of the symmetric key `identifier`.
    ///
    /// # Errors
    /// When it is another object, or its state, date or length is missing or makes no sense.
    pub fn attributes(&self, identifier: &str) -> Result<Attributes, Malformed> {
        let (mut state, mut initial_date, mut bits) = (None, None, None);
        let (mut volume, mut description, mut names) = (None, None, Vec::new());
        if self.payload()?.get(tag::UNIQUE_IDENTIFIER)?.text()? != identifier {
            return Err(ANOTHER_OBJECT);
        }
        for item in self.payload()?.items()? {
            let item = item?;
            if item.tag != tag::ATTRIBUTE {
                continue;
            }
            // An attribute that was asked for and is not set may come without a value.
            let Some(value) = item.find(tag::ATTRIBUTE_VALUE)? else { continue };
            match item.get(tag::ATTRIBUTE_NAME)?.text()? {
                "Name" => names.push(value.get(tag::NAME_VALUE)?.text()?.to_owned()),
                "Object Type" if value.enumeration()? != SYMMETRIC_KEY_OBJECT => return Err(NO_SYMMETRIC_KEY),
                "State" => state = Some(read_state(value.enumeration()?)?),
                "Initial Date" => initial_date = Some(value.date_time()?),
                "Cryptographic Length" => bits = Some(value.integer()?),
                APPLICATION => {
                    let data = value.get(tag::APPLICATION_DATA)?.text()?;
                    match value.get(tag::APPLICATION_NAMESPACE)?.text()? {
                        GROUP => volume = Some(data.to_owned()),
                        DESCRIPTION => description = Some(data.to_owned()),
                        _ => {}
                    }
                }
                _ => {}
            }
        }
        match (state, initial_date, bits) {
            (Some(state), Some(initial_date), Some(bits)) => {
                Ok(Attributes { names, state, initial_date, bits, volume, description })
            }
            _ => Err(Malformed("the key's state, date or length is missing")),
        }
    }

    /// The bytes of the symmetric key `identifier`, as they stand in the answer.
    ///
    /// # Errors
    /// When it is another object, is wrapped, or is not in the raw format.
    pub fn key(&self, identifier: &str) -> Result<&[u8], Malformed> {
        let payload = self.payload()?;
        if payload.get(tag::UNIQUE_IDENTIFIER)?.text()? != identifier {
            return Err(ANOTHER_OBJECT);
        }
        if payload.get(tag::OBJECT_TYPE)?.enumeration()? != SYMMETRIC_KEY_OBJECT {
            return Err(NO_SYMMETRIC_KEY);
        }
        let block = payload.get(tag::SYMMETRIC_KEY)?.get(tag::KEY_BLOCK)?;
        if block.find(tag::KEY_WRAPPING_DATA)?.is_some() {
            return Err(Malformed("the key is wrapped by another one"));
        }
        if block.get(tag::KEY_FORMAT_TYPE)?.enumeration()? != RAW {
            return Err(Malformed("the key is not in the raw format"));
        }
        if let Some(algorithm) = block.find(tag::CRYPTOGRAPHIC_ALGORITHM)?
            && algorithm.enumeration()? != AES
        {
            return Err(Malformed("the key is for another algorithm than AES"));
        }
        block.get(tag::KEY_VALUE)?.get(tag::KEY_MATERIAL)?.bytes()
    }

    fn payload(&self) -> Result<Item<'_>, Malformed> {
        self.item()?.get(tag::RESPONSE_PAYLOAD)
    }

    fn item(&self) -> Result<Item<'_>, Malformed> {
        let message = Item::parse(&self.message)?;
        match message.tag {
            tag::RESPONSE_MESSAGE => message.get(tag::BATCH_ITEM),
            _ => Err(Malformed("it is no answer")),
        }
    }
}

fn read_state(number: u32) -> Result<State, Malformed> {
    match number {
        1 => Ok(State::PreActive),
        2 => Ok(State::Active),
        // Deactivated, compromised.
        3 | 4 => Ok(State::Revoked),
        // Destroyed, destroyed compromised.
        5 | 6 => Ok(State::Destroyed),
        _ => Err(Malformed("the key has a state that KMIP does not know")),
    }
}

#[cfg(test)]
mod tests;
