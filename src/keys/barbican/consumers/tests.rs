//! A Keystone and a Barbican that know as much as is needed here.

use std::fs::{self, Permissions};
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;

use serde_json::{Value, json};

use super::super::settle::label;
use super::super::{BarbicanConfig, Credential, name_of};
use super::*;
use crate::keys::{Description, Key};
use crate::policy::Profile;
use crate::store::EnrolledDevice;

struct Kept {
    name: String,
    metadata: BTreeMap<String, String>,
    consumers: Vec<Consumer>,
}

#[derive(Default)]
struct World {
    /// By their ids.
    secrets: BTreeMap<String, Kept>,
    /// The methods and paths that Barbican was asked for.
    asked: Vec<String>,
    /// The secrets that this host may not see.
    hidden: Vec<String>,
}

struct Servers {
    folder: tempfile::TempDir,
    port: u16,
    world: Arc<Mutex<World>>,
}

impl Servers {
    fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let world: Arc<Mutex<World>> = Arc::default();
        let served = Arc::clone(&world);
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                // Who breaks off is not answered.
                let _ = serve(stream, port, &served);
            }
        });
        Servers { folder: tempfile::tempdir().unwrap(), port, world }
    }

    fn manager(&self) -> BarbicanKeyManager {
        let secret = self.folder.path().join("secret");
        fs::write(&secret, "secret\n").unwrap();
        fs::set_permissions(&secret, Permissions::from_mode(0o600)).unwrap();
        BarbicanKeyManager::new(BarbicanConfig {
            auth_url: format!("http://127.0.0.1:{}/v3", self.port),
            credential: Credential::Application("credential".to_owned()),
            secret,
            ca: None,
            interface: "public".to_owned(),
            region: None,
            deadline: Duration::from_secs(10),
            volume_secrets: None,
        })
    }

    fn world(&self) -> MutexGuard<'_, World> {
        self.world.lock().unwrap()
    }

    /// A secret that is the key of a volume of this name, chosen long ago.
    fn add(&self, number: usize, volume: &str) -> VolumeId {
        let volume: VolumeId = volume.parse().unwrap();
        let device = EnrolledDevice { wwid: Some("naa.6".to_owned()), ..EnrolledDevice::default() };
        let description = Description::new(device, 4096, ("default", &Profile::default()), None, 7);
        let key = Key::random(512.try_into().unwrap()).unwrap();
        let mut metadata = label(&volume, &description.to_text(&volume, &key).unwrap());
        metadata.insert("volcrypt-chosen".to_owned(), "yes".to_owned());
        let kept = Kept { name: name_of(&volume), metadata, consumers: Vec::new() };
        self.world().secrets.insert(id(number), kept);
        volume
    }

    fn consumers(&self, number: usize) -> Vec<Consumer> {
        self.world().secrets[&id(number)].consumers.clone()
    }

    fn asked(&self) -> Vec<String> {
        std::mem::take(&mut self.world().asked)
    }
}

fn id(number: usize) -> String {
    format!("dfe2418f-8205-4e90-816a-{number:012}")
}

fn serve(mut stream: TcpStream, port: u16, world: &Mutex<World>) -> io::Result<()> {
    let mut read = Vec::new();
    let (head, body) = loop {
        let mut room = [0; 4096];
        let count = stream.read(&mut room)?;
        if count == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        read.extend_from_slice(&room[..count]);
        let text = String::from_utf8_lossy(&read).into_owned();
        let Some((head, body)) = text.split_once("\r\n\r\n") else { continue };
        let length = head.lines().find_map(|line| line.to_lowercase().strip_prefix("content-length: ")?.parse().ok());
        if body.len() >= length.unwrap_or(0) {
            break (head.to_owned(), body.to_owned());
        }
    };
    let mut words = head.split(' ');
    let (method, target) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let (status, answer) = match target {
        "/v3/auth/tokens" => (201, token(port)),
        _ => barbican(method, target.trim_start_matches("/v1/"), &body, &mut world.lock().unwrap()),
    };
    let answer = answer.to_string();
    write!(
        stream,
        "HTTP/1.1 {status} X\r\ncontent-type: application/json\r\nx-subject-token: t\r\ncontent-length: {}\r\nconnection: \
         close\r\n\r\n{answer}",
        answer.len()
    )
}

