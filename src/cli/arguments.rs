use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

use crate::volume::VolumeId;

/// Encryption of virtual machines' volumes on the hypervisor.
#[derive(Debug, Parser)]
#[command(name = "volcrypt", version)]
pub struct Arguments {
    /// The configuration file
    #[arg(long, value_name = "FILE", global = true, default_value = crate::policy::DEFAULT_PATH)]
    pub config: PathBuf,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
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
    /// Look at the configuration
    #[command(subcommand)]
    Config(ConfigCommand),
    /// Check what this host needs, and say how to mend what is wrong
    Doctor,
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
    /// Make the blank volume on a device ready for its first use
    Enrol {
        /// A path of the device, for example /dev/sda
        device: PathBuf,
    },
    /// Forget that a volume is enrolled, so that its device can be enrolled anew; its key stays
    Withdraw {
        /// The volume's id
        id: VolumeId,
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
}

/// `volcrypt config`.
#[derive(Debug, Subcommand)]
pub enum ConfigCommand {
    /// Check the configuration file and say what it means
    Check,
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
            assert_eq!(Arguments::try_parse_from(line).unwrap().config, PathBuf::from("/x"));
        }
        let usual = Arguments::try_parse_from(["volcrypt", "status"]).unwrap();
        assert_eq!(usual.config, PathBuf::from("/etc/volcrypt/volcrypt.toml"));
    }
}
