//! What is decided and done for a volume, whoever asks: a guest's open, the hook, or an operator.

mod ahead;
mod authorisation;
mod cache;
mod copies;
mod elsewhere;
mod enrolment;
mod foreign;
mod holding;
mod lifecycle;
mod mapped;
mod migration;
mod policy;
mod readiness;
mod sharing;

use std::cell::Cell;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, PoisonError};

use rustix::fs::OFlags;

pub use self::authorisation::Guest;
use self::authorisation::known;
use self::cache::{open_cache, open_store};
pub use self::copies::Doubt;
pub use self::holding::Finder;
use self::policy::Policy;
pub use self::readiness::Ready;
use super::auditing::RefusalLimit;
use super::devices::Devices;
use super::holds::{HELD_FOR, Holds};
use super::in_use::InUse;
use super::pool::while_waiting;
use super::restoring::Restoring;
use super::uses::UseLimit;
use crate::audit::Asker;
use crate::domain::{Facts, Requester};
use crate::encryptor::{MappingSpec, VolumeEncryptor, VolumeLocks};
use crate::guest::Domains;
use crate::keys::barbican::BarbicanKeyManager;
use crate::keys::cached::CachedKeyManager;
use crate::keys::kmip::KmipKeyManager;
use crate::keys::{EmbeddedKeyManager, Key, KeyFileManager, KeyManager, OneKeyForEveryVolume};
use crate::policy::{Config, ConfigError, Decision, KeyCacheConfig, KeyManagerConfig, Protection};
use crate::refusal::{Reason, Refusal};
use crate::store::{EnrolledDevice, Store, VolumeRecord};
use crate::volume::{DeviceNumber, Identity, Portrait, VolumeId};

/// Holds the policy, the keys and the mappings together.
pub struct Broker {
    policy: Policy,
    devices: Box<dyn Devices>,
    domains: Box<dyn Domains>,
    encryptor: Box<dyn VolumeEncryptor>,
    vault: Mutex<Option<Arc<Vault>>>,
    enrolling: VolumeLocks,
    migrating: Mutex<()>,
    refusals: RefusalLimit,
    uses: Arc<UseLimit>,
    merging: Arc<AtomicBool>,
    holds: Arc<Holds>,
    in_use: InUse,
    restoring: Restoring,
}

/// The database and the key manager, once both could be opened.
pub struct Vault {
    /// The enrolled volumes.
    pub store: Arc<Store>,
    /// Their keys.
    pub keys: Box<dyn KeyManager>,
}

/// What becomes of a block device that a guest opens.
#[derive(Debug)]
pub enum Verdict {
    /// Nothing encrypts it.
    LetThrough,
    /// It stands on a mapping: it is let through.
    OnMapping,
    /// It is the mapping of the volume itself, and this is the host's own node of it, opened. QEMU's locks are a node's, and
    /// each guest has one of its own: by these, two guests would not notice each other.
    Named(VolumeId, OwnedFd),
    /// It is protected: this is the opened mapping of the volume, and when the key server last gave its key, if that had to
    /// come from the cache.
    Mapping(VolumeId, OwnedFd, Option<i64>),
}

/// Whether who opens a device with `flags` can write to it.
fn writes(flags: OFlags) -> bool {
    flags.intersects(OFlags::WRONLY | OFlags::RDWR)
}

impl Broker {
    /// A broker that works by `config`. With a faulty configuration it refuses every block device:
    /// which of them are protected is not known then.
    pub fn new(
        config: Result<Config, ConfigError>,
        devices: Box<dyn Devices>,
        domains: Box<dyn Domains>,
        encryptor: Box<dyn VolumeEncryptor>,
    ) -> Self {
        let policy = Policy::new(config);
        let (vault, enrolling, migrating) = (Mutex::default(), VolumeLocks::default(), Mutex::default());
        let (refusals, uses, merging) = (RefusalLimit::default(), Arc::default(), Arc::default());
        let holds = Arc::new(Holds::new(HELD_FOR));
        let (in_use, restoring) = (InUse::default(), Restoring::default());
        Broker {
            policy,
            devices,
            domains,
            encryptor,
            vault,
            enrolling,
            migrating,
            refusals,
            uses,
            merging,
            holds,
            in_use,
            restoring,
        }
    }

    /// The domains that are being restored from files.
    pub fn restoring(&self) -> &Restoring {
        &self.restoring
    }

    /// The maker of mappings.
    pub fn encryptor(&self) -> &dyn VolumeEncryptor {
        self.encryptor.as_ref()
    }

    /// What was refused lately.
    pub(super) fn refusals(&self) -> &RefusalLimit {
        &self.refusals
    }

