//! Keys that Cinder has made, in a real Barbican.

use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use volcrypt::keys::barbican::{BarbicanConfig, BarbicanKeyManager};
use volcrypt::keys::{Description, ForeignKey, ForeignSecrets, Key, KeyManager, PassphraseHash, SecretId};
use volcrypt::policy::{KeySize, Profile};
use volcrypt::refusal::{Reason, Refusal};
use volcrypt::store::EnrolledDevice;
use volcrypt::volume::VolumeId;

use super::barbican::Barbican;
use super::scripted::{Request, forward};

fn volume(name: &str) -> VolumeId {
    name.parse().unwrap()
}

fn wanted() -> Description {
    let device = EnrolledDevice { wwid: Some("naa.6".to_owned()), ..EnrolledDevice::default() };
    Description::new(device, 4096, ("default", &Profile::default()), None, 7)
}

fn refused<T>(outcome: Result<T, Refusal>) -> (Reason, String) {
    let refusal = outcome.err().expect("must be refused");
    (refusal.reason(), refusal.to_string())
}

/// What Cinder does in Barbican, as the user `owner` of the same project.
struct Cinder<'a> {
    servers: &'a Barbican,
    like: Request,
}

impl<'a> Cinder<'a> {
    fn new(servers: &'a Barbican) -> Self {
        servers.front().asked();
        assert_eq!(refused(servers.manager("owner").get(&volume("none"))).0, Reason::NoKey);
        let like = servers.front().asked().into_iter().next().unwrap();
        Cinder { servers, like }
    }

    fn ask(&self, method: &str, target: &str, body: &str) -> String {
        let answer = self.servers.ask_like(&self.like, method, &format!("/v1/{target}"), body);
        assert!(answer.starts_with("HTTP/1.1 2"), "{method} {target}: {answer}");
        answer
    }

