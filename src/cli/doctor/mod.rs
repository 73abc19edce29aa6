//! `volcrypt doctor`: what this host needs, what is wrong with it, and how to mend that.

use std::fmt;
use std::path::Path;
use std::sync::mpsc;
use std::thread;

use self::host::Host;
use super::table::printable;
use super::{CommandError, DEADLINE, Daemon, Outcome};
use super::{key, status};
use crate::policy::{Config, Intercept, KeyManagerConfig};
use crate::protocol::{GuardStatus, KeyCacheStatus, Status};

mod apparmor;
mod barbican;
mod guests;
mod host;
mod keys;
mod kmip;
mod libvirt;
mod service;

pub use guests::{DomainView, LibvirtView};

/// Asks libvirt for its version and domains; the error is libvirt's own sentence.
pub type Survey = fn() -> Result<LibvirtView, String>;

/// Where libvirt finds the wrapper under the names of the emulators.
const EMULATORS: &str = "/usr/libexec/volcrypt/emulators";

/// Runs every check; the exit code is 1 when one of them failed.
pub(super) fn examine(config: &Path, daemon: &Daemon<'_>, survey: Survey) -> Outcome {
    let host = Host::real();
    let status = status::ask(daemon);
    let mut findings = vec![
        host.kernel(),
        host.seccomp(),
        host.device_mapper(),
        host.dm_crypt(),
        configuration(config),
        daemon_answers(&status),
        service::descriptor_store(),
    ];
    match Config::load(config).map(|config| config.key_manager) {
        Ok(KeyManagerConfig::Kmip { kmip, .. }) => {
            findings.extend(kmip::certificates_hold(&kmip));
            findings.extend(kmip.wrapping_key.as_ref().map(kmip::unwraps));
        }
        Ok(KeyManagerConfig::Barbican { barbican, .. }) => {
            findings.extend(barbican::names_secrets(&barbican));
            findings.push(barbican::gives_a_token(*barbican));
        }
        _ => {}
    }
    let status = status.ok();
    let most_days =
        Config::load(config).ok().and_then(|config| config.policy.key_age_days).filter(|_| status.is_some());
    if let Some(most) = most_days
        && let Ok(all) = key::all(daemon)
    {
        findings.push(keys::age(&all, most));
    }
    let intercept = status.as_ref().map(|status| status.intercept);
    let intercept =
        intercept.or_else(|| Config::load(config).ok().map(|config| config.hook.intercept)).unwrap_or_default();
    findings.extend(status.as_ref().into_iter().flat_map(daemon_errors));
    findings.extend(status.as_ref().map(guard));
    findings.extend(status.as_ref().and_then(key_cache));
    if intercept == Intercept::Open {
        findings.extend(host.emulator_links());
        findings.extend(host.libvirt_path());
    }
    findings.push(host.hook());
    findings.extend(host.libvirt_before_the_hook());
    findings.extend(host.apparmor());
    findings.extend(guests::check(&host, survey_in_time(survey), status.as_ref(), intercept));
    report(&findings)
}

/// What one check found: one line of the report.
#[derive(Debug, PartialEq, Eq)]
struct Finding {
    verdict: Verdict,
    subject: &'static str,
    sentence: String,
    remedy: Option<String>,
}

/// How bad it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    /// As it should be.
    Ok,
    /// Something is not protected or not certain, while volcrypt itself can work.
    Warn,
    /// volcrypt cannot work like this.
    Fail,
}

impl Finding {
    fn ok(subject: &'static str, sentence: impl Into<String>) -> Self {
        Finding { verdict: Verdict::Ok, subject, sentence: sentence.into(), remedy: None }
    }

    fn warn(subject: &'static str, sentence: impl Into<String>, remedy: impl Into<String>) -> Self {
        Finding { verdict: Verdict::Warn, subject, sentence: sentence.into(), remedy: Some(remedy.into()) }
    }

    fn fail(subject: &'static str, sentence: impl Into<String>, remedy: impl Into<String>) -> Self {
        Finding { verdict: Verdict::Fail, subject, sentence: sentence.into(), remedy: Some(remedy.into()) }
    }

    #[cfg(test)]
    fn verdict(&self) -> Verdict {
        self.verdict
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let verdict = match self.verdict {
            Verdict::Ok => "ok  ",
            Verdict::Warn => "warn",
            Verdict::Fail => "FAIL",
        };
        write!(f, "{verdict}  {}: {}", self.subject, printable(&self.sentence))?;
        match &self.remedy {
            Some(remedy) => write!(f, "; to mend it: {}", printable(remedy)),
            None => Ok(()),
        }
    }
}

