//! `volcrypt attach-device`, `detach-device` and `hold`: devices of domains, with protected disks on their mappings.

use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use super::rewrite::read;
use super::table::printable;
use super::{CommandError, Daemon, DeviceArguments, Libvirt, status};
use crate::protocol::{Reply, Request};
use crate::volume::VolumeId;

/// How long a mapping may take to go once libvirt has taken the disk away.
const GONE_WITHIN: Duration = Duration::from_secs(5);

/// A domain, as libvirt has it now.
#[derive(Clone, Debug)]
pub struct Found {
    /// Its name.
    pub name: String,
    /// Its UUID.
    pub uuid: String,
    /// What runs, or what would if it were started.
    pub xml: String,
    /// Whether it runs.
    pub running: bool,
}

/// What is changed of a domain. Without any of the two: whatever it is at the moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Affect {
    /// What runs.
    pub live: bool,
    /// What libvirt keeps for its next start.
    pub config: bool,
}

/// What is done with a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// The domain gets it.
    Attach,
    /// The domain loses it.
    Detach,
}

/// Asks libvirt for a domain by its id, UUID or name; there may be none. The error is libvirt's own sentence.
pub type Find = fn(&str) -> Result<Option<Found>, String>;
/// Changes the domain with a UUID by a device's XML. If nothing says what is to be changed of it, libvirt's older
/// calls are used, as virsh does. The error is libvirt's own sentence.
pub type Change = fn(&str, Operation, &str, Option<Affect>) -> Result<(), String>;

/// Attaches what is in a file.
pub(super) fn attach(
    daemon: &Daemon<'_>,
    arguments: &DeviceArguments,
    libvirt: Libvirt,
) -> Result<String, CommandError> {
    let (domain, device, affect) = prepared(arguments, libvirt.find)?;
    let live = is_live(&domain, affect);
    let request = Request::Attach { domain: domain.xml, device, live, keep: false };
    // From here on the daemon holds the mapping as long as this process is there.
    let (reply, connection) = daemon.connect()?.call_and_stay(&request).map_err(CommandError::Daemon)?;
    let Reply::Device { xml, volume } = reply else { return Err(CommandError::UnexpectedReply) };
    let attached = (libvirt.change)(&domain.uuid, Operation::Attach, &xml, affect);
    connection.end();
    attached.map_err(CommandError::Domain)?;
    let name = printable(&domain.name);
    Ok(match volume {
        Some(volume) if live => format!("Attached to domain {name}, on the mapping of volume {volume}.\n"),
        Some(volume) => {
            format!("Attached to domain {name} from its next start on, on the mapping of volume {volume}.\n")
        }
        None => format!("Attached to domain {name}.\n"),
    })
}

/// Whether the domain that runs now is changed.
fn is_live(domain: &Found, affect: Option<Affect>) -> bool {
    domain.running && affect.is_none_or(|affect| affect.live || !affect.config)
}

/// Detaches what is in a file.
pub(super) fn detach(
    daemon: &Daemon<'_>,
    arguments: &DeviceArguments,
    libvirt: Libvirt,
) -> Result<String, CommandError> {
    let (domain, device, affect) = prepared(arguments, libvirt.find)?;
    let live = is_live(&domain, affect);
    let (xml, volume) = match asked(daemon, &Request::Detach { domain: domain.xml, device: device.clone() }) {
        // libvirt finds a disk by its target, and the kernel removes its mapping.
        Err(CommandError::Daemon(error)) if error.is_daemon_down() => (device, None),
        asked => asked?,
    };
    (libvirt.change)(&domain.uuid, Operation::Detach, &xml, affect).map_err(CommandError::Domain)?;
    let mut text = format!("Detached from domain {}.\n", printable(&domain.name));
    if let Some(volume) = volume.filter(|_| live) {
        text.push_str(&left_of(daemon, &domain.name, &volume).unwrap_or_else(|error| {
            format!("Whether the mapping of volume {volume} is gone cannot be told: {error}\n")
        }));
    }
    Ok(text)
}

