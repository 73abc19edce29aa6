//! What becomes of a volume after it was enrolled.

use super::Broker;
use super::elsewhere::Elsewhere;
use crate::audit::{Event, Kind};
use crate::keys::{Key, KeyManager};
use crate::refusal::{Reason, Refusal};
use crate::store::{Grant, VolumeRecord, VolumeState, not_enrolled, seconds_now};
use crate::volume::{Identity, VolumeId};

impl Broker {
    /// The record of a volume that is or was enrolled.
    ///
    /// # Errors
    /// [`Reason::NoKey`] when there is none.
    pub fn volume(&self, id: &VolumeId) -> Result<VolumeRecord, Refusal> {
        self.vault()?.store.volume(id)?.ok_or_else(|| not_enrolled(id))
    }

    /// Takes a volume out of use; its key stays. To repeat it changes nothing.
    ///
    /// # Errors
    /// When the volume is unknown, destroyed, or in use on this host.
    pub fn retire(&self, id: &VolumeId) -> Result<VolumeRecord, Refusal> {
        self.one_at_a_time(id, || {
            let record = self.volume(id)?;
            self.check_not_destroyed(&record)?;
            let before = self.vault()?.store.change_state(
                id,
                &[VolumeState::Enrolled],
                VolumeState::Retired,
                Some(Event::new(Kind::Retired, id, "its key stays")),
            )?;
            if before.is_some() {
                let event = Event::new(Kind::Reinstated, id, "because it is in use");
                self.check_unused(id, VolumeState::Retired, VolumeState::Enrolled, Some(event))?;
                tracing::warn!(volume = %id, "retired volume {id}, whose key stays");
            }
            // Also when an earlier attempt did not get as far.
            self.vault()?.keys.wipe_copy(id);
            self.volume(id)
        })
    }

    /// Destroys the key of a volume, and with it what stands on the volume. To repeat it wipes what could
    /// not be wiped before. Returns where the key may be still, and what to do, in one sentence, if anywhere.
    ///
    /// That is in the audit log when this returns. A key manager elsewhere cannot do both at once, so there its beginning
    /// is recorded first.
    ///
    /// # Errors
    /// When the volume is unknown or in use on this host, its key cannot be looked at or destroyed, or that cannot be
    /// recorded.
    pub fn destroy(&self, id: &VolumeId) -> Result<Option<String>, Refusal> {
        self.one_at_a_time(id, || {
            let record = self.volume(id)?;
            check_is_ours(&record, "never deletes")?;
            let vault = self.vault()?;
            // Whatever the server says or does not say.
            vault.keys.wipe_copy(id);
            let answer = key_elsewhere(&*vault.keys, &record);
            if record.state != VolumeState::Destroyed
                && answer.as_ref().is_err_and(|refusal| refusal.reason() == Reason::NoKey)
            {
                self.check_not_left_behind(&record)?;
            }
            let has_key = has_key_of(&record, answer)?;
            let begins = || {
                let event = Event::new(Kind::DestructionStarted, id, "the key manager is asked to destroy its key");
                (!vault.keys.records_destruction()).then_some(event)
            };
            let goes_on = |why: &str| begins().map(|_| Event::new(Kind::Reinstated, id, why));
            let usable = [VolumeState::Enrolled, VolumeState::Retired];
            // Who ends before the look behind the change must not leave a volume destroyed that a guest uses.
            if (has_key || record.state != VolumeState::Destroyed) && self.is_mapped(id)? {
                return Err(in_use(id));
            }
            // From here on no open gets a mapping; one that was on its way is found now, or finds this.
            let before = vault.store.change_state(id, &usable, VolumeState::Destroyed, begins())?;
            match before {
                Some(before) => self.check_unused(id, VolumeState::Destroyed, before, goes_on("because it is in use"))?,
                // An earlier attempt may have ended before it got as far as the key.
                None => begins().map_or(Ok(()), |event| vault.store.append_audit(event).map(drop))?,
            }
            if let Err(refusal) = vault.keys.destroy(id) {
                // It may be in a place that the key manager in use knows nothing of, or be restored.
                if let Some(before) = before
                    && !has_key
                    && refusal.reason() == Reason::NoKey
                {
                    let event = goes_on("because the key manager has no key of it");
                    vault.store.change_state(id, &[VolumeState::Destroyed], before, event)?;
                    let remedy = "if another host has destroyed it, repeat with --gone, which records that";
                    return Err(refusal.and(remedy));
                }
                // A key manager that destroys no keys has done nothing, and what one has done that does not answer is not
                // known. A key that is gone all the same opens nothing.
                let answer = vault.keys.get(id);
                match (before, answer) {
                    (None, Err(answer)) if is_gone(&answer) => {
                        let gone = match has_key {
                            true => format!("it is gone, though: {refusal}"),
                            false => "it was gone already".to_owned(),
                        };
                        return self.finish_destruction(&record, &gone);
                    }
                    (Some(_), Err(answer)) if has_key && is_gone(&answer) => {
                        self.finish_destruction(&record, &format!("it is gone, though: {refusal}"))?;
                    }
                    (Some(before), answer) => {
                        let event = goes_on(match answer {
                            Ok(_) => "because its key was not destroyed",
                            Err(_) => "because it is not known whether its key was destroyed",
                        });
                        vault.store.change_state(id, &[VolumeState::Destroyed], before, event)?;
                    }
                    (None, _) => {}
                }
                return Err(refusal);
            }
            let elsewhere = self.finish_destruction(&record, "in the key manager")?;
            self.devices.enrolment_ended();
            tracing::warn!(volume = %id, "destroyed the key of volume {id}: what stands on the volume can never be read again");
            Ok(elsewhere)
        })
    }

