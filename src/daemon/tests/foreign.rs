//! Volumes with keys that Cinder has made.

use std::collections::BTreeMap;
use std::os::unix::fs::FileExt;

use super::super::broker::Verdict;
use super::super::in_use::tell;
use super::super::keys::Listing;
use super::in_use::with_barbican;
use super::*;
use crate::audit::Kind;
use crate::keys::{
    Capabilities, Description, ForeignKey, ForeignSecrets, Imported, KeyInfo, KeyManager, PassphraseHash, RecordedKey,
    SecretId,
};
use crate::store::{AuditQuery, VolumeRecord, VolumeState};
use crate::volume::VolumeId;

const SECRET: &str = "dfe2418f-8205-4e90-816a-4e8ea2366b48";
const OTHER: &str = "97992d93-adda-4dba-985d-aff7b0314087";
const SHORT: &str = "b2c09a12-2b1c-4d4b-a1f5-9c4d6d3f0e11";

/// A key manager that has secrets of Cinder's and nothing else.
#[derive(Clone, Default)]
struct Cinders(Arc<Mutex<Inside>>);

#[derive(Default)]
struct Inside {
    named: BTreeMap<VolumeId, SecretId>,
    noted: BTreeMap<SecretId, (VolumeId, Description)>,
    used: BTreeMap<VolumeId, SecretId>,
    /// Whether this host may not write beside secrets.
    is_reader: bool,
}

impl Cinders {
    fn inside(&self) -> std::sync::MutexGuard<'_, Inside> {
        self.0.lock().unwrap()
    }
}

/// What the secret holds.
fn held(secret: &SecretId) -> Key {
    let length = if secret.as_str() == SHORT { 32 } else { 64 };
    Key::filled(length, |room| {
        room.fill(secret.as_str().as_bytes()[0]);
        Ok(())
    })
    .unwrap()
}

impl KeyManager for Cinders {
    fn get(&self, _: &VolumeId) -> Result<Key, Refusal> {
        Err(Refusal::new(Reason::NoKey, "no key"))
    }

    fn get_enrolled(&self, key: &RecordedKey) -> Result<Key, Refusal> {
        let foreign = ForeignKey::named_by(&key.volume, &key.handle);
        foreign.ok_or_else(|| Refusal::new(Reason::NoKey, "no key"))?.key(&held(&SECRET.parse().unwrap()))
    }

    fn create(&self, _: &VolumeId, _: &Description) -> Result<(Key, Description), Refusal> {
        panic!("no key is made")
    }

    fn import(&self, _: &VolumeId, _: &Key, _: &Description) -> Result<Imported, Refusal> {
        panic!("no key is moved")
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities { lists: true, imports: true, destroys: true, describes: true }
    }

    fn described(&self, volume: &VolumeId) -> Result<Option<(Key, Description)>, Refusal> {
        let named = self.inside().named.get(volume).cloned();
        named.map_or(Ok(None), |secret| self.described_by(volume, &secret))
    }

    fn destroy(&self, _: &VolumeId) -> Result<(), Refusal> {
        panic!("nothing is destroyed")
    }

    fn list(&self) -> Result<Vec<KeyInfo>, Refusal> {
        Ok(Vec::new())
    }

    fn foreign(&self) -> Option<&dyn ForeignSecrets> {
        Some(self)
    }
}

impl ForeignSecrets for Cinders {
    fn secret_for(&self, volume: &VolumeId) -> Result<Option<SecretId>, Refusal> {
        Ok(self.inside().named.get(volume).cloned())
    }

    fn described_by(&self, _: &VolumeId, secret: &SecretId) -> Result<Option<(Key, Description)>, Refusal> {
        let inside = self.inside();
        let Some((_, noted)) = inside.noted.get(secret) else { return Ok(None) };
        Ok(Some((noted.foreign().unwrap().key(&held(secret))?, noted.clone())))
    }

    fn secret(&self, _: &VolumeId, secret: &SecretId) -> Result<Key, Refusal> {
        Ok(held(secret))
    }

    fn describe(
        &self,
        volume: &VolumeId,
        foreign: &ForeignKey,
        _: &Key,
        wanted: &Description,
    ) -> Result<Description, Refusal> {
        let noted = wanted.clone().with_foreign(foreign.clone());
        let mut inside = self.inside();
        if !inside.is_reader {
            inside.noted.insert(foreign.secret.clone(), (volume.clone(), noted.clone()));
        }
        Ok(noted)
    }

