//! Device-mapper as volcrypt needs it: no step waits for udev.
//!
//! The devicemapper crate waits for udev's rules, without a deadline, whenever the kernel announces a
//! device. A mapping is usable before udev has looked at it, so a resume is waited for by asking the
//! kernel, and removal is always the deferred one of a device that is still open, which announces
//! nothing at that moment.

use std::fs::{File, OpenOptions};
use std::io;
use std::ops::RangeInclusive;
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{LazyLock, mpsc};
use std::time::{Duration, Instant};

use aws_lc_rs::rand;
use devicemapper::{DM, DevId, DeviceInfo, DmError, DmFlags, DmName, DmOptions, errors};
use rustix::fs::OFlags;

use super::Opened;
use super::table::Target;
use crate::sys::dm;
use crate::volume::DeviceNumber;

/// How long the kernel may take for a resume or a removal before it is given up.
const KERNEL_DEADLINE: Duration = Duration::from_secs(10);

/// The numbers for mappings: of the 20 bits that there are, those which the kernel, counting from 0, gives to nobody.
const MINORS: RangeInclusive<u32> = 0x400..=0xf_ffff;
/// How many numbers are tried that turn out to be taken.
const NUMBERS_TRIED: usize = 64;

/// A connection to the kernel's device-mapper.
pub struct DeviceMapper {
    dm: DM,
}

/// A device of device-mapper's.
#[derive(Debug)]
pub struct Device {
    /// Its number.
    pub number: DeviceNumber,
    /// Its UUID, empty when it has none.
    pub uuid: String,
    /// How many times it is open.
    pub open_count: i32,
    /// Whether it is removed at its last close.
    pub deferred_removal: bool,
    /// Whether its table is in force.
    pub live: bool,
}

impl DeviceMapper {
    /// Connects.
    ///
    /// # Errors
    /// When /dev/mapper/control is not there or may not be opened.
    pub fn connect() -> io::Result<Self> {
        // The crate keeps this errno as text only, so look first.
        File::open("/dev/mapper/control")?;
        Ok(DeviceMapper { dm: DM::new().map_err(io_error)? })
    }

    /// The names of all devices.
    pub fn names(&self) -> io::Result<Vec<String>> {
        let devices = self.dm.list_devices().map_err(io_error)?;
        Ok(devices.into_iter().map(|(name, _, _)| name.to_string()).collect())
    }

    /// The device called `name`, if there is one.
    pub fn find(&self, name: &str) -> io::Result<Option<Device>> {
        found(self.dm.device_info(&DevId::Name(dm_name(name)?)).map(|info| Device::from(&info)))
    }

    /// The table in force of the device called `name`; `None` when the device is gone.
    pub fn table(&self, name: &str) -> io::Result<Option<Vec<Target>>> {
        let options = DmOptions::default().set_flags(DmFlags::DM_STATUS_TABLE);
        found(self.dm.table_status(&DevId::Name(dm_name(name)?), options).map(|(_, targets)| targets))
    }

    /// Makes a device without a table.
    ///
    /// The kernel would give it the lowest number that is free, which is that of the device that went last. Somebody may
    /// still be about to open that one by its number: libvirt copies a device's node into a guest's namespace before QEMU
    /// opens it, and a mapping may go in between. So a number is not given again for as long as can be.
    pub fn create(&self, name: &str, uuid: &str, read_only: bool) -> io::Result<Device> {
        let control = OpenOptions::new().read(true).write(true).open("/dev/mapper/control")?;
        let create = |minor| dm::create(&control, name, uuid, minor, read_only);
        with_a_free_number(create, || self.find(name).map(|device| device.is_some()))?;
        self.find(name)?.ok_or_else(|| io::Error::from_raw_os_error(libc::ENXIO))
    }

    /// Loads `target` as the device's whole table, not yet in force.
    pub fn load(&self, name: &str, target: Target, read_only: bool) -> io::Result<()> {
        self.dm.table_load(&DevId::Name(dm_name(name)?), &[target], options(read_only)).map_err(io_error)?;
        Ok(())
    }

    /// Puts the loaded table in force. udev hears of it with the flags that keep blkid, LVM and the
    /// by-uuid links away from the device; its rules run on their own time.
    pub fn resume(&self, name: &str) -> io::Result<()> {
        let resume = |dm: &DM, id: &DevId<'_>| dm.device_suspend(id, DmOptions::private());
        self.without_udev(name, resume, |device| device.is_some_and(|device| device.live))
    }

