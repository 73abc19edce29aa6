use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, Parser, Subcommand};

use super::time;
use crate::audit::Kind;
use crate::keys::{ManagerKind, PassphraseHash, SecretId};
use crate::volume::VolumeId;

/// Encryption of virtual machines' volumes on the hypervisor.
#[derive(Debug, Parser)]
#[command(name = "volcrypt", version)]
pub struct Arguments {
    /// The configuration file
    #[arg(long, value_name = "FILE", default_value = crate::policy::DEFAULT_PATH)]
    pub config: PathBuf,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

impl Arguments {
    /// The configuration file, which may be named before and after the command.
    pub fn configuration(&self) -> &Path {
        let after = match &self.command {
            Command::Config(ConfigCommand::Check(named)) | Command::Doctor(named) => named.config.as_deref(),
            Command::Policy(PolicyCommand::Test { named, .. }) => named.config.as_deref(),
            _ => None,
        };
        after.unwrap_or(&self.config)
    }
}

/// The configuration file, named after a command that reads it. To others, `--config` may mean something else.
#[derive(Args, Clone, Debug)]
pub struct Configuration {
    /// The configuration file
    #[arg(id = "configuration", long = "config", value_name = "FILE")]
    pub config: Option<PathBuf>,
}

/// What the operator can ask for.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Show what is mapped, and for whom
    Status(Format),
    /// Look at enrolled volumes and enrol new ones
    #[command(subcommand)]
    Volume(VolumeCommand),
    /// Look at keys
    #[command(subcommand)]
    Key(KeyCommand),
    /// Let domains have volumes of another owner for a time
    #[command(subcommand)]
    Grant(GrantCommand),
    /// Give domains the wrapper as their emulator, or their disks' mappings as their sources
    #[command(subcommand)]
    Domain(DomainCommand),
    /// Point the protected disks of a domain to their mappings, in its XML
    ///
    /// Reads the XML of a <domain>, or of a lone <disk> as 'virsh attach-device' takes it, from standard input and
    /// writes it to standard output, with each protected disk on /dev/mapper/volcrypt-ID and not a byte changed
    /// elsewhere. It only prints XML: no mapping is opened, no volume is enrolled, and nothing changes on this host.
    Rewrite {
        /// Give the disks of a rewritten <domain> the sources back that they had before
        #[arg(long)]
        reverse: bool,
    },
    /// Attach a device to a domain, as 'virsh attach-device' does, with its protected disk on its mapping
    ///
    /// With intercept = "xml" in the configuration, the mapping of a protected disk is made, libvirt is given the disk
    /// with the mapping for its source, and if libvirt refuses it, nothing is left. Every other device, and with
    /// intercept = "open" every device, is given to libvirt as it is. Options and their meaning are virsh's: without
    /// any, a running domain gets the device until it ends.
    AttachDevice(DeviceArguments),
    /// Detach a device from a domain, as 'virsh detach-device' does
    ///
    /// The file may hold the XML that was given to attach-device, or what 'virsh dumpxml' shows of the device. Waits
    /// until the mapping of a protected disk is gone.
    DetachDevice(DeviceArguments),
    /// Hold a disk's mapping for a domain, for programs that have libvirt attach it themselves
    ///
    /// Reads the XML of a device from standard input and writes what libvirt is to be given to standard output. A
    /// mapping is held until --release, until the domain ends, or for 10 minutes.
    Hold {
        /// The domain's name, id or UUID
        domain: String,
        /// Hold the mapping of this device no longer
        #[arg(long)]
        release: bool,
    },
    /// Look at what was done with keys and volumes, and for whom
    #[command(subcommand)]
    Audit(AuditCommand),
    /// Look at the configuration
    #[command(subcommand)]
    Config(ConfigCommand),
    /// Try the configuration
    #[command(subcommand)]
    Policy(PolicyCommand),
    /// Check what this host needs, and say how to mend what is wrong
    Doctor(Configuration),
}