    fn are_keys(&self, secrets: BTreeMap<VolumeId, SecretId>) {
        self.inside().used = secrets;
    }
}

fn secret(text: &str) -> SecretId {
    text.parse().unwrap()
}

fn noise() -> Vec<u8> {
    let mut bytes = vec![0; SIZE as usize];
    aws_lc_rs::rand::fill(&mut bytes).unwrap();
    bytes
}

/// A host whose volume `one` reads as something with this key, and as noise with any other.
struct Host {
    world: World,
    device: DeviceNumber,
    keys: Cinders,
    broker: Broker,
    ciphertext: Vec<u8>,
}

impl Host {
    fn new(encrypted_with: &ForeignKey) -> Self {
        Host::with(Cinders::default(), encrypted_with, "")
    }

    fn with(keys: Cinders, encrypted_with: &ForeignKey, more: &str) -> Self {
        let world = World::new();
        let device = world.add_volume("one", 1);
        let ciphertext = noise();
        world.write(device, &ciphertext);
        std::fs::write(world.path().join("noise"), noise()).unwrap();
        let decrypted = File::create(world.path().join("decrypted")).unwrap();
        decrypted.write_all_at(&noise(), 0).unwrap();
        let mut table = [0; 512];
        table[446..462].copy_from_slice(&[0, 0, 2, 0, 0x83, 0, 0, 0, 0, 8, 0, 0, 0, 16, 0, 0]);
        table[510..].copy_from_slice(&[0x55, 0xaa]);
        decrypted.write_all_at(&table, 0).unwrap();
        decrypted.write_all_at(&[0; 512], (1 << 20) + 512).unwrap();
        let key = encrypted_with.key(&held(&encrypted_with.secret)).unwrap();
        *world.readable.lock().unwrap() = Some(key.check_value(&"one".parse().unwrap()));
        let broker = world.broker_saying(true, more).with_keys(Box::new(keys.clone()));
        Host { world, device, keys, broker, ciphertext }
    }

    fn adopt(&self, secret: Option<&SecretId>, hash: Option<PassphraseHash>) -> Result<VolumeRecord, Refusal> {
        self.broker.adopt_encrypted(self.device, secret, hash, None)
    }

    fn refused(&self, secret: Option<&SecretId>, hash: Option<PassphraseHash>) -> String {
        let refusal = self.adopt(secret, hash).unwrap_err();
        assert_eq!(self.broker.volume(&"one".parse().unwrap()).unwrap_err().reason(), Reason::NoKey, "{refusal}");
        assert!(self.keys.inside().noted.is_empty(), "{refusal}");
        self.is_unchanged();
        refusal.to_string()
    }

    fn is_unchanged(&self) {
        let name = self.broker.identify(self.device).unwrap().name;
        assert!(std::fs::read(self.world.path().join(name)).unwrap() == self.ciphertext, "something was written");
    }

    fn opens(&self) -> bool {
        matches!(self.broker.open(self.device, true, OFlags::RDWR, &vm()), Ok(Verdict::Mapping(..)))
    }
}

fn all_kinds() -> [ForeignKey; 3] {
    let size = crate::policy::Profile::default().key_size;
    [
        ForeignKey::hashed(secret(SECRET), PassphraseHash::Sha256, size),
        ForeignKey::hashed(secret(SECRET), PassphraseHash::Ripemd160, size),
        ForeignKey::itself(secret(SECRET)),
    ]
}

#[test]
fn what_os_brick_has_encrypted_is_adopted_as_it_is() {
    for key in all_kinds() {
        let host = Host::new(&key);
        let record = host.adopt(Some(&secret(SECRET)), None).unwrap();
        assert_eq!(record.key, key.handle());
        host.is_unchanged();
        assert!(host.opens());
        assert_eq!(host.adopt(Some(&secret(SECRET)), None).unwrap(), record, "once more");
        assert_eq!(host.adopt(Some(&secret(SECRET)), key.hash()).unwrap(), record);
        let query = AuditQuery { kind: Some(Kind::Enrolled), ..AuditQuery::default() };
        let recorded = format!("{:?}", host.broker.vault().unwrap().store.audit(&query).unwrap());
        assert!(recorded.contains(&format!("its key is {key}")), "{recorded}");
        // It is neither given another key nor is its key destroyed.
        for (other, hash) in
            [(OTHER, None), (SECRET, Some(PassphraseHash::Sha256)), (SECRET, Some(PassphraseHash::Ripemd160))]
        {
            if (other, hash) != (SECRET, key.hash()) {
                assert_eq!(host.adopt(Some(&secret(other)), hash).unwrap_err().reason(), Reason::WrongKey);
            }
        }
        let refusal = host.broker.destroy(&record.id).unwrap_err();
        assert_eq!(refusal.reason(), Reason::NotAllowed);
        assert!(refusal.to_string().contains("which Cinder has made and volcrypt never deletes"), "{refusal}");
        // No name leads to it in the key manager, and that is no word of its being gone.
        let refusal = host.broker.record_gone(&record.id).unwrap_err();
        assert_eq!(refusal.reason(), Reason::NotAllowed);
        assert!(refusal.to_string().contains("'volcrypt volume retire one'"), "{refusal}");
        assert_eq!(host.broker.volume(&record.id).unwrap().state, VolumeState::Enrolled);
        // It can be taken out of use and back.
        assert_eq!(host.broker.retire(&record.id).unwrap().state, VolumeState::Retired);
        assert!(!host.opens());
        assert_eq!(host.adopt(Some(&secret(SECRET)), None).unwrap(), record);
        assert!(host.opens());
    }
}

