//! A backup that takes the database's place.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, DirEntryExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rusqlite::{Connection, ErrorCode, OpenFlags};
use rustix::fs::{FlockOperation, fcntl_lock, flock};

use super::backup::{connect_immutable, contents};
use super::files::{FILE_NAME, INDEX, LOGS, REPLACED, STAGING, beside};
use super::schema::{self, Found};
use super::{Contents, Held, Store, Terms, common_flags, cut_log, files, harden};
use crate::refusal::{Reason, Refusal};

/// A copy of a backup beside the database, looked at and brought to the newest version. It is gone with this value, unless
/// it was put in the database's place.
pub struct Staged {
    folder: PathBuf,
    directory: PathBuf,
    store: Option<Arc<Store>>,
    /// Keeps every other restore out of the directory.
    _turn: File,
}

/// What was there before a backup.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Replaced {
    /// A database.
    Database {
        /// Where it is now.
        path: PathBuf,
        /// Why the cached keys may still be in it, if they may.
        not_wiped: Option<String>,
    },
    /// Logs or journals of a database that was not there any more: where they are now.
    Logs(Vec<PathBuf>),
}

impl Staged {
    /// Copies `backup` into a folder of its own in `directory`, where the database is.
    ///
    /// # Errors
    /// [`Reason::StoreUnavailable`] when `backup` is no sound database of this volcrypt or an older one, when it is not
    /// whole, and when it cannot be copied.
    pub fn new(backup: &Path, directory: &Path) -> Result<Self, Refusal> {
        let refuse = |what: String| Err(refusal(format!("{} {what}; nothing was changed", backup.display())));
        let metadata = match fs::metadata(backup) {
            Ok(metadata) => metadata,
            Err(error) => return refuse(format!("cannot be read ({error})")),
        };
        if !metadata.is_file() {
            return refuse("is no file: name the backup itself".to_owned());
        }
        if let Some(log) = files::unmerged(backup)? {
            return refuse(format!(
                "is not whole, because {} holds changes of it: use a backup that 'volcrypt key backup' made",
                log.display()
            ));
        }
        match connect_immutable(backup).and_then(|connection| schema::inspect(&connection)) {
            Ok(Found::Sound(1..)) => {}
            Ok(Found::Sound(_) | Found::New | Found::Foreign) => {
                return refuse("is no database of volcrypt's".to_owned());
            }
            Ok(Found::Newer(version)) => {
                return refuse(format!(
                    "was written by a newer volcrypt (version {version}, this one knows {}): install that volcrypt first",
                    schema::MIGRATIONS.len()
                ));
            }
            Ok(Found::Damaged(detail)) => return refuse(format!("is damaged ({detail}): use another backup")),
            Err(error) => match error.sqlite_error_code() {
                Some(ErrorCode::NotADatabase) => return refuse("is no database".to_owned()),
                Some(ErrorCode::DatabaseCorrupt) => return refuse(format!("is damaged ({error}): use another backup")),
                _ => return refuse(format!("cannot be read ({error})")),
            },
        }
        let directory = files::check_directory(directory)?;
        let turn = take_turn(&directory)?;
        take_back(&directory.join(FILE_NAME))?;
        let folder = directory.join(STAGING);
        let mut staged = Staged { folder, directory, store: None, _turn: turn };
        staged.copy(backup).map_err(|error| {
            refusal(format!(
                "{} cannot be copied to {} ({error}); nothing was changed",
                backup.display(),
                staged.directory.display()
            ))
        })?;
        let store = Store::open(&staged.folder)?;
        // What a key server has said since is not in a copy.
        store.cache_for(None)?;
        // Where it has no key, none of those that it knew wraps anything: the next cache may have the one that is here.
        store.untie_from_kek()?;
        staged.store = Some(Arc::new(store));
        Ok(staged)
    }

