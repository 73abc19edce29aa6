//! What a server says: KMIP 1.4, sections 4 (operations) and 7 (messages).

use zeroize::Zeroizing;

use super::attribute::{self, Kind};
use super::{
    AES, ENCRYPT, GROUP, NIST_KEY_WRAP, NO_ENCODING, Operation, RAW, SYMMETRIC_KEY_OBJECT, State, Version, WRAP_KEY,
    tag,
};
use crate::keys::kmip::ttlv::{Item, Malformed};

/// The longest of what a server says in words, in characters.
const LONGEST_WORDS: usize = 200;

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
    /// The mark of the host that is about to destroy it, which stands behind the rest, after a line break.
    pub leaving: Option<String>,
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
    /// There was such an object, and it was destroyed; since KMIP 2.0.
    pub const OBJECT_DESTROYED: u32 = 0x36;
    /// There is no such object; since KMIP 2.0.
    pub const OBJECT_NOT_FOUND: u32 = 0x37;
    /// The client may not do that; since KMIP 2.0.
    pub const NOT_AUTHORISED: u32 = 0x39;

    /// Whether there is no such object. One that was destroyed and is remembered is none of these.
    pub fn is_not_found(&self) -> bool {
        matches!(self.reason, Failure::ITEM_NOT_FOUND | Failure::OBJECT_NOT_FOUND)
    }

    /// Whether this host may not do what it has asked for.
    pub fn is_not_allowed(&self) -> bool {
        matches!(
            self.reason,
            Failure::AUTHENTICATION_NOT_SUCCESSFUL | Failure::PERMISSION_DENIED | Failure::NOT_AUTHORISED
        )
    }
}

const ANOTHER_OBJECT: Malformed = Malformed("it is another object than was asked for");
/// The lengths of wrapped keys of 128, 256 and 512 bits, in bytes.
const WRAPPED_LENGTHS: [usize; 3] = [16 + 8, 32 + 8, 64 + 8];
const NO_SYMMETRIC_KEY: Malformed = Malformed("it is no symmetric key");

/// A server's answer, wiped when dropped.
pub struct Answer {
    message: Zeroizing<Vec<u8>>,
    version: Version,
}

impl Answer {
    /// An answer in the protocol's `version` that was received whole.
    pub fn new(message: Zeroizing<Vec<u8>>, version: Version) -> Self {
        Answer { message, version }
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
        let (mut volume, mut description, mut leaving, mut names) = (None, None, None, Vec::new());
        let payload = self.payload_about(identifier)?;
        attribute::read(payload, self.version, |kind, value| {
            match kind {
                Kind::Name => names.push(value.get(tag::NAME_VALUE)?.text()?.to_owned()),
                Kind::ObjectType if value.enumeration()? != SYMMETRIC_KEY_OBJECT => return Err(NO_SYMMETRIC_KEY),
                Kind::State => state = Some(read_state(value.enumeration()?)?),
                Kind::InitialDate => initial_date = Some(value.date_time()?),
                Kind::Length => bits = Some(value.integer()?),
                Kind::Application if value.get(tag::APPLICATION_NAMESPACE)?.text()? == GROUP => {
                    let kept = value.get(tag::APPLICATION_DATA)?.text()?;
                    // No description has a line break in it, and no volume a space in its id.
                    let (kept, mark) = kept.split_once('\n').map_or((kept, None), |(kept, mark)| (kept, Some(mark)));
                    let (of, said) = kept.split_once(' ').map_or((kept, None), |(of, said)| (of, Some(said)));
                    (volume, description) = (Some(of.to_owned()), said.map(str::to_owned));
                    leaving = mark.map(str::to_owned);
                }
                _ => {}
            }
            Ok(())
        })?;
        match (state, initial_date, bits) {
            (Some(state), Some(initial_date), Some(bits)) => {
                Ok(Attributes { names, state, initial_date, bits, volume, leaving, description })
            }
            _ => Err(Malformed("the key's state, date or length is missing")),
        }
    }

    /// Whether the key `identifier` can be used, and whether others may be wrapped by it.
    ///
    /// # Errors
    /// When it is another object or no symmetric key, or its state or usage is missing or makes no sense.
    pub fn usage(&self, identifier: &str) -> Result<(State, bool), Malformed> {
        let payload = self.payload_about(identifier)?;
        let (mut state, mut wraps) = (None, None);
        attribute::read(payload, self.version, |kind, value| {
            match kind {
                Kind::ObjectType if value.enumeration()? != SYMMETRIC_KEY_OBJECT => return Err(NO_SYMMETRIC_KEY),
                Kind::State => state = Some(read_state(value.enumeration()?)?),
                Kind::Usage => wraps = Some(value.integer()? & WRAP_KEY != 0),
                _ => {}
            }
            Ok(())
        })?;
        state.zip(wraps).ok_or(Malformed("the key's state or usage is missing"))
    }