    /// Records that the key of a volume is gone, as where another host has destroyed it on a server that does not
    /// remember that. Nothing is destroyed.
    ///
    /// # Errors
    /// When the volume is unknown or in use on this host, when its key is one of Cinder's, when the key manager in use, the
    /// database or another key manager of the configuration has its key or does not say that it has none, or that cannot be
    /// recorded.
    pub fn record_gone(&self, id: &VolumeId) -> Result<(), Refusal> {
        self.one_at_a_time(id, || {
            let record = self.volume(id)?;
            // No name leads to it, so a key manager that knows of no key of that volume says nothing of it.
            check_is_ours(&record, "does not look for")?;
            let vault = self.vault()?;
            let used = self.config()?.key_manager.kind();
            let refused = |reason, why: String| {
                let sentence = format!("the key of volume {id} is not recorded as gone, because {why}");
                Err(Refusal::new(reason, sentence))
            };
            match key_elsewhere(&*vault.keys, &record) {
                Err(refusal) if is_gone(&refusal) => {}
                Err(refusal) if refusal.reason() == Reason::KeyRevoked => {
                    return refused(refusal.reason(), format!("{used} has one that was revoked: repeat without --gone"));
                }
                Err(refusal) => return refused(refusal.reason(), format!("{used} does not say so ({refusal})")),
                Ok(_) => return refused(Reason::NotAllowed, format!("{used} has one: repeat without --gone")),
            }
            // The database's own key manager says of a key that does not open what it says of one that is not there.
            if vault.keys.records_destruction() && self.is_wrapped(id)? {
                let why = "the database has one that does not open: repeat without --gone to destroy it".to_owned();
                return refused(Reason::NoKey, why);
            }
            self.check_not_left_behind(&record)?;
            let elsewhere = self.elsewhere(&record)?;
            if !elsewhere.is_empty() {
                let said: Vec<_> = elsewhere.iter().map(Elsewhere::said).collect();
                return refused(Reason::NotAllowed, said.join(", and "));
            }
            if self.is_mapped(id)? {
                return Err(in_use(id));
            }
            vault.keys.wipe_copy(id);
            let event = Event::new(Kind::Destroyed, id, format!("it was gone already in {used}, by the operator's word"));
            let usable = [VolumeState::Enrolled, VolumeState::Retired];
            if let Some(before) = vault.store.change_state(id, &usable, VolumeState::Destroyed, Some(event))? {
                let event = Event::new(Kind::Reinstated, id, "because it is in use");
                self.check_unused(id, VolumeState::Destroyed, before, Some(event))?;
                self.devices.enrolment_ended();
                tracing::warn!(volume = %id, "the key of volume {id} is gone: what stands on the volume can never be read again");
            }
            Ok(())
        })
    }

    /// Refuses to destroy a volume whose key is in the database only, while another key manager is in use.
    fn check_not_left_behind(&self, record: &VolumeRecord) -> Result<(), Refusal> {
        let id = &record.id;
        if self.vault()?.keys.records_destruction() || !self.is_wrapped(id)? {
            return Ok(());
        }
        let used = self.config()?.key_manager.kind();
        Err(Refusal::new(
            Reason::NoKey,
            format!(
                "nothing was destroyed, because the key of volume {id} is in the database and was not copied to the key \
                 manager in use: run 'volcrypt key migrate --from embedded --to {used}' and repeat"
            ),
        ))
    }

    /// Whether the database has a key of the volume, which need not open.
    fn is_wrapped(&self, id: &VolumeId) -> Result<bool, Refusal> {
        Ok(self.vault()?.store.wrapped_key(id)?.is_some_and(|key| key.wrapped.is_some()))
    }

