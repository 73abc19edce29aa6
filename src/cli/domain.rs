use std::path::Path;

use super::CommandError;
use super::table::printable;
use crate::domain::{Adoption, Release, adopt, quoted, release};

/// Where the wrapper finds the QEMU that a domain most likely ran before.
const USUAL_DIRECTORY: &str = "/usr/bin";

/// What libvirt keeps of a domain.
#[derive(Clone, Debug)]
pub struct Definition {
    /// The XML of its next start, with secrets in it. None for a transient domain.
    pub saved: Option<String>,
    /// Whether it runs now.
    pub running: bool,
}

/// Asks libvirt for a domain by its name; there may be none. The error is libvirt's own sentence.
pub type Look = fn(&str) -> Result<Option<Definition>, String>;
/// Has libvirt keep a definition. The error is libvirt's own sentence.
pub type Define = fn(&str) -> Result<(), String>;

/// Gives the domain `name` the wrapper as its emulator.
pub(super) fn adopt_domain(name: &str, look: Look, define: Define) -> Result<String, CommandError> {
    let (xml, running) = definition(name, look)?;
    let shown = printable(name);
    match adopt(&xml).map_err(|error| CommandError::Domain(error.to_string()))? {
        Adoption::Already => Ok(format!("Domain {shown} names volcrypt's wrapper as its emulator already.\n")),
        Adoption::Changed { xml, from, to } => {
            if !Path::new(&to).exists() {
                return Err(CommandError::Domain(format!(
                    "domain {shown} runs {from}, and there is no {to}: give it an emulator that is installed in \
                     {USUAL_DIRECTORY} ('virsh edit {0}'), and run '/usr/libexec/volcrypt/link-emulators'",
                    quoted(name)
                )));
            }
            define(&xml).map_err(CommandError::Domain)?;
            let mut text = format!("Domain {shown} runs {to} instead of {from} from its next start on.\n");
            if Path::new(&from).parent() != Some(Path::new(USUAL_DIRECTORY)) {
                text.push_str(&format!(
                    "The wrapper starts the emulator of that name in {USUAL_DIRECTORY}, if there is one.\n"
                ));
            }
            text.push_str(&when(name, running));
            Ok(text)
        }
    }
}

/// Gives the domain `name` the emulator back that it had before it was adopted.
pub(super) fn release_domain(name: &str, look: Look, define: Define) -> Result<String, CommandError> {
    let (xml, running) = definition(name, look)?;
    let shown = printable(name);
    match release(&xml).map_err(|error| CommandError::Domain(error.to_string()))? {
        Release::NotAdopted => Ok(format!("Domain {shown} was not adopted: its emulator stays as it is.\n")),
        Release::Changed { xml, emulator } => {
            define(&xml).map_err(CommandError::Domain)?;
            let emulator = emulator.unwrap_or_else(|| "libvirt's own choice".to_owned());
            let later = if running { " What runs now goes on as it is." } else { "" };
            Ok(format!("Domain {shown} runs {emulator} from its next start on.{later}\n"))
        }
    }
}

fn definition(name: &str, look: Look) -> Result<(String, bool), CommandError> {
    let shown = printable(name);
    let sentence = match look(name).map_err(CommandError::Domain)? {
        Some(Definition { saved: Some(xml), running }) => return Ok((xml, running)),
        Some(_) => format!(
            "domain {shown} is transient, so libvirt keeps no definition that could be changed: end it, and create it \
             with the emulator in /usr/libexec/volcrypt/emulators or with none"
        ),
        None => format!("there is no domain {shown}: 'virsh list --all' shows those there are"),
    };
    Err(CommandError::Domain(sentence))
}

/// A guest that runs keeps its QEMU.
fn when(name: &str, running: bool) -> String {
    match running {
        false => String::new(),
        true => format!(
            "It runs now, and goes on without the wrapper until it was shut down and started again (a reboot is not \
             enough): virsh shutdown {0}; virsh start {0}\nUntil then the guard keeps protected volumes from it: \
             'volcrypt status' says whether it is on.\n",
            quoted(name)
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: &str = "<domain><devices><emulator>/usr/bin/qemu-none</emulator></devices></domain>";

    fn unreachable(_: &str) -> Result<(), String> {
        panic!("nothing may be defined")
    }

    fn sentence(outcome: Result<String, CommandError>) -> String {
        outcome.unwrap_err().to_string()
    }

    #[test]
    fn a_domain_without_a_definition_gets_a_sentence() {
        for change in [adopt_domain, release_domain] {
            let none = sentence(change("x\u{1b}", |_| Ok(None), unreachable));
            assert_eq!(none, "there is no domain x?: 'virsh list --all' shows those there are");
            let transient = change("x", |_| Ok(Some(Definition { saved: None, running: true })), unreachable);
            assert!(sentence(transient).starts_with("domain x is transient"));
            assert_eq!(sentence(change("x", |_| Err("no libvirt".into()), unreachable)), "no libvirt");
        }
    }

    #[test]
    fn an_emulator_without_a_wrapper_is_refused() {
        let look: Look = |_| Ok(Some(Definition { saved: Some(PLAIN.into()), running: false }));
        let sentence = sentence(adopt_domain("x", look, unreachable));
        assert!(sentence.contains("there is no /usr/libexec/volcrypt/emulators/qemu-none"), "{sentence}");
        assert!(release_domain("x", look, unreachable).unwrap().contains("was not adopted"));
    }
}
