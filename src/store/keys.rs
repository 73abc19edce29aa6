//! Wrapped keys.

use rusqlite::{Connection, OptionalExtension, Row, TransactionBehavior, params};

use super::change::Change;
use super::{Store, cut_log, fault};
use crate::audit::{Event, Kind};
use crate::keys::{CheckValue, KeyHandle, KeyInfo};
use crate::policy::KeySize;
use crate::refusal::{Reason, Refusal};
use crate::volume::VolumeId;

/// The record of a key, as it stands in the database.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct WrappedKey {
    /// What may be shown of it.
    pub(crate) info: KeyInfo,
    /// The wrapped key; `None` once it was destroyed.
    pub(crate) wrapped: Option<Vec<u8>>,
    /// The check value of the key-encryption key that wraps it; `None` once it was destroyed.
    pub(crate) kek: Option<CheckValue>,
}

/// What became of a key that was to be stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Inserted {
    /// It is stored.
    Stored,
    /// The volume has a key record already, destroyed or not.
    Present,
    /// Another key-encryption key wraps new keys by now.
    OtherKek,
}

impl Store {
    /// The newest key record of `volume`.
    pub(crate) fn wrapped_key(&self, volume: &VolumeId) -> Result<Option<WrappedKey>, Refusal> {
        self.find_key(volume, None)
    }

    /// The record of the key of `volume` that has `version`.
    pub(crate) fn wrapped_key_of(&self, volume: &VolumeId, version: u32) -> Result<Option<WrappedKey>, Refusal> {
        self.find_key(volume, Some(version))
    }

    fn find_key(&self, volume: &VolumeId, version: Option<u32>) -> Result<Option<WrappedKey>, Refusal> {
        let connection = self.connection();
        let row = connection.query_row(
            &format!(
                "SELECT {COLUMNS} FROM keys WHERE volume_id = ?1 AND (?2 IS NULL OR version = ?2)
                 ORDER BY version DESC LIMIT 1"
            ),
            params![volume.as_str(), version],
            read_row,
        );
        let row = row.optional().map_err(|error| self.fault(&error))?;
        row.map(|row| self.key_record(row)).transpose()
    }

    /// The record that a row is.
    pub(super) fn key_record(&self, row: KeyRow) -> Result<WrappedKey, Refusal> {
        let corrupt = |detail: &str| fault::corrupt(&self.path, detail);
        let volume = row.volume.parse().map_err(|error| corrupt(&format!("{error}")))?;
        let info = KeyInfo {
            key: KeyHandle::of(&volume, row.version),
            volume,
            key_size: self.key_size(row.bits)?,
            created_at: row.created_at,
            destroyed: row.destroyed,
            hosts: Vec::new(),
        };
        let kek = row.kek.map(CheckValue::try_from).transpose().map_err(|detail| corrupt(&detail))?;
        Ok(WrappedKey { info, wrapped: row.wrapped, kek })
    }

    /// The record of the key of `volume` that has `version`, or the newest one, from the files and not from what this
    /// process remembers of them.
    pub(crate) fn wrapped_key_from_disk(
        &self,
        volume: &VolumeId,
        version: Option<u32>,
    ) -> Result<Option<WrappedKey>, Refusal> {
        self.connection().execute_batch("PRAGMA shrink_memory").map_err(|error| self.fault(&error))?;
        self.find_key(volume, version)
    }

    /// What may be shown of every key, by volume.
    pub(crate) fn key_infos(&self) -> Result<Vec<KeyInfo>, Refusal> {
        let connection = self.connection();
        let rows = connection
            .prepare(
                "SELECT volume_id, version, key_size, created_at, destroyed_at IS NOT NULL FROM keys
                 ORDER BY volume_id, version",
            )
            .and_then(|mut statement| {
                let rows = statement.query_map([], |row| {
                    Ok((row.get::<_, String>(0)?, row.get(1)?, row.get::<_, u32>(2)?, row.get(3)?, row.get(4)?))
                })?;
                rows.collect::<Result<Vec<_>, _>>()
            })
            .map_err(|error| self.fault(&error))?;
        rows.into_iter()
            .map(|(volume, version, bits, created_at, destroyed)| {
                let volume = volume.parse().map_err(|error| fault::corrupt(&self.path, &format!("{error}")))?;
                Ok(KeyInfo {
                    key: KeyHandle::of(&volume, version),
                    volume,
                    key_size: self.key_size(bits)?,
                    created_at,
                    destroyed,
                    hosts: Vec::new(),
                })
            })
            .collect()
    }