    /// As castellan has a key made: an order, for which nobody says a name. Nor does it say a mode, without which
    /// Barbican's own crypto plugin makes no key of 512 bits.
    fn secret(&self, bits: u32) -> SecretId {
        let mode = if bits > 256 { "\"mode\": \"xts\", " } else { "" };
        let meta = format!(
            "{{\"type\": \"key\", \"meta\": {{{mode}\"algorithm\": \"aes\", \"bit_length\": {bits}, \
             \"payload_content_type\": \"application/octet-stream\"}}}}"
        );
        let order = reference(&self.ask("POST", "orders", &meta), "order_ref");
        for _ in 0..200 {
            let answer = self.ask("GET", &format!("orders/{order}"), "");
            if answer.contains("\"ACTIVE\"") {
                return reference(&answer, "secret_ref").parse().unwrap();
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        panic!("{}", self.ask("GET", &format!("orders/{order}"), ""));
    }

    fn metadata(&self, secret: &SecretId) -> String {
        let answer = self.ask("GET", &format!("secrets/{secret}/metadata"), "");
        answer.split("\r\n\r\n").nth(1).unwrap().to_owned()
    }

    fn consumers(&self, secret: &SecretId) -> usize {
        self.ask("GET", &format!("secrets/{secret}/consumers"), "").matches("\"service\"").count()
    }
}

/// The id at the end of what an answer calls `name`.
fn reference(answer: &str, name: &str) -> String {
    let rest = answer.split(&format!("\"{name}\": \"")).nth(1).unwrap_or_else(|| panic!("no {name}: {answer}"));
    rest.split('"').next().unwrap().rsplit('/').next().unwrap().to_owned()
}

fn secrets(manager: &BarbicanKeyManager) -> &dyn ForeignSecrets {
    manager.foreign().unwrap()
}

/// Has the key of `volume` come from `foreign`, as the daemon does.
fn take(manager: &BarbicanKeyManager, volume: &VolumeId, foreign: &ForeignKey) -> Result<(Key, Description), Refusal> {
    take_at(7, manager, volume, foreign)
}

/// The same at another time, in seconds since 1970.
fn take_at(
    time: i64,
    manager: &BarbicanKeyManager,
    volume: &VolumeId,
    foreign: &ForeignKey,
) -> Result<(Key, Description), Refusal> {
    let device = EnrolledDevice { wwid: Some("naa.6".to_owned()), ..EnrolledDevice::default() };
    let wanted = Description::new(device, 4096, ("default", &Profile::default()), None, time);
    let key = foreign.key(&secrets(manager).secret(volume, &foreign.secret)?)?;
    let description = secrets(manager).describe(volume, foreign, &key, &wanted)?;
    Ok((key, description))
}

#[test]
fn a_real_barbican_has_keys_of_cinders() {
    let servers = Barbican::start();
    let cinder = Cinder::new(&servers);
    a_secret_is_used_as_it_is(&servers, &cinder);
    digits_are_hashed_as_a_passphrase(&servers, &cinder);
    a_secret_is_one_volumes_key(&servers, &cinder);
    two_hosts_that_take_a_secret_at_once_do_not_mix_what_they_note(&servers, &cinder);
    what_older_hosts_have_noted_is_read(&servers, &cinder);
    a_file_names_secrets(&servers, &cinder);
    what_was_changed_or_broken_off_is_noticed(&servers, &cinder);
    a_host_that_the_owner_has_not_let_in(&servers, &cinder);
    a_secret_that_is_deleted(&servers, &cinder);
    a_host_is_registered_while_it_uses_one(&servers, &cinder);
}

fn a_secret_is_used_as_it_is(servers: &Barbican, cinder: &Cinder<'_>) {
    let (host1, host2, id) = (servers.manager("host1"), servers.manager("host2"), volume("as-it-is"));
    let secret = cinder.secret(512);
    cinder.ask("PUT", &format!("secrets/{secret}/metadata"), "{\"metadata\": {\"kept-by\": \"cinder\"}}");
    assert!(secrets(&host1).described_by(&id, &secret).unwrap().is_none());
    let foreign = ForeignKey::itself(secret.clone());
    let (key, description) = take(&host1, &id, &foreign).unwrap();
    assert_eq!((key.bits(), description.foreign()), (512, Some(&foreign)));
    let record = description.clone().record(&id, &key);
    assert!(host1.get_enrolled(&record.recorded_key()).unwrap().same_as(&key));
    // Another host finds what this one has noted, and what Cinder has noted stays.
    let (same, described) = secrets(&host2).described_by(&id, &secret).unwrap().unwrap();
    assert!(same.same_as(&key));
    assert_eq!(described, description);
    assert!(cinder.metadata(&secret).contains("\"kept-by\": \"cinder\""));
    // To take it again changes nothing.
    let before = cinder.metadata(&secret);
    assert_eq!(take(&host2, &id, &foreign).unwrap().1, description);
    assert_eq!(cinder.metadata(&secret), before);
    // It is called by nothing that volcrypt finds or deletes.
    assert_eq!(refused(host1.get(&id)).0, Reason::NoKey);
    assert_eq!(refused(host1.destroy(&id)).0, Reason::NoKey);
    assert!(host1.list().unwrap().iter().all(|info| info.volume != id));
}

fn digits_are_hashed_as_a_passphrase(servers: &Barbican, cinder: &Cinder<'_>) {
    let (host1, host2, id) = (servers.manager("host1"), servers.manager("host2"), volume("hashed"));
    let secret = cinder.secret(256);
    let size = KeySize::try_from(512).unwrap();
    let foreign = ForeignKey::hashed(secret.clone(), PassphraseHash::Ripemd160, size);
    let (key, description) = take(&host1, &id, &foreign).unwrap();
    assert_eq!(key.bits(), 512);
    assert!(secrets(&host2).described_by(&id, &secret).unwrap().unwrap().0.same_as(&key));
    let record = description.record(&id, &key);
    assert!(host2.get_enrolled(&record.recorded_key()).unwrap().same_as(&key));
    // Nobody reads the volume in another way.
    let other = ForeignKey::hashed(secret, PassphraseHash::Sha256, size);
    let (reason, sentence) = refused(take(&host2, &id, &other));
    assert_eq!(reason, Reason::WrongKey);
    assert!(sentence.contains("in another way"), "{sentence}");
}

fn a_secret_is_one_volumes_key(servers: &Barbican, cinder: &Cinder<'_>) {
    let host = servers.manager("host1");
    let (one, other, own) = (volume("one"), volume("other"), volume("own"));
    let foreign = ForeignKey::itself(cinder.secret(512));
    take(&host, &one, &foreign).unwrap();
    let (reason, sentence) = refused(take(&host, &other, &foreign));
    assert_eq!(reason, Reason::WrongKey);
    assert!(sentence.contains("is the key of volume one and not of volume other"), "{sentence}");
    assert_eq!(refused(secrets(&host).described_by(&other, &foreign.secret)).0, Reason::WrongKey);
    // A volume that has a key gets no second one, and a key that volcrypt has made is none of Cinder's.
    servers.front().asked();
    host.create(&own, &wanted()).unwrap();
    let payload = servers.front().asked().into_iter().find(|request| request.target.ends_with("/payload")).unwrap();
    let (reason, sentence) = refused(take(&host, &own, &ForeignKey::itself(cinder.secret(512))));
    assert_eq!(reason, Reason::WrongKey);
    assert!(sentence.contains("has a key of its own in Barbican"), "{sentence}");
    // Nor is it passed over where the configuration names another.
    let folder = tempfile::tempdir().unwrap();
    let config = BarbicanConfig { volume_secrets: Some(folder.path().join("s")), ..servers.config("host1") };
    fs::write(folder.path().join("s"), format!("{own} {}\n", cinder.secret(512))).unwrap();
    fs::set_permissions(folder.path().join("s"), fs::Permissions::from_mode(0o600)).unwrap();
    let (reason, sentence) = refused(BarbicanKeyManager::new(config).described(&own));
    assert_eq!(reason, Reason::WrongKey);
    assert!(sentence.contains("has a key of its own in Barbican"), "{sentence}");
    let made_here: SecretId = payload.target.trim_end_matches("/payload").parse().unwrap();
    let (reason, sentence) = refused(secrets(&host).described_by(&own, &made_here));
    assert_eq!(reason, Reason::WrongKey);
    assert!(sentence.contains("is no secret of Cinder's"), "{sentence}");
    assert_eq!(refused(secrets(&host).described_by(&other, &made_here)).0, Reason::WrongKey);
    // Also where what was kept beside it is lost.
    cinder.ask("PUT", &format!("secrets/{made_here}/metadata"), "{\"metadata\": {}}");
    let (reason, sentence) = refused(take(&host, &other, &ForeignKey::itself(made_here.clone())));
    assert_eq!(reason, Reason::WrongKey);
    assert!(sentence.contains("is no secret of Cinder's"), "{sentence}");
    assert!(!cinder.metadata(&made_here).contains("volcrypt"));
}

/// One host has written its second piece when the other one looks what is there.
fn two_hosts_that_take_a_secret_at_once_do_not_mix_what_they_note(servers: &Barbican, cinder: &Cinder<'_>) {
    let id = volume("at.once");
    let foreign = ForeignKey::itself(cinder.secret(512));
    let (written, looks) = (Arc::new(AtomicUsize::new(0)), Arc::new((Mutex::new(0), Condvar::new())));
    let (seen, noticed, barbican) = (Arc::clone(&written), Arc::clone(&looks), servers.barbican());
    servers.spoil(move |request| {
        if !request.target.ends_with("/metadata") {
            return None;
        }
        let (count, changed) = &*noticed;
        let answer = forward(barbican, request);
        let is_second = String::from_utf8_lossy(&request.body).contains("-01\",\"value\"");
        if is_second && seen.fetch_add(1, Ordering::SeqCst) == 0 {
            let waited = Duration::from_secs(20);
            drop(changed.wait_timeout_while(count.lock().unwrap(), waited, |count| *count < 2).unwrap());
        } else if request.method == "GET" && seen.load(Ordering::SeqCst) > 0 {
            *count.lock().unwrap() += 1;
            changed.notify_all();
        }
        Some(answer)
    });
    let outcomes = std::thread::scope(|scope| {
        let first = scope.spawn(|| take_at(7, &servers.manager("host1"), &id, &foreign));
        while written.load(Ordering::SeqCst) == 0 && !first.is_finished() {
            std::thread::sleep(Duration::from_millis(5));
        }
        let second = take_at(8, &servers.manager("host2"), &id, &foreign);
        [first.join().unwrap(), second]
    });
    servers.spoil(|_| None);
    let (key, described) = secrets(&servers.manager("owner")).described_by(&id, &foreign.secret).unwrap().unwrap();
    for outcome in outcomes {
        let (same, description) = outcome.unwrap();
        assert!(same.same_as(&key));
        assert_eq!(description, described);
    }
    // To take it again, at any time, changes nothing.
    let before = cinder.metadata(&foreign.secret);
    assert_eq!(take_at(9, &servers.manager("host1"), &id, &foreign).unwrap().1, described);
    assert_eq!(cinder.metadata(&foreign.secret), before);
}

/// Their pieces have numbers only, and there is one set of them.
fn what_older_hosts_have_noted_is_read(servers: &Barbican, cinder: &Cinder<'_>) {
    let (host, id) = (servers.manager("host1"), volume("older"));
    let foreign = ForeignKey::itself(cinder.secret(512));
    let beside = format!("secrets/{}/metadata", foreign.secret);
    let key = foreign.key(&secrets(&host).secret(&id, &foreign.secret).unwrap()).unwrap();
    let older = wanted().with_foreign(foreign.clone());
    let text = older.to_text(&id, &key).unwrap();
    for (number, piece) in text.as_bytes().chunks(240).enumerate() {
        let piece = serde_json::to_string(std::str::from_utf8(piece).unwrap()).unwrap();
        let body = format!("{{\"key\": \"volcrypt-description-{number:02}\", \"value\": {piece}}}");
        cinder.ask("POST", &beside, &body);
    }
    cinder.ask("POST", &beside, &format!("{{\"key\": \"volcrypt-volume\", \"value\": \"{id}\"}}"));
    // Another one has begun to note something, and was too late.
    cinder.ask("POST", &beside, "{\"key\": \"volcrypt-description-0123456789abcdef-00\", \"value\": \"{\"}");
    assert_eq!(secrets(&host).described_by(&id, &foreign.secret).unwrap().unwrap().1, older);
    assert_eq!(take_at(8, &host, &id, &foreign).unwrap().1, older);
}

fn a_file_names_secrets(servers: &Barbican, cinder: &Cinder<'_>) {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("volume-secrets");
    let config = BarbicanConfig { volume_secrets: Some(file.clone()), ..servers.config("host2") };
    let (host1, host2, id) = (servers.manager("host1"), BarbicanKeyManager::new(config), volume("in.the.file"));
    // Without the file nothing is told of any volume.
    assert_eq!(refused(host2.described(&id)).0, Reason::Configuration);
    assert_eq!(refused(host2.create(&id, &wanted())).0, Reason::Configuration);
    let secret = cinder.secret(512);
    fs::write(&file, format!("{id} {secret}\n")).unwrap();
    fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
    assert_eq!(secrets(&host2).secret_for(&id).unwrap(), Some(secret.clone()));
    assert_eq!(secrets(&host2).secret_for(&volume("x")).unwrap(), None);
    assert!(host2.described(&id).unwrap().is_none());
    // No other key is made for it.
    let (reason, sentence) = refused(host2.create(&id, &wanted()));
    assert_eq!(reason, Reason::WrongKey);
    assert!(sentence.contains(secret.as_str()), "{sentence}");
    let (key, description) = take(&host1, &id, &ForeignKey::itself(secret)).unwrap();
    let (same, described) = host2.described(&id).unwrap().unwrap();
    assert!(same.same_as(&key));
    assert_eq!(described, description);
    assert!(host1.described(&id).unwrap().is_none(), "nothing leads there by the name");
    // A volume that has a key of its own has it still, whatever the file names.
    let (own, secret) = (volume("own.in.the.file"), cinder.secret(512));
    let (key, description) = host1.create(&own, &wanted()).unwrap();
    fs::write(&file, format!("{own} {secret}\n")).unwrap();
    for is_deleted in [false, true] {
        if is_deleted {
            cinder.ask("DELETE", &format!("secrets/{secret}"), "");
        }
        let (reason, sentence) = refused(host2.described(&own));
        assert_eq!(reason, Reason::WrongKey, "{sentence}");
        assert!(sentence.contains("has a key of its own in Barbican"), "{sentence}");
        let record = description.clone().record(&own, &key);
        assert!(host2.get_enrolled(&record.recorded_key()).unwrap().same_as(&key));
    }
}

fn what_was_changed_or_broken_off_is_noticed(servers: &Barbican, cinder: &Cinder<'_>) {
    let (host, id) = (servers.manager("host1"), volume("noted"));
    let secret = cinder.secret(512);
    let beside = format!("secrets/{secret}/metadata");
    let foreign = ForeignKey::itself(secret.clone());
    // Broken off before it was said whose key it is.
    cinder.ask("POST", &beside, "{\"key\": \"volcrypt-description-00\", \"value\": \"{\"}");
    cinder.ask("POST", &beside, "{\"key\": \"volcrypt-description-07\", \"value\": \"x\"}");
    assert!(secrets(&host).described_by(&id, &secret).unwrap().is_none());
    let (key, description) = take(&host, &id, &foreign).unwrap();
    assert!(secrets(&host).described_by(&id, &secret).unwrap().unwrap().0.same_as(&key));
    // Somebody changes what is noted, and the volume would be read in another way. Who has a record goes by that.
    let record = description.record(&id, &key);
    let noted = cinder.metadata(&secret);
    let names = noted.split('"').filter(|word| word.starts_with("volcrypt-description-") && word.ends_with("-01"));
    let name = names.max_by_key(|name| name.len()).unwrap();
    cinder.ask("PUT", &format!("{beside}/{name}"), &format!("{{\"key\": \"{name}\", \"value\": \"x\"}}"));
    assert!(matches!(refused(secrets(&host).described_by(&id, &secret)).0, Reason::WrongKey | Reason::KeyManager));
    assert!(host.get_enrolled(&record.recorded_key()).unwrap().same_as(&key));
}

fn a_host_that_the_owner_has_not_let_in(servers: &Barbican, cinder: &Cinder<'_>) {
    let (host, id) = (servers.manager("host1"), volume("private"));
    let secret = cinder.secret(512);
    let foreign = ForeignKey::itself(secret.clone());
    let acl = |users: &str| {
        let body = format!("{{\"read\": {{\"project-access\": false, \"users\": [{users}]}}}}");
        cinder.ask("PUT", &format!("secrets/{secret}/acl"), &body);
    };
    acl("");
    let (reason, sentence) = refused(take(&host, &id, &foreign));
    assert_eq!(reason, Reason::NotAllowed);
    let user = sentence.split("--user ").nth(1).unwrap().split(' ').next().unwrap().to_owned();
    assert!(
        sentence.contains(&format!("'openstack acl user add --user {user} --operation-type read http")),
        "{sentence}"
    );
    assert!(sentence.contains(&format!("/secrets/{secret}'")), "{sentence}");
    // What that command does. This host may read then, and not write beside it.
    acl(&format!("\"{user}\""));
    let (key, description) = take(&host, &id, &foreign).unwrap();
    assert!(secrets(&host).described_by(&id, &secret).unwrap().is_none(), "only the record has it");
    let record = description.record(&id, &key);
    assert!(host.get_enrolled(&record.recorded_key()).unwrap().same_as(&key));
    acl("");
    assert_eq!(refused(host.get_enrolled(&record.recorded_key())).0, Reason::NotAllowed);
}

fn a_secret_that_is_deleted(servers: &Barbican, cinder: &Cinder<'_>) {
    let (host, id) = (servers.manager("host1"), volume("deleted"));
    let foreign = ForeignKey::itself(cinder.secret(512));
    let (key, description) = take(&host, &id, &foreign).unwrap();
    let record = description.record(&id, &key);
    cinder.ask("DELETE", &format!("secrets/{}", foreign.secret), "");
    for (reason, sentence) in [
        refused(host.get_enrolled(&record.recorded_key())),
        refused(secrets(&host).described_by(&id, &foreign.secret)),
        refused(take(&host, &id, &foreign)),
    ] {
        assert_eq!(reason, Reason::NoKey, "{sentence}");
        assert!(sentence.contains(&format!("no secret {}", foreign.secret)), "{sentence}");
    }
}

fn a_host_is_registered_while_it_uses_one(servers: &Barbican, cinder: &Cinder<'_>) {
    let id = volume("in.use");
    let secret = cinder.secret(512);
    take(&servers.manager("host1"), &id, &ForeignKey::itself(secret.clone())).unwrap();
    let (used, none) = (HashSet::from([id.clone()]), HashSet::new());
    let known = || BTreeMap::from([(id.clone(), secret.clone())]);
    let host = servers.manager("host1");
    secrets(&host).are_keys(known());
    host.note_uses(&used).unwrap();
    host.note_uses(&used).unwrap();
    assert_eq!(cinder.consumers(&secret), 1);
    // A daemon that was killed meanwhile; the volume is not mapped any more.
    let host = servers.manager("host1");
    secrets(&host).are_keys(known());
    host.note_uses(&none).unwrap();
    assert_eq!(cinder.consumers(&secret), 0);
    host.note_uses(&used).unwrap();
    host.note_uses(&none).unwrap();
    assert_eq!(cinder.consumers(&secret), 0);
    cinder.ask("DELETE", &format!("secrets/{secret}"), "");
    assert_eq!(refused(host.note_uses(&used)).0, Reason::NoKey);
    let host = servers.manager("host1");
    secrets(&host).are_keys(known());
    host.note_uses(&none).unwrap();
}
