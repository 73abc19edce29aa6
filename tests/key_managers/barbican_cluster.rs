//! What becomes of keys in a Barbican whose nodes see things at different times, and of secrets that are none.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use volcrypt::keys::{Key, KeyManager};
use volcrypt::refusal::Reason;

use super::barbican_faults::{refused, volume, wanted};
use super::cluster::{Cluster, Turn};
use super::conformance::{recorded, recorded_as, second};
use super::scripted::Reply;

const NEVER: Duration = Duration::from_secs(3600);

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

/// Two hosts, each with a node of its own. The first one's key is older, but is offered only `late` after; the second
/// one's choice takes effect `slow` after it was made. What each has in the end.
fn race(lag: u64, late: u64, slow: u64) -> [Result<Vec<u8>, String>; 2] {
    let milliseconds = Duration::from_millis;
    let cluster = Cluster::start(milliseconds(lag), milliseconds(lag));
    let (is_late, is_slow) = (AtomicBool::new(true), AtomicBool::new(true));
    cluster.direct(move |request, node| {
        match (request.method.as_str(), node) {
            ("PUT", 0) if is_late.swap(false, Ordering::Relaxed) => std::thread::sleep(milliseconds(late)),
            ("POST", 1) if request.target.ends_with("/metadata") && is_slow.swap(false, Ordering::Relaxed) => {
                std::thread::sleep(milliseconds(slow));
            }
            _ => {}
        }
        Turn::AsItIs
    });
    let make = |node: usize| {
        let made = cluster.host(node).create(&volume("one"), &wanted());
        made.map(|(key, _)| key.bytes().to_vec()).map_err(|refusal| refusal.to_string())
    };
    std::thread::scope(|scope| {
        let first = scope.spawn(|| make(0));
        std::thread::sleep(milliseconds(200));
        let second = make(1);
        [first.join().unwrap(), second]
    })
}

#[test]
fn two_hosts_never_use_two_keys_of_one_volume() {
    // What may come about: lag, lateness of the first key, slowness of the second one's choice, all in milliseconds; and
    // whether the README promises that both get the key. Where it does not, one key at most is used.
    let cases = [
        (900, 2500, 700, true),
        (900, 2500, 1500, false),
        (0, 3000, 900, true),
        (0, 3000, 3300, false),
        // Neither sees in time what the other one does.
        (2500, 1500, 0, false),
    ];
    std::thread::scope(|scope| {
        let tried = |(lag, late, slow, both): (u64, u64, u64, bool)| {
            let mut outcome = race(lag, late, slow);
            // Where the machine itself is slower than that, nothing is promised but that there are no two keys.
            for _ in 0..4 {
                if !both || outcome.iter().all(Result::is_ok) {
                    break;
                }
                outcome = race(lag, late, slow);
            }
            outcome
        };
        let threads = cases.map(|case| (case, scope.spawn(move || tried(case))));
        for (case, thread) in threads {
            match thread.join().unwrap() {
                [Ok(first), Ok(second)] => assert!(first == second, "{case:?}: two keys"),
                outcome => assert!(!case.3, "{case:?}: {:?}", outcome.map(Result::err)),
            }
        }
    });
}

/// Hosts that only read do not know either whether another key is chosen at this moment.
#[test]
fn a_choice_that_is_new_is_looked_at_again() {
    let cluster = Cluster::start(Duration::ZERO, Duration::ZERO);
    let one = volume("one");
    cluster.host(0).create(&one, &wanted()).unwrap();
    let key = cluster.secrets(0).into_values().next().unwrap();
    let chosen_only = |metadata: &mut BTreeMap<String, String>| {
        metadata.remove("volcrypt-settled");
    };
    cluster.host(0).destroy(&one).unwrap();
    cluster.copy(&key, &[7; 64], chosen_only);
    let (looks, is_copied) = (AtomicUsize::new(0), Arc::new(AtomicBool::new(false)));
    let may_look = Arc::clone(&is_copied);
    cluster.direct(move |request, _| {
        let is_look = request.method == "GET" && request.target.starts_with("/v1/secrets?");
        // The second look finds the other one as well.
        while is_look && looks.load(Ordering::SeqCst) > 0 && !may_look.load(Ordering::SeqCst) {
            std::thread::sleep(Duration::from_millis(5));
        }
        looks.fetch_add(usize::from(is_look), Ordering::SeqCst);
        Turn::AsItIs
    });
    let outcome = std::thread::scope(|scope| {
        let reading = scope.spawn(|| cluster.host(0).described(&one));
        std::thread::sleep(Duration::from_millis(700));
        cluster.copy(&key, &[8; 64], chosen_only);
        is_copied.store(true, Ordering::SeqCst);
        reading.join().unwrap()
    });
    let (reason, sentence) = refused(outcome);
    assert_eq!(reason, Reason::KeyManager);
    assert!(sentence.contains("several keys"), "{sentence}");
}

#[test]
fn what_is_said_of_a_volume_is_what_was_said_with_its_key() {
    let cluster = Cluster::start(Duration::ZERO, Duration::ZERO);
    let one = volume("one");
    cluster.host(0).create(&one, &wanted()).unwrap();
    let (_, right) = cluster.host(0).described(&one).unwrap().unwrap();
    assert!(right == wanted());
    let metadata = cluster.secrets(0).into_values().next().unwrap().metadata;
    for (from, to) in [("\"sector_size\":512", "\"sector_size\":4096"), ("\"owner\":\"p1\"", "\"owner\":\"p2\"")] {
        let changed: BTreeMap<String, String> =
            metadata.iter().map(|(name, piece)| (name.clone(), piece.replace(from, to))).collect();
        assert_ne!(changed, metadata, "{from} is in one piece");
        let body = serde_json::json!({"metadata": changed}).to_string();
        cluster.direct(move |request, _| match request.method == "GET" && request.target.ends_with("/metadata") {
            true => Turn::Instead(Reply::json(200, "", &body)),
            false => Turn::AsItIs,
        });
        let (reason, sentence) = refused(cluster.host(1).described(&one));
        assert_eq!(reason, Reason::WrongKey, "{sentence}");
        assert!(sentence.contains("was changed"), "{sentence}");
        assert_eq!(refused(cluster.host(1).get(&one)).0, Reason::WrongKey);
    }
}

