use std::fmt;
use std::io;
use std::path::PathBuf;

use super::table::printable;
use crate::guest::is_no_device;
use crate::keys::ManagerKind;
use crate::policy::ConfigError;
use crate::protocol::CallError;
use crate::refusal::Refusal;
use crate::volume::VolumeId;

/// Why a command could not be done; its text is the sentence for the operator.
#[derive(Debug)]
pub enum CommandError {
    /// The daemon was not reached, or said no.
    Daemon(CallError),
    /// The daemon answered something that does not belong to the question.
    UnexpectedReply,
    /// The configuration file is broken.
    Configuration(ConfigError),
    /// A file could not be made or written.
    File {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A file could not be read.
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// There is nothing at a path, or nobody can tell what.
    Place {
        /// The path.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A path does not lead to a block device.
    NoDevice {
        /// The path.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// What was asked for is not possible.
    Refused(Refusal),
    /// The operator did not confirm what cannot be undone.
    NotConfirmed(VolumeId),
    /// The operator did not confirm that old keys are destroyed.
    KeysNotConfirmed(ManagerKind),
    /// A domain's definition could not be read or changed; the sentence says why.
    Domain(String),
    /// Standard input could not be read.
    Input(io::Error),
    /// What was found could not be printed.
    Output(io::Error),
}

impl fmt::Display for CommandError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            CommandError::Daemon(error) => f.write_str(&printable(&error.to_string())),
            CommandError::UnexpectedReply => f.write_str(
                "volcryptd gave an answer that does not fit the question: \
                 run 'systemctl restart volcryptd' if the package was upgraded",
            ),
            CommandError::Configuration(error) => error.fmt(f),
            CommandError::File { path, source } if source.kind() == io::ErrorKind::AlreadyExists => {
                write!(f, "{} exists already: name a file that does not, nothing is ever overwritten", path.display())
            }
            CommandError::File { path, source } => write!(f, "{} cannot be written ({source})", path.display()),
            CommandError::NoDevice { path, source } if is_no_device(source) => {
                write!(f, "{} is no block device: give one, for example /dev/sda", path.display())
            }
            CommandError::NoDevice { path, source } => write!(f, "{} cannot be looked at ({source})", path.display()),
            CommandError::Refused(refusal) => refusal.fmt(f),
            CommandError::Input(source) if source.kind() == io::ErrorKind::InvalidData => {
                f.write_str("standard input is not UTF-8: write the XML in UTF-8")
            }
            CommandError::Input(source) => write!(f, "standard input cannot be read ({source})"),
            CommandError::NotConfirmed(id) => {
                write!(f, "nothing was destroyed: type the volume's id when asked, or add --confirm {id}")
            }
            CommandError::KeysNotConfirmed(kind) => {
                write!(f, "nothing was destroyed: type {kind} when asked, or add --confirm {kind}")
            }
            CommandError::Domain(sentence) => f.write_str(&printable(sentence)),
            CommandError::Place { path, source } => {
                write!(f, "{} cannot be looked at ({source}): name a device or an image file", path.display())
            }
            CommandError::Unreadable { path, source } => {
                write!(f, "{} cannot be read ({source}): name a file with the device's XML", path.display())
            }
            CommandError::Output(source) => write!(f, "the output cannot be written ({source})"),
        }
    }
}

impl std::error::Error for CommandError {}
