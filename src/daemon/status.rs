//! What is mapped, for whom, since when: read from the kernel each time.

use std::cell::LazyCell;
use std::collections::{HashMap, HashSet};
use std::os::fd::AsFd;

use rustix::fs::{AtFlags, StatxFlags};

use super::broker::{Broker, Vault};
use super::guests::Guests;
use crate::encryptor::{Mapping, device_path};
use crate::guest::{LibvirtState, open_devices};
use crate::protocol::{CachedVolume, GuardStatus, GuestStatus, KeyCacheStatus, MappingStatus, Status};
use crate::refusal::Refusal;
use crate::store::VolumeState;
use crate::volume::{DeviceNumber, VolumeId};

/// The daemon's whole state.
///
/// # Errors
/// When device-mapper does not answer.
pub fn status(broker: &Broker, guests: &Guests, guard: GuardStatus) -> Result<Status, Refusal> {
    let registered = registered(guests);
    let mappings = broker.encryptor().mappings()?;
    let held = broker.holds().by_volume();
    // With nothing mapped nobody need be asked.
    let domains = LazyCell::new(|| domains_by_device(&everybody(guests)));
    let mappings = mappings.into_iter().map(|mapping| describe(broker, mapping, &domains, &held)).collect();
    Ok(Status {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        configuration_error: broker.configuration_error(),
        key_store_error: broker.vault().err().map(|error| error.to_string()),
        keys_left_behind: broker.keys_left_behind(),
        mappings,
        guests: registered,
        intercept: broker.config().map(|config| config.hook.intercept).unwrap_or_default(),
        guard,
        key_cache: broker.vault().ok().and_then(|vault| key_cache(&vault)).map(Box::new),
    })
}

/// Which volumes would start without the key server, if there is one.
fn key_cache(vault: &Vault) -> Option<KeyCacheStatus> {
    let kept = vault.keys.kept()?;
    let volumes = vault.store.volumes().unwrap_or_default().into_iter();
    let enrolled = volumes.filter(|record| record.state == VolumeState::Enrolled);
    let volumes =
        enrolled.map(|record| CachedVolume { starts_until: kept.until(&record), volume: record.id }).collect();
    Some(KeyCacheStatus { lifetime_days: kept.lifetime.as_secs() / (24 * 3600), fault: kept.fault, volumes })
}

/// Every guest, as it is shown.
pub fn registered(guests: &Guests) -> Vec<GuestStatus> {
    let guests = guests.list().into_iter();
    guests.map(|guest| GuestStatus { pid: guest.pid(), domain: guest.domain().map(str::to_owned) }).collect()
}

/// Every guest, also those that run without the wrapper.
pub fn everybody(guests: &Guests) -> Vec<GuestStatus> {
    let mut everybody = registered(guests);
    for (pid, name) in LibvirtState::system().running() {
        if everybody.iter().all(|guest| guest.pid != pid) {
            everybody.push(GuestStatus { pid, domain: Some(name) });
        }
    }
    everybody
}

/// Which domains have which device open, in the order of `guests`. Each guest's descriptors are read once.
pub fn domains_by_device(guests: &[GuestStatus]) -> HashMap<DeviceNumber, Vec<String>> {
    let mut domains: HashMap<_, Vec<_>> = HashMap::new();
    for guest in guests {
        for device in open_devices(guest.pid).collect::<HashSet<_>>() {
            let name = guest.domain.clone().unwrap_or_else(|| format!("pid {}", guest.pid));
            domains.entry(device).or_default().push(name);
        }
    }
    domains
}

fn describe(
    broker: &Broker,
    mapping: Mapping,
    domains: &HashMap<DeviceNumber, Vec<String>>,
    held: &HashMap<VolumeId, Vec<String>>,
) -> MappingStatus {
    let domains = domains.get(&mapping.device).cloned().unwrap_or_default();
    let device = device_path(mapping.device);
    let backing = mapping.backing.map(|number| match broker.identify(number) {
        Ok(identity) => identity.to_string(),
        Err(_) => number.to_string(),
    });
    MappingStatus {
        since: made_at(&device),
        held_for: held.get(&mapping.volume).cloned().unwrap_or_default(),
        volume: mapping.volume,
        name: mapping.name,
        backing: backing.unwrap_or_default(),
        format: mapping.format,
        cipher: mapping.cipher,
        open_count: mapping.open_count,
        deferred_removal: mapping.deferred_removal,
        domains,
        device,
    }
}

/// When the kernel made the device's node: devtmpfs notes the birth of its files (Linux 6.1 or so).
fn made_at(device: &std::path::Path) -> Option<i64> {
    let status = rustix::fs::statx(rustix::fs::CWD.as_fd(), device, AtFlags::empty(), StatxFlags::BTIME).ok()?;
    (status.stx_mask & StatxFlags::BTIME.bits() != 0).then_some(status.stx_btime.tv_sec)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::os::unix::fs::MetadataExt;
    use std::process::{Child, Command};

    #[test]
    fn one_pass_finds_who_has_which_device_open() {
        let open = |path: &str| File::open(path).unwrap();
        let number = |path: &str| DeviceNumber::from_raw(std::fs::metadata(path).unwrap().rdev());
        let guest = |stdin: &str, stdout: &str| -> Child {
            Command::new("sleep").arg("60").stdin(open(stdin)).stdout(open(stdout)).spawn().unwrap()
        };
        let mut children = [guest("/dev/zero", "/dev/zero"), guest("/dev/urandom", "/dev/zero")];
        let status =
            |child: &Child, domain: Option<&str>| GuestStatus { pid: child.id(), domain: domain.map(str::to_owned) };
        let gone = GuestStatus { pid: u32::MAX, domain: Some("gone".to_owned()) };
        let guests = [status(&children[1], Some("web")), gone, status(&children[0], None)];
        let domains = domains_by_device(&guests);
        for child in &mut children {
            child.kill().unwrap();
            child.wait().unwrap();
        }
        let unnamed = format!("pid {}", children[0].id());
        assert_eq!(domains[&number("/dev/zero")], ["web", &unnamed]);
        assert_eq!(domains[&number("/dev/urandom")], ["web"]);
        assert!(!domains.contains_key(&number("/dev/full")));
    }
}