    /// Which keys were used lately.
    pub(super) fn uses(&self) -> &Arc<UseLimit> {
        &self.uses
    }

    /// The same with other limits for the records of keys' uses.
    #[cfg(test)]
    pub(super) fn limiting_uses(self, uses: UseLimit) -> Self {
        Broker { uses: Arc::new(uses), ..self }
    }

    /// The same with other keys.
    #[cfg(test)]
    pub(super) fn with_keys(self, keys: Box<dyn KeyManager>) -> Self {
        let store = Arc::clone(&self.vault().unwrap().store);
        Broker { vault: Mutex::new(Some(Arc::new(Vault { store, keys }))), ..self }
    }

    /// Whether a volume was opened of which a key manager may have to be told.
    pub(super) fn in_use(&self) -> &InUse {
        &self.in_use
    }

    /// Whether the audit records are about to be merged.
    pub(super) fn merging(&self) -> &Arc<AtomicBool> {
        &self.merging
    }

    /// Opens `device` for `guest`: through its mapping if it is protected. `permitted` says whether
    /// the guest may open the device's node at all.
    ///
    /// # Errors
    /// When the volume must not or cannot be opened.
    pub fn open(
        &self,
        device: DeviceNumber,
        permitted: bool,
        flags: OFlags,
        guest: &dyn Requester,
    ) -> Result<Verdict, Refusal> {
        let config = self.config()?;
        let identity = self.devices.identify(device)?;
        let protection = self.protection(&config, &identity, guest)?;
        let on_mapping = self.use_mappings(&identity, permitted, guest)?;
        match protection {
            None if on_mapping => self.open_named(&identity, flags, guest),
            None => Ok(Verdict::LetThrough),
            Some(protection) => {
                let asker = Asker::current().known_as(guest.facts());
                let opened = asker.ask(|| self.open_protected(&identity, &protection, permitted, flags, guest));
                opened.map_err(|refusal| refusal.of(&protection.volume))
            }
        }
    }

    fn open_protected(
        &self,
        identity: &Identity,
        protection: &Protection<'_>,
        permitted: bool,
        flags: OFlags,
        guest: &dyn Requester,
    ) -> Result<Verdict, Refusal> {
        let volume = &protection.volume;
        if !permitted {
            let sentence =
                format!("{identity} is the protected volume {volume}, and libvirt has not given it to this QEMU");
            return Err(Refusal::new(Reason::NotAllowed, sentence));
        }
        if identity.read_only && writes(flags) {
            let sentence = format!("volume {volume} on {identity} can only be read: mark the disk <readonly/>");
            return Err(Refusal::new(Reason::NotAllowed, sentence));
        }
        let domain = known(guest, volume)?;
        let record = self.record(identity, protection, domain)?;
        self.authorise(&record, domain)?;
        let spec = MappingSpec {
            record: &record,
            profile: protection.profile,
            device: identity.number,
            size_bytes: identity.size,
            read_only: identity.read_only,
        };
        // Whoever opens the same volume waits for the same key.
        let cached_since = Cell::new(None);
        let key = || self.key(&record).inspect(|key| cached_since.set(key.from_cache()));
        let opened = while_waiting(|| self.encryptor.open(&spec, flags, &key))?;
        self.in_use.opened();
        self.check_locks_meet(volume, Some(identity.number), &opened, flags, guest)?;
        // The device number may have been given to another device while all this went on; the
        // mapping holds it now, so what is there now stays.
        self.check_device(&self.devices.identify(identity.number)?, &record)?;
        // So may the volume have been retired, destroyed or given to somebody else.
        match self.vault()?.store.volume(volume)? == Some(record) {
            true => Ok(Verdict::Mapping(volume.clone(), opened.descriptor, cached_since.get())),
            false => Err(Refusal::new(Reason::NoKey, format!("volume {volume} was changed while it was being opened"))),
        }
    }

    /// Decides on a device that passes SCSI commands to `device`: around any encryption.
    ///
    /// # Errors
    /// When `device` is protected.
    pub fn pass_commands(&self, device: DeviceNumber, guest: &dyn Requester) -> Result<Verdict, Refusal> {
        let (config, identity) = (self.config()?, self.devices.identify(device)?);
        match self.protection(&config, &identity, guest)? {
            None => Ok(Verdict::LetThrough),
            Some(protection) => Err(Refusal::new(
                Reason::NotAllowed,
                format!(
                    "{identity} is the protected volume {}, and a SCSI host device would pass commands around its \
                     encryption: give it to the guest as a disk",
                    protection.volume
                ),
            )
            .of(&protection.volume)),
        }
    }

