use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Component, Path, PathBuf};

use super::{EMULATORS, Finding};

const WRAPPER: &str = "/usr/libexec/volcrypt/volcrypt-qemu";
pub(super) const HOOK_LINK: &str = "/etc/libvirt/hooks/qemu.d/50-volcrypt";

/// The file system of a host, below a directory: `/` except in tests.
#[derive(Debug)]
pub(super) struct Host {
    root: PathBuf,
}

impl Host {
    /// This host.
    pub(super) fn real() -> Self {
        Host { root: PathBuf::from("/") }
    }

    #[cfg(test)]
    pub(super) fn below(root: impl Into<PathBuf>) -> Self {
        Host { root: root.into() }
    }

    /// Linux 5.19 is the first with `SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV`.
    pub(super) fn kernel(&self) -> Finding {
        let release = self.text("/proc/sys/kernel/osrelease").unwrap_or_default();
        let release = release.trim();
        match version(release) {
            Some(version) if version >= (5, 19) => Finding::ok("kernel", format!("Linux {release}")),
            _ => Finding::fail("kernel", format!("Linux {release:?} is older than 5.19"), "boot a newer kernel"),
        }
    }

    /// Without user notification no open can be answered.
    pub(super) fn seccomp(&self) -> Finding {
        let actions = self.text("/proc/sys/kernel/seccomp/actions_avail").unwrap_or_default();
        match actions.split_whitespace().any(|action| action == "user_notif") {
            true => Finding::ok("seccomp", "user notification is there"),
            false => Finding::fail(
                "seccomp",
                "the kernel offers no user notification",
                "boot a kernel with CONFIG_SECCOMP_FILTER=y",
            ),
        }
    }

    /// The control node of device-mapper.
    pub(super) fn device_mapper(&self) -> Finding {
        match self.exists("/dev/mapper/control") {
            true => Finding::ok("device-mapper", "/dev/mapper/control is there"),
            false => Finding::fail("device-mapper", "/dev/mapper/control is missing", "modprobe dm-mod"),
        }
    }

    /// The target dm-crypt, which the kernel loads when it is first asked for.
    pub(super) fn dm_crypt(&self) -> Finding {
        if self.exists("/sys/module/dm_crypt") {
            return Finding::ok("dm-crypt", "the module is loaded");
        }
        let release = self.text("/proc/sys/kernel/osrelease").unwrap_or_default();
        let listed = |list: &str| {
            let path = format!("/lib/modules/{}/{list}", release.trim());
            self.text(&path).is_ok_and(|text| text.contains("/dm-crypt.ko"))
        };
        match ["modules.builtin", "modules.dep"].into_iter().any(listed) {
            true => Finding::ok("dm-crypt", "the kernel loads the module when it is needed"),
            false => Finding::fail(
                "dm-crypt",
                format!("Linux {} has no module dm-crypt", release.trim()),
                "install the kernel's package of modules, then run 'modprobe dm-crypt'",
            ),
        }
    }

    /// One link to the wrapper for each emulator that is installed.
    pub(super) fn emulator_links(&self) -> Vec<Finding> {
        let emulators = match self.emulators() {
            Ok(emulators) if !emulators.is_empty() => emulators,
            _ => {
                let sentence = "no /usr/bin/qemu-system-* is installed";
                return vec![Finding::warn("emulators", sentence, "apt-get install qemu-system-x86")];
            }
        };
        let unlinked = |name: &&String| !self.leads_to(&format!("{EMULATORS}/{name}"), WRAPPER);
        let missing: Vec<Finding> = emulators
            .iter()
            .filter(unlinked)
            .map(|name| {
                Finding::fail(
                    "emulators",
                    format!("{EMULATORS}/{name} does not lead to the wrapper, so libvirt would run {name} without it"),
                    "/usr/libexec/volcrypt/link-emulators",
                )
            })
            .collect();
        if missing.is_empty() {
            return vec![Finding::ok("emulators", format!("the wrapper stands in for {}", emulators.join(", ")))];
        }
        missing
    }

    /// libvirt looks into `hooks/qemu.d` for whatever is executable, links included.
    pub(super) fn hook(&self) -> Finding {
        let remedy = "apt-get install --reinstall volcrypt, then systemctl restart libvirtd";
        let executable = self
            .resolve(HOOK_LINK)
            .and_then(fs::metadata)
            .map(|metadata| metadata.is_file() && metadata.permissions().mode() & 0o111 != 0);
        match executable {
            Ok(true) => Finding::ok("hook", format!("{HOOK_LINK} is there")),
            Ok(false) => Finding::fail("hook", format!("{HOOK_LINK} is not executable, so libvirt skips it"), remedy),
            Err(error) => Finding::fail("hook", format!("{HOOK_LINK} cannot be used ({error})"), remedy),
        }
    }

    /// The emulators proper; a link among them is another name for one of the others, by which libvirt
    /// never calls it.
    fn emulators(&self) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in fs::read_dir(self.path("/usr/bin"))? {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.starts_with("qemu-system-") && entry.file_type()?.is_file() {
                names.push(name);
            }
        }
        names.sort();
        Ok(names)
    }

    fn leads_to(&self, link: &str, target: &str) -> bool {
        match (self.resolve(link), self.resolve(target)) {
            (Ok(one), Ok(other)) => one == other,
            _ => false,
        }
    }

    /// Follows a link at `path` as it would lead on a host whose root is ours.
    fn resolve(&self, path: &str) -> io::Result<PathBuf> {
        let own = self.path(path);
        let target = match fs::read_link(&own) {
            Ok(target) if target.is_absolute() => self.path(&target.to_string_lossy()),
            Ok(target) => own.parent().unwrap_or(&self.root).join(target),
            // Not a link.
            Err(_) => own,
        };
        fs::canonicalize(target)
    }

    pub(super) fn exists(&self, path: &str) -> bool {
        self.path(path).exists()
    }

    pub(super) fn text(&self, path: &str) -> io::Result<String> {
        fs::read(self.path(path)).map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
    }

    pub(super) fn path(&self, path: &str) -> PathBuf {
        let below = Path::new(path).components().filter(|part| !matches!(part, Component::RootDir));
        self.root.join(below.collect::<PathBuf>())
    }
}

