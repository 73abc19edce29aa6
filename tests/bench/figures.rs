//! What volcrypt costs: one table of measured values, each beside what it is compared with and, where
//! there is one, the aim. Run through `tests/figures`.
//!
//! A missed aim is no failure; a value that cannot be measured is one. What is compared is measured
//! in turn within one run, and medians are shown, so that a busy machine falsifies a difference as
//! little as can be. On a busy machine it still can be wrong either way; where the quartiles are further
//! apart than the aim is wide, the result is `unclear`, which is no failure either.
//!
//! Wrapper and hook know one place each for the sockets, the configuration and the emulators. The
//! figures get these places to themselves in a mount namespace of their own: neither an installed
//! volcrypt nor the host sees anything of them.

#[path = "figures/audit.rs"]
mod audit;
#[path = "../key_managers/authority.rs"]
mod authority;
#[path = "figures/daemon.rs"]
mod daemon;
#[path = "figures/hook.rs"]
mod hook;
#[path = "figures/keys.rs"]
mod keys;
#[path = "figures/lab.rs"]
mod lab;
#[path = "figures/measure.rs"]
mod measure;
#[path = "figures/memory.rs"]
mod memory;
#[path = "figures/opens.rs"]
mod opens;
#[path = "figures/policy.rs"]
mod policy;
#[path = "figures/rewrite.rs"]
mod rewrite;
#[path = "figures/silence.rs"]
mod silence;
#[path = "figures/table.rs"]
mod table;
#[path = "figures/wrapper.rs"]
mod wrapper;

use std::error::Error;
use std::fs;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};

use self::daemon::Daemon;
use self::table::Figure;

type Outcome<T> = Result<T, Box<dyn Error>>;

/// Run by sh in the new namespace: an /etc with an empty /etc/volcrypt, an empty /run, and an empty
/// folder for an emulator's stand-in.
const ISOLATE: &str = "
mount -t tmpfs -o mode=755 tmpfs /run
mkdir /run/upper /run/work
mount -t overlay -o lowerdir=/etc,upperdir=/run/upper,workdir=/run/work overlay /etc
mkdir -p /etc/volcrypt
mount -t tmpfs -o mode=755 tmpfs /etc/volcrypt
mount -t tmpfs -o mode=755 tmpfs /usr/local/bin
exec \"$@\"";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let figures = match words[..] {
        // `cargo bench` says so; `cargo test --all-targets` does not, and wants no figures.
        ["--bench"] => Err(isolate()),
        ["isolated"] => host(),
        ["lab", machine, domain, unprotected, protected, plain] => {
            lab::figures(machine, domain, &[unprotected, protected, plain].map(str::as_ref))
        }
        ["attaches", domain, prepare, ref ways @ ..] => {
            let ways =
                ways.chunks_exact(3).map(|way| lab::Way { name: way[0], device: way[1].as_ref(), state: way[2] });
            lab::attaches(domain, prepare.as_ref(), &ways.collect::<Vec<_>>())
        }
        _ => return ExitCode::SUCCESS,
    };
    match figures {
        Ok(figures) => {
            table::print(&figures);
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("figures: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Starts this program again in a mount namespace of its own; returns only when it cannot.
fn isolate() -> Box<dyn Error> {
    let own = match std::env::current_exe() {
        Ok(own) => own,
        Err(error) => return error.into(),
    };
    let mut command = Command::new("unshare");
    command.args(["--mount", "--propagation", "private", "sh", "-ec", ISOLATE, "sh"]).arg(own).arg("isolated");
    format!("unshare cannot be executed: {}", command.exec()).into()
}

/// The figures that need no device-mapper and no libvirt.
fn host() -> Outcome<Vec<Figure>> {
    println!("load average of this host's {} CPUs before: {}", cpus(), fs::read_to_string("/proc/loadavg")?.trim());
    let mut figures = audit::figures()?;
    figures.extend(keys::figures()?);
    figures.extend(rewrite::figures()?);
    {
        let daemon = Daemon::start()?;
        let stand_in = wrapper::StandIn::compile(daemon.folder())?;
        figures.extend(hook::figures(&daemon)?);
        figures.extend(wrapper::figures(&stand_in)?);
        figures.extend(opens::figures()?);
        figures.extend(policy::figures(daemon.folder())?);
    }
    figures.extend(silence::figures()?);
    // A daemon that has done nothing else yet.
    let daemon = Daemon::start()?;
    let stand_in = wrapper::StandIn::compile(daemon.folder())?;
    figures.extend(memory::figures(&daemon, &stand_in)?);
    drop(daemon);
    figures.extend(keys::memory(&Daemon::start()?)?);
    Ok(figures)
}

fn cpus() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}
