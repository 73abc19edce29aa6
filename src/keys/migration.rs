//! How keys are moved from one key manager to another.
//!
//! At every moment each key is in one of the two, and the volumes open as the configuration says:
//!
//! 1. Which keys are to be copied is noted in the database. Nothing else happens.
//! 2. Each is handed to the new key manager with what other hosts have to know of the volume, read back, compared, and
//!    noted as copied. Broken off before that note, the next run finds the same key there, which is fine.
//! 3. The operator names the new key manager in the configuration, and restarts the daemon.
//! 4. Only then, and only when asked to, each old key that was noted as copied is compared once more with the new
//!    one and destroyed, which is recorded before and after. Broken off before that is noted, the next run finds it gone.
//!    [`leaving`] says how other hosts are kept from destroying the new one at the same time.
//!
//! A volume that is retired is moved as the others are, since its key may be needed again. One that was destroyed is passed
//! over; what is left of its key goes in step 4. The key of a volume that only other hosts have enrolled stays where it is,
//! if the new key manager keeps nothing of it that they could ask for.

use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::{Host, Imported, Key, KeyManager, ManagerKind};
use crate::audit::Asker;
use crate::encryptor::VolumeLocks;
use crate::refusal::{Reason, Refusal};
use crate::store::{MoveState, Planned, Store, VolumeRecord, VolumeState};
use crate::volume::VolumeId;

mod copying;
mod leaving;
mod removing;

/// How many keys are worked on at once: a key manager that several hosts ask waits for seconds before it takes one.
const AT_ONCE: usize = 16;
/// Enough for what talks to a key manager, as for the threads of the control socket.
const STACK: usize = 512 << 10;
/// For how long one step goes on with the next keys.
const STEP: Duration = Duration::from_secs(1);

/// From which key manager to which one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Route {
    /// Where the keys are.
    pub from: ManagerKind,
    /// Where they are to be.
    pub to: ManagerKind,
}

/// What is to be done with the keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Aim {
    /// To have them in both.
    Copy,
    /// To destroy the old ones of those that are in both.
    DestroyOld,
}

/// A step of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MigrationStep {
    /// From where to where.
    pub route: Route,
    /// What for.
    pub aim: Aim,
    /// Where to go on; to begin, or to take up what was broken off, if nothing is said.
    pub after: Option<Place>,
}

/// How far a run has come.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Place {
    /// It is planned.
    Start,
    /// This is the last volume that was looked at.
    Volume(VolumeId),
}

/// What came of a step.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MigrationProgress {
    /// Whether an earlier run left something to do; said of the first step.
    pub resumed: bool,
    /// How many keys are left.
    pub remaining: u64,
    /// How many were handed to the new key manager now.
    pub stored: u64,
    /// How many it had already.
    pub present: u64,
    /// How many old ones are gone.
    pub removed: u64,
    /// Of which volumes the keys stay as they are on purpose, and why.
    pub skipped: Vec<String>,
    /// For which volumes it could not be done, and why.
    pub refused: Vec<String>,
    /// Where to go on; nothing when all were looked at.
    pub after: Option<Place>,
}

/// Moves keys between two key managers.
pub struct KeyMigration<'a> {
    store: &'a Store,
    locks: &'a VolumeLocks,
    route: Route,
    source: &'a dyn KeyManager,
    target: &'a dyn KeyManager,
    host: Host,
    step: Duration,
    is_switched: bool,
}

/// What became of one key.
enum Done {
    Imported(Imported),
    Removed,
    Skipped(String),
}

impl<'a> KeyMigration<'a> {
    /// Moves keys from `source` to `target`, as `route` calls them, for the volumes of `store` of `host`. On one volume
    /// nobody else works meanwhile, as `locks` have it.
    ///
    /// # Errors
    /// [`Reason::Configuration`] when one of the two cannot do that.
    pub fn new(
        store: &'a Store,
        locks: &'a VolumeLocks,
        route: Route,
        (source, target): (&'a dyn KeyManager, &'a dyn KeyManager),
        host: Host,
    ) -> Result<Self, Refusal> {
        let cannot = |kind: ManagerKind, what: &str| {
            Refusal::new(
                Reason::Configuration,
                format!("no keys are moved from {} to {}, because {kind} {what}", route.from, route.to),
            )
        };
        if route.from == route.to {
            return Err(cannot(route.to, "is both: name another key manager with --to"));
        }
        let (from, to) = (source.capabilities(), target.capabilities());
        if !(from.lists && from.destroys) {
            return Err(cannot(route.from, "has one key for all volumes, and none that could be moved"));
        }
        if !to.imports {
            return Err(cannot(route.to, "has one key for all volumes, and takes no other"));
        }
        Ok(KeyMigration { store, locks, route, source, target, host, step: STEP, is_switched: false })
    }

    /// The same, where the target is the key manager in use if `is_switched`: the source is told then that this host uses
    /// none of its keys, which nobody else could tell it any more.
    pub fn after_switch(self, is_switched: bool) -> Self {
        KeyMigration { is_switched, ..self }
    }

