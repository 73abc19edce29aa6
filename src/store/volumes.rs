//! The records of enrolled volumes.

use std::fmt;

use rusqlite::{ErrorCode, OptionalExtension, Row, params};
use serde::de::value::Error as ValueError;
use serde::de::{DeserializeOwned, IntoDeserializer};
use serde::{Deserialize, Serialize};

use super::change::Change;
use super::{Store, fault};
use crate::audit::{Event, Kind};
use crate::keys::{CheckValue, ForeignKey, KeyHandle, RecordedKey};
use crate::policy::{KeySize, Provider};
use crate::refusal::{Reason, Refusal};
use crate::volume::VolumeId;

/// What is known of an enrolled volume: which device it is, and every parameter of the cipher that
/// decides what stands on it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeRecord {
    /// The name of the volume.
    pub id: VolumeId,
    /// The device that holds it.
    pub device: EnrolledDevice,
    /// The size of the device in bytes.
    pub size_bytes: u64,
    /// The profile it was enrolled with.
    pub profile: String,
    /// The on-disk format.
    pub provider: Provider,
    /// The cipher in dm-crypt's notation, for example `aes-xts-plain64`.
    pub cipher: String,
    /// The size of the volume key.
    pub key_size: KeySize,
    /// The unit of encryption in bytes: 512, 1024, 2048 or 4096.
    pub sector_size: u32,
    /// Which key it is encrypted with.
    pub key: KeyHandle,
    /// What tells the right volume key from a wrong one.
    pub check_value: CheckValue,
    /// When it was enrolled, in seconds since 1970-01-01 UTC.
    pub enrolled_at: i64,
    /// What may be done with it.
    pub state: VolumeState,
    /// Whom it belongs to: only domains of the same owner get it without a grant. A volume without an
    /// owner is any domain's that libvirt gives it to.
    pub owner: Option<String>,
}

/// What may be done with a volume that was enrolled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum VolumeState {
    /// It can be used: its key is stored, and was read back and compared.
    Enrolled,
    /// It cannot be used until it is enrolled again; its key is kept.
    Retired,
    /// Its key is destroyed, and with it what stood on the volume.
    Destroyed,
}

impl VolumeState {
    fn as_str(self) -> &'static str {
        match self {
            VolumeState::Enrolled => "enrolled",
            VolumeState::Retired => "retired",
            VolumeState::Destroyed => "destroyed",
        }
    }
}

impl fmt::Display for VolumeState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// How the device of an enrolled volume is known again.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct EnrolledDevice {
    /// The iSCSI qualified name of the target.
    pub iscsi_target: Option<String>,
    /// The logical unit number.
    pub lun: Option<u64>,
    /// The world-wide identifier as sysfs shows it.
    pub wwid: Option<String>,
    /// The device-mapper UUID of a logical volume.
    pub dm_uuid: Option<String>,
}

/// What the kernel said of the device, in words.
impl fmt::Display for EnrolledDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let parts = [
            self.iscsi_target.as_ref().map(|target| format!("target {target}")),
            self.lun.map(|lun| format!("LUN {lun}")),
            self.wwid.as_ref().map(|wwid| format!("WWID {wwid}")),
            self.dm_uuid.as_ref().map(|uuid| format!("device-mapper UUID {uuid}")),
        ];
        let known: Vec<String> = parts.into_iter().flatten().collect();
        match known.is_empty() {
            true => f.write_str("not told by the kernel"),
            false => f.write_str(&known.join(", ")),
        }
    }
}

impl VolumeRecord {
    /// The key that it names, as a key manager is asked for it.
    pub fn recorded_key(&self) -> RecordedKey {
        RecordedKey { volume: self.id.clone(), handle: self.key.clone(), check_value: self.check_value }
    }

    /// What its key is, in words, if volcrypt has not made it.
    pub fn foreign_key(&self) -> Option<String> {
        let in_words = || match ForeignKey::named_by(&self.id, &self.key) {
            Some(foreign) => foreign.to_string(),
            None => format!("a key called {}", self.key.id),
        };
        (!self.key.is_own(&self.id)).then(in_words)
    }

