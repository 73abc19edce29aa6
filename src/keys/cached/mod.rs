//! What stands between this host and a key server: keys that are fetched ahead, and, if the configuration says so, keys
//! that are kept for when the server does not answer.
//!
//! The server is asked first. Only if it does not answer, neither yes nor no, is a kept key used, and only for so long
//! after the server last gave it as the configuration says. Whatever no the server says to a volume's key wipes the kept
//! one at once; what somebody says in its place does not. A server that was found silent is not waited for by whoever
//! could do without: the kept key is used, the server is asked behind it, and once more from time to time, until it
//! answers.

mod cache;
mod clock;
mod held;
mod jobs;
mod silence;

use std::collections::{BTreeMap, HashSet};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak, mpsc};
use std::time::{Duration, Instant};

use self::held::Held;
use self::jobs::Jobs;
use self::silence::Silence;
use super::{
    Capabilities, Description, ForeignSecrets, Imported, KekRotation, KeptKeys, Key, KeyHandle, KeyInfo, KeyManager,
    Leaving, RecordedKey, RotationStep,
};
use crate::refusal::{Reason, Refusal};
use crate::volume::VolumeId;

pub use self::cache::KeyCache;

/// How often kept keys are looked through for those whose time is over.
const TIDY_EVERY: Duration = Duration::from_secs(3600);
/// Enough for TLS and SQLite.
const STACK: usize = 512 << 10;

/// A key server's key manager, with the keys of it that are on this host.
pub struct CachedKeyManager {
    shared: Arc<Shared>,
}

struct Shared {
    server: Box<dyn KeyManager>,
    cache: Cache,
    held: Held,
    silence: Silence,
    jobs: Jobs,
    /// How many keys were given up so far: what was asked for before one was is not kept any more.
    evictions: AtomicU64,
    /// Held by whoever keeps or gives up a key.
    turn: Mutex<()>,
    /// Has the keeper look at what is held, and at a server that was found silent.
    wake: mpsc::Sender<()>,
}

/// Whether keys are kept on the disk.
pub enum Cache {
    /// The configuration does not ask for it.
    Off,
    /// They are.
    On(Box<KeyCache>),
    /// They were to be, but cannot: why, and what to do.
    Faulty(String),
}

impl CachedKeyManager {
    /// The keys of `server`, kept in `cache`.
    pub fn new(server: Box<dyn KeyManager>, cache: Cache) -> Self {
        let (wake, woken) = mpsc::channel();
        let shared = Arc::new(Shared {
            server,
            cache,
            held: Held::default(),
            silence: Silence::default(),
            jobs: Jobs::default(),
            evictions: AtomicU64::new(0),
            turn: Mutex::default(),
            wake,
        });
        let keeper = Arc::downgrade(&shared);
        let started = std::thread::Builder::new().name("key-cache".to_owned()).stack_size(STACK);
        if let Err(error) = started.spawn(move || keep(&keeper, &woken)) {
            tracing::error!("no thread could be started that wipes cached keys in time: {error}");
        }
        CachedKeyManager { shared }
    }
}

/// Wipes what was held or kept for long enough, and asks a silent server again, as long as the key manager lives.
fn keep(shared: &Weak<Shared>, woken: &mpsc::Receiver<()>) {
    let mut tidied = Instant::now();
    let mut pause = TIDY_EVERY;
    while !matches!(woken.recv_timeout(pause), Err(mpsc::RecvTimeoutError::Disconnected)) {
        let Some(shared) = shared.upgrade() else { return };
        let now = Instant::now();
        if now.saturating_duration_since(tidied) >= TIDY_EVERY {
            tidied = now;
            if let Cache::On(cache) = &shared.cache {
                cache.tidy();
            }
        }
        let (wanted, again) = shared.silence.ask_again(now);
        if let Some(wanted) = wanted {
            shared.ask_behind(&wanted, false);
        }
        let expires = shared.held.expire(now).map(|next| next.saturating_duration_since(now));
        let tidy = (tidied + TIDY_EVERY).saturating_duration_since(now);
        pause = [expires, again].into_iter().flatten().fold(tidy, Duration::min);
    }
}

