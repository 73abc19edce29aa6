use std::collections::{BTreeMap, BTreeSet};
use std::io;

use super::program::Device;
use crate::volume::DeviceNumber;

/// The set of devices that the kernel refuses to open.
pub trait Table {
    /// Adds a device; one that is there stays.
    ///
    /// # Errors
    /// When it cannot be added: the table is full.
    fn insert(&self, device: Device) -> io::Result<()>;

    /// Takes a device out; one that is not there is no error.
    ///
    /// # Errors
    /// When the kernel refuses.
    fn remove(&self, device: Device) -> io::Result<()>;

    /// All devices in it.
    ///
    /// # Errors
    /// When the kernel refuses.
    fn devices(&self) -> io::Result<Vec<Device>>;
}

/// For each block device that is guarded, itself and what else leads to it.
pub type Guarded = BTreeMap<DeviceNumber, BTreeSet<Device>>;

/// Keeps a [`Table`] equal to what is guarded. What is to be in it is added before anything is taken out,
/// so that nothing that stays is ever missing.
#[derive(Debug)]
pub struct Book<T> {
    table: T,
    in_table: BTreeSet<Device>,
    guarded: Guarded,
}

impl<T: Table> Book<T> {
    /// A book for `table`, in which an earlier daemon may have left devices. They stay until
    /// [`Self::set_all`].
    ///
    /// # Errors
    /// When the table cannot be read.
    pub fn open(table: T) -> io::Result<Self> {
        let in_table = table.devices()?.into_iter().collect();
        Ok(Book { table, in_table, guarded: Guarded::new() })
    }

    /// The table.
    pub fn table(&self) -> &T {
        &self.table
    }

    /// How many devices are in the table.
    pub fn len(&self) -> usize {
        self.in_table.len()
    }

    /// Whether the block device itself is in the table.
    pub fn has(&self, number: DeviceNumber) -> bool {
        self.in_table.contains(&Device::Block(number))
    }

    /// The block devices in the table.
    pub fn block_devices(&self) -> BTreeSet<DeviceNumber> {
        let block_device = |device: &Device| match device {
            Device::Block(number) => Some(*number),
            Device::Character(_) => None,
        };
        self.in_table.iter().filter_map(block_device).collect()
    }

    /// Has `devices` guarded for the sake of block device `number`, and nothing else for its sake any more.
    ///
    /// # Errors
    /// Those of the table. What was guarded before still is.
    pub fn set(&mut self, number: DeviceNumber, devices: BTreeSet<Device>) -> io::Result<()> {
        self.add(&devices)?;
        let before = match devices.is_empty() {
            true => self.guarded.remove(&number),
            false => self.guarded.insert(number, devices),
        };
        // What an earlier daemon left is nobody's; it is this device's if it is its very node.
        let gone = before.unwrap_or_default().into_iter().chain([Device::Block(number)]);
        self.drop_unneeded(gone.collect())
    }

    /// Has exactly `guarded` guarded.
    ///
    /// # Errors
    /// Those of the table. What was guarded before still is.
    pub fn set_all(&mut self, guarded: Guarded) -> io::Result<()> {
        guarded.values().try_for_each(|devices| self.add(devices))?;
        self.guarded = guarded;
        self.drop_unneeded(self.in_table.clone())
    }

    fn add(&mut self, devices: &BTreeSet<Device>) -> io::Result<()> {
        for device in devices {
            if !self.in_table.contains(device) {
                self.table.insert(*device)?;
                self.in_table.insert(*device);
            }
        }
        Ok(())
    }

