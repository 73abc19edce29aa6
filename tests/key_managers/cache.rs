//! What a host does with the keys that it has used while its key server does not answer.

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tempfile::TempDir;
use volcrypt::keys::KeyManager;
use volcrypt::keys::barbican::BarbicanKeyManager;
use volcrypt::keys::cached::{Cache, CachedKeyManager, KeyCache};
use volcrypt::keys::kmip::{KmipConfig, KmipKeyManager};
use volcrypt::refusal::Reason;
use volcrypt::store::Store;

use super::authority::Authority;
use super::barbican::{Barbican, NOT_FOUND};
use super::conformance::{create, reason, recorded, volume};
use super::proxy::{Fault, Proxy};
use super::pykmip::PyKmip;
use super::scripted::Reply;

const LOCATE: u8 = 0x08;
const DEADLINE: Duration = Duration::from_secs(8);
/// On a busy machine a deadline may be noticed late.
const IN_TIME: Duration = Duration::from_secs(30);
const LONG: Duration = Duration::from_secs(3600);

/// A host that keeps keys; its folder outlives its daemons.
pub struct Host(TempDir);

impl Host {
    pub fn new() -> Self {
        Host(tempfile::Builder::new().permissions(Permissions::from_mode(0o700)).tempdir().unwrap())
    }

    /// As a start of its daemon does.
    pub fn start(&self, server: impl KeyManager + 'static, lifetime: Duration) -> CachedKeyManager {
        let store = Arc::new(Store::open(self.0.path()).unwrap());
        let cache = KeyCache::open(store, None, self.0.path(), "the server", lifetime).unwrap();
        CachedKeyManager::new(Box::new(server), Cache::On(Box::new(cache)))
    }
}

fn kmip(config: KmipConfig) -> KmipKeyManager {
    KmipKeyManager::new(KmipConfig { deadline: DEADLINE, ..config })
}

/// It has its token from Keystone already: on a busy machine that alone may take as long as nobody need answer before a
/// kept key is used.
fn barbican(servers: &Barbican) -> BarbicanKeyManager {
    let manager = BarbicanKeyManager::new(servers.config("host1"));
    manager.introduce().unwrap();
    manager
}

#[test]
fn with_the_server_stopped_and_the_host_rebooted_what_it_has_used_opens_and_the_rest_is_refused_in_time() {
    let mut server = PyKmip::start();
    let (used, unused) = (volume("used"), volume("unused"));
    let [key, other] = [&used, &unused].map(|id| create(&server.manager(), id, 512).unwrap());
    let (known, never_used) = (recorded(&used, &key), recorded(&unused, &other));
    let host = Host::new();
    let start = || host.start(kmip(server.config("client", vec![server.address()])), LONG);
    let before = start();
    assert!(before.get_enrolled(&known).unwrap().from_cache().is_none());
    let after = start();
    server.stop();
    for manager in [before, after] {
        let found = manager.get_enrolled(&known).unwrap();
        assert!(found.same_as(&key) && found.from_cache().is_some());
        let began = Instant::now();
        let refusal = manager.get_enrolled(&never_used).err().unwrap();
        assert_eq!(refusal.reason(), Reason::TimedOut);
        assert!(refusal.to_string().contains("this host's cache does not have it"), "{refusal}");
        assert!(began.elapsed() < IN_TIME, "{:?}", began.elapsed());
        let kept = manager.kept().unwrap();
        assert!(kept.until.contains_key(&used) && !kept.until.contains_key(&unused));
    }
}

