//! Which hosts use a key: Barbican's consumers.
//!
//! While a volume is mapped on a host, that host is registered as a consumer of its key, with the service `volcrypt`, the
//! host's name and its machine-id. Then Barbican refuses to delete the key, and so does volcrypt on every host. What is
//! mapped is told by the kernel, and what is registered by Barbican, so a daemon that was killed, and a Barbican that did
//! not answer, leave nothing that the next look does not put right.
//!
//! A Barbican that comes back from a backup has forgotten who registered since, and anybody in the project may take a
//! consumer away. So Barbican is asked again and again whether this host is still registered where it uses a key.

use std::collections::{BTreeMap, HashSet};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::BarbicanKeyManager;
use super::answer::NoAnswer;
use super::client::Asking;
use super::messages::{Consumer, Secret};
use super::refusals::About;
use crate::keys::{Host, SecretId};
use crate::refusal::{Reason, Refusal};
use crate::volume::VolumeId;

/// What this program calls itself where it says that it uses a key.
pub(super) const SERVICE: &str = "volcrypt";
/// How many users of a key are named.
const MOST_NAMED: usize = 3;
/// For how long Barbican is believed that this host is registered as a user of a key.
const LOOK_AGAIN: Duration = Duration::from_secs(600);
/// Of how many volumes' keys it is asked at a time: what is mapped meanwhile is registered after that.
const MOST_LOOKED_AT: usize = 100;

/// As whom this host is registered where. Never locked while anything is asked.
#[derive(Default)]
pub(super) struct Registered(Mutex<Book>);

#[derive(Default)]
struct Book {
    /// As whom Barbican was asked where else this host is registered: by an earlier daemon, or in what it was restored from.
    /// A host may get its name only after this runs.
    complete_as: Option<Host>,
    entries: BTreeMap<VolumeId, Vec<Entry>>,
    /// When Barbican last said that those of a volume are there.
    seen: BTreeMap<VolumeId, Instant>,
    /// The secrets of Cinder's that volumes of this host have for keys, by which no name leads to them.
    foreign: BTreeMap<VolumeId, SecretId>,
    /// Those of which Barbican was asked the same.
    asked: HashSet<SecretId>,
}

#[derive(Clone, PartialEq, Eq)]
struct Entry {
    secret: String,
    consumer: Consumer,
}

impl Registered {
    fn book(&self) -> MutexGuard<'_, Book> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add(&self, volume: &VolumeId, secret: &str, consumer: Consumer) {
        let entry = Entry { secret: secret.to_owned(), consumer };
        let mut book = self.book();
        book.seen.insert(volume.clone(), Instant::now());
        let entries = book.entries.entry(volume.clone()).or_default();
        if !entries.contains(&entry) {
            entries.push(entry);
        }
    }

    /// These secrets of Cinder's are the keys of these volumes, and no others.
    pub(super) fn knows(&self, foreign: BTreeMap<VolumeId, SecretId>) {
        self.book().foreign = foreign;
    }

    /// The key of `volume` is this secret now; where it was restored, this host is registered with another one.
    pub(super) fn is_now(&self, volume: &VolumeId, secret: &str) {
        self.book().entries.retain(|of, entries| of != volume || entries.iter().any(|entry| entry.secret == secret));
    }

    /// Where Barbican has not said for long that this host is registered: the volumes in `in_use` of which it last said so
    /// the longest time ago.
    fn to_look_at(&self, in_use: &HashSet<VolumeId>, now: Instant) -> Vec<(VolumeId, Vec<Entry>)> {
        let mut book = self.book();
        let Book { entries, seen, .. } = &mut *book;
        seen.retain(|volume, _| entries.contains_key(volume));
        let mut old: Vec<_> = entries
            .iter()
            .filter(|(volume, _)| in_use.contains(*volume))
            .map(|(volume, entries)| (seen.get(volume).copied(), volume, entries))
            .filter(|(seen, ..)| seen.is_none_or(|seen| now.saturating_duration_since(seen) >= LOOK_AGAIN))
            .collect();
        old.sort_by_key(|(seen, ..)| *seen);
        old.into_iter().take(MOST_LOOKED_AT).map(|(_, volume, entries)| (volume.clone(), entries.clone())).collect()
    }

    /// Barbican was asked again whether this host is registered as a user of the key of `volume`.
    fn was_looked_at(&self, volume: &VolumeId, now: Instant) {
        self.book().seen.insert(volume.clone(), now);
    }

    /// Barbican does not have it any more that this host uses the key of `volume`. It may have been restored: what it has of
    /// others is looked at soon, and so is what it has that was over long ago.
    fn is_lost(&self, volume: &VolumeId) {
        let mut book = self.book();
        book.entries.remove(volume);
        book.seen.clear();
        book.complete_as = None;
        book.asked.clear();
    }

    /// Whether Barbican has not said yet where `host` is registered. What it has said of a host of another name does not
    /// count.
    fn is_to_be_learned_as(&self, host: &Host) -> bool {
        let mut book = self.book();
        let is_unknown = book.complete_as.as_ref() != Some(host);
        if is_unknown {
            book.complete_as = None;
            book.asked.clear();
        }
        is_unknown
    }

    fn remove(&self, volume: &VolumeId, entry: &Entry) {
        let mut book = self.book();
        if let Some(entries) = book.entries.get_mut(volume) {
            entries.retain(|known| known != entry);
            if entries.is_empty() {
                book.entries.remove(volume);
            }
        }
    }
}

