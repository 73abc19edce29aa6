//! A key manager that takes long to say which keys it has.

use std::os::unix::net::UnixListener;
use std::time::{Duration, Instant};

use super::super::control::Control;
use super::super::guests::Guests;
use super::super::pool::Pool;
use super::in_use::Notes;
use super::*;
use crate::keys::tell;
use crate::protocol::{CallError, ControlClient, GuardStatus, Reply, Request};

/// How long it takes, and how long a client waits without a word.
const TAKES: Duration = Duration::from_secs(12);
const PATIENCE: Duration = Duration::from_secs(8);

/// Looks for keys, and says in between how far it is, or not.
fn looks(says_so: bool) {
    let began = Instant::now();
    while began.elapsed() < TAKES {
        std::thread::sleep(Duration::from_millis(50));
        if says_so {
            tell(began.elapsed().as_millis() as usize, TAKES.as_millis() as usize);
        }
    }
}

#[test]
fn a_client_waits_as_long_as_it_is_told_and_others_do_not_wait_at_all() {
    for (says_so, look) in [(true, (|| looks(true)) as fn()), (false, || looks(false))] {
        let world = World::new();
        let broker = world.broker(true).with_keys(Box::new(Notes::that_looks_first(look)));
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
                let most = TAKES.as_secs() as usize;
                assert!((2..=most).contains(&told.len()) && told.is_sorted(), "once a second: {told:?}");
            }
            false => assert!(matches!(reply, Err(CallError::Broken(_))) && told.is_empty(), "{reply:?}"),
        }
    }
}
