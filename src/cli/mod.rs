//! The operator's command, `volcrypt`.
//!
//! It is a thin client: everything but `config check`, `rewrite --reverse`, backups of the database and parts of
//! `doctor` is asked of the daemon.
//! What it knows of libvirt comes in from outside as [`Libvirt`], because linking libvirt
//! takes a process fourteen milliseconds to start and only this one command can afford that.

use std::ffi::OsStr;
use std::io::{self, Write};
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use serde::Serialize;

use self::progress::Progress;
use crate::domain::Facts;
use crate::keys::Route;
use crate::policy::Config;
use crate::protocol::{CONTROL_SOCKET, ControlClient, Reply, Request};
use crate::store::AuditQuery;

mod arguments;
mod audit;
mod backup;
mod device;
pub mod doctor;
mod domain;
mod error;
mod grant;
pub mod identify;
mod kek;
mod key;
mod migrate;
mod policy;
mod progress;
mod rewrite;
mod status;
mod table;
mod time;
mod volume;

pub use arguments::{
    Arguments, AuditCommand, Command, ConfigCommand, Configuration, DeviceArguments, DomainCommand, Format,
    GrantCommand, KeyCommand, PolicyCommand, VolumeCommand,
};
pub use device::{Affect, Change, Find, Found, Operation};
pub use domain::{Define, Definition, Look};
pub use error::CommandError;

/// How long each step of a call to the daemon may take. A key manager that does not answer is given
/// up by the daemon earlier than that.
const DEADLINE: Duration = Duration::from_secs(60);

/// What is asked of libvirt.
#[derive(Clone, Copy, Debug)]
pub struct Libvirt {
    /// Asks for its version and all domains.
    pub survey: doctor::Survey,
    /// Asks for one domain's definition.
    pub look: Look,
    /// Changes a domain's definition.
    pub define: Define,
    /// Asks for a domain by whatever it is called.
    pub find: Find,
    /// Attaches and detaches devices.
    pub change: Change,
}

/// The program `volcrypt`; `libvirt` is how libvirt is asked.
pub fn main(libvirt: Libvirt) -> ExitCode {
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => {
            // As for every other output, nobody is left to be told.
            let _ = error.print();
            return ExitCode::from(usage_code(error.exit_code(), std::env::args_os().nth(1).as_deref()));
        }
    };
    let outcome = run(&arguments, Path::new(CONTROL_SOCKET), libvirt).and_then(|outcome| {
        write_out(&mut io::stdout().lock(), &outcome.text).map_err(CommandError::Output)?;
        Ok(outcome.code)
    });
    match outcome {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            // Nobody is left to be told when even stderr is closed.
            let _ = writeln!(io::stderr(), "volcrypt: {error}");
            ExitCode::FAILURE
        }
    }
}

/// The exit code for a command line that makes no sense. Where virsh's commands are meant it is virsh's.
fn usage_code(code: i32, command: Option<&OsStr>) -> u8 {
    let is_virshs = command.is_some_and(|command| command == "attach-device" || command == "detach-device");
    match (code, is_virshs) {
        (0, _) => 0,
        (_, true) => 1,
        (_, false) => 2,
    }
}

/// What a command has to say when nothing went wrong on the way.
#[derive(Debug)]
pub struct Outcome {
    /// The text for stdout.
    pub text: String,
    /// The exit code: 1 when `doctor` or `audit verify` found a fault.
    pub code: u8,
}

