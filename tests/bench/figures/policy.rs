//! Decisions and lists where there is much to decide on and to list.

use std::fmt::Write;
use std::fs::DirBuilder;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;
use std::time::{Duration, Instant};

use volcrypt::domain::Nobody;
use volcrypt::keys::KeyHandle;
use volcrypt::policy::{Config, Decision};
use volcrypt::store::{EnrolledDevice, Store, VolumeRecord, VolumeState};
use volcrypt::volume::Identity;

use crate::Outcome;
use crate::measure::summary;
use crate::table::{Aim, Figure, Measured};

const MANY: usize = 10_000;
const FEW: usize = 10;
const ROUNDS: usize = 200;
const DECISION_AIM: Duration = Duration::from_millis(1);
const LIST_AIM: Duration = Duration::from_millis(100);

/// Both, with many rules and volumes against few of them. Databases are made in `folder`.
pub fn figures(folder: &Path) -> Outcome<Vec<Figure>> {
    let [few, many] = [FEW, MANY].map(|count| Host::new(&folder.join(count.to_string()), count));
    let (few, many) = (few?, many?);
    Ok(vec![
        Figure {
            what: format!("decision by the last of {MANY} rules, with its record of {MANY}"),
            value: many.decision()?,
            compared: (format!("{FEW} rules and records"), few.decision()?),
            aim: Aim::Over(DECISION_AIM),
        },
        Figure {
            what: format!("list of {MANY} volumes"),
            value: many.list()?,
            compared: (format!("{FEW} volumes"), few.list()?),
            aim: Aim::Over(LIST_AIM),
        },
    ])
}

struct Host {
    count: usize,
    config: Config,
    store: Store,
}

impl Host {
    /// A host with a rule of its own, with a capture, for each of `count` volumes.
    fn new(folder: &Path, count: usize) -> Outcome<Self> {
        let mut text = String::new();
        for number in 0..count {
            write!(
                text,
                "[[rules]]\nname = 'r{number}'\niscsi_target = 'iqn\\.2026-11\\.org\\.lab:(?<id>volume-{number})'\n"
            )?;
        }
        let config = Config::parse(&text, "figures").map_err(|error| error.to_string())?;
        DirBuilder::new().mode(0o700).create(folder)?;
        let store = Store::open(folder).map_err(|refusal| refusal.to_string())?;
        for number in 0..count {
            store.enrol(&record(number)?).map_err(|refusal| refusal.to_string())?;
        }
        Ok(Host { count, config, store })
    }

    fn decision(&self) -> Outcome<Measured> {
        let device = Identity::of_iscsi_unit(&target(self.count - 1), 1);
        let mut times = Vec::with_capacity(ROUNDS);
        for _ in 0..ROUNDS {
            let began = Instant::now();
            let Decision::Protect(protection) = self.config.decide(&device, &Nobody) else {
                return Err("the device is not protected".into());
            };
            let record = self.store.volume(&protection.volume).map_err(|refusal| refusal.to_string())?;
            times.push(began.elapsed());
            record.ok_or("the volume has no record")?;
        }
        Ok(summary(&mut times))
    }

    fn list(&self) -> Outcome<Measured> {
        let mut times = Vec::with_capacity(ROUNDS / 10);
        for _ in 0..ROUNDS / 10 {
            let began = Instant::now();
            let volumes = self.store.volumes().map_err(|refusal| refusal.to_string())?;
            let text = serde_json::to_vec(&volumes)?;
            times.push(began.elapsed());
            assert!(volumes.len() == self.count && !text.is_empty());
        }
        Ok(summary(&mut times))
    }
}

fn target(number: usize) -> String {
    format!("iqn.2026-11.org.lab:volume-{number}")
}

fn record(number: usize) -> Outcome<VolumeRecord> {
    let id = format!("volume-{number}").parse().map_err(|error| format!("{error}"))?;
    Ok(VolumeRecord {
        key: KeyHandle::first(&id),
        id,
        device: EnrolledDevice { iscsi_target: Some(target(number)), lun: Some(1), ..EnrolledDevice::default() },
        size_bytes: 1 << 30,
        profile: "default".to_owned(),
        provider: volcrypt::policy::Provider::Plain,
        cipher: "aes-xts-plain64".to_owned(),
        key_size: 512.try_into().map_err(|error| format!("{error}"))?,
        sector_size: 512,
        check_value: "00112233445566778899aabbccddeeff".to_owned().try_into()?,
        enrolled_at: 0,
        state: VolumeState::Enrolled,
        owner: None,
    })
}