    /// The bytes of the symmetric key `identifier`, as they stand in the answer.
    ///
    /// # Errors
    /// When it is another object, is wrapped, or is not in the raw format.
    pub fn key(&self, identifier: &str) -> Result<&[u8], Malformed> {
        let block = self.key_block(identifier)?;
        match block.find(tag::KEY_WRAPPING_DATA)? {
            Some(_) => Err(Malformed("the key is wrapped by another one, which nobody has asked for")),
            None => block.get(tag::KEY_VALUE)?.get(tag::KEY_MATERIAL)?.bytes(),
        }
    }

    /// The bytes of the symmetric key `identifier`, wrapped by the key `wrapping_key`, as they stand in the answer.
    ///
    /// # Errors
    /// When it is another object, is not wrapped or in another way than by AES key wrap of its bytes alone, or has a
    /// length that no wrapped key has.
    pub fn wrapped_key(&self, identifier: &str, wrapping_key: &str) -> Result<&[u8], Malformed> {
        let block = self.key_block(identifier)?;
        let wrapping = block.find(tag::KEY_WRAPPING_DATA)?.ok_or(Malformed("the key came in clear"))?;
        if wrapping.get(tag::WRAPPING_METHOD)?.enumeration()? != ENCRYPT {
            return Err(Malformed("the key is protected in another way than by encryption"));
        }
        let by = wrapping.get(tag::ENCRYPTION_KEY_INFORMATION)?;
        if by.get(tag::UNIQUE_IDENTIFIER)?.text()? != wrapping_key {
            return Err(Malformed("the key is wrapped by another one than was asked for"));
        }
        // The server need not repeat it. What is wrapped in another way without a word cannot be unwrapped.
        if let Some(parameters) = by.find(tag::CRYPTOGRAPHIC_PARAMETERS)?
            && let Some(mode) = parameters.find(tag::BLOCK_CIPHER_MODE)?
            && mode.enumeration()? != NIST_KEY_WRAP
        {
            return Err(Malformed("the key is wrapped in another way than was asked for"));
        }
        // Without a word of it, it would be an encoding of the key that is wrapped.
        let encoding = wrapping.find(tag::ENCODING_OPTION)?.map(|option| option.enumeration()).transpose()?;
        if encoding != Some(NO_ENCODING) {
            return Err(Malformed("the key was encoded before it was wrapped"));
        }
        // By the specification it is the value itself (section 2.1.4). PyKMIP leaves it where one in clear would be.
        let value = block.get(tag::KEY_VALUE)?;
        let wrapped = value.bytes().or_else(|_| value.get(tag::KEY_MATERIAL)?.bytes())?;
        match WRAPPED_LENGTHS.contains(&wrapped.len()) {
            true => Ok(wrapped),
            false => Err(Malformed("the key has a length that no wrapped one has")),
        }
    }

    /// What holds the symmetric key `identifier`, which is for AES and in the raw format.
    fn key_block(&self, identifier: &str) -> Result<Item<'_>, Malformed> {
        let payload = self.payload_about(identifier)?;
        if payload.get(tag::OBJECT_TYPE)?.enumeration()? != SYMMETRIC_KEY_OBJECT {
            return Err(NO_SYMMETRIC_KEY);
        }
        let block = payload.get(tag::SYMMETRIC_KEY)?.get(tag::KEY_BLOCK)?;
        if block.get(tag::KEY_FORMAT_TYPE)?.enumeration()? != RAW {
            return Err(Malformed("the key is not in the raw format"));
        }
        if let Some(algorithm) = block.find(tag::CRYPTOGRAPHIC_ALGORITHM)?
            && algorithm.enumeration()? != AES
        {
            return Err(Malformed("the key is for another algorithm than AES"));
        }
        Ok(block)
    }

    /// The payload, if it is about the object `identifier`.
    fn payload_about(&self, identifier: &str) -> Result<Item<'_>, Malformed> {
        let payload = self.payload()?;
        match payload.get(tag::UNIQUE_IDENTIFIER)?.text()? == identifier {
            true => Ok(payload),
            false => Err(ANOTHER_OBJECT),
        }
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
