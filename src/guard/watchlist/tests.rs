use std::fs::{self, OpenOptions};
use std::path::PathBuf;
use std::sync::mpsc;
use std::time::Duration;

use super::*;

/// A table in the place of the kernel's.
#[derive(Default)]
struct Simulated(Mutex<BTreeSet<Device>>);

impl Table for Arc<Simulated> {
    fn insert(&self, device: Device) -> io::Result<()> {
        self.0.lock().unwrap().insert(device);
        Ok(())
    }

    fn remove(&self, device: Device) -> io::Result<()> {
        self.0.lock().unwrap().remove(&device);
        Ok(())
    }

    fn devices(&self) -> io::Result<Vec<Device>> {
        Ok(self.0.lock().unwrap().iter().copied().collect())
    }
}

/// A sysfs tree with disks in it, and a watchlist for them.
struct Host {
    root: tempfile::TempDir,
    table: Arc<Simulated>,
    list: Arc<Watchlist<Arc<Simulated>>>,
}

fn config() -> Config {
    let text = "[[rules]]\nname = \"lab\"\nwwid = 'naa\\.(?<id>.*)'\nvolume_id = \"${id}\"\n";
    Config::parse(text, "volcrypt.toml").unwrap()
}

fn number(minor: u32) -> DeviceNumber {
    DeviceNumber { major: 8, minor }
}

impl Host {
    fn new(rules: Rules) -> Self {
        Host::knowing(rules, Box::new(|_| Some(false)))
    }

    fn knowing(rules: Rules, enrolled: Enrolled) -> Self {
        let root = tempfile::tempdir().unwrap();
        for folder in ["class/block", "dev/block"] {
            fs::create_dir_all(root.path().join(folder)).unwrap();
        }
        let table = Arc::new(Simulated::default());
        let list = Arc::new(Watchlist::new(Sysfs::at(root.path()), Shown::at(root.path()), rules));
        list.open(|| Ok(Book::open(Arc::clone(&table)).unwrap())).unwrap();
        list.know_enrolled(enrolled);
        Host { root, table, list }
    }

    fn add(&self, minor: u32, wwid: &str) {
        self.add_with(minor, &[("device/wwid", wwid)]);
    }

    fn add_with(&self, minor: u32, attributes: &[(&str, &str)]) {
        let place = format!("devices/block/disk{minor}");
        let folder = self.root.path().join(&place);
        let number = number(minor).to_string();
        for (name, text) in [("dev", number.as_str()), ("size", "8"), ("ro", "0")].iter().chain(attributes) {
            fs::create_dir_all(folder.join(name).parent().unwrap()).unwrap();
            fs::write(folder.join(name), format!("{text}\n")).unwrap();
        }
        let link = |place: &str, name: &str, target: &str| {
            std::os::unix::fs::symlink(format!("../../{target}"), self.root.path().join(place).join(name)).unwrap();
        };
        link("class/block", &format!("disk{minor}"), &place);
        link("dev/block", &number, &place);
    }

    /// Has whoever lists the devices wait until the returned file is written to.
    fn hold_up(&self) -> PathBuf {
        let folder = self.root.path().join("class/block/slow");
        fs::create_dir(&folder).unwrap();
        let fifo = folder.join("dev");
        let mode = rustix::fs::Mode::RWXU;
        rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, mode, 0).unwrap();
        fifo
    }

    fn shut(&self) -> Vec<u32> {
        let numbers = self.table.0.lock().unwrap();
        numbers.iter().map(|device| if let Device::Block(number) = device { number.minor } else { u32::MAX }).collect()
    }
}

#[test]
fn by_a_configuration_what_it_protects_is_shut() {
    let host = Host::new(Ok(config()));
    host.add(0, "naa.one");
    host.add(16, "t10.other");
    host.list.look_at_all().unwrap();
    assert!(host.list.is_complete());
    assert_eq!(host.shut(), [0]);
}

#[test]
fn without_a_valid_configuration_all_but_own_mappings_are_shut_until_there_is_one() {
    let host = Host::new(Err("volcrypt.toml:1: no".to_owned()));
    host.add(0, "naa.one");
    host.add(16, "t10.other");
    host.add_with(32, &[("dm/name", "volcrypt-one"), ("dm/uuid", "VOLCRYPT-plain-one")]);
    host.add_with(48, &[("dm/name", "root"), ("dm/uuid", "LVM-x")]);
    host.list.look_at_all().unwrap();
    assert_eq!(host.shut(), [0, 16, 48]);
    // One that comes later.
    host.add(64, "t10.later");
    host.list.look_at(number(64)).unwrap();
    assert_eq!(host.shut(), [0, 16, 48, 64]);

    host.list.set_rules(Ok(config()));
    host.list.look_at_all().unwrap();
    assert_eq!(host.shut(), [0]);
}

