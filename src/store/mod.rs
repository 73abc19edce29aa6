//! The database of enrolled volumes, wrapped keys and audit records.
//!
//! One SQLite file, `volcrypt.db`, in a directory of its own. It is written ahead (WAL) with
//! `synchronous=FULL`: what a call has confirmed survives a power cut. When its file system is
//! read-only or full the records stay readable, so that enrolled volumes can still be opened.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rusqlite::config::DbConfig;
use rusqlite::{Connection, ErrorCode, MAIN_DB, OpenFlags};

use crate::refusal::{Reason, Refusal};

mod audit;
mod backup;
mod cached_keys;
mod change;
mod fault;
mod files;
mod foreign;
mod grants;
mod held;
mod keks;
mod keys;
mod moves;
mod restore;
mod schema;
mod terms;
mod volumes;

pub use audit::{AuditPage, AuditQuery, Verified};
pub use backup::{Contents, abandon_backup, back_up, leftovers};
pub(crate) use cached_keys::{CachedKey, Kept};
pub use grants::Grant;
pub use held::Held;
pub(crate) use keks::{Keks, Rewrapped};
pub(crate) use keys::{Inserted, WrappedKey};
pub(crate) use moves::{MoveState, Planned};
pub use restore::{Replaced, Staged};
pub use terms::{Changed, Terms};
pub(crate) use volumes::not_enrolled;
pub use volumes::{EnrolledDevice, VolumeRecord, VolumeState};

use files::FileIdentity;
use schema::Migration;

/// How long a call waits for another process that holds the database. Tests may run on a machine that is busy with
/// other things.
const BUSY_TIMEOUT: Duration = Duration::from_secs(if cfg!(test) { 30 } else { 5 });
/// How often a database is opened of which another takes the place meanwhile.
const OPENING_ATTEMPTS: u32 = 3;

/// The database of enrolled volumes, wrapped keys and audit records, open for as long as it lives.
///
/// Shared between threads: every call takes the one connection for itself. Several processes may
/// have the same file open.
pub struct Store {
    connection: Mutex<Connection>,
    path: PathBuf,
    identity: FileIdentity,
    /// Whether the last merge of the log was hindered: that is told once, not each time.
    is_hindered: AtomicBool,
}

impl Store {
    /// Opens `volcrypt.db` in `directory`, makes it if it is not there, and brings it to the newest
    /// version. If the file can only be read, it is opened for reading: see [`Store::is_read_only`].
    ///
    /// # Errors
    /// [`Reason::StoreUnavailable`], each with its remedy, when the directory or the file belongs to
    /// somebody else or is open to others, when the file is no database of volcrypt, is damaged or
    /// was written by a newer version (it is then left as it is), when only its log is there, and when SQLite fails.
    pub fn open(directory: &Path) -> Result<Self, Refusal> {
        Store::open_with(directory, schema::MIGRATIONS)
    }

    /// Whether there is a database in `directory`, or was: its log may be all that is left of it, or a backup that was to
    /// take its place.
    pub fn is_in(directory: &Path) -> bool {
        let path = directory.join(files::FILE_NAME);
        path.exists() || !matches!(files::unmerged(&path), Ok(None)) || files::is_being_restored(directory)
    }

    fn open_with(directory: &Path, migrations: &[Migration]) -> Result<Self, Refusal> {
        let path = files::prepare(directory)?;
        restore::recover(&path)?;
        let mut left = OPENING_ATTEMPTS;
        loop {
            let identity = files::identity(&path)?;
            let opened = Store::open_file(&path, identity, migrations);
            left -= 1;
            // A backup may take the file's place after SQLite has opened it and while it waits for its turn.
            if left == 0 || files::identity(&path)? == identity {
                return opened;
            }
        }
    }

    fn open_file(path: &Path, identity: FileIdentity, migrations: &[Migration]) -> Result<Self, Refusal> {
        let with = |connection| Store::with(connection, path.to_owned(), identity);
        match connect_for_writing(path, identity, migrations)? {
            Some(connection) => {
                let store = with(connection);
                store.merge_log(&store.connection());
                Ok(store)
            }
            None => Ok(with(connect_for_reading(path, migrations)?)),
        }
    }

    fn with(connection: Connection, path: PathBuf, identity: FileIdentity) -> Self {
        Store { connection: Mutex::new(connection), path, identity, is_hindered: AtomicBool::new(false) }
    }

    /// Refuses to write to a file that is not the one at the path any more: a backup that was moved over
    /// it would never see what is written now.
    fn check_in_place(&self) -> Result<(), Refusal> {
        check_identity(&self.path, self.identity)
    }