#[test]
fn keys_that_could_not_be_offered_are_in_nobodys_way() {
    let cluster = Cluster::start(Duration::ZERO, Duration::ZERO);
    let one = volume("one");
    let break_off = |also_deletions: bool| {
        cluster.direct(move |request, _| {
            match request.method == "PUT" || (also_deletions && request.method == "DELETE") {
                true => Turn::Instead(Reply::json(500, "", "{}")),
                false => Turn::AsItIs,
            }
        });
    };
    break_off(false);
    let began = Instant::now();
    assert_eq!(refused(cluster.host(0).create(&one, &wanted())).0, Reason::KeyManager);
    let left = cluster.secrets(0).len();
    // One whose offer took longer may have been seen.
    assert!(left == 0 || began.elapsed() > Duration::from_secs(1), "one is left");
    break_off(true);
    for _ in 0..20 {
        assert_eq!(refused(cluster.host(0).create(&one, &wanted())).0, Reason::KeyManager);
    }
    assert_eq!(cluster.secrets(0).len(), left + 20);
    cluster.direct(|_, _| Turn::AsItIs);
    let (key, _) = cluster.host(0).create(&one, &wanted()).unwrap();
    assert!(cluster.host(0).get(&one).unwrap().same_as(&key));
    cluster.host(0).destroy(&one).unwrap();
    assert_eq!(cluster.secrets(0).len(), 0);
}

#[test]
fn a_server_that_wants_to_be_left_alone_for_ever_is() {
    let cluster = Cluster::start(Duration::ZERO, Duration::ZERO);
    for seconds in [u64::MAX, u64::MAX / 2, 11] {
        let headers = format!("retry-after: {seconds}\r\n");
        cluster.direct(move |_, _| Turn::Instead(Reply::json(503, &headers, "{}")));
        let (reason, sentence) = refused(cluster.host(0).get(&volume("one")));
        assert_eq!(reason, Reason::TimedOut, "{sentence}");
    }
}

#[test]
fn a_host_that_has_used_a_key_has_it_whatever_else_has_its_name() {
    let cluster = Cluster::start(Duration::ZERO, Duration::ZERO);
    let one = volume("one");
    let (key, _) = cluster.host(0).create(&one, &wanted()).unwrap();
    let right = cluster.secrets(0).into_iter().next().unwrap();
    let as_it_is = |_: &mut BTreeMap<String, String>| {};
    // One that says it is the key and is not, one that nobody understands, and one that this host may not see.
    cluster.copy(&right.1, &[7; 64], as_it_is);
    cluster.copy(&right.1, &[7; 64], |metadata| {
        metadata.insert("volcrypt-description-00".to_owned(), "{".to_owned());
    });
    let private = format!("{}/metadata", cluster.copy(&right.1, &[7; 64], as_it_is));
    cluster.direct(move |request, _| match request.target.ends_with(&private) {
        true => Turn::Instead(Reply::json(403, "", "{}")),
        false => Turn::AsItIs,
    });
    assert!(cluster.host(0).get(&one).is_err());
    assert!(cluster.host(1).get_enrolled(&recorded(&one, &key)).unwrap().same_as(&key));
    // Another key is none, and no other key is chosen for it.
    cluster.direct(|_, _| Turn::AsItIs);
    let other = Key::random(512.try_into().unwrap()).unwrap();
    let two = volume("two");
    cluster.host(0).create(&two, &wanted()).unwrap();
    assert_eq!(refused(cluster.host(0).get_enrolled(&recorded(&two, &other))).0, Reason::WrongKey);
    assert_eq!(refused(cluster.host(0).get_enrolled(&recorded(&volume("three"), &other))).0, Reason::NoKey);
}

#[test]
fn of_two_keys_that_a_volume_has_a_record_gets_the_one_that_it_names() {
    let cluster = Cluster::start(Duration::ZERO, Duration::ZERO);
    let one = volume("one");
    let (first, said) = cluster.host(0).create(&one, &wanted()).unwrap();
    let other = Key::random(512.try_into().unwrap()).unwrap();
    let text = second(said, &one, &other).to_text(&one, &other).unwrap();
    let like = cluster.secrets(0).into_iter().next().unwrap().1;
    cluster.copy(&like, other.bytes(), |metadata| {
        metadata.retain(|name, _| !name.starts_with("volcrypt-description-"));
        metadata.insert("volcrypt-description-00".to_owned(), text);
    });
    let get = |version, key: &Key| cluster.host(1).get_enrolled(&recorded_as(&one, version, key));
    assert!(get(1, &first).unwrap().same_as(&first));
    assert!(get(2, &other).unwrap().same_as(&other));
    for (version, key) in [(2, &first), (1, &other), (3, &other)] {
        let (reason, sentence) = refused(get(version, key));
        assert_eq!(reason, Reason::WrongKey);
        assert!(sentence.contains(&format!("has used, version {version}:")), "{sentence}");
    }
    assert!(cluster.host(1).get(&one).is_err(), "nobody says which one counts");
}