    fn copy(&self, backup: &Path) -> io::Result<()> {
        match fs::remove_dir_all(&self.folder) {
            // Left there by one that was killed.
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        DirBuilder::new().mode(0o700).create(&self.folder)?;
        let mut copy = OpenOptions::new().write(true).create_new(true).mode(0o600).open(self.folder.join(FILE_NAME))?;
        io::copy(&mut File::open(backup)?, &mut copy)?;
        copy.sync_all()
    }

    /// The copy. It has to be given back before it can be put in place.
    pub fn store(&self) -> Option<Arc<Store>> {
        self.store.clone()
    }

    /// What is in it.
    ///
    /// # Errors
    /// [`Reason::StoreUnavailable`] when it cannot be read.
    pub fn contents(&self) -> Result<Option<Contents>, Refusal> {
        let Some(store) = &self.store else { return Ok(None) };
        contents(&store.connection()).map(Some).map_err(|error| store.fault(&error))
    }

    /// Which keys are in it.
    ///
    /// # Errors
    /// [`Reason::StoreUnavailable`] when it cannot be read.
    pub fn held(&self) -> Result<Option<Held>, Refusal> {
        let Some(store) = &self.store else { return Ok(None) };
        Held::by(&store.connection()).map(Some).map_err(|error| store.fault(&error))
    }

    /// On which terms domains have the volumes that are in it.
    ///
    /// # Errors
    /// [`Reason::StoreUnavailable`] when it cannot be read.
    pub fn terms(&self) -> Result<Option<Terms>, Refusal> {
        let Some(store) = &self.store else { return Ok(None) };
        Terms::by(&store.connection()).map(Some).map_err(|error| store.fault(&error))
    }

    /// Puts the copy in the database's place, durably. The present one stays beside it under a name that ends in `stamp`,
    /// without the keys of a key server's that were cached in it; nothing is returned if there is none. Where only its log
    /// is there, that is kept in the same way.
    ///
    /// # Errors
    /// [`Reason::StoreUnavailable`] when another process has the database open, and when the files cannot be
    /// renamed.
    pub fn put_in_place(mut self, stamp: &str) -> Result<Option<Replaced>, Refusal> {
        let path = self.directory.join(FILE_NAME);
        let failed = |error: io::Error| {
            refusal(format!(
                "the backup cannot be put in the place of {} ({error}): mend that and repeat",
                path.display()
            ))
        };
        // Closing it merges its log.
        if let Some(store) = self.store.take() {
            store.merge_log(&store.connection());
        }
        let copy = self.folder.join(FILE_NAME);
        if files::has_write_ahead_log(&copy)? {
            return Err(failed(io::Error::other("its log could not be merged")));
        }
        File::open(&copy).and_then(|copy| copy.sync_all()).map_err(failed)?;

        let kept = unused(&beside(&path, &format!("{REPLACED}{stamp}")));
        let is_lost = files::is_missing(&path);
        let (replaced, in_use) = match is_lost {
            false => {
                // What somebody else uses is left as it is.
                drop(lock(&path)?);
                let not_wiped = leave_out_cache(&path).err();
                let lock = lock(&path)?;
                keep(&path, &kept).map_err(|error| undone(&path, failed(error)))?;
                (Some(Replaced::Database { path: kept.clone(), not_wiped }), Some(lock))
            }
            true => {
                let logs = keep_logs(&path, &kept).map_err(failed)?;
                ((!logs.is_empty()).then_some(Replaced::Logs(logs)), None)
            }
        };
        // Whoever makes a database just now may have made a key in it.
        let placed = if is_lost { files::name_anew(&copy, &path) } else { fs::rename(&copy, &path) };
        placed.map_err(|error| {
            let why = undone(&path, failed(error));
            match &replaced {
                Some(Replaced::Logs(logs)) if put_back(logs, &kept, &path).is_err() => {
                    why.and(&format!("what was there without its database is kept as {}", list(logs)))
                }
                _ => why,
            }
        })?;
        sync(&self.directory).map_err(failed)?;
        drop(in_use);
        Ok(replaced)
    }
}

impl Drop for Staged {
    fn drop(&mut self) {
        self.store = None;
        // It is nothing but a copy.
        let _ = fs::remove_dir_all(&self.folder);
    }
}

/// Has `directory` for this restore alone, as long as what is returned lives: the kernel lets go of it however a process
/// ends.
fn take_turn(directory: &Path) -> Result<File, Refusal> {
    let failed =
        |error: io::Error| refusal(format!("{} cannot be locked ({error}); nothing was changed", directory.display()));
    let turn = File::open(directory).map_err(failed)?;
    match flock(&turn, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(turn),
        Err(rustix::io::Errno::AGAIN) => Err(refusal(format!(
            "another 'volcrypt key restore' is under way in {}: wait until it has ended; nothing was changed",
            directory.display()
        ))),
        Err(error) => Err(failed(error.into())),
    }
}

/// `name`, or with a number at its end if that is another file's, or one of those beside it is.
fn unused(name: &Path) -> PathBuf {
    let numbered = (2..).map(|number| beside(name, &format!("-{number}")));
    let ends = || LOGS.into_iter().chain(["", INDEX]);
    let is_free = |name: &PathBuf| ends().all(|end| beside(name, end).symlink_metadata().is_err());
    std::iter::once(name.to_owned()).chain(numbered).find(is_free).unwrap_or_else(|| name.to_owned())
}

/// Wipes the cached keys of a key server's from the database that is to be kept, which outlives what they are good for,
/// and merges its log, so that its file is all of it. What is no database of ours any more is not touched: SQLite would
/// remove its log. Returns why it was not done.
fn leave_out_cache(path: &Path) -> Result<(), String> {
    let mut head = [0; 100];
    let is_ours = File::open(path).and_then(|mut file| file.read_exact(&mut head)).is_ok() && schema::is_ours(&head);
    if !is_ours {
        return Err("it is no database of volcrypt's any more".to_owned());
    }
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | common_flags();
    let connection = Connection::open_with_flags(path, flags).map_err(|error| error.to_string())?;
    let wiped = harden(&connection).and_then(|()| wipe_cache(&connection));
    // Also where that failed: what is in the log alone would be missed.
    let merged = match cut_log(&connection) {
        Ok(true) => Ok(()),
        Ok(false) => Err("its log cannot be merged because another process reads it".to_owned()),
        Err(error) => Err(format!("its log cannot be merged: {error}")),
    };
    wiped.map_err(|error| error.to_string()).and(merged)
}

fn wipe_cache(connection: &Connection) -> rusqlite::Result<()> {
    // An older volcrypt's has no such table.
    let has_cache = connection
        .query_row("SELECT count(*) FROM sqlite_schema WHERE name = 'key_cache'", [], |row| row.get::<_, i64>(0))?;
    match has_cache {
        0 => Ok(()),
        _ => connection.execute_batch("PRAGMA secure_delete = ON; DELETE FROM key_cache;"),
    }
}

/// Has the database for this process alone. Whoever has one open that is written ahead holds a lock on part of the
/// file (<https://www.sqlite.org/wal.html>), and the kernel's lock of all of it excludes that.
fn lock(path: &Path) -> Result<File, Refusal> {
    let failed =
        |error: io::Error| refusal(format!("{} cannot be opened ({error}); nothing was changed", path.display()));
    let file = OpenOptions::new().read(true).write(true).open(path).map_err(failed)?;
    match fcntl_lock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(rustix::io::Errno::AGAIN | rustix::io::Errno::ACCESS) => Err(refusal(format!(
            "{} is in use: stop volcryptd ('systemctl stop volcryptd.socket volcryptd-control.socket volcryptd') or \
             whatever 'fuser {}' shows, and repeat; nothing was changed",
            path.display(),
            path.display()
        ))),
        Err(error) => Err(failed(error.into())),
    }
}

