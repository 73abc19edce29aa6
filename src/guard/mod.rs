//! The guard: no process below the guests' cgroup can open the raw device of a protected volume.
//!
//! A QEMU that runs without the wrapper would write to it in clear. So the kernel asks a small program
//! (BPF_PROG_TYPE_CGROUP_DEVICE) at every open of a device below that cgroup, and the program looks the
//! device's number up in a map, which the daemon keeps equal to what the configuration protects. Wrapped
//! guests need no raw device: the daemon, which is outside the cgroup, opens the mapping for them. The map
//! and the program's attachment belong to the kernel and stay when the daemon ends.

mod book;
mod kernel;
mod program;
mod sysfs;
mod uevent;
mod watch;

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

pub use self::watch::watch;

use self::book::{Book, Guarded};
use self::kernel::{Attachment, KernelTable};
use self::program::Device;
use self::sysfs::Shown;
use self::uevent::Subject;
use crate::policy::{Config, GuardConfig};
use crate::protocol::GuardStatus;
use crate::volume::{DeviceNumber, Identity, Sysfs};

/// Keeps raw devices of protected volumes shut.
pub struct Guard {
    sysfs: Sysfs,
    shown: Shown,
    state: Mutex<State>,
}

struct State {
    /// None while the configuration is faulty: then what is guarded stays as it is.
    config: Option<Config>,
    book: Option<Book<KernelTable>>,
    attachment: Option<Attachment>,
    /// Whether the map is equal to what is protected.
    complete: bool,
    /// Whether guards of other versions and on other cgroups were taken off, which is done once this one
    /// is complete.
    alone: bool,
    /// Why the guard is off, or not for all devices.
    fault: Option<String>,
}

impl Guard {
    /// A guard that works by `config`, on as far as that is possible. Without a configuration it goes on
    /// with what an earlier daemon has left.
    pub fn start(config: Option<Config>) -> Self {
        let fault = Some("it was not started yet".to_owned());
        let state = State { config: None, book: None, attachment: None, complete: false, alone: false, fault };
        let guard = Guard { sysfs: Sysfs::system(), shown: Shown::here(), state: Mutex::new(state) };
        guard.reload(config);
        guard
    }

    /// Works by `config` from now on; with none, what is guarded stays as it is.
    pub fn reload(&self, config: Option<Config>) {
        {
            let mut state = self.state();
            state.config = config;
            state.attachment = None;
            state.alone = false;
        }
        self.refresh();
    }

    /// Looks at every block device anew.
    pub fn refresh(&self) {
        let mut state = self.state();
        state.complete = false;
        self.bring_up(&mut state);
    }

    /// Makes sure that the guard is on: cgroups come and go.
    pub fn ensure(&self) {
        self.bring_up(&mut self.state());
    }

    /// Looks at what the kernel has announced.
    fn look(&self, subject: &Subject) {
        match subject {
            Subject::Block(number) => self.look_at(&mut self.state(), *number),
            Subject::Scsi(place) => {
                self.shown.disks_of(place).into_iter().for_each(|number| self.look_at(&mut self.state(), number));
            }
            Subject::Everything => self.refresh(),
        }
    }

    /// A device that somebody has identified: guards it before anything else is done with it, should its
    /// announcement not have arrived yet.
    pub fn saw(&self, identity: &Identity) {
        let mut state = self.state();
        let guarded = state.config.as_ref().is_some_and(|config| config.is_guarded(identity));
        if guarded && state.book.as_ref().is_some_and(|book| !book.has(identity.number)) {
            self.look_at(&mut state, identity.number);
        }
    }

    /// Whether the guard is on right now.
    pub fn status(&self) -> GuardStatus {
        let mut state = self.state();
        self.bring_up(&mut state);
        GuardStatus {
            on: state.fault.is_none(),
            cgroup: state.settings().cgroup,
            devices: state.book.as_ref().map_or(0, Book::len),
            fault: state.fault.clone(),
        }
    }

