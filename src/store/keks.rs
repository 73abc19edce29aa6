//! Which key-encryption keys wrap the keys, and how one takes another's place.

use rusqlite::{Connection, OptionalExtension, TransactionBehavior, params};

use super::change::Change;
use super::keys::{self, any_key};
use super::{Store, WrappedKey, cut_log, fault, seconds_now};
use crate::audit::{Event, Kind};
use crate::keys::CheckValue;
use crate::refusal::{Reason, Refusal};
use crate::volume::VolumeId;

/// The key-encryption keys in use, by their check values.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Keks {
    /// The one that wraps new keys; none before the database was first used with one.
    pub(crate) current: Option<CheckValue>,
    /// The one that it replaces, as long as that is under way.
    pub(crate) outgoing: Option<CheckValue>,
}

/// A key that another key-encryption key wraps from now on.
pub(crate) struct Rewrapped {
    /// As it was.
    pub(crate) record: WrappedKey,
    /// Its new form.
    pub(crate) wrapped: Vec<u8>,
}

impl Store {
    /// The key-encryption keys in use.
    pub(crate) fn keks(&self) -> Result<Keks, Refusal> {
        self.read_keks(&self.connection())
    }

    pub(super) fn read_keks(&self, connection: &Connection) -> Result<Keks, Refusal> {
        let rows = connection
            .prepare_cached("SELECT state, check_value FROM keks WHERE state <> 'retired'")
            .and_then(|mut statement| {
                let rows = statement.query_map([], |row| Ok((row.get::<_, String>(0)?, row.get::<_, String>(1)?)))?;
                rows.collect::<Result<Vec<_>, _>>()
            })
            .map_err(|error| self.fault(&error))?;
        let mut keks = Keks::default();
        for (state, value) in rows {
            let value = CheckValue::try_from(value).map_err(|detail| fault::corrupt(&self.path, &detail))?;
            match state.as_str() {
                "current" => keks.current = Some(value),
                _ => keks.outgoing = Some(value),
            }
        }
        Ok(keks)
    }