/// Gives the database at `path` a second name, and takes the files beside it away, lest they are taken for the new one's.
fn keep(path: &Path, kept: &Path) -> io::Result<()> {
    fs::hard_link(path, kept)?;
    keep_logs(path, kept).map(|_| ())
}

/// Takes away, durably, what stands beside the place of a database, whether that is there or not: SQLite would write it
/// into the one that is put there. Returns where that is now which has something in it.
fn keep_logs(path: &Path, kept: &Path) -> io::Result<Vec<PathBuf>> {
    let mut logs = Vec::new();
    for end in LOGS {
        let (log, kept_log) = (beside(path, end), beside(kept, end));
        match log.symlink_metadata() {
            Ok(metadata) if metadata.len() > 0 => {
                fs::rename(log, &kept_log)?;
                logs.push(kept_log);
            }
            Ok(_) => fs::remove_file(log)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    match fs::remove_file(beside(path, INDEX)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    sync(path.parent().ok_or(io::ErrorKind::InvalidInput)?)?;
    Ok(logs)
}

/// Gives what [`keep_logs`] has taken away without its database its place again, where still no database is there.
fn put_back(logs: &[PathBuf], kept: &Path, path: &Path) -> io::Result<()> {
    if !files::is_missing(path) {
        return Err(io::ErrorKind::AlreadyExists.into());
    }
    for end in LOGS.into_iter().filter(|end| logs.contains(&beside(kept, end))) {
        files::name_anew(&beside(kept, end), &beside(path, end))?;
    }
    sync(path.parent().ok_or(io::ErrorKind::InvalidInput)?)
}

/// Takes back what [`keep`] has done to the database at `path`, if whoever called it came no further: the second name is
/// the very file that is in use, and whoever wipes that wipes the database.
///
/// # Errors
/// [`Reason::StoreUnavailable`] when the files cannot be renamed.
pub(super) fn recover(path: &Path) -> Result<(), Refusal> {
    let directory = path.parent().unwrap_or(path);
    match path.symlink_metadata() {
        Ok(metadata) if metadata.nlink() > 1 => match File::open(directory) {
            Ok(turn) if flock(&turn, FlockOperation::NonBlockingLockExclusive).is_ok() => take_back(path),
            // A restore is under way, and goes on.
            _ => Ok(()),
        },
        // Whatever is wrong with it is said by who opens it.
        _ => Ok(()),
    }
}

/// The same, by who has the directory for itself.
fn take_back(path: &Path) -> Result<(), Refusal> {
    let taken_back = || {
        let Ok(metadata) = path.symlink_metadata() else { return Ok(()) };
        let directory = path.parent().ok_or(io::ErrorKind::InvalidInput)?;
        let prefix = beside(Path::new(FILE_NAME), REPLACED);
        for entry in fs::read_dir(directory)? {
            let entry = entry?;
            let is_kept = entry.file_name().as_bytes().starts_with(prefix.as_os_str().as_bytes());
            if !is_kept || entry.ino() != metadata.ino() || entry.metadata()?.dev() != metadata.dev() {
                continue;
            }
            for end in LOGS {
                let (log, kept_log) = (beside(path, end), beside(&entry.path(), end));
                if kept_log.symlink_metadata().is_ok() {
                    fs::rename(kept_log, log)?;
                }
            }
            fs::remove_file(entry.path())?;
            sync(directory)?;
            tracing::warn!("a restore of {} was broken off before it changed anything", path.display());
            // There is one, and what was renamed may still be in the list.
            break;
        }
        Ok(())
    };
    taken_back().map_err(|error: io::Error| {
        refusal(format!(
            "a restore of {} was broken off and cannot be taken back ({error}): mend that and repeat",
            path.display()
        ))
    })
}

/// The refusal of a restore that has not changed anything in the end.
fn undone(path: &Path, why: Refusal) -> Refusal {
    match take_back(path) {
        Ok(()) => why,
        Err(other) => why.and(&other.to_string()),
    }
}

fn list(paths: &[PathBuf]) -> String {
    paths.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(" and ")
}

fn sync(directory: &Path) -> io::Result<()> {
    File::open(directory)?.sync_all()
}

fn refusal(sentence: String) -> Refusal {
    Refusal::new(Reason::StoreUnavailable, sentence)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_that_was_taken_away_in_vain_gets_its_place_again() {
        let directory = tempfile::tempdir().unwrap();
        let (path, kept) = (directory.path().join(FILE_NAME), directory.path().join("kept"));
        fs::write(beside(&path, "-wal"), "a log").unwrap();
        let logs = keep_logs(&path, &kept).unwrap();
        assert!(logs == [beside(&kept, "-wal")] && files::is_missing(&beside(&path, "-wal")));
        fs::write(&path, "another database").unwrap();
        assert!(put_back(&logs, &kept, &path).is_err(), "it would be written into that");
        fs::remove_file(&path).unwrap();
        put_back(&logs, &kept, &path).unwrap();
        assert_eq!(fs::read(beside(&path, "-wal")).unwrap(), b"a log");
    }
}