    /// Destroys what the database has of a key that is gone from the key manager in use, as after a move from one to the
    /// other, and records all of it.
    fn finish_destruction(&self, record: &VolumeRecord, detail: &str) -> Result<Option<String>, Refusal> {
        let (vault, id) = (self.vault()?, &record.id);
        let used = self.config()?.key_manager.kind();
        let mut detail = detail.to_owned();
        let mut wiped = Ok(());
        if !vault.keys.records_destruction() {
            let was_there = self.is_wrapped(id)?;
            // Also when it was not: an earlier attempt may not have wiped all of it.
            wiped = vault.store.forget_keys(id);
            if was_there {
                detail.push_str(match &wiped {
                    Ok(()) => ", and the one in the database with it",
                    Err(_) => ", but not wholly in the database",
                });
            }
        }
        let places = self.elsewhere(record)?;
        let said: Vec<String> = places.iter().map(Elsewhere::said).collect();
        said.iter().for_each(|said| detail.push_str(&format!("; {said}")));
        let elsewhere = places.first().map(|place| {
            let from = place.kind;
            let said = said.join(", and ");
            format!("{said}: run 'volcrypt key migrate --from {from} --to {used} --destroy-old'")
        });
        if let Some(elsewhere) = &elsewhere {
            tracing::warn!(volume = %id, "of volume {id}, which was destroyed, {elsewhere}");
        }
        self.record_destroyed(id, &detail)?;
        wiped?;
        Ok(elsewhere)
    }

    /// Records that a key manager has destroyed a key, unless it did so itself.
    fn record_destroyed(&self, id: &VolumeId, detail: &str) -> Result<(), Refusal> {
        let vault = self.vault()?;
        if vault.keys.records_destruction() {
            return Ok(());
        }
        vault.store.append_audit(Event::new(Kind::Destroyed, id, detail)).map_err(|refusal| {
            Refusal::new(
                refusal.reason(),
                format!(
                    "the key of volume {id} is destroyed, and the audit log has that it was begun but not that it is done \
                     ({refusal}): have the log writable again"
                ),
            )
        })?;
        self.merge_audit_soon();
        Ok(())
    }

    /// Gives a volume to `owner`, or to everybody.
    ///
    /// # Errors
    /// When the volume is unknown, and when the database cannot be written.
    pub fn set_owner(&self, id: &VolumeId, owner: Option<&str>) -> Result<VolumeRecord, Refusal> {
        let owner = owner.map(valid_name).transpose()?;
        match self.vault()?.store.set_owner(id, owner)? {
            true => self.volume(id),
            false => Err(not_enrolled(id)),
        }
    }

    /// Lets a domain of another owner have a volume for a time.
    ///
    /// # Errors
    /// When the volume is unknown, the time is over already, or the name is none that a domain could have.
    pub fn grant(&self, grant: &Grant) -> Result<(), Refusal> {
        valid_name(&grant.domain)?;
        if grant.expires_at <= seconds_now() {
            let sentence = format!("the grant of volume {} would be over already: give a time to come", grant.volume);
            return Err(Refusal::new(Reason::Configuration, sentence));
        }
        self.vault()?.store.grant(grant)
    }

    /// Takes a grant back.
    ///
    /// # Errors
    /// When there is no such grant.
    pub fn revoke(&self, volume: &VolumeId, domain: &str) -> Result<(), Refusal> {
        match self.vault()?.store.revoke(volume, domain)? {
            true => Ok(()),
            false => Err(Refusal::new(
                Reason::Configuration,
                format!("volume {volume} is not granted to {domain:?}: 'volcrypt grant list' shows what is"),
            )),
        }
    }

    /// What enrolling makes of a volume that has a record already.
    pub(super) fn enrol_again(
        &self,
        identity: &Identity,
        record: VolumeRecord,
        owner: Option<&str>,
    ) -> Result<VolumeRecord, Refusal> {
        let id = &record.id;
        self.check_not_destroyed(&record)?;
        self.check_device(identity, &record)?;
        if let Some(owner) = owner
            && record.owner.as_deref() != Some(owner)
        {
            let present = record.owner.as_ref().map_or("to everybody".to_owned(), |owner| format!("to {owner:?}"));
            let sentence = format!(
                "volume {id} is enrolled already and belongs {present}: 'volcrypt volume set-owner {id} OWNER' gives it \
                 to somebody else"
            );
            return Err(Refusal::new(Reason::NotAllowed, sentence));
        }
        self.key(&record)?;
        let event = Event::new(Kind::Reinstated, id, identity.to_string());
        let store = &self.vault()?.store;
        if store.change_state(id, &[VolumeState::Retired], VolumeState::Enrolled, Some(event))?.is_some() {
            tracing::info!(volume = %id, "volume {id} can be used again");
        }
        self.volume(id)
    }

