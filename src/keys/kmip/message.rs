//! Requests and answers: KMIP 1.4, sections 4 (operations), 7 (messages) and 9.1.3 (numbers), and what KMIP 2.0 has
//! changed, which is how attributes are written.

mod answer;
mod attribute;
mod request;
pub mod tag;
mod version;

pub use answer::{Answer, Attributes, Failure};
pub use request::{Label, Request};
pub use version::{InvalidVersion, VERSIONS, Version};

const SYMMETRIC_KEY_OBJECT: u32 = 2;
const AES: u32 = 3;
const RAW: u32 = 1;
/// Encrypt and Decrypt.
const USAGE: i32 = 4 | 8;
/// The usage of a key that wraps others.
const WRAP_KEY: i32 = 0x10;
/// The method by which a key is wrapped: it is encrypted.
const ENCRYPT: u32 = 1;
/// The mode in which it is: AES key wrap, RFC 3394.
const NIST_KEY_WRAP: u32 = 0x0d;
/// What is wrapped: the key's bytes themselves, and not an encoding of them.
const NO_ENCODING: u32 = 1;

/// The group that all of volcrypt's keys are in, and the namespace of what is kept beside them: see
/// [`crate::keys::Description`].
const GROUP: &str = "volcrypt";

/// An operation (section 9.1.3.2.27).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Operation {
    /// Have the server make a key.
    Create = 0x01,
    /// Hand a key to the server.
    Register = 0x03,
    /// Find objects by their attributes.
    Locate = 0x08,
    /// Have an object handed out.
    Get = 0x0a,
    /// Ask what is known of an object.
    GetAttributes = 0x0b,
    /// Change what is known of an object.
    ModifyAttribute = 0x0e,
    /// Allow an object's use.
    Activate = 0x12,
    /// End an object's use, which has to come before its end.
    Revoke = 0x13,
    /// End an object.
    Destroy = 0x14,
    /// Ask for the versions that the server speaks; since KMIP 1.1.
    DiscoverVersions = 0x1e,
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

#[cfg(test)]
mod tests;
