//! The vital product data (VPD) pages by which a SCSI device tells what it is.
//!
//! Source: SPC-4 (INCITS 513), 7.8 "Vital product data parameters", in it "Device Identification VPD page"
//! with its designator formats and "Unit Serial Number VPD page". The bytes are the storage server's word and
//! may be anything.

use std::fmt;

use serde::{Deserialize, Serialize};

/// The header of every page: peripheral device type, page code, and the length of what follows.
const HEADER: usize = 4;
/// What stands before each designator: code set, association and type, a reserved byte, the length.
const DESIGNATOR_HEADER: usize = 4;
/// The longest page: its length has 16 bits.
pub const PAGE_LIMIT: usize = HEADER + u16::MAX as usize;

/// One designator of page 0x83.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Designator {
    /// What it designates.
    pub association: Association,
    /// In which form.
    pub kind: DesignatorKind,
    /// The designator as text, in the kernel's notation where it has one: `naa.6001405…`,
    /// `eui.…`, `t10.…`; digits where it is none.
    pub value: String,
}

/// What a designator belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Association {
    /// The volume itself.
    LogicalUnit,
    /// The port of the storage server it was reached through.
    TargetPort,
    /// The storage server.
    TargetDevice,
    /// A value that the standard reserves.
    Reserved,
}

/// The form of a designator.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DesignatorKind {
    /// A vendor's name and what the vendor appends to it.
    T10Vendor,
    /// An IEEE extended unique identifier.
    Eui64,
    /// A name of the Network Address Authority's formats.
    Naa,
    /// A SCSI name string.
    Name,
    /// Anything else, or one of these that is not as the standard has it.
    Other,
}

/// Why a page cannot be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MalformedPage(String);

impl Designator {
    /// Whether it tells this volume from every other in the world: it is the logical unit's own, and
    /// of a form that is unique by construction.
    pub fn identifies_volume(&self) -> bool {
        self.association == Association::LogicalUnit && self.kind != DesignatorKind::Other
    }
}

/// The designators of page 0x83, in the page's order.
///
/// # Errors
/// When it is another page, or its lengths do not fit its bytes.
pub fn designators(page: &[u8]) -> Result<Vec<Designator>, MalformedPage> {
    let mut rest = body(page, 0x83)?;
    let mut designators = Vec::new();
    while !rest.is_empty() {
        let position = page.len() - rest.len();
        let cut_off = || MalformedPage(format!("VPD page 0x83 is cut off in the designator at byte {position}"));
        let (header, after) = rest.split_first_chunk::<DESIGNATOR_HEADER>().ok_or_else(cut_off)?;
        let (value, after) = after.split_at_checked(header[3].into()).ok_or_else(cut_off)?;
        designators.push(designator(header, value));
        rest = after;
    }
    Ok(designators)
}

/// The unit serial number in page 0x80, without the padding; nothing if it is blank.
///
/// # Errors
/// When it is another page, or its length does not fit its bytes.
pub fn unit_serial(page: &[u8]) -> Result<Option<String>, MalformedPage> {
    Ok(Some(text(body(page, 0x80)?)).filter(|serial| !serial.is_empty()))
}

/// What follows the header of a page with this code.
fn body(page: &[u8], code: u8) -> Result<&[u8], MalformedPage> {
    let malformed = |what: String| MalformedPage(format!("VPD page {code:#04x} {what}"));
    let (header, body) = page
        .split_first_chunk::<HEADER>()
        .ok_or_else(|| malformed(format!("has {} bytes, fewer than its header", page.len())))?;
    if header[1] != code {
        return Err(malformed(format!("says that it is page {:#04x}", header[1])));
    }
    let length = usize::from(u16::from_be_bytes([header[2], header[3]]));
    match body.len() == length {
        true => Ok(body),
        false => Err(malformed(format!("says that {length} bytes follow its header where {} do", body.len()))),
    }
}

fn designator(header: &[u8; DESIGNATOR_HEADER], value: &[u8]) -> Designator {
    let association = match header[1] >> 4 & 0b11 {
        0 => Association::LogicalUnit,
        1 => Association::TargetPort,
        2 => Association::TargetDevice,
        _ => Association::Reserved,
    };
    let (kind, value) =
        designation(header[0] & 0xf, header[1] & 0xf, value).unwrap_or_else(|| (DesignatorKind::Other, digits(value)));
    Designator { association, kind, value }
}

/// The designator's form and text, if code set, type and length are as the standard has them together.
fn designation(code_set: u8, kind: u8, value: &[u8]) -> Option<(DesignatorKind, String)> {
    const BINARY: u8 = 1;
    const ASCII: u8 = 2;
    const UTF8: u8 = 3;
    match (kind, code_set) {
        // T10 vendor ID based designator format: eight bytes name the vendor.
        (1, ASCII) if value.len() > 8 => Some((DesignatorKind::T10Vendor, format!("t10.{}", text(value)))),
        // EUI-64 based designator format: by itself, with an extension behind it, or with one before it.
        (2, BINARY) if matches!(value.len(), 8 | 12 | 16) => {
            Some((DesignatorKind::Eui64, format!("eui.{}", digits(value))))
        }
        // NAA designator format: the first four bits tell the format, and that the length.
        (3, BINARY) => match (value.first()? >> 4, value.len()) {
            (2 | 3 | 5, 8) | (6, 16) => Some((DesignatorKind::Naa, format!("naa.{}", digits(value)))),
            _ => None,
        },
        // SCSI name string designator format.
        (8, UTF8) => {
            let name = text(value);
            let known = ["eui.", "naa.", "iqn."].iter().any(|prefix| name.starts_with(prefix));
            known.then_some((DesignatorKind::Name, name))
        }
        _ => None,
    }
}

fn digits(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Text without the zeros and spaces it is padded with; bytes that are not UTF-8 as `\xNN`.
fn text(bytes: &[u8]) -> String {
    let end = bytes.iter().rposition(|byte| !matches!(byte, 0 | b' ')).map_or(0, |last| last + 1);
    super::sysfs::text(bytes[..end].trim_ascii_start())
}

impl fmt::Display for MalformedPage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for MalformedPage {}

#[cfg(test)]
mod tests;
