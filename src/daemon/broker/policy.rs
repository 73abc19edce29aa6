//! The configuration that is in force, and how another one takes its place.

use std::sync::{Arc, PoisonError, RwLock};

use super::Broker;
use crate::policy::{Config, ConfigError};
use crate::refusal::{Reason, Refusal};

/// The configuration that is in force.
pub(super) struct Policy {
    state: RwLock<State>,
}

struct State {
    in_force: Result<Arc<Config>, ConfigError>,
    /// Why a newer file was not taken.
    rejected: Option<String>,
}

impl Policy {
    pub(super) fn new(config: Result<Config, ConfigError>) -> Self {
        Policy { state: RwLock::new(State { in_force: config.map(Arc::new), rejected: None }) }
    }
}

impl Broker {
    /// The configuration.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn config(&self) -> Result<Arc<Config>, Refusal> {
        let state = self.policy.state.read().unwrap_or_else(PoisonError::into_inner);
        state.in_force.clone().map_err(|error| {
            Refusal::new(Reason::Configuration, format!("{error}; then run 'systemctl reload volcryptd'"))
        })
    }

    /// What is wrong with the configuration, or with a newer one that was therefore not taken.
    pub fn configuration_error(&self) -> Option<String> {
        let state = self.policy.state.read().unwrap_or_else(PoisonError::into_inner);
        let faulty = state.in_force.as_ref().err().map(ToString::to_string);
        faulty.or_else(|| state.rejected.as_ref().map(|why| format!("{why}; the earlier configuration is in force")))
    }

    /// Puts another configuration in force. A faulty one changes nothing, and neither does one that
    /// keeps its keys elsewhere: what is open was opened with the keys that are used now.
    ///
    /// # Errors
    /// Why the earlier configuration stays in force.
    pub fn reload(&self, config: Result<Config, ConfigError>) -> Result<Arc<Config>, String> {
        let mut state = self.policy.state.write().unwrap_or_else(PoisonError::into_inner);
        let taken = config.map_err(|error| error.to_string()).and_then(|config| match &state.in_force {
            Ok(earlier) if earlier.key_cache != config.key_cache => {
                Err("the section [key_cache] has changed, which takes 'systemctl restart volcryptd'".to_owned())
            }
            Ok(earlier) if earlier.key_manager != config.key_manager => {
                Err("the section [key_manager], or that of the key manager, has changed, which takes 'systemctl restart volcryptd'".to_owned())
            }
            _ => Ok(config),
        });
        match taken {
            Ok(config) => {
                let config = Arc::new(config);
                *state = State { in_force: Ok(Arc::clone(&config)), rejected: None };
                Ok(config)
            }
            Err(why) => {
                state.rejected = Some(why.clone());
                Err(why)
            }
        }
    }
}
