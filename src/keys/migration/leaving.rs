//! How a key that two key managers have is destroyed in one of them.
//!
//! Other hosts may move the same key in the opposite direction at the same moment. They compare the same two copies and
//! find them alike, so comparing does not keep two hosts from destroying one copy each. Therefore a host
//!
//! 1. marks the copy that it is about to destroy, unless another host has, and waits until every host that asks sees the
//!    mark;
//! 2. reads its mark again. Of two hosts that move the key in the same direction at once, one may have set its mark in the
//!    place of the other's: the one whose mark is gone gives up;
//! 3. looks at the other copy: it has no mark, whoever's, and after that it is there and is the same key;
//! 4. notes in its mark that the key manager is asked to destroy the key, and asks it.
//!
//! If the third step fails, or the key manager would not destroy the key because another host uses it, it takes its mark
//! back and destroys nothing.
//!
//! Why no two hosts destroy both copies: say that one host came through the third step with its mark on A, and another one
//! with its mark on B. Take the one whose mark was set last. When it looked at the other copy, after that, the mark there
//! had been set for long enough to be seen, and it still stood: a mark is taken back by its own host alone, which does not
//! do that once it came through. So it saw the mark, or no copy any more, and did not come through. With more than two key
//! managers in a circle, each mark on the way round would have to be later than the one before it.
//!
//! A mark that was set in the place of another host's, which came through, is not taken back either: whoever took longer
//! than [`PROMPTLY`] to set it leaves it, and one that was set sooner is seen by the other host in the second step.
//!
//! That takes a server that sets and takes back marks within the time that is waited for, or not at all. A destruction may
//! come about as late as it likes: a mark that says that it was asked for is never taken back.
//!
//! A host that ends in between leaves its mark, which is in nobody's way who uses the key, and goes on with it when it is
//! told to move the key again. To copy the key to where the mark is says that it is to stay there: the host that has set
//! the mark takes it back then.
//!
//! The database has keys for its own host alone, and no marks. From the look at the other copy to the destruction that host
//! does nothing else with the volume.

use std::thread;
use std::time::{Duration, Instant};

use super::{KeyMigration, ManagerKind};
use crate::audit::{Event, Kind};
use crate::keys::{Key, Leaving};
use crate::refusal::{Reason, Refusal};
use crate::volume::VolumeId;

/// How long it may take from the look that there is no mark until there is one that can be taken back. In tests hosts
/// wait for their turns in between.
const PROMPTLY: Duration = Duration::from_secs(if cfg!(test) { 60 } else { 1 });

/// A mark that this host has set.
struct Mark {
    leaving: Leaving,
    /// Whether it can be taken back: no other host's may have been in its place.
    is_fresh: bool,
}

impl KeyMigration<'_> {
    /// Destroys the key of `volume` in the source, of which the target has `copy`, which is the same.
    pub(super) fn leave(&self, volume: &VolumeId, copy: &Key) -> Result<(), Refusal> {
        let mark = self.mark(volume)?;
        let destroyable = self.check_stays(volume, copy).and_then(|()| self.source.check_destroyable(volume));
        if let Err(refusal) = destroyable {
            if mark.is_some_and(|mark| mark.is_fresh)
                && let Err(other) = self.source.note_leaving(volume, None)
            {
                return Err(refusal.and(&format!("its mark in {} stays ({other})", self.route.from)));
            }
            return Err(refusal);
        }
        let detail = format!("in {}; {} has the same", self.route.from, self.route.to);
        self.store.append_audit(Event::new(Kind::DestructionStarted, volume, &detail))?;
        if let Some(Mark { leaving, .. }) = mark.filter(|mark| !mark.leaving.is_asked) {
            self.source.note_leaving(volume, Some(&Leaving { is_asked: true, ..leaving }))?;
        }
        self.forget(volume, detail)
    }

    /// Marks the key of `volume` in the source as one that this host is about to destroy, where other hosts see it.
    fn mark(&self, volume: &VolumeId) -> Result<Option<Mark>, Refusal> {
        let (from, to) = (self.route.from, self.route.to);
        if !self.source.capabilities().describes {
            return Ok(None);
        }
        let others = |mark: &Leaving| self.left_to(volume, (from, to), mark, "nothing was destroyed here");
        let looked = Instant::now();
        let before = self.source.leaving(volume)?;
        if let Some(other) = before.as_ref().filter(|other| !other.is_of(&self.host)) {
            return Err(others(other));
        }
        let is_asked = before.as_ref().is_some_and(|own| own.is_asked);
        let leaving = Leaving { host: self.host.clone(), is_asked };
        self.source.note_leaving(volume, Some(&leaving))?;
        let is_fresh = before.is_none() && looked.elapsed() <= PROMPTLY;
        thread::sleep(self.source.seen_after());
        match self.source.leaving(volume)? {
            Some(own) if own.is_of(&self.host) => Ok(Some(Mark { leaving, is_fresh })),
            Some(other) => Err(others(&other)),
            None => Err(Refusal::new(
                Reason::KeyManager,
                format!(
                    "{from} has lost the mark that the key of volume {volume} is about to be destroyed there, so nothing was \
                     destroyed: repeat, and have its administrator look into its log if that does not help"
                ),
            )),
        }
    }

    /// Whether the target has `copy` of the key of `volume`, and nobody is about to destroy that.
    fn check_stays(&self, volume: &VolumeId, copy: &Key) -> Result<(), Refusal> {
        let (from, to) = (self.route.from, self.route.to);
        if let Some(mark) = self.target.leaving(volume)? {
            return Err(self.left_to(volume, (to, from), &mark, "nothing was destroyed here"));
        }
        match self.target.get(volume) {
            Ok(key) if key.same_as(copy) => self.target.check_everywhere(volume, copy),
            Ok(_) => Err(self.differing(volume, copy, &"nothing was destroyed")),
            Err(refusal) => Err(self.not_there_any_more(volume, refusal)),
        }
    }

    /// Has the key of `volume` stay in the target, to which it was copied.
    pub(super) fn keep(&self, volume: &VolumeId) -> Result<(), Refusal> {
        let (from, to) = (self.route.from, self.route.to);
        match self.target.leaving(volume)? {
            None => Ok(()),
            Some(mark) if mark.is_of(&self.host) && !mark.is_asked => self.target.note_leaving(volume, None),
            Some(mark) => Err(self.left_to(volume, (to, from), &mark, "it does not count as copied")),
        }
    }

    /// The refusal of what another host's work in `place` is in the way of; the key is in `other` as well.
    fn left_to(
        &self,
        volume: &VolumeId,
        (place, other): (ManagerKind, ManagerKind),
        mark: &Leaving,
        so: &str,
    ) -> Refusal {
        let host = match mark.is_of(&self.host) {
            true => "this host".to_owned(),
            false => format!("host {}", mark.host.name),
        };
        let back = match mark.is_asked {
            true => String::new(),
            false => format!(
                ", or run 'volcrypt key migrate --from {other} --to {place}' there if the key is to stay in {place}"
            ),
        };
        Refusal::new(
            Reason::NotAllowed,
            format!(
                "{host} has begun to destroy the key of volume {volume} in {place}, so {so}: have 'volcrypt key migrate --from \
                 {place} --to {other} --destroy-old' come to its end on {host}{back}"
            ),
        )
    }
}
