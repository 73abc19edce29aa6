//! What becomes of a Barbican and a Keystone that fail, that lie, or that say no.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use volcrypt::keys::barbican::{BarbicanConfig, BarbicanKeyManager, Credential};
use volcrypt::keys::{Description, Key, KeyManager};
use volcrypt::policy::Profile;
use volcrypt::refusal::{Reason, Refusal};
use volcrypt::store::EnrolledDevice;
use volcrypt::volume::VolumeId;

use super::authority::Authority;
use super::barbican::Barbican;
use super::scripted::{Reply, Request, Scripted, forward};

const ID: &str = "dfe2418f-8205-4e90-816a-4e8ea2366b48";
const KEY: [u8; 64] = *b"0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";

/// What is asked one after the other for a key.
const STEPS: [&str; 4] = ["/v3/auth/tokens", "/v1/secrets?", "/metadata", "/payload"];

pub(super) fn volume(name: &str) -> VolumeId {
    name.parse().unwrap()
}

pub(super) fn wanted() -> Description {
    let device = EnrolledDevice { wwid: Some("naa.6".to_owned()), ..EnrolledDevice::default() };
    Description::new(device, 4096, ("default", &Profile::default()), Some("p1"), 7)
}

pub(super) fn refused<T>(outcome: Result<T, Refusal>) -> (Reason, String) {
    let refusal = outcome.err().expect("must be refused");
    (refusal.reason(), refusal.to_string())
}

fn metadata_of(key: &[u8]) -> String {
    let key = Key::filled(key.len(), |room| {
        room.copy_from_slice(key);
        Ok(())
    });
    let text = wanted().to_text(&volume("one"), &key.unwrap()).unwrap();
    let pieces = text.as_bytes().chunks(200).enumerate();
    let pieces = pieces.map(|(number, piece)| {
        let piece = serde_json::to_string(std::str::from_utf8(piece).unwrap()).unwrap();
        format!("\"volcrypt-description-{number:02}\": {piece}, ")
    });
    let pieces: String = pieces.collect();
    format!(
        "{{\"metadata\": {{{pieces}\"volcrypt-volume\": \"one\", \"volcrypt-chosen\": \"yes\", \
         \"volcrypt-settled\": \"yes\", \"new\": \"x\"}}, \"new\": 1}}"
    )
}

fn secret(id: &str) -> String {
    format!(
        "{{\"name\": \"volcrypt/one\", \"created\": \"2026-11-24T15:52:57.838519\", \"secret_ref\": \
         \"http://elsewhere.example/v1/secrets/{id}\", \"bit_length\": 512, \"new\": {{}}}}"
    )
}

fn token(port: u16, scheme: &str) -> Reply {
    let endpoint = |interface, region, url: &str| {
        format!("{{\"interface\": \"{interface}\", \"region_id\": \"{region}\", \"url\": \"{url}\", \"new\": 1}}")
    };
    let endpoints = [
        endpoint("public", "here", &format!("{scheme}://127.0.0.1:{port}/")),
        endpoint("internal", "here", "http://10.0.0.1:9311"),
        endpoint("public", "there", "http://127.0.0.1:1"),
    ];
    let body = format!(
        "{{\"token\": {{\"issued_at\": \"2026-11-24T15:52:57.000000Z\", \"expires_at\": \"2026-11-24T16:52:57.000000Z\", \
         \"user\": {{\"id\": \"u1\"}}, \"catalog\": [{{\"type\": \"key-manager\", \"endpoints\": [{}]}}, {{\"type\": \"new\"}}]}}, \
         \"new\": 1}}",
        endpoints.join(", ")
    );
    Reply::json(201, "x-subject-token: t1\r\n", &body)
}

