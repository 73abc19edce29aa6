//! On which terms domains have the volumes that a database holds, and where another one has others.

use std::collections::BTreeMap;
use std::path::Path;

use rusqlite::Connection;

use super::held::read_unused;
use crate::refusal::Refusal;

/// The states, owners and grants in a database.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Terms {
    /// State and owner of each volume, by its id.
    volumes: BTreeMap<String, (String, Option<String>)>,
    /// Until when each grant holds, by volume and domain.
    grants: BTreeMap<(String, String), i64>,
}

/// Something that is not as it was in the database before.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Changed<'a> {
    /// What may be done with a volume.
    State {
        /// The volume's id.
        volume: &'a str,
        /// Its state.
        now: &'a str,
        /// Its state in the database before.
        before: &'a str,
    },
    /// Whom a volume belongs to.
    Owner {
        /// The volume's id.
        volume: &'a str,
        /// Its owner.
        now: Option<&'a str>,
        /// Its owner in the database before.
        before: Option<&'a str>,
    },
    /// A grant that holds, and held in the database before for a shorter time or not at all.
    Grant {
        /// The volume's id.
        volume: &'a str,
        /// The domain, by its UUID or by its name.
        domain: &'a str,
        /// Until when it holds, in seconds since 1970-01-01 UTC.
        until: i64,
        /// The same in the database before, if it held there.
        before: Option<i64>,
    },
}

impl Terms {
    /// Those of the database at `path`, which nobody may be using. It may be of an older volcrypt.
    ///
    /// # Errors
    /// [`Reason::StoreUnavailable`](crate::refusal::Reason::StoreUnavailable) when it cannot be read, when not all of it
    /// is in the file, and when it is so old that it knows no owners.
    pub fn in_file(path: &Path) -> Result<Self, Refusal> {
        read_unused(path, Terms::by)
    }

    pub(super) fn by(connection: &Connection) -> rusqlite::Result<Self> {
        let volumes = connection
            .prepare("SELECT id, state, owner FROM volumes")?
            .query_map([], |row| Ok((row.get(0)?, (row.get(1)?, row.get(2)?))))?
            .collect::<Result<_, _>>()?;
        let grants = connection
            .prepare("SELECT volume_id, domain, expires_at FROM grants")?
            .query_map([], |row| Ok(((row.get(0)?, row.get(1)?), row.get(2)?)))?
            .collect::<Result<_, _>>()?;
        Ok(Terms { volumes, grants })
    }

    /// What is not as in `before`, of the volumes that both hold, at `now` in seconds since 1970-01-01 UTC.
    pub fn changed_since<'a>(&'a self, before: &'a Terms, now: i64) -> Vec<Changed<'a>> {
        let mut changed = Vec::new();
        for (volume, (state, owner)) in &self.volumes {
            let Some((state_before, owner_before)) = before.volumes.get(volume) else { continue };
            if state != state_before {
                changed.push(Changed::State { volume, now: state, before: state_before });
            }
            if owner != owner_before {
                changed.push(Changed::Owner { volume, now: owner.as_deref(), before: owner_before.as_deref() });
            }
        }
        for (grant, &until) in &self.grants {
            let (volume, domain) = grant;
            let until_before = before.grants.get(grant).copied().filter(|until| *until > now);
            if until > now && before.volumes.contains_key(volume) && until_before.is_none_or(|before| before < until) {
                changed.push(Changed::Grant { volume, domain, until, before: until_before });
            }
        }
        changed
    }
}
