use std::path::Path;

use super::table::printable;
use super::{CommandError, Daemon, Libvirt, rewrite, status};
use crate::domain::{Adoption, Disk, Domain, Release, Source, adopt, quoted, release};
use crate::policy::Intercept;
use crate::volume::VolumeId;

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
                     {USUAL_DIRECTORY} as qemu-system-ARCH, and not a link to it or kvm ('virsh edit {0}'), and run '/usr/libexec/volcrypt/link-emulators'",
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
            Ok(format!("Domain {shown} runs {emulator} from its next start on.{}\n", as_it_is(running)))
        }
    }
}

/// Points the protected disks of the domain `name` to their mappings, in what libvirt keeps of it.
pub(super) fn rewrite_domain(daemon: &Daemon<'_>, name: &str, libvirt: Libvirt) -> Result<String, CommandError> {
    let shown = printable(name);
    if status::ask(daemon)?.intercept != Intercept::Xml {
        return Err(CommandError::Domain(format!(
            "with intercept = \"open\" nothing makes the mappings that domain {shown} would name, and its disks get to them \
             as they are: leave it, or set intercept = \"xml\" in the section [hook] and run 'systemctl reload volcryptd'"
        )));
    }
    let (before, running) = definition(name, libvirt.look)?;
    let after = rewrite::forward(daemon, before.as_bytes())?;
    if after == before {
        return Ok(format!("Domain {shown} names no protected volume by its own device: it stays as it is.\n"));
    }
    (libvirt.define)(&after).map_err(CommandError::Domain)?;
    let changed = changed(&before, &after).map(|(_, now)| on_mapping(&now)).collect::<Vec<_>>();
    Ok(format!(
        "Domain {shown} has its protected disks on their mappings from its next start on: {}.{}\n",
        printable(&changed.join(", ")),
        as_it_is(running)
    ))
}

/// Gives the disks of the domain `name` the sources back that they had before it was rewritten.
pub(super) fn unrewrite_domain(daemon: &Daemon<'_>, name: &str, libvirt: Libvirt) -> Result<String, CommandError> {
    let (before, running) = definition(name, libvirt.look)?;
    let shown = printable(name);
    let after = rewrite::back(daemon, before.clone())?;
    let mut text = match after == before {
        true => format!("Domain {shown} was not rewritten: it stays as it is.\n"),
        false => {
            (libvirt.define)(&after).map_err(CommandError::Domain)?;
            let disks: Vec<_> = changed(&before, &after).map(|(_, now)| now.target).collect();
            let disks = printable(&disks.join(", "));
            format!("Domain {shown} has its own sources again from its next start on: {disks}.{}\n", as_it_is(running))
        }
    };
    let left = disks(&after).into_iter().filter(|disk| mapping(disk).is_some());
    for disk in left.map(|disk| on_mapping(&disk)) {
        text.push_str(&format!(
            "Disk {} stays on its mapping: it was attached so, and nothing says what its device is called.\n",
            printable(&disk)
        ));
    }
    Ok(text)
}

/// The disks whose sources differ.
fn changed(before: &str, after: &str) -> impl Iterator<Item = (Disk, Disk)> {
    disks(before).into_iter().zip(disks(after)).filter(|(before, after)| before.source != after.source)
}

fn disks(xml: &str) -> Vec<Disk> {
    Domain::parse(xml).map(|domain| domain.disks).unwrap_or_default()
}

fn mapping(disk: &Disk) -> Option<VolumeId> {
    match &disk.source {
        Source::Path(path) => VolumeId::of_mapping(path),
        _ => None,
    }
}

fn on_mapping(disk: &Disk) -> String {
    let volume = mapping(disk).map(|volume| format!(" (volume {volume})")).unwrap_or_default();
    format!("{}{volume}", disk.target)
}

fn as_it_is(running: bool) -> &'static str {
    if running { " What runs now goes on as it is." } else { "" }
}