impl Shared {
    /// Asks the server for the key that a record names, and does with kept keys as it says.
    fn ask(&self, wanted: &RecordedKey, hold: impl FnOnce() -> bool) -> Result<Key, Refusal> {
        let (volume, before) = (&wanted.volume, self.evictions.load(Ordering::SeqCst));
        let _question = self.silence.question(wanted, Instant::now());
        match self.server.get_enrolled(wanted) {
            // Another one takes the place of none. Whoever asked sees that it is another one, and says so.
            Ok(key) if key.check_value(volume) != wanted.check_value => {
                self.silence.end(Instant::now());
                self.evict(volume);
                Ok(key)
            }
            Ok(key) => {
                self.given(volume, &wanted.handle, &key, before, hold);
                Ok(key)
            }
            Err(refusal) => {
                self.refused(volume, &refusal);
                Err(refusal)
            }
        }
    }

    /// The server has given the key of `volume` that `handle` names, which it was asked for when `before` keys had been
    /// given up.
    fn given(&self, volume: &VolumeId, handle: &KeyHandle, key: &Key, before: u64, hold: impl FnOnce() -> bool) {
        self.silence.end(Instant::now());
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        // It may be the answer to a question that is older than another one's no.
        if self.evictions.load(Ordering::SeqCst) != before {
            return;
        }
        if hold() {
            self.held.put(volume, handle, key, Instant::now());
            // Without a keeper it is used for a minute all the same.
            let _ = self.wake.send(());
        }
        if let Cache::On(cache) = &self.cache {
            cache.keep(volume, handle, key);
        }
    }

    /// The server has given a key and said of the volume what goes with it.
    fn described(&self, volume: &VolumeId, (key, description): &(Key, Description), before: u64) {
        self.given(volume, &KeyHandle::of(volume, description.key_version()), key, before, || false);
    }

    fn refused(&self, volume: &VolumeId, refusal: &Refusal) {
        match refusal.reason() {
            _ if refusal.is_unanswered() => {
                self.silence.begin(Instant::now());
                let _ = self.wake.send(());
            }
            // Nor is this a no of who decides.
            _ if refusal.is_hearsay() => self.silence.end(Instant::now()),
            Reason::NoKey | Reason::WrongKey | Reason::KeyDestroyed | Reason::KeyRevoked | Reason::NotAllowed => {
                self.silence.end(Instant::now());
                self.evict(volume);
            }
            // Neither yes nor no, and not silence either: what goes on is not known, so no kept key is used.
            _ => self.silence.end(Instant::now()),
        }
    }

    fn evict(&self, volume: &VolumeId) {
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        self.evictions.fetch_add(1, Ordering::SeqCst);
        self.held.remove(volume);
        if let Cache::On(cache) = &self.cache {
            cache.evict(volume);
        }
    }

    /// Has the server asked for the key that a record names while nobody waits.
    fn ask_behind(self: &Arc<Self>, wanted: &RecordedKey, hold: bool) {
        if !self.jobs.add(wanted, hold) {
            return;
        }
        let shared = Arc::clone(self);
        let thread = std::thread::Builder::new().name("key-fetch".to_owned()).stack_size(STACK);
        if let Err(error) = thread.spawn(move || shared.work()) {
            tracing::error!("no thread could be started to ask the key server: {error}");
            self.jobs.give_up();
        }
    }

    fn work(&self) {
        while let Some(wanted) = self.jobs.next() {
            let volume = &wanted.volume;
            let asked = || self.ask(&wanted, || self.jobs.is_to_be_held(volume));
            match catch_unwind(AssertUnwindSafe(asked)) {
                Ok(Ok(_)) => tracing::debug!(volume = %volume, "the key server gave the key of volume {volume}"),
                Ok(Err(refusal)) if refusal.is_unanswered() => tracing::debug!(volume = %volume, "{refusal}"),
                Ok(Err(refusal)) => tracing::warn!(volume = %volume, "volume {volume} would not open now: {refusal}"),
                // It was told of.
                Err(_) => {}
            }
            self.jobs.end(volume);
        }
    }

