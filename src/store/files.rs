//! The database as a file: who may own and see it, and how it comes into being.

use std::fs::{self, File};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, FileType, Mode, RenameFlags};

use crate::refusal::{Reason, Refusal};

pub(super) const FILE_NAME: &str = "volcrypt.db";
/// What stands behind that in the name of a database whose place a backup has taken.
pub(super) const REPLACED: &str = ".replaced-";
/// What stands behind the name of a database in those of the files beside it which have a part of it: the write-ahead
/// log and the rollback journal. SQLite writes what is in them into whatever database it finds there.
pub(super) const LOGS: [&str; 2] = ["-wal", "-journal"];
/// The same of the log's index, which has nothing of its own.
pub(super) const INDEX: &str = "-shm";
/// The folder beside the database in which a backup is made ready to take its place.
pub(super) const STAGING: &str = ".restore";

/// Checks `directory` and the database in it, makes an empty file if there is none, and returns
/// the file's path without symbolic links.
///
/// SQLite gives the log beside the database the mode of the database, and removes one that stands beside an empty file.
pub(super) fn prepare(directory: &Path) -> Result<PathBuf, Refusal> {
    let directory = check_directory(directory)?;
    let path = directory.join(FILE_NAME);
    if is_missing(&path) {
        // A process that makes the database just now has a log as well.
        if let Some(log) = unmerged(&path)?
            && is_missing(&path)
        {
            return Err(refusal(format!(
                "{} has the last changes of {}, which is not there: put that back beside it, or run 'volcrypt key restore' \
                 with a backup, which keeps what is there, or, if there is neither, move the log elsewhere",
                log.display(),
                path.display()
            )));
        }
        // One that moved a log away, which was alone, is not seen by anything else.
        if is_being_restored(&directory) && is_missing(&path) {
            return Err(refusal(format!(
                "{} is not there, and a restore of it is under way or was broken off: run 'volcrypt key restore' with the \
                 backup again, or remove {} if none is to be restored",
                path.display(),
                directory.join(STAGING).display()
            )));
        }
        make(&directory, &path).map_err(|error| {
            refusal(format!("{} cannot be made ({error}): make its directory writable for volcryptd", path.display()))
        })?;
    }
    check_file(&path)?;
    Ok(path)
}

/// Checks the directory of a database, and returns its path without symbolic links.
pub(super) fn check_directory(directory: &Path) -> Result<PathBuf, Refusal> {
    let refuse = |error: io::Error| unusable(directory, &error);
    let directory = directory.canonicalize().map_err(refuse)?;
    let metadata = fs::metadata(&directory).map_err(|error| unusable(&directory, &error))?;
    if !metadata.is_dir() {
        return Err(refusal(format!(
            "{} is not a directory: name the directory of volcrypt's database",
            directory.display()
        )));
    }
    check_owner(&directory, &metadata)?;
    if metadata.mode() & 0o027 != 0 {
        return Err(refusal(format!(
            "{0} is open to others (mode {1:04o}): run `chmod 0700 {0}`",
            directory.display(),
            metadata.mode() & 0o7777
        )));
    }
    Ok(directory)
}

/// Checks the file of a database.
fn check_file(path: &Path) -> Result<(), Refusal> {
    let metadata = fs::symlink_metadata(path).map_err(|error| unusable(path, &error))?;
    if !metadata.is_file() {
        return Err(refusal(format!("{} is not a regular file: put the database itself there", path.display())));
    }
    check_owner(path, &metadata)?;
    if metadata.mode() & 0o077 != 0 {
        return Err(refusal(format!(
            "{0} is open to others (mode {1:04o}): run `chmod 0600 {0}`",
            path.display(),
            metadata.mode() & 0o7777
        )));
    }
    Ok(())
}