/// The answers of a Keystone and a Barbican that have the key of the volume `one`, with fields that nobody knows.
fn right(request: &Request, port: u16, scheme: &str) -> Reply {
    match STEPS.iter().position(|step| request.target.contains(step)) {
        Some(0) => token(port, scheme),
        Some(1) => Reply::json(200, "", &format!("{{\"secrets\": [{}], \"total\": 1, \"new\": 1}}", secret(ID))),
        Some(2) => Reply::json(200, "", &metadata_of(&KEY)),
        Some(_) => {
            let head = "HTTP/1.1 200 OK\r\ncontent-length: 64\r\nconnection: close\r\n\r\n";
            Reply::Bytes([head.as_bytes(), &KEY].concat())
        }
        None => Reply::json(200, "", "{}"),
    }
}

/// A server that is right but for what `spoil` says, and what a host needs to ask it.
struct Stage {
    server: Scripted,
    folder: tempfile::TempDir,
}

impl Stage {
    fn new() -> Self {
        let server = Scripted::start(|_| Reply::Hang);
        let stage = Stage { server, folder: tempfile::tempdir().unwrap() };
        let secret = stage.folder.path().join("secret");
        fs::write(&secret, "s3cret\n").unwrap();
        fs::set_permissions(&secret, fs::Permissions::from_mode(0o600)).unwrap();
        stage.spoil(|_| None);
        stage
    }

    fn spoil(&self, spoil: impl Fn(&Request) -> Option<Reply> + Send + Sync + 'static) {
        let port = self.server.port();
        self.server.answer(move |request| spoil(request).unwrap_or_else(|| right(request, port, "http")));
    }

    fn config(&self) -> BarbicanConfig {
        BarbicanConfig {
            auth_url: format!("http://127.0.0.1:{}/v3", self.server.port()),
            credential: Credential::Application("app1".to_owned()),
            secret: self.folder.path().join("secret"),
            ca: None,
            interface: "public".to_owned(),
            region: Some("here".to_owned()),
            deadline: Duration::from_secs(50),
            volume_secrets: None,
        }
    }

    fn get(&self) -> Result<Key, Refusal> {
        BarbicanKeyManager::new(self.config()).get(&volume("one"))
    }

    fn get_within(&self, milliseconds: u64) -> Result<Key, Refusal> {
        let config = BarbicanConfig { deadline: Duration::from_millis(milliseconds), ..self.config() };
        BarbicanKeyManager::new(config).get(&volume("one"))
    }
}

#[test]
fn what_nobody_knows_is_passed_over() {
    assert_eq!(Stage::new().get().unwrap().bytes(), KEY);
}

#[test]
fn every_no_has_its_reason_and_what_to_do() {
    let stage = Stage::new();
    let cases = [
        (300, [Reason::KeyManager; 4], "points to"),
        (307, [Reason::KeyManager; 4], "points to"),
        (400, [Reason::KeyManager; 4], "HTTP 400: no such luck, request req-1"),
        (401, [Reason::NotAllowed; 4], "holds its secret"),
        (403, [Reason::NotAllowed; 4], "HTTP 403"),
        (404, [Reason::KeyManager, Reason::KeyManager, Reason::NoKey, Reason::NoKey], ""),
        (409, [Reason::KeyManager; 4], "HTTP 409"),
        (429, [Reason::TimedOut; 4], "too much to do"),
        (500, [Reason::KeyManager; 4], "HTTP 500"),
        (503, [Reason::TimedOut; 4], "too much to do"),
        (504, [Reason::TimedOut; 4], "HTTP 504"),
    ];
    for (status, reasons, said) in cases {
        for (step, reason) in STEPS.into_iter().zip(reasons) {
            stage.spoil(move |request| {
                let headers =
                    "x-openstack-request-id: req-1\r\nretry-after: 60\r\nlocation: http://127.0.0.1:1/elsewhere\r\n";
                let body = format!("{{\"code\": {status}, \"title\": \"No\", \"description\": \"no such luck.\"}}");
                request.target.contains(step).then(|| Reply::json(status, headers, &body))
            });
            let started = Instant::now();
            let (found, sentence) = refused(stage.get());
            assert_eq!(found, reason, "{status} {step}: {sentence}");
            assert!(sentence.contains(said), "{status} {step}: {sentence}");
            assert!(started.elapsed() < Duration::from_secs(45), "{status} {step}");
        }
    }
    // Keystone's own word that there is no such credential (any more) is a no; a server before it knows nothing of that.
    for (message, reason) in [
        ("Could not find Application Credential: app1.", Reason::NotAllowed),
        ("The resource could not be found.", Reason::KeyManager),
    ] {
        stage.spoil(move |request| {
            let body =
                format!("{{\"error\": {{\"code\": 404, \"message\": \"{message}\", \"title\": \"Not Found\"}}}}");
            request.target.contains(STEPS[0]).then(|| Reply::json(404, "", &body))
        });
        let (found, sentence) = refused(stage.get());
        assert_eq!(found, reason, "{sentence}");
        assert!(sentence.contains("auth_url"), "{sentence}");
    }
    // What the owner of a key has to do.
    stage.spoil(|request| request.target.contains("/payload").then(|| Reply::json(403, "", "{}")));
    let (_, sentence) = refused(stage.get());
    let command = format!(
        "'openstack acl user add --user u1 --operation-type read http://127.0.0.1:{}/v1/secrets/{ID}'",
        stage.server.port()
    );
    assert!(sentence.contains(&command), "{sentence}");
}