fn token(port: u16) -> Value {
    let endpoint = json!({"interface": "public", "url": format!("http://127.0.0.1:{port}")});
    json!({"token": {
        "issued_at": "2026-11-24T15:52:57.000000Z",
        "expires_at": "2026-11-24T16:52:57.000000Z",
        "user": {"id": "host"},
        "catalog": [{"type": "key-manager", "endpoints": [endpoint]}],
    }})
}

fn barbican(method: &str, target: &str, body: &str, world: &mut World) -> (u16, Value) {
    world.asked.push(format!("{method} {target}"));
    let said = |id: &String, kept: &Kept| {
        json!({
            "name": kept.name, "created": "2026-11-24T15:52:57.000000", "bit_length": 512, "consumers": kept.consumers,
            "secret_ref": format!("http://barbican/v1/secrets/{id}"),
        })
    };
    if let Some(query) = target.strip_prefix("secrets?name=") {
        let name = query.split('&').next().unwrap_or_default();
        let is_meant = |kept: &Kept| name == "volcrypt/%25" && kept.name.starts_with("volcrypt/") || name == kept.name;
        let found = world.secrets.iter().filter(|(_, kept)| is_meant(kept));
        let found: Vec<Value> = found.map(|(id, kept)| said(id, kept)).collect();
        return (200, json!({"total": found.len(), "secrets": found}));
    }
    let mut parts = target.split('/').skip(1);
    let (id, part) = (parts.next().unwrap_or_default().to_owned(), parts.next());
    if world.hidden.contains(&id) {
        return (403, json!({}));
    }
    let not_found = json!({"code": 404, "title": "Not Found", "description": "Secret not found."});
    let Some(kept) = world.secrets.get_mut(&id) else { return (404, not_found) };
    let consumer = || serde_json::from_str::<Consumer>(body).unwrap();
    match (method, part) {
        ("GET", None) => (200, said(&id, &*kept)),
        ("GET", Some("metadata")) => (200, json!({"metadata": kept.metadata})),
        ("POST", Some("consumers")) => {
            if !kept.consumers.contains(&consumer()) {
                kept.consumers.push(consumer());
            }
            (200, json!({}))
        }
        ("DELETE", Some("consumers")) => {
            kept.consumers.retain(|known| *known != consumer());
            (200, json!({}))
        }
        _ => (405, json!({})),
    }
}

