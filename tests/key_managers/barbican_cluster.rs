//! What becomes of keys in a Barbican whose nodes see things at different times, and of secrets that are none.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use volcrypt::keys::{Description, KeyManager};
use volcrypt::policy::Profile;

use volcrypt::store::EnrolledDevice;
use volcrypt::volume::VolumeId;

use super::cluster::{Cluster, Turn};

const NEVER: Duration = Duration::from_secs(3600);

fn volume(name: &str) -> VolumeId {
    name.parse().unwrap()
}

fn wanted() -> Description {
    let device = EnrolledDevice { wwid: Some("naa.6".to_owned()), ..EnrolledDevice::default() };
    Description::new(device, 4096, ("default", &Profile::default()), Some("p1"), 7)
}

/// After the key was handed out, whoever is asked does not see yet that it was chosen.
#[test]
fn a_key_that_was_handed_out_is_not_deleted() {
    let cluster = Cluster::start(Duration::ZERO, NEVER);
    let is_handed_out = AtomicBool::new(false);
    cluster.direct(move |request, _| {
        is_handed_out.fetch_or(request.target.ends_with("/payload"), Ordering::Relaxed);
        match is_handed_out.load(Ordering::Relaxed) && request.target.contains("/metadata") {
            true => Turn::Node(1),
            false => Turn::AsItIs,
        }
    });
    let one = volume("one");
    let (key, _) = cluster.host(0).create(&one, &wanted()).unwrap();
    assert_eq!(cluster.secrets(0).len(), 1, "the key was deleted");
    cluster.direct(|_, _| Turn::AsItIs);
    assert!(cluster.host(0).get(&one).unwrap().same_as(&key));
}