fn report(findings: &[Finding]) -> Outcome {
    let text = findings.iter().map(|finding| format!("{finding}\n")).collect();
    let failed = findings.iter().any(|finding| finding.verdict == Verdict::Fail);
    Outcome { text, code: failed.into() }
}

fn configuration(path: &Path) -> Finding {
    match Config::load(path) {
        Ok(_) => Finding::ok("configuration", format!("{} is sound", path.display())),
        Err(error) => Finding::fail(
            "configuration",
            error.to_string(),
            "correct it until 'volcrypt config check' is content, then run 'systemctl reload-or-restart volcryptd'",
        ),
    }
}

fn daemon_answers(status: &Result<Status, CommandError>) -> Finding {
    let own = env!("CARGO_PKG_VERSION");
    match status {
        Ok(status) if status.version == own => Finding::ok("daemon", format!("volcryptd {own} answers")),
        Ok(status) => Finding::warn(
            "daemon",
            format!("volcryptd {} runs while {own} is installed", status.version),
            "systemctl restart volcryptd (running guests do not notice)",
        ),
        Err(error) => Finding::fail("daemon", error.to_string(), "systemctl start volcryptd"),
    }
}

fn daemon_errors(status: &Status) -> impl Iterator<Item = Finding> {
    let configuration = status.configuration_error.as_ref().map(|error| {
        Finding::fail(
            "daemon",
            format!("it refuses every protected volume, because it could not use its configuration: {error}"),
            "correct the file, then run 'systemctl reload-or-restart volcryptd'",
        )
    });
    let store = status.key_store_error.as_ref().map(|error| {
        Finding::fail(
            "daemon",
            format!("it refuses every protected volume, because it could not use its key store: {error}"),
            "journalctl -u volcryptd shows more; then run 'systemctl restart volcryptd'",
        )
    });
    let left = status.keys_left_behind.as_ref().map(|sentence| {
        let (what, remedy) = sentence.split_once(": ").unwrap_or((sentence, "see 'volcrypt key migrate --help'"));
        Finding::fail("keys", what, remedy)
    });
    configuration.into_iter().chain(store).chain(left)
}

/// Without it a guest that runs without the wrapper can open a protected volume in clear.
fn guard(status: &Status) -> Finding {
    let GuardStatus { cgroup, devices, fault, all_because, .. } = &status.guard;
    match fault {
        None if all_because.is_some() => Finding::warn(
            "guard",
            format!("it shuts every block device for {cgroup}, because the configuration is faulty"),
            "correct the file, then run 'systemctl reload volcryptd'",
        ),
        None => Finding::ok("guard", format!("it is on: {devices} raw devices are shut for {cgroup}")),
        // A sentence and what to do.
        Some(fault) => {
            let (what, remedy) = fault.split_once(": ").unwrap_or((fault, "journalctl -u volcryptd shows more"));
            if status.intercept == Intercept::Xml {
                let sentence = format!(
                    "it is off, and with intercept = \"xml\" nothing else keeps guests from opening protected volumes in \
                     clear, so their domains do not start: {what}"
                );
                return Finding::fail("guard", sentence, remedy);
            }
            let sentence =
                format!("it is off, so guests without the wrapper could open protected volumes in clear: {what}");
            Finding::warn("guard", sentence, remedy)
        }
    }
}

/// Whether guests would start while the key server is down, where the configuration asks for that.
fn key_cache(status: &Status) -> Option<Finding> {
    let KeyCacheStatus { lifetime_days, fault, volumes } = status.key_cache.as_deref()?;
    if let Some(fault) = fault {
        // A sentence and what to do.
        let (what, remedy) = fault.split_once("; ").unwrap_or((fault, "journalctl -u volcryptd shows more"));
        let sentence = format!("no volume would start without the key server: {what}");
        return Some(Finding::warn("key cache", sentence, remedy));
    }
    let usable = volumes.iter().filter(|volume| volume.starts_until.is_some()).count();
    (*lifetime_days > 0).then(|| {
        let sentence = format!("{usable} of {} volumes would start without the key server", volumes.len());
        Finding::ok("key cache", sentence)
    })
}