    /// Ties the database to the key-encryption key with `check_value`, unless it is tied already or
    /// holds keys of an unknown one. Returns what it is tied to now.
    pub(crate) fn tie_to_kek(&self, check_value: CheckValue) -> Result<CheckValue, Refusal> {
        let fault = |error| self.fault(&error);
        let mut connection = self.connection();
        let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate).map_err(fault)?;
        if let Some(present) = self.read_keks(&transaction)?.current {
            return Ok(present);
        }
        if any_key(&transaction).map_err(fault)? {
            return Err(fault::corrupt(
                &self.path,
                "it holds keys but not the check value of their key-encryption key",
            ));
        }
        transaction
            .execute(
                // One that was replaced before may come back: it is what there is, and nothing needs another.
                "INSERT INTO keks (check_value, state, since) VALUES (?1, 'current', ?2)
                 ON CONFLICT (check_value) DO UPDATE SET state = 'current', since = excluded.since",
                params![check_value.to_string(), seconds_now()],
            )
            .map_err(fault)?;
        transaction.commit().map_err(fault)?;
        self.merge_log(&connection);
        Ok(check_value)
    }

    /// Ties the database to the key-encryption key `new` instead of `unused`, if that wraps nothing and `new` was never
    /// replaced by another one. Returns whether it has done so.
    pub(crate) fn tie_anew(&self, unused: CheckValue, new: CheckValue) -> Result<bool, Refusal> {
        self.change(|transaction| {
            let tied = transaction.execute(
                "UPDATE keks SET check_value = ?2, since = ?3 WHERE check_value = ?1 AND state = 'current'
                 AND NOT EXISTS (SELECT 1 FROM keks WHERE check_value = ?2 OR state = 'outgoing')
                 AND NOT EXISTS (SELECT 1 FROM keys WHERE wrapped IS NOT NULL) AND NOT EXISTS (SELECT 1 FROM key_cache)",
                params![unused.to_string(), new.to_string(), seconds_now()],
            );
            let tied = tied.map_err(|error| self.fault(&error))?;
            Ok(if tied == 0 { Change::Needless(false) } else { Change::Unrecorded(true) })
        })
    }

    /// Has new keys wrapped by the key-encryption key `new`, which takes the present one's place, and records that.
    /// `new` has to be on the disk. Changes nothing if a rotation is under way.
    ///
    /// # Errors
    /// [`Reason::Configuration`] when the database knows `new` already.
    pub(crate) fn begin_kek_rotation(&self, new: CheckValue) -> Result<(), Refusal> {
        let fault = |error| self.fault(&error);
        self.change(|transaction| {
            let Keks { current, outgoing } = self.read_keks(transaction)?;
            if outgoing.is_some() {
                return Ok(Change::Needless(()));
            }
            let known: Option<i64> = transaction
                .query_row("SELECT since FROM keks WHERE check_value = ?1", [new.to_string()], |row| row.get(0))
                .optional()
                .map_err(fault)?;
            if known.is_some() {
                return Err(Refusal::new(
                    Reason::Configuration,
                    match current == Some(new) {
                        true => format!(
                            "the new key-encryption key is the one in use (check value {new}): provide another one"
                        ),
                        false => format!(
                            "the new key-encryption key (check value {new}) was replaced before and is not taken again: \
                             provide another one"
                        ),
                    },
                ));
            }
            let old = current.map_or("none".to_owned(), |old| old.to_string());
            let keys = count(transaction, &old).map_err(fault)?;
            transaction
                .execute("UPDATE keks SET state = 'outgoing', since = ?1 WHERE state = 'current'", [seconds_now()])
                .map_err(fault)?;
            transaction
                .execute(
                    "INSERT INTO keks (check_value, state, since) VALUES (?1, 'current', ?2)",
                    params![new.to_string(), seconds_now()],
                )
                .map_err(fault)?;
            let detail = format!("from {old} to {new}, {keys} keys to rewrap");
            Ok(Change::Recorded((), Event::of_the_host(Kind::KekRotationStarted, detail)))
        })
    }

    /// Some of the keys that `kek` wraps, by volume and version, those after `after`.
    pub(crate) fn keys_wrapped_by(
        &self,
        kek: CheckValue,
        after: Option<(&VolumeId, u32)>,
        most: u32,
    ) -> Result<Vec<WrappedKey>, Refusal> {
        let (volume, version) = after.map_or(("", 0), |(volume, version)| (volume.as_str(), version));
        let query = format!(
            "SELECT {} FROM keys WHERE kek = ?1 AND (volume_id, version) > (?2, ?3)
             ORDER BY volume_id, version LIMIT ?4",
            keys::COLUMNS
        );
        let connection = self.connection();
        let rows = connection
            .prepare_cached(&query)
            .and_then(|mut statement| {
                statement
                    .query_map(params![kek.to_string(), volume, version, most], keys::read_row)?
                    .collect::<Result<Vec<_>, _>>()
            })
            .map_err(|error| self.fault(&error))?;
        rows.into_iter().map(|row| self.key_record(row)).collect()
    }

    /// How many keys `kek` wraps.
    pub(crate) fn count_keys_wrapped_by(&self, kek: CheckValue) -> Result<u64, Refusal> {
        count(&self.connection(), &kek.to_string()).map_err(|error| self.fault(&error))
    }

    /// Puts keys in the form in which `kek` wraps them, durably, all or none. One that is not as it was any more (it was
    /// destroyed) stays as it is. Returns how many were changed.
    ///
    /// The write-ahead log is not merged: a rotation does that before the old key-encryption key goes.
    pub(crate) fn rewrap(&self, kek: CheckValue, keys: &[Rewrapped]) -> Result<u64, Refusal> {
        let fault = |error| self.fault(&error);
        let kek = kek.to_string();
        let mut connection = self.connection();
        self.check_in_place()?;
        let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate).map_err(fault)?;
        let mut changed = 0;
        {
            let mut update = transaction
                .prepare_cached(
                    "UPDATE keys SET wrapped = ?1, kek = ?2 WHERE volume_id = ?3 AND version = ?4 AND wrapped = ?5",
                )
                .map_err(fault)?;
            for Rewrapped { record, wrapped } in keys {
                let place = params![wrapped, kek, record.info.volume.as_str(), record.info.key.version, record.wrapped];
                changed += update.execute(place).map_err(fault)? as u64;
            }
        }
        transaction.commit().map_err(fault)?;
        Ok(changed)
    }

    /// Merges the write-ahead log into the file, which then holds no key that `kek` wraps, nor does the log.
    ///
    /// # Errors
    /// [`Reason::StoreUnavailable`] when another process reads the database.
    pub(crate) fn merge_before_dropping(&self, kek: CheckValue) -> Result<(), Refusal> {
        match cut_log(&self.connection()).map_err(|error| self.fault(&error))? {
            true => Ok(()),
            false => Err(Refusal::new(
                Reason::StoreUnavailable,
                format!(
                    "all keys are rewrapped, but {} still holds them as the old key-encryption key ({kek}) wraps them, because \
                     another process reads the database: let it finish and run 'volcrypt key rotate-kek' again",
                    self.path.display()
                ),
            )),
        }
    }

    /// Retires the key-encryption key that is on its way out and wraps nothing any more, and records that.
    pub(crate) fn finish_kek_rotation(&self) -> Result<(), Refusal> {
        let fault = |error| self.fault(&error);
        self.change(|transaction| {
            let Keks { current: Some(new), outgoing: Some(old) } = self.read_keks(transaction)? else {
                return Ok(Change::Needless(()));
            };
            let (left, keys) = (count(transaction, &old.to_string()), count(transaction, &new.to_string()));
            if left.map_err(fault)? > 0 {
                return Ok(Change::Needless(()));
            }
            transaction
                .execute("UPDATE keks SET state = 'retired', since = ?1 WHERE state = 'outgoing'", [seconds_now()])
                .map_err(fault)?;
            let detail =
                format!("from {old} to {new}, which wraps {} keys; the old one wraps none", keys.map_err(fault)?);
            Ok(Change::Recorded((), Event::of_the_host(Kind::KekRotated, detail)))
        })
    }
}

fn count(connection: &Connection, kek: &str) -> rusqlite::Result<u64> {
    connection
        .query_row("SELECT count(*) FROM keys WHERE kek = ?1", [kek], |row| row.get::<_, i64>(0))
        .map(i64::unsigned_abs)
}
