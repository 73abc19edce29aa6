use std::collections::BTreeSet;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock};
use std::time::Instant;

use super::book::{Book, Guarded, Table};
use super::program::Device;
use super::sysfs::Shown;
use crate::policy::Config;
use crate::volume::{DeviceNumber, Identity, Sysfs};

/// What is guarded: by a configuration, or, as long as there was none but a faulty one, whose fault this says,
/// every block device.
pub type Rules = Result<Config, String>;

/// Says whether a device holds an enrolled volume; nothing if that cannot be told now.
pub type Enrolled = Box<dyn Fn(&Identity) -> Option<bool> + Send + Sync>;

/// Keeps a table equal to what [`Rules`] guard.
///
/// To look at all devices takes long where there are many, and every open of one may have to look at its own.
/// So nothing is locked while all are looked at, and what is looked at meanwhile is looked at once more then.
pub struct Watchlist<T> {
    sysfs: Sysfs,
    shown: Shown,
    rules: RwLock<Arc<Rules>>,
    enrolled: OnceLock<Enrolled>,
    /// Whether something could not be told by it.
    untold: AtomicBool,
    shut: Mutex<Shut<T>>,
}

struct Shut<T> {
    book: Option<Book<T>>,
    /// Whether the table is equal to what is guarded.
    complete: bool,
    /// The devices that were looked at since somebody began to look at all.
    meanwhile: Option<BTreeSet<DeviceNumber>>,
}

impl<T: Table> Watchlist<T> {
    /// A list by `rules` for the devices that `sysfs` and `shown` show, without a table.
    pub fn new(sysfs: Sysfs, shown: Shown, rules: Rules) -> Self {
        let shut = Shut { book: None, complete: false, meanwhile: None };
        let rules = RwLock::new(Arc::new(rules));
        Watchlist {
            sysfs,
            shown,
            rules,
            enrolled: OnceLock::new(),
            untold: AtomicBool::new(false),
            shut: Mutex::new(shut),
        }
    }

