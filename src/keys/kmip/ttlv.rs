//! KMIP's encoding, TTLV: tag, type, length, value (KMIP 1.4, section 9.1).
//!
//! A value is padded with zeros to a multiple of eight bytes. Every length is held against what is there before
//! anything is read, nothing is copied, and structures are entered only when they are asked for, so no input makes
//! this recurse.

use std::fmt;

/// What is wrong with an encoded message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Malformed(pub &'static str);

impl fmt::Display for Malformed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0)
    }
}

/// The type of an item (KMIP 1.4, section 9.1.1.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// Items within an item.
    Structure = 1,
    /// 32 bits, signed.
    Integer = 2,
    /// 64 bits, signed.
    LongInteger = 3,
    /// Any multiple of 64 bits, signed.
    BigInteger = 4,
    /// 32 bits that stand for something.
    Enumeration = 5,
    /// 64 bits, 0 or 1.
    Boolean = 6,
    /// UTF-8.
    TextString = 7,
    /// Bytes.
    ByteString = 8,
    /// Seconds since 1970-01-01 UTC, 64 bits.
    DateTime = 9,
    /// Seconds, 32 bits.
    Interval = 10,
}

/// The bytes in front of a value.
pub const HEADER: usize = 8;

/// One item of a message.
#[derive(Clone, Copy)]
pub struct Item<'a> {
    /// What it is, 24 bits.
    pub tag: u32,
    kind: Kind,
    value: &'a [u8],
}

impl<'a> Item<'a> {
    /// The item that `bytes` are, all of them.
    ///
    /// # Errors
    /// When they are not exactly one item.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, Malformed> {
        let mut items = Items { rest: bytes };
        match (items.next(), items.rest) {
            (Some(item), []) => item,
            (Some(Err(error)), _) => Err(error),
            (Some(_), _) => Err(Malformed("something follows the message")),
            (None, _) => Err(Malformed("the message is empty")),
        }
    }

    /// The items in this structure.
    ///
    /// # Errors
    /// When it is none.
    pub fn items(&self) -> Result<Items<'a>, Malformed> {
        self.expect(Kind::Structure)?;
        Ok(Items { rest: self.value })
    }

    /// The first item with `tag` in this structure.
    ///
    /// # Errors
    /// When this is no structure, or what stands before the item is malformed.
    pub fn find(&self, tag: u32) -> Result<Option<Item<'a>>, Malformed> {
        for item in self.items()? {
            let item = item?;
            if item.tag == tag {
                return Ok(Some(item));
            }
        }
        Ok(None)
    }

    /// As [`Item::find`], for an item that has to be there.
    ///
    /// # Errors
    /// When it is not, and those of [`Item::find`].
    pub fn get(&self, tag: u32) -> Result<Item<'a>, Malformed> {
        self.find(tag)?.ok_or(Malformed("a part that KMIP requires is missing"))
    }

    /// An integer.
    ///
    /// # Errors
    /// When it is of another type.
    pub fn integer(&self) -> Result<i32, Malformed> {
        self.expect(Kind::Integer)?;
        self.word().map(|word| word as i32)
    }

    /// An enumeration.
    ///
    /// # Errors
    /// When it is of another type.
    pub fn enumeration(&self) -> Result<u32, Malformed> {
        self.expect(Kind::Enumeration)?;
        self.word()
    }

    /// A point in time, in seconds since 1970-01-01 UTC.
    ///
    /// # Errors
    /// When it is of another type.
    pub fn date_time(&self) -> Result<i64, Malformed> {
        self.expect(Kind::DateTime)?;
        self.value.try_into().map(i64::from_be_bytes).map_err(|_| WRONG_LENGTH)
    }

    /// A text.
    ///
    /// # Errors
    /// When it is of another type, or no UTF-8.
    pub fn text(&self) -> Result<&'a str, Malformed> {
        self.expect(Kind::TextString)?;
        std::str::from_utf8(self.value).map_err(|_| Malformed("a text is not UTF-8"))
    }

    /// Bytes.
    ///
    /// # Errors
    /// When it is of another type.
    pub fn bytes(&self) -> Result<&'a [u8], Malformed> {
        self.expect(Kind::ByteString)?;
        Ok(self.value)
    }

    fn expect(&self, kind: Kind) -> Result<(), Malformed> {
        match self.kind == kind {
            true => Ok(()),
            false => Err(Malformed("a part has another type than KMIP says")),
        }
    }

    fn word(&self) -> Result<u32, Malformed> {
        self.value.try_into().map(u32::from_be_bytes).map_err(|_| WRONG_LENGTH)
    }
}

const WRONG_LENGTH: Malformed = Malformed("a part has another length than its type");

/// The items of a structure, in order. After an error there are no more.
#[derive(Clone)]
pub struct Items<'a> {
    rest: &'a [u8],
}

impl<'a> Iterator for Items<'a> {
    type Item = Result<Item<'a>, Malformed>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.rest.is_empty() {
            return None;
        }
        let item = split(self.rest);
        self.rest = item.as_ref().map_or(&[], |(_, rest)| rest);
        Some(item.map(|(item, _)| item))
    }
}