/// `volcrypt volume`.
#[derive(Debug, Subcommand)]
pub enum VolumeCommand {
    /// List the enrolled volumes
    List(Format),
    /// Show one enrolled volume
    Show {
        /// The volume's id
        id: VolumeId,
        #[command(flatten)]
        #[allow(missing_docs)]
        format: Format,
    },
    /// Show what the kernel says of a device, and which rule matches and why
    Identify {
        /// A path of the device, for example /dev/sda
        path: PathBuf,
        #[command(flatten)]
        #[allow(missing_docs)]
        format: Format,
    },
    /// Make the blank volume on a device ready for its first use
    Enrol {
        /// A path of the device, for example /dev/sda
        device: PathBuf,
        /// The secret in Barbican that is to be its key, because Cinder has made it for this volume
        #[arg(long, value_name = "UUID")]
        secret: Option<SecretId>,
        /// Whom the volume belongs to, for example Nova's project: only domains of the same owner get it
        #[arg(long)]
        owner: Option<String>,
    },
    /// Take a volume into use as it is that os-brick has encrypted (provider plain) with a key of Cinder's
    ///
    /// The rule for the device has to name a profile with the cipher and the key_size of the volume's type in Cinder.
    /// Nothing is written to the volume, and it is refused unless what is decrypted is recognised: a file system, a
    /// partition table or the like.
    Adopt {
        /// A path of the device, for example /dev/sda
        device: PathBuf,
        /// The secret in Barbican that Cinder has made for this volume, its encryption_key_id
        ///
        /// It may be left out if volume_secrets in the section [barbican] names it.
        #[arg(long, value_name = "UUID")]
        secret: Option<SecretId>,
        /// How cryptsetup has hashed the passphrase: ripemd160 by default before version 2.7, and sha256 since
        ///
        /// Without it, both are tried, and the secret itself as the key.
        #[arg(long, value_name = "HASH")]
        passphrase_hash: Option<PassphraseHash>,
        /// Whom the volume belongs to, for example Nova's project: only domains of the same owner get it
        #[arg(long)]
        owner: Option<String>,
    },
    /// Give a volume to another owner
    SetOwner {
        /// The volume's id
        id: VolumeId,
        /// To whom; to everybody if nobody is named
        owner: Option<String>,
    },
    /// Take a volume out of use; its key stays, and enrolling it again brings it back
    Retire {
        /// The volume's id
        id: VolumeId,
    },
    /// Destroy a volume's key, and with it everything that stands on the volume
    Destroy {
        /// The volume's id
        id: VolumeId,
        /// Record that the key is gone, as after another host has destroyed it on a server that does not remember it
        #[arg(long)]
        gone: bool,
        /// The volume's id once more, instead of the question
        #[arg(long, value_name = "ID")]
        confirm: Option<VolumeId>,
    },
    /// Write a volume's key into a new file that only root can read
    ExportKey {
        /// The volume's id
        id: VolumeId,
        /// The file to make; it must not exist yet
        #[arg(long, value_name = "FILE")]
        to: PathBuf,
    },
}

/// `volcrypt key`.
#[derive(Debug, Subcommand)]
pub enum KeyCommand {
    /// List the keys; the keys themselves are never shown
    List(Format),
    /// Replace the key-encryption key, which wraps all keys in the database, or go on with that where it was broken off
    ///
    /// Guests notice nothing. With a key-encryption key in a file, a new one is made. With one from the credential
    /// volcrypt.kek, the new one has to be there as the credential volcrypt.kek.new. Backups of the database that were
    /// made before need the old one: keep a copy of it as long as they are kept.
    RotateKek,
    /// Copy the keys from one key manager to another, or go on with that where it was broken off
    ///
    /// Guests notice nothing, and volumes open with the keys of the key manager in use as before. Each key is read back
    /// and compared. A key that is there already is never replaced. The old keys stay until, in a second step,
    /// --destroy-old is asked for. The order: have a section for the new key manager in the configuration and run
    /// 'systemctl reload volcryptd'; run this; set type in [key_manager]; run 'systemctl restart volcryptd'; run this
    /// again, for what was enrolled meanwhile; and once all hosts are changed, run it with --destroy-old.
    Migrate {
        /// The key manager where the keys are: embedded, kmip or barbican
        #[arg(long, value_name = "KEY MANAGER")]
        from: ManagerKind,
        /// The key manager where they are to be: embedded, kmip or barbican
        #[arg(long, value_name = "KEY MANAGER")]
        to: ManagerKind,
        /// Leave the old keys where they are, which is done anyway
        #[arg(long, conflicts_with = "destroy_old")]
        keep: bool,
        /// Destroy those old keys that were copied before, after each was compared once more
        #[arg(long)]
        destroy_old: bool,
        /// The old key manager once more, instead of the question
        #[arg(long, value_name = "KEY MANAGER", requires = "destroy_old")]
        confirm: Option<ManagerKind>,
    },
    /// Copy the database, while it is in use, to a new file that only root can read
    ///
    /// The copy holds what is known of volumes, their wrapped keys and the audit log as they are at one moment. The
    /// key-encryption key is not in it: keep that elsewhere, for without it no key opens.
    Backup {
        /// The file to make, which must not exist yet; or a directory, for a file named after the time
        #[arg(value_name = "FILE|DIRECTORY")]
        to: PathBuf,
    },
    /// Put a backup in the database's place, while volcryptd is stopped; the present database is kept beside it
    ///
    /// The backup is looked at first: that it is whole, and that the key-encryption key that is here opens every key in
    /// it.
    Restore {
        /// The backup
        #[arg(value_name = "FILE")]
        backup: PathBuf,
    },
}

