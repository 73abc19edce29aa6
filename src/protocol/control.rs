use std::fmt;
use std::fs::File;
use std::io::{self, BufRead, BufReader, IoSlice, Read};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use serde::{Deserialize, Serialize};

use super::Identification;
use super::registration::receive_with_descriptors;
use crate::audit::Link;
use crate::keys::{
    KekRotation, KeyInfo, ManagerKind, MigrationProgress, MigrationStep, PassphraseHash, RotationStep, SecretId,
};
use crate::policy::Intercept;
use crate::store::{AuditPage, AuditQuery, Grant, Verified, VolumeRecord};
use crate::volume::VolumeId;

/// The longest message in bytes. A domain with a thousand disks needs about half a megabyte.
pub const MAX_MESSAGE: u64 = 16 << 20;

/// What a client of the control socket asks for.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    /// libvirt called the hook.
    Hook {
        /// What is about to happen or has happened to the domain.
        operation: HookOperation,
        /// The domain's name, as libvirt gave it to the hook.
        domain: String,
        /// The domain's XML, as libvirt gave it to the hook.
        xml: String,
    },
    /// What is mapped, for whom.
    Status,
    /// Every enrolled volume.
    Volumes,
    /// One enrolled volume.
    Volume {
        /// Its id.
        id: VolumeId,
    },
    /// What is known of keys, without the keys; some at a time.
    Keys {
        /// Those of volumes after this one; from the first on if nothing is said.
        after: Option<VolumeId>,
    },
    /// A step in the replacement of the key-encryption key.
    RotateKek(RotationStep),
    /// A step in moving keys from one key manager to another.
    MigrateKeys(MigrationStep),
    /// Make the blank volume on a device ready for its first use.
    Enrol {
        /// A path of the device.
        device: PathBuf,
        /// Whom the volume belongs to; nobody in particular if nothing is said.
        owner: Option<String>,
        /// The secret of Cinder's that is to be its key.
        #[serde(default)]
        secret: Option<SecretId>,
    },
    /// Take a volume into use that os-brick has encrypted.
    Adopt {
        /// A path of the device.
        device: PathBuf,
        /// The secret of Cinder's that it is encrypted with; the one that the configuration names if nothing is said.
        secret: Option<SecretId>,
        /// How cryptsetup has hashed the passphrase; as it turns out if nothing is said.
        hash: Option<PassphraseHash>,
        /// Whom the volume belongs to; nobody in particular if nothing is said.
        owner: Option<String>,
    },
    /// What is at the place whose descriptor comes with the request, and what the rules say of it.
    Identify,
    /// Point the protected disks in a domain's XML to their mappings.
    Rewrite {
        /// The XML of a domain, or of a lone disk.
        xml: String,
    },
    /// Make a device ready to be attached to a domain. Its mapping, if it is a protected disk, is held as long as the
    /// client stays connected, or until [`Request::Release`] if it is to be kept.
    Attach {
        /// The domain's XML, as libvirt gives it.
        domain: String,
        /// The device's XML.
        device: String,
        /// Whether the domain gets it at once, and not only at its next start.
        live: bool,
        /// Whether the mapping is held for a client that goes away.
        keep: bool,
    },
    /// Say what a device is called in the domain that it is to be detached from.
    Detach {
        /// The domain's XML, as libvirt gives it.
        domain: String,
        /// The device's XML.
        device: String,
    },
    /// Hold a device's mapping for a domain no longer.
    Release {
        /// The domain's XML, as libvirt gives it.
        domain: String,
        /// The device's XML.
        device: String,
    },
    /// Take a volume out of use. Its key stays.
    Retire {
        /// The volume's id.
        id: VolumeId,
    },
    /// Destroy a volume's key.
    Destroy {
        /// The volume's id.
        id: VolumeId,
        /// Whether it is gone already, so that this is to be recorded alone.
        is_gone: bool,
    },
    /// Give a volume to somebody else.
    SetOwner {
        /// The volume's id.
        id: VolumeId,
        /// To whom; to everybody if nothing is said.
        owner: Option<String>,
    },
    /// Every grant.
    Grants,
    /// Let a domain have a volume of another owner.
    Grant {
        /// Which one, and until when.
        grant: Grant,
    },
    /// Take a grant back.
    Revoke {
        /// The volume's id.
        volume: VolumeId,
        /// The domain, as the grant says it.
        domain: String,
    },
    /// Write a volume's key into the file whose descriptor comes with the request.
    ExportKey {
        /// The volume's id.
        id: VolumeId,
    },
    /// Some of the audit records that are looked for, the newest first.
    Audit(AuditQuery),
    /// Check some of the audit records.
    VerifyAudit {
        /// Those after this one, which was checked before.
        from: Link,
    },
}