/// The first item of `bytes`, and what follows it.
fn split(bytes: &[u8]) -> Result<(Item<'_>, &[u8]), Malformed> {
    let (header, rest) = bytes.split_first_chunk::<HEADER>().ok_or(Malformed("a part is cut off"))?;
    let [t0, t1, t2, kind, l0, l1, l2, l3] = *header;
    let tag = u32::from_be_bytes([0, t0, t1, t2]);
    let length = u32::from_be_bytes([l0, l1, l2, l3]) as usize;
    let kind = match kind {
        1 => Kind::Structure,
        2 => Kind::Integer,
        3 => Kind::LongInteger,
        4 => Kind::BigInteger,
        5 => Kind::Enumeration,
        6 => Kind::Boolean,
        7 => Kind::TextString,
        8 => Kind::ByteString,
        9 => Kind::DateTime,
        10 => Kind::Interval,
        _ => return Err(Malformed("a part has a type that KMIP does not know")),
    };
    let fits = match kind {
        Kind::Integer | Kind::Enumeration | Kind::Interval => length == 4,
        Kind::LongInteger | Kind::Boolean | Kind::DateTime => length == 8,
        Kind::Structure | Kind::BigInteger => length.is_multiple_of(8),
        Kind::TextString | Kind::ByteString => true,
    };
    if !fits {
        return Err(WRONG_LENGTH);
    }
    let padded = length.checked_next_multiple_of(8).ok_or(WRONG_LENGTH)?;
    if padded > rest.len() {
        return Err(Malformed("a part is longer than what it stands in"));
    }
    let (value, rest) = rest.split_at(padded);
    let (value, padding) = value.split_at(length);
    match padding.iter().all(|&byte| byte == 0) {
        true => Ok((Item { tag, kind, value }, rest)),
        false => Err(Malformed("a part is padded with something else than zeros")),
    }
}

/// The length of the whole message that begins with `header`.
///
/// # Errors
/// When it is no structure with `tag`, or would be longer than `longest` bytes.
pub fn message_length(header: [u8; HEADER], tag: u32, longest: usize) -> Result<usize, Malformed> {
    let [t0, t1, t2, kind, l0, l1, l2, l3] = header;
    if u32::from_be_bytes([0, t0, t1, t2]) != tag || kind != Kind::Structure as u8 {
        return Err(Malformed("it is no KMIP message"));
    }
    let length = u32::from_be_bytes([l0, l1, l2, l3]) as usize;
    match length.checked_add(HEADER) {
        Some(whole) if whole <= longest => Ok(whole),
        _ => Err(Malformed("the message is too long")),
    }
}

/// Writes items one after the other into `room`, whose space is set aside before so that no secret is left behind in
/// memory that was grown out of.
pub struct Writer<'a> {
    room: &'a mut Vec<u8>,
}

impl<'a> Writer<'a> {
    /// A writer behind what stands in `room`.
    pub fn new(room: &'a mut Vec<u8>) -> Self {
        Writer { room }
    }