/// Makes an empty file of mode 0600, durably. It is made with mknod and never opened here: closing a
/// descriptor of the database drops every POSIX lock that SQLite holds on it in this process.
fn make(directory: &Path, path: &Path) -> io::Result<()> {
    match rustix::fs::mknodat(CWD, path, FileType::RegularFile, Mode::RUSR | Mode::WUSR, 0) {
        // Another process was quicker; its file is checked like any other.
        Err(rustix::io::Errno::EXIST) => return Ok(()),
        other => other?,
    }
    // A umask can take bits away from mknod's mode.
    fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
    File::open(directory)?.sync_all()
}

/// Gives the file at `from` the name `to`, if nothing has that. Where the file system knows no better way, it keeps the name
/// `from` as well.
pub(super) fn name_anew(from: &Path, to: &Path) -> io::Result<()> {
    match rustix::fs::renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
        Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOSYS) => fs::hard_link(from, to),
        renamed => Ok(renamed?),
    }
}

fn check_owner(path: &Path, metadata: &fs::Metadata) -> Result<(), Refusal> {
    let own = rustix::process::geteuid().as_raw();
    match metadata.uid() == own {
        true => Ok(()),
        false => Err(refusal(format!(
            "{0} belongs to user {1}, volcrypt runs as user {own}: run `chown {own} {0}` once you know who put it there",
            path.display(),
            metadata.uid()
        ))),
    }
}

/// By what a file is known, wherever it is moved: device and inode.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct FileIdentity(u64, u64);

/// The identity of the file at `path`.
pub(super) fn identity(path: &Path) -> Result<FileIdentity, Refusal> {
    let metadata = fs::symlink_metadata(path).map_err(|error| unusable(path, &error))?;
    Ok(FileIdentity(metadata.dev(), metadata.ino()))
}

/// Whether a backup is made ready to take the place of the database in `directory`, or was by a restore that was broken off.
pub(super) fn is_being_restored(directory: &Path) -> bool {
    !is_missing(&directory.join(STAGING).join(FILE_NAME))
}

/// Whether nothing has the name `path`.
pub(super) fn is_missing(path: &Path) -> bool {
    path.symlink_metadata().is_err_and(|error| error.kind() == io::ErrorKind::NotFound)
}

/// Whether a write-ahead log with something in it stands beside the database at `path`.
pub(super) fn has_write_ahead_log(path: &Path) -> Result<bool, Refusal> {
    is_filled(&beside(path, "-wal"))
}

/// What stands beside the database at `path` and has a part of it, write-ahead log or journal.
pub(super) fn unmerged(path: &Path) -> Result<Option<PathBuf>, Refusal> {
    for log in LOGS.map(|end| beside(path, end)) {
        if is_filled(&log)? {
            return Ok(Some(log));
        }
    }
    Ok(None)
}

fn is_filled(log: &Path) -> Result<bool, Refusal> {
    match fs::symlink_metadata(log) {
        Ok(metadata) => Ok(metadata.len() > 0),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(unusable(log, &error)),
    }
}

/// `path` with `suffix` at its end: what SQLite calls the files beside a database.
pub(super) fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    PathBuf::from(name)
}

/// The URI that opens `path` as a file nobody can change: without locks and without files beside
/// it. <https://www.sqlite.org/uri.html>
pub(super) fn immutable_uri(path: &Path) -> String {
    let mut uri = String::from("file:");
    for &byte in path.as_os_str().as_bytes() {
        match byte {
            b'/' | b'.' | b'-' | b'_' | b'0'..=b'9' | b'a'..=b'z' | b'A'..=b'Z' => uri.push(char::from(byte)),
            _ => uri.push_str(&format!("%{byte:02X}")),
        }
    }
    uri.push_str("?immutable=1");
    uri
}

fn unusable(path: &Path, error: &io::Error) -> Refusal {
    refusal(format!("{} cannot be used ({error}): see that it exists and volcryptd may enter it", path.display()))
}

fn refusal(sentence: String) -> Refusal {
    Refusal::new(Reason::StoreUnavailable, sentence)
}
