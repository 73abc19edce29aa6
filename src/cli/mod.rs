//! The operator's command, `volcrypt`.
//!
//! It is a thin client: everything but `config check` and parts of `doctor` is asked of the daemon.
//! What it knows of libvirt comes in from outside as a [`doctor::Survey`], because linking libvirt
//! takes a process fourteen milliseconds to start and only this one command can afford that.

use std::io::{self, Write};
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use serde::Serialize;

use crate::policy::Config;
use crate::protocol::{CONTROL_SOCKET, ControlClient, Reply, Request};

mod arguments;
pub mod doctor;
mod error;
mod key;
mod status;
mod table;
mod time;
mod volume;

pub use arguments::{Arguments, Command, ConfigCommand, Format, KeyCommand, VolumeCommand};
pub use error::CommandError;

/// How long each step of a call to the daemon may take. A key manager that does not answer is given
/// up by the daemon earlier than that.
const DEADLINE: Duration = Duration::from_secs(60);

/// The program `volcrypt`; `survey` asks libvirt for its domains.
pub fn main(survey: doctor::Survey) -> ExitCode {
    let arguments = Arguments::parse();
    let outcome = run(&arguments, Path::new(CONTROL_SOCKET), survey).and_then(|outcome| {
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

/// What a command has to say when nothing went wrong on the way.
#[derive(Debug)]
pub struct Outcome {
    /// The text for stdout.
    pub text: String,
    /// The exit code: 1 when `doctor` found a fault.
    pub code: u8,
}

/// Does what `arguments` say, with the daemon that listens on `socket`.
///
/// # Errors
/// [`CommandError`].
pub fn run(arguments: &Arguments, socket: &Path, survey: doctor::Survey) -> Result<Outcome, CommandError> {
    let text = match &arguments.command {
        Command::Status(format) => status::show(&Daemon { socket }, *format)?,
        Command::Volume(VolumeCommand::List(format)) => volume::list(&Daemon { socket }, *format)?,
        Command::Volume(VolumeCommand::Show { id, format }) => volume::show(&Daemon { socket }, id, *format)?,
        Command::Volume(VolumeCommand::Enrol { device }) => volume::enrol(&Daemon { socket }, device)?,
        Command::Volume(VolumeCommand::Withdraw { id }) => volume::withdraw(&Daemon { socket }, id)?,
        Command::Volume(VolumeCommand::ExportKey { id, to }) => volume::export_key(&Daemon { socket }, id, to)?,
        Command::Key(KeyCommand::List(format)) => key::list(&Daemon { socket }, *format)?,
        Command::Config(ConfigCommand::Check) => {
            Config::load(&arguments.config).map_err(CommandError::Configuration)?.explain()
        }
        Command::Doctor => return Ok(doctor::examine(&arguments.config, &Daemon { socket }, survey)),
    };
    Ok(Outcome { text, code: 0 })
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
