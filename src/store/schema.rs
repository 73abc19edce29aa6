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
];

/// Marks the file as volcrypt's (`PRAGMA application_id`): `vlcr` in ASCII.
const APPLICATION_ID: i32 = i32::from_be_bytes(*b"vlcr");

/// Checks every table but the audit log: that one only grows, so after some years a guest's first open
/// would wait for seconds, and it has a check of its own.
const CHECK: &str = "SELECT quick_check FROM sqlite_schema, pragma_quick_check(sqlite_schema.name)
                     WHERE type = 'table' AND sqlite_schema.name <> 'audit'
                     UNION ALL SELECT quick_check FROM pragma_quick_check('sqlite_schema')";

/// Looks at a database without changing it: is it new or volcrypt's, not newer than `migrations`,
/// and undamaged?
pub(super) fn examine(connection: &Connection, path: &Path, migrations: &[Migration]) -> Result<(), Refusal> {
    let fault = |error| fault::refusal(path, &error);
    // One transaction, so that all answers are about the same state: another process may be making
    // the tables right now.
    let connection = connection.unchecked_transaction().map_err(fault)?;
    let application: i32 = number(&connection, "PRAGMA application_id").map_err(fault)?;
    let version = version(&connection).map_err(fault)?;
    let tables: i64 = number(&connection, "SELECT count(*) FROM sqlite_schema").map_err(fault)?;
    let new = application == 0 && version == 0 && tables == 0;
    if !new && application != APPLICATION_ID {
        return Err(Refusal::new(
            Reason::StoreUnavailable,
            format!("{} is another program's database and was left as it is: move it away", path.display()),
        ));
    }
    if version > migrations.len() {
        return Err(newer(path, version, migrations.len()));
    }
    let verdicts = connection
        .prepare(CHECK)
        .and_then(|mut statement| statement.query_map([], |row| row.get(0))?.collect::<Result<Vec<String>, _>>())
        .map_err(fault)?;
    match verdicts.iter().find(|verdict| *verdict != "ok") {
        None => Ok(()),
        // The verdict is about pages and indexes; one line is enough for a sentence.
        Some(detail) => Err(fault::corrupt(path, detail.lines().next_back().unwrap_or(detail))),
    }
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
