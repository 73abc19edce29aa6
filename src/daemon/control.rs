//! Serves the control socket: the hook and the operator's command.

use std::cell::LazyCell;
use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::attach::{self, Device, Recipient};
use super::broker::{Broker, no_such_device};
use super::by_xml::check_alone;
use super::guests::Guests;
use super::holds::{CallerHold, HELD_FOR, Until};
use super::identify::identify;
use super::keys::Listing;
use super::pool::{Pool, while_waiting};
use super::{incoming, prepare, rewrite, status};
use crate::audit::{Asker, Kind};
use crate::encryptor::Mapping;
use crate::guest::block_device_at;
use crate::keys::telling;
use crate::printable::printable;
use crate::protocol::{GuardStatus, HookOperation, Reply, Request, Response, VolumeStatus, receive_request};
use crate::refusal::{Reason, Refusal};
use crate::store::VolumeRecord;
use crate::volume::VolumeId;

/// How long a client may take for each part of its request, and to read the answer.
const CLIENT_DEADLINE: Duration = Duration::from_secs(10);

/// How often a client is told how far its request is.
const TELL_EVERY: Duration = Duration::from_secs(1);

/// What the threads of the control socket share.
pub struct Control {
    broker: Arc<Broker>,
    guests: Arc<Guests>,
    guard: GuardReport,
    keys: Listing,
}

/// Asks for the guard's state.
pub type GuardReport = Box<dyn Fn() -> GuardStatus + Send + Sync>;

impl Control {
    /// A server of the control socket.
    pub fn new(broker: Arc<Broker>, guests: Arc<Guests>, guard: GuardReport) -> Arc<Self> {
        Arc::new(Control { broker, guests, guard, keys: Listing::default() })
    }

    /// Serves `socket` for ever.
    pub fn serve(self: Arc<Self>, socket: &UnixListener, pool: &Pool) -> ! {
        loop {
            match socket.accept() {
                Ok((stream, _)) => {
                    let control = Arc::clone(&self);
                    pool.run(move || {
                        if let Err(error) = control.converse(&stream) {
                            tracing::warn!("a client of the control socket was not served: {error}");
                        }
                    });
                }
                Err(error) => {
                    tracing::error!("no client can be taken on the control socket: {error}");
                    std::thread::sleep(Duration::from_millis(100));
                }
            }
        }
    }

