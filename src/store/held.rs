//! Which keys a database holds, and which of them another one lacks.

use std::collections::BTreeMap;
use std::path::Path;

use rusqlite::Connection;

use super::backup::{connect_immutable, contents};
use super::{fault, files};
use crate::keys::CheckValue;
use crate::refusal::{Reason, Refusal};

/// The keys that a database holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Held {
    /// The check value that each volume was enrolled with, by its id; none if it has a key and no record.
    volumes: BTreeMap<String, Option<String>>,
    /// The check values of the key-encryption keys that are needed; none of a database of an older volcrypt.
    pub keks: Vec<CheckValue>,
}

impl Held {
    /// What the database at `path` holds, which nobody may be using. It may be of an older volcrypt.
    ///
    /// # Errors
    /// [`Reason::StoreUnavailable`] when it cannot be read, and when not all of it is in the file.
    pub fn in_file(path: &Path) -> Result<Self, Refusal> {
        if files::has_write_ahead_log(path)? {
            let sentence = format!("{0}-wal holds changes of {0} that are not merged", path.display());
            return Err(Refusal::new(Reason::StoreUnavailable, sentence));
        }
        connect_immutable(path)
            .and_then(|connection| Held::by(&connection))
            .map_err(|error| fault::refusal(path, &error))
    }

    pub(super) fn by(connection: &Connection) -> rusqlite::Result<Self> {
        let volumes = connection
            .prepare(
                "SELECT DISTINCT volume_id, check_value FROM keys LEFT JOIN volumes ON volumes.id = volume_id
                 WHERE wrapped IS NOT NULL",
            )?
            .query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?
            .collect::<Result<_, _>>()?;
        Ok(Held { volumes, keks: contents(connection).map_or_else(|_| Vec::new(), |contents| contents.keks) })
    }

    /// The volumes whose keys are held here and not in `other`, or there as another key.
    pub fn lacking_in(&self, other: &Held) -> Vec<&str> {
        let lacks =
            |(volume, check_value): &(&String, &Option<String>)| other.volumes.get(*volume) != Some(check_value);
        self.volumes.iter().filter(lacks).map(|(volume, _)| volume.as_str()).collect()
    }
}