#[test]
fn an_answer_that_is_cut_off_or_makes_no_sense_is_no_key() {
    let stage = Stage::new();
    for step in STEPS {
        let port = stage.server.port();
        let probe = Request { method: "GET".into(), target: step.into(), head: String::new(), body: Vec::new() };
        let whole = right(&probe, port, "http").bytes();
        for length in (0..whole.len()).step_by(13).chain([whole.len() - 1]) {
            stage.spoil(move |request| {
                let cut = || Reply::Bytes(right(request, port, "http").bytes()[..length].to_vec());
                request.target.contains(step).then(cut)
            });
            let (reason, sentence) = refused(stage.get());
            assert!(matches!(reason, Reason::TimedOut | Reason::KeyManager), "{step} {length}: {reason:?} {sentence}");
        }
        for body in ["", "{", "[]", "null", "{\"secrets\": 1}", "\u{fffd}", "{\"token\": {}}", &"[".repeat(100_000)] {
            let body = body.to_owned();
            stage.spoil(move |request| {
                request.target.contains(step).then(|| Reply::json(200, "x-subject-token: t1\r\n", &body))
            });
            let (reason, sentence) = refused(stage.get());
            let is_right = reason == Reason::KeyManager || (step == "/payload" && reason == Reason::WrongKey);
            assert!(is_right, "{step}: {reason:?} {sentence}");
        }
        let endless = [b"HTTP/1.1 200 OK\r\nx-subject-token: t\r\n\r\n".as_slice(), &vec![b' '; 2 << 20]].concat();
        stage.spoil(move |request| request.target.contains(step).then(|| Reply::Bytes(endless.clone())));
        let (reason, sentence) = refused(stage.get());
        assert_eq!(reason, Reason::KeyManager, "{step}: {sentence}");
        assert!(sentence.contains("longer than"), "{step}: {sentence}");
    }
}

#[test]
fn a_slow_or_silent_server_costs_the_deadline_and_no_more() {
    let stage = Stage::new();
    for step in STEPS {
        for hang in [true, false] {
            let port = stage.server.port();
            stage.spoil(move |request| {
                let slow = || match hang {
                    true => Reply::Hang,
                    // Each byte comes soon.
                    false => Reply::Drip(right(request, port, "http").bytes(), Duration::from_millis(50)),
                };
                request.target.contains(step).then(slow)
            });
            let started = Instant::now();
            let (reason, sentence) = refused(stage.get_within(1000));
            assert_eq!(reason, Reason::TimedOut, "{sentence}");
            assert!(sentence.contains("did not answer in time"), "{sentence}");
            assert!(started.elapsed() < Duration::from_secs(20), "{step} {hang}: {:?}", started.elapsed());
        }
    }
}

