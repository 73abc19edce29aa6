//! The embedded key manager with many keys: a get, a create, the replacement of its key-encryption key, and the
//! daemon's memory after many gets.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rusqlite::{Connection, params};
use volcrypt::keys::{EmbeddedKeyManager, KekRotation, Key, KeyEncryptionKey, KeyManager, RotationStep};
use volcrypt::protocol::{CONTROL_SOCKET, ControlClient, Reply, Request};
use volcrypt::refusal::Refusal;
use volcrypt::store::Store;
use volcrypt::volume::VolumeId;

use crate::Outcome;
use crate::daemon::Daemon;
use crate::measure::{Run, medians, summary};
use crate::memory::resident;
use crate::table::{Aim, Figure, Measured};

const KEYS: usize = 100_000;
const FEW: usize = 100;
const ROUNDS: usize = 200;
const GET_AIM: Duration = Duration::from_micros(200);
const CREATE_AIM: Duration = Duration::from_millis(5);
/// What a client of the daemon waits for an answer at the most.
const STEP_AIM: Duration = Duration::from_secs(10);
const GETS: usize = 100_000;
const WARM_UP: usize = 10_000;
const GROWTH_AIM: u64 = 1 << 20;
/// A folder on a disk, which /tmp need not be.
const FOLDER: &str = "/var/tmp";

/// A key manager with keys.
struct Place {
    folder: tempfile::TempDir,
    manager: EmbeddedKeyManager,
    keys: usize,
    next: usize,
}

impl Place {
    fn with(keys: usize) -> Outcome<Self> {
        let folder = tempfile::Builder::new().permissions(Permissions::from_mode(0o700)).tempdir_in(FOLDER)?;
        fill(folder.path(), keys)?;
        let manager = open(folder.path())?;
        Ok(Place { folder, manager, keys, next: 0 })
    }

    /// One after another, far apart.
    fn some_volume(&mut self) -> Outcome<VolumeId> {
        self.next = (self.next + 7919) % self.keys;
        volume(self.next)
    }

    fn get(&mut self) -> Outcome<Duration> {
        let volume = self.some_volume()?;
        let began = Instant::now();
        said(self.manager.get(&volume))?;
        Ok(began.elapsed())
    }
}

fn said<T>(outcome: Result<T, Refusal>) -> Outcome<T> {
    Ok(outcome.map_err(|refusal| refusal.to_string())?)
}

fn open(folder: &Path) -> Outcome<EmbeddedKeyManager> {
    let store = Arc::new(said(Store::open(folder))?);
    said(EmbeddedKeyManager::open(store, None, folder))
}

fn volume(number: usize) -> Outcome<VolumeId> {
    Ok(format!("0b1f7c1e-1111-4222-8333-{number:012}").parse()?)
}

/// Puts `count` keys into the database in `folder`, in one transaction: to make each durably would take minutes.
fn fill(folder: &Path, count: usize) -> Outcome<()> {
    drop(open(folder)?);
    let kek = said(KeyEncryptionKey::load(None, folder, false))?;
    let (size, check_value) = (512.try_into()?, kek.check_value().to_string());
    let mut connection = Connection::open(folder.join("volcrypt.db"))?;
    let transaction = connection.transaction()?;
    for number in 0..count {
        let volume = volume(number)?;
        let wrapped = said(Key::random(size).and_then(|key| kek.wrap(&volume, 1, &key)))?;
        transaction.execute(
            "INSERT INTO keys (volume_id, version, key_size, wrapped, created_at, kek) VALUES (?1, 1, 512, ?2, 0, ?3)",
            params![volume.as_str(), wrapped, check_value],
        )?;
    }
    Ok(transaction.commit()?)
}

