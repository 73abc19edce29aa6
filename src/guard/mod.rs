//! The guard: no process below the guests' cgroup can open the raw device of a protected volume.
//!
//! A QEMU that runs without the wrapper would write to it in clear. So the kernel asks a small program
//! (BPF_PROG_TYPE_CGROUP_DEVICE) at every open of a device below that cgroup, and the program looks the
//! device's number up in a map, which the daemon keeps equal to what the configuration protects, and to what is
//! enrolled, should the configuration have lost its rule. Wrapped
//! guests need no raw device: the daemon, which is outside the cgroup, opens the mapping for them. The map
//! and the program's attachment belong to the kernel and stay when the daemon ends. As long as there is none
//! but a faulty configuration, every block device is shut.

mod book;
mod kernel;
mod program;
mod sysfs;
mod uevent;
mod watch;
mod watchlist;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

pub use self::watch::watch;
pub use self::watchlist::{Enrolled, Rules};

use self::book::Book;
use self::kernel::{Attachment, KernelTable};
pub use self::sysfs::Shown;
use self::uevent::Subject;
use self::watchlist::{Watchlist, unguarded};
use crate::policy::GuardConfig;
use crate::protocol::GuardStatus;
use crate::volume::{Identity, Sysfs};

/// Keeps raw devices of protected volumes shut.
pub struct Guard {
    watchlist: Watchlist<KernelTable>,
    upkeep: Mutex<Upkeep>,
    /// Why the guard is off, or not for all devices.
    fault: Mutex<Option<String>>,
}

/// What is there once for the whole guard. Whoever looks at all devices has it.
struct Upkeep {
    attachment: Option<Attachment>,
    /// Whether guards of other versions and on other cgroups were taken off, which is done once this one
    /// is complete.
    alone: bool,
}

impl Guard {
    /// A guard that works by `rules`, on as far as that is possible.
    pub fn start(rules: Rules) -> Self {
        let guard = Guard {
            watchlist: Watchlist::new(Sysfs::system(), Shown::here(), rules),
            upkeep: Mutex::new(Upkeep { attachment: None, alone: false }),
            fault: Mutex::new(Some("it was not started yet".to_owned())),
        };
        guard.refresh();
        guard
    }

    /// Works by `rules` from now on.
    pub fn reload(&self, rules: Rules) {
        let mut upkeep = self.upkeep();
        self.watchlist.set_rules(rules);
        *upkeep = Upkeep { attachment: None, alone: false };
        self.bring_up(&mut upkeep);
    }

    /// Has `enrolled` say which devices hold enrolled volumes: they are shut also when no rule protects them any more.
    /// That counts from the next [`Self::refresh`] on.
    pub fn know_enrolled(&self, enrolled: Enrolled) {
        self.watchlist.know_enrolled(enrolled);
    }

    /// Looks at every block device anew.
    pub fn refresh(&self) {
        let mut upkeep = self.upkeep();
        self.watchlist.forget();
        self.bring_up(&mut upkeep);
    }

    /// Makes sure that the guard is on: cgroups come and go.
    pub fn ensure(&self) {
        self.bring_up(&mut self.upkeep());
    }

    /// Looks at what the kernel has announced.
    fn look(&self, subject: &Subject) {
        match subject {
            Subject::Block(number) => self.note(self.watchlist.look_at(*number)),
            Subject::Scsi(place) => {
                let disks = self.watchlist.disks_of(place);
                disks.into_iter().for_each(|number| self.note(self.watchlist.look_at(number)));
            }
            Subject::Everything => self.refresh(),
        }
    }

    /// A device that somebody has identified: guards it before anything else is done with it, should its
    /// announcement not have arrived yet. Waits for nobody who looks at all devices.
    pub fn saw(&self, identity: &Identity) {
        self.note(self.watchlist.saw(identity));
    }

    /// Whether the guard is on right now.
    pub fn status(&self) -> GuardStatus {
        self.ensure();
        let fault = self.fault().clone();
        GuardStatus {
            on: fault.is_none(),
            cgroup: self.settings().cgroup,
            devices: self.watchlist.len(),
            fault,
            all_because: self.watchlist.rules().as_ref().as_ref().err().cloned(),
        }
    }

    /// The cgroup's folder, whose parent is watched.
    fn cgroup(&self) -> PathBuf {
        Path::new(kernel::CGROUPS).join(self.settings().cgroup)
    }

    fn settings(&self) -> GuardConfig {
        self.watchlist.rules().as_ref().as_ref().map(|config| config.guard.clone()).unwrap_or_default()
    }

    fn note(&self, looked: io::Result<()>) {
        if let Err(error) = looked {
            self.say(Some(unguarded(&error)));
        }
    }

    fn bring_up(&self, upkeep: &mut Upkeep) {
        let fault = self.try_bring_up(upkeep).err();
        self.say(fault);
    }

    fn try_bring_up(&self, upkeep: &mut Upkeep) -> Result<(), String> {
        let settings = self.settings();
        if !settings.enabled {
            if !upkeep.alone {
                retire_others(None);
                self.watchlist.close();
                *upkeep = Upkeep { attachment: None, alone: true };
            }
            return Err("it is switched off: set enabled = true in [guard] of /etc/volcrypt/volcrypt.toml".to_owned());
        }
        let unreadable = |error: io::Error| format!("the map of guarded devices cannot be read ({error})");
        self.watchlist.open(|| Book::open(KernelTable::open()?).map_err(unreadable))?;
        self.watchlist.look_at_all()?;
        let attachment = match upkeep.attachment.take() {
            Some(attachment) => attachment.renew().map(|()| attachment)?,
            None => match self.watchlist.with_table(|table| Attachment::make(table, &settings.cgroup)) {
                Some(attachment) => attachment?,
                None => return Ok(()),
            },
        };
        let attachment = upkeep.attachment.insert(attachment);
        // Which cgroup and which devices count is not known for sure without a configuration.
        if self.watchlist.rules().is_ok() && self.watchlist.is_complete() && !upkeep.alone {
            retire_others(Some(attachment));
            upkeep.alone = true;
        }
        // What somebody could not put into the table meanwhile.
        match self.watchlist.is_complete() {
            true => Ok(()),
            false => Err(unguarded(&io::ErrorKind::StorageFull.into())),
        }
    }

    /// Notes whether there is a fault, and tells the journal when that changes.
    fn say(&self, fault: Option<String>) {
        let mut noted = self.fault();
        if *noted == fault {
            return;
        }
        match &fault {
            Some(fault) => tracing::warn!(
                "the guard does not keep protected volumes from guests that run without the wrapper: {fault}"
            ),
            None => tracing::info!("the guard is on for {}", self.settings().cgroup),
        }
        *noted = fault;
    }

    fn upkeep(&self) -> MutexGuard<'_, Upkeep> {
        self.upkeep.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn fault(&self) -> MutexGuard<'_, Option<String>> {
        self.fault.lock().unwrap_or_else(PoisonError::into_inner)
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