    /// What the server says to a question for the key that a record names, if it does within `most`. What it says later
    /// counts for whoever asks then.
    fn ask_within(self: &Arc<Self>, wanted: &RecordedKey, most: Duration) -> Option<Result<Key, Refusal>> {
        let (answer, answered) = mpsc::sync_channel(1);
        let (shared, key) = (Arc::clone(self), wanted.clone());
        let thread = std::thread::Builder::new().name("key-fetch".to_owned()).stack_size(STACK);
        // Whoever waited may have gone: then the key is wiped.
        if thread.spawn(move || drop(answer.send(shared.ask(&key, || false)))).is_err() {
            return Some(self.ask(wanted, || false));
        }
        match answered.recv_timeout(most) {
            Ok(answer) => Some(answer),
            Err(mpsc::RecvTimeoutError::Timeout) => None,
            Err(mpsc::RecvTimeoutError::Disconnected) => Some(Err(Refusal::new(
                Reason::KeyManager,
                format!("the key of volume {} was given up, as the journal says: try again", wanted.volume),
            ))),
        }
    }

    fn get(self: &Arc<Self>, wanted: &RecordedKey) -> Result<Key, Refusal> {
        let now = Instant::now();
        if let Some(key) = self.held.get(wanted, now) {
            return Ok(key);
        }
        let Cache::On(cache) = &self.cache else { return self.ask(wanted, || false) };
        let asked = match (cache.load(wanted), self.silence.patience(now)) {
            (Err(_), _) => Some(self.ask(wanted, || false)),
            (Ok(_), Some(most)) => self.ask_within(wanted, most),
            (Ok(_), None) => {
                self.ask_behind(wanted, false);
                None
            }
        };
        let kept = || cache.load(wanted).map(|key| self.tell(&wanted.volume, key));
        match asked {
            Some(Err(refusal)) if refusal.is_unanswered() => kept().map_err(|why| refusal.and(&why)),
            Some(outcome) => outcome,
            // If it is not there any more, the server has said no to somebody else meanwhile.
            None => kept().or_else(|_| self.ask(wanted, || false)),
        }
    }

    fn tell(&self, volume: &VolumeId, key: Key) -> Key {
        tracing::warn!(
            volume = %volume,
            "the key of volume {volume} comes from this host's cache, because no key server answers"
        );
        key
    }
}

impl KeyManager for CachedKeyManager {
    /// The server alone says which of the volume's keys counts now: no kept one is used, and this one is not kept.
    ///
    /// # Errors
    /// Those of the key server's.
    fn get(&self, volume: &VolumeId) -> Result<Key, Refusal> {
        let shared = &self.shared;
        let answer = shared.server.get(volume).inspect_err(|refusal| shared.refused(volume, refusal));
        answer.inspect(|_| shared.silence.end(Instant::now()))
    }

    /// # Errors
    /// Those of the key server's; if it does not answer, that neither is there a kept key.
    fn get_enrolled(&self, key: &RecordedKey) -> Result<Key, Refusal> {
        self.shared.get(key)
    }

    /// # Errors
    /// Those of the key server's.
    fn create(&self, volume: &VolumeId, wanted: &Description) -> Result<(Key, Description), Refusal> {
        let shared = &self.shared;
        let before = shared.evictions.load(Ordering::SeqCst);
        shared
            .server
            .create(volume, wanted)
            .inspect(|created| shared.described(volume, created, before))
            .inspect_err(|refusal| shared.refused(volume, refusal))
    }

    /// # Errors
    /// Those of the key server's.
    fn described(&self, volume: &VolumeId) -> Result<Option<(Key, Description)>, Refusal> {
        let shared = &self.shared;
        let before = shared.evictions.load(Ordering::SeqCst);
        let described = shared.server.described(volume).inspect_err(|refusal| shared.refused(volume, refusal))?;
        match &described {
            Some(described) => shared.described(volume, described, before),
            None => shared.evict(volume),
        }
        Ok(described)
    }

