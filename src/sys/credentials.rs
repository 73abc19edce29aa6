//! Looking at files with another user's rights: setfsuid(2).

use std::io;

use rustix::thread::Gid;

/// By whose rights the kernel judges what a thread may do with files: credentials(7).
#[derive(Debug, PartialEq, Eq)]
pub struct FileSystemUser {
    /// The file-system user id.
    pub user: u32,
    /// The file-system group id.
    pub group: u32,
    /// The supplementary group ids.
    pub groups: Vec<u32>,
}

/// Runs `work` with the rights of `user` on a thread of its own, which ends with them. Its real, effective and
/// saved ids stay the daemon's, so that no other process may send it signals or trace it.
///
/// # Errors
/// When there can be no thread, or it does not get these rights.
///
/// # Panics
/// When `work` does.
pub fn with_rights_of<T: Send>(user: &FileSystemUser, work: impl FnOnce() -> T + Send) -> io::Result<T> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().spawn_scoped(scope, || take(user).map(|()| work()))?;
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Takes the rights of `user` for the calling thread. The user comes last: root's rights to files go with it.
fn take(user: &FileSystemUser) -> io::Result<()> {
    let groups: Vec<Gid> = user.groups.iter().map(|&group| Gid::from_raw(group)).collect();
    rustix::thread::set_thread_groups(&groups)?;
    // No id is -1, and asking for it changes nothing; both calls return the id that was in force.
    // SAFETY: the calls take numbers only and change the calling thread alone.
    let (user_now, group_now) = unsafe {
        libc::setfsgid(user.group);
        libc::setfsuid(user.user);
        (libc::setfsuid(u32::MAX), libc::setfsgid(u32::MAX))
    };
    match user_now as u32 == user.user && group_now as u32 == user.group {
        true => Ok(()),
        false => Err(io::ErrorKind::PermissionDenied.into()),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{PermissionsExt, chown};

    use super::*;

    #[test]
    fn only_one_thread_gives_up_roots_rights() {
        let folder = tempfile::tempdir().unwrap();
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o711)).unwrap();
        let file = folder.path().join("file");
        fs::write(&file, "x").unwrap();
        chown(&file, Some(64055), Some(64056)).expect("run the tests as root");
        let may = |user, groups: &[u32]| {
            let user = FileSystemUser { user, group: 64057, groups: groups.to_vec() };
            with_rights_of(&user, || fs::read(&file).is_ok()).unwrap()
        };
        fs::set_permissions(&file, fs::Permissions::from_mode(0o400)).unwrap();
        assert!(may(64055, &[]));
        assert!(!may(64058, &[64056]));
        fs::set_permissions(&file, fs::Permissions::from_mode(0o040)).unwrap();
        assert!(may(64058, &[64056]));
        assert!(!may(64058, &[]));
        assert!(fs::read(&file).is_ok());
    }
}
