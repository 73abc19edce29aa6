//! The audit log in the database: see [`crate::audit`] for what a record is.
//!
//! A record of a change is part of the change's own transaction. One that stands alone, of a key's use or
//! a refusal, is committed to the write-ahead log, which is written through to the disk (one fsync), and
//! merged into the file only by [`Store::merge_audit`], a moment later and once for many: that costs two
//! more, for which the guest's open would wait. Until then a copy of the file alone lacks the newest of
//! these records, and never a key or a volume, for every change of those merges the log at once, unless
//! another process, such as a backup, reads the database meanwhile.

use rusqlite::types::ValueRef;
use rusqlite::{Connection, OptionalExtension, Row, Transaction, TransactionBehavior, params};
use serde::{Deserialize, Serialize};

use super::{Store, fault, seconds_now};
use crate::audit::{Entry, Event, Kind, Link, StoredRecord};
use crate::refusal::Refusal;
use crate::volume::VolumeId;

/// How many rows one call looks at: for so long no key is read and no record written.
const ROWS_AT_A_TIME: usize = 1000;
/// After how many bytes of records a call ends earlier. A message to a client stays far below its limit.
const BYTES_AT_A_TIME: usize = 1 << 20;

/// Which records are looked for.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AuditQuery {
    /// Only those before this one.
    pub before: Option<i64>,
    /// Only those about this volume.
    pub volume: Option<VolumeId>,
    /// Only those of this kind.
    pub kind: Option<Kind>,
    /// Only those written at this time or later, in seconds since 1970-01-01 UTC.
    pub since: Option<i64>,
}

/// Some of the records that were looked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AuditPage {
    /// The records, the newest first. What is no record any more is always among them.
    pub entries: Vec<Entry>,
    /// Before which one to look on; `None` when there are no more.
    pub before: Option<i64>,
}

/// What became of verifying a part of the log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verified {
    /// The last record that is as it was written.
    pub end: Link,
    /// What is wrong with the one after it, in one sentence.
    pub broken: Option<String>,
    /// Whether the log ends there.
    pub complete: bool,
}

impl Store {
    /// Appends a record of `event`. When this returns it is on the disk.
    ///
    /// # Errors
    /// [`crate::refusal::Reason::StoreUnavailable`] when the database cannot be written.
    pub fn append_audit(&self, event: Event) -> Result<Link, Refusal> {
        let end = self.append_silently(event.clone())?;
        // Not while others wait for the connection: the journal may take its time.
        event.announce(end);
        Ok(end)
    }