    /// The same, where a step ends after the first keys.
    #[cfg(test)]
    pub(super) fn in_small_steps(self) -> Self {
        KeyMigration { step: Duration::ZERO, ..self }
    }

    /// Takes a step, of a few seconds at most where the key managers answer.
    ///
    /// # Errors
    /// When no other key could be moved either: a key manager does not answer, or the database cannot be written. What
    /// was done is noted, and the step can be repeated.
    pub fn take(&self, aim: Aim, after: Option<&Place>) -> Result<MigrationProgress, Refusal> {
        if self.is_switched && after.is_none() {
            // Whose old key is held by this host cannot be destroyed; to have the keys copied that does not matter.
            if let Err(refusal) = self.source.note_uses(&HashSet::new()) {
                tracing::warn!(
                    "{} may have it still that this host uses its keys ({refusal}): run the same 'volcrypt key migrate' again",
                    self.route.from
                );
            }
        }
        match (after, aim) {
            (None, Aim::Copy) => self.plan_copies(),
            (None, Aim::DestroyOld) => self.plan_removals(),
            (Some(Place::Start), aim) => self.go_on(aim, None),
            (Some(Place::Volume(volume)), aim) => self.go_on(aim, Some(volume.clone())),
        }
    }

    fn plan_copies(&self) -> Result<MigrationProgress, Refusal> {
        let states = self.states()?;
        let mut progress = MigrationProgress { after: Some(Place::Start), ..MigrationProgress::default() };
        let mut volumes = Vec::new();
        let mut listed = HashSet::new();
        for volume in self.listed()? {
            match states.get(&volume).and_then(|state| self.passed_over(&volume, *state)) {
                Some(word) => progress.skipped.push(word),
                None => volumes.push(volume.clone()),
            }
            listed.insert(volume);
        }
        // A volume of this host's must not lose its key with the old key manager only because that does not list it.
        let others =
            states.into_iter().filter(|(volume, state)| *state != VolumeState::Destroyed && !listed.contains(volume));
        volumes.extend(others.map(|(volume, _)| volume));
        let Planned { resumed, remaining } = self.store.plan_copies(self.route, &volumes)?;
        Ok(MigrationProgress { resumed, remaining, ..progress })
    }

    fn plan_removals(&self) -> Result<MigrationProgress, Refusal> {
        let states = self.states()?;
        let is_destroyed = |volume: &VolumeId| states.get(volume) == Some(&VolumeState::Destroyed);
        let (Planned { resumed, remaining }, others) =
            self.store.plan_removals(self.route, self.listed()?, &is_destroyed)?;
        let mut progress =
            MigrationProgress { resumed, remaining, after: Some(Place::Start), ..MigrationProgress::default() };
        let Route { from, to } = self.route;
        for volume in others {
            let state = states.get(&volume).copied();
            let word = self.stays(&volume, state);
            match word {
                Some(word) => progress.skipped.push(word),
                None => progress.refused.push(format!(
                    "the key of volume {volume} in {from} was not copied to {to} by this host and stays: run 'volcrypt key \
                     migrate --from {from} --to {to}' first"
                )),
            }
        }
        Ok(progress)
    }

    /// The volumes of which the source has usable keys, each once.
    fn listed(&self) -> Result<Vec<VolumeId>, Refusal> {
        let infos = self.source.list()?;
        let mut volumes: Vec<VolumeId> =
            infos.into_iter().filter(|info| !info.destroyed).map(|info| info.volume).collect();
        volumes.sort();
        volumes.dedup();
        Ok(volumes)
    }

    fn states(&self) -> Result<HashMap<VolumeId, VolumeState>, Refusal> {
        Ok(self.store.volumes()?.into_iter().map(|record| (record.id, record.state)).collect())
    }

    /// Why the key of a volume stays where it is, if it does; it has no state without a record here.
    fn stays(&self, volume: &VolumeId, state: Option<VolumeState>) -> Option<String> {
        state.map_or_else(|| self.left_to_others(volume), |state| self.passed_over(volume, state))
    }

    /// Why the key of a volume in such a state stays where it is.
    fn passed_over(&self, volume: &VolumeId, state: VolumeState) -> Option<String> {
        let from = self.route.from;
        match state {
            VolumeState::Enrolled | VolumeState::Retired => None,
            VolumeState::Destroyed => Some(format!(
                "volume {volume} was destroyed, and {from} has a key of it still, which goes with --destroy-old"
            )),
        }
    }

    /// Why the key of a volume stays where it is, if volcrypt has not made it.
    fn is_not_ours(&self, record: &VolumeRecord) -> Option<String> {
        let (volume, key, from) = (&record.id, &record.key, self.route.from);
        let word = || format!("the key {} of volume {volume} was not made by volcrypt, and stays in {from}", key.id);
        (!key.is_own(volume)).then(word)
    }

    /// Why the key of a volume without a record here stays where it is: no other host could ask for it any more.
    fn left_to_others(&self, volume: &VolumeId) -> Option<String> {
        let Route { from, to } = self.route;
        (!self.target.capabilities().describes).then(|| {
            format!(
                "volume {volume} has no record on this host, and {to} keeps none of other hosts: its key stays in {from}"
            )
        })
    }