/// The hook's operations that concern the daemon.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum HookOperation {
    /// Before libvirt makes anything of the domain.
    Prepare,
    /// Before libvirt takes the domain from another host.
    Migrate,
    /// Before libvirt takes the domain from a file that it was saved to.
    Restore,
    /// QEMU runs, and has open what it was started with.
    Started,
    /// QEMU has ended; or libvirt has released everything of the domain.
    Stopped,
}

/// The daemon's answer.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Response {
    /// It was done; this is what came of it.
    Done(Reply),
    /// It is being worked on; another answer follows.
    Working {
        /// How many keys were looked at.
        done: u64,
        /// How many there are.
        total: u64,
    },
    /// It was refused.
    Refused {
        /// What is wrong and what to do, in one sentence.
        sentence: String,
        /// The errno that an opener would get for the same reason.
        errno: i32,
    },
}

/// What comes of a request.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reply {
    /// Nothing to report.
    Nothing,
    /// The answer to [`Request::Status`].
    Status(Box<Status>),
    /// The answer to [`Request::Volumes`], and to every other request about one volume: its record as it is
    /// then.
    Volumes(Vec<VolumeStatus>),
    /// The answer to [`Request::Destroy`]: where the key may be still, and what to do, in one sentence.
    Destroyed {
        /// Nothing if it is nowhere.
        elsewhere: Option<String>,
    },
    /// The answer to [`Request::Grants`].
    Grants(Vec<Grant>),
    /// The answer to [`Request::Keys`].
    Keys(KeyPage),
    /// The answer to [`Request::RotateKek`].
    KekRotation(KekRotation),
    /// The answer to [`Request::MigrateKeys`].
    KeyMigration(MigrationProgress),
    /// The answer to [`Request::Audit`].
    Audit(AuditPage),
    /// The answer to [`Request::VerifyAudit`].
    AuditVerified(Verified),
    /// The answer to [`Request::Identify`].
    Identification(Identification),
    /// The answer to [`Request::Rewrite`]; and to a hook whose domain libvirt is to read from this in the place of
    /// what it has.
    Xml(String),
    /// The answer to [`Request::Attach`] and to [`Request::Detach`].
    Device {
        /// The XML that libvirt is to be given.
        xml: String,
        /// The protected volume that it is a disk of, if it names the mapping.
        volume: Option<VolumeId>,
    },
}

/// What the daemon and the kernel know right now.
#[derive(Debug, Serialize, Deserialize)]
pub struct Status {
    /// The daemon's version.
    pub version: String,
    /// Why the configuration could not be used, if so: everything protected is refused then.
    pub configuration_error: Option<String>,
    /// Why the key store could not be used, if so.
    pub key_store_error: Option<String>,
    /// Which keys are in the database only, while another key manager is used, if there are any.
    #[serde(default)]
    pub keys_left_behind: Option<String>,
    /// Every mapping of volcrypt's in the kernel.
    pub mappings: Vec<MappingStatus>,
    /// Every QEMU whose opens the daemon answers.
    pub guests: Vec<GuestStatus>,
    /// How guests get to their mappings.
    #[serde(default)]
    pub intercept: Intercept,
    /// What keeps other QEMUs from protected volumes.
    pub guard: GuardStatus,
    /// Which volumes would start without the key server; nothing where there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key_cache: Option<Box<KeyCacheStatus>>,
}

/// What this host keeps of a key server's keys.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeyCacheStatus {
    /// For how many days a key is kept after the server last gave it; 0 if none is.
    pub lifetime_days: u64,
    /// Why none can be used although the configuration asks for it.
    pub fault: Option<String>,
    /// Every enrolled volume.
    pub volumes: Vec<CachedVolume>,
}

/// Whether a volume would start without the key server.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CachedVolume {
    /// The volume.
    pub volume: VolumeId,
    /// Until when it would, in seconds since 1970-01-01 UTC; nothing if it would not.
    pub starts_until: Option<i64>,
}

/// The guard that keeps the raw devices of protected volumes shut.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct GuardStatus {
    /// Whether every such device is shut.
    pub on: bool,
    /// For whom: the processes in and below this cgroup.
    pub cgroup: String,
    /// How many devices are shut: block devices, and character devices that pass commands to them.
    pub devices: usize,
    /// Why it is off, and what to do.
    pub fault: Option<String>,
    /// Why every block device but volcrypt's own is shut, if so: what is wrong with the configuration.
    #[serde(default)]
    pub all_because: Option<String>,
}