#[test]
fn a_server_that_has_too_much_to_do_is_asked_again_in_time() {
    let stage = Stage::new();
    let refusals = Arc::new(AtomicUsize::new(0));
    for step in STEPS {
        let (counted, before) = (Arc::clone(&refusals), refusals.load(Ordering::Relaxed));
        stage.spoil(move |request| {
            let is_first = request.target.contains(step) && counted.load(Ordering::Relaxed) == before;
            is_first.then(|| {
                counted.fetch_add(1, Ordering::Relaxed);
                Reply::json(503, "retry-after: 1\r\n", "")
            })
        });
        assert_eq!(stage.get().unwrap().bytes(), KEY);
        assert_eq!(refusals.load(Ordering::Relaxed), before + 1);
    }
}

#[test]
fn a_token_is_used_until_it_is_refused_and_renewed_once() {
    let stage = Stage::new();
    let manager = BarbicanKeyManager::new(stage.config());
    let tokens = || stage.server.asked().iter().filter(|request| request.target.contains(STEPS[0])).count();
    for _ in 0..20 {
        manager.get(&volume("one")).unwrap();
    }
    assert_eq!(tokens(), 1);
    let refused_once = Arc::new(AtomicUsize::new(0));
    stage.spoil(move |request| {
        let is_first = request.target.contains("/payload") && refused_once.fetch_add(1, Ordering::Relaxed) == 0;
        is_first.then(|| Reply::json(401, "", "{}"))
    });
    assert_eq!(manager.get(&volume("one")).unwrap().bytes(), KEY);
    assert_eq!(tokens(), 1, "renewed");
    // Always refused: asked twice, not for ever.
    stage.spoil(|request| request.target.contains("/v1/").then(|| Reply::json(401, "", "{}")));
    assert_eq!(refused(manager.get(&volume("one"))).0, Reason::NotAllowed);
    assert_eq!(stage.server.asked().iter().filter(|request| request.target.contains("/v1/")).count(), 2);
    // One that is about to end is not used.
    let port = stage.server.port();
    stage.spoil(move |request| {
        let short = || String::from_utf8(token(port, "http").bytes()).unwrap().replace("T16:52:57", "T15:53:30");
        request.target.contains(STEPS[0]).then(|| Reply::Bytes(short().into_bytes()))
    });
    let manager = BarbicanKeyManager::new(stage.config());
    manager.get(&volume("one")).unwrap();
    assert!(tokens() > 1);
}

#[test]
fn only_the_place_that_is_meant_is_asked() {
    let stage = Stage::new();
    let get = |config| BarbicanKeyManager::new(config).get(&volume("one"));
    for (config, said) in [
        (BarbicanConfig { region: None, ..stage.config() }, "several key managers"),
        (BarbicanConfig { region: Some("nowhere".to_owned()), ..stage.config() }, "no key manager"),
        (BarbicanConfig { interface: "admin".to_owned(), ..stage.config() }, "no key manager"),
        (BarbicanConfig { interface: "internal".to_owned(), ..stage.config() }, "in clear over the network"),
    ] {
        let (reason, sentence) = refused(get(config));
        assert_eq!(reason, Reason::Configuration, "{sentence}");
        assert!(sentence.contains(said), "{sentence}");
    }
    let elsewhere = Scripted::start(|_| Reply::json(200, "", "{}"));
    let location = format!("location: http://127.0.0.1:{}/v1/x\r\n", elsewhere.port());
    stage.spoil(move |request| request.target.contains("/payload").then(|| Reply::json(302, &location, "")));
    assert_eq!(refused(stage.get()).0, Reason::KeyManager);
    assert!(elsewhere.asked().is_empty(), "followed");
}

