//! `volcryptd`: the only holder of keys and maker of mappings.

mod arrivals;
mod attach;
mod auditing;
mod broker;
mod by_xml;
mod control;
mod deadlines;
mod devices;
mod guests;
mod holds;
mod identify;
mod in_use;
mod incoming;
mod inspection;
mod keys;
mod limit;
mod pool;
mod prepare;
mod receivers;
mod refused;
mod registrar;
mod restoring;
mod rewrite;
mod server;
mod service_manager;
mod sight;
mod status;
mod turns;
mod uses;

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;

use clap::Parser;

use self::broker::Broker;
use self::control::Control;
use self::devices::HostDevices;
use self::guests::Guests;
use self::pool::Pool;
use self::registrar::Registrar;
use self::server::Server;
use self::service_manager::Inherited;
use crate::encryptor::PlainEncryptor;
use crate::guard::{self, Guard};
use crate::guest::LibvirtState;
use crate::logging;
use crate::policy::{Config, DEFAULT_PATH, DaemonConfig};
use crate::protocol::{CONTROL_SOCKET, WRAPPER_SOCKET};
use crate::sys::memory;
use crate::sys::signals::Signal;

/// How many threads may answer guests and clients at the same time. A thread that waits for dead
/// storage is lost until the storage answers, so there are many.
const MOST_WORKERS: usize = 256;
/// How many threads serve each of the two sockets.
const MOST_CLIENTS: usize = 64;
/// How many announced devices may wait to be looked at.
const MOST_ANNOUNCED: usize = 1024;

/// The daemon that holds the keys and makes the mappings of protected volumes.
#[derive(Debug, Parser)]
#[command(name = "volcryptd", version)]
struct Options {
    /// The configuration file
    #[arg(long, value_name = "FILE", default_value = DEFAULT_PATH)]
    config: PathBuf,
    /// Take the guard off guests and end; for when volcrypt is removed
    #[arg(long)]
    remove_guard: bool,
}

/// How long the daemon goes on for those whose mappings are held, once it is told to end. systemd's patience is longer.
const END_WITHIN: Duration = Duration::from_secs(20);

/// How long an answer that is being written takes at most.
const ANSWERS_WITHIN: Duration = Duration::from_millis(200);

