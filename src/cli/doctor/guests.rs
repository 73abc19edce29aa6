use std::path::Path;

use roxmltree::{Document, Node};

use super::host::Host;
use super::{EMULATORS, Finding};
use crate::domain::quoted;
use crate::policy::Intercept;
use crate::protocol::{GuardStatus, Status};

const OLDEST_LIBVIRT: u32 = 9_000_000;

/// What libvirt says of itself and its domains.
#[derive(Clone, Debug)]
pub struct LibvirtView {
    /// 1,000,000 times the major number, 1,000 times the minor number, and the release.
    pub version: u32,
    /// Every domain, running or not.
    pub domains: Vec<DomainView>,
}

/// One domain.
#[derive(Clone, Debug)]
pub struct DomainView {
    /// Its name.
    pub name: String,
    /// The XML of what runs, if it runs.
    pub running: Option<String>,
    /// The XML of its next start, unless it ends with what runs.
    pub saved: Option<String>,
}

/// libvirt itself, then every domain that the daemon does not guard, or will not after its next start.
pub(super) fn check(
    host: &Host,
    view: Result<LibvirtView, String>,
    status: Option<&Status>,
    intercept: Intercept,
) -> Vec<Finding> {
    let view = match view {
        Ok(view) => view,
        Err(error) => {
            return vec![Finding::fail(
                "libvirt",
                format!("qemu:///system cannot be asked ({error})"),
                "systemctl start libvirtd; systemctl status libvirtd",
            )];
        }
    };
    let mut findings = vec![version(view.version)];
    // What they run does not matter.
    if intercept == Intercept::Xml {
        let outside = |status| view.domains.iter().filter_map(move |domain| outside_the_guard(host, domain, status));
        findings.extend(status.filter(|status| status.guard.on).into_iter().flat_map(outside));
        return findings;
    }
    // Without the daemon's answer nothing can be said of running guests; that it is missing is a
    // finding of its own.
    if let Some(status) = status {
        findings.extend(view.domains.iter().filter_map(|domain| running(host, domain, status)));
    }
    let passing_by = view.domains.iter().filter_map(|domain| {
        let emulator = foreign_emulator(domain.saved.as_deref()?)?;
        Some(Finding::warn(
            "guests",
            format!(
                "domain {} names the emulator {emulator}, so its next start passes volcrypt's wrapper by",
                domain.name
            ),
            format!("volcrypt domain adopt {}", quoted(&domain.name)),
        ))
    });
    findings.extend(passing_by);
    if findings.len() == 1 && status.is_some() {
        findings.push(Finding::ok("guests", format!("all {} domains are and stay guarded", view.domains.len())));
    }
    findings
}

fn version(version: u32) -> Finding {
    let text = format!("{}.{}.{}", version / 1_000_000, version / 1000 % 1000, version % 1000);
    match version >= OLDEST_LIBVIRT {
        true => Finding::ok("libvirt", format!("version {text} answers")),
        false => Finding::fail("libvirt", format!("version {text} is older than 9.0"), "upgrade libvirt"),
    }
}

fn running(host: &Host, domain: &DomainView, status: &Status) -> Option<Finding> {
    let xml = domain.running.as_deref()?;
    let pid = pid(host, &domain.name);
    if pid.is_some_and(|pid| status.guests.iter().any(|guest| guest.pid == pid)) {
        return None;
    }
    let name = &domain.name;
    let emulator = foreign_emulator(xml).map(|emulator| format!(" (its emulator is {emulator})")).unwrap_or_default();
    let consequence = match pid.is_some_and(|pid| is_kept_out(host, pid, &status.guard)) {
        true => "protected volumes cannot be attached to it, because the guard refuses them",
        false => "protected volumes attached to it are NOT encrypted",
    };
    Some(Finding::warn(
        "guests",
        format!("domain {name} runs without volcrypt's wrapper{emulator}: {consequence}"),
        format!("shut it down and start it again: virsh shutdown {0}; virsh start {0}", quoted(name)),
    ))
}

