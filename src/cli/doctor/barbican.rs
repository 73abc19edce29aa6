//! Whether Keystone lets this host have keys, and which of Cinder's.

use super::Finding;
use crate::keys::barbican::{BarbicanConfig, BarbicanKeyManager, read_volume_secrets};

/// Looks at the file that names Cinder's secrets, if there is to be one.
pub(super) fn names_secrets(config: &BarbicanConfig) -> Option<Finding> {
    const SUBJECT: &str = "volume secrets";
    let path = config.volume_secrets.as_ref()?;
    Some(match read_volume_secrets(path) {
        Ok(secrets) => {
            Finding::ok(SUBJECT, format!("{} names the secrets of {} volumes", path.display(), secrets.len()))
        }
        Err(refusal) => Finding::fail(SUBJECT, refusal.to_string(), "correct it: until then no new volume gets a key"),
    })
}

/// Asks Keystone for a token and for where Barbican is.
pub(super) fn gives_a_token(config: BarbicanConfig) -> Finding {
    const SUBJECT: &str = "Barbican";
    let keystone = config.auth_url.clone();
    match BarbicanKeyManager::new(config).introduce() {
        Ok(barbican) => Finding::ok(SUBJECT, format!("{keystone} gives this host a token for {barbican}")),
        // A sentence and what to do.
        Err(refusal) => {
            let sentence = refusal.to_string();
            let (what, remedy) = sentence
                .rsplit_once(": ")
                .or_else(|| sentence.rsplit_once("; "))
                .unwrap_or((&sentence, "see that Keystone runs, and that the section [barbican] is right"));
            Finding::fail(SUBJECT, what, remedy)
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::time::Duration;

    use super::super::Verdict;
    use super::*;
    use crate::keys::barbican::Credential;

    fn config(folder: &Path) -> BarbicanConfig {
        BarbicanConfig {
            auth_url: "http://127.0.0.1:1/v3".to_owned(),
            credential: Credential::Application("x".to_owned()),
            secret: folder.join("secret"),
            ca: None,
            interface: "public".to_owned(),
            region: None,
            deadline: Duration::from_secs(1),
            volume_secrets: Some(folder.join("volume-secrets")),
        }
    }

    #[test]
    fn a_file_of_secrets_that_cannot_be_used_fails() {
        let folder = tempfile::tempdir().unwrap();
        let config = config(folder.path());
        assert_eq!(names_secrets(&config).unwrap().verdict(), Verdict::Fail);
        std::fs::write(folder.path().join("volume-secrets"), "vol-1 dfe2418f-8205-4e90-816a-4e8ea2366b48\n").unwrap();
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o600);
        std::fs::set_permissions(folder.path().join("volume-secrets"), mode).unwrap();
        let finding = names_secrets(&config).unwrap();
        assert_eq!(finding.verdict(), Verdict::Ok);
        assert!(finding.sentence.ends_with("the secrets of 1 volumes"), "{finding}");
        assert_eq!(names_secrets(&BarbicanConfig { volume_secrets: None, ..config }), None);
    }

    #[test]
    fn a_keystone_that_cannot_be_asked_fails_with_what_to_do() {
        let folder = tempfile::tempdir().unwrap();
        let config = config(folder.path());
        let finding = gives_a_token(config.clone());
        assert_eq!(finding.verdict(), Verdict::Fail);
        assert!(finding.sentence.contains("is not there"), "{finding}");
        std::fs::write(&config.secret, "s").unwrap();
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o600);
        std::fs::set_permissions(&config.secret, mode).unwrap();
        let finding = gives_a_token(config);
        assert_eq!(finding.verdict(), Verdict::Fail);
        assert!(finding.remedy.as_ref().unwrap().starts_with("see that Keystone"), "{finding}");
    }
}