#[test]
fn what_lies_about_a_key_is_not_used() {
    let stage = Stage::new();
    let payload = |bytes: &[u8]| {
        let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\nconnection: close\r\n\r\n", bytes.len());
        [head.as_bytes(), bytes].concat()
    };
    for (bytes, said) in
        [(&KEY[..32], "256 bits and not the 512"), (&[7; 64], "is another one"), (&KEY[1..], "504 bits")]
    {
        let answer = payload(bytes);
        stage.spoil(move |request| request.target.contains("/payload").then(|| Reply::Bytes(answer.clone())));
        let (reason, sentence) = refused(stage.get());
        assert_eq!(reason, Reason::WrongKey, "{sentence}");
        assert!(sentence.contains(said), "{sentence}");
    }
    for (from, to, said) in [
        ("\"one\"", "\"other\"", "not made for that volume"),
        ("cipher", "zipher", "makes no sense"),
        ("volcrypt-description-00", "volcrypt-description-05", "makes no sense"),
    ] {
        stage.spoil(move |request| {
            request.target.contains("/metadata").then(|| Reply::json(200, "", &metadata_of(&KEY).replace(from, to)))
        });
        let (reason, sentence) = refused(stage.get());
        assert_eq!(reason, Reason::KeyManager, "{sentence}");
        assert!(sentence.contains(said), "{sentence}");
    }
    // Two that were chosen.
    let both = format!("{{\"secrets\": [{}, {}], \"total\": 2}}", secret(ID), secret(&ID.replace('d', "e")));
    stage.spoil(move |request| request.target.contains(STEPS[1]).then(|| Reply::json(200, "", &both)));
    let (reason, sentence) = refused(stage.get());
    assert_eq!(reason, Reason::KeyManager);
    assert!(sentence.contains("volcrypt volume show one"), "{sentence}");
    // A secret that is only like the one that is asked for.
    let like = format!("{{\"secrets\": [{}], \"total\": 1}}", secret(ID).replace("volcrypt/one", "VOLCRYPT/one"));
    stage.spoil(move |request| request.target.contains(STEPS[1]).then(|| Reply::json(200, "", &like)));
    assert_eq!(refused(stage.get()).0, Reason::NoKey);
}

#[test]
fn all_pages_are_listed() {
    let stage = Stage::new();
    stage.spoil(|request| {
        let offset = request.target.split("offset=").nth(1)?.split('&').next()?.parse::<usize>().ok()?;
        assert!(request.target.contains("name=volcrypt/%25&"), "{}", request.target);
        let secrets = (offset..250.min(offset + 100)).map(|number| {
            let id = format!("dfe2418f-8205-4e90-816a-{number:012}");
            secret(&id).replace("volcrypt/one", &format!("volcrypt/v{number:03}"))
        });
        let secrets: Vec<String> = secrets.collect();
        Some(Reply::json(200, "", &format!("{{\"secrets\": [{}], \"total\": 250}}", secrets.join(", "))))
    });
    let listed = BarbicanKeyManager::new(stage.config()).list().unwrap();
    assert_eq!(listed.len(), 250);
    assert!(listed.iter().enumerate().all(|(number, info)| info.volume == volume(&format!("v{number:03}"))));
}

#[test]
fn who_is_not_vouched_for_gets_no_secret() {
    let stage = Stage::new();
    let authority = Authority::new("authority");
    let other = Authority::new("another");
    authority.issue("expired", "serverAuth", -1);
    let over_tls = |authority: &Authority, name: &str| {
        let server = Scripted::start_tls(authority, name, |_| Reply::Hang);
        let port = server.port();
        server.answer(move |request| right(request, port, "https"));
        server
    };
    let config = |server: &Scripted| BarbicanConfig {
        auth_url: format!("https://127.0.0.1:{}", server.port()),
        ca: Some(authority.path("ca.pem")),
        ..stage.config()
    };
    let server = over_tls(&authority, "server");
    let manager = BarbicanKeyManager::new(config(&server));
    assert_eq!(manager.get(&volume("one")).unwrap().bytes(), KEY);
    for (of, name, said) in [(&other, "server", "not among those in ca"), (&authority, "expired", "has expired")] {
        let server = over_tls(of, name);
        let (reason, sentence) = refused(BarbicanKeyManager::new(config(&server)).get(&volume("one")));
        assert_eq!(reason, Reason::TimedOut, "{sentence}");
        assert!(sentence.contains(said), "{sentence}");
        assert!(server.asked().is_empty());
    }
    let (reason, sentence) =
        refused(BarbicanKeyManager::new(BarbicanConfig { ca: None, ..config(&server) }).get(&volume("x")));
    assert_eq!(reason, Reason::Configuration);
    assert!(sentence.contains("needs ca"), "{sentence}");
    // Authorities that are replaced count without a restart.
    fs::copy(other.path("ca.pem"), authority.path("ca.pem")).unwrap();
    assert_eq!(refused(manager.get(&volume("one"))).0, Reason::TimedOut);
}