/// Does what `arguments` say, with the daemon that listens on `socket`.
///
/// # Errors
/// [`CommandError`].
pub fn run(arguments: &Arguments, socket: &Path, libvirt: Libvirt) -> Result<Outcome, CommandError> {
    let daemon = &Daemon { socket };
    let text = match &arguments.command {
        Command::Status(format) => status::show(daemon, *format)?,
        Command::Volume(command) => on_volume(daemon, command)?,
        Command::Key(KeyCommand::List(format)) => key::list(daemon, *format)?,
        Command::Key(KeyCommand::RotateKek) => kek::rotate(daemon)?,
        Command::Key(KeyCommand::Migrate { from, to, destroy_old, confirm, .. }) => {
            return migrate::migrate(daemon, Route { from: *from, to: *to }, *destroy_old, *confirm);
        }
        Command::Key(KeyCommand::Backup { to }) => backup::back_up(&arguments.config, to)?,
        Command::Key(KeyCommand::Restore { backup }) => backup::restore(&arguments.config, backup)?,
        Command::Grant(GrantCommand::Add { volume, domain, duration }) => {
            grant::add(daemon, volume, domain, *duration)?
        }
        Command::Grant(GrantCommand::List(format)) => grant::list(daemon, *format)?,
        Command::Grant(GrantCommand::Revoke { volume, domain }) => grant::revoke(daemon, volume, domain)?,
        Command::Audit(AuditCommand::Show { volume, kind, since, limit, format }) => {
            let query = AuditQuery { before: None, volume: volume.clone(), kind: *kind, since: *since };
            audit::show(daemon, query, *limit, *format)?
        }
        Command::Audit(AuditCommand::Verify) => return audit::verify(daemon),
        Command::Config(ConfigCommand::Check(_)) => {
            Config::load(arguments.configuration()).map_err(CommandError::Configuration)?.explain()
        }
        Command::Policy(PolicyCommand::Test { device, domain, owner, .. }) => {
            let domain = domain.clone().map(|name| Facts { name, uuid: None, owner: owner.clone() });
            policy::test(arguments.configuration(), device, domain)?
        }
        Command::Domain(DomainCommand::Adopt { name }) => domain::adopt_domain(name, libvirt.look, libvirt.define)?,
        Command::Domain(DomainCommand::Release { name }) => domain::release_domain(name, libvirt.look, libvirt.define)?,
        Command::Domain(DomainCommand::Rewrite { name }) => domain::rewrite_domain(daemon, name, libvirt)?,
        Command::Domain(DomainCommand::Unrewrite { name }) => domain::unrewrite_domain(daemon, name, libvirt)?,
        Command::AttachDevice(arguments) => device::attach(daemon, arguments, libvirt)?,
        Command::DetachDevice(arguments) => device::detach(daemon, arguments, libvirt)?,
        Command::Hold { domain, release: false } => device::hold(daemon, domain, io::stdin().lock(), libvirt.find)?,
        Command::Hold { domain, release: true } => device::release(daemon, domain, io::stdin().lock(), libvirt.find)?,
        Command::Rewrite { reverse: false } => rewrite::forward(daemon, io::stdin().lock())?,
        Command::Rewrite { reverse: true } => rewrite::reverse(io::stdin().lock())?,
        Command::Doctor(_) => return Ok(doctor::examine(arguments.configuration(), daemon, libvirt.survey)),
    };
    Ok(Outcome { text, code: 0 })
}

fn on_volume(daemon: &Daemon<'_>, command: &VolumeCommand) -> Result<String, CommandError> {
    match command {
        VolumeCommand::List(format) => volume::list(daemon, *format),
        VolumeCommand::Show { id, format } => volume::show(daemon, id, *format),
        VolumeCommand::Identify { path, format } => identify::show(daemon, path, *format),
        VolumeCommand::Enrol { device, secret, owner } => {
            volume::enrol(daemon, device, secret.as_ref(), owner.as_deref())
        }
        VolumeCommand::Adopt { device, secret, passphrase_hash, owner } => {
            volume::adopt(daemon, device, (secret.as_ref(), *passphrase_hash), owner.as_deref())
        }
        VolumeCommand::SetOwner { id, owner } => volume::set_owner(daemon, id, owner.as_deref()),
        VolumeCommand::Retire { id } => volume::retire(daemon, id),
        VolumeCommand::Destroy { id, gone, confirm } => volume::destroy(daemon, id, *gone, confirm.as_ref()),
        VolumeCommand::ExportKey { id, to } => volume::export_key(daemon, id, to),
    }
}

/// The daemon behind a socket; every call is a connection of its own.
struct Daemon<'a> {
    socket: &'a Path,
}

impl Daemon<'_> {
    fn connect(&self) -> Result<ControlClient, CommandError> {
        ControlClient::connect(self.socket, DEADLINE).map_err(CommandError::Daemon)
    }

    fn call(&self, request: &Request) -> Result<Reply, CommandError> {
        self.connect()?.call(request).map_err(CommandError::Daemon)
    }

    /// The same for what may take minutes, of which `progress` shows how far it is.
    fn call_for_long(&self, request: &Request, progress: &mut Progress) -> Result<Reply, CommandError> {
        let mut show = |done, total| progress.show(done, total);
        self.connect()?.call_and_listen(request, &mut show).map_err(CommandError::Daemon)
    }
}

fn json(value: &impl Serialize) -> Result<String, CommandError> {
    let mut text = serde_json::to_string_pretty(value).map_err(|error| CommandError::Output(error.into()))?;
    text.push('\n');
    Ok(text)
}

/// Writes `text`; a reader that has seen enough (`volcrypt status | head -1`) is no error.
fn write_out(output: &mut impl Write, text: &str) -> io::Result<()> {
    let written = output.write_all(text.as_bytes()).and_then(|()| output.flush());
    match written {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        written => written,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Fails(io::ErrorKind);

    impl Write for Fails {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(self.0.into())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_reader_that_left_is_no_error_but_a_full_disk_is() {
        assert!(write_out(&mut Fails(io::ErrorKind::BrokenPipe), "text").is_ok());
        assert!(write_out(&mut Fails(io::ErrorKind::StorageFull), "text").is_err());
    }
}