    /// Merges the write-ahead log into the file and cuts it to nothing, so that the file alone is the
    /// whole database: for a copy of it, for a backup put in its place, and for a file system that is
    /// read-only later. What was committed is safe without, so a failure is only noted. Returns whether it
    /// was done.
    ///
    /// It waits for nobody who reads the database: a backup does as long as its target takes, and whoever
    /// waited for it here would hold the connection, for which every open waits. A later merge does the rest.
    fn merge_log(&self, connection: &Connection) -> bool {
        self.note_merge(cut_log_at_once(connection))
    }

    /// The same after something was wiped, which should not stand in the log either: this waits for its turn.
    fn merge_wiped_log(&self, connection: &Connection) -> bool {
        self.note_merge(cut_log(connection))
    }

    /// Tells the first time that the log was not merged, and not each time.
    fn note_merge(&self, cut: rusqlite::Result<bool>) -> bool {
        let is_done = matches!(cut, Ok(true));
        let was_hindered = self.is_hindered.swap(!is_done, Ordering::Relaxed);
        let path = self.path.display();
        match cut {
            Ok(true) => {}
            _ if was_hindered => {}
            Ok(false) => tracing::warn!("{path}-wal is not merged yet because another process reads the database"),
            Err(error) => tracing::warn!("{path}-wal is not merged: {error}"),
        }
        is_done
    }

    /// Whether records can be read but not written, because the file system is read-only.
    ///
    /// # Errors
    /// [`Reason::StoreUnavailable`] when SQLite fails.
    pub fn is_read_only(&self) -> Result<bool, Refusal> {
        self.connection().is_readonly(MAIN_DB).map_err(|error| self.fault(&error))
    }

    /// The database file, for messages.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The connection. A thread that panicked while it held it has left no transaction open
    /// (rusqlite rolls back on drop), so a poisoned lock is as good as a sound one.
    fn connection(&self) -> MutexGuard<'_, Connection> {
        self.connection.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn fault(&self, error: &rusqlite::Error) -> Refusal {
        fault::refusal(&self.path, error)
    }
}

/// The time that records carry: seconds since 1970-01-01 UTC, 0 if the clock stands before that.
pub(crate) fn seconds_now() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |passed| passed.as_secs() as i64)
}

fn check_identity(path: &Path, expected: FileIdentity) -> Result<(), Refusal> {
    let name = path.display();
    let sentence = match files::identity(path) {
        Ok(identity) if identity == expected => return Ok(()),
        // Its last changes may be in the log alone.
        Err(_) if files::is_missing(path) => format!(
            "{name} is gone while volcryptd has it open: put that very file back, and do not restart volcryptd before"
        ),
        _ => format!("{name} was replaced while volcryptd had it open: run 'systemctl restart volcryptd'"),
    };
    Err(Refusal::new(Reason::StoreUnavailable, sentence))
}

/// A connection that can write to the file with this identity, or `None` when the file system is read-only.
fn connect_for_writing(
    path: &Path,
    identity: FileIdentity,
    migrations: &[Migration],
) -> Result<Option<Connection>, Refusal> {
    let fault = |error| fault::refusal(path, &error);
    let mut connection = connect(path).map_err(fault)?;
    // SQLite itself falls back to reading when the kernel says EROFS or EACCES.
    if connection.is_readonly(MAIN_DB).map_err(fault)? {
        return Ok(None);
    }
    match schema::version(&connection) {
        Err(error) if fault::is_disk_full(path, &error) => {
            drop(connection);
            connection = connect(path).map_err(fault)?;
            have_alone(&connection).map_err(fault)?;
            tracing::warn!(
                "{} was opened on a full disk, for this process alone: free some space there and run 'systemctl restart \
                 volcryptd', before which nothing is backed up",
                path.display()
            );
        }
        // Whatever else is wrong is said by who looks at all of it.
        _ => {}
    }
    schema::examine(&connection, path, migrations)?;
    connection.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, false).map_err(fault)?;

    let mode = write_ahead(&connection).map_err(fault)?;
    if mode != "wal" {
        return Err(Refusal::new(
            Reason::StoreUnavailable,
            format!(
                "{} cannot be written ahead (journal mode {mode:?}): keep it on a local file system",
                path.display()
            ),
        ));
    }
    // From here on it holds a lock that no restore gets past, and nothing was written. What is written to a file that
    // was replaced would go to the log of the one in its place.
    check_identity(path, identity)?;
    connection
        .execute_batch("PRAGMA synchronous = FULL; PRAGMA foreign_keys = ON; PRAGMA secure_delete = ON;")
        .map_err(fault)?;
    schema::migrate(&mut connection, path, migrations)?;
    Ok(Some(connection))
}

