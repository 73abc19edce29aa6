//! `volcrypt-qemu`: what libvirt finds under the names `qemu-system-*`.
//!
//! It hands a listener for the calls that open files to the daemon and becomes the real QEMU of the
//! same name. The arguments stay as they are, and no descriptor is added: the socket and the listener
//! are closed by the kernel on the way.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Duration;

use crate::protocol::{EMULATOR_DIRECTORY, WRAPPER_SOCKET, registration};
use crate::sys::seccomp;
use crate::unguarded::Marker;

/// Where the real emulators are, in this order. `PATH` is not asked: it leads here.
const REAL_DIRECTORIES: [&str; 3] = ["/usr/bin", "/usr/libexec", "/usr/local/bin"];

/// How long the daemon may take to register this process. libvirt waits longer for its QEMU.
const REGISTRATION_DEADLINE: Duration = Duration::from_secs(25);

/// Registers and becomes QEMU; returns only when it cannot.
pub fn main() -> ExitCode {
    let mut arguments = std::env::args_os();
    let called_as = arguments.next().unwrap_or_default();
    let rest: Vec<OsString> = arguments.collect();
    let sentence = match become_qemu(&called_as, &rest) {
        Err(sentence) => sentence,
        Ok(never) => match never {},
    };
    eprintln!("volcrypt-qemu: {sentence}");
    ExitCode::FAILURE
}

fn become_qemu(called_as: &OsStr, arguments: &[OsString]) -> Result<std::convert::Infallible, String> {
    let qemu = real_qemu(called_as, &REAL_DIRECTORIES.map(Path::new))?;
    if !starts_no_guest(arguments) {
        match UnixStream::connect(WRAPPER_SOCKET) {
            Ok(stream) => register(&stream)?,
            Err(_) if may_go_unguarded(arguments) => {}
            Err(error) => return Err(unreachable_daemon(&error)),
        }
    }
    let error = Command::new(&qemu).arg0(called_as).args(arguments).exec();
    Err(format!("{} cannot be executed: {error}", qemu.display()))
}

fn register(stream: &UnixStream) -> Result<(), String> {
    stream.set_read_timeout(Some(REGISTRATION_DEADLINE)).map_err(|error| unreachable_daemon(&error))?;
    stream.set_write_timeout(Some(REGISTRATION_DEADLINE)).map_err(|error| unreachable_daemon(&error))?;
    // From here on every open of this process waits for the daemon, so there is none before exec.
    let listener = seccomp::install_filter().map_err(|error| {
        format!("the kernel does not let opens be handed to volcryptd ({error}): run 'volcrypt doctor'")
    })?;
    registration::hand_over(stream, &listener).map_err(|error| {
        format!("volcryptd did not take this domain ({error}), so it is not started: run 'journalctl -u volcryptd' to see why")
    })
}

fn unreachable_daemon(error: &std::io::Error) -> String {
    format!(
        "volcryptd cannot be reached on {WRAPPER_SOCKET} ({error}), so the domain is not started: run 'systemctl status \
         volcryptd' to see why"
    )
}

/// The emulator of the same name outside the folder of our links.
fn real_qemu(called_as: &OsStr, directories: &[&Path]) -> Result<PathBuf, String> {
    let name = Path::new(called_as).file_name().unwrap_or_default();
    if !name.as_bytes().starts_with(b"qemu-") {
        return Err(format!(
            "{} is called through a link named like an emulator, for example {EMULATOR_DIRECTORY}/qemu-system-x86_64",
            name.display()
        ));
    }
    let own = std::fs::metadata("/proc/self/exe").map(|file| (file.dev(), file.ino())).ok();
    let is_another = |path: &PathBuf| std::fs::metadata(path).is_ok_and(|file| Some((file.dev(), file.ino())) != own);
    directories.iter().map(|directory| directory.join(name)).find(is_another).ok_or_else(|| {
        let places: Vec<_> = directories.iter().map(|directory| directory.display().to_string()).collect();
        format!("there is no {} in {}: install it", name.display(), places.join(", "))
    })
}

/// libvirt asks an emulator for its abilities by starting it with the machine `none`, which has no
/// disks; people ask for its version or its help. Such a question stands alone: among other arguments
/// it could be a text that the author of a domain chose, a kernel's command line for example.
fn starts_no_guest(arguments: &[OsString]) -> bool {
    if let [only] = arguments {
        return ["-version", "--version", "-help", "--help", "-h"].iter().any(|ask| only == ask);
    }
    let opens_disk = arguments
        .iter()
        .any(|argument| ["-blockdev", "-drive", "-hda", "-cdrom", "-incoming"].iter().any(|option| argument == option));
    !opens_disk && machine(arguments).is_some_and(|machine| machine == b"none" || machine.starts_with(b"none,"))
}

fn machine(arguments: &[OsString]) -> Option<&[u8]> {
    value_of(arguments, &["-machine", "-M"])
}

/// Whether the hook let this domain start although the daemon is away.
fn may_go_unguarded(arguments: &[OsString]) -> bool {
    let uuid = value_of(arguments, &["-uuid"]).map(String::from_utf8_lossy);
    uuid.is_some_and(|uuid| Marker::of_uuid(&uuid).is_set())
}

fn value_of<'a>(arguments: &'a [OsString], options: &[&str]) -> Option<&'a [u8]> {
    let at = arguments.iter().position(|argument| options.iter().any(|option| argument == option))?;
    arguments.get(at + 1).map(|value| value.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arguments(line: &str) -> Vec<OsString> {
        line.split(' ').map(OsString::from).collect()
    }

    #[test]
    fn questions_to_the_emulator_start_no_guest() {
        let probe =
            "-S -no-user-config -nodefaults -nographic -machine none,accel=kvm:tcg -qmp unix:/x,server=on -daemonize";
        for line in [probe, "-machine none", "-M none", "--version", "-version", "-h"] {
            assert!(starts_no_guest(&arguments(line)), "{line}");
        }
    }

    #[test]
    fn guests_are_registered() {
        for line in [
            "-name guest=a -machine pc-q35-10.0,usb=off",
            "",
            "-machine nonesuch",
            "-machine none -blockdev {}",
            "-machine pc -device none",
            "-name none",
            "-machine pc -append -h",
            "-machine pc -append --version",
        ] {
            assert!(!starts_no_guest(&arguments(line)), "{line}");
        }
    }

    #[test]
    fn the_real_emulator_has_the_same_name_and_is_not_this_program() {
        let folder = tempfile::tempdir().unwrap();
        let (links, bin) = (folder.path().join("links"), folder.path().join("bin"));
        for directory in [&links, &bin] {
            std::fs::create_dir(directory).unwrap();
        }
        std::os::unix::fs::symlink("/proc/self/exe", links.join("qemu-system-x86_64")).unwrap();
        let called_as = links.join("qemu-system-x86_64");
        let missing = real_qemu(called_as.as_os_str(), &[&links, &bin]).unwrap_err();
        assert!(missing.contains("there is no qemu-system-x86_64"), "{missing}");
        std::fs::write(bin.join("qemu-system-x86_64"), "").unwrap();
        assert_eq!(real_qemu(called_as.as_os_str(), &[&links, &bin]).unwrap(), bin.join("qemu-system-x86_64"));
        assert!(real_qemu(OsStr::new("volcrypt-qemu"), &[&bin]).is_err());
    }
}
