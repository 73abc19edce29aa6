//! Whether the certificates of a KMIP client will hold, and whether it can unwrap keys.

use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use x509_cert::Certificate;
use x509_cert::der::Decode;

use super::Finding;
use crate::keys::kmip::{KmipConfig, WrappingKey};
use crate::keys::tls::certificates;

const SUBJECT: &str = "KMIP";
/// How long ahead a certificate's end is warned of.
const AHEAD: Duration = Duration::from_secs(30 * 24 * 3600);
const DAY: u64 = 24 * 3600;

/// Looks at this host's certificate, and at those of the authorities, of which an old one may be left.
pub(super) fn certificates_hold(config: &KmipConfig) -> Vec<Finding> {
    let now = SystemTime::now();
    let mut findings = vec![judge(&config.certificate, now, Iterator::min), judge(&config.ca, now, Iterator::max)];
    if let Err(sentence) = config.tls()
        && findings.iter().all(|finding| finding.sentence != sentence)
    {
        let remedy = "put a certificate and its own key there; a volcryptd that could use others since it started goes on \
                      with those";
        findings.push(Finding::fail(SUBJECT, sentence, remedy));
    }
    findings
}

/// Looks at the file that unwraps keys. Whether it is the key that the servers wrap by shows with the first one.
pub(super) fn unwraps(wrapping: &WrappingKey) -> Finding {
    match wrapping.read() {
        Ok(_) => Finding::ok(
            SUBJECT,
            format!(
                "keys come wrapped by the servers' key {}, and {} can be read",
                wrapping.identifier,
                wrapping.file.display()
            ),
        ),
        Err(sentence) => Finding::fail(
            SUBJECT,
            sentence,
            "no key can be unwrapped without it; volcryptd reads it anew for every key",
        ),
    }
}

/// Judges the certificate in `path` whose end `which` picks.
fn judge(path: &Path, now: SystemTime, which: fn(std::vec::IntoIter<Duration>) -> Option<Duration>) -> Finding {
    let remedy = "have its authority issue another one and put it there; volcryptd reads it at its next connection";
    let ends = certificates(path).and_then(|certificates| {
        let ends = certificates.iter().map(|certificate| end(certificate));
        ends.collect::<Result<Vec<_>, _>>().map_err(|error| format!("{} cannot be read: {error}", path.display()))
    });
    let end = match ends {
        // There is at least one.
        Ok(ends) => which(ends.into_iter()).unwrap_or_default(),
        Err(sentence) => return Finding::fail(SUBJECT, sentence, remedy),
    };
    let shown = path.display();
    let now = now.duration_since(UNIX_EPOCH).unwrap_or_default();
    match end.checked_sub(now) {
        None => Finding::fail(SUBJECT, format!("{shown} has expired"), remedy),
        Some(left) => {
            let days = left.as_secs() / DAY;
            let sentence = format!("{shown} is valid for {days} more days");
            if left < AHEAD { Finding::warn(SUBJECT, sentence, remedy) } else { Finding::ok(SUBJECT, sentence) }
        }
    }
}

/// When a certificate ends, since 1970-01-01 UTC.
fn end(certificate: &[u8]) -> Result<Duration, x509_cert::der::Error> {
    let certificate = Certificate::from_der(certificate)?;
    Ok(certificate.tbs_certificate().validity().not_after.to_unix_duration())
}

#[cfg(test)]
mod tests {
    use super::super::Verdict;
    use super::*;
    use crate::keys::kmip::KeyOrigin;
    use crate::keys::kmip::message::Version;

    /// Issued on 2026-11-24 for 100 days, with `openssl req -x509 -newkey ec -days 100`.
    const CERTIFICATE: &str = include_str!("certificate.pem");

    #[test]
    fn a_certificates_end_is_warned_of_thirty_days_ahead() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("client.pem");
        std::fs::write(&path, CERTIFICATE).unwrap();
        let end = UNIX_EPOCH + end(&certificates(&path).unwrap()[0]).unwrap();
        let day = Duration::from_secs(DAY);
        for (at, verdict, said) in [
            (end - 31 * day, Verdict::Ok, "valid for 31 more days"),
            (end - 30 * day + Duration::from_secs(1), Verdict::Warn, "valid for 29 more days"),
            (end + Duration::from_secs(1), Verdict::Fail, "has expired"),
        ] {
            let finding = judge(&path, at, Iterator::min);
            assert_eq!(finding.verdict(), verdict, "{finding}");
            assert!(finding.sentence.contains(said), "{finding}");
        }
        std::fs::write(&path, "nothing").unwrap();
        assert_eq!(judge(&path, end, Iterator::min).verdict(), Verdict::Fail);
        assert_eq!(judge(&folder.path().join("nowhere"), end, Iterator::max).verdict(), Verdict::Fail);
    }

    #[test]
    fn a_certificate_without_its_key_is_told_of() {
        let folder = tempfile::tempdir().unwrap();
        let (ca, key) = (folder.path().join("ca.pem"), folder.path().join("client.key"));
        std::fs::write(&ca, CERTIFICATE).unwrap();
        let config = KmipConfig {
            servers: Vec::new(),
            ca: ca.clone(),
            certificate: ca,
            key,
            key_origin: KeyOrigin::Host,
            wrapping_key: None,
            newest_version: Version::NEWEST,
            deadline: Duration::from_secs(1),
        };
        let failed = |config: &KmipConfig| {
            let findings = certificates_hold(config).into_iter();
            findings.filter(|finding| finding.sentence.contains("is not there")).collect::<Vec<_>>()
        };
        assert!(matches!(failed(&config).as_slice(), [key] if key.sentence.contains("client.key")));
    }

    #[test]
    fn a_file_that_unwraps_nothing_is_told_of() {
        let folder = tempfile::tempdir().unwrap();
        let wrapping = WrappingKey { identifier: "4711".to_owned(), file: folder.path().join("wrapping.key") };
        assert_eq!(unwraps(&wrapping).verdict(), Verdict::Fail);
        for (length, verdict) in [(32, Verdict::Ok), (33, Verdict::Fail)] {
            std::fs::write(&wrapping.file, vec![7; length]).unwrap();
            std::fs::set_permissions(&wrapping.file, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
            let finding = unwraps(&wrapping);
            assert_eq!(finding.verdict(), verdict, "{finding}");
            assert!(finding.sentence.contains("wrapping.key"), "{finding}");
        }
    }
}