    /// The rules.
    pub fn rules(&self) -> Arc<Rules> {
        Arc::clone(&self.rules.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Has other rules count. Nobody may be looking at all devices.
    pub fn set_rules(&self, rules: Rules) {
        *self.rules.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(rules);
        self.forget();
    }

    /// Has `enrolled` say which devices hold enrolled volumes, from the next look at each on. Until then it is not known.
    pub fn know_enrolled(&self, enrolled: Enrolled) {
        // It is said once.
        let _ = self.enrolled.set(enrolled);
    }

    /// Has [`Self::look_at_all`] look again. Nobody may be at it.
    pub fn forget(&self) {
        self.shut().complete = false;
    }

    /// Takes the table of `open` if there is none yet.
    ///
    /// # Errors
    /// Those of `open`.
    pub fn open(&self, open: impl FnOnce() -> Result<Book<T>, String>) -> Result<(), String> {
        let mut shut = self.shut();
        if shut.book.is_none() {
            shut.book = Some(open()?);
        }
        Ok(())
    }

    /// Gives the table up.
    pub fn close(&self) {
        self.shut().book = None;
    }

    /// Does something with the table, if there is one.
    pub fn with_table<R>(&self, work: impl FnOnce(&T) -> R) -> Option<R> {
        self.shut().book.as_ref().map(|book| work(book.table()))
    }

    /// How many devices are shut.
    pub fn len(&self) -> usize {
        self.shut().book.as_ref().map_or(0, Book::len)
    }

    /// Whether every device is shut that is to be.
    pub fn is_complete(&self) -> bool {
        self.shut().complete
    }

    /// A device that somebody has identified: shuts it if a rule has it shut and it is not.
    ///
    /// # Errors
    /// Those of the table.
    pub fn saw(&self, identity: &Identity) -> io::Result<()> {
        if !guards(&self.rules(), identity, &|_| false) || !self.may_be_open(identity.number) {
            return Ok(());
        }
        self.look_at(identity.number)
    }

    /// Whether a device is not shut, or whoever looks at all of them may have seen another one of its number.
    fn may_be_open(&self, number: DeviceNumber) -> bool {
        let shut = self.shut();
        shut.book.as_ref().is_some_and(|book| shut.meanwhile.is_some() || !book.has(number))
    }

    /// The block devices of the SCSI device at `place`.
    pub fn disks_of(&self, place: &std::path::Path) -> Vec<DeviceNumber> {
        self.shown.disks_of(place)
    }

    /// Looks at one device.
    ///
    /// # Errors
    /// Those of the table. A fault of the table stays until everything could be shut.
    pub fn look_at(&self, number: DeviceNumber) -> io::Result<()> {
        let mut shut = self.shut();
        let Shut { book: Some(book), meanwhile, complete } = &mut *shut else { return Ok(()) };
        if let Some(meanwhile) = meanwhile {
            meanwhile.insert(number);
        }
        let devices = self.to_guard(&self.rules(), number, book.has(number));
        book.set(number, devices).inspect_err(|_| *complete = false)
    }

    /// Looks at all devices, unless the table is complete and all could be told. Not two threads may do that at a time.
    ///
    /// # Errors
    /// A sentence, when they cannot be listed, or not all be put into the table.
    pub fn look_at_all(&self) -> Result<(), String> {
        let before = {
            let mut shut = self.shut();
            let Shut { book: Some(book), complete, .. } = &*shut else { return Ok(()) };
            if *complete && !self.untold.swap(false, Ordering::Relaxed) {
                return Ok(());
            }
            let before = book.block_devices();
            shut.meanwhile = Some(BTreeSet::new());
            before
        };
        let (rules, began) = (self.rules(), Instant::now());
        let found = self.all_to_guard(&rules, &before);
        let mut shut = self.shut();
        let meanwhile = shut.meanwhile.take().unwrap_or_default();
        let mut guarded = found.map_err(|error| format!("/sys cannot be read ({error})"))?;
        for number in meanwhile {
            guarded.remove(&number);
            let devices = self.to_guard(&rules, number, before.contains(&number));
            if !devices.is_empty() {
                guarded.insert(number, devices);
            }
        }
        let Some(book) = &mut shut.book else { return Ok(()) };
        book.set_all(guarded).map_err(|error| unguarded(&error))?;
        shut.complete = true;
        tracing::debug!("looked at all devices in {} microseconds", began.elapsed().as_micros());
        Ok(())
    }

    fn all_to_guard(&self, rules: &Rules, before: &BTreeSet<DeviceNumber>) -> io::Result<Guarded> {
        let mut guarded = Guarded::new();
        for number in self.shown.block_devices()? {
            let devices = self.to_guard(rules, number, before.contains(&number));
            if !devices.is_empty() {
                guarded.insert(number, devices);
            }
        }
        Ok(guarded)
    }

    /// What has to be shut for the sake of block device `number`; nothing if it is not guarded or gone. If only its
    /// enrolment could be the reason and that cannot be told, it stays as it is, which `was_shut` says.
    fn to_guard(&self, rules: &Rules, number: DeviceNumber, was_shut: bool) -> BTreeSet<Device> {
        let is_enrolled = |device: &Identity| {
            let told = self.enrolled.get().map(|enrolled| enrolled(device));
            // Before anybody can say it, somebody looks again as soon as there is.
            if told == Some(None) {
                self.untold.store(true, Ordering::Relaxed);
            }
            told.flatten().unwrap_or(was_shut)
        };
        let guarded = match self.sysfs.identify(number) {
            Ok(identity) => guards(rules, &identity, &is_enrolled),
            // What is there and cannot be identified is given to no wrapped guest either. A disk whose
            // session goes away is there for a moment longer, and what it was is not known any more.
            Err(_) => self.shown.has(number),
        };
        match guarded {
            true => {
                let others = self.shown.passing_commands_to(number).into_iter().map(Device::Character);
                others.chain([Device::Block(number)]).collect()
            }
            false => BTreeSet::new(),
        }
    }

    fn shut(&self) -> MutexGuard<'_, Shut<T>> {
        self.shut.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn guards(rules: &Rules, identity: &Identity, is_enrolled: &dyn Fn(&Identity) -> bool) -> bool {
    match rules {
        Ok(config) => config.is_guarded_with(identity, is_enrolled),
        // The daemon refuses them as well: nothing tells which of them are protected.
        Err(_) => identity.own_volume().is_none(),
    }
}

/// What is wrong when the table has not taken everything.
pub fn unguarded(error: &io::Error) -> String {
    format!("not every protected device could be put into the map of guarded devices ({error})")
}

#[cfg(test)]
mod tests;
