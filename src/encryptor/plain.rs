use std::io;
use std::time::{Duration, Instant};

use rustix::fs::OFlags;

use super::device_mapper::{Device, DeviceMapper, is_gone};
use super::locks::VolumeLocks;
use super::table::{cipher_and_backing, crypt_target, key_description, shows_the_same};
use super::{Mapping, MappingSpec, Opened, VolumeEncryptor};
use crate::keys::Key;
use crate::refusal::{Reason, Refusal};
use crate::sys::keyring::ThreadKey;
use crate::volume::{DeviceNumber, MAPPING_PREFIX, OWN_UUID_PREFIX, VolumeId, parse_own_uuid};

const FORMAT: &str = "PLAIN";

/// How long a mapping that is being removed may keep its name.
const GOING_DEADLINE: Duration = Duration::from_secs(5);

/// dm-crypt without a header: the mapping has the size of the volume, and all that is needed to read
/// it is the key and the volume's record.
#[derive(Default)]
pub struct PlainEncryptor {
    locks: VolumeLocks,
}

impl PlainEncryptor {
    /// An encryptor. Only one process at a time may work with it.
    pub fn new() -> Self {
        PlainEncryptor::default()
    }
}

impl VolumeEncryptor for PlainEncryptor {
    fn open(
        &self,
        wanted: &MappingSpec<'_>,
        flags: OFlags,
        key: &dyn Fn() -> Result<Key, Refusal>,
    ) -> Result<Opened, Refusal> {
        self.locks.with(&wanted.record.id, || Opening::new(wanted)?.open(flags, key))
    }

    fn open_present(&self, volume: &VolumeId, device: DeviceNumber, flags: OFlags) -> Result<Opened, Refusal> {
        let name = format!("{MAPPING_PREFIX}{volume}");
        let opened = self.locks.with(volume, || Ok(connect()?.open(&name, device, flags)))?;
        opened.map_err(|error| match is_gone(&error) {
            true => Refusal::new(
                Reason::DeviceGone,
                format!("the mapping {name} is not there any more: name the volume's own device, which has it made"),
            ),
            false => failed("open mapping", &name, error),
        })
    }

    fn mappings(&self) -> Result<Vec<Mapping>, Refusal> {
        let mapper = connect()?;
        let mut mappings = Vec::new();
        for name in ours(&mapper)? {
            if let Some(mapping) = describe(&mapper, &name).map_err(|error| failed("look at mapping", &name, error))? {
                mappings.push(mapping);
            }
        }
        Ok(mappings)
    }

    fn sweep(&self) -> Result<Vec<String>, Refusal> {
        let mapper = connect()?;
        let mut swept = Vec::new();
        // One that is flagged needs nothing, and its volume may be worked on for long.
        for mapping in self.mappings()?.into_iter().filter(|mapping| !mapping.deferred_removal) {
            let discarded = self.locks.with(&mapping.volume, || match mapper.find(&mapping.name)? {
                Some(device) if !device.deferred_removal => {
                    mapper.discard(&mapping.name)?;
                    Ok(mapper.find(&mapping.name)?.is_none_or(|left| left.deferred_removal))
                }
                _ => Ok(false),
            });
            if discarded.map_err(|error| failed("remove mapping", &mapping.name, error))? {
                swept.push(mapping.name);
            }
        }
        Ok(swept)
    }
}

/// One opening of a mapping, under the volume's lock.
struct Opening<'a> {
    wanted: &'a MappingSpec<'a>,
    mapper: DeviceMapper,
    name: String,
    uuid: String,
}

impl<'a> Opening<'a> {
    fn new(wanted: &'a MappingSpec<'a>) -> Result<Self, Refusal> {
        let id = &wanted.record.id;
        let uuid = format!("{OWN_UUID_PREFIX}{FORMAT}-{id}");
        Ok(Opening { wanted, mapper: connect()?, name: format!("{MAPPING_PREFIX}{id}"), uuid })
    }