    fn drop_unneeded(&mut self, candidates: BTreeSet<Device>) -> io::Result<()> {
        let needed: BTreeSet<Device> = self.guarded.values().flatten().copied().collect();
        for device in candidates.difference(&needed) {
            if self.in_table.contains(device) {
                self.table.remove(*device)?;
                self.in_table.remove(device);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::cell::RefCell;

    /// A kernel that has room for so many devices and watches over some that must never be missing.
    #[derive(Default)]
    struct Simulated {
        devices: RefCell<BTreeSet<Device>>,
        watched: RefCell<BTreeSet<Device>>,
        room: Option<usize>,
    }

    impl Table for Simulated {
        fn insert(&self, device: Device) -> io::Result<()> {
            let mut devices = self.devices.borrow_mut();
            if self.room.is_some_and(|room| devices.len() >= room) {
                return Err(io::Error::from_raw_os_error(libc::E2BIG));
            }
            devices.insert(device);
            Ok(())
        }

        fn remove(&self, device: Device) -> io::Result<()> {
            assert!(!self.watched.borrow().contains(&device), "{device:?} is guarded and was taken out");
            self.devices.borrow_mut().remove(&device);
            Ok(())
        }

        fn devices(&self) -> io::Result<Vec<Device>> {
            Ok(self.devices.borrow().iter().copied().collect())
        }
    }

    fn number(minor: u32) -> DeviceNumber {
        DeviceNumber { major: 8, minor }
    }

    fn disk(minor: u32, generic: &[u32]) -> BTreeSet<Device> {
        let generic = generic.iter().map(|minor| Device::Character(DeviceNumber { major: 21, minor: *minor }));
        generic.chain([Device::Block(number(minor))]).collect()
    }

    fn table(book: &Book<Simulated>) -> BTreeSet<Device> {
        book.table.devices.borrow().clone()
    }

    #[test]
    fn what_an_earlier_daemon_left_goes_only_when_everything_is_known() {
        let left = Simulated::default();
        left.devices.borrow_mut().extend(disk(0, &[1]).union(&disk(16, &[2])));
        let mut book = Book::open(left).unwrap();
        assert!(book.has(number(0)) && book.len() == 4);
        book.set(number(32), disk(32, &[])).unwrap();
        assert_eq!(book.len(), 5);
        // The number is another disk's now.
        book.set(number(16), BTreeSet::new()).unwrap();
        assert!(!book.has(number(16)));
        book.set_all(Guarded::from([(number(0), disk(0, &[1]))])).unwrap();
        assert_eq!(table(&book), disk(0, &[1]));
    }

    #[test]
    fn a_device_that_is_guarded_twice_goes_with_the_last() {
        let mut book = Book::open(Simulated::default()).unwrap();
        book.set(number(0), disk(0, &[7])).unwrap();
        book.set(number(16), disk(16, &[7])).unwrap();
        book.set(number(0), BTreeSet::new()).unwrap();
        assert_eq!(table(&book), disk(16, &[7]));
        book.set(number(16), BTreeSet::new()).unwrap();
        assert_eq!(book.len(), 0);
    }

    #[test]
    fn a_full_table_loses_nothing() {
        let mut book = Book::open(Simulated { room: Some(3), ..Simulated::default() }).unwrap();
        book.set(number(0), disk(0, &[1])).unwrap();
        assert!(book.set_all(Guarded::from([(number(16), disk(16, &[2]))])).is_err());
        assert!(table(&book).is_superset(&disk(0, &[1])));
    }

    /// What happens to one of a few disks, or to all.
    fn steps() -> impl Strategy<Value = Vec<(Option<u32>, Vec<bool>)>> {
        let step = (prop::option::of(0_u32..4), prop::collection::vec(any::<bool>(), 4));
        prop::collection::vec(step, 0..12)
    }

    proptest! {
        #[test]
        fn the_table_is_what_is_guarded_and_nothing_that_stays_is_ever_missing(steps in steps()) {
            let mut book = Book::open(Simulated::default()).unwrap();
            let mut wanted = Guarded::new();
            for (one, states) in steps {
                let disks = states.iter().zip(0_u32..).filter(|(guarded, _)| **guarded);
                let all: Guarded = disks.map(|(_, minor)| (number(minor), disk(minor, &[minor / 2]))).collect();
                let next = match one {
                    None => all,
                    Some(minor) => {
                        let mut next = wanted.clone();
                        next.remove(&number(minor));
                        next.extend(all.into_iter().filter(|(device, _)| *device == number(minor)));
                        next
                    }
                };
                let devices = |guarded: &Guarded| guarded.values().flatten().copied().collect::<BTreeSet<_>>();
                *book.table.watched.borrow_mut() = devices(&next);
                match one {
                    None => book.set_all(next.clone()).unwrap(),
                    Some(minor) => {
                        book.set(number(minor), next.get(&number(minor)).cloned().unwrap_or_default()).unwrap()
                    }
                }
                wanted = next;
                prop_assert_eq!(table(&book), devices(&wanted));
                prop_assert_eq!(book.len(), devices(&wanted).len());
            }
        }
    }
}
