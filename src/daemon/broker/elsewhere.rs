//! Where the key of a volume may be beside the key manager in use.

use super::Broker;
use super::lifecycle::is_gone;
use super::migration::named;
use crate::daemon::pool::while_waiting;
use crate::keys::ManagerKind;
use crate::refusal::{Reason, Refusal};
use crate::store::VolumeRecord;

/// The key managers that several hosts ask: what this host's database has is looked at apart.
const SERVERS: [ManagerKind; 2] = [ManagerKind::Kmip, ManagerKind::Barbican];

/// A key manager that has the key of a volume, or may have it.
pub(super) struct Elsewhere {
    pub(super) kind: ManagerKind,
    answer: Answer,
}

enum Answer {
    Has,
    /// The configuration does not say how to ask it, and this host has moved the key from or to it.
    MayHave,
    Unasked(Refusal),
}

impl Elsewhere {
    /// In words that go on from the volume.
    pub(super) fn said(&self) -> String {
        let kind = self.kind;
        match &self.answer {
            Answer::Has => format!("{kind} still has its key"),
            Answer::MayHave => format!("{kind} may have its key as well, from moving keys"),
            Answer::Unasked(refusal) => format!("{kind} could not be asked whether it has its key ({refusal})"),
        }
    }
}

impl Broker {
    /// The key managers beside the one in use that do not say that they have no key of the volume with this `record`.
    pub(super) fn elsewhere(&self, record: &VolumeRecord) -> Result<Vec<Elsewhere>, Refusal> {
        let (config, vault, id) = (self.config()?, self.vault()?, &record.id);
        let used = config.key_manager.kind();
        let moved = vault.store.may_have(id)?;
        let ask = |kind: ManagerKind| {
            let answer = match named(&config, kind, &vault.store) {
                Err(_) if moved.iter().any(|moved| moved == kind.as_str()) => Answer::MayHave,
                Err(_) => return None,
                Ok(manager) => match while_waiting(|| manager.get(id)) {
                    Ok(key) if key.check_value(id) == record.check_value => Answer::Has,
                    // It is not the one that the volume was enrolled with.
                    Ok(_) => return None,
                    Err(refusal) if is_gone(&refusal) => return None,
                    Err(refusal) if refusal.reason() == Reason::KeyRevoked => Answer::Has,
                    Err(refusal) => Answer::Unasked(refusal),
                },
            };
            Some(Elsewhere { kind, answer })
        };
        Ok(SERVERS.into_iter().filter(|&kind| kind != used).filter_map(ask).collect())
    }
}
