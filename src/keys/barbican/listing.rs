//! All keys that there are.

use std::collections::BTreeMap;
use std::io;
use std::thread;

use super::answer::NoAnswer;
use super::consumers::SERVICE;
use super::messages::Secret;
use super::refusals::About;
use super::{BarbicanKeyManager, PREFIX, keystone, settle};
use crate::keys::{FIRST_VERSION, KeyHandle, KeyInfo, tell};
use crate::policy::KeySize;
use crate::refusal::{Reason, Refusal};
use crate::volume::VolumeId;

/// How many secrets are asked about at the same time. Barbican says in no list what is kept beside them.
const AT_ONCE: usize = 8;
/// Enough for a question over TLS.
const STACK: usize = 512 << 10;

impl BarbicanKeyManager {
    /// Has `look` see every secret that is named as a volume's key, a page after the other. Each page has the deadline
    /// for itself.
    pub(super) fn each_page(
        &self,
        mut look: impl FnMut(Vec<(VolumeId, Secret)>) -> Result<(), Refusal>,
    ) -> Result<(), Refusal> {
        let mut asking = self.client.begin();
        let mut offset = 0;
        loop {
            asking.renew();
            let nobody = |no_answer: NoAnswer| self.refusal(About::NoVolume, no_answer);
            let (secrets, total) = asking.secrets(&format!("{PREFIX}%"), offset).map_err(nobody)?;
            let count = secrets.len();
            offset += count;
            tell(offset, total);
            let named = |secret: Secret| {
                // Whoever else gives a secret such a name, it is none of ours.
                let volume = secret.name.as_ref()?.strip_prefix(PREFIX)?.parse().ok()?;
                Some((volume, secret))
            };
            look(secrets.into_iter().filter_map(named).collect())?;
            if count == 0 || offset >= total {
                return Ok(());
            }
        }
    }

    /// Every key that was chosen.
    pub(super) fn all_chosen(&self) -> Result<Vec<KeyInfo>, Refusal> {
        let mut infos: BTreeMap<(VolumeId, u32), KeyInfo> = BTreeMap::new();
        self.each_page(|secrets| {
            let described = secrets.into_iter().filter_map(|(volume, secret)| {
                let key_size = KeySize::try_from(secret.bit_length?).ok()?;
                let created_at = keystone::seconds(&secret.created).and_then(|seconds| i64::try_from(seconds).ok())?;
                let users = secret.consumers.iter().filter(|user| user.service == SERVICE);
                let hosts = users.map(|user| user.resource_type.clone()).collect();
                let key = KeyHandle::first(&volume);
                Some((KeyInfo { volume, key, key_size, created_at, destroyed: false, hosts }, secret))
            });
            let described: Vec<_> = described.collect();
            let (listed, secrets): (Vec<KeyInfo>, Vec<Secret>) = described.into_iter().unzip();
            for (mut info, version) in listed.into_iter().zip(self.chosen_versions(&secrets)?) {
                if let Some(version) = version {
                    info.key.version = version;
                    infos.entry((info.volume.clone(), version)).or_insert(info);
                }
            }
            Ok(())
        })?;
        Ok(infos.into_values().collect())
    }

    /// Which of its volume's keys each of `secrets` is, in their order; nothing for one that was not chosen.
    fn chosen_versions(&self, secrets: &[Secret]) -> Result<Vec<Option<u32>>, Refusal> {
        let share = secrets.len().div_ceil(AT_ONCE).max(1);
        let no_thread = |error: io::Error| {
            Refusal::new(Reason::Kernel, format!("the keys cannot be listed now ({error}): try it again later"))
        };
        thread::scope(|scope| {
            let threads = secrets.chunks(share).map(|secrets| {
                let work = || secrets.iter().map(|secret| self.chosen_version(secret)).collect::<Result<Vec<_>, _>>();
                thread::Builder::new().name("list".to_owned()).stack_size(STACK).spawn_scoped(scope, work)
            });
            // All of them begin before the first one is waited for.
            let threads: Vec<_> = threads.collect();
            let mut chosen = Vec::with_capacity(secrets.len());
            for thread in threads {
                let joined = thread.map_err(no_thread)?.join();
                chosen.extend(joined.map_err(|_| no_thread(io::Error::other("a thread has ended")))??);
            }
            Ok(chosen)
        })
    }

    fn chosen_version(&self, secret: &Secret) -> Result<Option<u32>, Refusal> {
        let nobody = |no_answer| self.refusal(About::NoVolume, no_answer);
        match self.client.begin().metadata(secret.id().map_err(nobody)?) {
            // One of which nothing is said that makes sense is none that could be used.
            Ok(metadata) => {
                Ok(settle::is_chosen(&metadata).then(|| settle::key_version(&metadata).unwrap_or(FIRST_VERSION)))
            }
            // It is another one's, or was deleted since.
            Err(NoAnswer::Refused(answered)) if matches!(answered.status, 403 | 404) => Ok(None),
            Err(no_answer) => Err(nobody(no_answer)),
        }
    }
}
