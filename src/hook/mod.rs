//! `volcrypt-hook`: libvirt's qemu hook, <https://libvirt.org/hooks.html>.
//!
//! libvirt calls it with the domain's name, an operation, a sub-operation and an extra argument, and
//! the domain's XML on standard input. What it writes to standard error is what `virsh` shows when
//! it exits with an error. Its standard output replaces the XML of a domain that comes from another host or from a
//! file, if there is any, so nothing else is written there.

use std::ffi::OsString;
use std::io::{self, Read, Write};
use std::path::Path;
use std::process::ExitCode;

use crate::domain::{Domain, Requester, Source};
use crate::guest::{block_device_at, is_no_device};
use crate::policy::{Config, DEFAULT_PATH, Decision, HookConfig, Intercept, WhenUnreachable};
use crate::printable::printable;
use crate::protocol::{CONTROL_SOCKET, CallError, ControlClient, HookOperation, MAX_MESSAGE, Reply, Request};
use crate::unguarded::Marker;
use crate::volume::{Identity, Sysfs, VolumeId};

/// Runs the hook.
pub fn main() -> ExitCode {
    // A user's own libvirtd (qemu:///session) calls the host's hooks as that user. It gives its guests what the user may
    // open without it, and nobody but root speaks to the daemon.
    if !rustix::process::geteuid().is_root() {
        return ExitCode::SUCCESS;
    }
    let arguments: Vec<OsString> = std::env::args_os().skip(1).collect();
    let word = |at: usize| arguments.get(at).map(|word| word.to_string_lossy().into_owned()).unwrap_or_default();
    match run(&word(0), &word(1), &word(2)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(sentence) => {
            eprintln!("volcrypt: {}", printable(&sentence));
            ExitCode::FAILURE
        }
    }
}

/// Operations that are not named here are none of volcrypt's business, those of future versions of
/// libvirt included. `reconnect` above all: libvirt kills the guest if its hook fails, so it does
/// not get as far as reading the XML.
fn run(domain: &str, operation: &str, sub_operation: &str) -> Result<(), String> {
    match (operation, sub_operation) {
        ("prepare", "begin") => prepare(domain, &read_xml()?),
        // virsh shows the sentence on the host that the domain is on.
        ("migrate", "begin") => admit(domain, &read_xml()?).map_err(|sentence| format!("{}: {sentence}", this_host())),
        ("restore", "begin") => {
            restore(domain);
            Ok(())
        }
        ("release", "end") => {
            Marker::of_xml(&read_xml()?).remove();
            sweep(domain);
            Ok(())
        }
        ("stopped", "end") => {
            sweep(domain);
            Ok(())
        }
        ("started", "begin") => {
            started(domain);
            Ok(())
        }
        _ => Ok(()),
    }
}

fn prepare(domain: &str, xml: &str) -> Result<(), String> {
    let marker = Marker::of_xml(xml);
    marker.remove();
    let config = Config::load(Path::new(DEFAULT_PATH));
    // With a faulty configuration the daemon is asked all the same: its refusal names the fault.
    let hook = config.as_ref().map(|config| config.hook.clone()).unwrap_or_default();
    match ask(domain, HookOperation::Prepare, xml, &hook) {
        Ok(_) => Ok(()),
        Err(error) if error.is_daemon_down() && starts_unprotected(&hook) => {
            let config = config.map_err(|error| error.to_string())?;
            refuse_protected(&config, domain, xml).map_err(|sentence| format!("{sentence}; {error}"))?;
            marker.set().map_err(|failure| format!("{failure}; {error}"))
        }
        Err(error) => Err(error.to_string()),
    }
}

/// Whether domains without protected disks start while nobody can be asked. Not where the guard alone keeps a protected
/// volume from them: without the daemon there may be none.
fn starts_unprotected(hook: &HookConfig) -> bool {
    hook.when_daemon_unreachable == WhenUnreachable::StartUnprotected && hook.intercept == Intercept::Open
}

/// Has the daemon look at a domain that comes from another host. libvirt asks again when it starts it here, so nothing is
/// marked yet.
fn admit(domain: &str, xml: &str) -> Result<(), String> {
    let config = Config::load(Path::new(DEFAULT_PATH));
    let hook = config.as_ref().map(|config| config.hook.clone()).unwrap_or_default();
    match ask(domain, HookOperation::Migrate, xml, &hook) {
        Ok(reply) => print(&reply),
        Err(error) if error.is_daemon_down() && starts_unprotected(&hook) => {
            let config = config.map_err(|error| error.to_string())?;
            refuse_protected(&config, domain, xml).map_err(|sentence| format!("{sentence}; {error}"))
        }
        Err(error) => Err(error.to_string()),
    }
}

/// Gives libvirt the XML of a domain that comes from a file, if it is to use another one.
///
/// Never fails, whatever is wrong: libvirt 11.3 takes a hook that fails before a managed save is restored for a success,
/// says that the domain was started, and deletes the file. It asks before it starts QEMU as well (`prepare`), and what is
/// refused then leaves the file.
fn restore(domain: &str) {
    let hook = Config::load(Path::new(DEFAULT_PATH)).map(|config| config.hook).unwrap_or_default();
    let asked =
        read_xml().and_then(|xml| ask(domain, HookOperation::Restore, &xml, &hook).map_err(|error| error.to_string()));
    if let Err(sentence) = asked.and_then(|reply| print(&reply)) {
        eprintln!("volcrypt: {}", printable(&sentence));
    }
}

