//! The configuration file: which volumes are protected, and how.

mod compare;
mod config;
mod decision;
mod error;
mod explain;
mod file;
mod guard;
mod index;
mod key_manager;
mod language;
mod multipath;
mod pattern;
mod profile;
mod rule;
mod targets;
mod template;
mod trace;

pub use config::{
    AuditConfig, Config, DEFAULT_PATH, DaemonConfig, HookConfig, Intercept, OtherEmulators, PolicyConfig, Unmatched,
    WhenUnreachable, WhenUnwritable,
};
pub use decision::{Decision, Protection};
pub use error::ConfigError;
pub use guard::{DEFAULT_PARTITION, GuardConfig};
pub use key_manager::{DEFAULT_DIRECTORY, KeyCacheConfig, KeyManagerConfig, KeyServers};
pub(crate) use profile::is_supported;
pub use profile::{KeySize, Profile, Provider, UnsupportedKeySize};
pub use rule::{Action, Protect, Rule};
pub use targets::PlaintextTargets;
pub use trace::{Outcome, RuleTrace, Trace};