#[test]
fn a_secret_that_others_can_read_is_not_shown() {
    let stage = Stage::new();
    let path = stage.folder.path().join("secret");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
    let (reason, sentence) = refused(stage.get());
    assert_eq!(reason, Reason::Configuration);
    assert!(sentence.contains("chmod 0600"), "{sentence}");
    fs::remove_file(&path).unwrap();
    assert!(refused(stage.get()).1.contains("is not there"));
    assert!(stage.server.asked().is_empty());
}

/// All with one pair of real servers, which take seconds to start.
#[test]
fn a_real_barbican() {
    let servers = Barbican::start();
    a_key_whose_making_breaks_off_is_made_once(&servers);
    a_host_that_looks_before_another_ones_key_is_there_has_the_same_in_the_end(&servers);
    a_server_that_is_too_slow_to_choose_by_is_told_of_in_time(&servers);
    a_key_is_for_whom_its_owner_allows(&servers);
    who_is_not_let_in_is_told(&servers);
}

fn a_key_whose_making_breaks_off_is_made_once(servers: &Barbican) {
    // After the secret was made, and after it was offered: by the answer's loss, so that both were done.
    for (number, (method, target)) in [("POST", "/v1/secrets"), ("PUT", "/metadata")].into_iter().enumerate() {
        let id = volume(&format!("broken_{number}"));
        let barbican = servers.barbican();
        servers.spoil(move |request| {
            let is_meant = request.method == method && request.target.ends_with(target);
            is_meant.then(|| {
                forward(barbican, request);
                Reply::Bytes(Vec::new())
            })
        });
        let (reason, sentence) = refused(servers.manager("host1").create(&id, &wanted()));
        assert_eq!(reason, Reason::TimedOut, "{sentence}");
        servers.spoil(|_| None);
        let (key, kept) = servers.manager("host2").create(&id, &wanted()).unwrap();
        assert_eq!(kept, wanted());
        assert!(servers.manager("host1").get(&id).unwrap().same_as(&key));
        servers.manager("host1").destroy(&id).unwrap();
        assert_eq!(refused(servers.manager("host2").get(&id)).0, Reason::NoKey);
    }
}

/// The slow host's key is older than the quick one's, but is offered later: before the quick one has looked which key
/// counts, or after. The quick one takes its time to choose.
fn a_host_that_looks_before_another_ones_key_is_there_has_the_same_in_the_end(servers: &Barbican) {
    for late in [1000, 3500] {
        let id = volume(&format!("raced.{late}"));
        let (offered, chosen) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let barbican = servers.barbican();
        let counted = Arc::clone(&offered);
        servers.spoil(move |request| {
            let (count, pause) = match request.method.as_str() {
                "PUT" => (&counted, late),
                "POST" if request.target.ends_with("/metadata") => (&chosen, 500),
                _ => return None,
            };
            (count.fetch_add(1, Ordering::Relaxed) == 0).then(|| {
                std::thread::sleep(Duration::from_millis(pause));
                forward(barbican, request)
            })
        });
        let (slow, quick) = std::thread::scope(|scope| {
            let slow = scope.spawn(|| servers.manager("host1").create(&id, &wanted()).unwrap().0);
            while offered.load(Ordering::Relaxed) == 0 && !slow.is_finished() {
                std::thread::sleep(Duration::from_millis(5));
            }
            let quick = servers.manager("host2").create(&id, &wanted()).unwrap().0;
            (slow.join().unwrap(), quick)
        });
        assert!(slow.same_as(&quick));
        servers.spoil(|_| None);
        assert!(servers.manager("host1").get(&id).unwrap().same_as(&quick));
        servers.front().asked();
        servers.manager("host1").destroy(&id).unwrap();
        let deleted = servers.front().asked().iter().filter(|request| request.method == "DELETE").count();
        assert_eq!(deleted, 1, "the other key is not left");
    }
}

