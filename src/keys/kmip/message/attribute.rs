//! Attributes, which KMIP writes in two ways: to 1.4 each has its name in words (KMIP 1.4, sections 2.1.1 and 3), since
//! 2.0 it has a tag of its own (KMIP 2.0, section 4).

use std::fmt;

use super::{AES, GROUP, SYMMETRIC_KEY_OBJECT, USAGE, Version, tag};
use crate::keys::kmip::ttlv::{Item, Malformed, Writer};
use crate::policy::KeySize;

const UNINTERPRETED_TEXT: u32 = 1;

/// The attributes that mean something here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// What it is called.
    Name,
    /// What it is.
    ObjectType,
    /// Whether it can be used.
    State,
    /// When the server first had it.
    InitialDate,
    /// What a key is for.
    Algorithm,
    /// How many bits a key has.
    Length,
    /// What may be done with a key.
    Usage,
    /// What it belongs to.
    Group,
    /// What an application keeps beside it.
    Application,
}

/// Each with its name and its tag.
const KINDS: [(Kind, &str, u32); 9] = [
    (Kind::Name, "Name", tag::NAME),
    (Kind::ObjectType, "Object Type", tag::OBJECT_TYPE),
    (Kind::State, "State", tag::STATE),
    (Kind::InitialDate, "Initial Date", tag::INITIAL_DATE),
    (Kind::Algorithm, "Cryptographic Algorithm", tag::CRYPTOGRAPHIC_ALGORITHM),
    (Kind::Length, "Cryptographic Length", tag::CRYPTOGRAPHIC_LENGTH),
    (Kind::Usage, "Cryptographic Usage Mask", tag::CRYPTOGRAPHIC_USAGE_MASK),
    (Kind::Group, "Object Group", tag::OBJECT_GROUP),
    (Kind::Application, "Application Specific Information", tag::APPLICATION_SPECIFIC_INFORMATION),
];

impl Kind {
    fn entry(self) -> (Kind, &'static str, u32) {
        // They stand in the order in which they are declared, which a test looks at.
        KINDS[self as usize]
    }

    /// Writes that it is asked for.
    pub(super) fn refer(self, writer: &mut Writer<'_>, version: Version) {
        let (_, name, tag) = self.entry();
        match version.has_tagged_attributes() {
            true => writer.enumeration(tag::ATTRIBUTE_REFERENCE, tag),
            false => writer.text(tag::ATTRIBUTE_NAME, name),
        }
    }
}

/// What volcrypt keeps beside a key.
#[derive(Clone, Copy)]
pub(super) struct Kept<'a> {
    /// The volume that it was made for.
    pub volume: &'a str,
    /// What has to be known of that one.
    pub description: Option<&'a str>,
    /// The mark of a host that is about to destroy it.
    pub leaving: Option<&'a str>,
}

/// As it is kept, in one attribute: not every server that has two of a kind can replace the second.
impl fmt::Display for Kept<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.volume)?;
        self.description.into_iter().try_for_each(|description| write!(f, " {description}"))?;
        self.leaving.into_iter().try_for_each(|leaving| write!(f, "\n{leaving}"))
    }
}

