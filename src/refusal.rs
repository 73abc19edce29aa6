//! Why volcrypt says no: one sentence for the operator, one errno for whoever opened the device.

use std::fmt;

/// A refusal. The errno travels through QEMU and libvirt to the caller's terminal, where only its
/// text is seen; the sentence goes to the journal, to `virsh start` (through the hook) and to the
/// operator's command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    reason: Reason,
    sentence: String,
}

/// The kinds of refusal, each with an errno of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// There is no key for the volume, or it cannot be unwrapped.
    NoKey,
    /// The key is not the one the volume was enrolled with.
    WrongKey,
    /// The key was destroyed on purpose.
    KeyDestroyed,
    /// The volume does not belong to who asks for it.
    NotAllowed,
    /// The device does not hold what was enrolled: foreign data, or another volume.
    ForeignData,
    /// Something that is asked for did not answer in time.
    TimedOut,
    /// The device is not there (any more).
    DeviceGone,
    /// The store cannot be written: read-only, full, or locked.
    StoreUnavailable,
    /// The configuration is at fault.
    Configuration,
    /// The kernel refused an operation; nothing above explains it.
    Kernel,
}

impl Reason {
    /// The errno that the opener gets.
    pub fn errno(self) -> i32 {
        match self {
            Reason::NoKey => libc::ENOKEY,
            Reason::WrongKey => libc::EKEYREJECTED,
            Reason::KeyDestroyed => libc::EKEYREVOKED,
            Reason::NotAllowed => libc::EACCES,
            Reason::ForeignData => libc::EMEDIUMTYPE,
            Reason::TimedOut => libc::ETIMEDOUT,
            Reason::DeviceGone => libc::ENODEV,
            Reason::StoreUnavailable => libc::EROFS,
            Reason::Configuration => libc::ENOTSUP,
            Reason::Kernel => libc::EIO,
        }
    }
}

impl Refusal {
    /// A refusal for `reason`; `sentence` says what is wrong and what to do.
    pub fn new(reason: Reason, sentence: impl Into<String>) -> Self {
        Refusal { reason, sentence: sentence.into() }
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
