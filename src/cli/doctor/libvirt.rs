use std::fs;

use super::host::Host;
use super::{EMULATORS, Finding};

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
    use super::super::host::tests::{host, write};
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
}
