//! Wrapped keys, and the check value of the key that wraps them.

use rusqlite::{Connection, OptionalExtension, TransactionBehavior, params};

use super::change::Change;
use super::{Store, fault};
use crate::audit::{Event, Kind};
use crate::keys::{CheckValue, KeyInfo};
use crate::policy::KeySize;
use crate::refusal::{Reason, Refusal};
use crate::volume::VolumeId;

/// The name of the check value's row in `meta`.
const KEK_CHECK: &str = "kek_check_value";

/// The record of a key, as it stands in the database.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct WrappedKey {
    /// What may be shown of it.
    pub(crate) info: KeyInfo,
    /// The wrapped key; `None` once it was destroyed.
    pub(crate) wrapped: Option<Vec<u8>>,
}

impl Store {
    /// The newest key record of `volume`.
    pub(crate) fn wrapped_key(&self, volume: &VolumeId) -> Result<Option<WrappedKey>, Refusal> {
        let connection = self.connection();
        let row = connection.query_row(
            "SELECT version, key_size, wrapped, created_at, destroyed_at IS NOT NULL FROM keys
             WHERE volume_id = ?1 ORDER BY version DESC LIMIT 1",
            [volume.as_str()],
            |row| Ok((row.get(0)?, row.get::<_, u32>(1)?, row.get(2)?, row.get(3)?, row.get(4)?)),
        );
        let row = row.optional().map_err(|error| self.fault(&error))?;
        let Some((version, bits, wrapped, created_at, destroyed)) = row else { return Ok(None) };
        let key_size = self.key_size(bits)?;
        let info = KeyInfo { volume: volume.clone(), key_size, version, created_at, destroyed };
        Ok(Some(WrappedKey { info, wrapped }))
    }

    /// As [`Store::wrapped_key`], but from the files and not from what this process remembers of
    /// them.
    pub(crate) fn wrapped_key_from_disk(&self, volume: &VolumeId) -> Result<Option<WrappedKey>, Refusal> {
        self.connection().execute_batch("PRAGMA shrink_memory").map_err(|error| self.fault(&error))?;
        self.wrapped_key(volume)
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
                Ok(KeyInfo { volume, key_size: self.key_size(bits)?, version, created_at, destroyed })
            })
            .collect()
    }

    /// Stores a key durably unless the volume has a key record already, destroyed or not. Returns
    /// whether it was stored.
    pub(crate) fn insert_key(&self, info: &KeyInfo, wrapped: &[u8]) -> Result<bool, Refusal> {
        let fault = |error| self.fault(&error);
        self.change(|transaction| {
            let present: bool = transaction
                .query_row("SELECT EXISTS (SELECT 1 FROM keys WHERE volume_id = ?1)", [info.volume.as_str()], |row| {
                    row.get(0)
                })
                .map_err(fault)?;
            if present {
                return Ok(Change::Needless(false));
            }
            transaction
                .execute(
                    "INSERT INTO keys (volume_id, version, key_size, wrapped, created_at) VALUES (?1, ?2, ?3, ?4, ?5)",
                    params![info.volume.as_str(), info.version, info.key_size.bits(), wrapped, info.created_at],
                )
                .map_err(fault)?;
            Ok(Change::Unrecorded(true))
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
                "UPDATE keys SET wrapped = NULL, destroyed_at = ?2 WHERE volume_id = ?1 AND destroyed_at IS NULL",
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

    /// Merges the write-ahead log, which still holds the wrapped key, and cuts it to nothing.
    fn empty_log(&self, connection: &Connection, volume: &VolumeId) -> Result<(), Refusal> {
        let hindered: bool = connection
            .query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |row| row.get(0))
            .map_err(|error| self.fault(&error))?;
        match hindered {
            false => Ok(()),
            true => Err(Refusal::new(
                Reason::StoreUnavailable,
                format!(
                    "the key of volume {volume} is destroyed, but its wrapped form is still in {}-wal because another \
                     process reads the database: let it finish and destroy the key again",
                    self.path.display()
                ),
            )),
        }
    }

    /// The check value of the key-encryption key that this database was made with.
    pub(crate) fn kek_check_value(&self) -> Result<Option<CheckValue>, Refusal> {
        self.read_kek_check_value(&self.connection())
    }

    /// Whether there is any key record, destroyed ones included.
    pub(crate) fn has_keys(&self) -> Result<bool, Refusal> {
        any_key(&self.connection()).map_err(|error| self.fault(&error))
    }

    /// Ties the database to the key-encryption key with `check_value`, unless it is tied already or
    /// holds keys of an unknown one. Returns what it is tied to now.
    pub(crate) fn tie_to_kek(&self, check_value: CheckValue) -> Result<CheckValue, Refusal> {
        let fault = |error| self.fault(&error);
        let mut connection = self.connection();
        let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate).map_err(fault)?;
        if let Some(present) = self.read_kek_check_value(&transaction)? {
            return Ok(present);
        }
        if any_key(&transaction).map_err(fault)? {
            return Err(fault::corrupt(
                &self.path,
                "it holds keys but not the check value of their key-encryption key",
            ));
        }
        transaction
            .execute("INSERT INTO meta (name, value) VALUES (?1, ?2)", [KEK_CHECK, &check_value.to_string()])
            .map_err(fault)?;
        transaction.commit().map_err(fault)?;
        self.merge_log(&connection);
        Ok(check_value)
    }

    fn read_kek_check_value(&self, connection: &Connection) -> Result<Option<CheckValue>, Refusal> {
        let text: Option<String> = connection
            .query_row("SELECT value FROM meta WHERE name = ?1", [KEK_CHECK], |row| row.get(0))
            .optional()
            .map_err(|error| self.fault(&error))?;
        text.map(CheckValue::try_from).transpose().map_err(|detail| fault::corrupt(&self.path, &detail))
    }

    fn key_size(&self, bits: u32) -> Result<KeySize, Refusal> {
        KeySize::try_from(bits).map_err(|error| fault::corrupt(&self.path, &error.to_string()))
    }
}

fn any_key(connection: &Connection) -> rusqlite::Result<bool> {
    connection.query_row("SELECT EXISTS (SELECT 1 FROM keys)", [], |row| row.get(0))
}
