//! What it takes to record the use of a key, against the least that any durable record takes.

use std::fs::{OpenOptions, Permissions};
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, Instant};

use volcrypt::audit::{Asker, Event, Kind};
use volcrypt::store::Store;

use crate::Outcome;
use crate::measure::{Run, medians};
use crate::table::{Aim, Figure};

const ROUNDS: usize = 100;
const AIM: Duration = Duration::from_millis(2);
/// A folder on a disk, which /tmp need not be.
const FOLDER: &str = "/var/tmp";

/// A record of a key's use: right after another one, as the first after a merge, which starts the write-ahead
/// log anew with a sync of its own, and with the merge that follows a moment later.
pub fn figures() -> Outcome<Vec<Figure>> {
    let folder = tempfile::Builder::new().permissions(Permissions::from_mode(0o700)).tempdir_in(FOLDER)?;
    let store = Store::open(folder.path()).map_err(|refusal| refusal.to_string())?;
    let volume = "0b1f7c1e-1111-4222-8333-444455556666".parse()?;
    let event = || {
        let asker =
            Asker { pid: Some(1), ..Asker::hook("instance-00000001", Some("0b1f7c1e-1111-4222-8333-444455556666")) };
        asker.ask(|| Event::new(Kind::KeyUsed, &volume, "opened as /dev/sda"))
    };
    let append =
        || -> Outcome<()> { Ok(store.append_audit(event()).map(|_| ()).map_err(|refusal| refusal.to_string())?) };
    let mut file = OpenOptions::new().append(true).create(true).open(folder.path().join("bare"))?;
    let mut runs: [Run<'_>; 4] = [
        Box::new(|| {
            let began = Instant::now();
            file.write_all(&[1; 4096])?;
            file.sync_data()?;
            Ok(began.elapsed())
        }),
        Box::new(|| {
            append()?;
            let began = Instant::now();
            append()?;
            Ok(began.elapsed())
        }),
        Box::new(|| {
            store.merge_audit();
            let began = Instant::now();
            append()?;
            Ok(began.elapsed())
        }),
        Box::new(|| {
            let began = Instant::now();
            append()?;
            store.merge_audit();
            Ok(began.elapsed())
        }),
    ];
    let taken = medians(ROUNDS, &mut runs)?;
    let figure = |what: &str, value, aim| Figure {
        what: what.to_owned(),
        value,
        compared: ("4 KiB appended and synced".to_owned(), taken[0]),
        aim,
    };
    Ok(vec![
        figure("audit record, right after another", taken[1], Aim::Within(AIM)),
        figure("audit record, first after a merge", taken[2], Aim::Within(AIM)),
        figure("audit record and merge", taken[3], Aim::None),
    ])
}