    /// A structure with what `fill` writes.
    pub fn structure(&mut self, tag: u32, fill: impl FnOnce(&mut Writer<'_>)) {
        let start = self.room.len();
        self.header(tag, Kind::Structure, 0);
        fill(&mut Writer { room: self.room });
        let length = self.room.len() - start - HEADER;
        // Nothing that is written here comes near 4 GiB.
        self.room[start + 4..start + HEADER].copy_from_slice(&(length as u32).to_be_bytes());
    }

    /// An integer.
    pub fn integer(&mut self, tag: u32, value: i32) {
        self.value(tag, Kind::Integer, &value.to_be_bytes());
    }

    /// An enumeration.
    pub fn enumeration(&mut self, tag: u32, value: u32) {
        self.value(tag, Kind::Enumeration, &value.to_be_bytes());
    }

    /// A text.
    pub fn text(&mut self, tag: u32, value: &str) {
        self.value(tag, Kind::TextString, value.as_bytes());
    }

    /// Bytes.
    pub fn bytes(&mut self, tag: u32, value: &[u8]) {
        self.value(tag, Kind::ByteString, value);
    }

    /// A point in time, in seconds since 1970-01-01 UTC.
    #[cfg(test)]
    pub fn date_time(&mut self, tag: u32, value: i64) {
        self.value(tag, Kind::DateTime, &value.to_be_bytes());
    }

    /// An item that is encoded already.
    pub fn encoded(&mut self, item: &[u8]) {
        self.room.extend_from_slice(item);
    }

    fn value(&mut self, tag: u32, kind: Kind, value: &[u8]) {
        self.header(tag, kind, value.len());
        self.room.extend_from_slice(value);
        let padded = self.room.len() + (value.len().next_multiple_of(8) - value.len());
        self.room.resize(padded, 0);
    }

    fn header(&mut self, tag: u32, kind: Kind, length: usize) {
        let [_, t0, t1, t2] = tag.to_be_bytes();
        self.room.extend_from_slice(&[t0, t1, t2, kind as u8]);
        self.room.extend_from_slice(&(length as u32).to_be_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn written(fill: impl FnOnce(&mut Writer<'_>)) -> Vec<u8> {
        let mut room = Vec::new();
        fill(&mut Writer::new(&mut room));
        room
    }

    /// The examples of KMIP 1.4, section 9.1.2.
    #[test]
    fn the_specifications_examples_are_read_and_written() {
        let integer = [0x42, 0, 0x20, 2, 0, 0, 0, 4, 0, 0, 0, 8, 0, 0, 0, 0];
        assert_eq!(written(|writer| writer.integer(0x42_0020, 8)), integer);
        assert_eq!(Item::parse(&integer).unwrap().integer(), Ok(8));
        let enumeration = [0x42, 0, 0x20, 5, 0, 0, 0, 4, 0, 0, 0, 0xff, 0, 0, 0, 0];
        assert_eq!(written(|writer| writer.enumeration(0x42_0020, 255)), enumeration);
        let text = b"\x42\x00\x20\x07\x00\x00\x00\x0bHello World\0\0\0\0\0";
        assert_eq!(written(|writer| writer.text(0x42_0020, "Hello World")), text);
        assert_eq!(Item::parse(text).unwrap().text(), Ok("Hello World"));
        let bytes = b"\x42\x00\x20\x08\x00\x00\x00\x03\x01\x02\x03\0\0\0\0\0";
        assert_eq!(written(|writer| writer.bytes(0x42_0020, &[1, 2, 3])), bytes);
        let date = b"\x42\x00\x20\x09\x00\x00\x00\x08\x00\x00\x00\x00\x47\xda\x67\xf8";
        assert_eq!(Item::parse(date).unwrap().date_time(), Ok(0x47da_67f8));
        let structure =
            b"\x42\x00\x20\x01\x00\x00\x00\x20\x42\x00\x04\x05\x00\x00\x00\x04\x00\x00\x00\xfe\x00\x00\x00\x00\
                          \x42\x00\x05\x02\x00\x00\x00\x04\x00\x00\x00\xff\x00\x00\x00\x00";
        let made = written(|writer| {
            writer.structure(0x42_0020, |writer| {
                writer.enumeration(0x42_0004, 254);
                writer.integer(0x42_0005, 255);
            });
        });
        assert_eq!(made, structure);
        assert_eq!(Item::parse(structure).unwrap().get(0x42_0005).unwrap().integer(), Ok(255));
    }

    #[test]
    fn what_is_cut_off_too_long_or_of_another_type_is_malformed() {
        let whole = written(|writer| writer.structure(0x42_007b, |writer| writer.bytes(0x42_0043, &[7; 20])));
        for length in 0..whole.len() {
            assert!(Item::parse(&whole[..length]).is_err(), "{length}");
        }
        let malformed = |change: &dyn Fn(&mut Vec<u8>)| {
            let mut bytes = whole.clone();
            change(&mut bytes);
            let item = Item::parse(&bytes).and_then(|item| item.get(0x42_0043)?.bytes());
            item.expect_err("must be refused").0
        };
        assert_eq!(malformed(&|bytes| bytes.extend([0; 8])), "something follows the message");
        assert_eq!(malformed(&|bytes| bytes[10] = 0x44), "a part that KMIP requires is missing");
        assert_eq!(malformed(&|bytes| bytes[4] = 0xff), "a part is longer than what it stands in");
        assert_eq!(malformed(&|bytes| bytes[12] = 0xff), "a part is longer than what it stands in");
        assert_eq!(malformed(&|bytes| bytes[11] = 7), "a part has another type than KMIP says");
        assert_eq!(malformed(&|bytes| bytes[11] = 11), "a part has a type that KMIP does not know");
        assert_eq!(malformed(&|bytes| bytes[11] = 2), "a part has another length than its type");
        assert_eq!(
            malformed(&|bytes| *bytes.last_mut().unwrap() = 1),
            "a part is padded with something else than zeros"
        );
    }

    #[test]
    fn a_message_has_a_length_that_is_believed_up_to_a_limit() {
        let header = |length: u32| {
            let mut header = [0x42, 0, 0x7b, 1, 0, 0, 0, 0];
            header[4..].copy_from_slice(&length.to_be_bytes());
            header
        };
        assert_eq!(message_length(header(92), 0x42_007b, 100), Ok(100));
        for length in [93, u32::MAX, u32::MAX - 7] {
            assert_eq!(message_length(header(length), 0x42_007b, 100), Err(Malformed("the message is too long")));
        }
        assert!(message_length(*b"HTTP/1.1", 0x42_007b, 100).is_err());
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_reader_fail(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            fn walk(item: Item<'_>, depth: usize) {
                let _ = (item.integer(), item.enumeration(), item.date_time(), item.text(), item.bytes());
                if depth < 20 && let Ok(items) = item.items() {
                    items.flatten().for_each(|item| walk(item, depth + 1));
                }
            }
            if let Ok(item) = Item::parse(&bytes) {
                walk(item, 0);
            }
        }
    }
}
