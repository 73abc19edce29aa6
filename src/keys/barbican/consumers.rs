//! Which hosts use a key: Barbican's consumers.
//!
//! While a volume is mapped on a host, that host is registered as a consumer of its key, with the service `volcrypt`, the
//! host's name and its machine-id. Then Barbican refuses to delete the key, and so does volcrypt on every host. What is
//! mapped is told by the kernel, and what is registered by Barbican, so a daemon that was killed, and a Barbican that did
//! not answer, leave nothing that the next look does not put right.

use std::collections::{BTreeMap, HashSet};
use std::sync::{Mutex, MutexGuard, PoisonError};

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

/// As whom this host is registered where. Never locked while anything is asked.
#[derive(Default)]
pub(super) struct Registered(Mutex<Book>);

#[derive(Default)]
struct Book {
    /// Whether Barbican was asked what an earlier daemon has registered.
    is_complete: bool,
    entries: BTreeMap<VolumeId, Vec<Entry>>,
    /// The secrets of Cinder's that volumes of this host have for keys, by which no name leads to them.
    foreign: BTreeMap<VolumeId, SecretId>,
    /// Those of which Barbican was asked what an earlier daemon has registered.
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

    fn is(&self, consumer: &Consumer) -> bool {
        consumer.service == SERVICE && consumer.resource_id == self.id
    }
}

impl BarbicanKeyManager {
    /// Registers this host where it uses a key and is not registered, and ends that where it uses none any more.
    pub(super) fn settle_uses(&self, in_use: &HashSet<VolumeId>) -> Result<(), Refusal> {
        let host = Host::this();
        self.learn(&host)?;
        self.learn_foreign(&host)?;
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
                None => self.begin_use(volume, &host),
                Some(entries) => self.end_use(volume, entries),
            };
            // What is wrong with one key is not in the way of the others; who does not answer is not asked on.
            let is_silent = settled.as_ref().is_err_and(|refusal| refusal.reason() == Reason::TimedOut);
            first = first.and(settled);
            if is_silent {
                break;
            }
        }
        first
    }

    /// Has Barbican say, once, where an earlier daemon has registered this host.
    fn learn(&self, host: &Host) -> Result<(), Refusal> {
        if self.registered.book().is_complete {
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
        self.registered.book().is_complete = true;
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
                "the key of volume {volume} is in use by {} and was not destroyed: detach the volume there first, or, if that \
                 user is gone for good, {remedy}",
                names.join(", ")
            ),
        )
    }
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