fn a_server_that_is_too_slow_to_choose_by_is_told_of_in_time(servers: &Barbican) {
    let (id, barbican) = (volume("late"), servers.barbican());
    servers.spoil(move |request| {
        request.target.contains("/v1/secrets?").then(|| {
            std::thread::sleep(Duration::from_millis(1600));
            forward(barbican, request)
        })
    });
    let (reason, sentence) = refused(servers.manager("host1").create(&id, &wanted()));
    assert_eq!(reason, Reason::TimedOut);
    assert!(sentence.contains("longer than 1000 ms"), "{sentence}");
    servers.spoil(|_| None);
    servers.manager("host1").create(&id, &wanted()).unwrap();
}

/// With what `openstack acl` does to a key.
fn a_key_is_for_whom_its_owner_allows(servers: &Barbican) {
    let id = volume("private");
    let owner = servers.manager("owner");
    servers.front().asked();
    let (key, _) = owner.create(&id, &wanted()).unwrap();
    let asked = servers.front().asked();
    let handed_out = asked.iter().find(|request| request.target.ends_with("/payload")).expect("handed out");
    let secret = handed_out.target.trim_end_matches("/payload").to_owned();
    assert!(servers.manager("host1").get(&id).unwrap().same_as(&key));
    let change = |method: &str, target: &str, body: &str| servers.ask_like(handed_out, method, target, body);
    let acl = format!("{secret}/acl");
    assert!(change("PUT", &acl, "{\"read\": {\"project-access\": false, \"users\": []}}").starts_with("HTTP/1.1 200"));
    let (reason, sentence) = refused(servers.manager("host1").get(&id));
    assert_eq!(reason, Reason::NotAllowed);
    let user = sentence.split("--user ").nth(1).unwrap().split(' ').next().unwrap().to_owned();
    assert_eq!(user.len(), 32, "{sentence}");
    assert!(sentence.contains(&format!("--operation-type read http://127.0.0.1:{}{secret}'", servers.front().port())));
    let allowed = format!("{{\"read\": {{\"project-access\": false, \"users\": [\"{user}\"]}}}}");
    assert!(change("PUT", &acl, &allowed).starts_with("HTTP/1.1 200"));
    assert!(servers.manager("host1").get(&id).unwrap().same_as(&key));
    assert_eq!(refused(servers.manager("host2").get(&id)).0, Reason::NotAllowed);
}

fn who_is_not_let_in_is_told(servers: &Barbican) {
    let config = servers.config("host1");
    let password = BarbicanConfig {
        credential: Credential::Password {
            user: "host1".to_owned(),
            user_domain: "Default".to_owned(),
            project: "volumes".to_owned(),
            project_domain: "Default".to_owned(),
        },
        ..config.clone()
    };
    BarbicanKeyManager::new(password).introduce().unwrap();
    fs::write(&config.secret, "wrong").unwrap();
    let (reason, sentence) = refused(BarbicanKeyManager::new(config.clone()).get(&volume("x")));
    assert_eq!(reason, Reason::NotAllowed, "{sentence}");
    assert!(sentence.contains("Keystone does not accept this host") && sentence.contains("host1.secret"), "{sentence}");
    let unknown = BarbicanConfig { credential: Credential::Application("0".repeat(32)), ..config };
    assert_eq!(refused(BarbicanKeyManager::new(unknown).get(&volume("x"))).0, Reason::NotAllowed);
}