#[test]
fn a_wrong_key_is_never_taken() {
    let [sha256, ripemd160, itself] = all_kinds();
    for (key, given, hash) in [
        (&sha256, SECRET, Some(PassphraseHash::Ripemd160)),
        (&ripemd160, SECRET, Some(PassphraseHash::Sha256)),
        (&itself, SECRET, Some(PassphraseHash::Sha256)),
        (&sha256, OTHER, None),
        (&sha256, SHORT, None),
    ] {
        let host = Host::new(key);
        let said = host.refused(Some(&secret(given)), hash);
        assert!(said.contains("nothing is recognised on /dev/sd1") && said.contains(given), "{said}");
        assert!(!host.opens());
    }
    // What is on the device as it is may say why.
    let host = Host::new(&sha256);
    assert!(!host.refused(Some(&secret(OTHER)), None).contains("as it is"));
    let mut table = vec![0; SIZE as usize];
    table[446..462].copy_from_slice(&[0, 0, 2, 0, 0x83, 0, 0, 0, 0, 8, 0, 0, 0, 64, 0, 0]);
    table[510..512].copy_from_slice(&[0x55, 0xaa]);
    host.world.write(host.device, &table);
    let said = host.broker.adopt_encrypted(host.device, Some(&secret(OTHER)), None, None).unwrap_err().to_string();
    assert!(said.contains("/dev/sd1 as it is holds an MBR partition table"), "{said}");
    let host = Host::new(&sha256);
    assert!(host.refused(None, None).contains("it is not said with which secret"));
    // Nor is a volume whose sectors os-brick could not have made.
    let text = "[profiles.default]\nsector_size = 4096\n";
    let host = Host::with(Cinders::default(), &sha256, text);
    assert!(host.refused(Some(&secret(SECRET)), None).contains("os-brick encrypts in sectors of 512 bytes"));
}

#[test]
fn what_somebody_uses_is_not_adopted() {
    let [key, ..] = all_kinds();
    let mut host = Host::new(&key);
    host.world.in_use = true;
    host.broker = host.world.broker(true).with_keys(Box::new(host.keys.clone()));
    assert!(host.refused(Some(&secret(SECRET)), None).contains("process 1 has /dev/sd1 open"));
    // A mapping that is there shows what it was made with, and nothing of the key that is tried.
    let mut host = Host::new(&key);
    host.world.reuses_mappings = true;
    host.broker = host.world.broker(true).with_keys(Box::new(host.keys.clone()));
    assert!(host.refused(Some(&secret(SECRET)), None).contains("is not removed"));
}

#[test]
fn a_blank_volume_is_enrolled_and_not_adopted() {
    let [key, _, itself] = all_kinds();
    let mut host = Host::new(&key);
    let ciphertext = std::mem::replace(&mut host.ciphertext, vec![0; SIZE as usize]);
    host.world.write(host.device, &host.ciphertext);
    assert!(host.refused(Some(&secret(SECRET)), None).contains("is blank"));
    let enrol = |given: &str| host.broker.enrol_with(host.device, Some(&secret(given)), None);
    let refusal = enrol(SHORT).unwrap_err();
    assert_eq!(refusal.reason(), Reason::Configuration);
    assert!(refusal.to_string().contains("has 256 bits, and volume one is to have a key of 512"), "{refusal}");
    // What is not blank is not enrolled; the refusal says what else there is.
    host.world.write(host.device, &ciphertext);
    let said = enrol(SECRET).unwrap_err().to_string();
    assert!(said.contains("holds data at byte") && said.contains("'volcrypt volume adopt /dev/sd1'"), "{said}");
    host.world.write(host.device, &host.ciphertext);
    let record = enrol(SECRET).unwrap();
    assert_eq!(record.key, itself.handle());
    assert_eq!(enrol(SECRET).unwrap(), record);
    assert_eq!(enrol(OTHER).unwrap_err().reason(), Reason::WrongKey);
    assert!(host.opens());
    // It is listed with what this host knows of it.
    let listed = Listing::default().page(&host.broker, None).unwrap().keys;
    assert_eq!(listed.len(), 1);
    assert_eq!((&listed[0].info.key, &listed[0].volumes[..]), (&record.key, &[record.id][..]));
}

