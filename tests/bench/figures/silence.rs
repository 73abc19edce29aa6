//! What a key server that accepts connections and never answers costs those who want nothing of it.

use std::fs::{self, File, Permissions};
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use volcrypt::protocol::{CONTROL_SOCKET, ControlClient, Reply, Request};

use crate::Outcome;
use crate::authority::Authority;
use crate::daemon::Daemon;
use crate::measure::summary;
use crate::opens::{Openers, open_device};
use crate::table::{Aim, Figure, Measured};

/// More than the daemon has threads for guests, and than it has for clients.
const WAITING: usize = 300;
const ROUNDS: usize = 40;
const AIM: Duration = Duration::from_millis(10);
/// The longest deadline that a KMIP server can have.
const DEADLINE: Duration = Duration::from_secs(60);

/// A guest's open of a device that is not protected, and a question at the control socket, while many wait for their
/// keys, against the same while nobody does.
pub fn figures() -> Outcome<Vec<Figure>> {
    let authority = Authority::new("authority");
    let (server, accepted) = silent_server()?;
    let path = |name: &str| authority.folder().join(name);
    let kmip = format!(
        "[kmip]\nservers = [\"127.0.0.1:{server}\"]\nca = {:?}\ncertificate = {:?}\nkey = {:?}\ndeadline_seconds = {}\n",
        path("ca.pem"),
        path("client.pem"),
        path("client.key"),
        DEADLINE.as_secs()
    );
    let daemon = Daemon::start_saying("type = \"kmip\"\n", &kmip)?;
    fs::set_permissions(daemon.store(), Permissions::from_mode(0o700))?;
    let openers = Openers::start()?;
    let device = open_device()?;

    openers.times(ROUNDS, &device)?;
    let mut before = openers.times(ROUNDS, &device)?;
    let mut asked_before = questions()?;
    let file = Arc::new(File::create(daemon.folder().join("keys"))?);
    for number in 0..WAITING {
        let (file, id) = (Arc::clone(&file), format!("volume-{number}").parse()?);
        std::thread::Builder::new().stack_size(64 << 10).spawn(move || {
            // It waits until the daemon ends.
            let client = ControlClient::connect(CONTROL_SOCKET.as_ref(), DEADLINE);
            client.map(|client| client.call_with_file(&Request::ExportKey { id }, &file))
        })?;
    }
    let end = Instant::now() + DEADLINE / 2;
    while accepted.load(Ordering::Relaxed) < WAITING {
        if Instant::now() > end {
            return Err(format!("only {} wait for their keys", accepted.load(Ordering::Relaxed)).into());
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    let mut meanwhile = openers.times(ROUNDS, &device)?;
    let mut asked_meanwhile = questions()?;
    let slowest = |times: &[Duration]| Measured::time(times.iter().max().copied().unwrap_or_default(), Duration::ZERO);
    let slowest = [slowest(&meanwhile), slowest(&before)];
    Ok(vec![
        Figure {
            what: format!("open of {}, while {WAITING} keys are waited for", device.display()),
            value: summary(&mut meanwhile),
            compared: ("nobody waits".to_owned(), summary(&mut before)),
            aim: Aim::Over(AIM),
        },
        Figure {
            what: "slowest of these opens".to_owned(),
            value: slowest[0],
            compared: ("nobody waits".to_owned(), slowest[1]),
            aim: Aim::None,
        },
        Figure {
            what: "question at the control socket meanwhile".to_owned(),
            value: summary(&mut asked_meanwhile),
            compared: ("nobody waits".to_owned(), summary(&mut asked_before)),
            aim: Aim::Over(AIM),
        },
    ])
}

/// The port of a server that accepts and never answers, and how many connections it has.
fn silent_server() -> Outcome<(u16, Arc<AtomicUsize>)> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let port = listener.local_addr()?.port();
    let accepted = Arc::new(AtomicUsize::new(0));
    let (count, kept) = (Arc::clone(&accepted), Mutex::new(Vec::new()));
    std::thread::Builder::new().name("silent".to_owned()).spawn(move || {
        for stream in listener.incoming().flatten() {
            kept.lock().unwrap_or_else(PoisonError::into_inner).push(stream);
            count.fetch_add(1, Ordering::Relaxed);
        }
    })?;
    Ok((port, accepted))
}

/// How long the daemon takes to say which grants there are.
fn questions() -> Outcome<Vec<Duration>> {
    let ask = |_| -> Outcome<Duration> {
        let began = Instant::now();
        let client = ControlClient::connect(CONTROL_SOCKET.as_ref(), DEADLINE)?;
        match client.call(&Request::Grants)? {
            Reply::Grants(_) => Ok(began.elapsed()),
            _ => Err("volcryptd gave an answer that does not fit the question".into()),
        }
    };
    (0..10 * ROUNDS).map(ask).collect()
}
