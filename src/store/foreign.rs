//! Which volumes have secrets of other programs' for keys.

use rusqlite::{Connection, OptionalExtension, params};

use super::{Store, VolumeRecord, fault};
use crate::keys::{ForeignKey, KeyHandle, KeyId, SecretId};
use crate::refusal::{Reason, Refusal};
use crate::volume::VolumeId;

impl Store {
    /// The volumes, enrolled or retired, whose keys come from secrets of other programs', by id.
    ///
    /// # Errors
    /// [`Reason::StoreUnavailable`] when the database cannot be read.
    pub fn foreign_keys(&self) -> Result<Vec<(VolumeId, ForeignKey)>, Refusal> {
        let connection = self.connection();
        let rows = connection
            .prepare_cached(
                "SELECT id, key_id, key_version FROM volumes WHERE key_id <> id AND state <> 'destroyed' ORDER BY id",
            )
            .and_then(|mut statement| {
                let rows = statement.query_map([], |row| {
                    Ok((row.get::<_, String>(0)?, row.get::<_, String>(1)?, row.get::<_, u32>(2)?))
                })?;
                rows.collect::<Result<Vec<_>, _>>()
            })
            .map_err(|error| self.fault(&error))?;
        let corrupt = |detail: String| fault::corrupt(&self.path, &detail);
        let mut keys = Vec::with_capacity(rows.len());
        for (volume, id, version) in rows {
            let volume: VolumeId = volume.parse().map_err(|error| corrupt(format!("{error}")))?;
            let id: KeyId = id.parse().map_err(|error| corrupt(format!("{error}")))?;
            let key = ForeignKey::named_by(&volume, &KeyHandle { id, version });
            keys.extend(key.map(|key| (volume, key)));
        }
        Ok(keys)
    }

    /// Whether `secret` can become the key of `volume` as far as this host knows, before that is noted anywhere.
    ///
    /// # Errors
    /// [`Reason::WrongKey`] when another volume has it for its key, [`Reason::StoreUnavailable`] when the database cannot be
    /// read.
    pub fn check_secret(&self, volume: &VolumeId, secret: &SecretId) -> Result<(), Refusal> {
        self.check_is_free(&self.connection(), volume, secret)
    }

    /// Refuses a record whose key comes from a secret that another volume has for its key.
    pub(super) fn check_secret_is_free(&self, connection: &Connection, record: &VolumeRecord) -> Result<(), Refusal> {
        match ForeignKey::named_by(&record.id, &record.key) {
            Some(foreign) => self.check_is_free(connection, &record.id, &foreign.secret),
            None => Ok(()),
        }
    }

    fn check_is_free(&self, connection: &Connection, volume: &VolumeId, secret: &SecretId) -> Result<(), Refusal> {
        let holder: Option<String> = connection
            .query_row(
                "SELECT id FROM volumes WHERE id <> ?1 AND key_id <> id AND state <> 'destroyed'
                 AND (key_id = ?2 OR key_id GLOB ?2 || '.*')",
                params![volume.as_str(), secret.as_str()],
                |row| row.get(0),
            )
            .optional()
            .map_err(|error| self.fault(&error))?;
        match holder {
            None => Ok(()),
            Some(holder) => Err(Refusal::new(
                Reason::WrongKey,
                format!(
                    "secret {secret} is the key of volume {holder}, and each volume has one of its own: give the secret that \
                     Cinder has made for volume {volume}"
                ),
            )),
        }
    }
}
