//! Keys that are fetched before anybody asks for them.

use super::{Broker, enrolled_device};
use crate::store::{VolumeRecord, VolumeState};
use crate::volume::DeviceNumber;

impl Broker {
    /// Has the key of the volume on `device`, which the kernel has just announced, fetched while nobody waits, if a guest
    /// will probably open it: it is enrolled here, protected, and not mapped. That is no use of the key, and nobody is
    /// refused anything: the open that follows is judged as any other.
    pub fn fetch_ahead(&self, device: DeviceNumber) {
        if let Some(record) = self.volume_to_come(device)
            && let Ok(vault) = self.vault()
        {
            let volume = &record.id;
            tracing::debug!(volume = %volume, "device {device} has come: the key of volume {volume} is fetched ahead");
            vault.keys.fetch_ahead(&record.recorded_key());
        }
    }

    /// Whether keys come from a key server.
    pub fn asks_a_server(&self) -> bool {
        self.config().is_ok_and(|config| config.key_manager.server().is_some())
    }

    fn volume_to_come(&self, device: DeviceNumber) -> Option<VolumeRecord> {
        let identity = self.devices.identify(device).ok()?;
        if !self.config().ok()?.is_guarded(&identity) {
            return None;
        }
        let store = &self.vault().ok()?.store;
        let record = store.volume(&store.held_by(&enrolled_device(&identity)).ok()??).ok()??;
        let may_come = record.state == VolumeState::Enrolled && self.check_device(&identity, &record).is_ok();
        (may_come && !self.is_mapped(&record.id).ok()?).then_some(record)
    }
}
