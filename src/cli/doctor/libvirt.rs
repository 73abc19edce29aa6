use std::fs;
use std::os::unix::fs::MetadataExt;

use super::host::{HOOK_LINK, Host};
use super::{EMULATORS, Finding};
use crate::guest::parse_start_time;

/// The daemons of libvirt that start QEMU: the monolithic one and the modular one.
const DAEMONS: [&str; 2] = ["libvirtd", "virtqemud"];

impl Host {
    /// Every running libvirt has to find the wrapper before the emulators proper.
    pub(super) fn libvirt_path(&self) -> Vec<Finding> {
        let running = self.running_daemons();
        if running.is_empty() {
            return vec![self.path_of_the_next_start()];
        }
        running.into_iter().map(|(name, pid)| self.path_of_a_running(name, pid)).collect()
    }

    fn path_of_a_running(&self, name: &str, pid: u32) -> Finding {
        let environment = match self.text(&format!("/proc/{pid}/environ")) {
            Ok(environment) => environment,
            Err(error) => {
                let sentence = format!("the environment of {name} (process {pid}) cannot be read ({error})");
                return Finding::warn("libvirt's PATH", sentence, "run volcrypt doctor as root");
            }
        };
        let path = environment.split('\0').find_map(|variable| variable.strip_prefix("PATH="));
        let wrapper_is_first = path.and_then(|path| path.split(':').next()) == Some(EMULATORS);
        match (wrapper_is_first, self.exists(&drop_in(name))) {
            (true, _) => Finding::ok("libvirt's PATH", format!("{name} (process {pid}) finds the wrapper first")),
            (false, true) => Finding::fail(
                "libvirt's PATH",
                format!("{name} was not restarted since volcrypt was installed: guests start without the wrapper"),
                format!("systemctl restart {name} (running guests do not notice)"),
            ),
            (false, false) => no_drop_in(name),
        }
    }

    fn path_of_the_next_start(&self) -> Finding {
        match DAEMONS.iter().find(|name| !self.exists(&drop_in(name))) {
            None => Finding::ok("libvirt's PATH", "libvirt does not run; when it starts, it finds the wrapper first"),
            Some(name) => no_drop_in(name),
        }
    }

    /// libvirt looks once, when it starts, whether there is any hook for QEMU.
    pub(super) fn libvirt_before_the_hook(&self) -> Vec<Finding> {
        let Ok(linked) = fs::symlink_metadata(self.path(HOOK_LINK)).map(|link| link.ctime()) else { return Vec::new() };
        let mut findings = Vec::new();
        for (name, pid) in self.running_daemons() {
            if self.started_at(pid).is_some_and(|started| started < linked) {
                findings.push(Finding::warn(
                    "hook",
                    format!("{name} (process {pid}) was started before {HOOK_LINK} was there, and may not call it"),
                    format!("systemctl restart {name} (running guests do not notice)"),
                ));
            }
        }
        findings
    }

    /// When process `pid` was started, in seconds since 1970, rounded up.
    fn started_at(&self, pid: u32) -> Option<i64> {
        let boot = self.text("/proc/stat").ok()?;
        let boot: i64 = boot.lines().find_map(|line| line.strip_prefix("btime "))?.trim().parse().ok()?;
        let ticks = parse_start_time(&self.text(&format!("/proc/{pid}/stat")).ok()?)?;
        Some(boot + i64::try_from(ticks.div_ceil(rustix::param::clock_ticks_per_second())).ok()?)
    }

    fn running_daemons(&self) -> Vec<(&'static str, u32)> {
        let mut running = Vec::new();
        let Ok(entries) = fs::read_dir(self.path("/proc")) else { return running };
        for entry in entries.flatten() {
            let Ok(pid) = entry.file_name().to_string_lossy().parse::<u32>() else { continue };
            let Ok(name) = self.text(&format!("/proc/{pid}/comm")) else { continue };
            running.extend(DAEMONS.into_iter().filter(|daemon| *daemon == name.trim_end()).map(|daemon| (daemon, pid)));
        }
        running.sort();
        running
    }
}

fn drop_in(daemon: &str) -> String {
    format!("/usr/lib/systemd/system/{daemon}.service.d/50-volcrypt.conf")
}

fn no_drop_in(daemon: &str) -> Finding {
    Finding::fail(
        "libvirt's PATH",
        format!("{} is missing, so {daemon} starts guests without the wrapper", drop_in(daemon)),
        format!("apt-get install --reinstall volcrypt, then systemctl restart {daemon}"),
    )
}

#[cfg(test)]
mod tests {
    use super::super::Verdict;
    use super::super::host::tests::{host, link, write};
    use super::*;

    const DROP_IN: &str = "/usr/lib/systemd/system/libvirtd.service.d/50-volcrypt.conf";
    const OTHER_DROP_IN: &str = "/usr/lib/systemd/system/virtqemud.service.d/50-volcrypt.conf";

    fn verdicts(host: &Host) -> Vec<Verdict> {
        host.libvirt_path().iter().map(Finding::verdict).collect()
    }

    #[test]
    fn a_libvirt_that_does_not_run_needs_its_drop_in() {
        let (_root, host) = host(&[("/proc/1/comm", "systemd\n"), (DROP_IN, "")]);
        assert_eq!(verdicts(&host), [Verdict::Fail]);
        write(&host, OTHER_DROP_IN, "");
        assert_eq!(verdicts(&host), [Verdict::Ok]);
    }

    #[test]
    fn a_running_libvirt_is_judged_by_its_environment() {
        let (_root, host) = host(&[
            ("/proc/7/comm", "libvirtd\n"),
            ("/proc/7/environ", "HOME=/\0PATH=/usr/libexec/volcrypt/emulators:/usr/bin\0"),
            ("/proc/9/comm", "virtqemud\n"),
            (
                "/proc/9/environ",
                "XPATH=/usr/libexec/volcrypt/emulators\0PATH=/usr/bin:/usr/libexec/volcrypt/emulators\0",
            ),
        ]);
        assert_eq!(verdicts(&host), [Verdict::Ok, Verdict::Fail]);
        write(&host, OTHER_DROP_IN, "");
        let findings = host.libvirt_path();
        assert_eq!(findings[1].verdict(), Verdict::Fail);
        assert!(findings[1].to_string().contains("not restarted since"), "{}", findings[1]);
    }

    #[test]
    fn a_libvirt_that_is_older_than_the_hook_is_told() {
        let stat = format!("7 (libvirtd) S {}", vec!["100"; 49].join(" "));
        let (_root, host) = host(&[("/proc/7/comm", "libvirtd\n"), ("/proc/7/stat", &stat)]);
        write(&host, "/proc/stat", "cpu 1 2 3\nbtime 1700000000\n");
        assert_eq!(host.libvirt_before_the_hook(), [], "without a hook the check of the hook says so");
        link(&host, "/usr/libexec/volcrypt/volcrypt-hook", HOOK_LINK);
        let findings = host.libvirt_before_the_hook();
        assert_eq!(findings.iter().map(Finding::verdict).collect::<Vec<_>>(), [Verdict::Warn]);
        assert!(findings[0].to_string().contains("systemctl restart libvirtd"), "{}", findings[0]);
        write(&host, "/proc/stat", "btime 99999999999\n");
        assert_eq!(host.libvirt_before_the_hook(), []);
    }
}