/// Runs the daemon until it is killed. There is nothing to put in order at the end: the kernel has
/// the mappings, systemd the listeners, and the next daemon takes up both.
pub fn main() -> ExitCode {
    let options = Options::parse();
    logging::start("volcryptd");
    let outcome = if options.remove_guard { guard::remove() } else { run(&options) };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("volcryptd cannot run: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> io::Result<()> {
    protect_memory()?;
    // Before there is any other thread, which would take the signals.
    let (hangup, termination) = (Signal::hangup()?, Signal::termination()?);
    let inherited = Inherited::take()?;
    let config = Config::load(&options.config);
    if let Err(error) = &config {
        tracing::error!("{error}; until that is mended and volcryptd reloaded, guests can open no block device");
    }
    let settings = config.as_ref().map_or_else(|_| DaemonConfig::default(), |config| config.daemon.clone());
    let users = user_ids(&settings.qemu_users);
    let status = match &config {
        Ok(_) => "Serving".to_owned(),
        Err(error) => format!("Refusing every block device: {error}"),
    };

    let guard = Arc::new(Guard::start(config.clone().map_err(|error| error.to_string())));
    let devices = Box::new(HostDevices::new(Arc::clone(&guard)));
    let domains = Box::new(LibvirtState::system());
    let broker = Arc::new(Broker::new(config, devices, domains, Box::new(PlainEncryptor::new())));
    let ending = Arc::clone(broker.holds());
    start("termination", move || {
        termination.wait();
        ending.await_none(END_WITHIN);
        // Whoever has just had the last hold ended still gets the answer.
        thread::sleep(ANSWERS_WITHIN);
        termination.act();
    })?;
    let knowing = Arc::downgrade(&broker);
    guard.know_enrolled(Box::new(move |device| knowing.upgrade()?.is_enrolled(device)));
    if let Err(refusal) = control::sweep(&broker) {
        tracing::warn!("mappings of an earlier daemon were not looked for: {refusal}");
    }
    let guests = Arc::new(Guests::new(Arc::new(LibvirtState::system()))?);
    let registrar = Registrar::new(Arc::clone(&guests), users);
    registrar.take_up(inherited.guests);

    let wrapper_socket = inherited.wrapper.map_or_else(|| bind(WRAPPER_SOCKET.as_ref(), 0o666), Ok)?;
    let control_socket = inherited.control.map_or_else(|| bind(CONTROL_SOCKET.as_ref(), 0o600), Ok)?;
    let control = Control::new(Arc::clone(&broker), Arc::clone(&guests), {
        let guard = Arc::clone(&guard);
        Box::new(move || guard.status())
    });
    let keeper = Arc::clone(broker.holds());
    start("holds", move || keeper.keep())?;
    let told = Arc::clone(&broker);
    start("in-use", move || in_use::keep(&told))?;
    start("control", move || control.serve(&control_socket, &Pool::new(MOST_CLIENTS)))?;
    let (announce, announced) = mpsc::sync_channel(MOST_ANNOUNCED);
    let fetching = Arc::clone(&broker);
    start("fetch-ahead", move || {
        // Kept keys whose time is over, or that are not to be kept any more, are wiped whether or not a guest starts.
        if fetching.asks_a_server()
            && let Err(refusal) = fetching.vault()
        {
            tracing::error!("the key store cannot be opened: {refusal}");
        }
        announced.into_iter().for_each(|device| fetching.fetch_ahead(device));
    })?;
    let (watched, asking) = (Arc::clone(&guard), Arc::clone(&broker));
    start("guard", move || {
        // What comes when there are too many already has its key fetched when it is opened.
        guard::watch(&watched, &|device| {
            if asking.asks_a_server() {
                let _ = announce.try_send(device);
            }
        })
    })?;
    let (reloaded, path) = (Arc::clone(&broker), options.config.clone());
    start("reload", move || {
        loop {
            hangup.wait();
            reload(&reloaded, &guard, &path);
        }
    })?;
    start("registrar", move || registrar.serve(&wrapper_socket, &Pool::new(MOST_CLIENTS)))?;

    service_manager::ready(&status);
    Server::new(broker, guests, Pool::new(MOST_WORKERS), settings.open_deadline).serve()
}

/// Reads the configuration anew. A faulty one is told of and changes nothing.
fn reload(broker: &Broker, guard: &Guard, path: &Path) {
    let earlier = broker.config();
    match broker.reload(Config::load(path)) {
        Ok(config) => {
            guard.reload(Ok(Config::clone(&config)));
            broker.record_reload(path);
            tracing::info!("the configuration in {} is in force", path.display());
            if earlier.is_ok_and(|earlier| earlier.daemon != config.daemon) {
                tracing::warn!("the section [daemon] has changed, which takes 'systemctl restart volcryptd'");
            }
        }
        Err(why) => tracing::error!("the earlier configuration stays in force: {why}"),
    }
}

/// No core dump, no tracing by others, no swap.
fn protect_memory() -> io::Result<()> {
    rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::NotDumpable)?;
    let none = rustix::process::Rlimit { current: Some(0), maximum: Some(0) };
    rustix::process::setrlimit(rustix::process::Resource::Core, none)?;
    memory::lock_all().map_err(|error| {
        io::Error::new(error.kind(), format!("memory cannot be locked ({error}): LimitMEMLOCK=infinity is needed"))
    })
}

/// A socket of our own, for a daemon that systemd did not start.
fn bind(path: &Path, mode: u32) -> io::Result<UnixListener> {
    let explain = |error: io::Error| {
        io::Error::new(error.kind(), format!("the socket {} cannot be made: {error}", path.display()))
    };
    if let Some(directory) = path.parent() {
        fs::create_dir_all(directory).map_err(explain)?;
    }
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(explain(error)),
        _ => {}
    }
    // Between bind and chmod nobody but root may connect.
    let previous = rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o177));
    let socket = UnixListener::bind(path).map_err(explain);
    rustix::process::umask(previous);
    let socket = socket?;
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).map_err(explain)?;
    Ok(socket)
}

fn start(name: &str, work: impl FnOnce() + Send + 'static) -> io::Result<()> {
    thread::Builder::new().name(name.to_owned()).stack_size(256 << 10).spawn(work)?;
    Ok(())
}

/// The numbers of those `users` that the host has, from /etc/passwd, where packages put theirs.
fn user_ids(users: &[String]) -> Vec<u32> {
    let passwd = fs::read_to_string("/etc/passwd").unwrap_or_default();
    parse_user_ids(&passwd, users)
}

fn parse_user_ids(passwd: &str, users: &[String]) -> Vec<u32> {
    let entry = |line: &str| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        let id = fields.nth(1)?.parse().ok()?;
        users.iter().any(|user| user == name).then_some(id)
    };
    passwd.lines().filter_map(entry).collect()
}

#[cfg(test)]
mod tests;

#[cfg(test)]
mod unit_tests {
    use super::*;

    #[test]
    fn users_that_the_host_lacks_are_left_out() {
        let passwd = "root:x:0:0:root:/root:/bin/sh\nlibvirt-qemu:x:64055:994::/var/lib/libvirt:/bin/false\nbad\n";
        let users = ["libvirt-qemu".to_owned(), "qemu".to_owned()];
        assert_eq!(parse_user_ids(passwd, &users), [64055]);
    }
}