#[test]
fn a_barbican_that_has_forgotten_who_uses_a_key_is_told_again() {
    let servers = Servers::start();
    let (own, unused) = (servers.add(1, "own"), servers.add(3, "unused"));
    let foreign: VolumeId = "foreign".parse().unwrap();
    let kept = Kept { name: "Cinder's".to_owned(), metadata: BTreeMap::new(), consumers: Vec::new() };
    servers.world().secrets.insert(id(2), kept);
    let manager = servers.manager();
    manager.registered.knows(BTreeMap::from([(foreign.clone(), id(2).parse().unwrap())]));
    let in_use = HashSet::from([own, foreign]);
    let settle = |passed: Duration| manager.settle_uses(&in_use, Instant::now() + passed);
    let this = || vec![Host::this().consumer()];

    settle(Duration::ZERO).unwrap();
    assert_eq!([1, 2, 3].map(|number| servers.consumers(number)), [this(), this(), Vec::new()]);
    servers.asked();
    settle(LOOK_AGAIN - Duration::from_secs(60)).unwrap();
    assert_eq!(servers.asked(), [""; 0], "it has said so not long ago");
    settle(LOOK_AGAIN).unwrap();
    let mut asked = servers.asked();
    asked.sort();
    assert_eq!(asked, [1, 2].map(|number| format!("GET secrets/{}", id(number))), "one question for each");
    assert_eq!([1, 2].map(|number| servers.consumers(number)), [this(), this()]);

    // It comes back as it was when this host used another volume, and another host these.
    let other = Consumer { resource_id: "another host".to_owned(), ..Host::this().consumer() };
    for (number, users) in [(1, vec![other.clone()]), (2, Vec::new()), (3, this())] {
        servers.world().secrets.get_mut(&id(number)).unwrap().consumers = users;
    }
    settle(LOOK_AGAIN * 2).unwrap();
    assert_eq!(servers.consumers(1), [vec![other.clone()], this()].concat());
    assert_eq!(servers.consumers(2), this());
    assert_eq!(servers.consumers(3), this(), "nobody has asked for that one yet");
    settle(Duration::ZERO).unwrap();
    assert!(servers.consumers(3).is_empty(), "{unused} is not mapped here");
    assert_eq!(servers.consumers(1), [vec![other], this()].concat());

    // A secret that this host may not see for the moment is not one that is gone.
    servers.world().hidden.push(id(1));
    settle(LOOK_AGAIN * 4).unwrap();
    servers.world().hidden.clear();
    servers.world().secrets.remove(&id(1));
    servers.asked();
    assert_eq!(settle(LOOK_AGAIN * 5).unwrap_err().reason(), Reason::NoKey, "the volume is lost with its mapping");
}

#[test]
fn not_all_keys_are_asked_about_at_once() {
    let registered = Registered::default();
    let volumes: Vec<VolumeId> = (0..250).map(|number| format!("v{number:03}").parse().unwrap()).collect();
    for volume in &volumes {
        registered.add(volume, &id(1), Consumer::default());
    }
    let in_use: HashSet<VolumeId> = volumes[1..].iter().cloned().collect();
    let now = Instant::now() + LOOK_AGAIN;
    let mut counts = Vec::new();
    loop {
        let due = registered.to_look_at(&in_use, now);
        if due.is_empty() {
            break;
        }
        counts.push(due.len());
        due.iter().for_each(|(volume, _)| registered.was_looked_at(volume, now));
    }
    assert_eq!(counts, [100, 100, 49], "that of one that is not in use does not matter");
}

/// As at boot, when a daemon may run before the host has its name.
#[test]
fn a_host_that_is_renamed_takes_back_what_it_had_registered_under_its_new_name() {
    let servers = Servers::start();
    let own = servers.add(1, "own");
    let foreign: VolumeId = "foreign".parse().unwrap();
    let kept = Kept { name: "Cinder's".to_owned(), metadata: BTreeMap::new(), consumers: Vec::new() };
    servers.world().secrets.insert(id(2), kept);
    let other = Consumer { resource_type: "another host".to_owned(), ..Host::this().consumer() };
    for secret in servers.world().secrets.values_mut() {
        secret.consumers = vec![Host::this().consumer(), other.clone()];
    }
    let manager = servers.manager();
    manager.registered.knows(BTreeMap::from([(foreign, id(2).parse().unwrap())]));
    let before = Host { name: format!("before-{}", Host::this().name), ..Host::this() };
    manager.learn(&before).unwrap();
    manager.learn_foreign(&before).unwrap();
    assert!(manager.registered.book().entries.is_empty(), "that is another host");

    manager.settle_uses(&HashSet::new(), Instant::now()).unwrap();
    assert_eq!([1, 2].map(|number| servers.consumers(number)), [(); 2].map(|()| vec![other.clone()]), "{own} is free");
    servers.asked();
    manager.settle_uses(&HashSet::new(), Instant::now()).unwrap();
    assert_eq!(servers.asked(), [""; 0], "it was asked as this host");
}