    /// The same without telling the journal: of a database that is not in its place yet.
    ///
    /// # Errors
    /// As [`Store::append_audit`].
    pub fn append_silently(&self, event: Event) -> Result<Link, Refusal> {
        let mut connection = self.connection();
        self.check_in_place()?;
        let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate);
        self.commit_with(transaction.map_err(|error| self.fault(&error))?, event)
    }

    /// When the key of `volume` was used last by this host, in seconds since 1970-01-01 UTC.
    ///
    /// # Errors
    /// As [`Store::audit`].
    pub fn last_use(&self, volume: &VolumeId) -> Result<Option<i64>, Refusal> {
        self.connection()
            .prepare_cached("SELECT used_at FROM key_uses WHERE volume_id = ?1")
            .and_then(|mut statement| statement.query_row([volume.as_str()], |row| row.get(0)).optional())
            .map_err(|error| self.fault(&error))
    }

    /// Merges the records that were appended into the file, so that it alone is the whole log. Returns whether that was
    /// done: it does not wait for another process that reads the database.
    pub fn merge_audit(&self) -> bool {
        self.merge_log(&self.connection())
    }

    /// Commits a change together with the record of it.
    pub(super) fn commit_recorded(&self, transaction: Transaction<'_>, event: Event) -> Result<(), Refusal> {
        let end = self.commit_with(transaction, event.clone())?;
        event.announce(end);
        Ok(())
    }

    fn commit_with(&self, transaction: Transaction<'_>, event: Event) -> Result<Link, Refusal> {
        let fault = |error| self.fault(&error);
        let end = end(&transaction).map_err(fault)?;
        let used = event.volume.clone().filter(|_| event.kind == Kind::KeyUsed);
        let end = end.ok_or_else(|| fault::corrupt(&self.path, "the newest audit record has no hash"))?;
        let (record, end) = end
            .append(event, seconds_now())
            .map_err(|error| fault::corrupt(&self.path, &format!("an audit record cannot be written: {error}")))?;
        transaction
            .execute(
                "INSERT INTO audit (seq, record, hash) VALUES (?1, ?2, ?3)",
                params![end.seq, record, end.hash.to_string()],
            )
            .map_err(fault)?;
        if let Some(volume) = used {
            transaction
                .prepare_cached("INSERT OR REPLACE INTO key_uses (volume_id, used_at) VALUES (?1, ?2)")
                .and_then(|mut statement| statement.execute(params![volume.as_str(), seconds_now()]))
                .map_err(fault)?;
        }
        transaction.commit().map_err(fault)?;
        Ok(end)
    }

    /// Looks for records, from the newest on; a page at a time, so that others get their turn.
    ///
    /// # Errors
    /// [`crate::refusal::Reason::StoreUnavailable`] when the database cannot be read.
    pub fn audit(&self, query: &AuditQuery) -> Result<AuditPage, Refusal> {
        let before = query.before.unwrap_or(i64::MAX);
        let Rows { rows, more } = self.audit_rows("seq < ?1 ORDER BY seq DESC", before)?;
        let before = rows.last().filter(|_| more).map(|row| row.seq);
        let entries = rows.iter().map(StoredRecord::read).filter(|entry| query.matches(entry)).collect();
        Ok(AuditPage { entries, before })
    }

    /// Checks the records after `from`, some at a time. To check all, start with the default and go on
    /// from each end until the answer is complete or something is broken.
    ///
    /// # Errors
    /// As [`Store::audit`].
    pub fn verify_audit(&self, from: Link) -> Result<Verified, Refusal> {
        // Not even a row before the first may be there.
        let after = if from.seq == 0 { i64::MIN } else { from.seq };
        let Rows { rows, more } = self.audit_rows("seq > ?1 ORDER BY seq", after)?;
        let mut end = from;
        for row in &rows {
            match end.follow(row) {
                Ok(next) => end = next,
                Err(sentence) => return Ok(Verified { end, broken: Some(sentence), complete: false }),
            }
        }
        Ok(Verified { end, broken: None, complete: !more })
    }

    fn audit_rows(&self, condition: &str, bound: i64) -> Result<Rows, Refusal> {
        let query = format!("SELECT seq, record, hash FROM audit WHERE {condition} LIMIT {ROWS_AT_A_TIME}");
        let connection = self.connection();
        let read = || -> rusqlite::Result<Rows> {
            let mut statement = connection.prepare(&query)?;
            let (mut rows, mut bytes) = (Vec::new(), 0);
            for row in statement.query_map([bound], read_row)? {
                let row = row?;
                bytes += row.record.len() + row.hash.len();
                rows.push(row);
                if bytes > BYTES_AT_A_TIME {
                    return Ok(Rows { rows, more: true });
                }
            }
            let more = rows.len() == ROWS_AT_A_TIME;
            Ok(Rows { rows, more })
        };
        read().map_err(|error| self.fault(&error))
    }
}

/// Rows in a row.
struct Rows {
    rows: Vec<StoredRecord>,
    /// Whether there may be more.
    more: bool,
}

impl AuditQuery {
    fn matches(&self, entry: &Entry) -> bool {
        let Entry::Record { record, .. } = entry else { return true };
        self.volume.as_ref().is_none_or(|volume| record.event.volume.as_ref() == Some(volume))
            && self.kind.is_none_or(|kind| record.event.kind == kind)
            && self.since.is_none_or(|since| record.time >= since)
    }
}

/// The end of the chain; `None` if what stands there is no hash.
fn end(connection: &Connection) -> rusqlite::Result<Option<Link>> {
    let newest = connection
        .query_row("SELECT seq, hash FROM audit ORDER BY seq DESC LIMIT 1", [], |row| {
            Ok((row.get(0)?, row.get::<_, String>(1)?))
        })
        .optional()?;
    Ok(match newest {
        Some((seq, hash)) => hash.try_into().ok().map(|hash| Link { seq, hash }),
        None => Some(Link::default()),
    })
}

/// A row as its bytes are, whatever became of them.
fn read_row(row: &Row<'_>) -> rusqlite::Result<StoredRecord> {
    let bytes = |column| match row.get_ref(column)? {
        ValueRef::Text(bytes) | ValueRef::Blob(bytes) => Ok(bytes.to_vec()),
        _ => Ok::<_, rusqlite::Error>(Vec::new()),
    };
    Ok(StoredRecord { seq: row.get(0)?, record: bytes(1)?, hash: bytes(2)? })
}