    /// Serves one client.
    pub(super) fn converse(&self, stream: &UnixStream) -> io::Result<()> {
        let peer = rustix::net::sockopt::socket_peercred(stream)?;
        if !peer.uid.is_root() {
            // The socket's mode says so as well.
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, "the client is not root"));
        }
        stream.set_read_timeout(Some(CLIENT_DEADLINE))?;
        stream.set_write_timeout(Some(CLIENT_DEADLINE))?;
        let (message, file) = receive_request(stream)?;
        let request = serde_json::from_slice(&message)
            .map_err(|error| Refusal::new(Reason::Configuration, format!("volcryptd does not understand the request ({error}): hook, command and daemon must be of one version, so run 'systemctl restart volcryptd'")));
        let asker = Asker::operator(peer.pid.as_raw_nonzero().get() as u32, peer.uid.as_raw());
        let (mut held, begin) = (None, Instant::now());
        let response = match request.and_then(|request| asker.ask(|| self.carry_out(request, file, stream, &mut held)))
        {
            Ok(reply) => Response::Done(reply),
            Err(refusal) => Response::Refused { sentence: refusal.to_string(), errno: refusal.errno() },
        };
        let mut answer = serde_json::to_vec(&response)?;
        answer.push(b'\n');
        // The hook may have given up, and libvirt have ended what was prepared before it was.
        (&*stream).write_all(&answer).inspect_err(|_| self.broker.holds().undo_since(begin))?;
        held.map_or(Ok(()), |held| hold_while_connected(stream, held))
    }

    /// What the client has `held` ends with its connection.
    fn carry_out(
        &self,
        request: Request,
        file: Option<OwnedFd>,
        stream: &UnixStream,
        held: &mut Option<CallerHold>,
    ) -> Result<Reply, Refusal> {
        match request {
            Request::Hook { operation: HookOperation::Prepare, domain, xml } => {
                prepare::prepare(&self.broker, &domain, &xml).inspect_err(|refusal| {
                    tracing::error!(domain, "domain {} may not start: {refusal}", printable(&domain))
                })?;
                Ok(Reply::Nothing)
            }
            Request::Hook { operation: HookOperation::Migrate, domain, xml } => {
                let admitted = incoming::admit(&self.broker, &domain, &xml).inspect_err(|refusal| {
                    tracing::error!(domain, "domain {} may not come from its host: {refusal}", printable(&domain))
                })?;
                Ok(admitted.map_or(Reply::Nothing, Reply::Xml))
            }
            Request::Hook { operation: HookOperation::Restore, domain, xml } => {
                let restored = incoming::restore(&self.broker, &domain, &xml, &|program| program.is_file())
                    .inspect_err(|refusal| {
                        tracing::error!(domain, "domain {} cannot be restored: {refusal}", printable(&domain))
                    })?;
                Ok(restored.map_or(Reply::Nothing, Reply::Xml))
            }
            Request::Hook { operation: HookOperation::Started, domain, .. } => {
                self.broker.holds().started(&domain);
                Ok(Reply::Nothing)
            }
            Request::Hook { operation: HookOperation::Stopped, domain, .. } => {
                self.broker.holds().ended(&domain);
                sweep(&self.broker)?;
                Ok(Reply::Nothing)
            }
            Request::Status => Ok(Reply::Status(Box::new(status::status(&self.broker, &self.guests, (self.guard)())?))),
            Request::Volumes => Ok(Reply::Volumes(self.volumes(self.broker.vault()?.store.volumes()?)?)),
            Request::Volume { id } => self.volume(self.broker.volume(&id)?),
            Request::Keys { after } => {
                let page = || while_waiting(|| self.keys.page(&self.broker, after.as_ref()));
                Ok(Reply::Keys(telling(words_to(stream)?, page)?))
            }
            Request::RotateKek(step) => {
                let step = self.broker.vault().and_then(|vault| vault.keys.rotate_kek(&step));
                Ok(Reply::KekRotation(self.recorded(step)?))
            }
            Request::MigrateKeys(step) => {
                let migrated = || while_waiting(|| self.broker.migrate_keys(&step));
                Ok(Reply::KeyMigration(self.recorded(telling(words_to(stream)?, migrated))?))
            }
            Request::Enrol { device, owner, secret } => {
                let enrolled =
                    at(&device).and_then(|device| self.broker.enrol_with(device, secret.as_ref(), owner.as_deref()));
                self.volume(self.recorded(enrolled)?)
            }
            Request::Adopt { device, secret, hash, owner } => {
                let adopted = at(&device)
                    .and_then(|device| self.broker.adopt_encrypted(device, secret.as_ref(), hash, owner.as_deref()));
                self.volume(self.recorded(adopted)?)
            }
            Request::Identify => {
                let place =
                    file.ok_or_else(|| Refusal::new(Reason::Configuration, "no device came with the request"))?;
                Ok(Reply::Identification(identify(&self.broker, place)?))
            }
            Request::Rewrite { xml } => Ok(Reply::Xml(rewrite::rewrite(&self.broker, &xml)?)),
            Request::Unrewrite { xml } => Ok(Reply::Xml(rewrite::unrewrite(&self.broker, &xml)?)),
            Request::Attach { domain, device, live, keep } => self.attach(&domain, &device, live, keep, held),
            Request::Detach { domain, device } => {
                let Device { xml, volume, .. } = attach::detach(&self.broker, &Recipient::parse(&domain)?, &device);
                Ok(Reply::Device { xml, volume })
            }
            Request::Release { domain, device } => {
                let recipient = Recipient::parse(&domain)?;
                if let Some(volume) = attach::detach(&self.broker, &recipient, &device).volume {
                    self.broker.holds().released(recipient.name(), &volume);
                }
                Ok(Reply::Nothing)
            }
            Request::Retire { id } => self.volume(self.recorded_of(&id, self.broker.retire(&id))?),
            Request::Destroy { id, is_gone } => {
                let destroyed = match is_gone {
                    true => self.broker.record_gone(&id).map(|()| None),
                    false => self.broker.destroy(&id),
                };
                Ok(Reply::Destroyed { elsewhere: self.recorded_of(&id, destroyed)? })
            }
            Request::SetOwner { id, owner } => {
                self.volume(self.recorded_of(&id, self.broker.set_owner(&id, owner.as_deref()))?)
            }
            Request::Grants => Ok(Reply::Grants(self.broker.vault()?.store.grants()?)),
            Request::Grant { grant } => {
                self.recorded_of(&grant.volume, self.broker.grant(&grant))?;
                Ok(Reply::Nothing)
            }
            Request::Revoke { volume, domain } => {
                self.recorded_of(&volume, self.broker.revoke(&volume, &domain))?;
                Ok(Reply::Nothing)
            }
            Request::ExportKey { id } => {
                self.recorded_of(&id, self.export(&id, file))?;
                Ok(Reply::Nothing)
            }
            Request::Audit(query) => Ok(Reply::Audit(self.broker.vault()?.store.audit(&query)?)),
            Request::VerifyAudit { from } => Ok(Reply::AuditVerified(self.broker.vault()?.store.verify_audit(from)?)),
        }
    }

    fn attach(
        &self,
        domain: &str,
        device: &str,
        live: bool,
        keep: bool,
        held: &mut Option<CallerHold>,
    ) -> Result<Reply, Refusal> {
        let recipient = Recipient::parse(domain)?;
        let attached = || self.recorded(attach::attach(&self.broker, &recipient, device, live));
        let Device { xml, volume, mapped } = recipient.asker().ask(attached)?;
        if let Some(mapped) = mapped {
            let (holds, began, volume) = (self.broker.holds(), Instant::now(), mapped.volume.clone());
            let is_written_alone = mapped.is_written_alone;
            tracing::info!(
                domain = recipient.name(), volume = %volume,
                "the mapping of volume {volume} is there to be attached to domain {}", printable(recipient.name())
            );
            match keep {
                true => holds.hold(recipient.name(), vec![mapped], Until::Released),
                false => *held = Some(holds.hold_for_caller(recipient.name(), vec![mapped])),
            }
            // Only now does another domain that gets it at the same time see this one.
            let alone = || check_alone(&self.broker, recipient.name(), &volume, is_written_alone);
            recipient.asker().ask(|| self.recorded_of(&volume, alone())).inspect_err(|_| {
                holds.undo_since(began);
                *held = None;
            })?;
        }
        Ok(Reply::Device { xml, volume })
    }

    /// Has a refusal recorded; what was done is recorded by whoever does it.
    fn recorded<T>(&self, outcome: Result<T, Refusal>) -> Result<T, Refusal> {
        outcome.inspect_err(|refusal| self.broker.record_refusal(refusal))
    }

    fn recorded_of<T>(&self, volume: &VolumeId, outcome: Result<T, Refusal>) -> Result<T, Refusal> {
        self.recorded(outcome.map_err(|refusal| refusal.of(volume)))
    }

    fn volume(&self, record: VolumeRecord) -> Result<Reply, Refusal> {
        Ok(Reply::Volumes(self.volumes(vec![record])?))
    }

    fn volumes(&self, records: Vec<VolumeRecord>) -> Result<Vec<VolumeStatus>, Refusal> {
        let mappings = self.broker.encryptor().mappings()?;
        let mappings: HashMap<&VolumeId, &Mapping> =
            mappings.iter().map(|mapping| (&mapping.volume, mapping)).collect();
        // Of what is not mapped nobody need be asked.
        let users = LazyCell::new(|| status::domains_by_device(&status::everybody(&self.guests)));
        let with_users = |record: VolumeRecord| {
            let mapping = mappings.get(&record.id);
            let domains = mapping.and_then(|mapping| users.get(&mapping.device).cloned()).unwrap_or_default();
            VolumeStatus { mapped: mapping.is_some(), domains, record }
        };
        Ok(records.into_iter().map(with_users).collect())
    }

    /// Writes a key into the client's file. It passes through no message and no buffer.
    fn export(&self, id: &VolumeId, file: Option<OwnedFd>) -> Result<(), Refusal> {
        let Some(file) = file else {
            return Err(Refusal::new(Reason::Configuration, "no file came with the request for a key"));
        };
        if !self.broker.config()?.policy.export_keys {
            let sentence = "keys are not written to files on this host: set export_keys = true in the section [policy], \
                            run 'systemctl reload volcryptd', and take it back afterwards";
            return Err(Refusal::new(Reason::NotAllowed, sentence));
        }
        let vault = self.broker.vault()?;
        // A key outlives the record of its volume.
        let key = match vault.store.volume(id)? {
            Some(record) => self.broker.key(&record)?,
            None => while_waiting(|| vault.keys.get(id))?,
        };
        self.broker.record_use(Kind::KeyExported, id, "to a file of the operator's")?;
        self.broker.merge_audit_soon();
        let mut file = File::from(file);
        let written = file.write_all(key.bytes()).and_then(|()| file.sync_all());
        written.map_err(|error| {
            Refusal::new(Reason::Kernel, format!("the key of volume {id} cannot be written to the file: {error}"))
        })?;
        tracing::warn!(volume = %id, "exported the key of volume {id}");
        Ok(())
    }
}

