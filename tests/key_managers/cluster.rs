//! A Barbican of two nodes, each of which sees what was written at the other one only after a while.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};
use volcrypt::keys::barbican::{BarbicanConfig, BarbicanKeyManager, Credential};

use super::barbican::NOT_FOUND;
use super::scripted::{Reply, Request, Scripted};

/// What becomes of a request.
pub enum Turn {
    /// The host's own node answers.
    AsItIs,
    /// This node answers.
    Node(usize),
    /// This comes instead, and nothing is done.
    Instead(Reply),
}

/// A running cluster, and what a host needs to ask it.
pub struct Cluster {
    server: Scripted,
    nodes: Arc<Nodes>,
    folder: tempfile::TempDir,
}

struct Nodes {
    /// What was written, where and when.
    written: Mutex<Vec<(Instant, usize, Write)>>,
    /// How late the other node sees it.
    lag: Duration,
    /// How late it sees what is added to metadata.
    lag_of_additions: Duration,
}

#[derive(Clone)]
enum Write {
    Store(String, Secret),
    Replace(String, BTreeMap<String, String>),
    Add(String, String, String),
    Delete(String),
}

/// A secret, as a node sees it.
#[derive(Clone)]
pub struct Secret {
    name: String,
    created: String,
    key: Vec<u8>,
    /// What is kept beside it.
    pub metadata: BTreeMap<String, String>,
}

impl Cluster {
    /// One whose nodes lag by `lag`, and by `lag_of_additions` in what is added to metadata.
    pub fn start(lag: Duration, lag_of_additions: Duration) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let secret = folder.path().join("secret");
        fs::write(&secret, "s3cret\n").unwrap();
        fs::set_permissions(&secret, fs::Permissions::from_mode(0o600)).unwrap();
        let nodes = Arc::new(Nodes { written: Mutex::default(), lag, lag_of_additions });
        let cluster = Cluster { server: Scripted::start(|_| Reply::Hang), nodes, folder };
        cluster.direct(|_, _| Turn::AsItIs);
        cluster
    }

    /// Has `direct` decide about every request from now on; the number is that of the host's own node. It may take its
    /// time: what is written takes effect afterwards.
    pub fn direct(&self, direct: impl Fn(&Request, usize) -> Turn + Send + Sync + 'static) {
        let (nodes, port) = (Arc::clone(&self.nodes), self.server.port());
        self.server.answer(move |request| {
            let (node, target) = match request.target.strip_prefix("/node1") {
                Some(target) => (1, target),
                None => (0, request.target.trim_start_matches("/node0")),
            };
            let request = Request { target: target.to_owned(), ..request.clone() };
            if target.contains("/auth/tokens") {
                return token(port, node);
            }
            match direct(&request, node) {
                Turn::AsItIs => nodes.answer(&request, node),
                Turn::Node(node) => nodes.answer(&request, node),
                Turn::Instead(reply) => reply,
            }
        });
    }

    /// The key manager of a host that asks this node.
    pub fn host(&self, node: usize) -> BarbicanKeyManager {
        BarbicanKeyManager::new(BarbicanConfig {
            auth_url: format!("http://127.0.0.1:{}/node{node}/v3", self.server.port()),
            credential: Credential::Application("app1".to_owned()),
            secret: self.folder.path().join("secret"),
            ca: None,
            interface: "public".to_owned(),
            region: Some("here".to_owned()),
            deadline: Duration::from_secs(10),
            volume_secrets: None,
        })
    }

    /// The secrets that `node` sees, with their ids.
    pub fn secrets(&self, node: usize) -> BTreeMap<String, Secret> {
        self.nodes.view(node)
    }

    /// Keeps another secret with the name, the age and, but for what `change` does, the metadata of `like`; its id.
    pub fn copy(&self, like: &Secret, key: &[u8], change: impl FnOnce(&mut BTreeMap<String, String>)) -> String {
        let mut secret = Secret { key: key.to_owned(), ..like.clone() };
        change(&mut secret.metadata);
        let id = self.nodes.new_id();
        self.nodes.write(0, Write::Store(id.clone(), secret));
        id
    }
}

impl Nodes {
    fn write(&self, node: usize, write: Write) {
        self.written.lock().unwrap().push((Instant::now(), node, write));
    }

