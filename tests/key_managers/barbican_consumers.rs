//! Who uses a key, as a real Barbican knows it.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use volcrypt::keys::barbican::{BarbicanConfig, BarbicanKeyManager};
use volcrypt::keys::{Description, KeyManager};
use volcrypt::policy::Profile;
use volcrypt::refusal::{Reason, Refusal};
use volcrypt::store::EnrolledDevice;
use volcrypt::volume::VolumeId;

use super::barbican::Barbican;
use super::scripted::{Reply, Request};

fn wanted() -> Description {
    let device = EnrolledDevice { wwid: Some("naa.6".to_owned()), ..EnrolledDevice::default() };
    Description::new(device, 4096, ("default", &Profile::default()), None, 7)
}

fn refused(outcome: Result<(), Refusal>) -> (Reason, String) {
    let refusal = outcome.expect_err("must be refused");
    (refusal.reason(), refusal.to_string())
}

/// A key that was made, and how Barbican is asked past volcrypt.
struct Kept<'a> {
    servers: &'a Barbican,
    volume: VolumeId,
    /// `/v1/secrets/…`
    secret: String,
    /// A request with a token.
    like: Request,
}

impl<'a> Kept<'a> {
    fn new(servers: &'a Barbican, name: &str) -> Self {
        let volume: VolumeId = name.parse().unwrap();
        servers.front().asked();
        servers.manager("host1").create(&volume, &wanted()).unwrap();
        let like = servers.front().asked().into_iter().find(|request| request.target.ends_with("/payload")).unwrap();
        let secret = like.target.trim_end_matches("/payload").to_owned();
        Kept { servers, volume, secret, like }
    }

    fn ask(&self, method: &str, target: &str, body: &str) -> String {
        self.servers.ask_like(&self.like, method, &format!("{}{target}", self.secret), body)
    }

    /// Who uses it, by the service, in the order in which they came.
    fn consumers(&self) -> Vec<String> {
        let answer = self.ask("GET", "/consumers", "");
        let services = answer.split("\"service\": \"").skip(1);
        services.map(|rest| rest.split('"').next().unwrap().to_owned()).collect()
    }

    fn in_use(&self) -> HashSet<VolumeId> {
        HashSet::from([self.volume.clone()])
    }

    fn is_there(&self) -> bool {
        self.servers.manager("host2").get(&self.volume).is_ok()
    }
}

fn nothing() -> HashSet<VolumeId> {
    HashSet::new()
}

#[test]
fn a_real_barbican_knows_who_uses_a_key() {
    let servers = Barbican::start();
    a_host_is_registered_as_long_as_it_uses_a_key(&servers);
    what_a_killed_daemon_left_is_put_right(&servers);
    a_barbican_that_does_not_answer_is_told_later(&servers);
    a_key_that_another_host_uses_is_not_destroyed(&servers);
    a_host_that_was_cloned_with_its_machine_id_is_another_one(&servers);
    a_key_that_is_gone_while_it_is_in_use_is_told_of(&servers);
}

fn a_host_is_registered_as_long_as_it_uses_a_key(servers: &Barbican) {
    let kept = Kept::new(servers, "used");
    let manager = servers.manager("host1");
    manager.get(&kept.volume).unwrap();
    assert!(kept.consumers().is_empty(), "a key that was only handed out is not in use");
    manager.note_uses(&kept.in_use()).unwrap();
    assert_eq!(kept.consumers(), ["volcrypt"]);
    // Barbican itself refuses to delete it.
    let answer = kept.ask("DELETE", "", "");
    assert!(answer.starts_with("HTTP/1.1 400") && answer.contains("consumers"), "{answer}");
    assert!(kept.is_there());
    servers.front().asked();
    manager.note_uses(&kept.in_use()).unwrap();
    assert!(servers.front().asked().is_empty(), "nothing has changed");
    manager.note_uses(&nothing()).unwrap();
    assert!(kept.consumers().is_empty());
    manager.note_uses(&kept.in_use()).unwrap();
    assert_eq!(kept.consumers(), ["volcrypt"], "again");
    manager.note_uses(&nothing()).unwrap();
    assert!(kept.ask("DELETE", "", "").starts_with("HTTP/1.1 204"));
    assert!(!kept.is_there());
}

fn what_a_killed_daemon_left_is_put_right(servers: &Barbican) {
    let (gone, mapped) = (Kept::new(servers, "left"), Kept::new(servers, "left.mapped"));
    let both = HashSet::from([gone.volume.clone(), mapped.volume.clone()]);
    servers.manager("host1").note_uses(&both).unwrap();
    servers.front().asked();
    // The next daemon knows nothing, and one of the two mappings went meanwhile.
    servers.manager("host1").note_uses(&mapped.in_use()).unwrap();
    assert!(gone.consumers().is_empty());
    assert_eq!(mapped.consumers(), ["volcrypt"]);
    let asked = servers.front().asked();
    assert!(
        asked.iter().all(|request| request.method != "POST" || request.target.contains("/auth/")),
        "registered anew"
    );
    servers.manager("host1").note_uses(&nothing()).unwrap();
}