#[test]
fn an_open_waits_for_no_look_at_all_devices_and_nothing_that_comes_meanwhile_is_lost() {
    let host = Arc::new(Host::new(Ok(config())));
    host.add(0, "naa.known");
    host.add(16, "naa.goes");
    host.list.look_at_all().unwrap();
    assert_eq!(host.shut(), [0, 16]);
    host.list.forget();
    let fifo = host.hold_up();
    let looking = {
        let list = Arc::clone(&host.list);
        std::thread::spawn(move || list.look_at_all())
    };
    // It has begun as soon as the file can be opened for writing.
    let mut slow = OpenOptions::new().write(true).open(&fifo).unwrap();
    let (done, opened) = mpsc::channel();
    let opening = Arc::clone(&host);
    std::thread::spawn(move || {
        let Host { root, list, .. } = &*opening;
        let identity = |minor| Sysfs::at(root.path()).identify(number(minor)).unwrap();
        list.saw(&identity(0)).unwrap();
        // What was not there when the devices were listed, and what has changed since.
        opening.add(32, "naa.new");
        list.saw(&identity(32)).unwrap();
        opening.add(48, "naa.announced");
        list.look_at(number(48)).unwrap();
        fs::write(root.path().join("devices/block/disk16/device/wwid"), "t10.other\n").unwrap();
        list.look_at(number(16)).unwrap();
        done.send(opening.shut()).unwrap();
    });
    let shut = opened.recv_timeout(Duration::from_secs(60)).expect("no open waits for the look at all devices");
    assert_eq!(shut, [0, 32, 48]);
    assert!(!looking.is_finished() && !host.list.is_complete());
    io::Write::write_all(&mut slow, b"8:99\n").unwrap();
    drop(slow);
    looking.join().unwrap().unwrap();
    assert!(host.list.is_complete());
    assert_eq!(host.shut(), [0, 32, 48]);
}

#[test]
fn a_device_that_comes_back_while_all_are_looked_at_stays_shut() {
    let host = Host::new(Ok(config()));
    host.add(0, "naa.known");
    host.list.look_at_all().unwrap();
    host.list.forget();
    // It is away in the moment when the devices are listed.
    let (listed, away) = (host.root.path().join("class/block/disk0"), host.root.path().join("away"));
    fs::rename(&listed, &away).unwrap();
    let fifo = host.hold_up();
    std::thread::scope(|scope| {
        let looking = scope.spawn(|| host.list.look_at_all());
        let mut slow = OpenOptions::new().write(true).open(&fifo).unwrap();
        fs::rename(&away, &listed).unwrap();
        host.list.saw(&Sysfs::at(host.root.path()).identify(number(0)).unwrap()).unwrap();
        io::Write::write_all(&mut slow, b"8:99\n").unwrap();
        drop(slow);
        looking.join().unwrap().unwrap();
    });
    assert_eq!(host.shut(), [0]);
}

#[test]
fn an_enrolled_volume_whose_rule_was_lost_stays_shut() {
    let wwid = |device: &Identity| device.wwid.clone().unwrap_or_default();
    let host = Host::knowing(Ok(config()), Box::new(move |device| Some(wwid(device) == "t10.enrolled")));
    host.add(0, "naa.one");
    host.add(16, "t10.enrolled");
    host.add(32, "t10.other");
    host.list.look_at_all().unwrap();
    assert_eq!(host.shut(), [0, 16]);
    host.add(48, "t10.enrolled");
    host.list.look_at(number(48)).unwrap();
    assert_eq!(host.shut(), [0, 16, 48]);

    let text = "[[rules]]\nname = \"raw\"\nwwid = 't10.*'\naction = \"pass\"\n";
    host.list.set_rules(Ok(Config::parse(text, "volcrypt.toml").unwrap()));
    host.list.look_at_all().unwrap();
    assert_eq!(host.shut(), Vec::<u32>::new(), "a rule lets it pass in so many words");
}

#[test]
fn what_cannot_be_told_to_be_enrolled_stays_as_it_is() {
    let told = Arc::new(Mutex::new(Some(true)));
    let asked = Arc::clone(&told);
    let host = Host::knowing(Ok(config()), Box::new(move |_| *asked.lock().unwrap()));
    host.add(0, "t10.enrolled");
    host.list.look_at_all().unwrap();
    *told.lock().unwrap() = None;
    host.add(16, "t10.new");
    host.list.look_at(number(0)).unwrap();
    assert_eq!(host.shut(), [0]);
    host.list.forget();
    host.list.look_at_all().unwrap();
    assert_eq!(host.shut(), [0]);
    assert!(host.list.is_complete(), "that is no fault of the table's");
    // As soon as it can be told, it is.
    *told.lock().unwrap() = Some(false);
    host.list.look_at_all().unwrap();
    assert_eq!(host.shut(), Vec::<u32>::new());
    *told.lock().unwrap() = Some(true);
    host.list.look_at_all().unwrap();
    assert_eq!(host.shut(), Vec::<u32>::new(), "all was told, so nothing is looked at again");
}