/// `volcrypt grant`.
#[derive(Debug, Subcommand)]
pub enum GrantCommand {
    /// Let a domain have a volume for a time, whomever the two belong to
    Add {
        /// The volume's id
        volume: VolumeId,
        /// The domain's UUID or name
        domain: String,
        /// For how long: a whole number and s, m, h or d, for example 12h
        #[arg(long = "for", value_name = "TIME", value_parser = super::grant::parse_duration)]
        duration: Duration,
    },
    /// List the grants
    List(Format),
    /// Take a grant back
    Revoke {
        /// The volume's id
        volume: VolumeId,
        /// The domain, as the grant names it
        domain: String,
    },
}

/// `volcrypt policy`.
#[derive(Debug, Subcommand)]
pub enum PolicyCommand {
    /// Say line by line what the configuration makes of a device that a domain asks for
    Test {
        /// A path of the device, for example /dev/sda
        #[arg(long)]
        device: PathBuf,
        /// The domain's name; without it, nobody in particular asks
        #[arg(long)]
        domain: Option<String>,
        /// Whom the domain belongs to
        #[arg(long, requires = "domain")]
        owner: Option<String>,
        #[command(flatten)]
        #[allow(missing_docs)]
        named: Configuration,
    },
}

/// `volcrypt domain`.
#[derive(Debug, Subcommand)]
pub enum DomainCommand {
    /// Have a domain run the wrapper in the place of its emulator, from its next start on
    Adopt {
        /// The domain's name
        name: String,
    },
    /// Give an adopted domain its emulator back
    Release {
        /// The domain's name
        name: String,
    },
    /// Point a domain's protected disks to their mappings, from its next start on
    Rewrite {
        /// The domain's name
        name: String,
    },
    /// Give the disks of a rewritten domain their sources back
    Unrewrite {
        /// The domain's name
        name: String,
    },
}

/// `volcrypt audit`.
#[derive(Debug, Subcommand)]
pub enum AuditCommand {
    /// Show the newest records, the newest last
    Show {
        /// Only those about this volume
        #[arg(long, value_name = "ID")]
        volume: Option<VolumeId>,
        /// Only those of this kind, for example key-used or refused
        #[arg(long)]
        kind: Option<Kind>,
        /// Only those since then: 2026-11-23, 2026-11-23T16:02:14Z (UTC), or so long ago: 90s, 30m, 2h, 7d
        #[arg(long, value_name = "TIME", value_parser = time::parse)]
        since: Option<i64>,
        /// How many at most
        #[arg(long, value_name = "NUMBER", default_value_t = 100)]
        limit: usize,
        #[command(flatten)]
        #[allow(missing_docs)]
        format: Format,
    },
    /// Check that no record was changed or taken out
    Verify,
}

/// `volcrypt config`.
#[derive(Debug, Subcommand)]
pub enum ConfigCommand {
    /// Check the configuration file and say what it means
    Check(Configuration),
}

/// `volcrypt attach-device` and `volcrypt detach-device`.
#[derive(Args, Clone, Debug)]
pub struct DeviceArguments {
    /// The domain's name, id or UUID
    pub domain: String,
    /// The file with the device's XML; it may be /dev/stdin
    pub file: PathBuf,
    /// Change the running domain
    #[arg(long)]
    pub live: bool,
    /// Change what libvirt keeps for the domain's next start
    #[arg(long)]
    pub config: bool,
    /// Change the domain as it is now: the running one, or what libvirt keeps of one that does not run
    #[arg(long)]
    pub current: bool,
    /// As --config, and --live as well if the domain runs
    #[arg(long)]
    pub persistent: bool,
}

/// How to print what was found.
#[derive(Args, Clone, Copy, Debug)]
pub struct Format {
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_sound() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn the_configuration_can_be_named_before_and_after_the_command() {
        for line in
            [["volcrypt", "--config", "/x", "config", "check"], ["volcrypt", "config", "check", "--config", "/x"]]
        {
            assert_eq!(Arguments::try_parse_from(line).unwrap().configuration(), Path::new("/x"));
        }
        let usual = Arguments::try_parse_from(["volcrypt", "status"]).unwrap();
        assert_eq!(usual.configuration(), Path::new("/etc/volcrypt/volcrypt.toml"));
    }
}