    /// The cgroup's folder, whose parent is watched.
    fn cgroup(&self) -> PathBuf {
        Path::new(kernel::CGROUPS).join(self.state().settings().cgroup)
    }

    fn look_at(&self, state: &mut State, number: DeviceNumber) {
        let (Some(config), Some(book)) = (&state.config, &mut state.book) else { return };
        // A fault of the table stays until everything could be guarded.
        if let Err(error) = book.set(number, self.to_guard(config, number)) {
            state.complete = false;
            state.say(Some(unguarded(&error)));
        }
    }

    fn bring_up(&self, state: &mut State) {
        let fault = self.try_bring_up(state).err();
        state.say(fault);
    }

    fn try_bring_up(&self, state: &mut State) -> Result<(), String> {
        let settings = state.settings();
        if !settings.enabled {
            if !state.alone {
                retire_others(None);
                state.book = None;
                state.attachment = None;
                state.alone = true;
            }
            return Err("it is switched off: set enabled = true in [guard] of /etc/volcrypt/volcrypt.toml".to_owned());
        }
        if state.book.is_none() {
            let unreadable = |error: io::Error| format!("the map of guarded devices cannot be read ({error})");
            state.book = Some(Book::open(KernelTable::open()?).map_err(unreadable)?);
        }
        let Some(book) = &mut state.book else { return Ok(()) };
        if let Some(config) = state.config.as_ref().filter(|_| !state.complete) {
            let began = Instant::now();
            let guarded = self.all_to_guard(config).map_err(|error| format!("/sys cannot be read ({error})"))?;
            book.set_all(guarded).map_err(|error| unguarded(&error))?;
            state.complete = true;
            tracing::debug!("looked at all devices in {} microseconds", began.elapsed().as_micros());
        }
        let attachment = match state.attachment.take() {
            Some(attachment) => attachment.renew().map(|()| attachment)?,
            None => Attachment::make(book.table(), &settings.cgroup)?,
        };
        let attachment = state.attachment.insert(attachment);
        if state.complete && !state.alone {
            retire_others(Some(attachment));
            state.alone = true;
        }
        Ok(())
    }

    fn all_to_guard(&self, config: &Config) -> io::Result<Guarded> {
        let mut guarded = Guarded::new();
        for number in self.shown.block_devices()? {
            let devices = self.to_guard(config, number);
            if !devices.is_empty() {
                guarded.insert(number, devices);
            }
        }
        Ok(guarded)
    }

    /// What has to be shut for the sake of block device `number`; nothing if it is not protected or gone.
    fn to_guard(&self, config: &Config, number: DeviceNumber) -> BTreeSet<Device> {
        let guarded = match self.sysfs.identify(number) {
            Ok(identity) => config.is_guarded(&identity),
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

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn settings(&self) -> GuardConfig {
        self.config.as_ref().map(|config| config.guard.clone()).unwrap_or_default()
    }

    /// Notes whether there is a fault, and tells the journal when that changes.
    fn say(&mut self, fault: Option<String>) {
        if self.fault == fault {
            return;
        }
        match &fault {
            Some(fault) => tracing::warn!(
                "the guard does not keep protected volumes from guests that run without the wrapper: {fault}"
            ),
            None => tracing::info!("the guard is on for {}", self.settings().cgroup),
        }
        self.fault = fault;
    }
}

/// Takes the guard off altogether, for when volcrypt is removed from the host.
///
/// # Errors
/// When the kernel refuses.
pub fn remove() -> io::Result<()> {
    kernel::retire_others(None)
}

/// What is left over does no harm but to shut devices that need not be shut.
fn retire_others(kept: Option<&Attachment>) {
    if let Err(error) = kernel::retire_others(kept) {
        tracing::warn!("a guard that is not needed any more could not be taken off: {error}");
    }
}

fn unguarded(error: &io::Error) -> String {
    format!("not every protected device could be put into the map of guarded devices ({error})")
}
