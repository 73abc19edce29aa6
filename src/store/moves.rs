//! How far keys are moved from one key manager to another. A row says what has been done and not what is to be believed:
//! before anything is destroyed, both keys are read and compared.

use rusqlite::{OptionalExtension, Transaction, params};

use super::change::Change;
use super::{Store, fault, seconds_now};
use crate::audit::Event;
use crate::keys::Route;
use crate::refusal::Refusal;
use crate::volume::VolumeId;

/// How far the key of a volume has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum MoveState {
    /// It is to be copied, or compared once more.
    Planned,
    /// Both key managers have it.
    Copied,
    /// It is to be destroyed where it comes from.
    Leaving,
    /// Only the new key manager has it.
    Moved,
}

impl MoveState {
    fn as_str(self) -> &'static str {
        match self {
            MoveState::Planned => "planned",
            MoveState::Copied => "copied",
            MoveState::Leaving => "leaving",
            MoveState::Moved => "moved",
        }
    }
}

/// What came of a plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Planned {
    /// Whether an earlier run left something to do.
    pub(crate) resumed: bool,
    /// How many are to be done.
    pub(crate) remaining: u64,
}

impl Store {
    /// Plans to copy the keys of `volumes`. Those that an earlier run which did not come to its end has copied are done;
    /// after one that did, all are compared once more.
    pub(crate) fn plan_copies(&self, route: Route, volumes: &[VolumeId]) -> Result<Planned, Refusal> {
        self.plan(|transaction| {
            let resumed = count(transaction, route, MoveState::Planned)? > 0;
            let mut insert = transaction.prepare(
                "INSERT INTO key_moves (volume_id, source, target, state, since) VALUES (?1, ?2, ?3, 'planned', ?4)
                 ON CONFLICT (volume_id) DO UPDATE SET source = ?2, target = ?3, state = 'planned', since = ?4
                 WHERE NOT (?5 AND source = ?2 AND target = ?3 AND state IN ('planned', 'copied'))",
            )?;
            for volume in volumes {
                let (from, to) = (route.from.as_str(), route.to.as_str());
                insert.execute(params![volume.as_str(), from, to, seconds_now(), resumed])?;
            }
            Ok(Planned { resumed, remaining: count(transaction, route, MoveState::Planned)? })
        })
    }

    /// Plans to destroy the old keys of those of `volumes` that were copied, or of which the new key manager needs none.
    /// Returns the others as well.
    pub(crate) fn plan_removals(
        &self,
        route: Route,
        volumes: Vec<VolumeId>,
        needs_none: &dyn Fn(&VolumeId) -> bool,
    ) -> Result<(Planned, Vec<VolumeId>), Refusal> {
        self.plan(|transaction| {
            let resumed = count(transaction, route, MoveState::Leaving)? > 0;
            let mut others = Vec::new();
            let mut update = transaction.prepare(
                "UPDATE key_moves SET state = 'leaving', since = ?4
                 WHERE volume_id = ?1 AND source = ?2 AND target = ?3 AND state IN ('copied', 'leaving', 'moved')",
            )?;
            let mut insert = transaction.prepare(
                "INSERT OR REPLACE INTO key_moves (volume_id, source, target, state, since)
                 VALUES (?1, ?2, ?3, 'leaving', ?4)",
            )?;
            for volume in volumes {
                let row = params![volume.as_str(), route.from.as_str(), route.to.as_str(), seconds_now()];
                if needs_none(&volume) {
                    insert.execute(row)?;
                } else if update.execute(row)? == 0 {
                    others.push(volume);
                }
            }
            Ok((Planned { resumed, remaining: count(transaction, route, MoveState::Leaving)? }, others))
        })
    }