    fn go_on(&self, aim: Aim, mut after: Option<VolumeId>) -> Result<MigrationProgress, Refusal> {
        let began = Instant::now();
        let state = match aim {
            Aim::Copy => MoveState::Planned,
            Aim::DestroyOld => MoveState::Leaving,
        };
        let mut progress = MigrationProgress::default();
        loop {
            let volumes = self.store.moves(self.route, state, after.as_ref(), AT_ONCE)?;
            let Some(last) = volumes.last().cloned() else {
                progress.after = None;
                break;
            };
            self.together(aim, &volumes, &mut progress)?;
            progress.after = Some(Place::Volume(last.clone()));
            after = Some(last);
            if began.elapsed() >= self.step {
                break;
            }
        }
        progress.remaining = self.store.count_moves(self.route, state)?;
        Ok(progress)
    }

    /// Works on some keys at once.
    fn together(&self, aim: Aim, volumes: &[VolumeId], progress: &mut MigrationProgress) -> Result<(), Refusal> {
        let asker = Asker::current();
        let work = |volume: &VolumeId| {
            asker.clone().ask(|| {
                self.locks.with(volume, || match aim {
                    Aim::Copy => self.copy(volume),
                    Aim::DestroyOld => self.remove(volume),
                })
            })
        };
        let work = &work;
        let outcomes: Vec<Result<Done, Refusal>> = std::thread::scope(|scope| {
            let threads: Vec<_> = volumes
                .iter()
                .map(|volume| {
                    let thread = std::thread::Builder::new().name("migrate".to_owned()).stack_size(STACK);
                    // Without a thread of its own it takes its turn here.
                    thread.spawn_scoped(scope, move || work(volume)).map_err(|_| work(volume))
                })
                .collect();
            let panicked =
                || Err(Refusal::new(Reason::KeyManager, "a key was given up, as the journal says: try again"));
            threads
                .into_iter()
                .map(|thread| match thread {
                    Ok(thread) => thread.join().unwrap_or_else(|_| panicked()),
                    Err(done) => done,
                })
                .collect()
        });
        let mut stopped = None;
        for (volume, outcome) in volumes.iter().zip(outcomes) {
            match outcome {
                Ok(Done::Imported(Imported::Stored)) => progress.stored += 1,
                Ok(Done::Imported(Imported::Present)) => progress.present += 1,
                Ok(Done::Removed) => progress.removed += 1,
                Ok(Done::Skipped(word)) => {
                    self.store.drop_move(volume)?;
                    progress.skipped.push(word);
                }
                Err(refusal) if is_about_all(refusal.reason()) => stopped = Some(refusal),
                Err(refusal) => progress.refused.push(refusal.to_string()),
            }
        }
        match stopped {
            None => Ok(()),
            Some(refusal) => Err(Refusal::new(
                refusal.reason(),
                format!("{refusal}; what was done is noted: run the same command again to go on"),
            )),
        }
    }

    /// Whether the source knows of a key of `volume`, which may be one that it cannot hand out.
    fn lists(&self, volume: &VolumeId) -> Result<bool, Refusal> {
        Ok(self.source.list()?.iter().any(|info| info.volume == *volume))
    }

    fn check_enrolled_with(&self, record: &VolumeRecord, place: ManagerKind, key: &Key) -> Result<(), Refusal> {
        let (volume, expected, found) = (&record.id, record.check_value, key.check_value(&record.id));
        match found == expected {
            true => Ok(()),
            false => Err(Refusal::new(
                Reason::WrongKey,
                format!(
                    "the key of volume {volume} in {place} (check value {found}) is not the one that the volume was enrolled \
                     with ({expected}), and was left as it is: have the right one restored there, and repeat"
                ),
            )),
        }
    }

    /// The refusal of a volume of which both have a key and not the same one.
    fn differing(&self, volume: &VolumeId, key: &Key, why: &dyn std::fmt::Display) -> Refusal {
        let Route { from, to } = self.route;
        let other = match self.target.get(volume) {
            Ok(other) => format!("check value {}", other.check_value(volume)),
            Err(refusal) => refusal.to_string(),
        };
        Refusal::new(
            Reason::WrongKey,
            format!(
                "volume {volume} has a key in {from} (check value {}) and another in {to} ({other}), and both were left as they \
                 are ({why})",
                key.check_value(volume)
            ),
        )
    }
}

/// The key of `volume` in `keys`: the one that its record names, if it has one here.
fn one_key(keys: &dyn KeyManager, volume: &VolumeId, record: Option<&VolumeRecord>) -> Result<Key, Refusal> {
    match record {
        Some(record) => keys.get_enrolled(&record.recorded_key()),
        None => keys.get(volume),
    }
}

/// Whether what went wrong with one key would go wrong with every other.
fn is_about_all(reason: Reason) -> bool {
    matches!(reason, Reason::TimedOut | Reason::StoreUnavailable | Reason::Configuration)
}

#[cfg(test)]
mod tests;
