//! Whether a domain will get its disks, before QEMU opens them.

use super::Broker;
use crate::domain::Facts;
use crate::policy::Protection;
use crate::refusal::{Reason, Refusal};
use crate::store::VolumeRecord;
use crate::volume::{Identity, VolumeId};

/// A disk that can be opened, as the hook has to know it.
#[derive(Debug, Default)]
pub struct Ready {
    /// The protected volume that it is.
    pub volume: Option<VolumeId>,
    /// When the key server last gave its key, if that had to come from the cache.
    pub cached_since: Option<i64>,
    /// The volumes whose mappings it is or stands on.
    pub mapped: Vec<VolumeId>,
}

impl Broker {
    /// Whether `identity` is protected, and if so, makes sure that `domain` can open it: the volume is
    /// enrolled, the device is its own, the domain may have it, and its key is there and the right one.
    ///
    /// # Errors
    /// When it is protected and an open would be refused.
    pub fn make_ready(&self, identity: &Identity, domain: &Facts) -> Result<Ready, Refusal> {
        self.ready(identity, domain, &|protection| self.record(identity, protection, domain))
    }

    /// As [`Broker::make_ready`] for a domain that has used its volumes elsewhere or before: none is enrolled, however
    /// blank it still is. A second key would make noise of what is written with the first.
    ///
    /// # Errors
    /// As for [`Broker::make_ready`], and when the volume is not enrolled here.
    pub fn check_ready(&self, identity: &Identity, domain: &Facts) -> Result<Ready, Refusal> {
        self.ready(identity, domain, &|protection| {
            let volume = &protection.volume;
            self.present_record(identity, volume)?.ok_or_else(|| {
                Refusal::new(
                    Reason::NoKey,
                    format!(
                        "volume {volume} on {identity} has no key on this host: it is not enrolled anew for a domain that \
                         may have used it already, so copy the key store of the host that enrolled it (the README says how), \
                         or see that the key manager of both has its key"
                    ),
                )
            })
        })
    }

    fn ready(
        &self,
        identity: &Identity,
        domain: &Facts,
        record: &dyn Fn(&Protection<'_>) -> Result<VolumeRecord, Refusal>,
    ) -> Result<Ready, Refusal> {
        let config = self.config()?;
        let (volume, cached_since) = match self.protection(&config, identity, domain)? {
            None => (None, None),
            Some(protection) => {
                let ready = record(&protection).and_then(|record| {
                    self.authorise(&record, domain)?;
                    self.key(&record)
                });
                let key = ready.map_err(|refusal| refusal.of(&protection.volume))?;
                (Some(protection.volume.clone()), key.from_cache())
            }
        };
        Ok(Ready { volume, cached_since, mapped: self.check_mappings(identity, domain)? })
    }
}
