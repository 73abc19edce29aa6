//! The replacement of the key-encryption key.
//!
//! At every moment each key in the database opens with a key-encryption key that is on the disk:
//!
//! 1. The new one is on the disk, as `kek.new` or as a credential, before the database hears of it. Nothing uses it: to
//!    break off here changes nothing, and the next rotation takes it.
//! 2. The database says, durably, that the new one wraps new keys and the old one is on its way out. Both are read
//!    at every start from now on.
//! 3. Keys are rewrapped, some in a transaction. Each is wrapped by the one that its row names.
//! 4. When the old one wraps nothing any more, also in the file without its log, `kek.new` is renamed to `kek`, which
//!    drops the old one in the same moment, or, with credentials, the file `kek` is removed if that was the old one.
//! 5. The database says that the old one is retired.
//!
//! Broken off after any of these, the next call goes on from there.

use std::time::{Duration, Instant};

use super::EmbeddedKeyManager;
use crate::keys::{CheckValue, KekRotation, KeyEncryptionKey, RotationStep};
use crate::refusal::{Reason, Refusal};
use crate::store::{Keks, Rewrapped, WrappedKey};
use crate::volume::VolumeId;

/// How much is done at once.
pub(super) struct Pace {
    /// How many keys are rewrapped in a transaction. An open that comes meanwhile waits for it.
    pub(super) at_a_time: u32,
    /// For how long one step goes on with the next transaction.
    pub(super) step: Duration,
}

impl Default for Pace {
    fn default() -> Self {
        Pace { at_a_time: 128, step: Duration::from_secs(1) }
    }
}

impl EmbeddedKeyManager {
    /// See [`KeyManager::rotate_kek`](crate::keys::KeyManager::rotate_kek). Not by two threads at once.
    ///
    /// # Errors
    /// [`Reason::NoKey`] when a key-encryption key is missing or unusable, or a key cannot be unwrapped,
    /// [`Reason::Configuration`] when the new one is none that may be taken, [`Reason::StoreUnavailable`] when the
    /// database cannot be written. The step can be repeated.
    pub(super) fn rotate(&self, step: &RotationStep) -> Result<KekRotation, Refusal> {
        match (step, self.store.keks()?) {
            (RotationStep::Begin, Keks { current: Some(old), outgoing: None }) => {
                self.check_not_needed_beside(old)?;
                self.store.begin_kek_rotation(self.places.successor(old)?)?;
                self.under_way(false)
            }
            (RotationStep::Begin, _) => self.under_way(true),
            (RotationStep::GoOn { after }, Keks { outgoing: Some(old), .. }) => self.go_on(old, after.clone()),
            // Another call was quicker.
            (RotationStep::GoOn { .. }, Keks { current, outgoing: None }) => self.finished(current),
        }
    }

    /// Refuses to replace `old`, which is dropped then, while keys that are nowhere else need it: those of a database whose
    /// place a backup has taken.
    fn check_not_needed_beside(&self, old: CheckValue) -> Result<(), Refusal> {
        match self.store.kept_that_needs(old)? {
            None => Ok(()),
            Some((path, what)) => Err(Refusal::new(
                Reason::Configuration,
                format!(
                    "{0} {what}, and the key-encryption key in use ({old}), which would be replaced and removed, may be the one \
                     that opens it: move {0} elsewhere, with a copy of that key-encryption key, or remove it if none of it \
                     is needed, and repeat",
                    path.display()
                ),
            )),
        }
    }

    fn under_way(&self, resumed: bool) -> Result<KekRotation, Refusal> {
        self.reload()?;
        match self.store.keks()? {
            Keks { current: Some(new), outgoing: Some(old) } => {
                let remaining = self.store.count_keys_wrapped_by(old)?;
                Ok(KekRotation::UnderWay { old, new, resumed, remaining, after: None })
            }
            keks => self.finished(keks.current),
        }
    }

    fn go_on(&self, old: CheckValue, mut after: Option<(VolumeId, u32)>) -> Result<KekRotation, Refusal> {
        let began = Instant::now();
        let ring = self.reload()?;
        let new = &ring.current;
        loop {
            let place = after.as_ref().map(|(volume, version)| (volume, *version));
            let records = self.store.keys_wrapped_by(old, place, self.pace.at_a_time)?;
            let Some(last) = records.last() else { break };
            let Some(old_kek) = ring.by(old) else { return Err(self.missing(old)) };
            after = Some((last.info.volume.clone(), last.info.key.version));
            // Without the database, so that opens get their turn. What cannot be unwrapped is passed over.
            let rewrapped = records.into_iter().filter_map(|record| rewrap(old_kek, &new.1, record).transpose());
            self.store.rewrap(new.0, &rewrapped.collect::<Result<Vec<_>, _>>()?)?;
            if began.elapsed() > self.pace.step {
                let remaining = self.store.count_keys_wrapped_by(old)?;
                return Ok(KekRotation::UnderWay { old, new: new.0, resumed: true, remaining, after });
            }
        }
        self.finish(old, new.0)
    }

    fn finish(&self, old: CheckValue, new: CheckValue) -> Result<KekRotation, Refusal> {
        let remaining = self.store.count_keys_wrapped_by(old)?;
        if let Some(WrappedKey { info, .. }) = self.store.keys_wrapped_by(old, None, 1)?.first() {
            return Err(Refusal::new(
                Reason::NoKey,
                format!(
                    "{remaining} keys cannot be unwrapped, the first is that of volume {0}, and the old key-encryption key \
                     stays until they are: restore the database from backup, or run 'volcrypt volume destroy {0}' if it is \
                     not needed any more, and repeat",
                    info.volume
                ),
            ));
        }
        self.rewrap_kept(old)?;
        self.store.merge_before_dropping(old)?;
        self.places.drop_old(old, new)?;
        self.store.finish_kek_rotation()?;
        tracing::info!("the key-encryption key {old} was replaced by {new}");
        self.reload()?;
        self.finished(Some(new))
    }

    fn finished(&self, new: Option<CheckValue>) -> Result<KekRotation, Refusal> {
        let all = self.places.read(true);
        let new = new.and_then(|new| all.iter().find(|found| found.is(new)).map(|found| (new, found.home)));
        let Some((new, home)) = new else { return Err(self.missing(self.ring().current.0)) };
        Ok(KekRotation::Finished { new, home, keys: self.store.count_keys_wrapped_by(new)? })
    }
}

/// `record` as `new` wraps it; nothing if `old` does not unwrap it.
fn rewrap(old: &KeyEncryptionKey, new: &KeyEncryptionKey, record: WrappedKey) -> Result<Option<Rewrapped>, Refusal> {
    let (info, Some(wrapped)) = (&record.info, &record.wrapped) else { return Ok(None) };
    let key = match old.unwrap(&info.volume, info.key.version, info.key_size, wrapped) {
        Ok(key) => key,
        Err(refusal) => {
            tracing::error!(volume = %info.volume, "{refusal}");
            return Ok(None);
        }
    };
    let wrapped = new.wrap(&info.volume, info.key.version, &key)?;
    // Nothing is stored that does not open.
    let read = new.unwrap(&info.volume, info.key.version, info.key_size, &wrapped)?;
    match read.same_as(&key) {
        true => Ok(Some(Rewrapped { record, wrapped })),
        false => Err(Refusal::new(
            Reason::NoKey,
            format!(
                "the key of volume {} is another one once it is rewrapped: check the machine's memory",
                info.volume
            ),
        )),
    }
}
