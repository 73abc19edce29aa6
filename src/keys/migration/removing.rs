//! How one old key is destroyed.

use super::{Done, KeyMigration, Route, one_key};
use crate::audit::{Event, Kind};
use crate::refusal::{Reason, Refusal};
use crate::store::{MoveState, VolumeRecord, VolumeState};
use crate::volume::VolumeId;

impl KeyMigration<'_> {
    /// Destroys the key in the source of a volume that was destroyed, which another key manager may not have seen.
    fn remove_remains(&self, record: &VolumeRecord) -> Result<Done, Refusal> {
        let (volume, from) = (&record.id, self.route.from);
        match self.source.get(volume) {
            Ok(key) if key.check_value(volume) != record.check_value => {
                return Ok(Done::Skipped(format!(
                    "volume {volume} was destroyed, and the key of that id in {from} is not the one it had: it stays there"
                )));
            }
            Ok(_) => {
                let detail = format!("in {from}; the volume was destroyed");
                self.store.append_audit(Event::new(Kind::DestructionStarted, volume, &detail))?;
                self.forget(volume, detail)?;
            }
            Err(refusal) if refusal.reason() == Reason::NoKey && !self.lists(volume)? => self.forget_gone(volume)?,
            Err(refusal) if refusal.reason().is_about_an_ended_key() => self.forget_gone(volume)?,
            Err(refusal) => return Err(refusal),
        }
        Ok(Done::Removed)
    }

    /// Destroys the key of `volume` in the source, if the target has the same.
    pub(super) fn remove(&self, volume: &VolumeId) -> Result<Done, Refusal> {
        let record = self.store.volume(volume)?;
        if let Some(record) = record.as_ref().filter(|record| record.state == VolumeState::Destroyed) {
            return self.remove_remains(record);
        }
        if let Some(word) = record.as_ref().and_then(|record| self.is_not_ours(record)) {
            return Ok(Done::Skipped(word));
        }
        if let Some(word) = self.stays(volume, record.as_ref().map(|record| record.state)) {
            return Ok(Done::Skipped(word));
        }
        let new = one_key(self.target, volume, record.as_ref())
            .map_err(|refusal| self.not_there_any_more(volume, refusal))?;
        if let Some(record) = &record {
            self.check_enrolled_with(record, self.route.to, &new)?;
        }
        match self.source.get(volume) {
            Ok(old) if !old.same_as(&new) => return Err(self.differing(volume, &old, &"nothing was destroyed")),
            Ok(_) => self.leave(volume, &new)?,
            // An earlier run has destroyed it and come no further, or not wiped all of it. One that only cannot be read is
            // nothing to compare with.
            Err(refusal) if refusal.reason() == Reason::NoKey && !self.lists(volume)? => self.forget_gone(volume)?,
            Err(refusal) if refusal.reason().is_about_an_ended_key() => self.forget_gone(volume)?,
            Err(refusal) => return Err(refusal),
        }
        Ok(Done::Removed)
    }

    /// The refusal to destroy the key of `volume` in the source that follows from the target's.
    pub(super) fn not_there_any_more(&self, volume: &VolumeId, refusal: Refusal) -> Refusal {
        let Route { from, to } = self.route;
        match refusal.reason() {
            Reason::NoKey | Reason::KeyDestroyed | Reason::KeyRevoked => Refusal::new(
                refusal.reason(),
                format!(
                    "{to} has no key of volume {volume} any more, so that in {from} was not destroyed: run 'volcrypt key migrate \
                     --from {from} --to {to}' again ({refusal})"
                ),
            ),
            _ => refusal,
        }
    }

    /// Destroys the key of `volume` in the source, where it is gone and was not recorded as that.
    fn forget_gone(&self, volume: &VolumeId) -> Result<(), Refusal> {
        self.forget(volume, format!("in {}, where it was gone already", self.route.from))
    }

    /// Destroys the key of `volume` in the source, and records that.
    pub(super) fn forget(&self, volume: &VolumeId, detail: String) -> Result<(), Refusal> {
        self.source.forget(volume)?;
        let event = Event::new(Kind::OldKeyDestroyed, volume, detail);
        self.store.note_move(self.route, volume, MoveState::Moved, Some(event))
    }
}
