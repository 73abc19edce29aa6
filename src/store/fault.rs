//! What SQLite's errors mean to the operator.

use std::path::Path;

use rusqlite::{Error, ErrorCode, ffi};

use crate::refusal::{Reason, Refusal};

/// The refusal for `error`, met on the database at `path`. SQLite's texts name tables, columns and
/// its own codes, never a value, so no key byte can be in them.
pub(super) fn refusal(path: &Path, error: &Error) -> Refusal {
    let is_full = is_disk_full(path, error);
    let path = path.display();
    let sentence = match error.sqlite_error_code() {
        _ if is_full => format!("{path} cannot grow, the disk is full: free some space there and repeat"),
        Some(ErrorCode::ReadOnly) => format!(
            "{path} is read-only: nothing can be enrolled, destroyed or recorded before its file system is \
             mounted writable and volcryptd restarted"
        ),
        Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => {
            format!("{path} is held by another process: see which with `fuser {path}`, let it finish and repeat")
        }
        Some(ErrorCode::SystemIoFailure) => format!(
            "reading or writing {path} failed ({error}): look for disk errors with `journalctl -k`, then repeat"
        ),
        Some(ErrorCode::DatabaseCorrupt) => damaged(&path, &error.to_string()),
        Some(ErrorCode::NotADatabase) => {
            format!(
                "{path} is not a database and was left as it is: stop volcryptd and run 'volcrypt key restore' with a \
                 backup, which keeps this file beside it"
            )
        }
        Some(ErrorCode::CannotOpen | ErrorCode::PermissionDenied) => {
            format!("{path} cannot be opened ({error}): see that volcryptd may read and write it and its directory")
        }
        _ => format!("{path} did not do what it was asked ({error}): check the file with `sqlite3 {path} .schema`"),
    };
    Refusal::new(Reason::StoreUnavailable, sentence)
}

/// Whether `error`, met on the database at `path`, comes of a full disk. Besides `SQLITE_FULL` that is a failure to make
/// room in the shared-memory file, which SQLite calls an input/output error, and any other such error or a file that cannot
/// be made while no block or no inode is free.
pub(super) fn is_disk_full(path: &Path, error: &Error) -> bool {
    let Some(code) = error.sqlite_error() else { return false };
    match code.code {
        ErrorCode::DiskFull => true,
        _ if code.extended_code == ffi::SQLITE_IOERR_SHMSIZE => true,
        ErrorCode::SystemIoFailure | ErrorCode::CannotOpen => rustix::fs::statvfs(path).is_ok_and(|status| {
            // A file system that makes inodes as it needs them says that it has none at all.
            status.f_bfree == 0 || (status.f_files > 0 && status.f_ffree == 0)
        }),
        _ => false,
    }
}

/// The refusal for a database at `path` whose contents make no sense; `detail` says which.
pub(super) fn corrupt(path: &Path, detail: &str) -> Refusal {
    Refusal::new(Reason::StoreUnavailable, damaged(&path.display(), detail))
}

fn damaged(path: &dyn std::fmt::Display, detail: &str) -> String {
    format!(
        "{path} is damaged ({detail}): stop volcryptd and run 'volcrypt key restore' with a backup, which keeps the damaged file beside it"
    )
}