    /// Stores a key, wrapped by `kek`, durably unless the volume has a key record already.
    pub(crate) fn insert_key(&self, info: &KeyInfo, wrapped: &[u8], kek: CheckValue) -> Result<Inserted, Refusal> {
        let fault = |error| self.fault(&error);
        self.change(|transaction| {
            let present: bool = transaction
                .query_row("SELECT EXISTS (SELECT 1 FROM keys WHERE volume_id = ?1)", [info.volume.as_str()], |row| {
                    row.get(0)
                })
                .map_err(fault)?;
            if present {
                return Ok(Change::Needless(Inserted::Present));
            }
            // What is on its way out must not wrap anything new: it would be gone before that is noticed.
            if self.read_keks(transaction)?.current != Some(kek) {
                return Ok(Change::Needless(Inserted::OtherKek));
            }
            transaction
                .execute(
                    "INSERT INTO keys (volume_id, version, key_size, wrapped, created_at, kek)
                     VALUES (?1, ?2, ?3, ?4, ?5, ?6)",
                    params![
                        info.volume.as_str(),
                        info.key.version,
                        info.key_size.bits(),
                        wrapped,
                        info.created_at,
                        kek.to_string()
                    ],
                )
                .map_err(fault)?;
            Ok(Change::Unrecorded(Inserted::Stored))
        })
    }

    /// Wipes the wrapped keys of `volume` from the database and its log, and records that; their rows
    /// stay. Returns whether there were any. To repeat it wipes what another process kept from being
    /// wiped.
    pub(crate) fn destroy_keys(&self, volume: &VolumeId, now: i64) -> Result<bool, Refusal> {
        let fault = |error| self.fault(&error);
        let mut connection = self.connection();
        self.check_in_place()?;
        let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate).map_err(fault)?;
        let destroyed = transaction
            .execute(
                "UPDATE keys SET wrapped = NULL, kek = NULL, destroyed_at = ?2 WHERE volume_id = ?1 AND destroyed_at IS NULL",
                params![volume.as_str(), now],
            )
            .map_err(fault)?;
        let known: bool = transaction
            .query_row("SELECT EXISTS (SELECT 1 FROM keys WHERE volume_id = ?1)", [volume.as_str()], |row| row.get(0))
            .map_err(fault)?;
        match destroyed {
            0 => drop(transaction),
            1 => self.commit_recorded(transaction, Event::new(Kind::Destroyed, volume, "its only key"))?,
            more => {
                self.commit_recorded(transaction, Event::new(Kind::Destroyed, volume, format!("its {more} keys")))?
            }
        }
        if known {
            self.empty_log(&connection, volume)?;
        }
        Ok(known)
    }

    /// Removes what is known of the keys of `volume`, and wipes their wrapped forms from the database and its log. Those
    /// that were destroyed stay known as that. To repeat it wipes what another process kept from being wiped.
    pub(crate) fn forget_keys(&self, volume: &VolumeId) -> Result<(), Refusal> {
        let connection = self.connection();
        self.check_in_place()?;
        connection
            .execute("DELETE FROM keys WHERE volume_id = ?1 AND destroyed_at IS NULL", [volume.as_str()])
            .map_err(|error| self.fault(&error))?;
        self.empty_log(&connection, volume)
    }

    /// Merges the write-ahead log, which still holds the wrapped key, and cuts it to nothing.
    fn empty_log(&self, connection: &Connection, volume: &VolumeId) -> Result<(), Refusal> {
        match cut_log(connection).map_err(|error| self.fault(&error))? {
            true => Ok(()),
            false => Err(Refusal::new(
                Reason::StoreUnavailable,
                format!(
                    "the key of volume {volume} is destroyed, but its wrapped form is still in {}-wal because another \
                     process reads the database: let it finish and destroy the key again",
                    self.path.display()
                ),
            )),
        }
    }

    /// Whether there is any key that a key-encryption key wraps.
    pub(crate) fn has_keys(&self) -> Result<bool, Refusal> {
        any_key(&self.connection()).map_err(|error| self.fault(&error))
    }

    pub(super) fn key_size(&self, bits: u32) -> Result<KeySize, Refusal> {
        KeySize::try_from(bits).map_err(|error| fault::corrupt(&self.path, &error.to_string()))
    }
}

pub(super) fn any_key(connection: &Connection) -> rusqlite::Result<bool> {
    connection.query_row("SELECT EXISTS (SELECT 1 FROM keys WHERE wrapped IS NOT NULL)", [], |row| row.get(0))
}

/// What [`read_row`] reads.
pub(super) const COLUMNS: &str = "volume_id, version, key_size, wrapped, created_at, destroyed_at IS NOT NULL, kek";

/// A row as SQLite types it.
pub(super) struct KeyRow {
    volume: String,
    version: u32,
    bits: u32,
    wrapped: Option<Vec<u8>>,
    created_at: i64,
    destroyed: bool,
    kek: Option<String>,
}

pub(super) fn read_row(row: &Row<'_>) -> rusqlite::Result<KeyRow> {
    Ok(KeyRow {
        volume: row.get(0)?,
        version: row.get(1)?,
        bits: row.get(2)?,
        wrapped: row.get(3)?,
        created_at: row.get(4)?,
        destroyed: row.get(5)?,
        kek: row.get(6)?,
    })
}
