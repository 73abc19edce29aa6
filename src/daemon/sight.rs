//! Places of the host of which the daemon sees something else than libvirt and its guests do.

use std::fs;
use std::path::{Path, PathBuf};

use super::broker::Broker;
use crate::domain::{Image, Source};
use crate::guest::block_device_at;
use crate::refusal::{Reason, Refusal};

/// The settings of volcryptd.service that hide folders from it, and which ones: systemd.exec(5).
const HIDDEN: [(&str, &[&str]); 2] =
    [("ProtectHome=yes", &["/home", "/root", "/run/user"]), ("PrivateTmp=yes", &["/tmp", "/var/tmp"])];

/// How many links the kernel follows on one path.
const LINKS: usize = 40;

/// Whether the daemon would see a block device where `image` is said to be one. There may be a protected volume where
/// it sees nothing: by a link, or by a node that somebody has made. What the XML calls a file is left to QEMU's open,
/// which is judged as QEMU sees it.
///
/// # Errors
/// When it is where the daemon sees nothing, and there are rules.
pub(super) fn check_in_sight(broker: &Broker, image: Image<'_>) -> Result<(), Refusal> {
    let Source::Path(path) = image.source else { return Ok(()) };
    if !image.is_device || broker.config().is_ok_and(|config| config.rules().is_empty()) || !is_out_of_sight(path) {
        return Ok(());
    }
    let folders: Vec<_> = hidden().map(|folder| folder.display().to_string()).collect();
    Err(Refusal::new(
        Reason::NotAllowed,
        format!(
            "{} is or leads to where volcryptd sees nothing of the host ({}), and may be a protected volume: name the \
             device in /dev",
            path.display(),
            folders.join(", ")
        ),
    ))
}

fn hidden() -> impl Iterator<Item = &'static Path> {
    HIDDEN.iter().flat_map(|(_, folders)| *folders).map(Path::new)
}

fn is_out_of_sight(path: &Path) -> bool {
    let is_missing = |errno| matches!(errno, Some(libc::ENOENT | libc::ENOTDIR));
    let is_hidden = |place: &Path| {
        // Any of them may be a link to a larger disk.
        let real = |folder: &Path| folder.canonicalize().is_ok_and(|folder| place.starts_with(folder));
        hidden().any(|folder| place.starts_with(folder) || real(folder))
    };
    block_device_at(path).is_err_and(|error| is_missing(error.raw_os_error()))
        && end_of(path).is_none_or(|place| is_hidden(&place))
}

/// Where there is nothing any more on the way along `path`, by the links up to there; nothing if that is too far.
fn end_of(path: &Path) -> Option<PathBuf> {
    let mut path = path.to_owned();
    for _ in 0..=LINKS {
        let real = |ancestor: &Path| Some((ancestor.canonicalize().ok()?, ancestor.to_owned()));
        let (real, ancestor) = path.ancestors().find_map(real)?;
        let rest = path.strip_prefix(&ancestor).ok()?;
        let mut names = rest.components();
        let Some(name) = names.next() else { return Some(real) };
        match fs::read_link(real.join(name)) {
            Ok(link) => path = real.join(link).join(names.as_path()),
            Err(_) => return Some(real.join(rest)),
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn the_unit_hides_what_is_known_to_be_hidden_and_nothing_else() {
        let unit = Path::new(env!("CARGO_MANIFEST_DIR")).join("packaging/systemd/volcryptd.service");
        let unit = fs::read_to_string(unit).unwrap();
        for (setting, _) in HIDDEN {
            assert!(unit.lines().any(|line| line == setting), "{setting}");
        }
        // The others of systemd.exec(5) that give a service another view of files.
        let others =
            ["Root", "Inaccessible", "TemporaryFileSystem", "Bind", "PrivateDevices", "Mount", "ExtensionD", "NoExec"];
        for line in unit.lines() {
            assert!(!others.iter().any(|other| line.starts_with(other)), "{line}");
        }
        let hides = |line: &&str| line.starts_with("ProtectHome=") || line.starts_with("PrivateTmp=");
        assert_eq!(unit.lines().filter(hides).count(), HIDDEN.len());
    }

    #[test]
    fn what_leads_into_a_hidden_folder_and_ends_there_is_out_of_sight() {
        let (seen, hidden) = (tempfile::tempdir_in("/dev/shm").unwrap(), tempfile::tempdir_in("/var/tmp").unwrap());
        let at = |name: &str| seen.path().join(name);
        fs::write(hidden.path().join("there"), "").unwrap();
        symlink(hidden.path().join("missing"), at("into")).unwrap();
        symlink("into", at("twice")).unwrap();
        symlink(hidden.path(), at("folder")).unwrap();
        symlink("/dev/shm/volcrypt-missing", at("elsewhere")).unwrap();
        symlink(hidden.path().join("there"), at("file")).unwrap();
        for path in ["/home/nobody/lun", "/root/x/y", "/run/user/7/lun", "/tmp/volcrypt-none", "/home/x/../../srv/lun"]
            .map(Path::new)
        {
            assert!(is_out_of_sight(path), "{}", path.display());
        }
        for path in ["into", "twice", "folder/missing", "folder/missing/lun", "file/lun"].map(at) {
            assert!(is_out_of_sight(&path), "{}", path.display());
        }
        for path in ["elsewhere", "missing", "file"].map(at) {
            assert!(!is_out_of_sight(&path), "{}", path.display());
        }
        for path in ["/dev/null", "/dev/none", "/srv/none", "/homes/none", "/tmpfs/none"].map(Path::new) {
            assert!(!is_out_of_sight(path), "{}", path.display());
        }
    }
}
