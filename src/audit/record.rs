//! Records, and the chain they make.

use serde::{Deserialize, Serialize};

use super::{Event, Hash};

/// The version of the format of records.
const VERSION: u32 = 1;

/// An event with its place in the log. Its JSON, in this order of fields, is what is hashed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    #[serde(rename = "v")]
    version: u32,
    /// Its number; the first one has 1.
    pub seq: i64,
    /// When it was written, in seconds since 1970-01-01 UTC.
    pub time: i64,
    /// What happened.
    #[serde(flatten)]
    pub event: Event,
    /// The hash of the record before it.
    pub previous: Hash,
}

/// A row of the log as it stands in the database, where anything may have been done to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredRecord {
    /// The number of the row.
    pub seq: i64,
    /// What should be the JSON of a [`Record`].
    pub record: Vec<u8>,
    /// What should be the [`Hash`] of these bytes, as text.
    pub hash: Vec<u8>,
}

/// The end of a chain: a record's number and hash. The default is the end of an empty one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Link {
    /// The number.
    pub seq: i64,
    /// The hash.
    pub hash: Hash,
}

impl Link {
    /// The record of `event` that follows, written at `time`, as JSON; and the chain's new end.
    pub fn append(self, event: Event, time: i64) -> serde_json::Result<(String, Link)> {
        let record =
            Record { version: VERSION, seq: self.seq.saturating_add(1), time, event: event.cut(), previous: self.hash };
        let text = serde_json::to_string(&record)?;
        let link = Link { seq: record.seq, hash: Hash::of(text.as_bytes()) };
        Ok((text, link))
    }

    /// The chain's end after `stored`, which has to follow it as it was written.
    ///
    /// # Errors
    /// One sentence that names the record which is not what was written, or is missing.
    pub fn follow(self, stored: &StoredRecord) -> Result<Link, String> {
        let expected = self.seq.saturating_add(1);
        let found = stored.seq;
        if found != expected {
            return Err(format!("record {expected} is missing: record {found} comes in its place"));
        }
        let hash = Hash::of(&stored.record);
        if stored.hash != hash.to_string().as_bytes() {
            return Err(format!(
                "record {found} was changed: its SHA-256 is {hash}, which is not what stands beside it"
            ));
        }
        let record =
            stored.parse().map_err(|error| format!("record {found} was changed: it is no record ({error})"))?;
        if record.seq != expected {
            return Err(format!("record {found} was changed: it is record {} in another place", record.seq));
        }
        match record.previous == self.hash {
            true => Ok(Link { seq: expected, hash }),
            false => Err(format!(
                "record {found} does not follow record {}: one of the two was changed together with its hash",
                self.seq
            )),
        }
    }
}

impl StoredRecord {
    /// The record that this is.
    ///
    /// # Errors
    /// When it is none any more.
    pub fn parse(&self) -> serde_json::Result<Record> {
        serde_json::from_slice(&self.record)
    }

    /// The record with its hash, or what is left of them.
    pub fn read(&self) -> Entry {
        let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
        match (self.parse(), Hash::try_from(text(&self.hash))) {
            (Ok(record), Ok(hash)) => Entry::Record { record: Box::new(record), hash },
            _ => Entry::Damaged { seq: self.seq, damaged: text(&self.record) },
        }
    }
}

/// What a row of the log says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Entry {
    /// This record.
    Record {
        /// The record.
        #[serde(flatten)]
        record: Box<Record>,
        /// Its hash.
        hash: Hash,
    },
    /// No record any more.
    Damaged {
        /// The number of the row.
        seq: i64,
        /// Its text.
        damaged: String,
    },
}