    /// Whether the volume may be used at all.
    pub(super) fn check_state(&self, identity: &Identity, record: &VolumeRecord) -> Result<(), Refusal> {
        let id = &record.id;
        match record.state {
            VolumeState::Enrolled => Ok(()),
            VolumeState::Retired => Err(Refusal::new(
                Reason::NoKey,
                format!("volume {id} is retired: if it is to be used again, run 'volcrypt volume enrol {identity}'"),
            )),
            VolumeState::Destroyed => self.check_not_destroyed(record),
        }
    }

    fn check_not_destroyed(&self, record: &VolumeRecord) -> Result<(), Refusal> {
        match record.state {
            VolumeState::Enrolled | VolumeState::Retired => Ok(()),
            VolumeState::Destroyed => Err(Refusal::new(
                Reason::KeyDestroyed,
                format!(
                    "volume {0} was destroyed and what stands on it can never be read again: to use its device anew, have \
                     a rule give it another id",
                    record.id
                ),
            )),
        }
    }

    /// Puts the state of a volume that turns out to be in use back from `now` to `before`, and records `event`.
    fn check_unused(
        &self,
        id: &VolumeId,
        now: VolumeState,
        before: VolumeState,
        event: Option<Event>,
    ) -> Result<(), Refusal> {
        let refusal = match self.is_mapped(id) {
            Ok(false) => return Ok(()),
            Ok(true) => in_use(id),
            Err(refusal) => refusal,
        };
        self.vault()?.store.change_state(id, &[now], before, event)?;
        Err(refusal.of(id))
    }

    pub(super) fn is_mapped(&self, id: &VolumeId) -> Result<bool, Refusal> {
        Ok(self.encryptor.mappings()?.iter().any(|mapping| mapping.volume == *id))
    }
}

/// Refuses to destroy a key that another program has made, or to record that it was: what volcrypt `does_not` do.
fn check_is_ours(record: &VolumeRecord, does_not: &str) -> Result<(), Refusal> {
    let id = &record.id;
    match record.foreign_key() {
        None => Ok(()),
        Some(key) => Err(Refusal::new(
            Reason::NotAllowed,
            format!(
                "the key of volume {id} is {key}, which Cinder has made and volcrypt {does_not}: delete the volume in Cinder, \
                 and the secret goes with it; 'volcrypt volume retire {id}' takes the volume out of use on this host"
            ),
        )),
    }
}

/// The key that the key manager has now; what this host has kept of it says nothing of another one.
fn key_elsewhere(keys: &dyn KeyManager, record: &VolumeRecord) -> Result<Key, Refusal> {
    let id = &record.id;
    if !keys.capabilities().describes {
        return keys.get_enrolled(&record.recorded_key());
    }
    let described = keys.described(id)?;
    described.map(|(key, _)| key).ok_or_else(|| Refusal::new(Reason::NoKey, format!("volume {id} has no key")))
}

/// Whether the key manager, which other hosts may ask as well, has the key that the volume was enrolled with, going by
/// its answer; not if it has none.
///
/// # Errors
/// When it has another one or does not say: that may be another host's, and destroying goes by the volume's id alone.
fn has_key_of(record: &VolumeRecord, answer: Result<Key, Refusal>) -> Result<bool, Refusal> {
    let id = &record.id;
    match answer {
        Ok(key) if key.check_value(id) == record.check_value => Ok(true),
        Ok(_) => Err(Refusal::new(
            Reason::WrongKey,
            format!(
                "the key manager's key for volume {id} is not the one that this host has enrolled it with, so it was not \
                 destroyed: whoever made it may use it"
            ),
        )),
        Err(refusal) if is_gone(&refusal) || refusal.reason() == Reason::KeyRevoked => Ok(false),
        Err(refusal) => Err(Refusal::new(
            refusal.reason(),
            format!(
                "nothing was destroyed, because the key manager does not show that its key for volume {id} is the one that \
                 this host has enrolled it with ({refusal}): mend that and repeat"
            ),
        )),
    }
}

/// Whether a key manager says that it has no such key, or none any more.
pub(super) fn is_gone(refusal: &Refusal) -> bool {
    matches!(refusal.reason(), Reason::NoKey | Reason::KeyDestroyed)
}

fn in_use(id: &VolumeId) -> Refusal {
    Refusal::new(
        Reason::NotAllowed,
        format!("volume {id} is in use on this host: detach it first; 'volcrypt status' shows from which domain"),
    )
}

/// The name of an owner or a domain: what Nova and libvirt may use, in one printable line.
fn valid_name(name: &str) -> Result<&str, Refusal> {
    match !name.trim().is_empty() && name.len() <= 255 && !name.contains(char::is_control) {
        true => Ok(name),
        false => Err(Refusal::new(
            Reason::Configuration,
            format!("{name:?} can be no owner's and no domain's name: use 1 to 255 bytes without control characters"),
        )),
    }
}
