//! Tells a key manager that keeps who uses its keys which volumes are in use on this host.
//!
//! It is told what the kernel says is mapped, and never by a thread that a guest waits for: soon after a volume was
//! opened, and otherwise now and then, because nobody tells when the kernel removes a mapping.

use std::sync::{Condvar, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use super::broker::Broker;
use crate::policy::KeyManagerConfig;
use crate::refusal::Refusal;

/// How often it is looked whether mappings are gone.
const EVERY: Duration = Duration::from_secs(10);
/// When it is tried again after it went wrong.
const AGAIN: Duration = Duration::from_secs(30);
/// How long to wait after an open: QEMU opens a disk several times when it is attached, and closes it in between.
const A_MOMENT: Duration = Duration::from_secs(1);

/// Whether a volume was opened since it was last looked.
#[derive(Default)]
pub struct InUse {
    was_opened: Mutex<bool>,
    changed: Condvar,
}

impl InUse {
    /// A volume was opened.
    pub fn opened(&self) {
        *self.was_opened.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.changed.notify_one();
    }

    fn wait(&self, at_most: Duration) {
        let was_opened = self.was_opened.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self.changed.wait_timeout_while(was_opened, at_most, |was_opened| !*was_opened);
        let (was_opened, outcome) = waited.unwrap_or_else(PoisonError::into_inner);
        drop(was_opened);
        if !outcome.timed_out() {
            thread::sleep(A_MOMENT);
        }
        // Those of that moment are seen by the look that follows.
        *self.was_opened.lock().unwrap_or_else(PoisonError::into_inner) = false;
    }
}

/// Tells it for ever, or not at all if the key manager does not keep it.
pub fn keep(broker: &Broker) {
    let mut failed = None;
    loop {
        match tell(broker) {
            Ok(true) if failed.take().is_some() => {
                tracing::info!("the key manager knows again which volumes are in use on this host");
            }
            Ok(true) => {}
            Ok(false) => return,
            Err(refusal) => {
                // The same is said once, not each time.
                if failed.replace(refusal.reason()) != Some(refusal.reason()) {
                    tracing::warn!(
                        "the key manager does not know yet which volumes are in use on this host, and is told again: {refusal}"
                    );
                }
            }
        }
        broker.in_use().wait(if failed.is_some() { AGAIN } else { EVERY });
    }
}

/// Tells it once. Whether the key manager keeps it: which one is used changes only with the daemon.
pub(super) fn tell(broker: &Broker) -> Result<bool, Refusal> {
    // With a faulty configuration nothing is opened, and enough is said of it elsewhere.
    let Ok(config) = broker.config() else { return Ok(true) };
    if !matches!(config.key_manager, KeyManagerConfig::Barbican { .. }) {
        return Ok(false);
    }
    let mapped = broker.encryptor().mappings()?.into_iter().map(|mapping| mapping.volume).collect();
    let vault = broker.vault()?;
    if let Some(secrets) = vault.keys.foreign() {
        let keys = vault.store.foreign_keys()?.into_iter();
        secrets.are_keys(keys.map(|(volume, key)| (volume, key.secret)).collect());
    }
    vault.keys.note_uses(&mapped)?;
    Ok(true)
}
