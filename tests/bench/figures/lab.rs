//! Figures of a machine with libvirt, device-mapper and an installed volcrypt: the lab's.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use crate::Outcome;
use crate::measure::{Run, medians, run};
use crate::opens::{DEVICE_AIM, Openers};
use crate::table::{Aim, Figure};

const ROUNDS: usize = 7;
/// A round takes minutes: each way has the daemon started anew.
const WAY_ROUNDS: usize = 5;
/// The daemon logs every mapping that it hands out, which takes an emulated machine's journal long.
const OPEN_ROUNDS: usize = 10;
/// On the controller that the domain has from the start.
const TARGET: &str = "sdb";
const OUR_PREFIX: &str = "volcrypt-";
/// The mapping that cryptsetup makes.
const PLAIN: &str = "figures-plain";
const GONE_DEADLINE: Duration = Duration::from_secs(30);

/// Attaches an unprotected device, a protected one, and one that cryptsetup maps, to the running
/// `domain`. `machine` is what systemd-detect-virt(1) says: `qemu` emulates.
pub fn figures(machine: &str, domain: &str, devices: &[&Path; 3]) -> Outcome<Vec<Figure>> {
    let [unprotected, protected, backing] = *devices;
    let folder = tempfile::tempdir()?;
    let key = folder.path().join("key");
    fs::write(&key, [7; 64])?;
    let mapped = Path::new("/dev/mapper").join(PLAIN);
    let disk = |name: &str, path: &Path| -> Outcome<Disk> {
        let xml = folder.path().join(name);
        fs::write(&xml, disk_xml(path))?;
        Ok(Disk { domain: domain.to_owned(), xml })
    };
    let (bare, ours, theirs) = (disk("bare", unprotected)?, disk("ours", protected)?, disk("theirs", &mapped)?);

    let mut runs: [Run<'_>; 3] = [
        Box::new(|| {
            let took = bare.attach()?;
            bare.detach()?;
            Ok(took)
        }),
        Box::new(|| {
            let took = ours.attach()?;
            mapping()?.ok_or("the protected device was attached without a mapping")?;
            ours.detach()?;
            wait_until_unmapped()?;
            Ok(took)
        }),
        Box::new(|| {
            let took = cryptsetup_open(backing, &key)? + theirs.attach()?;
            theirs.detach()?;
            run(Command::new("cryptsetup").args(["close", PLAIN]), "")?;
            Ok(took)
        }),
    ];
    let attached = medians(ROUNDS, &mut runs)?;
    drop(runs);

    ours.attach()?;
    let node = mapping()?.ok_or("the protected device was attached without a mapping")?;
    let openers = Openers::start()?;
    let through = openers.medians(OPEN_ROUNDS, unprotected, unprotected)?;
    let injected = openers.medians(OPEN_ROUNDS, &node, protected)?;
    // That guest has had a protected volume now.
    let file = tempfile::NamedTempFile::new_in("/var/tmp")?;
    let written = openers.medians_of_writing(OPEN_ROUNDS, file.path())?;
    drop(openers);
    ours.detach()?;

    let open_aim = match machine {
        "qemu" => Aim::OverUnlessEmulated(DEVICE_AIM),
        _ => Aim::Over(DEVICE_AIM),
    };
    let figure = |what: &str, value, with: &str, compared, aim| Figure {
        what: what.to_owned(),
        value,
        compared: (with.to_owned(), compared),
        aim,
    };
    let mut figures = vec![
        figure("attach, protected LUN", attached[1], "attach, unprotected LUN", attached[0], Aim::None),
        figure("attach, protected LUN", attached[1], "cryptsetup open, then attach", attached[2], Aim::Below),
        figure("open of an unprotected LUN, let through", through[1], "bare open", through[0], Aim::None),
        figure(
            "open of a protected LUN, mapping injected",
            injected[1],
            "bare open of the mapping",
            injected[0],
            open_aim,
        ),
        figure(
            "open of a file for writing, after a protected volume",
            written[1],
            "bare open",
            written[0],
            Aim::OverUnlessEmulated(DEVICE_AIM),
        ),
    ];
    figures.extend(crate::audit::figures()?);
    Ok(figures)
}

