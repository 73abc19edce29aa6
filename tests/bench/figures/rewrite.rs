//! Rewriting XML, against what it takes to have it parsed.

use std::hint::black_box;
use std::time::{Duration, Instant};

use volcrypt::domain::{Facts, Source, rewrite};
use volcrypt::refusal::Refusal;
use volcrypt::volume::VolumeId;

use crate::Outcome;
use crate::hook;
use crate::measure::{Run, medians};
use crate::table::{Aim, Figure};

const ROUNDS: usize = 101;
/// How often each is done for one measurement, which the clock is too coarse for otherwise.
const TIMES: u32 = 10;
const AIM_OF_26: Duration = Duration::from_micros(200);
const AIM_OF_1000: Duration = Duration::from_millis(5);

/// What Nova sends to have a volume attached.
const NOVAS_DISK: &str = include_str!("../../../xml-fixtures/rewrite/nova-attach-device.xml");

/// Nova's disk and domains of two sizes, with every disk on a volume of its own.
pub fn figures() -> Outcome<Vec<Figure>> {
    let cases = [
        ("rewrite of Nova's disk", NOVAS_DISK.to_owned(), Aim::None),
        ("rewrite of a domain with 26 protected disks", domain(26), Aim::Within(AIM_OF_26)),
        ("rewrite of a domain with 1,000 protected disks", domain(1000), Aim::Within(AIM_OF_1000)),
    ];
    let mut figures = Vec::new();
    for (what, xml, aim) in cases {
        let mut runs: [Run<'_>; 2] = [
            repeated(|| {
                black_box(roxmltree::Document::parse(black_box(&xml))?);
                Ok(())
            }),
            repeated(|| {
                let rewritten = rewrite(black_box(&xml), &judge).map_err(|refusal| refusal.to_string())?;
                match rewritten.disks.is_empty() {
                    false => Ok(()),
                    true => Err("no disk is rewritten".into()),
                }
            }),
        ];
        let taken = medians(ROUNDS, &mut runs)?;
        figures.push(Figure {
            what: what.to_owned(),
            value: taken[1],
            compared: ("roxmltree's parse of it".to_owned(), taken[0]),
            aim,
        });
    }
    Ok(figures)
}

fn repeated<'a>(mut work: impl FnMut() -> Outcome<()> + 'a) -> Run<'a> {
    Box::new(move || {
        let began = Instant::now();
        for _ in 0..TIMES {
            work()?;
        }
        Ok(began.elapsed() / TIMES)
    })
}

fn domain(count: usize) -> String {
    let devices: Vec<_> = (0..count).map(|number| format!("/dev/disk/by-path/lun-{number}").into()).collect();
    hook::domain(count, &devices)
}

/// A host on which every device is a volume.
fn judge(_: Option<&Facts>, source: &Source) -> Result<Option<VolumeId>, Refusal> {
    match source {
        Source::Path(path) => Ok(path.file_name().and_then(|name| name.to_str()?.parse().ok())),
        _ => Ok(None),
    }
}
