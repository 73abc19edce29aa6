//! A key server that accepts questions and never answers.

use std::sync::Condvar;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;
use std::time::Instant;

use super::super::guests::Guests;
use super::super::pool::Pool;
use super::super::server::Server;
use super::fleet::Shared;
use super::server::{guest_of, open_errno};
use super::*;
use crate::keys::{Description, KeyInfo, KeyManager};
use crate::volume::VolumeId;

/// Says nothing of volumes whose names begin with `hung`, while it is shut.
#[derive(Clone, Default)]
struct Gate {
    keys: Shared,
    shut: Arc<(Mutex<bool>, Condvar)>,
    waiting: Arc<AtomicUsize>,
}

impl Gate {
    fn shut(&self, shut: bool) {
        *self.shut.0.lock().unwrap() = shut;
        self.shut.1.notify_all();
    }
}

impl KeyManager for Gate {
    fn get(&self, volume: &VolumeId) -> Result<Key, Refusal> {
        if volume.as_str().starts_with("hung") {
            let mut shut = self.shut.0.lock().unwrap();
            if *shut {
                self.waiting.fetch_add(1, Ordering::SeqCst);
            }
            while *shut {
                shut = self.shut.1.wait(shut).unwrap();
            }
        }
        self.keys.get(volume)
    }

    fn create(&self, volume: &VolumeId, wanted: &Description) -> Result<(Key, Description), Refusal> {
        self.keys.create(volume, wanted)
    }

    fn described(&self, volume: &VolumeId) -> Result<Option<(Key, Description)>, Refusal> {
        self.keys.described(volume)
    }

    fn destroy(&self, volume: &VolumeId) -> Result<(), Refusal> {
        self.keys.destroy(volume)
    }

    fn list(&self) -> Result<Vec<KeyInfo>, Refusal> {
        self.keys.list()
    }
}

#[test]
fn opens_that_wait_for_a_silent_key_server_keep_no_other_from_its_answer() {
    const THREADS: usize = 4;
    const HUNG: u32 = 20;
    let world = World::new();
    let gate = Gate::default();
    let broker = world.broker(true).with_keys(Box::new(gate.clone()));
    let add = |name: &str, minor| {
        let device = world.add_volume(name, minor);
        broker.enrol(device, None).unwrap();
        Node::new("/dev", device)
    };
    let hung: Vec<Node> = (0..HUNG).map(|number| add(&format!("hung-{number}"), 200 + number)).collect();
    let fine = add("fine", 199);
    let unprotected = Node::new("/dev", {
        let device = world.add_volume("none", 198);
        world.change(device, |identity| (identity.iscsi, identity.wwid) = (None, None));
        device
    });
    gate.shut(true);

    let guests = Arc::new(Guests::new(Arc::new(world.clone())).unwrap());
    let deadline = Duration::from_secs(60);
    let server = Server::new(Arc::new(broker), Arc::clone(&guests), Pool::new(THREADS), deadline);
    std::thread::spawn(move || server.serve());
    let (done, finished) = mpsc::channel();
    // Every volume twice: the second open waits for the first one's key.
    for node in hung.iter().chain(&hung) {
        let (guests, path, done) = (Arc::clone(&guests), node.0.clone(), done.clone());
        std::thread::spawn(move || done.send(guest_of(&guests, move || open_errno(&path))).unwrap());
    }
    let end = Instant::now() + Duration::from_secs(20);
    while gate.waiting.load(Ordering::SeqCst) < HUNG as usize {
        assert!(Instant::now() < end, "{} wait for their keys", gate.waiting.load(Ordering::SeqCst));
        std::thread::sleep(Duration::from_millis(5));
    }
    for _ in 0..10 {
        let path = fine.0.clone();
        assert_eq!(guest_of(&guests, move || open_errno(&path)), None, "its key is there");
        let path = unprotected.0.clone();
        // There is no such device behind the node.
        assert_eq!(guest_of(&guests, move || open_errno(&path)), Some(libc::ENXIO));
        assert!(guest_of(&guests, || std::fs::read_to_string("/etc/passwd").is_ok()));
    }
    assert!(finished.try_recv().is_err(), "nobody has answered the others yet");
    gate.shut(false);
    for _ in 0..2 * HUNG {
        assert_eq!(finished.recv_timeout(Duration::from_secs(30)).unwrap(), None);
    }
}