    /// The names of the fields in which `self` and `other` differ, of those that enrolling pins.
    fn differences(&self, other: &VolumeRecord) -> Vec<&'static str> {
        [
            ("device", self.device != other.device),
            ("size_bytes", self.size_bytes != other.size_bytes),
            ("profile", self.profile != other.profile),
            ("provider", self.provider != other.provider),
            ("cipher", self.cipher != other.cipher),
            ("key_size", self.key_size != other.key_size),
            ("sector_size", self.sector_size != other.sector_size),
            ("key", self.key != other.key),
            ("check_value", self.check_value != other.check_value),
        ]
        .into_iter()
        .filter_map(|(name, differs)| differs.then_some(name))
        .collect()
    }
}

/// The refusal for a volume without a record.
pub(crate) fn not_enrolled(volume: &VolumeId) -> Refusal {
    Refusal::new(Reason::NoKey, format!("volume {volume} is not enrolled: 'volcrypt volume list' shows those that are"))
}

/// What makes a volume's device the one with these parameters: target, LUN, WWID and device-mapper UUID.
const IS_DEVICE: &str = "((iscsi_target = ?1 AND lun = ?2) OR wwid = ?3 OR dm_uuid = ?4)";

const COLUMNS: &str = "id, iscsi_target, lun, wwid, size_bytes, profile, provider, cipher, key_size, sector_size, \
                       check_value, enrolled_at, state, owner, dm_uuid, key_id, key_version";

impl Store {
    /// The record of `volume`, if it is enrolled.
    ///
    /// # Errors
    /// [`Reason::StoreUnavailable`] when the database cannot be read or the record makes no sense.
    pub fn volume(&self, volume: &VolumeId) -> Result<Option<VolumeRecord>, Refusal> {
        let query = format!("SELECT {COLUMNS} FROM volumes WHERE id = ?1");
        let row = self.connection().query_row(&query, [volume.as_str()], read_row).optional();
        row.map_err(|error| self.fault(&error))?.map(|row| self.record(row)).transpose()
    }

    /// The volume, enrolled or retired, that `device` holds.
    ///
    /// # Errors
    /// [`Reason::StoreUnavailable`] when the database cannot be read.
    pub fn held_by(&self, device: &EnrolledDevice) -> Result<Option<VolumeId>, Refusal> {
        // A number that no database can hold is no volume's.
        let lun = device.lun.and_then(|lun| i64::try_from(lun).ok());
        let id: Option<String> = self
            .connection()
            .query_row(
                &format!("SELECT id FROM volumes WHERE state <> 'destroyed' AND {IS_DEVICE}"),
                params![device.iscsi_target, lun, device.wwid, device.dm_uuid],
                |row| row.get(0),
            )
            .optional()
            .map_err(|error| self.fault(&error))?;
        id.map(|id| id.parse().map_err(|error| fault::corrupt(&self.path, &format!("{error}")))).transpose()
    }

    /// The records of all enrolled volumes, by id.
    ///
    /// # Errors
    /// As [`Store::volume`].
    pub fn volumes(&self) -> Result<Vec<VolumeRecord>, Refusal> {
        let connection = self.connection();
        let rows = connection
            .prepare(&format!("SELECT {COLUMNS} FROM volumes ORDER BY id"))
            .and_then(|mut statement| statement.query_map([], read_row)?.collect::<Result<Vec<_>, _>>())
            .map_err(|error| self.fault(&error))?;
        rows.into_iter().map(|row| self.record(row)).collect()
    }

    /// The volumes, enrolled or retired, whose records name `key`, by id.
    ///
    /// # Errors
    /// [`Reason::StoreUnavailable`] when the database cannot be read.
    pub fn volumes_with(&self, key: &KeyHandle) -> Result<Vec<VolumeId>, Refusal> {
        let connection = self.connection();
        let ids = connection
            .prepare_cached(
                "SELECT id FROM volumes WHERE key_id = ?1 AND key_version = ?2 AND state <> 'destroyed' ORDER BY id",
            )
            .and_then(|mut statement| {
                let ids = statement.query_map(params![key.id.as_str(), key.version], |row| row.get::<_, String>(0))?;
                ids.collect::<Result<Vec<_>, _>>()
            })
            .map_err(|error| self.fault(&error))?;
        let parse = |id: String| id.parse().map_err(|error| fault::corrupt(&self.path, &format!("{error}")));
        ids.into_iter().map(parse).collect()
    }