#[test]
fn a_server_that_hangs_is_waited_for_once() {
    let server = PyKmip::start();
    let proxy = Proxy::start(server.authority(), "server", server.address());
    let (used, unused) = (volume("used"), volume("unused"));
    let host = Host::new();
    let manager = host.start(kmip(server.config("client", vec![proxy.address()])), LONG);
    let key = create(&manager, &used, 256).unwrap();
    let (known, never_used) = (recorded(&used, &key), recorded(&unused, &key));
    proxy.spoil(LOCATE, Fault::Hang);
    assert!(manager.get_enrolled(&known).unwrap().from_cache().is_some(), "after a while");
    let began = Instant::now();
    for _ in 0..100 {
        assert!(manager.get_enrolled(&known).unwrap().same_as(&key));
    }
    assert!(began.elapsed() < DEADLINE, "none of them waits: {:?}", began.elapsed());
    let began = Instant::now();
    assert_eq!(reason(manager.get_enrolled(&never_used)), Reason::TimedOut);
    assert!(began.elapsed() < IN_TIME, "{:?}", began.elapsed());
    // It answers again, and somebody notices although nobody waits.
    proxy.spoil(LOCATE, Fault::None);
    let end = Instant::now() + Duration::from_secs(60);
    while manager.get_enrolled(&known).unwrap().from_cache().is_some() {
        assert!(Instant::now() < end, "nobody noticed");
        std::thread::sleep(Duration::from_millis(100));
    }
}

#[test]
fn what_the_server_has_destroyed_is_unusable_at_once_where_it_is_reached_and_elsewhere_after_the_lifetime() {
    let lifetime = Duration::from_secs(20);
    let mut server = PyKmip::start();
    let proxy = Proxy::start(server.authority(), "server", server.address());
    let id = volume("destroyed");
    let (near, far) = (Host::new(), Host::new());
    let far_host = || far.start(kmip(server.config("client", vec![proxy.address()])), lifetime);
    let near_host = near.start(kmip(server.config("client", vec![server.address()])), LONG);
    let known = recorded(&id, &create(&near_host, &id, 256).unwrap());
    far_host().get_enrolled(&known).unwrap();
    let fetched = Instant::now();
    proxy.spoil(LOCATE, Fault::Hang);
    server.manager().destroy(&id).unwrap();
    assert_eq!(reason(near_host.get_enrolled(&known)), Reason::NoKey);
    assert!(near_host.kept().unwrap().until.is_empty(), "a no evicts at once");
    let far_manager = far_host();
    while far_manager.get_enrolled(&known).is_ok() {
        assert!(fetched.elapsed() < lifetime + IN_TIME, "a key outlives its lifetime");
    }
    assert!(fetched.elapsed() + DEADLINE >= lifetime, "{:?}", fetched.elapsed());
    assert_eq!(reason(far_host().get_enrolled(&known)), Reason::TimedOut);
    proxy.spoil(LOCATE, Fault::None);
    assert_eq!(reason(far_host().get_enrolled(&known)), Reason::NoKey);
    server.stop();
    assert_eq!(reason(near_host.get_enrolled(&known)), Reason::TimedOut, "it does not come back");
}

/// The alert comes from whoever answers at the server's address.
#[test]
fn a_host_that_the_server_turns_away_uses_no_kept_key() {
    let server = PyKmip::start();
    let id = volume("turned-away");
    let host = Host::new();
    let theirs = server.config("client", vec![server.address()]);
    let known = recorded(&id, &create(&host.start(kmip(theirs.clone()), LONG), &id, 256).unwrap());
    let other = Authority::new("another");
    let strange = KmipConfig { certificate: other.path("client.pem"), key: other.path("client.key"), ..theirs.clone() };
    let refusal = host.start(kmip(strange), LONG).get_enrolled(&known).err().expect("must be refused");
    assert_eq!(refusal.reason(), Reason::TimedOut);
    assert!(refusal.to_string().contains("it does not accept this host"), "{refusal}");
    assert!(!refusal.is_unanswered());
    // Anybody between could have said so: nothing is wiped for it.
    let nowhere = KmipConfig { servers: vec!["127.0.0.1:1".to_owned()], ..theirs };
    assert!(host.start(kmip(nowhere), LONG).get_enrolled(&known).is_ok());
}

