//! How keys come from one key manager to another while both are there, and guests run.

use std::sync::{Arc, PoisonError};

use super::{Broker, Vault};
use crate::keys::{Aim, Host, KeyManager, KeyMigration, ManagerKind, MigrationProgress, MigrationStep, Route};
use crate::policy::Config;
use crate::refusal::{Reason, Refusal};
use crate::store::Store;

impl Broker {
    /// Takes a step in moving keys from one key manager to another.
    ///
    /// # Errors
    /// [`Reason::Configuration`] when the configuration does not say how one of the two is reached, or none of them is
    /// in use; [`Reason::NotAllowed`] when old keys are to be destroyed that are still in use; and those of
    /// [`KeyMigration::take`].
    pub fn migrate_keys(&self, step: &MigrationStep) -> Result<MigrationProgress, Refusal> {
        let _only_one = self.migrating.lock().unwrap_or_else(PoisonError::into_inner);
        let (config, vault) = (self.config()?, self.vault()?);
        let Route { from, to } = step.route;
        let used = config.key_manager.kind();
        if used != from && used != to {
            let sentence = format!(
                "the keys that are in use are those of {used}, so none are moved from {from} to {to}: name {used} with --from \
                 or --to"
            );
            return Err(Refusal::new(Reason::Configuration, sentence));
        }
        if step.aim == Aim::DestroyOld && used != to {
            let sentence = format!(
                "the keys in {from} are the ones in use, so none is destroyed: copy them (without --destroy-old), set type = \
                 \"{to}\" in the section [key_manager] on every host that uses them, run 'systemctl restart volcryptd' there, and \
                 repeat once the volumes open"
            );
            return Err(Refusal::new(Reason::NotAllowed, sentence));
        }
        let (source, target) = (named(&config, from, &vault.store)?, named(&config, to, &vault.store)?);
        KeyMigration::new(&vault.store, &self.enrolling, step.route, (&*source, &*target), Host::this())?
            .after_switch(used == to)
            .take(step.aim, step.after.as_ref())
    }

    /// What keys were left behind in the database when another key manager took its place, in one sentence.
    pub fn keys_left_behind(&self) -> Option<String> {
        let (config, vault) = (self.config().ok()?, self.vault().ok()?);
        let used = config.key_manager.kind();
        if used == ManagerKind::Embedded || used == ManagerKind::KeyFile {
            return None;
        }
        let left = vault.store.count_keys_left_here().ok().filter(|&left| left > 0)?;
        Some(format!(
            "the keys of {left} enrolled or retired volumes were not copied from the database to {used}, which is in use, and they may \
             not open: run 'volcrypt key migrate --from embedded --to {used}'"
        ))
    }
}

/// A key manager of its own, and not the one in use: what was found once may be remembered there.
pub(super) fn named(config: &Config, kind: ManagerKind, store: &Arc<Store>) -> Result<Box<dyn KeyManager>, Refusal> {
    let Some(config) = config.key_servers.named(kind, &config.key_manager) else {
        let sentence = match kind {
            ManagerKind::KeyFile => {
                "keys are not moved to or from a key-file, which holds one key for all volumes: name \
                                     another key manager"
                    .to_owned()
            }
            _ => format!(
                "the configuration does not say how {kind} is reached: add a section [{kind}], and run 'systemctl reload \
                 volcryptd'"
            ),
        };
        return Err(Refusal::new(Reason::Configuration, sentence));
    };
    Vault::keys(&config, store)
}