/// Major and minor number of a kernel release such as `6.12.48+deb13-amd64`.
fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|character: char| !character.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::Verdict;
    use super::*;
    use std::os::unix::fs::symlink;

    pub(in super::super) fn host(files: &[(&str, &str)]) -> (tempfile::TempDir, Host) {
        let root = tempfile::tempdir().unwrap();
        let host = Host::below(root.path());
        for (path, content) in files {
            write(&host, path, content);
        }
        (root, host)
    }

    pub(in super::super) fn write(host: &Host, path: &str, content: &str) {
        let path = host.path(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    }

    pub(in super::super) fn link(host: &Host, target: &str, path: &str) {
        let path = host.path(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        symlink(target, path).unwrap();
    }

    #[test]
    fn kernels_before_5_19_fail() {
        for (release, verdict) in [
            ("6.12.48+deb13-amd64\n", Verdict::Ok),
            ("5.19.0\n", Verdict::Ok),
            ("5.18.19\n", Verdict::Fail),
            ("4.20-rc1\n", Verdict::Fail),
            ("unknown", Verdict::Fail),
        ] {
            let (_root, host) = host(&[("/proc/sys/kernel/osrelease", release)]);
            assert_eq!(host.kernel().verdict(), verdict, "{release}");
        }
    }

    #[test]
    fn the_kernel_has_to_offer_user_notification() {
        let actions = "/proc/sys/kernel/seccomp/actions_avail";
        let (_root, with) = host(&[(actions, "kill_process trap errno user_notif trace log allow\n")]);
        assert_eq!(with.seccomp().verdict(), Verdict::Ok);
        let (_root, without) = host(&[(actions, "kill_process trap errno trace log allow\n")]);
        assert_eq!(without.seccomp().verdict(), Verdict::Fail);
    }

    #[test]
    fn dm_crypt_may_be_loaded_loadable_or_built_in() {
        let release = ("/proc/sys/kernel/osrelease", "6.1.0\n");
        let module = "kernel/drivers/md/dm-crypt.ko.xz: kernel/drivers/md/dm-mod.ko.xz\n";
        let (_root, none) = host(&[release, ("/lib/modules/6.1.0/modules.dep", "kernel/drivers/md/dm-mod.ko.xz:\n")]);
        assert_eq!(none.dm_crypt().verdict(), Verdict::Fail);
        for path in ["/lib/modules/6.1.0/modules.dep", "/lib/modules/6.1.0/modules.builtin"] {
            let (_root, host) = host(&[release, (path, module)]);
            assert_eq!(host.dm_crypt().verdict(), Verdict::Ok);
        }
        let (_root, loaded) = host(&[release, ("/sys/module/dm_crypt/refcnt", "0")]);
        assert_eq!(loaded.dm_crypt().verdict(), Verdict::Ok);
    }

    #[test]
    fn every_emulator_needs_its_link() {
        let (_root, host) = host(&[("/usr/bin/qemu-system-arm", ""), ("/usr/bin/qemu-img", ""), (WRAPPER, "")]);
        link(&host, "qemu-system-arm", "/usr/bin/qemu-system-armel");
        let findings = host.emulator_links();
        assert_eq!(findings.len(), 1, "{findings:?}");
        assert_eq!(findings[0].verdict(), Verdict::Fail);

        link(&host, "../volcrypt-qemu", "/usr/libexec/volcrypt/emulators/qemu-system-arm");
        let findings = host.emulator_links();
        assert_eq!(findings, [Finding::ok("emulators", "the wrapper stands in for qemu-system-arm")]);

        write(&host, "/usr/bin/qemu-system-x86_64", "");
        link(&host, "/usr/bin/qemu-system-x86_64", "/usr/libexec/volcrypt/emulators/qemu-system-x86_64");
        let findings = host.emulator_links();
        assert_eq!(findings.len(), 1);
        assert!(findings[0].to_string().contains("qemu-system-x86_64 does not lead to the wrapper"));
    }

    #[test]
    fn a_host_without_an_emulator_is_warned() {
        let (_root, host) = host(&[("/usr/bin/sh", "")]);
        assert_eq!(host.emulator_links()[0].verdict(), Verdict::Warn);
    }

    #[test]
    fn the_hook_has_to_be_executable() {
        let target = "/usr/libexec/volcrypt/volcrypt-hook";
        let (_root, host) = host(&[]);
        assert_eq!(host.hook().verdict(), Verdict::Fail);
        link(&host, target, HOOK_LINK);
        assert_eq!(host.hook().verdict(), Verdict::Fail);
        write(&host, target, "");
        assert!(host.hook().to_string().contains("not executable"));
        fs::set_permissions(host.path(target), fs::Permissions::from_mode(0o755)).unwrap();
        assert_eq!(host.hook().verdict(), Verdict::Ok);
    }

    #[test]
    fn device_mapper_has_to_have_its_control_node() {
        let (_root, without) = host(&[]);
        assert_eq!(without.device_mapper().verdict(), Verdict::Fail);
        let (_root, with) = host(&[("/dev/mapper/control", "")]);
        assert_eq!(with.device_mapper().verdict(), Verdict::Ok);
    }
}