#[test]
fn barbican_is_silent_if_its_front_says_that_it_is_away_and_not_if_it_refuses() {
    let servers = Barbican::start();
    let id = volume("barbican");
    let host = Host::new();
    let manager = host.start(barbican(&servers), LONG);
    let key = create(&manager, &id, 256).unwrap();
    let known = recorded(&id, &key);
    servers.spoil(|_| Some(Reply::json(502, "", "{}")));
    let found = manager.get_enrolled(&known).unwrap();
    assert!(found.same_as(&key) && found.from_cache().is_some());
    servers.spoil(|_| Some(Reply::json(500, "", "{}")));
    let manager = host.start(barbican(&servers), LONG);
    assert_eq!(reason(manager.get_enrolled(&known)), Reason::KeyManager);
    servers.spoil(|_| Some(Reply::json(403, "", "{}")));
    assert_eq!(reason(manager.get_enrolled(&known)), Reason::NotAllowed);
    servers.spoil(|_| Some(Reply::json(502, "", "{}")));
    assert_eq!(reason(manager.get_enrolled(&known)), Reason::TimedOut, "it was evicted");
}

/// As an ingress or a web server says it while Barbican behind it is restarted.
#[test]
fn barbican_is_not_who_stands_before_it_and_knows_no_such_page_or_no_token() {
    let servers = Barbican::start();
    let id = volume("barbican-front");
    let host = Host::new();
    let start = || host.start(barbican(&servers), LONG);
    let key = create(&start(), &id, 256).unwrap();
    let known = recorded(&id, &key);
    let page = |status: u16| {
        let body = "<html><body><h1>No such luck</h1></body></html>";
        let head = format!("HTTP/1.1 {status} X\r\ncontent-type: text/html\r\ncontent-length: {}\r\n", body.len());
        Reply::Bytes(format!("{head}connection: close\r\n\r\n{body}").into_bytes())
    };
    let other = "{\"message\": \"no Route matched with those values\"}";
    for what in ["/payload", "/metadata", "/secrets?"] {
        let manager = start();
        servers.spoil(move |request| request.target.contains(what).then(|| page(404)));
        let refusal = manager.get_enrolled(&known).err().expect("must be refused");
        assert_eq!(refusal.reason(), Reason::KeyManager, "{what}: {refusal}");
        assert!(refusal.to_string().contains("no word of Barbican's"), "{what}: {refusal}");
        servers.spoil(move |request| request.target.contains(what).then(|| Reply::json(404, "", other)));
        assert_eq!(reason(manager.get_enrolled(&known)), Reason::KeyManager, "{what}");
        // Keystone has given a token for each.
        servers.spoil(move |request| request.target.contains(what).then(|| page(401)));
        assert_eq!(reason(manager.get_enrolled(&known)), Reason::NotAllowed, "{what}");
        servers.spoil(|_| Some(Reply::json(502, "", "{}")));
        let found = manager.get_enrolled(&known).unwrap();
        assert!(found.same_as(&key) && found.from_cache().is_some(), "{what}");
    }
    // Nothing counts as deleted by such a word.
    servers.spoil(move |request| (request.method == "DELETE").then(|| page(404)));
    assert_eq!(reason(start().destroy(&id)), Reason::KeyManager);
    servers.spoil(|_| None);
    let manager = start();
    assert!(manager.get_enrolled(&known).unwrap().same_as(&key));
    // What Barbican itself says does count, and so does Keystone.
    servers.spoil(|request| request.target.contains("/payload").then(|| Reply::json(404, "", NOT_FOUND)));
    assert_eq!(reason(manager.get_enrolled(&known)), Reason::NoKey);
    servers.spoil(|_| Some(Reply::json(502, "", "{}")));
    assert_eq!(reason(manager.get_enrolled(&known)), Reason::TimedOut, "it was evicted");
}