/// Hands libvirt another XML in the place of the one that it has, if there is one.
fn print(reply: &Reply) -> Result<(), String> {
    let Reply::Xml(xml) = reply else { return Ok(()) };
    let mut output = io::stdout().lock();
    let written = output.write_all(xml.as_bytes()).and_then(|()| output.flush());
    written.map_err(|error| format!("libvirt does not take the domain's XML: {error}"))
}

/// The name of this host, as far as it has one.
fn this_host() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    format!("host {}", name.trim())
}

/// Mappings go away by themselves. This is for those that a dead daemon left half-way, and no reason
/// to hold up libvirt.
fn sweep(domain: &str) {
    let hook = Config::load(Path::new(DEFAULT_PATH)).map(|config| config.hook).unwrap_or_default();
    if let Err(error) = ask(domain, HookOperation::Stopped, "", &hook) {
        eprintln!("volcrypt: {}", printable(&error.to_string()));
    }
}

/// Tells the daemon that QEMU has opened its mappings. What it would go on holding ends in time by itself, and no
/// guest may be killed for that, which is what libvirt does when this operation fails.
fn started(domain: &str) {
    let hook = Config::load(Path::new(DEFAULT_PATH)).map(|config| config.hook).unwrap_or_default();
    // Whether it goes by the XML is for the daemon to say: the file may be newer than what it works by.
    if let Err(error) = ask(domain, HookOperation::Started, "", &hook) {
        eprintln!("volcrypt: {}", printable(&error.to_string()));
    }
}

fn ask(domain: &str, operation: HookOperation, xml: &str, hook: &HookConfig) -> Result<Reply, CallError> {
    let request = Request::Hook { operation, domain: domain.to_owned(), xml: xml.to_owned() };
    ControlClient::connect(Path::new(CONTROL_SOCKET), hook.deadline)?.call(&request)
}

/// Decides without the daemon that a domain has no protected disk.
fn refuse_protected(config: &Config, domain: &str, xml: &str) -> Result<(), String> {
    let sysfs = Sysfs::system();
    let domain_xml = Domain::parse(xml).map_err(|error| error.to_string())?;
    for (disk, source) in domain_xml.disks.iter().flat_map(|disk| disk.images().map(move |image| (disk, image.source)))
    {
        let identity = match source {
            // Only the daemon makes it.
            Source::Path(path) if VolumeId::of_mapping(path).is_some() => {
                return Err(format!("disk {} of domain {domain} is protected and cannot be opened now", disk.target));
            }
            Source::Path(path) => match block_device_at(path) {
                Ok(device) => sysfs.identify(device).map_err(|refusal| refusal.to_string())?,
                Err(error) if is_no_device(&error) => {
                    continue;
                }
                Err(error) => {
                    return Err(format!("disk {}: {} cannot be looked at: {error}", disk.target, path.display()));
                }
            },
            Source::IscsiUnit { target, lun } => Identity::of_iscsi_unit(target, *lun),
            Source::Other => continue,
        };
        if is_protected(config, &identity, &domain_xml.facts()) {
            return Err(format!("disk {} of domain {domain} is protected and cannot be opened now", disk.target));
        }
    }
    Ok(())
}

/// Whether the domain needs the daemon for this device. A mapping that is there is for those only who may have its
/// volume, which the configuration alone does not tell.
fn is_protected(config: &Config, device: &Identity, domain: &dyn Requester) -> bool {
    !matches!(config.decide(device, domain), Decision::Pass) || !device.own_mappings().is_empty()
}

fn read_xml() -> Result<String, String> {
    let mut xml = String::new();
    match io::stdin().lock().take(MAX_MESSAGE).read_to_string(&mut xml) {
        Ok(length) if length as u64 == MAX_MESSAGE => {
            Err(format!("the domain's XML is longer than {MAX_MESSAGE} bytes"))
        }
        Ok(_) => Ok(xml),
        Err(error) => Err(format!("the domain's XML cannot be read from standard input: {error}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::Nobody;
    use crate::volume::Mapping;

    #[test]
    fn a_mapping_is_as_protected_as_its_volume() {
        let rules = "[[rules]]\nname = 'r'\niscsi_target = 'iqn:(?<id>.*)'\n";
        let config = Config::parse(rules, "test").unwrap();
        let disk = Identity { wwid: Some("naa.6".to_owned()), ..Identity::of_iscsi_unit("iqn:v", 0) };
        let stacked = |name: &str, uuid: &str, below: &Identity| Identity {
            iscsi: None,
            lun: None,
            wwid: None,
            mapping: Some(Mapping { name: name.to_owned(), uuid: uuid.to_owned() }),
            underlying: vec![below.clone()],
            ..disk.clone()
        };
        let mapping = stacked("volcrypt-v", "VOLCRYPT-PLAIN-v", &disk);
        let on_the_mapping = stacked("vg-lv", "LVM-x", &mapping);
        let other = Identity { wwid: Some("naa.7".to_owned()), ..Identity::of_iscsi_unit("other", 0) };
        for (device, protected) in [(&disk, true), (&mapping, true), (&on_the_mapping, true), (&other, false)] {
            assert_eq!(is_protected(&config, device, &Nobody), protected, "{device}");
        }
    }
}