    fn new_id(&self) -> String {
        format!("dfe2418f-8205-4e90-816a-{:012}", self.written.lock().unwrap().len())
    }

    fn view(&self, node: usize) -> BTreeMap<String, Secret> {
        let mut view: BTreeMap<String, Secret> = BTreeMap::new();
        for (at, on, write) in self.written.lock().unwrap().iter() {
            let lag = if matches!(write, Write::Add(..)) { self.lag_of_additions } else { self.lag };
            if *on != node && at.elapsed() < lag {
                continue;
            }
            match write.clone() {
                Write::Store(id, secret) => drop(view.insert(id, secret)),
                Write::Replace(id, metadata) => drop(view.get_mut(&id).map(|secret| secret.metadata = metadata)),
                Write::Add(id, key, value) => drop(view.get_mut(&id).map(|secret| secret.metadata.insert(key, value))),
                Write::Delete(id) => drop(view.remove(&id)),
            }
        }
        view
    }

    fn answer(&self, request: &Request, node: usize) -> Reply {
        let (path, query) = request.target.split_once('?').unwrap_or((&request.target, ""));
        let body: Value = serde_json::from_slice(&request.body).unwrap_or_default();
        let text = |name: &str| body[name].as_str().unwrap().to_owned();
        let view = self.view(node);
        let steps: Vec<&str> = path.trim_start_matches("/v1/").split('/').collect();
        match (request.method.as_str(), steps.as_slice()) {
            ("POST", ["secrets"]) => {
                let id = self.new_id();
                let created = format!("2026-11-24T15:52:57.{:06}", self.written.lock().unwrap().len());
                let key = STANDARD.decode(text("payload")).unwrap();
                let secret = Secret { name: text("name"), created, key, metadata: BTreeMap::new() };
                self.write(node, Write::Store(id.clone(), secret));
                Reply::json(201, "", &json!({"secret_ref": format!("http://elsewhere/v1/secrets/{id}")}).to_string())
            }
            ("GET", ["secrets"]) => {
                let name = query.split('&').find_map(|part| part.strip_prefix("name=")).unwrap();
                let found = view.iter().filter(|(_, secret)| secret.name == name);
                let found: Vec<Value> = found
                    .map(
                        |(id, secret)| json!({"name": name, "created": secret.created, "secret_ref": format!("/{id}")}),
                    )
                    .collect();
                Reply::json(200, "", &json!({"total": found.len(), "secrets": found}).to_string())
            }
            (method, ["secrets", id, rest @ ..]) => match view.get(*id) {
                Some(secret) => self.answer_about(node, method, (*id).to_owned(), secret, rest, &body),
                None => Reply::json(404, "", NOT_FOUND),
            },
            _ => Reply::json(400, "", "{}"),
        }
    }

    fn answer_about(
        &self,
        node: usize,
        method: &str,
        id: String,
        secret: &Secret,
        rest: &[&str],
        body: &Value,
    ) -> Reply {
        match (method, rest) {
            ("GET", ["metadata"]) => return Reply::json(200, "", &json!({"metadata": secret.metadata}).to_string()),
            ("GET", ["payload"]) => {
                let length = secret.key.len();
                let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n");
                return Reply::Bytes([head.as_bytes(), &secret.key].concat());
            }
            ("PUT", ["metadata"]) => {
                self.write(node, Write::Replace(id, serde_json::from_value(body["metadata"].clone()).unwrap()));
            }
            ("POST", ["metadata"]) => {
                let text = |name: &str| body[name].as_str().unwrap().to_owned();
                self.write(node, Write::Add(id, text("key"), text("value")));
            }
            ("DELETE", []) => self.write(node, Write::Delete(id)),
            _ => {}
        }
        Reply::json(200, "", "{}")
    }
}

fn token(port: u16, node: usize) -> Reply {
    let url = format!("http://127.0.0.1:{port}/node{node}");
    let endpoint = json!({"interface": "public", "region_id": "here", "url": url});
    let body = json!({"token": {
        "issued_at": "2026-11-24T15:52:57",
        "expires_at": "2026-11-24T16:52:57",
        "user": {"id": "u1"},
        "catalog": [{"type": "key-manager", "endpoints": [endpoint]}],
    }});
    Reply::json(201, "x-subject-token: t1\r\n", &body.to_string())
}
