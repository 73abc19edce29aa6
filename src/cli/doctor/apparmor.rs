use super::Finding;
use super::host::Host;

const MEND: &str = "/usr/libexec/volcrypt/apparmor-rules add";
const GUESTS: &str = "/etc/apparmor.d/abstractions/libvirt-qemu.d/volcrypt";

impl Host {
    /// AppArmor, where it is on, has to let libvirt run the wrapper and the hook, and the guests'
    /// profile the wrapper's socket.
    pub(super) fn apparmor(&self) -> Vec<Finding> {
        let enabled = self.text("/sys/module/apparmor/parameters/enabled").is_ok_and(|text| text.trim() == "Y");
        if !enabled {
            return vec![Finding::ok("AppArmor", "it is off")];
        }
        let mut faults = Vec::new();
        for profile in ["usr.sbin.libvirtd", "usr.sbin.virtqemud"] {
            let local = format!("/etc/apparmor.d/local/{profile}");
            let lacks_rules = !self.text(&local).is_ok_and(|text| has_rule(&text, "/usr/libexec/volcrypt/"));
            if self.exists(&format!("/etc/apparmor.d/{profile}")) && lacks_rules {
                faults.push(Finding::fail(
                    "AppArmor",
                    format!("{local} does not let libvirt run the wrapper and the hook"),
                    MEND,
                ));
            }
        }
        if !self.text(GUESTS).is_ok_and(|text| has_rule(&text, "/run/volcrypt/")) {
            let sentence = format!("{GUESTS} does not let guests reach volcryptd");
            faults.push(Finding::fail("AppArmor", sentence, "apt-get install --reinstall volcrypt"));
        }
        if faults.is_empty() {
            faults.push(Finding::ok("AppArmor", "it lets libvirt and the guests use volcrypt"));
        }
        faults
    }
}

fn has_rule(text: &str, path: &str) -> bool {
    text.lines().any(|line| line.trim_start().starts_with(path))
}

#[cfg(test)]
mod tests {
    use super::super::Verdict;
    use super::super::host::tests::{host, write};
    use super::*;

    const ENABLED: (&str, &str) = ("/sys/module/apparmor/parameters/enabled", "Y\n");

    fn verdicts(host: &Host) -> Vec<Verdict> {
        host.apparmor().iter().map(Finding::verdict).collect()
    }

    #[test]
    fn where_apparmor_is_off_nothing_is_missing() {
        let (_root, without) = host(&[]);
        assert_eq!(verdicts(&without), [Verdict::Ok]);
        let (_root, off) = host(&[("/sys/module/apparmor/parameters/enabled", "N\n")]);
        assert_eq!(verdicts(&off), [Verdict::Ok]);
    }

    #[test]
    fn every_profile_there_is_needs_its_rules() {
        let (_root, host) = host(&[ENABLED, ("/etc/apparmor.d/usr.sbin.libvirtd", "")]);
        assert_eq!(verdicts(&host), [Verdict::Fail, Verdict::Fail]);
        write(&host, GUESTS, "  /run/volcrypt/wrapper.sock rw,\n");
        write(&host, "/etc/apparmor.d/local/usr.sbin.libvirtd", "# /usr/libexec/volcrypt/volcrypt-qemu PUx,\n");
        assert_eq!(verdicts(&host), [Verdict::Fail]);
        write(&host, "/etc/apparmor.d/local/usr.sbin.libvirtd", "/usr/libexec/volcrypt/volcrypt-qemu PUx,\n");
        assert_eq!(verdicts(&host), [Verdict::Ok]);
        write(&host, "/etc/apparmor.d/usr.sbin.virtqemud", "");
        assert_eq!(verdicts(&host), [Verdict::Fail]);
    }
}
