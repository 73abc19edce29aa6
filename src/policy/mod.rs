//! The configuration file: which volumes are protected, and how.

mod config;
mod decision;
mod error;
mod explain;
mod file;
mod profile;
mod rule;
mod template;

pub use config::{
    Config, DEFAULT_DIRECTORY, DEFAULT_PATH, DaemonConfig, HookConfig, KeyManagerConfig, OtherEmulators,
    WhenUnreachable,
};
pub use decision::{Decision, Protection};
pub use error::ConfigError;
pub use profile::{KeySize, Profile, Provider, UnsupportedKeySize};
pub use rule::Rule;