/// A domain that runs where the guard does not count.
fn outside_the_guard(host: &Host, domain: &DomainView, status: &Status) -> Option<Finding> {
    domain.running.as_ref()?;
    let pid = pid(host, &domain.name)?;
    (!is_kept_out(host, pid, &status.guard)).then(|| {
        Finding::warn(
            "guests",
            format!(
                "domain {} runs outside of {}, where the guard is: protected volumes that are attached to it past volcrypt \
                 are NOT encrypted",
                domain.name, status.guard.cgroup
            ),
            "set cgroup in [guard] to the one that all guests run in",
        )
    })
}

/// Whether the guard keeps this process from raw devices: it is on, and the process is in its cgroup or
/// below. proc_pid_cgroup(5): cgroup v2 has the line `0::/PATH`.
fn is_kept_out(host: &Host, pid: u32, guard: &GuardStatus) -> bool {
    let cgroups = host.text(&format!("/proc/{pid}/cgroup")).unwrap_or_default();
    let own = cgroups.lines().find_map(|line| line.strip_prefix("0::/"));
    guard.on && own.is_some_and(|own| Path::new(own).starts_with(&guard.cgroup))
}

/// libvirt writes the process id of a domain's QEMU into a file of the domain's name.
fn pid(host: &Host, name: &str) -> Option<u32> {
    // libvirt refuses such a name itself; it must not lead out of the folder here.
    if name.contains('/') {
        return None;
    }
    host.text(&format!("/run/libvirt/qemu/{name}.pid")).ok()?.trim().parse().ok()
}

/// The emulator that the domain names, if it is not the wrapper. A domain that names none gets the
/// first in libvirt's PATH.
fn foreign_emulator(xml: &str) -> Option<String> {
    let document = Document::parse(xml).ok()?;
    let devices = child(document.root_element(), "devices")?;
    let emulator = child(devices, "emulator")?.text()?;
    let emulator = emulator.trim();
    (!Path::new(emulator).starts_with(EMULATORS)).then(|| emulator.to_owned())
}

fn child<'a, 'input>(node: Node<'a, 'input>, name: &str) -> Option<Node<'a, 'input>> {
    node.children().find(|child| child.has_tag_name(name))
}

#[cfg(test)]
mod tests {
    use super::super::Verdict;
    use super::super::host::tests::host;
    use super::*;
    use crate::protocol::GuestStatus;

    fn status(pids: &[u32]) -> Status {
        Status {
            version: "x".into(),
            configuration_error: None,
            key_store_error: None,
            keys_left_behind: None,
            mappings: vec![],
            guests: pids.iter().map(|&pid| GuestStatus { pid, domain: None }).collect(),
            intercept: Intercept::Open,
            guard: GuardStatus { on: true, cgroup: "machine.slice".into(), devices: 0, fault: None, all_because: None },
            key_cache: None,
        }
    }

    fn xml(emulator: Option<&str>) -> String {
        let line = emulator.map(|path| format!("<emulator>{path}</emulator>")).unwrap_or_default();
        format!("<domain type='kvm'><name>web1</name><devices>{line}<disk/></devices></domain>")
    }

    fn view(running: Option<String>, saved: Option<String>) -> Result<LibvirtView, String> {
        Ok(LibvirtView { version: 11_003_000, domains: vec![DomainView { name: "web1".into(), running, saved }] })
    }

    const WRAPPER: Option<&str> = Some("/usr/libexec/volcrypt/emulators/qemu-system-x86_64");
    const PLAIN: Option<&str> = Some("/usr/bin/qemu-system-x86_64");

    #[test]
    fn a_guest_that_registered_is_guarded() {
        let (_root, host) = host(&[("/run/libvirt/qemu/web1.pid", "42")]);
        let findings =
            check(&host, view(Some(xml(WRAPPER)), Some(xml(None))), Some(&status(&[7, 42])), Intercept::Open);
        assert!(findings.iter().all(|finding| finding.verdict() == Verdict::Ok), "{findings:?}");
        assert_eq!(findings.len(), 2);
    }