    fn open(&self, flags: OFlags, key: &dyn Fn() -> Result<Key, Refusal>) -> Result<Opened, Refusal> {
        let deadline = Instant::now() + GOING_DEADLINE;
        loop {
            match self.try_open(flags, key)? {
                Ok(opened) => return Ok(opened),
                // The last user of an earlier mapping closes it right now.
                Err(error) if is_gone(&error) || error.raw_os_error() == Some(libc::EBUSY) => {
                    if Instant::now() > deadline {
                        return Err(self.does_not_go(&error));
                    }
                    std::thread::sleep(Duration::from_millis(2));
                }
                Err(error) => return Err(self.failed("open mapping", error)),
            }
        }
    }

    /// The inner error is the kernel's about a mapping that may be on its way out.
    fn try_open(&self, flags: OFlags, key: &dyn Fn() -> Result<Key, Refusal>) -> Result<io::Result<Opened>, Refusal> {
        let device = match self.mapper.find(&self.name).map_err(|error| self.failed("look at mapping", error))? {
            Some(device) => match self.check(&device)? {
                Standing::AsExpected => device,
                Standing::HalfMade => {
                    tracing::warn!(mapping = %self.name, "removing a mapping that was left half made");
                    self.mapper.discard(&self.name).map_err(|error| self.failed("remove mapping", error))?;
                    return Ok(Err(io::Error::from_raw_os_error(libc::EBUSY)));
                }
                Standing::Gone => return Ok(Err(io::Error::from_raw_os_error(libc::ENXIO))),
            },
            None => match self.make(key)? {
                Ok(device) => device,
                Err(error) => return Ok(Err(error)),
            },
        };
        Ok(self.mapper.open(&self.name, device.number, flags).and_then(|opened| {
            self.mapper.remove_at_last_close(&self.name, &opened.descriptor)?;
            Ok(opened)
        }))
    }

    /// Makes the mapping. The inner error says that its name is still taken.
    fn make(&self, key: &dyn Fn() -> Result<Key, Refusal>) -> Result<io::Result<Device>, Refusal> {
        let MappingSpec { record, read_only, .. } = *self.wanted;
        let key = key()?;
        let device = match self.mapper.create(&self.name, &self.uuid, read_only) {
            Ok(device) => device,
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => return Ok(Err(error)),
            Err(error) => return Err(self.failed("create mapping", error)),
        };
        let made = ThreadKey::add(&key_description(&record.id), key.bytes()).and_then(|thread_key| {
            drop(key);
            let loaded = self.mapper.load(&self.name, crypt_target(self.wanted), read_only);
            drop(thread_key);
            loaded?;
            self.mapper.resume(&self.name)
        });
        match made {
            Ok(()) => Ok(Ok(device)),
            Err(error) => {
                if let Err(error) = self.mapper.discard(&self.name) {
                    tracing::error!(mapping = %self.name, "a mapping that could not be made is left over: {error}");
                }
                Err(self.failed("map volume", error))
            }
        }
    }

    /// Whether the device of the mapping's name is the mapping that is wanted. Anything else is
    /// somebody else's, and refused.
    fn check(&self, device: &Device) -> Result<Standing, Refusal> {
        if device.uuid != self.uuid {
            let found = format!("it has the UUID {:?} instead of {:?}", device.uuid, self.uuid);
            return Err(self.unexpected(&found));
        }
        if !device.live {
            // Nobody can have got a descriptor of it from us, and this thread holds the volume.
            return Ok(Standing::HalfMade);
        }
        let table = self.mapper.table(&self.name).map_err(|error| self.failed("look at mapping", error))?;
        let Some(table) = table else { return Ok(Standing::Gone) };
        match shows_the_same(&table, &[crypt_target(self.wanted)]) {
            true => Ok(Standing::AsExpected),
            false => Err(self.unexpected("its table is not the one that the volume's record asks for")),
        }
    }