/// A host, as a consumer.
impl Host {
    fn consumer(&self) -> Consumer {
        Consumer { service: SERVICE.to_owned(), resource_type: self.name.clone(), resource_id: self.id.clone() }
    }

    /// Whether `consumer` is this host, under the name that it has now: one that was cloned with its machine-id is another.
    fn is(&self, consumer: &Consumer) -> bool {
        *consumer == self.consumer()
    }
}

impl BarbicanKeyManager {
    /// Registers this host where it uses a key and is not registered, and ends that where it uses none any more.
    pub(super) fn settle_uses(&self, in_use: &HashSet<VolumeId>, now: Instant) -> Result<(), Refusal> {
        let host = Host::this();
        self.learn(&host)?;
        self.learn_foreign(&host)?;
        let settled = self.settle_known(in_use, &host);
        if settled.as_ref().is_err_and(is_silence) {
            return settled;
        }
        let (is_any_lost, looked) = self.look_again(in_use, now);
        let again = match is_any_lost && !looked.as_ref().is_err_and(is_silence) {
            true => self.settle_known(in_use, &host),
            false => Ok(()),
        };
        settled.and(looked).and(again)
    }

    /// Asks Barbican whether this host is still registered where it uses keys, if it has not said so for long. Returns
    /// whether it is not, somewhere, and what went wrong first.
    fn look_again(&self, in_use: &HashSet<VolumeId>, now: Instant) -> (bool, Result<(), Refusal>) {
        let (mut is_any_lost, mut first) = (false, Ok(()));
        for (volume, entries) in self.registered.to_look_at(in_use, now) {
            match self.are_registered(&volume, &entries) {
                Ok(true) => {}
                Ok(false) => {
                    tracing::warn!(
                        volume = %volume,
                        "Barbican does not have it any more that this host uses volume {volume}, and is told again"
                    );
                    self.registered.is_lost(&volume);
                    is_any_lost = true;
                }
                Err(refusal) if is_silence(&refusal) => return (is_any_lost, first.and(Err(refusal))),
                Err(refusal) => first = first.and(Err(refusal)),
            }
            self.registered.was_looked_at(&volume, now);
        }
        (is_any_lost, first)
    }

    /// Whether Barbican still has all `entries`, of a volume.
    fn are_registered(&self, volume: &VolumeId, entries: &[Entry]) -> Result<bool, Refusal> {
        for entry in entries {
            match self.client.begin().secret(&entry.secret) {
                Ok(found) if found.consumers.contains(&entry.consumer) => {}
                Ok(_) => return Ok(false),
                Err(NoAnswer::Refused(answered)) if answered.status == 404 => return Ok(false),
                // It is not for this host any more, which could not be registered anew either.
                Err(NoAnswer::Refused(answered)) if answered.status == 403 => {}
                Err(no_answer) => return Err(self.refusal(About::Secret(volume, &entry.secret), no_answer)),
            }
        }
        Ok(true)
    }

