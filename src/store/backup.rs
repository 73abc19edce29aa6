//! A copy of the database that is made while it is in use.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use rusqlite::config::DbConfig;
use rusqlite::{Connection, ErrorCode, OpenFlags};
use rustix::fs::StatVfsMountFlags;

use super::schema::{self, Found};
use super::{common_flags, fault, files, harden};
use crate::keys::CheckValue;
use crate::refusal::{Reason, Refusal};

/// What a database holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Contents {
    /// How many volumes have a record.
    pub volumes: u64,
    /// How many keys are in it, wrapped.
    pub keys: u64,
    /// How many audit records.
    pub records: u64,
    /// The check values of the key-encryption keys that it needs.
    pub keks: Vec<CheckValue>,
}

/// Copies the database in `directory`, as it is at one moment, to the new file `to` of mode 0600, durably. Others may use
/// it meanwhile. `to` is there whole or not at all.
///
/// # Errors
/// [`Reason::StoreUnavailable`] when there is no sound database of this version, when `to` exists (it is left as it
/// is), and when it cannot be written.
pub fn back_up(directory: &Path, to: &Path) -> Result<Contents, Refusal> {
    let to = &std::path::absolute(to).map_err(|error| refusal(format!("{} cannot be made ({error})", to.display())))?;
    let path = files::check_directory(directory)?.join(files::FILE_NAME);
    let source = connect(&path)?;
    match schema::inspect(&source).map_err(|error| fault::refusal(&path, &error))? {
        Found::Sound(version) if version == schema::MIGRATIONS.len() => {}
        Found::Sound(version) => {
            return Err(refusal(format!(
                "{} is an older volcrypt's (version {version}): start volcryptd, which brings it to version {}, and repeat",
                path.display(),
                schema::MIGRATIONS.len()
            )));
        }
        Found::Damaged(detail) => return Err(fault::corrupt(&path, &detail)),
        Found::New | Found::Foreign | Found::Newer(_) => {
            return Err(refusal(format!(
                "{} is no database of this volcrypt: use the volcrypt that made it",
                path.display()
            )));
        }
    }
    source
        .set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, false)
        .map_err(|error| fault::refusal(&path, &error))?;
    let failed = |error: &dyn std::fmt::Display| {
        refusal(format!("{} cannot be written ({error}), and nothing was left of it", to.display()))
    };
    let partial = Partial::new(to).map_err(|error| failed(&error))?;
    let name = partial.path.to_str().ok_or_else(|| failed(&"its name is not UTF-8"))?;
    // It writes a new database, without what stood in free pages. An empty file of ours is what it accepts.
    source.execute("VACUUM INTO ?1", [name]).map_err(|error| match error.sqlite_error_code() {
        // Reading all of the source went well before.
        Some(ErrorCode::DiskFull | ErrorCode::SystemIoFailure | ErrorCode::CannotOpen) => failed(&error),
        _ => fault::refusal(&path, &error),
    })?;
    leave_out_cache(&partial.path).map_err(|error| failed(&error))?;
    let contents = contents_of(&partial.path).map_err(|error| failed(&error))?;
    match partial.complete(to) {
        Ok(()) => Ok(contents),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Err(refusal(format!(
            "{} exists already: name a file that does not, nothing is ever overwritten",
            to.display()
        ))),
        Err(error) => Err(failed(&error)),
    }
}

/// A connection that only reads a database which others may be using.
fn connect(path: &Path) -> Result<Connection, Refusal> {
    let fault = |error| fault::refusal(path, &error);
    fs::symlink_metadata(path).map_err(|error| {
        refusal(format!(
            "{} cannot be read ({error}): name the directory of the database in the configuration",
            path.display()
        ))
    })?;
    let read_only = rustix::fs::statvfs(path).is_ok_and(|status| status.f_flag.contains(StatVfsMountFlags::RDONLY));
    let connection = match read_only && !files::has_write_ahead_log(path)? {
        true => connect_immutable(path),
        // A connection that may only read would leave files beside a database that nobody uses.
        false => Connection::open_with_flags(path, OpenFlags::SQLITE_OPEN_READ_WRITE | common_flags()),
    };
    let connection = connection.map_err(fault)?;
    harden(&connection).map_err(fault)?;
    // Nothing is merged into a file that may turn out to be damaged.
    connection.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, true).map_err(fault)?;
    Ok(connection)
}

/// A connection to a database that nobody uses, which makes no file beside it.
pub(super) fn connect_immutable(path: &Path) -> rusqlite::Result<Connection> {
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_URI | common_flags();
    let connection = Connection::open_with_flags(files::immutable_uri(path), flags)?;
    harden(&connection)?;
    Ok(connection)
}

