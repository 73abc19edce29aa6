//! Why volcrypt says no: one sentence for the operator, one errno for whoever opened the device.

use std::fmt;

use crate::printable::printable;
use crate::volume::VolumeId;

/// A refusal. The errno travels through QEMU and libvirt to the caller's terminal, where only its
/// text is seen; the sentence goes to the journal, to `virsh start` (through the hook) and to the
/// operator's command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    reason: Reason,
    sentence: String,
    volume: Option<VolumeId>,
    unanswered: bool,
    hearsay: bool,
}

/// The kinds of refusal, each with an errno of its own, but for keys that may not be used any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// There is no key for the volume, or it cannot be unwrapped.
    NoKey,
    /// The key is not the one the volume was enrolled with.
    WrongKey,
    /// The key was destroyed on purpose.
    KeyDestroyed,
    /// The key may not be used any more, but is still there.
    KeyRevoked,
    /// The volume does not belong to who asks for it.
    NotAllowed,
    /// The device does not hold what was enrolled: foreign data, or another volume.
    ForeignData,
    /// Another domain has the volume, and the two would not notice each other.
    InUse,
    /// Something that is asked for did not answer in time.
    TimedOut,
    /// The device is not there (any more).
    DeviceGone,
    /// The store cannot be written: read-only, full, or locked.
    StoreUnavailable,
    /// The key manager's answer makes no sense.
    KeyManager,
    /// The configuration is at fault.
    Configuration,
    /// The kernel refused an operation; nothing above explains it.
    Kernel,
}

impl Reason {
    /// Whether the volume had a key that nobody may use any more.
    pub fn is_about_an_ended_key(self) -> bool {
        matches!(self, Reason::KeyDestroyed | Reason::KeyRevoked)
    }

    /// The errno that the opener gets.
    pub fn errno(self) -> i32 {
        match self {
            Reason::NoKey => libc::ENOKEY,
            Reason::WrongKey => libc::EKEYREJECTED,
            Reason::KeyDestroyed | Reason::KeyRevoked => libc::EKEYREVOKED,
            Reason::NotAllowed => libc::EACCES,
            Reason::ForeignData => libc::EMEDIUMTYPE,
            Reason::InUse => libc::EBUSY,
            Reason::TimedOut => libc::ETIMEDOUT,
            Reason::DeviceGone => libc::ENODEV,
            Reason::StoreUnavailable => libc::EROFS,
            Reason::KeyManager => libc::EPROTO,
            Reason::Configuration => libc::ENOTSUP,
            Reason::Kernel => libc::EIO,
        }
    }

    /// Its name, as errno(3) has it.
    pub fn errno_name(self) -> &'static str {
        match self {
            Reason::NoKey => "ENOKEY",
            Reason::WrongKey => "EKEYREJECTED",
            Reason::KeyDestroyed | Reason::KeyRevoked => "EKEYREVOKED",
            Reason::NotAllowed => "EACCES",
            Reason::ForeignData => "EMEDIUMTYPE",
            Reason::InUse => "EBUSY",
            Reason::TimedOut => "ETIMEDOUT",
            Reason::DeviceGone => "ENODEV",
            Reason::StoreUnavailable => "EROFS",
            Reason::KeyManager => "EPROTO",
            Reason::Configuration => "ENOTSUP",
            Reason::Kernel => "EIO",
        }
    }
}

impl Refusal {
    /// A refusal for `reason`; `sentence` says what is wrong and what to do. It becomes one printable line, whatever
    /// the names in it are made of.
    pub fn new(reason: Reason, sentence: impl Into<String>) -> Self {
        Refusal { reason, sentence: printable(&sentence.into()), volume: None, unanswered: false, hearsay: false }
    }

    /// A refusal because nobody answered: whoever was asked has said neither yes nor no.
    pub fn unanswered(sentence: impl Into<String>) -> Self {
        Refusal { unanswered: true, ..Refusal::new(Reason::TimedOut, sentence) }
    }

    /// Whether it is one because nobody answered. What somebody did not do in time is none, if he may have said no.
    pub fn is_unanswered(&self) -> bool {
        self.unanswered
    }

    /// The same refusal, where whoever said no is not who decides that, or need not be.
    pub fn as_hearsay(self) -> Self {
        Refusal { hearsay: true, ..self }
    }

    /// Whether it is such a one. Nothing that is kept is given up for it.
    pub fn is_hearsay(&self) -> bool {
        self.hearsay
    }

    /// The same refusal with more to its sentence.
    pub fn and(self, more: &str) -> Self {
        Refusal { sentence: printable(&format!("{}; {more}", self.sentence)), ..self }
    }

    /// The same refusal, as one of `volume`.
    pub fn of(self, volume: &VolumeId) -> Self {
        Refusal { volume: Some(volume.clone()), ..self }
    }

    /// The protected volume that it is about, where that was known.
    pub fn volume(&self) -> Option<&VolumeId> {
        self.volume.as_ref()
    }

    /// What kind of refusal this is.
    pub fn reason(&self) -> Reason {
        self.reason
    }

    /// The errno that the opener gets.
    pub fn errno(&self) -> i32 {
        self.reason.errno()
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.sentence)
    }
}

impl std::error::Error for Refusal {}