    /// Does `work`, for which the crate may wait for udev, on a thread of its own, and waits only until
    /// the kernel shows that it is `done`.
    fn without_udev(
        &self,
        name: &str,
        work: fn(&DM, &DevId<'_>) -> Result<DeviceInfo, DmError>,
        done: impl Fn(Option<Device>) -> bool,
    ) -> io::Result<()> {
        let (report, reported) = mpsc::channel();
        let owned_name = name.to_owned();
        std::thread::Builder::new().name("dm".to_owned()).stack_size(128 << 10).spawn(move || {
            let outcome = DeviceMapper::connect().and_then(|mapper| {
                let id = DevId::Name(dm_name(&owned_name)?);
                work(&mapper.dm, &id).map_err(io_error)
            });
            // Nobody listens any more once the kernel has told the other side by itself.
            let _ = report.send(outcome);
        })?;
        let deadline = Instant::now() + KERNEL_DEADLINE;
        let mut pause = Duration::from_micros(100);
        loop {
            match reported.recv_timeout(pause) {
                Ok(outcome) => return outcome.map(drop),
                Err(_) if done(self.find(name)?) => return Ok(()),
                Err(_) if Instant::now() > deadline => return Err(io::ErrorKind::TimedOut.into()),
                Err(_) => pause = (pause * 2).min(Duration::from_millis(20)),
            }
        }
    }

    /// Opens the device called `name`, which must be `number`.
    ///
    /// # Errors
    /// Those of open(2), and `ENXIO` when the name or the number is another device's meanwhile.
    pub fn open(&self, name: &str, number: DeviceNumber, flags: OFlags) -> io::Result<Opened> {
        let descriptor =
            rustix::fs::open(device_path(number), flags | OFlags::CLOEXEC | OFlags::NOCTTY, rustix::fs::Mode::empty())?;
        // An open device keeps its name and number, so from here on this holds.
        let opened = DeviceNumber::from_raw(rustix::fs::fstat(&descriptor)?.st_rdev);
        match self.find(name)? {
            Some(device) if device.number == number && opened == number => {
                Ok(Opened { descriptor, was_open: device.open_count > 1 })
            }
            _ => Err(io::Error::from_raw_os_error(libc::ENXIO)),
        }
    }

    /// Has the kernel remove the device called `name` when `opened`, and whoever else has it open,
    /// closes it.
    pub fn remove_at_last_close(&self, name: &str, _opened: impl AsFd) -> io::Result<()> {
        self.dm.device_remove(&DevId::Name(dm_name(name)?), deferred()).map_err(io_error)?;
        Ok(())
    }

    /// Removes the device called `name` now, or at its last close when somebody has it open.
    pub fn discard(&self, name: &str) -> io::Result<()> {
        let Some(device) = self.find(name)? else { return Ok(()) };
        let opened = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(device_path(device.number));
        match opened {
            Ok(opened) => self.remove_at_last_close(name, opened),
            Err(error) if is_gone(&error) => match self.find(name)? {
                // A device that never had a table has no node yet (Linux 5.15), so nobody has it open.
                Some(left) if left.number == device.number && !left.live => {
                    let remove = |dm: &DM, id: &DevId<'_>| dm.device_remove(id, deferred());
                    self.without_udev(name, remove, |device| device.is_none())
                }
                // It is being removed right now.
                _ => Ok(()),
            },
            Err(error) => Err(error),
        }
    }
}

/// Has a device made with a number that nobody has. `is_named` says whether its name is taken, which is an error of
/// its own.
///
/// The kernel finds out about the number first and says `ENXIO` for one that is taken (alloc_dev() in drivers/md/dm.c has
/// no other errno); `EBUSY` is about the name or the UUID.
fn with_a_free_number(
    mut create: impl FnMut(u32) -> io::Result<()>,
    is_named: impl Fn() -> io::Result<bool>,
) -> io::Result<()> {
    for _ in 0..NUMBERS_TRIED {
        match create(next_minor()) {
            Err(error) if matches!(error.raw_os_error(), Some(libc::EBUSY | libc::ENXIO)) && !is_named()? => {
                // Others may have many in a row.
                draw_anew();
            }
            outcome => return outcome,
        }
    }
    Err(io::Error::other(format!(
        "the kernel makes no device with any of {NUMBERS_TRIED} numbers, so nearly all are taken or it has no memory"
    )))
}

/// The number that comes next, counted from the first.
static NEXT: LazyLock<AtomicU32> = LazyLock::new(|| AtomicU32::new(random()));

/// The next number for a device. The first one is drawn at random: an earlier daemon has given numbers as well.
fn next_minor() -> u32 {
    let (first, last) = (*MINORS.start(), *MINORS.end());
    first + NEXT.fetch_add(1, Ordering::Relaxed) % (last - first + 1)
}

/// Has the numbers go on somewhere else.
fn draw_anew() {
    NEXT.store(random(), Ordering::Relaxed);
}

fn random() -> u32 {
    let mut random = [0; 4];
    // Without randomness it begins in front.
    let _ = rand::fill(&mut random);
    u32::from_ne_bytes(random)
}

/// The device's node in /dev, which the kernel itself makes.
pub fn device_path(number: DeviceNumber) -> PathBuf {
    PathBuf::from(format!("/dev/dm-{}", number.minor))
}

/// Whether `error` says that a device is not there, or not any more.
pub fn is_gone(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENXIO | libc::ENODEV | libc::ENOENT))
}

