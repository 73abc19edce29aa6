//! Keys in files: read straight into locked memory, written whole or not at all.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;

use aws_lc_rs::rand;

use super::Key;
use crate::refusal::{Reason, Refusal};

/// How the name of a file begins that is still being written.
const TEMPORARY: &str = ".new-";

/// Who vouches that nobody else has read a file.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Trust {
    /// The file's owner and mode: this user (or root), and nothing for group and others.
    Mode,
    /// The directory it is in, which only the service can enter: systemd's credentials.
    Directory,
}

/// The whole content of the file at `path`, or `None` if there is none. `purpose` names it in
/// refusals.
///
/// # Errors
/// [`Reason::NoKey`] when the file is empty, longer than `limit` bytes, a symbolic link or no
/// regular file, when others may read it, or when it cannot be read.
pub(super) fn read(path: &Path, purpose: &str, trust: Trust, limit: usize) -> Result<Option<Key>, Refusal> {
    let refuse = |what: String| Err(no_key(format!("{} ({purpose}) {what}", path.display())));
    // Non-blocking, so that a FIFO in the file's place cannot make the daemon wait.
    let opened = OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(path);
    let mut file = match opened {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) if error.raw_os_error() == Some(libc::ELOOP) => {
            return refuse("is a symbolic link: put the file itself there".to_owned());
        }
        Err(error) => return refuse(format!("cannot be opened: {error}")),
        Ok(file) => file,
    };
    let metadata = match file.metadata() {
        Err(error) => return refuse(format!("cannot be examined: {error}")),
        Ok(metadata) => metadata,
    };
    if !metadata.is_file() {
        return refuse("is not a regular file: put the file itself there".to_owned());
    }
    if trust == Trust::Mode {
        let own = rustix::process::geteuid().as_raw();
        if metadata.uid() != own && metadata.uid() != 0 {
            return refuse(format!(
                "belongs to user {}, so its key is not secret: replace it by one that user {own} owns",
                metadata.uid()
            ));
        }
        if metadata.mode() & 0o077 != 0 {
            return refuse(format!(
                "is open to others (mode {:04o}), so its key may no longer be secret: run `chmod 0600 {}` if it still is",
                metadata.mode() & 0o7777,
                path.display()
            ));
        }
    }
    let length = match usize::try_from(metadata.len()) {
        Ok(length) if (1..=limit).contains(&length) => length,
        _ => {
            return refuse(format!(
                "has {} bytes, more than the {limit} a key can take or none: restore it from backup",
                metadata.len()
            ));
        }
    };
    let key = Key::filled(length, |bytes| {
        file.read_exact(bytes)
            .map_err(|error| no_key(format!("{} ({purpose}) cannot be read: {error}", path.display())))
    })?;
    Ok(Some(key))
}

/// Writes `key` to a new file `path` of mode 0600, durably. Nobody ever sees half of it: it is
/// written under another name and linked to its own.
///
/// # Errors
/// `AlreadyExists` when `path` is there; it is left as it is. Otherwise those of open(2), write(2),
/// fsync(2) and link(2).
pub(super) fn write_new(path: &Path, key: &Key) -> io::Result<()> {
    let directory = path.parent().ok_or(io::ErrorKind::InvalidInput)?;
    let mut suffix = [0; 8];
    rand::fill(&mut suffix).map_err(|_| io::Error::other("the system's random number generator failed"))?;
    let temporary = directory.join(format!("{TEMPORARY}{:016x}", u64::from_be_bytes(suffix)));
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary)?;
    let written = file
        .set_permissions(Permissions::from_mode(0o600))
        .and_then(|()| file.write_all(key.bytes()))
        .and_then(|()| file.sync_all())
        .and_then(|()| fs::hard_link(&temporary, path));
    let removed = fs::remove_file(&temporary);
    written.and(removed)?;
    File::open(directory)?.sync_all()
}

/// Has what stands at `path`, and its name, on the disk: somebody else may have written it.
///
/// # Errors
/// Those of open(2) and fsync(2).
pub(super) fn sync(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()?;
    sync_directory(path)
}

/// Gives the file at `from` the name `to` in the same directory, durably, in the place of what had it.
///
/// # Errors
/// Those of rename(2) and fsync(2).
pub(super) fn replace(from: &Path, to: &Path) -> io::Result<()> {
    fs::rename(from, to)?;
    sync_directory(to)
}

/// Removes the file at `path`, durably.
///
/// # Errors
/// Those of unlink(2) and fsync(2).
pub(super) fn remove(path: &Path) -> io::Result<()> {
    fs::remove_file(path)?;
    sync_directory(path)
}

/// Removes from `directory` what [`write_new`] left there if it was killed. No other thread may be in it.
pub(super) fn sweep(directory: &Path) -> io::Result<()> {
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        let name = entry.file_name();
        let suffix = name.to_str().and_then(|name| name.strip_prefix(TEMPORARY));
        if suffix.is_some_and(|suffix| suffix.len() == 16 && suffix.bytes().all(|byte| byte.is_ascii_hexdigit())) {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

fn sync_directory(path: &Path) -> io::Result<()> {
    File::open(path.parent().ok_or(io::ErrorKind::InvalidInput)?)?.sync_all()
}

fn no_key(sentence: String) -> Refusal {
    Refusal::new(Reason::NoKey, sentence)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn key_of(content: &[u8]) -> Key {
        Key::filled(content.len(), |bytes| {
            bytes.copy_from_slice(content);
            Ok(())
        })
        .unwrap()
    }

    fn refused(path: &Path) -> String {
        match read(path, "test key", Trust::Mode, 64) {
            Err(refusal) => {
                assert_eq!(refusal.reason(), Reason::NoKey);
                refusal.to_string()
            }
            Ok(_) => panic!("{} was read", path.display()),
        }
    }

    #[test]
    fn what_is_written_is_read() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("key");
        assert!(read(&path, "test key", Trust::Mode, 64).unwrap().is_none());
        write_new(&path, &key_of(b"0123456789abcdef")).unwrap();
        assert_eq!(read(&path, "test key", Trust::Mode, 64).unwrap().unwrap().bytes(), b"0123456789abcdef");
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o600);
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1, "nothing else is left behind");
    }

    #[test]
    fn a_file_that_is_there_is_never_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("key");
        write_new(&path, &key_of(b"first")).unwrap();
        let error = write_new(&path, &key_of(b"second")).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(fs::read(&path).unwrap(), b"first");
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_file_that_others_can_read_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("key");
        write_new(&path, &key_of(b"secret")).unwrap();
        for mode in [0o604, 0o640, 0o602, 0o620] {
            fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
            assert!(refused(&path).contains("chmod 0600"), "{mode:o}");
            assert!(read(&path, "test key", Trust::Directory, 64).unwrap().is_some());
        }
    }

    #[test]
    fn what_is_no_plain_file_of_a_keys_length_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("key");
        write_new(&path, &key_of(&[1; 65])).unwrap();
        assert!(refused(&path).contains("has 65 bytes"));
        fs::write(&path, b"").unwrap();
        assert!(refused(&path).contains("has 0 bytes"));
        let link = directory.path().join("link");
        symlink(&path, &link).unwrap();
        assert!(refused(&link).contains("symbolic link"));
        let fifo = directory.path().join("fifo");
        rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
        assert!(refused(&fifo).contains("not a regular file"));
    }
}