    /// Registers this host where the book does not have it, and ends what it has and is over.
    fn settle_known(&self, in_use: &HashSet<VolumeId>, host: &Host) -> Result<(), Refusal> {
        let (missing, surplus) = {
            let book = self.registered.book();
            let missing: Vec<_> = in_use.iter().filter(|volume| !book.entries.contains_key(*volume)).cloned().collect();
            let surplus = book.entries.iter().filter(|(volume, _)| !in_use.contains(*volume));
            let surplus: Vec<_> = surplus.map(|(volume, entries)| (volume.clone(), entries.clone())).collect();
            (missing, surplus)
        };
        let mut first = Ok(());
        let begin = missing.iter().map(|volume| (volume, None));
        let end = surplus.iter().map(|(volume, entries)| (volume, Some(entries)));
        for (volume, entries) in begin.chain(end) {
            let settled = match entries {
                None => self.begin_use(volume, host),
                Some(entries) => self.end_use(volume, entries),
            };
            // What is wrong with one key is not in the way of the others; who does not answer is not asked on.
            let is_silent = settled.as_ref().is_err_and(is_silence);
            first = first.and(settled);
            if is_silent {
                break;
            }
        }
        first
    }

    /// Has Barbican say where this host is registered: once, and again when it turns out that it has forgotten something, or
    /// when the host is called otherwise.
    fn learn(&self, host: &Host) -> Result<(), Refusal> {
        if !self.registered.is_to_be_learned_as(host) {
            return Ok(());
        }
        self.each_page(|secrets| {
            for (volume, secret) in secrets {
                let id = secret.id().map_err(|no_answer| self.refusal(About::Volume(&volume), no_answer))?;
                for consumer in secret.consumers.iter().filter(|consumer| host.is(consumer)) {
                    self.registered.add(&volume, id, consumer.clone());
                }
            }
            Ok(())
        })?;
        self.registered.book().complete_as = Some(host.clone());
        Ok(())
    }

    /// The same of the secrets that are not named as keys of volumes.
    fn learn_foreign(&self, host: &Host) -> Result<(), Refusal> {
        let unknown: Vec<_> = {
            let book = self.registered.book();
            let unknown = book.foreign.iter().filter(|(_, secret)| !book.asked.contains(secret));
            unknown.map(|(volume, secret)| (volume.clone(), secret.clone())).collect()
        };
        for (volume, secret) in unknown {
            match self.client.begin().secret(secret.as_str()) {
                Ok(found) => {
                    for consumer in found.consumers.iter().filter(|consumer| host.is(consumer)) {
                        self.registered.add(&volume, secret.as_str(), consumer.clone());
                    }
                }
                // It is gone, or not for this host any more, which cannot take its registration back then.
                Err(NoAnswer::Refused(answered)) if matches!(answered.status, 403 | 404) => {}
                Err(no_answer) => return Err(self.refusal(About::Foreign(&volume, secret.as_str()), no_answer)),
            }
            self.registered.book().asked.insert(secret);
        }
        Ok(())
    }

    fn begin_use(&self, volume: &VolumeId, host: &Host) -> Result<(), Refusal> {
        let asking = self.client.begin();
        let foreign = self.registered.book().foreign.get(volume).cloned();
        if let Some(secret) = foreign {
            let (id, consumer) = (secret.as_str(), host.consumer());
            let refusal = |no_answer| self.refusal(About::Foreign(volume, id), no_answer);
            asking.consume(id, &consumer).map_err(refusal)?;
            self.registered.add(volume, id, consumer);
            return Ok(());
        }
        let chosen = self.find(&asking, volume)?.into_iter().filter(|found| found.is_chosen);
        let mut is_known = false;
        for found in chosen {
            let consumer = host.consumer();
            asking
                .consume(&found.id, &consumer)
                .map_err(|no_answer| self.refusal(About::Secret(volume, &found.id), no_answer))?;
            self.registered.add(volume, &found.id, consumer);
            is_known = true;
        }
        if is_known { Ok(()) } else { Err(self.no_key(volume)) }
    }

