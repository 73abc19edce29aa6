//! Grants: domains that may have a volume although it belongs to somebody else.

use rusqlite::params;
use serde::{Deserialize, Serialize};

use super::change::Change;
use super::{Store, fault, not_enrolled};
use crate::audit::{Event, Kind};
use crate::domain::{Facts, is_uuid};
use crate::refusal::Refusal;
use crate::volume::VolumeId;

/// How far the clock may stand before the time at which a grant was made, in seconds: it is set by others, who correct it.
const CLOCK_TOLERANCE: i64 = 300;

/// A domain may have a volume of another owner for some time.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Grant {
    /// The volume.
    pub volume: VolumeId,
    /// The domain, by its UUID or by its name.
    pub domain: String,
    /// Until when the volume may be opened, in seconds since 1970-01-01 UTC. What is open then stays open.
    pub expires_at: i64,
    /// When it was granted last, in seconds since 1970-01-01 UTC.
    pub created_at: i64,
}

impl Store {
    /// Grants, and records that; a grant for the same volume and domain takes the place of an earlier one.
    ///
    /// # Errors
    /// [`Reason::NoKey`](crate::refusal::Reason::NoKey) when the volume is not enrolled, [`Reason::StoreUnavailable`](crate::refusal::Reason::StoreUnavailable) when the database
    /// cannot be written.
    pub fn grant(&self, grant: &Grant) -> Result<(), Refusal> {
        self.change(|transaction| {
            let inserted = transaction
                .execute(
                    "INSERT OR REPLACE INTO grants (volume_id, domain, expires_at, created_at)
                     SELECT id, ?2, ?3, ?4 FROM volumes WHERE id = ?1",
                    params![grant.volume.as_str(), grant.domain, grant.expires_at, grant.created_at],
                )
                .map_err(|error| self.fault(&error))?;
            if inserted == 0 {
                return Err(not_enrolled(&grant.volume));
            }
            let detail = format!("to domain {:?} until {} seconds after 1970", grant.domain, grant.expires_at);
            Ok(Change::Recorded((), Event::new(Kind::GrantAdded, &grant.volume, detail)))
        })
    }

    /// Takes a grant back, and records that. Returns whether there was one.
    ///
    /// # Errors
    /// [`Reason::StoreUnavailable`](crate::refusal::Reason::StoreUnavailable) when the database cannot be written.
    pub fn revoke(&self, volume: &VolumeId, domain: &str) -> Result<bool, Refusal> {
        self.change(|transaction| {
            let deleted = transaction
                .execute("DELETE FROM grants WHERE volume_id = ?1 AND domain = ?2", params![volume.as_str(), domain])
                .map_err(|error| self.fault(&error))?;
            if deleted == 0 {
                return Ok(Change::Needless(false));
            }
            let from = format!("from domain {domain:?}");
            Ok(Change::Recorded(true, Event::new(Kind::GrantRevoked, volume, from)))
        })
    }

    /// All grants, those that have run out as well, by volume and domain.
    ///
    /// # Errors
    /// [`Reason::StoreUnavailable`](crate::refusal::Reason::StoreUnavailable) when the database cannot be read.
    pub fn grants(&self) -> Result<Vec<Grant>, Refusal> {
        let connection = self.connection();
        let rows = connection
            .prepare("SELECT volume_id, domain, expires_at, created_at FROM grants ORDER BY volume_id, domain")
            .and_then(|mut statement| {
                let rows = statement
                    .query_map([], |row| Ok((row.get::<_, String>(0)?, row.get(1)?, row.get(2)?, row.get(3)?)))?;
                rows.collect::<Result<Vec<_>, _>>()
            })
            .map_err(|error| self.fault(&error))?;
        rows.into_iter()
            .map(|(volume, domain, expires_at, created_at)| {
                let volume = volume.parse().map_err(|error| fault::corrupt(&self.path, &format!("{error}")))?;
                Ok(Grant { volume, domain, expires_at, created_at })
            })
            .collect()
    }

    /// Whether `domain` may have `volume` at `now` by a grant. One that was made for a UUID is no grant for
    /// a domain that has it as its name.
    ///
    /// A grant holds from when it was made. One that has run out stays in the database, and would hold again on a host
    /// whose clock stands far back, as in 1970 after a boot with an empty battery.
    ///
    /// # Errors
    /// [`Reason::StoreUnavailable`](crate::refusal::Reason::StoreUnavailable) when the database cannot be read.
    pub fn is_granted(&self, volume: &VolumeId, domain: &Facts, now: i64) -> Result<bool, Refusal> {
        let name = (!is_uuid(&domain.name)).then_some(&domain.name);
        self.connection()
            .query_row(
                "SELECT EXISTS (SELECT 1 FROM grants WHERE volume_id = ?1 AND domain IN (?2, ?3) AND expires_at > ?4
                 AND created_at <= ?5)",
                params![volume.as_str(), name, domain.uuid, now, now.saturating_add(CLOCK_TOLERANCE)],
                |row| row.get(0),
            )
            .map_err(|error| self.fault(&error))
    }
}