    /// Enrols a volume, and records that. To repeat a record that is there, whatever its `enrolled_at`,
    /// changes nothing.
    ///
    /// # Errors
    /// [`Reason::ForeignData`] when the id or the device is enrolled already as something else,
    /// [`Reason::StoreUnavailable`] when the database cannot be written.
    pub fn enrol(&self, record: &VolumeRecord) -> Result<(), Refusal> {
        let fault = |error| self.fault(&error);
        self.change(|transaction| {
            let query = format!("SELECT {COLUMNS} FROM volumes WHERE id = ?1");
            let present = transaction.query_row(&query, [record.id.as_str()], read_row).optional().map_err(fault)?;
            if let Some(present) = present {
                let differences = self.record(present)?.differences(record);
                return match differences.is_empty() {
                    true => Ok(Change::Needless(())),
                    false => Err(Refusal::new(
                        Reason::ForeignData,
                        format!(
                            "volume {} is enrolled already with another {}: if the old one is not \
                             needed any more, run 'volcrypt volume destroy {}'",
                            record.id,
                            differences.join(", "),
                            record.id
                        ),
                    )),
                };
            }

            let device = &record.device;
            let lun = device.lun.map(|lun| signed(record, "lun", lun)).transpose()?;
            let holder: Option<String> = transaction
                .query_row(
                    &format!("SELECT id FROM volumes WHERE state = 'enrolled' AND {IS_DEVICE}"),
                    params![device.iscsi_target, lun, device.wwid, device.dm_uuid],
                    |row| row.get(0),
                )
                .optional()
                .map_err(fault)?;
            if let Some(holder) = holder {
                return Err(Refusal::new(
                    Reason::ForeignData,
                    format!(
                        "the device of volume {} is enrolled already as volume {holder}: if that one's data is not \
                         needed any more, run 'volcrypt volume retire {holder}'",
                        record.id
                    ),
                ));
            }

            self.check_secret_is_free(transaction, record)?;

            transaction
                .execute(
                    &format!(
                        "INSERT INTO volumes ({COLUMNS})
                         VALUES (?1,?2,?3,?4,?5,?6,?7,?8,?9,?10,?11,?12,?13,?14,?15,?16,?17)"
                    ),
                    params![
                        record.id.as_str(),
                        device.iscsi_target,
                        lun,
                        device.wwid,
                        signed(record, "size_bytes", record.size_bytes)?,
                        record.profile,
                        record.provider.to_string(),
                        record.cipher,
                        record.key_size.bits(),
                        record.sector_size,
                        record.check_value.to_string(),
                        record.enrolled_at,
                        record.state.as_str(),
                        record.owner,
                        device.dm_uuid,
                        record.key.id.as_str(),
                        record.key.version,
                    ],
                )
                .map_err(fault)?;
            let key = record.foreign_key().map(|key| format!("; its key is {key}"));
            let event = Event::new(Kind::Enrolled, &record.id, format!("{device}{}", key.unwrap_or_default()));
            Ok(Change::Recorded((), event))
        })
    }

    /// Puts `volume` from one of the states `from` into state `to`, records `event`, and says which it was
    /// in; nothing if it is in none of them. Its key is not touched.
    ///
    /// # Errors
    /// [`Reason::ForeignData`] when its device is enrolled as another volume by now,
    /// [`Reason::StoreUnavailable`] when the database cannot be written.
    pub fn change_state(
        &self,
        volume: &VolumeId,
        from: &[VolumeState],
        to: VolumeState,
        event: Option<Event>,
    ) -> Result<Option<VolumeState>, Refusal> {
        self.change(|transaction| {
            let present: Option<String> = transaction
                .query_row("SELECT state FROM volumes WHERE id = ?1", [volume.as_str()], |row| row.get(0))
                .optional()
                .map_err(|error| self.fault(&error))?;
            let Some(present) = from.iter().copied().find(|state| Some(state.as_str()) == present.as_deref()) else {
                return Ok(Change::Needless(None));
            };
            let state = params![volume.as_str(), to.as_str()];
            let changed = transaction.execute("UPDATE volumes SET state = ?2 WHERE id = ?1", state);
            changed.map_err(|error| match error.sqlite_error_code() {
                Some(ErrorCode::ConstraintViolation) => Refusal::new(
                    Reason::ForeignData,
                    format!(
                        "the device of volume {volume} is enrolled as another volume by now: 'volcrypt volume list' \
                         shows as which; retire that one first"
                    ),
                ),
                _ => self.fault(&error),
            })?;
            Ok(match event {
                Some(event) => Change::Recorded(Some(present), event),
                None => Change::Unrecorded(Some(present)),
            })
        })
    }