    /// # Errors
    /// Those of the key server's. What is kept here is wiped in any case.
    fn destroy(&self, volume: &VolumeId) -> Result<(), Refusal> {
        self.shared.evict(volume);
        let destroyed = self.shared.server.destroy(volume);
        // Somebody may have been given it meanwhile.
        self.shared.evict(volume);
        destroyed
    }

    /// # Errors
    /// Those of the key server's.
    fn list(&self) -> Result<Vec<KeyInfo>, Refusal> {
        self.shared.server.list()
    }

    /// # Errors
    /// Those of the key server's.
    fn import(&self, volume: &VolumeId, key: &Key, description: &Description) -> Result<Imported, Refusal> {
        self.shared.server.import(volume, key, description)
    }

    fn capabilities(&self) -> Capabilities {
        self.shared.server.capabilities()
    }

    fn records_destruction(&self) -> bool {
        self.shared.server.records_destruction()
    }

    /// # Errors
    /// Those of the key server's. What is kept here is wiped in any case.
    fn forget(&self, volume: &VolumeId) -> Result<(), Refusal> {
        self.shared.evict(volume);
        let forgotten = self.shared.server.forget(volume);
        // Somebody may have been given it meanwhile.
        self.shared.evict(volume);
        forgotten
    }

    /// # Errors
    /// Those of the key server's.
    fn leaving(&self, volume: &VolumeId) -> Result<Option<Leaving>, Refusal> {
        self.shared.server.leaving(volume)
    }

    /// # Errors
    /// Those of the key server's.
    fn note_leaving(&self, volume: &VolumeId, leaving: Option<&Leaving>) -> Result<(), Refusal> {
        self.shared.server.note_leaving(volume, leaving)
    }

    /// # Errors
    /// Those of the key server's.
    fn check_destroyable(&self, volume: &VolumeId) -> Result<(), Refusal> {
        self.shared.server.check_destroyable(volume)
    }

    /// # Errors
    /// Those of the key server's.
    fn check_everywhere(&self, volume: &VolumeId, key: &Key) -> Result<(), Refusal> {
        self.shared.server.check_everywhere(volume, key)
    }

    fn seen_after(&self) -> Duration {
        self.shared.server.seen_after()
    }

    /// # Errors
    /// Those of the key server's.
    fn note_uses(&self, in_use: &HashSet<VolumeId>) -> Result<(), Refusal> {
        self.shared.server.note_uses(in_use)
    }

    /// # Errors
    /// Those of the embedded key manager's, if keys are kept.
    fn rotate_kek(&self, step: &RotationStep) -> Result<KekRotation, Refusal> {
        match &self.shared.cache {
            Cache::On(cache) => cache.keks().rotate_kek(step),
            Cache::Off | Cache::Faulty(_) => self.shared.server.rotate_kek(step),
        }
    }

    fn foreign(&self) -> Option<&dyn ForeignSecrets> {
        self.shared.server.foreign()
    }

    fn fetch_ahead(&self, key: &RecordedKey) {
        let shared = &self.shared;
        let now = Instant::now();
        // A silent server is asked by whoever needs the key, and from time to time.
        if shared.held.get(key, now).is_none() && shared.silence.patience(now).is_some() {
            shared.ask_behind(key, true);
        }
    }

    fn wipe_copy(&self, volume: &VolumeId) {
        self.shared.evict(volume);
    }

    fn kept(&self) -> Option<KeptKeys> {
        let (lifetime, until) = match &self.shared.cache {
            Cache::Off => (Duration::ZERO, Ok(BTreeMap::new())),
            Cache::On(cache) => (cache.lifetime(), cache.until()),
            Cache::Faulty(fault) => (Duration::ZERO, Err(fault.clone())),
        };
        let (until, fault) = match until {
            Ok(until) => (until, None),
            Err(fault) => (BTreeMap::new(), Some(fault)),
        };
        Some(KeptKeys { lifetime, until, fault })
    }
}

#[cfg(test)]
mod tests;
