//! The tags that are used here (KMIP 1.4, section 9.1.3.1).

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
