//! What is mapped, for whom, since when: read from the kernel each time.

use std::os::fd::AsFd;

use rustix::fs::{AtFlags, StatxFlags};

use super::broker::Broker;
use super::guests::Guests;
use crate::encryptor::{Mapping, device_path};
use crate::guest::processes_with_open;
use crate::protocol::{GuardStatus, GuestStatus, MappingStatus, Status};
use crate::refusal::Refusal;
use crate::volume::DeviceNumber;

/// The daemon's whole state.
///
/// # Errors
/// When device-mapper does not answer.
pub fn status(broker: &Broker, guests: &Guests, guard: GuardStatus) -> Result<Status, Refusal> {
    let guests = registered(guests);
    let mappings = broker.encryptor().mappings()?;
    Ok(Status {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        configuration_error: broker.configuration_error(),
        key_store_error: broker.vault().err().map(|error| error.to_string()),
        mappings: mappings.into_iter().map(|mapping| describe(broker, mapping, &guests)).collect(),
        guests,
        guard,
    })
}

/// Every guest, as it is shown.
pub fn registered(guests: &Guests) -> Vec<GuestStatus> {
    let guests = guests.list().into_iter();
    guests.map(|guest| GuestStatus { pid: guest.pid(), domain: guest.domain().map(str::to_owned) }).collect()
}

/// The domains of those `guests` that have `device` open.
pub fn domains_with_open(guests: &[GuestStatus], device: DeviceNumber) -> Vec<String> {
    let pids: Vec<u32> = guests.iter().map(|guest| guest.pid).collect();
    let users = processes_with_open(&pids, device);
    let users = guests.iter().filter(|guest| users.contains(&guest.pid));
    users.map(|guest| guest.domain.clone().unwrap_or_else(|| format!("pid {}", guest.pid))).collect()
}

fn describe(broker: &Broker, mapping: Mapping, guests: &[GuestStatus]) -> MappingStatus {
    let domains = domains_with_open(guests, mapping.device);
    let device = device_path(mapping.device);
    let backing = mapping.backing.map(|number| match broker.identify(number) {
        Ok(identity) => identity.to_string(),
        Err(_) => number.to_string(),
    });
    MappingStatus {
        since: made_at(&device),
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