/// A connection that has not looked at the file yet.
fn connect(path: &Path) -> rusqlite::Result<Connection> {
    let connection = Connection::open_with_flags(path, OpenFlags::SQLITE_OPEN_READ_WRITE | common_flags())?;
    harden(&connection)?;
    // Closing would otherwise merge a write-ahead log into a file that is about to be refused.
    connection.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, true)?;
    Ok(connection)
}

/// Has the database for `connection` alone, which has not looked at it yet, until it is closed. It needs no shared-memory
/// file then, for which a full disk has no room (<https://www.sqlite.org/wal.html#noshm>), and nobody can change or replace
/// meanwhile what it reads. What it writes fails until there is space.
fn have_alone(connection: &Connection) -> rusqlite::Result<()> {
    connection.query_row("PRAGMA locking_mode = EXCLUSIVE", [], |_| Ok(()))?;
    schema::version(connection).map(drop)
}

/// Switches to a write-ahead log and returns the journal mode that came of it.
///
/// SQLite does not wait for its turn here: where two processes switch a new database at once, each
/// holding what the other needs, it reports one of them as busy.
fn write_ahead(connection: &Connection) -> rusqlite::Result<String> {
    let deadline = Instant::now() + BUSY_TIMEOUT;
    loop {
        match connection.query_row("PRAGMA journal_mode = WAL", [], |row| row.get(0)) {
            Err(error) if error.sqlite_error_code() == Some(ErrorCode::DatabaseBusy) && Instant::now() < deadline => {
                thread::sleep(Duration::from_millis(5));
            }
            other => return other,
        }
    }
}

/// A connection that can only read, for a file system that is read-only.
fn connect_for_reading(path: &Path, migrations: &[Migration]) -> Result<Connection, Refusal> {
    let fault = |error| fault::refusal(path, &error);
    if files::has_write_ahead_log(path)? {
        return Err(Refusal::new(
            Reason::StoreUnavailable,
            format!(
                "{0} is on a read-only file system and {0}-wal holds changes that are not merged yet: \
                 mount the file system writable once and open the database again",
                path.display()
            ),
        ));
    }
    // A WAL database wants a shared-memory file beside it even to be read; `immutable` does without.
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_URI | common_flags();
    let uri = files::immutable_uri(path);
    let connection = Connection::open_with_flags(uri, flags).map_err(fault)?;
    harden(&connection).map_err(fault)?;
    schema::examine(&connection, path, migrations)?;
    match schema::version(&connection).map_err(fault)? {
        version if version == migrations.len() => Ok(connection),
        version => Err(Refusal::new(
            Reason::StoreUnavailable,
            format!(
                "{} has version {version}, must be brought to version {}, and is on a read-only file system: \
                 mount it writable once and open the database again",
                path.display(),
                migrations.len()
            ),
        )),
    }
}

fn common_flags() -> OpenFlags {
    OpenFlags::SQLITE_OPEN_NO_MUTEX | OpenFlags::SQLITE_OPEN_NOFOLLOW | OpenFlags::SQLITE_OPEN_EXRESCODE
}

/// What holds for every connection before the first look at the file: nothing in it is trusted.
fn harden(connection: &Connection) -> rusqlite::Result<()> {
    connection.busy_timeout(BUSY_TIMEOUT)?;
    connection.set_db_config(DbConfig::SQLITE_DBCONFIG_DEFENSIVE, true)?;
    connection.set_db_config(DbConfig::SQLITE_DBCONFIG_TRUSTED_SCHEMA, false)?;
    connection.execute_batch("PRAGMA cell_size_check = ON; PRAGMA temp_store = MEMORY;")
}

/// Merges the write-ahead log into the file and cuts it to nothing. Returns whether that was done: another process that
/// reads the database hinders it.
fn cut_log(connection: &Connection) -> rusqlite::Result<bool> {
    connection.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |row| row.get(0)).map(|hindered: bool| !hindered)
}

/// The same as far as that can be done without waiting for another process.
fn cut_log_at_once(connection: &Connection) -> rusqlite::Result<bool> {
    let patience = connection.pragma_query_value(None, "busy_timeout", |row| row.get::<_, u32>(0))?;
    connection.busy_timeout(Duration::ZERO)?;
    let cut = cut_log(connection);
    connection.busy_timeout(Duration::from_millis(patience.into()))?;
    cut
}

#[cfg(test)]
pub(crate) mod tests;
