//! Whether Keystone lets this host have keys.

use super::Finding;
use crate::keys::barbican::{BarbicanConfig, BarbicanKeyManager};

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
    use std::time::Duration;

    use super::super::Verdict;
    use super::*;
    use crate::keys::barbican::Credential;

    #[test]
    fn a_keystone_that_cannot_be_asked_fails_with_what_to_do() {
        let folder = tempfile::tempdir().unwrap();
        let config = BarbicanConfig {
            auth_url: "http://127.0.0.1:1/v3".to_owned(),
            credential: Credential::Application("x".to_owned()),
            secret: folder.path().join("secret"),
            ca: None,
            interface: "public".to_owned(),
            region: None,
            deadline: Duration::from_secs(1),
        };
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
