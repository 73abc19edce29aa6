use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::volume::VolumeId;

/// One lock for each volume that somebody works on.
#[derive(Default)]
pub struct VolumeLocks {
    locks: Mutex<HashMap<VolumeId, Arc<Mutex<()>>>>,
}

impl VolumeLocks {
    /// Runs `work` while nobody else works on `volume`.
    pub fn with<R>(&self, volume: &VolumeId, work: impl FnOnce() -> R) -> R {
        let lock = self.all().entry(volume.clone()).or_default().clone();
        // A panic of another thread leaves nothing half done here: the kernel holds all state.
        let held = lock.lock().unwrap_or_else(PoisonError::into_inner);
        let result = work();
        drop(held);
        let mut all = self.all();
        // Two owners are the map and this call: nobody waits.
        if Arc::strong_count(&lock) == 2 {
            all.remove(volume);
        }
        result
    }

    fn all(&self) -> MutexGuard<'_, HashMap<VolumeId, Arc<Mutex<()>>>> {
        self.locks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU32, Ordering};

    #[test]
    fn one_thread_at_a_time_and_nothing_left_behind() {
        let locks = VolumeLocks::default();
        let volume: VolumeId = "one".parse().unwrap();
        let inside = AtomicU32::new(0);
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    for _ in 0..200 {
                        locks.with(&volume, || {
                            assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0);
                            std::thread::yield_now();
                            inside.fetch_sub(1, Ordering::SeqCst);
                        });
                    }
                });
            }
        });
        assert!(locks.all().is_empty());
    }
}