    fn end_use(&self, volume: &VolumeId, entries: &[Entry]) -> Result<(), Refusal> {
        let asking = self.client.begin();
        for entry in entries {
            asking
                .release(&entry.secret, &entry.consumer)
                .map_err(|no_answer| self.refusal(About::Secret(volume, &entry.secret), no_answer))?;
            self.registered.remove(volume, entry);
        }
        Ok(())
    }

    /// Refuses if anybody but this host is registered as a user of one of `secrets`, keys of `volume`.
    pub(super) fn check_used_by_nobody_else(&self, volume: &VolumeId, secrets: &[Secret]) -> Result<(), Refusal> {
        let host = Host::this();
        for secret in secrets {
            let id = secret.id().map_err(|no_answer| self.refusal(About::Volume(volume), no_answer))?;
            let others: Vec<&Consumer> = secret.consumers.iter().filter(|consumer| !host.is(consumer)).collect();
            if let Some(first) = others.first() {
                return Err(self.in_use_elsewhere(volume, id, first, &others));
            }
        }
        Ok(())
    }

    /// The same of keys that are about to be deleted; this host's own registration ends.
    pub(super) fn check_unused(
        &self,
        asking: &mut Asking<'_>,
        volume: &VolumeId,
        secrets: &[Secret],
    ) -> Result<(), Refusal> {
        self.check_used_by_nobody_else(volume, secrets)?;
        let refusal = |no_answer| self.refusal(About::Volume(volume), no_answer);
        for secret in secrets {
            let id = secret.id().map_err(refusal)?;
            for consumer in &secret.consumers {
                asking.renew();
                asking.release(id, consumer).map_err(refusal)?;
                let entry = Entry { secret: id.to_owned(), consumer: consumer.clone() };
                self.registered.remove(volume, &entry);
            }
        }
        Ok(())
    }

    fn in_use_elsewhere(&self, volume: &VolumeId, id: &str, first: &Consumer, others: &[&Consumer]) -> Refusal {
        let named = |consumer: &&Consumer| match consumer {
            consumer if !is_plain(consumer) => "somebody who is called what cannot be shown".to_owned(),
            Consumer { service, resource_type, .. } if service == SERVICE => format!("host {resource_type}"),
            Consumer { service, resource_type, resource_id } => format!("{resource_type} {resource_id} of {service}"),
        };
        let mut names: Vec<String> = others.iter().take(MOST_NAMED).map(named).collect();
        if others.len() > MOST_NAMED {
            names.push(format!("{} more", others.len() - MOST_NAMED));
        }
        let (_, barbican) = self.client.who_and_where();
        let secret = format!("{barbican}/secrets/{id}");
        let Consumer { service, resource_type, resource_id } = first;
        let remedy = match is_plain(first) {
            true => format!(
                "run 'openstack secret consumer delete --service-type-name {service} --resource-type {resource_type} \
                 --resource-id {resource_id} {secret}'"
            ),
            false => format!("have its owner look at the consumers of {secret}"),
        };
        Refusal::new(
            Reason::NotAllowed,
            format!(
                "the key of volume {volume} is in use by {} and was not destroyed: detach the volume there first, or, if nobody \
                 is called so any more, because that user is gone for good or was renamed, {remedy}",
                names.join(", ")
            ),
        )
    }
}

fn is_silence(refusal: &Refusal) -> bool {
    refusal.reason() == Reason::TimedOut
}

/// Whether what a consumer says of itself can stand in a command that somebody may run: anybody in the project may
/// register one.
fn is_plain(consumer: &Consumer) -> bool {
    [&consumer.service, &consumer.resource_type, &consumer.resource_id].into_iter().all(|text| {
        let is_usual = |byte: u8| byte.is_ascii_alphanumeric() || b"._:".contains(&byte);
        // What begins with '-' would be an option.
        text.bytes().next().is_some_and(is_usual) && text.bytes().all(|byte| is_usual(byte) || byte == b'-')
    })
}

#[cfg(test)]
mod tests;
