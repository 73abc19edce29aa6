//! The file that says which secrets are the keys of which volumes: those that Cinder has made.
//!
//! A line is the id of a volume, spaces, and the UUID of a secret. What comes after `#` counts for nothing.

use std::collections::{BTreeMap, HashMap};
use std::fs::OpenOptions;
use std::io::{self, Read};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use crate::keys::SecretId;
use crate::refusal::{Reason, Refusal};
use crate::volume::VolumeId;

/// The largest file that is read, in bytes: room for 100,000 volumes.
const SIZE_LIMIT: u64 = 16 << 20;

/// What the file at `path` says of every volume in it.
///
/// # Errors
/// [`Reason::Configuration`] when it cannot be read, others than root could have written it, or it is not what it
/// should be: no volume gets a key then that it might name.
pub fn read(path: &Path) -> Result<BTreeMap<VolumeId, SecretId>, Refusal> {
    let faulty = |what: String| Refusal::new(Reason::Configuration, format!("{}: {what}", path.display()));
    let text = content(path).map_err(|error| {
        faulty(format!(
            "the file that names Cinder's secrets cannot be read ({error}): correct volume_secrets in the section [barbican], \
             or the file"
        ))
    })?;
    parse(&text).map_err(|(line, what)| faulty(format!("line {line} {what}")))
}

fn content(path: &Path) -> io::Result<String> {
    // Non-blocking, so that a FIFO in the file's place cannot make the daemon wait.
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
    let metadata = file.metadata()?;
    let own = rustix::process::geteuid().as_raw();
    if !metadata.is_file() {
        return Err(io::Error::other("it is no regular file"));
    }
    if ![0, own].contains(&metadata.uid()) || metadata.mode() & 0o022 != 0 {
        return Err(io::Error::other("others than root may write it"));
    }
    let mut bytes = Vec::new();
    file.take(SIZE_LIMIT + 1).read_to_end(&mut bytes)?;
    match bytes.len() as u64 > SIZE_LIMIT {
        true => Err(io::Error::other("it is larger than 16 MiB")),
        false => String::from_utf8(bytes).map_err(|_| io::Error::other("it is no UTF-8 text")),
    }
}

/// The line that is wrong, and what is wrong with it.
fn parse(text: &str) -> Result<BTreeMap<VolumeId, SecretId>, (usize, String)> {
    let mut secrets = BTreeMap::new();
    let mut volumes: HashMap<SecretId, VolumeId> = HashMap::new();
    for (index, line) in text.lines().enumerate() {
        let at = |what: String| (index + 1, what);
        let words: Vec<&str> = line.split('#').next().unwrap_or_default().split_whitespace().collect();
        let (volume, secret) = match words[..] {
            [] => continue,
            [volume, secret] => (volume, secret),
            _ => {
                return Err(at(
                    "is not the id of a volume and the UUID of a secret: write both and nothing else".to_owned()
                ));
            }
        };
        let volume: VolumeId = volume.parse().map_err(|error| at(format!("names no volume ({error}): correct it")))?;
        let secret: SecretId = secret.parse().map_err(|error| at(format!("names no secret ({error})")))?;
        if let Some(other) = volumes.insert(secret.clone(), volume.clone()) {
            let what =
                format!("gives volume {volume} the secret of volume {other}: each has one of its own, so correct one");
            return Err(at(what));
        }
        if secrets.insert(volume.clone(), secret).is_some() {
            return Err(at(format!("gives volume {volume} a second secret: remove one of the two lines")));
        }
    }
    Ok(secrets)
}

#[cfg(test)]
mod tests {
    use std::fs::{self, Permissions};
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    const ONE: &str = "dfe2418f-8205-4e90-816a-4e8ea2366b48";
    const TWO: &str = "97992d93-adda-4dba-985d-aff7b0314087";

    #[test]
    fn a_line_is_a_volume_and_its_secret() {
        let text = format!("# from Cinder\n\none {ONE}\n\ttwo\t{}  # the other\n", TWO.to_uppercase());
        let secrets = parse(&text).unwrap();
        assert_eq!(secrets.len(), 2);
        assert_eq!(secrets[&"two".parse().unwrap()].as_str(), TWO);
        assert!(parse("").unwrap().is_empty());
    }

    #[test]
    fn a_faulty_line_is_named() {
        for (text, line, what) in [
            (format!("one {ONE}\ntwo"), 2, "is not the id of a volume"),
            (format!("one {ONE} {TWO}"), 1, "is not the id of a volume"),
            (format!("o/ne {ONE}"), 1, "names no volume"),
            ("one 1".to_owned(), 1, "names no secret"),
            (format!("one {ONE}\n#\ntwo {}", ONE.to_uppercase()), 3, "gives volume two the secret of volume one"),
            (format!("one {ONE}\none {TWO}"), 2, "gives volume one a second secret"),
            (format!("one {ONE}\none {ONE}"), 2, "gives volume one the secret of volume one"),
        ] {
            let (found, said) = parse(&text).unwrap_err();
            assert_eq!(found, line, "{text}");
            assert!(said.contains(what), "{text}: {said}");
        }
    }

    #[test]
    fn only_a_file_that_root_alone_writes_counts() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("secrets");
        let said = || read(&path).unwrap_err();
        assert_eq!(said().reason(), Reason::Configuration);
        assert!(said().to_string().contains("cannot be read"), "{}", said());
        assert!(said().to_string().contains("correct volume_secrets in the section [barbican]"), "{}", said());
        fs::write(&path, format!("one {ONE}\n")).unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o644)).unwrap();
        assert_eq!(read(&path).unwrap().len(), 1);
        fs::set_permissions(&path, Permissions::from_mode(0o664)).unwrap();
        assert!(said().to_string().contains("others than root"), "{}", said());
        fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
        fs::write(&path, "one\n").unwrap();
        assert!(said().to_string().contains("secrets: line 1 is not"), "{}", said());
        fs::write(&path, [0xff]).unwrap();
        assert!(said().to_string().contains("no UTF-8"), "{}", said());
        fs::remove_file(&path).unwrap();
        fs::create_dir(&path).unwrap();
        assert!(said().to_string().contains("no regular file"), "{}", said());
    }
}
