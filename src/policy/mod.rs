//! The configuration file: which volumes are protected, and how.

mod profile;

pub use profile::{KeySize, Profile, Provider, UnsupportedKeySize};