/// What libvirt is to be given of a device, whose mapping is held.
pub(super) fn hold(daemon: &Daemon<'_>, domain: &str, input: impl Read, find: Find) -> Result<String, CommandError> {
    let device = read(input)?;
    let Found { xml, running, .. } = found(domain, find)?;
    asked(daemon, &Request::Attach { domain: xml, device, live: running, keep: true }).map(|(xml, _)| xml)
}

/// Has a device's mapping held no longer.
pub(super) fn release(daemon: &Daemon<'_>, domain: &str, input: impl Read, find: Find) -> Result<String, CommandError> {
    let device = read(input)?;
    match daemon.call(&Request::Release { domain: found(domain, find)?.xml, device })? {
        Reply::Nothing => Ok(String::new()),
        _ => Err(CommandError::UnexpectedReply),
    }
}

fn asked(daemon: &Daemon<'_>, request: &Request) -> Result<(String, Option<VolumeId>), CommandError> {
    match daemon.call(request)? {
        Reply::Device { xml, volume } => Ok((xml, volume)),
        _ => Err(CommandError::UnexpectedReply),
    }
}

/// The domain, the device's XML, and what virsh's options come to.
fn prepared(arguments: &DeviceArguments, find: Find) -> Result<(Found, String, Option<Affect>), CommandError> {
    let DeviceArguments { domain, file, live, config, current, persistent } = arguments;
    if *current && (*live || *config || *persistent) {
        let sentence = "--current goes with none of --live, --config and --persistent: leave one of them out";
        return Err(CommandError::Domain(sentence.to_owned()));
    }
    let device = read_file(file)?;
    let domain = found(domain, find)?;
    let affect = Affect { live: *live || (*persistent && domain.running), config: *config || *persistent };
    let affect = (affect != Affect::default() || *current).then_some(affect);
    Ok((domain, device, affect))
}

fn read_file(path: &Path) -> Result<String, CommandError> {
    let failure = |source| CommandError::Unreadable { path: path.to_owned(), source };
    match read(File::open(path).map_err(failure)?) {
        Err(CommandError::Input(source)) => Err(failure(source)),
        read => read,
    }
}

fn found(domain: &str, find: Find) -> Result<Found, CommandError> {
    let none = || format!("there is no domain {}: 'virsh list --all' shows those there are", printable(domain));
    find(domain).map_err(CommandError::Domain)?.ok_or_else(|| CommandError::Domain(none()))
}

/// Waits until the mapping is gone, and says who has it open otherwise.
fn left_of(daemon: &Daemon<'_>, domain: &str, volume: &VolumeId) -> Result<String, CommandError> {
    let end = Instant::now() + GONE_WITHIN;
    loop {
        let mappings = status::ask(daemon)?.mappings;
        let Some(mapping) = mappings.into_iter().find(|mapping| mapping.volume == *volume) else {
            return Ok(format!("The mapping of volume {volume} is gone.\n"));
        };
        let others: Vec<_> = mapping.domains.iter().filter(|other| *other != domain).cloned().collect();
        if !others.is_empty() && others.len() == mapping.domains.len() {
            let others = printable(&others.join(", "));
            return Ok(format!("The mapping of volume {volume} stays for {others}.\n"));
        }
        if Instant::now() > end {
            return Ok(match mapping.domains.is_empty() {
                true => format!(
                    "The mapping of volume {volume} is still there, open {} times: 'volcrypt status' shows for whom.\n",
                    mapping.open_count
                ),
                false => format!(
                    "The guest has not let go of the disk yet; the mapping of volume {volume} goes as soon as it does.\n"
                ),
            });
        }
        thread::sleep(Duration::from_millis(100));
    }
}

#[cfg(test)]
mod tests;