/// What a key costs where there are many, against where there are few, and what replacing the key-encryption key does.
pub fn figures() -> Outcome<Vec<Figure>> {
    let (mut few, mut many) = (Place::with(FEW)?, Place::with(KEYS)?);
    let mut gets: [Run<'_>; 2] = [Box::new(|| few.get()), Box::new(|| many.get())];
    let [of_few, of_many] = medians(10 * ROUNDS, &mut gets)?[..] else { return Err("a figure is missing".into()) };

    drop(gets);

    let mut file = OpenOptions::new().append(true).create(true).open(many.folder.path().join("bare"))?;
    let mut number = KEYS;
    let mut creates: [Run<'_>; 2] = [
        Box::new(|| {
            let began = Instant::now();
            file.write_all(&[1; 4096])?;
            file.sync_data()?;
            Ok(began.elapsed())
        }),
        Box::new(|| {
            number += 1;
            let volume = volume(number)?;
            let began = Instant::now();
            said(many.manager.make(&volume, 512.try_into()?))?;
            Ok(began.elapsed())
        }),
    ];
    let [bare, create] = medians(ROUNDS, &mut creates)?[..] else { return Err("a figure is missing".into()) };
    drop(creates);
    let mut figures = vec![
        Figure {
            what: format!("key from the database, {KEYS} keys"),
            value: of_many,
            compared: (format!("{FEW} keys"), of_few),
            aim: Aim::Within(GET_AIM),
        },
        Figure {
            what: format!("key made in the database, {KEYS} keys"),
            value: create,
            compared: ("4 KiB appended and synced".to_owned(), bare),
            aim: Aim::Within(CREATE_AIM),
        },
    ];
    figures.extend(rotation(&many, of_many)?);
    Ok(figures)
}

fn rotation(place: &Place, idle: Measured) -> Outcome<Vec<Figure>> {
    let ended = AtomicBool::new(false);
    let (took, longest, mut gets) = std::thread::scope(|scope| -> Outcome<_> {
        let getting = scope.spawn(|| {
            let mut gets = Vec::new();
            while !ended.load(Ordering::Relaxed) {
                let Ok(volume) = volume(gets.len() * 7919 % KEYS) else { break };
                let began = Instant::now();
                if place.manager.get(&volume).is_err() {
                    break;
                }
                gets.push(began.elapsed());
                std::thread::sleep(Duration::from_millis(1));
            }
            (gets, ended.load(Ordering::Relaxed))
        });
        let rotated = rotate(&place.manager);
        ended.store(true, Ordering::Relaxed);
        match getting.join() {
            Ok((gets, true)) => rotated.map(|(took, longest)| (took, longest, gets)),
            _ => Err("a key did not open while all were rewrapped".into()),
        }
    })?;
    let slowest = gets.iter().max().copied().unwrap_or_default();
    let none = Duration::ZERO;
    Ok(vec![
        Figure {
            what: format!("key-encryption key replaced, {KEYS} keys"),
            value: Measured::time(took, none),
            compared: ("longest request of it".to_owned(), Measured::time(longest, none)),
            aim: Aim::None,
        },
        Figure {
            what: "longest request of it".to_owned(),
            value: Measured::time(longest, none),
            compared: ("slowest key meanwhile".to_owned(), Measured::time(slowest, none)),
            aim: Aim::Within(STEP_AIM),
        },
        Figure {
            what: "key from the database meanwhile".to_owned(),
            value: summary(&mut gets),
            compared: ("nothing else".to_owned(), idle),
            aim: Aim::None,
        },
    ])
}

/// How long all of it takes, and the longest request.
fn rotate(manager: &EmbeddedKeyManager) -> Outcome<(Duration, Duration)> {
    let (began, mut longest, mut step) = (Instant::now(), Duration::ZERO, RotationStep::Begin);
    loop {
        let asked = Instant::now();
        let answer = said(manager.rotate_kek(&step))?;
        longest = longest.max(asked.elapsed());
        match answer {
            KekRotation::UnderWay { after, .. } => step = RotationStep::GoOn { after },
            KekRotation::Finished { .. } => return Ok((began.elapsed(), longest)),
        }
    }
}

/// What stays resident after many gets, against after some. A key that is written to a file is a get.
pub fn memory(daemon: &Daemon) -> Outcome<Vec<Figure>> {
    let store = daemon.store();
    fs::set_permissions(&store, Permissions::from_mode(0o700))?;
    fill(&store, KEYS)?;
    let file = File::create(daemon.folder().join("keys"))?;
    let get = |count: usize| -> Outcome<()> {
        for number in 0..count {
            let request = Request::ExportKey { id: volume(number * 7919 % KEYS)? };
            let client = ControlClient::connect(CONTROL_SOCKET.as_ref(), STEP_AIM)?;
            if !matches!(client.call_with_file(&request, &file)?, Reply::Nothing) {
                return Err("volcryptd gave an answer that does not fit the question".into());
            }
        }
        Ok(())
    };
    get(WARM_UP)?;
    let some = resident(daemon.pid())?;
    get(GETS)?;
    Ok(vec![Figure {
        what: format!("resident memory of volcryptd, {GETS} keys later"),
        value: Measured::bytes(resident(daemon.pid())?),
        compared: (format!("after {WARM_UP} keys"), Measured::bytes(some)),
        aim: Aim::MoreBytes(GROWTH_AIM),
    }])
}
