//! The audit log: what was done with keys and volumes, and for whom.
//!
//! A record is one line of JSON. Its hash is the SHA-256 of exactly these bytes, and the record holds the
//! hash of the one before it, so that none can be changed, taken out or put between without breaking the
//! chain. No tool of volcrypt's is needed to check a record of the table `audit`:
//!
//! ```text
//! sqlite3 -readonly volcrypt.db 'SELECT record FROM audit WHERE seq = 7' | tr -d '\n' | sha256sum
//! ```
//!
//! gives the `hash` of row 7 and the `previous` of record 8. The fields stand in the order of [`Record`] and
//! [`Event`]; those without a value are left out. `v` is the version of this format, 1; the `previous` of
//! record 1 is 64 zeros.
//!
//! The chain alone cannot tell that its newest records were cut off, or that all of it was written anew. The
//! journal can: every record is announced there with its number and its hash.

mod asker;
mod event;
mod hash;
mod record;

pub use asker::{Asker, Role};
pub use event::{DONE, Event, Kind};
pub use hash::Hash;
pub use record::{Entry, Link, Record, StoredRecord};