fn definition(name: &str, look: Look) -> Result<(String, bool), CommandError> {
    let shown = printable(name);
    let sentence = match look(name).map_err(CommandError::Domain)? {
        Some(Definition { saved: Some(xml), running }) => return Ok((xml, running)),
        Some(_) => format!(
            "domain {shown} is transient, so libvirt keeps no definition that could be changed: end it, and create it \
             anew as it is to be"
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

    use crate::protocol::{GuardStatus, Reply, Request, Response, Status};
    use std::cell::RefCell;
    use std::io::{BufRead, BufReader, Write};
    use std::os::unix::net::UnixListener;

    const RAW: &str = "<domain>\n  <name>web</name>\n  <devices>\n    <disk type='block'><source dev='/dev/sda'/><target \
                       dev='vda'/></disk>\n    <disk type='block'><source dev='/dev/sdx'/><target dev='vdb'/></disk>\n  \
                       </devices>\n</domain>";

    thread_local! {
        static KEPT: RefCell<Option<String>> = RefCell::default();
    }

    /// What libvirt keeps of the domain.
    fn libvirt() -> Libvirt {
        Libvirt {
            survey: || Err("not asked".into()),
            look: |_| Ok(Some(Definition { saved: KEPT.with_borrow(Clone::clone), running: true })),
            define: |xml| {
                KEPT.set(Some(xml.to_owned()));
                Ok(())
            },
            find: |_| Ok(None),
            change: |_, _, _, _| Ok(()),
        }
    }

    /// What `command` says, asking a daemon that works so and rewrites as one to which /dev/sda is the volume `a`, and puts
    /// back nothing if it was `moved`.
    fn ask(
        intercept: Intercept,
        moved: bool,
        command: fn(&Daemon<'_>, &str, Libvirt) -> Result<String, CommandError>,
    ) -> Result<String, CommandError> {
        let folder = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(folder.path().join("control.sock")).unwrap();
        std::thread::spawn(move || {
            while let Ok((mut stream, _)) = listener.accept() {
                let mut line = String::new();
                BufReader::new(&stream).read_line(&mut line).unwrap();
                let response = match serde_json::from_str(&line).unwrap() {
                    Request::Unrewrite { .. } if moved => {
                        Response::Refused { sentence: "/dev/sda is volume b now".into(), errno: libc::EACCES }
                    }
                    Request::Unrewrite { xml } => Response::Done(Reply::Xml(crate::domain::unrewrite(&xml).unwrap())),
                    Request::Rewrite { xml } => {
                        let of_sda = |_: Option<&crate::domain::Facts>, source: &Source| {
                            Ok((*source == Source::Path("/dev/sda".into())).then(|| "a".parse().unwrap()))
                        };
                        Response::Done(Reply::Xml(crate::domain::rewrite(&xml, &of_sda).unwrap().xml))
                    }
                    _ => Response::Done(Reply::Status(Box::new(Status {
                        version: "x".into(),
                        configuration_error: None,
                        key_store_error: None,
                        keys_left_behind: None,
                        mappings: vec![],
                        guests: vec![],
                        intercept,
                        guard: GuardStatus::default(),
                        key_cache: None,
                    }))),
                };
                writeln!(stream, "{}", serde_json::to_string(&response).unwrap()).unwrap();
            }
        });
        command(&Daemon { socket: &folder.path().join("control.sock") }, "web", libvirt())
    }

    fn rewritten_with(intercept: Intercept) -> Result<String, CommandError> {
        ask(intercept, false, rewrite_domain)
    }

    fn unrewritten() -> Result<String, CommandError> {
        ask(Intercept::Open, false, unrewrite_domain)
    }

    #[test]
    fn a_definition_is_rewritten_and_comes_back() {
        KEPT.set(Some(RAW.to_owned()));
        let sentence = sentence(rewritten_with(Intercept::Open));
        assert!(sentence.starts_with("with intercept = \"open\" nothing makes the mappings"), "{sentence}");
        assert_eq!(KEPT.with_borrow(Clone::clone).as_deref(), Some(RAW));
        assert_eq!(
            rewritten_with(Intercept::Xml).unwrap(),
            "Domain web has its protected disks on their mappings from its next start on: vda (volume a). What runs now \
             goes on as it is.\n"
        );
        let kept = KEPT.with_borrow(Clone::clone);
        assert!(kept.as_ref().unwrap().contains("'/dev/mapper/volcrypt-a'"));
        let again = rewritten_with(Intercept::Xml).unwrap();
        assert_eq!(again, "Domain web names no protected volume by its own device: it stays as it is.\n");
        assert_eq!(KEPT.with_borrow(Clone::clone), kept);

        let refused = ask(Intercept::Open, true, unrewrite_domain).unwrap_err().to_string();
        assert_eq!(refused, "/dev/sda is volume b now");
        assert_eq!(KEPT.with_borrow(Clone::clone), kept);
        assert_eq!(
            unrewritten().unwrap(),
            "Domain web has its own sources again from its next start on: vda. What runs now goes on as it is.\n"
        );
        assert_eq!(KEPT.with_borrow(Clone::clone).as_deref(), Some(RAW));
        assert_eq!(unrewritten().unwrap(), "Domain web was not rewritten: it stays as it is.\n");
        // One that was attached on its mapping has no note.
        KEPT.set(Some(RAW.replace("/dev/sdx", "/dev/mapper/volcrypt-b")));
        let text = unrewritten().unwrap();
        assert!(text.contains("Disk vdb (volume b) stays on its mapping: it was attached so"), "{text}");
    }
}