impl From<&DeviceInfo> for Device {
    fn from(info: &DeviceInfo) -> Self {
        let flags = info.flags();
        Device {
            number: DeviceNumber { major: info.device().major, minor: info.device().minor },
            uuid: info.uuid().map(ToString::to_string).unwrap_or_default(),
            open_count: info.open_count(),
            deferred_removal: flags.contains(DmFlags::DM_DEFERRED_REMOVE),
            live: flags.contains(DmFlags::DM_ACTIVE_PRESENT) && !flags.contains(DmFlags::DM_SUSPEND),
        }
    }
}

fn options(read_only: bool) -> DmOptions {
    match read_only {
        true => DmOptions::private().set_flags(DmFlags::DM_READONLY),
        false => DmOptions::private(),
    }
}

fn deferred() -> DmOptions {
    DmOptions::default().set_flags(DmFlags::DM_DEFERRED_REMOVE)
}

fn dm_name(name: &str) -> io::Result<&DmName> {
    DmName::new(name).map_err(io_error)
}

fn found<T>(result: Result<T, DmError>) -> io::Result<Option<T>> {
    match result.map_err(io_error) {
        Ok(value) => Ok(Some(value)),
        Err(error) if error.raw_os_error() == Some(libc::ENXIO) => Ok(None),
        Err(error) => Err(error),
    }
}

fn io_error(error: DmError) -> io::Error {
    match error {
        DmError::Core(errors::Error::Ioctl(_, _, _, errno)) => io::Error::from_raw_os_error(*errno as i32),
        other => io::Error::other(other.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn errno(number: i32) -> io::Error {
        io::Error::from_raw_os_error(number)
    }

    #[test]
    fn a_number_is_not_given_again_soon() {
        let (first, last) = (next_minor(), next_minor());
        assert!(MINORS.contains(&first) && MINORS.contains(&last) && first != last);
    }

    #[test]
    fn a_number_that_is_taken_is_passed_over() {
        let mut tried = Vec::new();
        let taken = |minor| {
            tried.push(minor);
            if tried.len() < 5 { Err(errno(libc::ENXIO)) } else { Ok(()) }
        };
        with_a_free_number(taken, || Ok(false)).unwrap();
        assert_eq!(tried.len(), 5);
        // Whoever has many has them in a row.
        assert!(tried.windows(2).all(|pair| pair[1] != pair[0] + 1), "{tried:?}");

        let none = with_a_free_number(|_| Err(errno(libc::ENXIO)), || Ok(false)).unwrap_err();
        assert_eq!(none.raw_os_error(), None, "ENXIO would say that the volume's device is gone");
        assert!(none.to_string().contains("nearly all are taken"), "{none}");
    }

    #[test]
    fn a_name_that_is_taken_is_an_error() {
        let mut count = 0;
        let named = |_| {
            count += 1;
            Err(errno(libc::EBUSY))
        };
        assert_eq!(with_a_free_number(named, || Ok(true)).unwrap_err().raw_os_error(), Some(libc::EBUSY));
        assert_eq!(count, 1);
        let denied = with_a_free_number(|_| Err(errno(libc::EPERM)), || Ok(false)).unwrap_err();
        assert_eq!(denied.raw_os_error(), Some(libc::EPERM));
    }
}
