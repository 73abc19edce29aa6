//! The configuration file: which volumes are protected, and how.

mod config;
mod decision;
mod error;
mod explain;
mod file;
mod profile;
mod rule;
mod template;

pub use config::{Config, DEFAULT_PATH, DaemonConfig, HookConfig, KeyManagerConfig, WhenUnreachable};
pub use decision::{Decision, Protection};
pub use error::ConfigError;
pub use profile::{KeySize, Profile, Provider, UnsupportedKeySize};
pub use rule::Rule;