    fn does_not_go(&self, error: &io::Error) -> Refusal {
        Refusal::new(
            Reason::TimedOut,
            format!(
                "the earlier mapping {name} does not go away ({error}): 'dmsetup info {name}' shows its state, and \
                 'dmsetup remove {name}' removes it once nobody has it open",
                name = self.name
            ),
        )
    }

    fn unexpected(&self, found: &str) -> Refusal {
        Refusal::new(
            Reason::Kernel,
            format!(
                "the mapping {name} is there already but {found}: detach the volume everywhere on this host, then run \
                 'dmsetup remove {name}'",
                name = self.name
            ),
        )
    }

    fn failed(&self, operation: &str, error: io::Error) -> Refusal {
        let MappingSpec { record, device, .. } = self.wanted;
        let id = &record.id;
        match error.raw_os_error() {
            Some(libc::EBUSY) => Refusal::new(
                Reason::Kernel,
                format!(
                    "the device {device} of volume {id} is in use by the host itself (mounted, or part of LVM, RAID or \
                     multipath): release it with the tool that took it; 'lsblk' shows it"
                ),
            ),
            Some(libc::ENXIO | libc::ENODEV) => Refusal::new(
                Reason::DeviceGone,
                format!("the device {device} of volume {id} is gone: log in to its target again"),
            ),
            Some(libc::EINVAL | libc::ENOENT) => Refusal::new(
                Reason::Kernel,
                format!(
                    "the kernel refuses to {operation} {id} with {}: 'dmesg' says why, and whether the cipher's module \
                     is missing",
                    record.cipher
                ),
            ),
            _ => failed(operation, id.as_str(), error),
        }
    }
}

enum Standing {
    AsExpected,
    HalfMade,
    Gone,
}

fn connect() -> Result<DeviceMapper, Refusal> {
    DeviceMapper::connect().map_err(|error| {
        Refusal::new(
            Reason::Kernel,
            format!(
                "device-mapper cannot be used ({error}): run 'modprobe dm-crypt' as root and see 'volcrypt doctor'"
            ),
        )
    })
}

fn failed(operation: &str, subject: &str, error: io::Error) -> Refusal {
    let reason = if error.kind() == io::ErrorKind::TimedOut { Reason::TimedOut } else { Reason::Kernel };
    Refusal::new(reason, format!("cannot {operation} {subject}: {error}; 'dmesg' may say more"))
}

/// The names of the devices that are mappings of ours.
fn ours(mapper: &DeviceMapper) -> Result<Vec<String>, Refusal> {
    let names = mapper.names().map_err(|error| failed("list", "mappings", error))?;
    Ok(names.into_iter().filter(|name| name.starts_with(MAPPING_PREFIX)).collect())
}

fn describe(mapper: &DeviceMapper, name: &str) -> io::Result<Option<Mapping>> {
    let Some(device) = mapper.find(name)? else { return Ok(None) };
    let Some((format, volume)) = parse_own_uuid(&device.uuid) else { return Ok(None) };
    let table = mapper.table(name)?.unwrap_or_default();
    let crypt = table.first().and_then(|(_, _, _, parameters)| cipher_and_backing(parameters));
    Ok(Some(Mapping {
        volume,
        name: name.to_owned(),
        device: device.number,
        backing: crypt.map(|(_, backing)| backing),
        format: format.to_ascii_lowercase(),
        cipher: crypt.map(|(cipher, _)| cipher.to_owned()).unwrap_or_default(),
        open_count: device.open_count,
        deferred_removal: device.deferred_removal,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_id_fits_device_mapper() {
        let id = "x".repeat(VolumeId::MAX_LENGTH);
        assert!(MAPPING_PREFIX.len() + id.len() <= 127);
        assert!(OWN_UUID_PREFIX.len() + FORMAT.len() + 1 + id.len() <= 128);
    }
}