/// One mapping in the kernel.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct MappingStatus {
    /// The mapped volume.
    pub volume: VolumeId,
    /// The name of the mapping: `volcrypt-<volume id>`.
    pub name: String,
    /// Its device: `/dev/dm-0`.
    pub device: PathBuf,
    /// The device that holds the ciphertext: `/dev/sda`; its number if it has no name any more.
    pub backing: String,
    /// The on-disk format.
    pub format: String,
    /// The cipher in dm-crypt's notation.
    pub cipher: String,
    /// How many times the mapping is open.
    pub open_count: i32,
    /// Whether the kernel will remove it at the last close.
    pub deferred_removal: bool,
    /// The domains whose QEMU has it open.
    pub domains: Vec<String>,
    /// The domains that it is held for until their QEMU has opened it.
    #[serde(default)]
    pub held_for: Vec<String>,
    /// When it was made, in seconds since 1970-01-01 UTC.
    pub since: Option<i64>,
}

/// One registered QEMU.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct GuestStatus {
    /// The process that registered.
    pub pid: u32,
    /// The domain's name as its command line says it.
    pub domain: Option<String>,
}

/// An enrolled volume and who uses it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct VolumeStatus {
    /// What was written down when it was enrolled.
    #[serde(flatten)]
    pub record: VolumeRecord,
    /// Whether there is a mapping of it on this host now.
    pub mapped: bool,
    /// The domains whose QEMU has that open, as in [`MappingStatus::domains`].
    pub domains: Vec<String>,
}

/// Some of the keys, by volume.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct KeyPage {
    /// What is known of them.
    pub keys: Vec<KeyStatus>,
    /// After which volume to look on; nothing when there are no more.
    pub after: Option<VolumeId>,
}

/// What is known of a key.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct KeyStatus {
    /// What its key manager knows.
    #[serde(flatten)]
    pub info: KeyInfo,
    /// The key manager.
    pub manager: ManagerKind,
    /// The volumes, enrolled or retired on this host, whose records name it.
    #[serde(default)]
    pub volumes: Vec<VolumeId>,
    /// When this host used it last, in seconds since 1970-01-01 UTC.
    pub last_use: Option<i64>,
    /// How old it is, in days.
    pub age_days: u32,
    /// Whether that is more than the configuration wants.
    pub old: bool,
}

/// A connection to the control socket.
pub struct ControlClient {
    stream: UnixStream,
}

impl ControlClient {
    /// Connects to `socket`. Every later step may take `deadline` at most.
    ///
    /// # Errors
    /// [`CallError::Unreachable`].
    pub fn connect(socket: &Path, deadline: Duration) -> Result<Self, CallError> {
        let unreachable = |source| CallError::Unreachable { socket: socket.to_owned(), source };
        let stream = UnixStream::connect(socket).map_err(unreachable)?;
        stream.set_read_timeout(Some(deadline)).map_err(unreachable)?;
        stream.set_write_timeout(Some(deadline)).map_err(unreachable)?;
        Ok(ControlClient { stream })
    }

    /// Sends `request` and waits for what comes of it.
    ///
    /// # Errors
    /// [`CallError`].
    pub fn call(self, request: &Request) -> Result<Reply, CallError> {
        self.exchange(request, None, &mut |_, _| {})
    }

    /// As [`Self::call`]; meanwhile `listener` is told how much is done, and how much there is. The deadline begins anew
    /// each time.
    ///
    /// # Errors
    /// [`CallError`].
    pub fn call_and_listen(self, request: &Request, listener: &mut dyn FnMut(u64, u64)) -> Result<Reply, CallError> {
        self.exchange(request, None, listener)
    }

    /// As [`Self::call`], with a descriptor that the request is about.
    ///
    /// # Errors
    /// [`CallError`].
    pub fn call_with_file(self, request: &Request, file: &File) -> Result<Reply, CallError> {
        self.exchange(request, Some(file), &mut |_, _| {})
    }

    /// As [`Self::call`], and stays connected.
    ///
    /// # Errors
    /// [`CallError`].
    pub fn call_and_stay(self, request: &Request) -> Result<(Reply, Connection), CallError> {
        let reply = self.exchange(request, None, &mut |_, _| {})?;
        Ok((reply, Connection { stream: self.stream }))
    }

