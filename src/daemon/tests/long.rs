//! A key manager that takes long to say which keys it has.

use std::os::unix::net::UnixListener;
use std::time::{Duration, Instant};

use super::super::control::Control;
use super::super::guests::Guests;
use super::super::pool::Pool;
use super::*;
use crate::keys::{Capabilities, Description, Imported, KeyInfo, KeyManager, RecordedKey, tell};
use crate::protocol::{CallError, ControlClient, GuardStatus, Reply, Request};
use crate::volume::VolumeId;

/// How long it takes, and how long a client waits without a word.
const TAKES: Duration = Duration::from_millis(3500);
const PATIENCE: Duration = Duration::from_millis(2500);

/// One that has no keys, and says in between how far it is, or not.
struct Slow {
    says_so: bool,
}

impl KeyManager for Slow {
    fn get(&self, _: &VolumeId) -> Result<Key, Refusal> {
        Err(Refusal::new(Reason::NoKey, "no key"))
    }

    fn get_enrolled(&self, key: &RecordedKey) -> Result<Key, Refusal> {
        self.get(&key.volume)
    }

    fn create(&self, volume: &VolumeId, wanted: &Description) -> Result<(Key, Description), Refusal> {
        Ok((self.get(volume)?, wanted.clone()))
    }

    fn import(&self, _: &VolumeId, _: &Key, _: &Description) -> Result<Imported, Refusal> {
        Ok(Imported::Present)
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities { lists: true, imports: true, destroys: true, describes: true }
    }

    fn destroy(&self, _: &VolumeId) -> Result<(), Refusal> {
        Ok(())
    }

    fn list(&self) -> Result<Vec<KeyInfo>, Refusal> {
        let began = Instant::now();
        while began.elapsed() < TAKES {
            std::thread::sleep(Duration::from_millis(50));
            if self.says_so {
                tell(began.elapsed().as_millis() as usize, TAKES.as_millis() as usize);
            }
        }
        Ok(Vec::new())
    }
}

#[test]
fn a_client_waits_as_long_as_it_is_told_and_others_do_not_wait_at_all() {
    for says_so in [true, false] {
        let world = World::new();
        let broker = world.broker(true).with_keys(Box::new(Slow { says_so }));
        let guests = Arc::new(Guests::new(Arc::new(World::new())).unwrap());
        let control = Control::new(Arc::new(broker), guests, Box::new(GuardStatus::default));
        let socket = world.folder.path().join("control.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        // It has one thread for all, and ends with the test.
        std::thread::spawn(move || control.serve(&listener, &Pool::new(1)));
        let listing = {
            let socket = socket.clone();
            std::thread::spawn(move || {
                let mut told = Vec::new();
                let client = ControlClient::connect(&socket, PATIENCE).unwrap();
                let reply =
                    client.call_and_listen(&Request::Keys { after: None }, &mut |done, total| told.push((done, total)));
                (reply, told)
            })
        };
        std::thread::sleep(Duration::from_millis(300));
        let asked = Instant::now();
        let reply = ControlClient::connect(&socket, PATIENCE).unwrap().call(&Request::Grants).unwrap();
        assert!(matches!(reply, Reply::Grants(_)) && !listing.is_finished(), "{:?}", asked.elapsed());
        let (reply, told) = listing.join().unwrap();
        match says_so {
            true => {
                assert!(matches!(reply, Ok(Reply::Keys(_))), "{reply:?}");
                assert!((2..=3).contains(&told.len()) && told.is_sorted(), "once a second: {told:?}");
            }
            false => assert!(matches!(reply, Err(CallError::Broken(_))) && told.is_empty(), "{reply:?}"),
        }
    }
}