    /// Whether `identity` is protected from `requester`. Nothing is made ready, and the volume need not be enrolled.
    ///
    /// # Errors
    /// When `requester` must not have the device.
    pub fn judge(&self, identity: &Identity, requester: &dyn Requester) -> Result<Option<VolumeId>, Refusal> {
        let config = self.config()?;
        Ok(self.protection(&config, identity, requester)?.map(|protection| protection.volume))
    }

    /// How `identity` is protected from `requester`; nothing if it passes, which no enrolled volume does unless a
    /// rule says so.
    fn protection<'a>(
        &self,
        config: &'a Config,
        identity: &Identity,
        requester: &dyn Requester,
    ) -> Result<Option<Protection<'a>>, Refusal> {
        match config.decide(identity, requester) {
            Decision::Protect(protection) => Ok(Some(protection)),
            Decision::Refuse(refusal) => Err(refusal),
            Decision::Pass => self.check_not_enrolled(config, identity, requester).map(|()| None),
        }
    }

    /// What the kernel says of `device`.
    ///
    /// # Errors
    /// When it is gone.
    pub fn identify(&self, device: DeviceNumber) -> Result<Identity, Refusal> {
        self.devices.identify(device)
    }

    /// All that is known of `device`.
    ///
    /// # Errors
    /// When it is gone.
    pub fn portray(&self, device: DeviceNumber) -> Result<Portrait, Refusal> {
        self.devices.portray(device)
    }

    /// The database and the key manager. Both are opened when first needed, and tried again until
    /// that succeeds.
    ///
    /// # Errors
    /// When either cannot be opened.
    pub fn vault(&self) -> Result<Arc<Vault>, Refusal> {
        let mut vault = self.vault.lock().unwrap_or_else(PoisonError::into_inner);
        match &*vault {
            Some(vault) => Ok(Arc::clone(vault)),
            None => {
                let config = self.config()?;
                let opened = Arc::new(Vault::open(&config.key_manager, &config.key_cache)?);
                Ok(Arc::clone(vault.insert(opened)))
            }
        }
    }

    /// The record of the protected volume on `identity`; enrols it for the owner of `domain` if its rule
    /// says so.
    fn record(
        &self,
        identity: &Identity,
        protection: &Protection<'_>,
        domain: &Facts,
    ) -> Result<VolumeRecord, Refusal> {
        let volume = &protection.volume;
        match self.present_record(identity, volume)? {
            Some(record) => Ok(record),
            None if protection.create_keys => self.enrol_as(identity, protection, None, domain.owner.as_deref()),
            None => Err(Refusal::new(
                Reason::NoKey,
                format!(
                    "volume {volume} on {identity} has no key and rule {:?} does not create keys: run 'volcrypt volume \
                     enrol {identity}' if it is new and blank",
                    protection.rule.name()
                ),
            )),
        }
    }

    /// The record of the volume on `identity`, if it has one here or on another host that asks the same key manager: it
    /// may be used, and this is its device.
    fn present_record(&self, identity: &Identity, volume: &VolumeId) -> Result<Option<VolumeRecord>, Refusal> {
        let Some(record) = self.vault()?.store.volume(volume)? else { return self.adopt(identity, volume) };
        self.check_state(identity, &record)?;
        self.check_device(identity, &record)?;
        Ok(Some(record))
    }

    /// Whether `identity` is the device that the volume was enrolled on.
    fn check_device(&self, identity: &Identity, record: &VolumeRecord) -> Result<(), Refusal> {
        let VolumeRecord { id, device: enrolled, size_bytes, .. } = record;
        let found = enrolled_device(identity.at_address(enrolled.iscsi_target.as_deref(), enrolled.lun));
        let address = || {
            let target = differing("iSCSI target", &enrolled.iscsi_target, &found.iscsi_target);
            target.or_else(|| differing("LUN", &enrolled.lun, &found.lun))
        };
        let differs = [
            if is_another_way(identity, enrolled) { None } else { address() },
            differing("WWID", &enrolled.wwid, &found.wwid),
            differing("device-mapper UUID", &enrolled.dm_uuid, &found.dm_uuid),
        ];
        if let Some(difference) = differs.into_iter().flatten().next() {
            let sentence = format!(
                "{identity} is not the device that volume {id} was enrolled on: {difference}; nothing was written to it"
            );
            return Err(Refusal::new(Reason::ForeignData, sentence));
        }
        if identity.size < *size_bytes {
            let sentence = format!(
                "{identity} has {} bytes, and volume {id} had {size_bytes} when it was enrolled: a volume may grow but \
                 not shrink; nothing was written to it",
                identity.size
            );
            return Err(Refusal::new(Reason::ForeignData, sentence));
        }
        Ok(())
    }

    /// The key that `record` was made for, and no other.
    pub fn key(&self, record: &VolumeRecord) -> Result<Key, Refusal> {
        let id = &record.id;
        let vault = self.vault()?;
        // A key server may take its time.
        let key = while_waiting(|| vault.keys.get_enrolled(&record.recorded_key()))?;
        if key.bits() != record.key_size.bits() as usize {
            let sentence = format!(
                "the key of volume {id} has {} bits and not the {} it was enrolled with: restore the right key",
                key.bits(),
                record.key_size.bits()
            );
            return Err(Refusal::new(Reason::WrongKey, sentence));
        }
        if key.check_value(id) != record.check_value {
            let sentence = format!(
                "the key manager's key for volume {id} is not the one it was enrolled with: restore the right key"
            );
            return Err(Refusal::new(Reason::WrongKey, sentence));
        }
        Ok(key)
    }
}