    /// Gives `volume` to `owner`, or to nobody, and records that. Returns whether there is such a volume.
    ///
    /// # Errors
    /// [`Reason::StoreUnavailable`] when the database cannot be written.
    pub fn set_owner(&self, volume: &VolumeId, owner: Option<&str>) -> Result<bool, Refusal> {
        self.change(|transaction| {
            let changed =
                transaction.execute("UPDATE volumes SET owner = ?2 WHERE id = ?1", params![volume.as_str(), owner]);
            if changed.map_err(|error| self.fault(&error))? == 0 {
                return Ok(Change::Needless(false));
            }
            let to = owner.map_or("to everybody".to_owned(), |owner| format!("to {owner:?}"));
            Ok(Change::Recorded(true, Event::new(Kind::OwnerChanged, volume, to)))
        })
    }

    fn record(&self, row: VolumeRow) -> Result<VolumeRecord, Refusal> {
        let name = row.id.clone();
        row.parse()
            .ok_or_else(|| fault::corrupt(&self.path, &format!("the record of volume {name:?} cannot be understood")))
    }
}

/// A row as SQLite types it.
struct VolumeRow {
    id: String,
    iscsi_target: Option<String>,
    lun: Option<i64>,
    wwid: Option<String>,
    size_bytes: i64,
    profile: String,
    provider: String,
    cipher: String,
    key_size: u32,
    sector_size: u32,
    check_value: String,
    enrolled_at: i64,
    state: String,
    owner: Option<String>,
    dm_uuid: Option<String>,
    key_id: Option<String>,
    key_version: u32,
}

impl VolumeRow {
    fn parse(self) -> Option<VolumeRecord> {
        let lun = self.lun.map(u64::try_from).transpose().ok()?;
        Some(VolumeRecord {
            id: self.id.parse().ok()?,
            device: EnrolledDevice { iscsi_target: self.iscsi_target, lun, wwid: self.wwid, dm_uuid: self.dm_uuid },
            size_bytes: self.size_bytes.try_into().ok()?,
            profile: self.profile,
            // The word in the table is the word in JSON, so serde's names are the only list of them.
            provider: word(self.provider)?,
            cipher: self.cipher,
            key_size: self.key_size.try_into().ok()?,
            sector_size: self.sector_size,
            key: KeyHandle { id: self.key_id?.parse().ok()?, version: self.key_version },
            check_value: self.check_value.try_into().ok()?,
            enrolled_at: self.enrolled_at,
            state: word(self.state)?,
            owner: self.owner,
        })
    }
}

fn word<T: DeserializeOwned>(text: String) -> Option<T> {
    T::deserialize(IntoDeserializer::<ValueError>::into_deserializer(text)).ok()
}

fn read_row(row: &Row<'_>) -> rusqlite::Result<VolumeRow> {
    Ok(VolumeRow {
        id: row.get(0)?,
        iscsi_target: row.get(1)?,
        lun: row.get(2)?,
        wwid: row.get(3)?,
        size_bytes: row.get(4)?,
        profile: row.get(5)?,
        provider: row.get(6)?,
        cipher: row.get(7)?,
        key_size: row.get(8)?,
        sector_size: row.get(9)?,
        check_value: row.get(10)?,
        enrolled_at: row.get(11)?,
        state: row.get(12)?,
        owner: row.get(13)?,
        dm_uuid: row.get(14)?,
        key_id: row.get(15)?,
        key_version: row.get(16)?,
    })
}

/// SQLite's integers are signed.
fn signed(record: &VolumeRecord, field: &str, value: u64) -> Result<i64, Refusal> {
    i64::try_from(value).map_err(|_| {
        Refusal::new(
            Reason::StoreUnavailable,
            format!("{field} = {value} of volume {} is larger than the database can hold ({})", record.id, i64::MAX),
        )
    })
}