/// An attribute with its value.
#[derive(Clone, Copy)]
pub(super) enum Attribute<'a> {
    /// Uninterpreted text.
    Name(&'a str),
    /// A symmetric key.
    SymmetricKey,
    /// Its key is for AES.
    Aes,
    /// The key's length.
    Length(KeySize),
    /// It encrypts and decrypts.
    Usage,
    /// It is one of volcrypt's.
    Group,
    /// What volcrypt keeps beside it.
    Kept(Kept<'a>),
}

impl Attribute<'_> {
    fn kind(&self) -> Kind {
        match self {
            Attribute::Name(_) => Kind::Name,
            Attribute::SymmetricKey => Kind::ObjectType,
            Attribute::Aes => Kind::Algorithm,
            Attribute::Length(_) => Kind::Length,
            Attribute::Usage => Kind::Usage,
            Attribute::Group => Kind::Group,
            Attribute::Kept(_) => Kind::Application,
        }
    }

    fn value(&self, writer: &mut Writer<'_>, tag: u32) {
        match *self {
            Attribute::Name(name) => writer.structure(tag, |value| {
                value.text(tag::NAME_VALUE, name);
                value.enumeration(tag::NAME_TYPE, UNINTERPRETED_TEXT);
            }),
            Attribute::SymmetricKey => writer.enumeration(tag, SYMMETRIC_KEY_OBJECT),
            Attribute::Aes => writer.enumeration(tag, AES),
            // 512 at most.
            Attribute::Length(size) => writer.integer(tag, size.bits() as i32),
            Attribute::Usage => writer.integer(tag, USAGE),
            Attribute::Group => writer.text(tag, GROUP),
            Attribute::Kept(kept) => writer.structure(tag, |value| {
                value.text(tag::APPLICATION_NAMESPACE, GROUP);
                value.text(tag::APPLICATION_DATA, &kept.to_string());
            }),
        }
    }

    fn named(&self, writer: &mut Writer<'_>) {
        writer.structure(tag::ATTRIBUTE, |attribute| {
            attribute.text(tag::ATTRIBUTE_NAME, self.kind().entry().1);
            self.value(attribute, tag::ATTRIBUTE_VALUE);
        });
    }

    fn tagged(&self, writer: &mut Writer<'_>) {
        self.value(writer, self.kind().entry().2);
    }
}

/// Writes those that a new object is to have.
pub(super) fn set(writer: &mut Writer<'_>, version: Version, attributes: &[Attribute<'_>]) {
    match version.has_tagged_attributes() {
        true => search(writer, version, attributes),
        false => writer.structure(tag::TEMPLATE_ATTRIBUTE, |template| search(template, version, attributes)),
    }
}

/// Writes those that an object has to have that is looked for.
pub(super) fn search(writer: &mut Writer<'_>, version: Version, attributes: &[Attribute<'_>]) {
    match version.has_tagged_attributes() {
        true => writer.structure(tag::ATTRIBUTES, |all| {
            attributes.iter().for_each(|attribute| attribute.tagged(all));
        }),
        false => attributes.iter().for_each(|attribute| attribute.named(writer)),
    }
}

/// Writes that `new` is to take the place of `old`, which is the only one of its kind.
pub(super) fn replace(writer: &mut Writer<'_>, version: Version, old: &Attribute<'_>, new: &Attribute<'_>) {
    match version.has_tagged_attributes() {
        true => {
            writer.structure(tag::CURRENT_ATTRIBUTE, |current| old.tagged(current));
            writer.structure(tag::NEW_ATTRIBUTE, |replaced| new.tagged(replaced));
        }
        false => new.named(writer),
    }
}

/// Calls `each` with the attributes in the `payload` of an answer that mean something here, and their values.
///
/// # Errors
/// Those of `each`, and when they are not written as `version` has it.
pub(super) fn read<'a>(
    payload: Item<'a>,
    version: Version,
    mut each: impl FnMut(Kind, Item<'a>) -> Result<(), Malformed>,
) -> Result<(), Malformed> {
    let tagged = version.has_tagged_attributes();
    let all = if tagged { payload.get(tag::ATTRIBUTES)? } else { payload };
    for item in all.items()? {
        let item = item?;
        let (known, value) = if tagged {
            (KINDS.iter().find(|(_, _, tag)| *tag == item.tag), Some(item))
        } else if item.tag == tag::ATTRIBUTE {
            let name = item.get(tag::ATTRIBUTE_NAME)?.text()?;
            // One that was asked for and is not set may come without a value.
            (KINDS.iter().find(|(_, known, _)| *known == name), item.find(tag::ATTRIBUTE_VALUE)?)
        } else {
            continue;
        };
        if let (Some((kind, ..)), Some(value)) = (known, value) {
            each(*kind, value)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_has_its_own_name_and_tag() {
        for (place, (kind, name, tag)) in KINDS.into_iter().enumerate() {
            assert_eq!(kind.entry(), (kind, name, tag));
            assert_eq!(kind as usize, place);
            assert_eq!(KINDS.iter().filter(|(_, other, of)| *other == name || *of == tag).count(), 1, "{name}");
        }
    }
}