impl Vault {
    fn open(config: &KeyManagerConfig, cache: &KeyCacheConfig) -> Result<Self, Refusal> {
        let is_server = config.server().is_some();
        let store = match is_server {
            true => Arc::new(Store::open(config.directory())?),
            false => open_store(config.directory())?,
        };
        if let KeyManagerConfig::KeyFile { file } = config {
            tracing::warn!("every volume is encrypted with the one key in {}: this protects nothing", file.display());
        }
        let keys = Vault::keys(config, &store)?;
        if !is_server {
            return Ok(Vault { store, keys });
        }
        let cache = open_cache(&store, credentials().as_deref(), config, cache);
        Ok(Vault { store, keys: Box::new(CachedKeyManager::new(keys, cache)) })
    }

    /// The key manager that `config` names, beside `store`.
    fn keys(config: &KeyManagerConfig, store: &Arc<Store>) -> Result<Box<dyn KeyManager>, Refusal> {
        Ok(match config {
            KeyManagerConfig::Embedded { directory } => {
                Box::new(EmbeddedKeyManager::open(Arc::clone(store), credentials().as_deref(), directory)?)
            }
            KeyManagerConfig::Kmip { kmip, .. } => Box::new(KmipKeyManager::new(kmip.clone())),
            KeyManagerConfig::Barbican { barbican, .. } => Box::new(BarbicanKeyManager::new(barbican.as_ref().clone())),
            KeyManagerConfig::KeyFile { file } => Box::new(KeyFileManager::open(file, OneKeyForEveryVolume)?),
        })
    }
}

/// Where systemd puts what it was given as credentials.
fn credentials() -> Option<std::path::PathBuf> {
    std::env::var_os("CREDENTIALS_DIRECTORY").map(std::path::PathBuf::from)
}

fn enrolled_device(identity: &Identity) -> EnrolledDevice {
    EnrolledDevice {
        iscsi_target: identity.iscsi.as_ref().map(|iscsi| iscsi.target.clone()),
        lun: identity.lun,
        wwid: identity.wwid.clone(),
        // That of a multipath map is its WWID, and the volume is the same one without the map.
        dm_uuid: identity
            .mapping
            .as_ref()
            .filter(|mapping| !mapping.is_multipath() && !mapping.uuid.is_empty())
            .map(|mapping| mapping.uuid.clone()),
    }
}

/// Whether target and LUN say only by which way an array shows the volume. The WWID is the volume's own; what is
/// a map over several targets, or was enrolled as one (no target in common), has more than one way. A target
/// and LUN that lead to another WWID are none of them: the numbers are given to new volumes.
fn is_another_way(identity: &Identity, enrolled: &EnrolledDevice) -> bool {
    let enrolled_as_map = enrolled.iscsi_target.is_none() && identity.iscsi.is_some();
    enrolled.wwid.is_some() && identity.wwid == enrolled.wwid && (identity.is_multipath() || enrolled_as_map)
}

fn differing<T: std::fmt::Debug + PartialEq>(what: &str, enrolled: &Option<T>, found: &Option<T>) -> Option<String> {
    let enrolled = enrolled.as_ref()?;
    match found {
        Some(found) if found == enrolled => None,
        Some(found) => Some(format!("its {what} was {enrolled:?} and is {found:?}")),
        None => Some(format!("its {what} was {enrolled:?} and is not reported now")),
    }
}

/// The refusal for a path that an operator or libvirt gave and that cannot be used.
pub fn no_such_device(path: &Path, error: &io::Error) -> Refusal {
    let shown = path.display();
    let sentence = match error.raw_os_error() {
        Some(libc::ENOTBLK) => {
            format!("{shown} is no block device: give the device of an iSCSI volume, for example /dev/sda")
        }
        Some(libc::ENOENT) => format!("{shown} does not exist: log in to its target first"),
        _ => format!("{shown} cannot be looked at: {error}"),
    };
    Refusal::new(Reason::DeviceGone, sentence)
}
