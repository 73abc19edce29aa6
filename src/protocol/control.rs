use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::Identification;
use super::status::{KeyPage, Status, VolumeStatus};
use crate::audit::Link;
use crate::keys::{KekRotation, MigrationProgress, MigrationStep, PassphraseHash, RotationStep, SecretId};
use crate::store::{AuditPage, AuditQuery, Grant, Verified};
use crate::volume::VolumeId;

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
    /// Give the disks in a domain's XML the sources back that they had before it was rewritten, if these lead to the
    /// same volumes.
    Unrewrite {
        /// The XML of a domain.
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
    /// The answer to [`Request::Rewrite`] and to [`Request::Unrewrite`]; and to a hook whose domain libvirt is to read from this in the place of
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