    fn plan<T>(&self, plan: impl FnOnce(&Transaction<'_>) -> rusqlite::Result<T>) -> Result<T, Refusal> {
        self.change(|transaction| plan(transaction).map(Change::Unrecorded).map_err(|error| self.fault(&error)))
    }

    /// Some of the volumes whose keys are in `state`, by id, those after `after`.
    pub(crate) fn moves(
        &self,
        route: Route,
        state: MoveState,
        after: Option<&VolumeId>,
        most: usize,
    ) -> Result<Vec<VolumeId>, Refusal> {
        let connection = self.connection();
        let volumes = connection
            .prepare_cached(
                "SELECT volume_id FROM key_moves WHERE source = ?1 AND target = ?2 AND state = ?3 AND volume_id > ?4
                 ORDER BY volume_id LIMIT ?5",
            )
            .and_then(|mut statement| {
                let after = after.map_or("", VolumeId::as_str);
                let (from, to) = (route.from.as_str(), route.to.as_str());
                statement
                    .query_map(params![from, to, state.as_str(), after, most as i64], |row| row.get::<_, String>(0))?
                    .collect::<Result<Vec<_>, _>>()
            })
            .map_err(|error| self.fault(&error))?;
        let parse = |id: String| id.parse().map_err(|error| fault::corrupt(&self.path, &format!("{error}")));
        volumes.into_iter().map(parse).collect()
    }

    /// How many keys are in `state`.
    pub(crate) fn count_moves(&self, route: Route, state: MoveState) -> Result<u64, Refusal> {
        count(&self.connection(), route, state).map_err(|error| self.fault(&error))
    }

    /// Notes that the key of `volume` has come to `state`, and records `event`.
    pub(crate) fn note_move(
        &self,
        route: Route,
        volume: &VolumeId,
        state: MoveState,
        event: Option<Event>,
    ) -> Result<(), Refusal> {
        self.change(|transaction| {
            transaction
                .execute(
                    "UPDATE key_moves SET state = ?4, since = ?5 WHERE volume_id = ?1 AND source = ?2 AND target = ?3",
                    params![volume.as_str(), route.from.as_str(), route.to.as_str(), state.as_str(), seconds_now()],
                )
                .map_err(|error| self.fault(&error))?;
            Ok(match event {
                Some(event) => Change::Recorded((), event),
                None => Change::Unrecorded(()),
            })
        })
    }

    /// Which key managers may have the key of `volume`, going by how far it was moved.
    pub(crate) fn may_have(&self, volume: &VolumeId) -> Result<Vec<String>, Refusal> {
        let places = self
            .connection()
            .query_row("SELECT source, target, state FROM key_moves WHERE volume_id = ?1", [volume.as_str()], |row| {
                let (source, target, state): (_, _, String) = (row.get(0)?, row.get(1)?, row.get(2)?);
                Ok(match state == MoveState::Moved.as_str() {
                    true => vec![target],
                    false => vec![source, target],
                })
            })
            .optional()
            .map_err(|error| self.fault(&error))?;
        Ok(places.unwrap_or_default())
    }

    /// How many volumes that are enrolled or retired have a key in this database that was not copied to another key manager.
    pub(crate) fn count_keys_left_here(&self) -> Result<u64, Refusal> {
        self.connection()
            .query_row(
                "SELECT count(DISTINCT volume_id) FROM keys
                 WHERE wrapped IS NOT NULL AND volume_id IN (SELECT id FROM volumes WHERE state IN ('enrolled', 'retired'))
                     AND volume_id NOT IN
                         (SELECT volume_id FROM key_moves WHERE source = 'embedded' AND state IN ('copied', 'leaving'))",
                [],
                |row| row.get::<_, i64>(0),
            )
            .map(i64::unsigned_abs)
            .map_err(|error| self.fault(&error))
    }

    /// Has nothing be done for `volume` by this move.
    pub(crate) fn drop_move(&self, volume: &VolumeId) -> Result<(), Refusal> {
        self.change(|transaction| {
            transaction
                .execute("DELETE FROM key_moves WHERE volume_id = ?1", [volume.as_str()])
                .map(Change::Unrecorded)
                .map_err(|error| self.fault(&error))
        })
        .map(drop)
    }
}

fn count(connection: &rusqlite::Connection, route: Route, state: MoveState) -> rusqlite::Result<u64> {
    connection
        .query_row(
            "SELECT count(*) FROM key_moves WHERE source = ?1 AND target = ?2 AND state = ?3",
            [route.from.as_str(), route.to.as_str(), state.as_str()],
            |row| row.get::<_, i64>(0),
        )
        .map(i64::unsigned_abs)
}
