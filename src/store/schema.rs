//! The tables, and how an older database is brought to the newest version.

use std::path::Path;

use rusqlite::{Connection, TransactionBehavior};

use super::fault;
use crate::refusal::{Reason, Refusal};

/// One step from a version of the schema to the next: SQL, run in a transaction of its own.
pub(super) type Migration = &'static str;

/// The steps in order. The version of a database (`PRAGMA user_version`) is the number of steps it
/// has taken. A step that was released is never changed.
pub(super) const MIGRATIONS: &[Migration] = &[
    include_str!("schema/1.sql"),
    include_str!("schema/2.sql"),
    include_str!("schema/3.sql"),
    include_str!("schema/4.sql"),
    include_str!("schema/5.sql"),
    include_str!("schema/6.sql"),
    include_str!("schema/7.sql"),
];

/// Marks the file as volcrypt's (`PRAGMA application_id`): `vlcr` in ASCII.
const APPLICATION_ID: i32 = i32::from_be_bytes(*b"vlcr");

/// Checks every table but the audit log: that one only grows, so after some years a guest's first open
/// would wait for seconds, and it has a check of its own.
const CHECK: &str = "SELECT quick_check FROM sqlite_schema, pragma_quick_check(sqlite_schema.name)
                     WHERE type = 'table' AND sqlite_schema.name <> 'audit'
                     UNION ALL SELECT quick_check FROM pragma_quick_check('sqlite_schema')";

/// What a file turns out to be.
pub(super) enum Found {
    /// An empty database.
    New,
    /// A database of volcrypt's, of this version, that is as it was written.
    Sound(usize),
    /// Another program's.
    Foreign,
    /// A newer volcrypt's, of this version.
    Newer(usize),
    /// It is not as it was written; in SQLite's words.
    Damaged(String),
}

/// Looks at a database without changing it: is it new or volcrypt's, not newer than `migrations`,
/// and undamaged?
pub(super) fn examine(connection: &Connection, path: &Path, migrations: &[Migration]) -> Result<(), Refusal> {
    match look(connection, migrations, CHECK).map_err(|error| fault::refusal(path, &error))? {
        Found::New | Found::Sound(_) => Ok(()),
        Found::Foreign => Err(Refusal::new(
            Reason::StoreUnavailable,
            format!("{} is another program's database and was left as it is: move it away", path.display()),
        )),
        Found::Newer(version) => Err(newer(path, version, migrations.len())),
        Found::Damaged(detail) => Err(fault::corrupt(path, &detail)),
    }
}

/// Whether a file that begins with these bytes is a database of volcrypt's, damaged or not: the magic at the start, and the
/// application's id in bytes 68 to 71 (<https://www.sqlite.org/fileformat.html>).
pub(super) fn is_ours(head: &[u8; 100]) -> bool {
    head.starts_with(b"SQLite format 3\0") && head[68..72] == APPLICATION_ID.to_be_bytes()
}

/// As [`examine`], with every table looked at.
pub(super) fn inspect(connection: &Connection) -> rusqlite::Result<Found> {
    look(connection, MIGRATIONS, "PRAGMA quick_check")
}

fn look(connection: &Connection, migrations: &[Migration], check: &str) -> rusqlite::Result<Found> {
    // One transaction, so that all answers are about the same state: another process may be making
    // the tables right now.
    let connection = connection.unchecked_transaction()?;
    let application: i32 = number(&connection, "PRAGMA application_id")?;
    let version = version(&connection)?;
    let tables: i64 = number(&connection, "SELECT count(*) FROM sqlite_schema")?;
    let new = application == 0 && version == 0 && tables == 0;
    if !new && application != APPLICATION_ID {
        return Ok(Found::Foreign);
    }
    if version > migrations.len() {
        return Ok(Found::Newer(version));
    }
    let mut statement = connection.prepare(check)?;
    let verdicts = statement.query_map([], |row| row.get(0))?.collect::<Result<Vec<String>, _>>()?;
    Ok(match verdicts.iter().find(|verdict| *verdict != "ok") {
        None if new => Found::New,
        None => Found::Sound(version),
        // The verdict is about pages and indexes; one line is enough for a sentence.
        Some(detail) => Found::Damaged(detail.lines().next_back().unwrap_or(detail).to_owned()),
    })
}

/// Takes the steps that `connection` has not taken yet.
pub(super) fn migrate(connection: &mut Connection, path: &Path, migrations: &[Migration]) -> Result<(), Refusal> {
    let fault = |error| fault::refusal(path, &error);
    while version(connection).map_err(fault)? < migrations.len() {
        let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate).map_err(fault)?;
        // Another process may have taken the step while this one waited for its turn.
        let taken = version(&transaction).map_err(fault)?;
        if let Some(step) = migrations.get(taken) {
            let mark = format!("PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = {};", taken + 1);
            transaction.execute_batch(step).map_err(fault)?;
            transaction.execute_batch(&mark).map_err(fault)?;
            transaction.commit().map_err(fault)?;
        }
    }
    match version(connection).map_err(fault)? {
        version if version > migrations.len() => Err(newer(path, version, migrations.len())),
        _ => Ok(()),
    }
}

/// How many steps the database has taken.
pub(super) fn version(connection: &Connection) -> rusqlite::Result<usize> {
    let version: i32 = number(connection, "PRAGMA user_version")?;
    // A negative number is nobody's version; as the largest one it is refused as newer.
    Ok(usize::try_from(version).unwrap_or(usize::MAX))
}

fn number<T: rusqlite::types::FromSql>(connection: &Connection, query: &str) -> rusqlite::Result<T> {
    connection.query_row(query, [], |row| row.get(0))
}

fn newer(path: &Path, version: usize, newest: usize) -> Refusal {
    Refusal::new(
        Reason::StoreUnavailable,
        format!(
            "{} was written by a newer volcrypt (version {version}, this one knows {newest}) and was left as it is: \
             install that volcrypt again",
            path.display()
        ),
    )
}