#[test]
fn two_volumes_do_not_share_a_secret() {
    let [key, ..] = all_kinds();
    let host = Host::new(&key);
    host.keys.inside().is_reader = true;
    let first = host.adopt(Some(&secret(SECRET)), None).unwrap();
    let other = host.world.add_volume("two", 2);
    for state in [VolumeState::Enrolled, VolumeState::Retired] {
        assert_eq!(host.broker.volume(&first.id).unwrap().state, state);
        let refusal = host.broker.enrol_with(other, Some(&secret(SECRET)), None).unwrap_err();
        assert_eq!(refusal.reason(), Reason::WrongKey);
        assert!(refusal.to_string().contains("is the key of volume one"), "{refusal}");
        host.broker.retire(&first.id).unwrap();
        // This host may write beside it by now, and does not write that it is the other volume's.
        host.keys.inside().is_reader = false;
        assert!(host.broker.enrol_with(other, Some(&secret(SECRET)), None).is_err());
        assert!(host.keys.inside().noted.is_empty());
    }
    host.broker.enrol_with(other, Some(&secret(OTHER)), None).unwrap();
}

#[test]
fn a_volume_that_the_configuration_names_gets_its_secret_at_first_use() {
    let [key, _, itself] = all_kinds();
    let mut host = Host::new(&key);
    host.ciphertext = vec![0; SIZE as usize];
    host.world.write(host.device, &host.ciphertext);
    host.keys.inside().named.insert("one".parse().unwrap(), secret(SECRET));
    assert!(host.opens());
    assert_eq!(host.broker.volume(&"one".parse().unwrap()).unwrap().key, itself.handle());
    // One that is named otherwise than it is said is not taken.
    let two = host.world.add_volume("two", 2);
    host.keys.inside().named.insert("two".parse().unwrap(), secret(OTHER));
    let refusal = host.broker.enrol_with(two, Some(&secret(SHORT)), None).unwrap_err();
    assert!(refusal.to_string().contains("names secret 97992d93"), "{refusal}");
    // Another host has what is noted beside the secret, although the volume is not blank any more.
    let there = Host::with(host.keys.clone(), &itself, "");
    assert!(there.opens());
    assert_eq!(there.broker.volume(&"one".parse().unwrap()).unwrap().key, itself.handle());
    assert_eq!(there.adopt(None, None).unwrap().key, itself.handle());
    let other_way = Host::with(host.keys.clone(), &itself, "");
    let refusal = other_way.adopt(None, Some(PassphraseHash::Sha256)).unwrap_err();
    assert_eq!(refusal.reason(), Reason::WrongKey, "{refusal}");
}

#[test]
fn a_key_manager_is_told_which_secrets_are_keys() {
    let [key, ..] = all_kinds();
    let host = Host::new(&key);
    let broker = with_barbican(&host.world, Box::new(host.keys.clone()));
    broker.adopt_encrypted(host.device, Some(&secret(SECRET)), None, None).unwrap();
    assert!(tell(&broker).unwrap());
    assert_eq!(host.keys.inside().used, BTreeMap::from([("one".parse().unwrap(), secret(SECRET))]));
}

#[test]
fn other_key_managers_have_no_secrets_of_cinders() {
    let world = World::new();
    let (device, broker) = (world.add_volume("one", 1), world.broker(true));
    for refusal in [
        broker.enrol_with(device, Some(&secret(SECRET)), None).unwrap_err(),
        broker.adopt_encrypted(device, Some(&secret(SECRET)), None, None).unwrap_err(),
    ] {
        assert_eq!(refusal.reason(), Reason::Configuration);
        assert!(refusal.to_string().contains("they are in Barbican"), "{refusal}");
    }
}
