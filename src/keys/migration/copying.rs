//! How one key is copied.

use super::{Done, KeyMigration, Route, one_key};
use crate::audit::{Event, Kind};
use crate::keys::{Description, Imported, Key};
use crate::refusal::{Reason, Refusal};
use crate::store::{MoveState, VolumeRecord};
use crate::volume::VolumeId;

impl KeyMigration<'_> {
    /// Has the key of `volume` in both key managers.
    pub(super) fn copy(&self, volume: &VolumeId) -> Result<Done, Refusal> {
        let record = self.store.volume(volume)?;
        if let Some(word) = self.stays(volume, record.as_ref().map(|record| record.state)) {
            return Ok(Done::Skipped(word));
        }
        let Route { from, to } = self.route;
        // Under its own name in the new key manager, it would not be what the record names.
        if let Some(word) = record.as_ref().and_then(|record| self.is_not_ours(record)) {
            return Ok(Done::Skipped(word));
        }
        let found = match (self.found(volume, record.as_ref()), &record) {
            // The source may remember what an earlier run has destroyed there.
            (Err(refusal), Some(record)) if refusal.reason().is_about_an_ended_key() => {
                return self.is_there_alone(record).map_err(|other| match other.reason() {
                    Reason::NoKey => refusal,
                    _ => other,
                });
            }
            (found, _) => found?,
        };
        let (key, description) = match (found, &record) {
            (None, Some(record)) => return self.is_there_alone(record),
            (None, None) => return Ok(Done::Skipped(format!("{from} has no key of volume {volume} any more"))),
            (Some((key, _)), Some(record)) => (key, Description::of(record)),
            (Some((key, Some(description))), None) => (key, description),
            (Some((_, None)), None) => {
                return Ok(Done::Skipped(format!(
                    "the key of volume {volume} stays in {from}: the volume was never enrolled with it"
                )));
            }
        };
        if let Some(record) = &record {
            self.check_enrolled_with(record, from, &key)?;
        }
        let imported = match self.target.import(volume, &key, &description) {
            Err(refusal) if refusal.reason() == Reason::WrongKey => return Err(self.differing(volume, &key, &refusal)),
            imported => imported?,
        };
        if imported == Imported::Present {
            self.keep(volume)?;
        }
        // As every open will read it.
        if !one_key(self.target, volume, record.as_ref())?.same_as(&key) {
            return Err(self.differing(volume, &key, &format!("{to} handed out another one than it was given")));
        }
        let detail = match imported {
            Imported::Stored => format!("copied from {from} to {to}, read back and compared"),
            Imported::Present => format!("in {from} and in {to}, compared"),
        };
        self.store.note_move(
            self.route,
            volume,
            MoveState::Copied,
            Some(Event::new(Kind::KeyMoved, volume, detail)),
        )?;
        Ok(Done::Imported(imported))
    }

    /// The key of `volume` in the source and what that knows of the volume.
    fn found(
        &self,
        volume: &VolumeId,
        record: Option<&VolumeRecord>,
    ) -> Result<Option<(Key, Option<Description>)>, Refusal> {
        if self.source.capabilities().describes {
            return Ok(self.source.described(volume)?.map(|(key, description)| (key, Some(description))));
        }
        match one_key(self.source, volume, record) {
            Ok(key) => Ok(Some((key, None))),
            Err(refusal) if refusal.reason() == Reason::NoKey && !self.lists(volume)? => Ok(None),
            Err(refusal) => Err(refusal),
        }
    }

    /// A volume that was enrolled with the target, or whose old key was destroyed.
    fn is_there_alone(&self, record: &VolumeRecord) -> Result<Done, Refusal> {
        let key = self.target.get_enrolled(&record.recorded_key())?;
        self.check_enrolled_with(record, self.route.to, &key)?;
        self.keep(&record.id)?;
        self.store.note_move(self.route, &record.id, MoveState::Moved, None)?;
        Ok(Done::Imported(Imported::Present))
    }
}
