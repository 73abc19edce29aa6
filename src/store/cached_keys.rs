//! Keys that a key server gave this host, wrapped, for when it does not answer.

use rusqlite::{OptionalExtension, Row, ToSql, Transaction, params};

use super::change::Change;
use super::{Store, fault};
use crate::keys::{CheckValue, KeyHandle};
use crate::policy::KeySize;
use crate::refusal::Refusal;
use crate::volume::VolumeId;

/// The name in the table `meta` of the latest time that the cache has seen.
const SEEN: &str = "key_cache_seen_at";
const COLUMNS: &str = "volume_id, server, key_size, wrapped, kek, fetched_at, key_id, key_version";

/// A key that is kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct CachedKey {
    /// The volume whose key it is.
    pub(crate) volume: VolumeId,
    /// Which of its keys.
    pub(crate) key: KeyHandle,
    /// The server that it came from.
    pub(crate) server: String,
    /// Its size.
    pub(crate) key_size: KeySize,
    /// As the key-encryption key wraps it.
    pub(crate) wrapped: Vec<u8>,
    /// The check value of that one.
    pub(crate) kek: CheckValue,
    /// When the server last gave it, in seconds since 1970-01-01 UTC.
    pub(crate) fetched_at: i64,
}

/// What became of a key that was to be kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kept {
    /// It is kept.
    Stored,
    /// The volume was retired or destroyed on this host meanwhile.
    NotEnrolled,
    /// Another key-encryption key wraps keys by now.
    OtherKek,
}

impl Store {
    /// The kept key of `volume`.
    pub(crate) fn cached_key(&self, volume: &VolumeId) -> Result<Option<CachedKey>, Refusal> {
        let query = format!("SELECT {COLUMNS} FROM key_cache WHERE volume_id = ?1");
        let row = self.connection().query_row(&query, [volume.as_str()], read_row).optional();
        row.map_err(|error| self.fault(&error))?.map(|row| self.cached(row)).transpose()
    }

    /// All kept keys, by volume.
    pub(crate) fn cached_keys(&self) -> Result<Vec<CachedKey>, Refusal> {
        let connection = self.connection();
        let rows = connection
            .prepare(&format!("SELECT {COLUMNS} FROM key_cache ORDER BY volume_id"))
            .and_then(|mut statement| statement.query_map([], read_row)?.collect::<Result<Vec<_>, _>>())
            .map_err(|error| self.fault(&error))?;
        rows.into_iter().map(|row| self.cached(row)).collect()
    }

    /// Keeps a key in the place of an earlier one of its volume, durably.
    pub(crate) fn cache_key(&self, key: &CachedKey) -> Result<Kept, Refusal> {
        let fault = |error| self.fault(&error);
        self.change(|transaction| {
            let retired: bool = transaction
                .query_row(
                    "SELECT EXISTS (SELECT 1 FROM volumes WHERE id = ?1 AND state <> 'enrolled')",
                    [key.volume.as_str()],
                    |row| row.get(0),
                )
                .map_err(fault)?;
            if retired {
                return Ok(Change::Needless(Kept::NotEnrolled));
            }
            if self.read_keks(transaction)?.current != Some(key.kek) {
                return Ok(Change::Needless(Kept::OtherKek));
            }
            transaction
                .execute(
                    &format!("INSERT OR REPLACE INTO key_cache ({COLUMNS}) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)"),
                    params![
                        key.volume.as_str(),
                        key.server,
                        key.key_size.bits(),
                        key.wrapped,
                        key.kek.to_string(),
                        key.fetched_at,
                        key.key.id.as_str(),
                        key.key.version
                    ],
                )
                .map_err(fault)?;
            Ok(Change::Unrecorded(Kept::Stored))
        })
    }

    /// Puts kept keys in the form in which another key-encryption key wraps them; one that is not as it was any more
    /// stays as it is.
    pub(crate) fn rewrap_cached(&self, keys: &[(CachedKey, Vec<u8>)], kek: CheckValue) -> Result<(), Refusal> {
        self.change(|transaction| {
            for (before, wrapped) in keys {
                let place = params![wrapped, kek.to_string(), before.volume.as_str(), before.wrapped];
                transaction
                    .execute("UPDATE key_cache SET wrapped = ?1, kek = ?2 WHERE volume_id = ?3 AND wrapped = ?4", place)
                    .map_err(|error| self.fault(&error))?;
            }
            Ok(if keys.is_empty() { Change::Needless(()) } else { Change::Unrecorded(()) })
        })
    }

    /// Wipes the kept key of `volume`; returns whether there was one.
    pub(crate) fn evict_cached(&self, volume: &VolumeId) -> Result<bool, Refusal> {
        self.wipe_cached("volume_id = ?1", params![volume.as_str()]).map(|wiped| wiped > 0)
    }

    /// Wipes the kept keys that a server last gave at the time `over` or before, and those that it gave after `latest` by a
    /// clock that was wrong.
    pub(crate) fn expire_cached(&self, over: i64, latest: i64) -> Result<usize, Refusal> {
        self.wipe_cached("fetched_at <= ?1 OR fetched_at > ?2", params![over, latest])
    }

