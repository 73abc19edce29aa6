//! Which keys a database holds, and which of them another one lacks.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rusqlite::{Connection, ErrorCode};

use super::backup::{connect_immutable, contents};
use super::files::{FILE_NAME, INDEX, LOGS, REPLACED};
use super::{Store, fault, files};
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
        read_unused(path, Held::by)
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

/// Reads the database at `path`, which nobody may be using.
pub(super) fn read_unused<T>(path: &Path, read: impl FnOnce(&Connection) -> rusqlite::Result<T>) -> Result<T, Refusal> {
    if let Some(log) = files::unmerged(path)? {
        let sentence = format!("{} holds changes of {} that are not merged", log.display(), path.display());
        return Err(Refusal::new(Reason::StoreUnavailable, sentence));
    }
    connect_immutable(path).and_then(|connection| read(&connection)).map_err(|error| match error.sqlite_error_code() {
        // No restore is called for: it is not the database in use.
        Some(ErrorCode::NotADatabase | ErrorCode::DatabaseCorrupt) => {
            Refusal::new(Reason::StoreUnavailable, format!("{} cannot be read ({error})", path.display()))
        }
        _ => fault::refusal(path, &error),
    })
}

impl Store {
    /// A database beside this one, whose place a backup has taken, with keys that are not in this one and that the
    /// key-encryption key `kek` opens; and the volumes whose keys those are, or why that cannot be told. That may be the log
    /// alone of one that was not there.
    ///
    /// # Errors
    /// [`Reason::StoreUnavailable`] when this database or its directory cannot be read.
    pub(crate) fn kept_that_needs(&self, kek: CheckValue) -> Result<Option<(PathBuf, String)>, Refusal> {
        let held = Held::by(&self.connection()).map_err(|error| self.fault(&error))?;
        let directory = self.path.parent().unwrap_or(&self.path);
        let failed = |error: std::io::Error| {
            let sentence = format!("{} cannot be read ({error}): mend that and repeat", directory.display());
            Refusal::new(Reason::StoreUnavailable, sentence)
        };
        let prefix = format!("{FILE_NAME}{REPLACED}");
        for entry in fs::read_dir(directory).map_err(failed)? {
            let (path, name) = entry.map(|entry| (entry.path(), entry.file_name())).map_err(failed)?;
            if !name.as_bytes().starts_with(prefix.as_bytes()) || name.as_bytes().ends_with(INDEX.as_bytes()) {
                continue;
            }
            if let Some(database) = LOGS.iter().find_map(|end| name.as_bytes().strip_suffix(end.as_bytes())) {
                // Where its database is, that is looked at.
                let database = directory.join(OsStr::from_bytes(database));
                if files::is_missing(&database)
                    && let Some(log) = files::unmerged(&database)?
                {
                    let what = "is the log of a database that is not there and may have keys that are in it alone";
                    return Ok(Some((log, what.to_owned())));
                }
                continue;
            }
            match Held::in_file(&path) {
                // One of an older volcrypt does not say which it needs.
                Ok(before) if before.keks.is_empty() || before.keks.contains(&kek) => {
                    let alone = before.lacking_in(&held);
                    if !alone.is_empty() {
                        return Ok(Some((path, format!("has the keys of these volumes alone: {}", alone.join(", ")))));
                    }
                }
                Ok(_) => {}
                Err(refusal) => return Ok(Some((path, format!("may have keys that are in it alone ({refusal})")))),
            }
        }
        Ok(None)
    }
}