/// Wipes the cached keys of a key server's from a copy that was made: a backup outlives what they are good for.
fn leave_out_cache(copy: &Path) -> rusqlite::Result<()> {
    let connection = Connection::open_with_flags(copy, OpenFlags::SQLITE_OPEN_READ_WRITE | common_flags())?;
    harden(&connection)?;
    // Nothing but this process has it, and it is removed if this breaks off: it needs no journal on the disk.
    connection.query_row("PRAGMA journal_mode = MEMORY", [], |_| Ok(()))?;
    connection.execute_batch("PRAGMA secure_delete = ON; DELETE FROM key_cache; VACUUM;")
}

/// Reads a copy that was made.
fn contents_of(copy: &Path) -> rusqlite::Result<Contents> {
    contents(&connect_immutable(copy)?)
}

pub(super) fn contents(connection: &Connection) -> rusqlite::Result<Contents> {
    let count = |query: &str| connection.query_row(query, [], |row| row.get(0)).map(i64::unsigned_abs);
    let keks = connection
        .prepare(
            "SELECT check_value FROM keks WHERE state = 'current' OR check_value IN (SELECT kek FROM keys)
             ORDER BY state, check_value",
        )?
        .query_map([], |row| row.get(0))?
        .collect::<Result<Vec<String>, _>>()?;
    Ok(Contents {
        volumes: count("SELECT count(*) FROM volumes")?,
        keys: count("SELECT count(*) FROM keys WHERE wrapped IS NOT NULL")?,
        records: count("SELECT count(*) FROM audit")?,
        keks: keks.into_iter().filter_map(|value| CheckValue::try_from(value).ok()).collect(),
    })
}

/// The file that is being written. While it is locked, none comes into being.
static PARTIAL: Mutex<Option<PathBuf>> = Mutex::new(None);
/// What stands in its name between the file's own and the host's, which the number of the process follows.
const PARTIAL_MARK: &str = ".partial-";

/// This host's name, as part of a file's: several hosts may write to one folder, and each knows its own processes only.
fn host() -> String {
    let name = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    name.trim().replace('/', "_")
}

fn partial() -> MutexGuard<'static, Option<PathBuf>> {
    PARTIAL.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Removes what is there of a backup that is not complete. To be called when the process is about to end: no other is
/// begun after it.
pub fn abandon_backup() {
    let partial = partial();
    partial.iter().for_each(|path| remove(path));
    std::mem::forget(partial);
}

/// What processes of this host that were killed have left of backups in the directory of `to`.
pub fn leftovers(to: &Path) -> Vec<PathBuf> {
    let mark = format!("{PARTIAL_MARK}{}-", host());
    let is_leftover = |path: &PathBuf| {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let process =
            name.strip_suffix("-journal").unwrap_or(name).rsplit_once(mark.as_str()).map(|(_, process)| process);
        let process = process.filter(|_| name.starts_with('.')).and_then(|process| process.parse::<u32>().ok());
        process.is_some_and(|process| !Path::new(&format!("/proc/{process}")).exists())
    };
    let directory = std::path::absolute(to).ok().and_then(|to| to.parent().map(Path::to_owned));
    let entries = directory.and_then(|directory| fs::read_dir(directory).ok()).into_iter().flatten().flatten();
    let mut found: Vec<PathBuf> = entries.map(|entry| entry.path()).filter(is_leftover).collect();
    found.sort();
    found
}

/// Removes an incomplete backup and SQLite's journal of it.
fn remove(path: &Path) {
    let _ = fs::remove_file(files::beside(path, "-journal"));
    let _ = fs::remove_file(path);
}

/// A file that is not complete yet, under another name; gone with this value.
struct Partial {
    path: PathBuf,
}

impl Partial {
    fn new(to: &Path) -> io::Result<Self> {
        let name = to.file_name().ok_or(io::ErrorKind::InvalidInput)?;
        if to.symlink_metadata().is_ok() {
            return Err(io::Error::new(
                io::ErrorKind::AlreadyExists,
                "it exists already, and nothing is ever overwritten",
            ));
        }
        let name = format!(".{}{PARTIAL_MARK}{}-{}", name.to_string_lossy(), host(), std::process::id());
        let path = to.with_file_name(name);
        let mut partial = partial();
        OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path)?;
        *partial = Some(path.clone());
        Ok(Partial { path })
    }

    /// Gives the file its name, if nothing else has it.
    fn complete(self, to: &Path) -> io::Result<()> {
        File::open(&self.path)?.sync_all()?;
        files::name_anew(&self.path, to)?;
        let synced = to.parent().map_or(Ok(()), |directory| File::open(directory)?.sync_all());
        synced.inspect_err(|_| {
            // It may not be there after a power cut, so it is not there now.
            let _ = fs::remove_file(to);
        })
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        // After it got its name there is nothing to remove.
        remove(&self.path);
        *partial() = None;
    }
}

fn refusal(sentence: String) -> Refusal {
    Refusal::new(Reason::StoreUnavailable, sentence)
}