    #[test]
    fn a_guest_that_did_not_register_is_a_warning_with_its_emulator() {
        let (_root, host) = host(&[("/run/libvirt/qemu/web1.pid", "42\n")]);
        let findings = check(&host, view(Some(xml(PLAIN)), Some(xml(PLAIN))), Some(&status(&[7])), Intercept::Open);
        let text: Vec<String> = findings[1..].iter().map(Finding::to_string).collect();
        assert_eq!(
            text,
            [
                "warn  guests: domain web1 runs without volcrypt's wrapper (its emulator is \
                 /usr/bin/qemu-system-x86_64): protected volumes attached to it are NOT encrypted; to mend it: shut \
                 it down and start it again: virsh shutdown web1; virsh start web1",
                "warn  guests: domain web1 names the emulator /usr/bin/qemu-system-x86_64, so its next start passes \
                 volcrypt's wrapper by; to mend it: volcrypt domain adopt web1",
            ]
        );
    }

    #[test]
    fn without_the_daemon_no_running_guest_is_judged() {
        let (_root, host) = host(&[]);
        let findings = check(&host, view(Some(xml(WRAPPER)), None), None, Intercept::Open);
        assert_eq!(findings.len(), 1);
    }

    #[test]
    fn with_xml_it_counts_whether_a_guest_is_where_the_guard_is() {
        for (cgroup, number) in [("0::/machine.slice/machine-qemu.scope\n", 1), ("0::/user.slice\n", 2)] {
            let (_root, host) = host(&[("/run/libvirt/qemu/web1.pid", "42"), ("/proc/42/cgroup", cgroup)]);
            let findings = check(&host, view(Some(xml(PLAIN)), None), Some(&status(&[])), Intercept::Xml);
            assert_eq!(findings.len(), number, "{findings:?}");
            assert!(findings[1..].iter().all(|finding| finding.to_string().contains("runs outside of machine.slice")));
        }
    }

    #[test]
    fn libvirt_has_to_answer_and_to_be_new_enough() {
        let (_root, host) = host(&[]);
        assert_eq!(check(&host, Err("no socket".into()), None, Intercept::Open)[0].verdict(), Verdict::Fail);
        assert_eq!(version(9_000_000).verdict(), Verdict::Ok);
        assert_eq!(
            version(8_010_000).to_string(),
            "FAIL  libvirt: version 8.10.0 is older than 9.0; to mend it: upgrade libvirt"
        );
    }

    #[test]
    fn only_an_emulator_of_the_domain_itself_counts() {
        assert_eq!(foreign_emulator(&xml(PLAIN)).as_deref(), PLAIN);
        assert_eq!(foreign_emulator(&xml(WRAPPER)), None);
        assert_eq!(foreign_emulator(&xml(None)), None);
        assert_eq!(foreign_emulator("<domain><metadata><emulator>/x</emulator></metadata></domain>"), None);
        let beside = xml(Some("/usr/libexec/volcrypt/emulators-of-mine/qemu-system-x86_64"));
        assert!(foreign_emulator(&beside).is_some());
    }

    #[test]
    fn a_guest_that_the_guard_keeps_out_writes_nothing_in_clear() {
        for (cgroup, on, consequence) in [
            ("0::/machine.slice/machine-qemu.scope/libvirt/emulator\n", true, "the guard refuses them"),
            ("1:cpu:/machine.slice\n0::/machine.slice\n", true, "the guard refuses them"),
            ("0::/machine.slice/machine-qemu.scope\n", false, "NOT encrypted"),
            ("0::/machine.slices/x\n", true, "NOT encrypted"),
            ("1:devices:/machine.slice\n0::/\n", true, "NOT encrypted"),
        ] {
            let (_root, host) = host(&[("/run/libvirt/qemu/web1.pid", "42"), ("/proc/42/cgroup", cgroup)]);
            let mut status = status(&[7]);
            status.guard.on = on;
            let findings = check(&host, view(Some(xml(PLAIN)), None), Some(&status), Intercept::Open);
            assert!(findings[1].to_string().contains(consequence), "{cgroup}: {}", findings[1]);
        }
    }
}