    fn exchange(
        &self,
        request: &Request,
        file: Option<&File>,
        listener: &mut dyn FnMut(u64, u64),
    ) -> Result<Reply, CallError> {
        let mut message = serde_json::to_vec(request).map_err(|error| CallError::Broken(error.into()))?;
        message.push(b'\n');
        self.send(&message, file).map_err(CallError::Broken)?;

        let mut answers = BufReader::new((&self.stream).take(MAX_MESSAGE));
        loop {
            let mut answer = String::new();
            answers.read_line(&mut answer).map_err(CallError::Broken)?;
            match serde_json::from_str(&answer) {
                Ok(Response::Working { done, total }) => {
                    answers.get_mut().set_limit(MAX_MESSAGE);
                    listener(done, total);
                }
                Ok(Response::Done(reply)) => return Ok(reply),
                Ok(Response::Refused { sentence, errno }) => return Err(CallError::Refused { sentence, errno }),
                Err(_) if answer.is_empty() => return Err(CallError::Broken(io::ErrorKind::UnexpectedEof.into())),
                Err(error) => return Err(CallError::Broken(error.into())),
            }
        }
    }

    fn send(&self, message: &[u8], file: Option<&File>) -> io::Result<()> {
        let descriptors: Vec<_> = file.iter().map(|file| file.as_fd()).collect();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !descriptors.is_empty() {
            ancillary.push(SendAncillaryMessage::ScmRights(&descriptors));
        }
        // The descriptor travels with the first bytes; the rest of a long message follows.
        let sent = rustix::net::sendmsg(&self.stream, &[IoSlice::new(message)], &mut ancillary, SendFlags::NOSIGNAL)?;
        io::Write::write_all(&mut &self.stream, &message[sent..])
    }
}

/// The connection of a client for which the daemon holds something. That ends when the connection does.
pub struct Connection {
    stream: UnixStream,
}

impl Connection {
    /// Ends it, and waits until the daemon holds nothing for it any more.
    pub fn end(self) {
        let mut left = Vec::new();
        // Whoever is gone holds nothing either.
        let _ = self.stream.shutdown(Shutdown::Write).and_then(|()| (&self.stream).read_to_end(&mut left));
    }
}

/// The daemon's side: one line from a client, and the file that came with it.
///
/// # Errors
/// Those of the socket, time-outs among them; `InvalidData` for a line that is cut off or longer than
/// [`MAX_MESSAGE`].
pub fn receive_request(stream: &UnixStream) -> io::Result<(Vec<u8>, Option<OwnedFd>)> {
    let mut message = Vec::new();
    let mut file = None;
    let mut buffer = vec![0; 64 << 10];
    loop {
        let (length, mut descriptors) = receive_with_descriptors(stream, &mut buffer)?;
        file = file.or_else(|| descriptors.pop());
        message.extend_from_slice(&buffer[..length]);
        if message.ends_with(b"\n") {
            return Ok((message, file));
        }
        if length == 0 || message.len() as u64 > MAX_MESSAGE {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "the request is cut off or too long"));
        }
    }
}

/// Why a call to the daemon gave no result.
#[derive(Debug)]
pub enum CallError {
    /// Nobody listens on the socket.
    Unreachable {
        /// The socket that was tried.
        socket: PathBuf,
        /// What connecting to it said.
        source: io::Error,
    },
    /// The daemon did not answer, or not in time, or what it said makes no sense.
    Broken(io::Error),
    /// The daemon answered no.
    Refused {
        /// What is wrong and what to do.
        sentence: String,
        /// The errno that an opener would get for the same reason.
        errno: i32,
    },
}

impl CallError {
    /// Whether nobody listens, as opposed to a daemon that says no or takes its time.
    pub fn is_daemon_down(&self) -> bool {
        matches!(self, CallError::Unreachable { .. })
    }
}

impl fmt::Display for CallError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            CallError::Unreachable { socket, source } => write!(
                f,
                "volcryptd cannot be reached on {} ({source}): run 'systemctl status volcryptd' to see why",
                socket.display()
            ),
            CallError::Broken(source) if source.kind() == io::ErrorKind::WouldBlock => {
                f.write_str("volcryptd did not answer in time: run 'journalctl -u volcryptd' to see why")
            }
            CallError::Broken(source) => {
                write!(f, "volcryptd broke off ({source}): run 'journalctl -u volcryptd' to see why")
            }
            CallError::Refused { sentence, .. } => f.write_str(sentence),
        }
    }
}

impl std::error::Error for CallError {}