/// One way in which a protected volume is attached.
pub struct Way<'a> {
    /// What it is called in the table.
    pub name: &'a str,
    /// The volume's device.
    pub device: &'a Path,
    /// Arguments of `prepare`, which is run before each attach; its time does not count.
    pub state: &'a str,
}

/// Attaches a volume to the running `domain` in each of `ways`, of which the others are compared with the first.
pub fn attaches(domain: &str, prepare: &Path, ways: &[Way<'_>]) -> Outcome<Vec<Figure>> {
    let folder = tempfile::tempdir()?;
    let mut runs: Vec<Run<'_>> = Vec::new();
    for (number, way) in ways.iter().enumerate() {
        let xml = folder.path().join(number.to_string());
        fs::write(&xml, disk_xml(way.device))?;
        let disk = Disk { domain: domain.to_owned(), xml };
        runs.push(Box::new(move || {
            run(Command::new(prepare).args(way.state.split(' ')), "")?;
            let took = disk.attach()?;
            mapping()?.ok_or("the protected device was attached without a mapping")?;
            disk.detach()?;
            wait_until_unmapped()?;
            Ok(took)
        }));
    }
    let attached = medians(WAY_ROUNDS, &mut runs)?;
    let first = ways.first().zip(attached.first()).ok_or("nothing is to be attached")?;
    let figures = ways.iter().zip(&attached).skip(1).map(|(way, &value)| Figure {
        what: format!("attach, {}", way.name),
        value,
        compared: (format!("attach, {}", first.0.name), *first.1),
        aim: Aim::None,
    });
    Ok(figures.collect())
}

/// A disk of a domain.
struct Disk {
    domain: String,
    xml: PathBuf,
}

impl Disk {
    fn attach(&self) -> Outcome<Duration> {
        run(Command::new("virsh").args(["--quiet", "attach-device", &self.domain]).arg(&self.xml).arg("--live"), "")
    }

    fn detach(&self) -> Outcome<Duration> {
        run(Command::new("virsh").args(["--quiet", "detach-disk", &self.domain, TARGET, "--live"]), "")
    }
}

fn cryptsetup_open(device: &Path, key: &Path) -> Outcome<Duration> {
    // Nothing is asked, for the key comes from a file; what volcrypt uses by default is asked for.
    let options = ["--batch-mode", "--type", "plain", "--cipher", "aes-xts-plain64", "--key-size", "512", "--key-file"];
    run(Command::new("cryptsetup").arg("open").args(options).arg(key).arg(device).arg(PLAIN), "")
}

/// The node of the one mapping of volcrypt's, if there is one.
fn mapping() -> Outcome<Option<PathBuf>> {
    for device in fs::read_dir("/sys/block")? {
        let device = device?;
        let is_ours = |name: String| name.starts_with(OUR_PREFIX);
        if fs::read_to_string(device.path().join("dm/name")).is_ok_and(is_ours) {
            return Ok(Some(Path::new("/dev").join(device.file_name())));
        }
    }
    Ok(None)
}

fn wait_until_unmapped() -> Outcome<()> {
    let deadline = Instant::now() + GONE_DEADLINE;
    while mapping()?.is_some() {
        if Instant::now() > deadline {
            return Err("the mapping of a detached device stays".into());
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

/// A disk as Nova writes it, on a bus from which it can be detached without a guest's consent.
fn disk_xml(path: &Path) -> String {
    format!(
        "<disk type='block' device='disk'>
  <driver name='qemu' type='raw' cache='none' io='native'/>
  <source dev='{}'/>
  <target dev='{TARGET}' bus='scsi'/>
</disk>
",
        path.display()
    )
}
