//! Opens that go through the daemon, against opens that do not.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use volcrypt::protocol::{WRAPPER_SOCKET, registration};
use volcrypt::sys::seccomp;

use crate::Outcome;
use crate::measure::summary;
use crate::table::{Aim, Figure, Measured};

const ROUNDS: usize = 100;
/// How many opens a thread makes in its turn: so few that a change of the machine's load meets both.
const OPENS: usize = 50;
const FILE_AIM: Duration = Duration::from_micros(30);
/// The aim for an open that the daemon answers with a mapping.
pub const DEVICE_AIM: Duration = Duration::from_micros(100);

/// What is let through: a file, and an unprotected block device.
pub fn figures() -> Outcome<Vec<Figure>> {
    let openers = Openers::start()?;
    let file = std::env::current_exe()?;
    let device = open_device()?;
    let [bare_file, guest_file] = openers.medians(ROUNDS, &file, &file)?;
    let [bare_device, guest_device] = openers.medians(ROUNDS, &device, &device)?;
    let written = tempfile::NamedTempFile::new_in("/var/tmp")?;
    let [bare_written, guest_written] = openers.medians_of_writing(ROUNDS, written.path())?;
    Ok(vec![
        Figure {
            what: "open of a file, let through".to_owned(),
            value: guest_file,
            compared: ("bare open".to_owned(), bare_file),
            aim: Aim::Over(FILE_AIM),
        },
        Figure {
            what: "open of a file for writing, without a protected volume".to_owned(),
            value: guest_written,
            compared: ("bare open".to_owned(), bare_written),
            aim: Aim::Over(FILE_AIM),
        },
        Figure {
            what: format!("open of {}, identified and let through", device.display()),
            value: guest_device,
            compared: ("bare open".to_owned(), bare_device),
            aim: Aim::Over(DEVICE_AIM),
        },
    ])
}

/// A block device that can be opened for reading.
pub fn open_device() -> Outcome<PathBuf> {
    let nodes = fs::read_dir("/sys/class/block")?.flatten().map(|device| Path::new("/dev").join(device.file_name()));
    let mut usable: Vec<PathBuf> = nodes
        .filter(|node| fs::metadata(node).is_ok_and(|metadata| metadata.file_type().is_block_device()))
        .filter(|node| File::open(node).is_ok())
        .collect();
    usable.sort();
    usable.into_iter().next().ok_or_else(|| "no block device of this host can be opened".into())
}

/// Two threads that open files: a bare one, and one that is registered as a wrapper registers QEMU.
pub struct Openers {
    threads: [Opener; 2],
}

struct Opener {
    orders: mpsc::Sender<Order>,
    times: mpsc::Receiver<Result<Vec<Duration>, String>>,
}

/// What to open, again and again.
struct Order {
    path: PathBuf,
    for_writing: bool,
}

impl Openers {
    /// Starts both.
    pub fn start() -> Outcome<Self> {
        Ok(Openers { threads: [Opener::start(|| Ok(()))?, Opener::start(register)?] })
    }

    /// The medians of a bare open of one path and of a guest's open of another.
    pub fn medians(&self, rounds: usize, bare: &Path, guest: &Path) -> Outcome<[Measured; 2]> {
        self.carry_out(rounds, [bare, guest], false)
    }

    /// The medians of a bare open of a file for writing and of a guest's.
    pub fn medians_of_writing(&self, rounds: usize, file: &Path) -> Outcome<[Measured; 2]> {
        self.carry_out(rounds, [file, file], true)
    }

    /// All times of a guest's opens of a path.
    pub fn times(&self, rounds: usize, path: &Path) -> Outcome<Vec<Duration>> {
        let [_, times] = self.times_of(rounds, [path, path], false)?;
        Ok(times)
    }

    fn carry_out(&self, rounds: usize, paths: [&Path; 2], for_writing: bool) -> Outcome<[Measured; 2]> {
        Ok(self.times_of(rounds, paths, for_writing)?.map(|mut times| summary(&mut times)))
    }

    fn times_of(&self, rounds: usize, paths: [&Path; 2], for_writing: bool) -> Outcome<[Vec<Duration>; 2]> {
        let mut times = [Vec::new(), Vec::new()];
        for _ in 0..rounds {
            for ((opener, path), times) in self.threads.iter().zip(paths).zip(&mut times) {
                opener.orders.send(Order { path: path.to_owned(), for_writing })?;
                times.extend(opener.times.recv()??);
            }
        }
        Ok(times)
    }
}

impl Opener {
    fn start(prepare: fn() -> Result<(), String>) -> Outcome<Self> {
        let (orders, to_do) = mpsc::channel::<Order>();
        let (done, times) = mpsc::channel();
        let (prepared, is_prepared) = mpsc::channel();
        std::thread::Builder::new().name("opener".to_owned()).spawn(move || {
            let _ = prepared.send(prepare());
            for order in to_do {
                let _ = done.send((0..OPENS).map(|_| time_of_open(&order)).collect());
            }
        })?;
        is_prepared.recv()??;
        Ok(Opener { orders, times })
    }
}

fn register() -> Result<(), String> {
    let registered = UnixStream::connect(WRAPPER_SOCKET).and_then(|stream| {
        let listener = seccomp::install_filter()?;
        registration::hand_over(&stream, &listener)
    });
    registered.map_err(|error| format!("this thread cannot be registered with volcryptd: {error}"))
}

fn time_of_open(Order { path, for_writing }: &Order) -> Result<Duration, String> {
    let began = Instant::now();
    let file = OpenOptions::new()
        .read(true)
        .write(*for_writing)
        .open(path)
        .map_err(|error| format!("{} cannot be opened: {error}", path.display()))?;
    let took = began.elapsed();
    drop(file);
    Ok(took)
}