/// What tells the client behind `stream`, once a second at most, how far its request is. One that has gone need not hear
/// it.
fn words_to(stream: &UnixStream) -> Result<impl FnMut(u64, u64) + use<>, Refusal> {
    let mut stream = stream.try_clone().map_err(|error| {
        Refusal::new(
            Reason::Kernel,
            format!("there is no descriptor for one more request ({error}): try it again later"),
        )
    })?;
    let (mut last, mut is_heard) = (Instant::now(), true);
    Ok(move |done, total| {
        if is_heard && last.elapsed() >= TELL_EVERY {
            last = Instant::now();
            let line = serde_json::to_vec(&Response::Working { done, total }).unwrap_or_default();
            is_heard = stream.write_all(&[line.as_slice(), b"\n"].concat()).is_ok();
        }
    })
}

/// Keeps what a client has `held` until it hangs up. It may wait for libvirt for long, so that takes none of the
/// threads that serve others, libvirt's hook among them.
fn hold_while_connected(stream: &UnixStream, held: CallerHold) -> io::Result<()> {
    let stream = stream.try_clone()?;
    stream.set_read_timeout(Some(HELD_FOR))?;
    let wait = move || {
        // It says nothing more; what counts is that this ends.
        let _ = (&stream).read(&mut [0]);
        drop(held);
        // Closing the stream tells the client that nothing is held any more.
        drop(stream);
    };
    std::thread::Builder::new().name("held".to_owned()).stack_size(64 << 10).spawn(wait)?;
    Ok(())
}

/// Removes what a daemon that died may have left.
///
/// # Errors
/// When device-mapper does not answer.
pub fn sweep(broker: &Broker) -> Result<(), Refusal> {
    for mapping in broker.encryptor().sweep()? {
        tracing::warn!(mapping, "removed the mapping {mapping}, which nobody had taken over");
    }
    Ok(())
}

fn at(path: &Path) -> Result<crate::volume::DeviceNumber, Refusal> {
    block_device_at(path).map_err(|error| no_such_device(path, &error))
}