fn a_barbican_that_does_not_answer_is_told_later(servers: &Barbican) {
    let kept = Kept::new(servers, "silent");
    let config = BarbicanConfig { deadline: Duration::from_secs(8), ..servers.config("host1") };
    let manager = BarbicanKeyManager::new(config);
    let silent = || servers.spoil(|request| request.target.contains("/consumers").then_some(Reply::Hang));
    silent();
    let started = Instant::now();
    assert_eq!(refused(manager.note_uses(&kept.in_use())).0, Reason::TimedOut);
    assert!(started.elapsed() < Duration::from_secs(40));
    servers.spoil(|_| None);
    manager.note_uses(&kept.in_use()).unwrap();
    assert_eq!(kept.consumers(), ["volcrypt"]);
    silent();
    assert_eq!(refused(manager.note_uses(&nothing())).0, Reason::TimedOut);
    servers.spoil(|_| None);
    manager.note_uses(&nothing()).unwrap();
    assert!(kept.consumers().is_empty());
    // One of two keys that cannot be told of is not in the way of the other.
    let other = Kept::new(servers, "silent.other");
    let secret = kept.secret.clone();
    servers.spoil(move |request| {
        let is_meant = request.target.starts_with(&secret) && request.target.ends_with("/consumers");
        is_meant.then(|| Reply::json(403, "", "{}"))
    });
    let both = HashSet::from([kept.volume.clone(), other.volume.clone()]);
    let (reason, sentence) = refused(manager.note_uses(&both));
    assert_eq!(reason, Reason::NotAllowed);
    assert!(sentence.contains("'openstack acl user add"), "{sentence}");
    assert_eq!(other.consumers(), ["volcrypt"]);
    servers.spoil(|_| None);
    manager.note_uses(&nothing()).unwrap();
}

fn a_key_that_another_host_uses_is_not_destroyed(servers: &Barbican) {
    let kept = Kept::new(servers, "shared");
    let manager = servers.manager("host1");
    manager.note_uses(&kept.in_use()).unwrap();
    let other = "{\"service\": \"volcrypt\", \"resource_type\": \"compute7\", \"resource_id\": \"0123\"}";
    assert!(kept.ask("POST", "/consumers", other).starts_with("HTTP/1.1 200"));
    let (reason, sentence) = refused(manager.destroy(&kept.volume));
    assert_eq!(reason, Reason::NotAllowed, "{sentence}");
    assert!(sentence.contains("in use by host compute7"), "{sentence}");
    let command = format!(
        "'openstack secret consumer delete --service-type-name volcrypt --resource-type compute7 --resource-id 0123 \
         http://127.0.0.1:{}{}'",
        servers.front().port(),
        kept.secret
    );
    assert!(sentence.contains(&command), "{sentence}");
    assert!(kept.is_there());
    assert_eq!(kept.consumers(), ["volcrypt", "volcrypt"], "nothing was changed");
    // What that command does. What this host itself has registered is not in the way.
    assert!(kept.ask("DELETE", "/consumers", other).starts_with("HTTP/1.1 200"));
    // Whoever may register one chooses its words, which nobody is to run.
    let words = "{\"service\": \"volcrypt\", \"resource_type\": \"x';reboot;'\", \"resource_id\": \"0123\"}";
    assert!(kept.ask("POST", "/consumers", words).starts_with("HTTP/1.1 200"));
    let (_, sentence) = refused(manager.destroy(&kept.volume));
    assert!(!sentence.contains("reboot") && sentence.contains("look at the consumers of"), "{sentence}");
    assert!(kept.ask("DELETE", "/consumers", words).starts_with("HTTP/1.1 200"));
    manager.destroy(&kept.volume).unwrap();
    assert!(!kept.is_there());
    manager.note_uses(&nothing()).unwrap();
}

fn a_host_that_was_cloned_with_its_machine_id_is_another_one(servers: &Barbican) {
    let kept = Kept::new(servers, "cloned");
    let id = std::fs::read_to_string("/etc/machine-id").unwrap();
    let other =
        format!("{{\"service\": \"volcrypt\", \"resource_type\": \"other-name\", \"resource_id\": \"{}\"}}", id.trim());
    assert!(kept.ask("POST", "/consumers", &other).starts_with("HTTP/1.1 200"));
    let manager = servers.manager("host1");
    manager.note_uses(&nothing()).unwrap();
    assert_eq!(kept.consumers(), ["volcrypt"], "taken for a registration of this host's that is over");
    let (reason, sentence) = refused(manager.destroy(&kept.volume));
    assert_eq!(reason, Reason::NotAllowed, "{sentence}");
    assert!(sentence.contains("in use by host other-name") && sentence.contains("was renamed"), "{sentence}");
    let command = format!("--resource-type other-name --resource-id {} http", id.trim());
    assert!(sentence.contains(&command), "{sentence}");
    assert!(kept.is_there());
    assert_eq!(kept.consumers(), ["volcrypt"], "nothing was changed");
    // What that command does, where it was this host under the name that it had before.
    assert!(kept.ask("DELETE", "/consumers", &other).starts_with("HTTP/1.1 200"));
    manager.destroy(&kept.volume).unwrap();
    assert!(!kept.is_there());
}

fn a_key_that_is_gone_while_it_is_in_use_is_told_of(servers: &Barbican) {
    let kept = Kept::new(servers, "forced");
    assert!(kept.ask("DELETE", "?force=true", "").starts_with("HTTP/1.1 204"));
    assert_eq!(refused(servers.manager("host1").note_uses(&kept.in_use())).0, Reason::NoKey);
}