    /// Wipes the kept keys of other servers than `server`; without one, all.
    pub(crate) fn cache_for(&self, server: Option<&str>) -> Result<usize, Refusal> {
        self.wipe_cached("server IS NOT ?1", params![server])
    }

    /// Wipes the kept keys that `kek` wraps.
    pub(crate) fn drop_cached_by(&self, kek: CheckValue) -> Result<usize, Refusal> {
        self.wipe_cached("kek = ?1", params![kek.to_string()])
    }

    /// Has the database tied to no key-encryption key any more, if it holds nothing that one wraps.
    pub(crate) fn untie_from_kek(&self) -> Result<(), Refusal> {
        self.change(|transaction| {
            let untied = transaction.execute(
                "DELETE FROM keks WHERE state <> 'retired' AND NOT EXISTS (SELECT 1 FROM keys WHERE wrapped IS NOT NULL)
                 AND NOT EXISTS (SELECT 1 FROM key_cache)",
                [],
            );
            let untied = untied.map_err(|error| self.fault(&error))?;
            Ok(if untied == 0 { Change::Needless(()) } else { Change::Unrecorded(()) })
        })
    }

    /// What is deleted is overwritten (`secure_delete`), and the log with it is cut.
    fn wipe_cached(&self, which: &str, parameters: &[&dyn ToSql]) -> Result<usize, Refusal> {
        // Where there is nothing to wipe, it does not matter that it could not be.
        let query = format!("SELECT EXISTS (SELECT 1 FROM key_cache WHERE {which})");
        let found = self.connection().query_row(&query, parameters, |row| row.get::<_, bool>(0));
        if !found.map_err(|error| self.fault(&error))? {
            return Ok(0);
        }
        self.change(|transaction| {
            let wiped = transaction
                .execute(&format!("DELETE FROM key_cache WHERE {which}"), parameters)
                .map_err(|error| self.fault(&error))?;
            Ok(if wiped == 0 { Change::Needless(0) } else { Change::Wiped(wiped) })
        })
    }

    /// The latest time that the cache has seen, in seconds since 1970-01-01 UTC.
    pub(crate) fn cache_seen_at(&self) -> Result<Option<i64>, Refusal> {
        let seen: Option<String> = self
            .connection()
            .query_row("SELECT value FROM meta WHERE name = ?1", [SEEN], |row| row.get(0))
            .optional()
            .map_err(|error| self.fault(&error))?;
        let corrupt = |_| fault::corrupt(&self.path, "the time that the key cache has seen is no number");
        seen.map(|seen| seen.parse().map_err(corrupt)).transpose()
    }

    /// Notes the latest time that the cache has seen.
    pub(crate) fn cache_has_seen(&self, time: i64) -> Result<(), Refusal> {
        self.change(|transaction| self.note_seen(transaction, time).map(Change::Unrecorded))
    }

    /// Wipes all kept keys, and takes `time` for the latest that the cache has seen.
    pub(crate) fn restart_cache(&self, time: i64) -> Result<(), Refusal> {
        self.change(|transaction| {
            transaction.execute("DELETE FROM key_cache", []).map_err(|error| self.fault(&error))?;
            self.note_seen(transaction, time).map(Change::Wiped)
        })
    }

    fn note_seen(&self, transaction: &Transaction<'_>, time: i64) -> Result<(), Refusal> {
        transaction
            .execute("INSERT OR REPLACE INTO meta (name, value) VALUES (?1, ?2)", params![SEEN, time.to_string()])
            .map(drop)
            .map_err(|error| self.fault(&error))
    }

    fn cached(&self, row: CachedRow) -> Result<CachedKey, Refusal> {
        let corrupt = |detail: &str| fault::corrupt(&self.path, detail);
        let id = row.key_id.parse().map_err(|error| corrupt(&format!("{error}")))?;
        Ok(CachedKey {
            volume: row.volume.parse().map_err(|error| corrupt(&format!("{error}")))?,
            key: KeyHandle { id, version: row.key_version },
            server: row.server,
            key_size: self.key_size(row.bits)?,
            wrapped: row.wrapped,
            kek: CheckValue::try_from(row.kek).map_err(|detail| corrupt(&detail))?,
            fetched_at: row.fetched_at,
        })
    }
}

/// A row as SQLite types it.
struct CachedRow {
    volume: String,
    server: String,
    bits: u32,
    wrapped: Vec<u8>,
    kek: String,
    fetched_at: i64,
    key_id: String,
    key_version: u32,
}

fn read_row(row: &Row<'_>) -> rusqlite::Result<CachedRow> {
    Ok(CachedRow {
        volume: row.get(0)?,
        server: row.get(1)?,
        bits: row.get(2)?,
        wrapped: row.get(3)?,
        kek: row.get(4)?,
        fetched_at: row.get(5)?,
        key_id: row.get(6)?,
        key_version: row.get(7)?,
    })
}