/// libvirt's own calls have no deadline. A thread that hangs in one ends with the process.
fn survey_in_time(survey: Survey) -> Result<LibvirtView, String> {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || sender.send(survey()));
    receiver
        .recv_timeout(DEADLINE)
        .unwrap_or_else(|_| Err(format!("libvirt did not answer within {} seconds", DEADLINE.as_secs())))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::CallError;

    fn status(version: &str) -> Status {
        Status {
            version: version.into(),
            configuration_error: None,
            key_store_error: None,
            keys_left_behind: None,
            mappings: vec![],
            guests: vec![],
            intercept: Intercept::Open,
            guard: GuardStatus { on: true, cgroup: "machine.slice".into(), devices: 2, fault: None, all_because: None },
            key_cache: None,
        }
    }

    #[test]
    fn only_a_failure_makes_the_exit_code_one() {
        let outcome = report(&[Finding::ok("a", "fine"), Finding::warn("b", "odd", "look")]);
        assert_eq!((outcome.text.as_str(), outcome.code), ("ok    a: fine\nwarn  b: odd; to mend it: look\n", 0));
        let outcome = report(&[Finding::fail("c", "broken\n", "do")]);
        assert_eq!((outcome.text.as_str(), outcome.code), ("FAIL  c: broken?; to mend it: do\n", 1));
    }

    #[test]
    fn a_daemon_that_is_down_fails_and_an_older_one_warns() {
        let down = CommandError::Daemon(CallError::Broken(std::io::ErrorKind::UnexpectedEof.into()));
        assert_eq!(daemon_answers(&Err(down)).verdict, Verdict::Fail);
        assert_eq!(daemon_answers(&Ok(status("0.0.1"))).verdict, Verdict::Warn);
        assert_eq!(daemon_answers(&Ok(status(env!("CARGO_PKG_VERSION")))).verdict, Verdict::Ok);
    }

    #[test]
    fn a_guard_that_is_off_warns_with_its_remedy() {
        assert_eq!(guard(&status("x")).to_string(), "ok    guard: it is on: 2 raw devices are shut for machine.slice");
        let fault = Some("there is no cgroup /x: run this".to_owned());
        let off = Status { guard: GuardStatus { on: false, fault, ..GuardStatus::default() }, ..status("x") };
        assert_eq!(
            guard(&off).to_string(),
            "warn  guard: it is off, so guests without the wrapper could open protected volumes in clear: there is no \
             cgroup /x; to mend it: run this"
        );
    }

    #[test]
    fn a_key_cache_that_is_on_and_cannot_work_warns() {
        let with =
            |cache: Option<KeyCacheStatus>| super::key_cache(&Status { key_cache: cache.map(Box::new), ..status("x") });
        assert_eq!(with(None), None);
        assert_eq!(with(Some(KeyCacheStatus::default())), None, "it is off");
        let on = KeyCacheStatus { lifetime_days: 7, ..KeyCacheStatus::default() };
        assert_eq!(with(Some(on.clone())).unwrap().verdict, Verdict::Ok);
        let faulty = with(Some(KeyCacheStatus { fault: Some("no kek; restore it".into()), ..on })).unwrap();
        assert_eq!((faulty.verdict, faulty.remedy.as_deref()), (Verdict::Warn, Some("restore it")));
    }

    #[test]
    fn with_xml_a_guard_that_is_off_fails() {
        let fault = Some("there is no cgroup /x: run this".to_owned());
        let guard = GuardStatus { on: false, fault, ..GuardStatus::default() };
        let finding = super::guard(&Status { guard, intercept: Intercept::Xml, ..status("x") });
        assert_eq!((finding.verdict, finding.remedy.as_deref()), (Verdict::Fail, Some("run this")));
        assert_eq!(super::guard(&Status { intercept: Intercept::Xml, ..status("x") }).verdict, Verdict::Ok);
    }

    #[test]
    fn a_guard_that_shuts_everything_warns() {
        let guard = GuardStatus { all_because: Some("no".into()), ..status("x").guard };
        let finding = super::guard(&Status { guard, ..status("x") });
        assert_eq!(finding.verdict, Verdict::Warn);
        assert!(finding.to_string().contains("every block device for machine.slice"), "{finding}");
    }

    #[test]
    fn what_the_daemon_complains_of_fails() {
        assert_eq!(daemon_errors(&status("x")).count(), 0);
        let complaining = Status {
            configuration_error: Some("a".into()),
            key_store_error: Some("b".into()),
            keys_left_behind: Some("c: d".into()),
            ..status("x")
        };
        assert!(daemon_errors(&complaining).all(|finding| finding.verdict == Verdict::Fail));
        assert_eq!(daemon_errors(&complaining).count(), 3);
    }
}
