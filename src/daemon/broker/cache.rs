//! What is kept of a key server's keys, as the configuration says.

use std::path::Path;
use std::sync::Arc;

use crate::keys::cached::{Cache, KeyCache};
use crate::policy::{KeyCacheConfig, KeyManagerConfig};
use crate::refusal::Refusal;
use crate::store::Store;

/// The database of a host whose keys come from no server.
pub(super) fn open_store(directory: &Path) -> Result<Arc<Store>, Refusal> {
    let store = Arc::new(Store::open(directory)?);
    done(KeyCache::wipe(&store));
    Ok(store)
}

/// The cache of the key server's keys that `config` names, as `wanted` says. Without it keys come from the server.
pub(super) fn open_cache(
    store: &Arc<Store>,
    credentials: Option<&Path>,
    config: &KeyManagerConfig,
    wanted: &KeyCacheConfig,
) -> Cache {
    let (Some(lifetime), Some(server)) = (wanted.lifetime(), config.server()) else {
        done(KeyCache::switch_off(store));
        return Cache::Off;
    };
    match KeyCache::open(Arc::clone(store), credentials, config.directory(), &server, lifetime) {
        Ok(cache) => Cache::On(Box::new(cache)),
        Err(refusal) => {
            tracing::error!("no keys are kept for when no key server answers: {refusal}");
            Cache::Faulty(refusal.to_string())
        }
    }
}

fn done(wiped: Result<(), Refusal>) {
    if let Err(refusal) = wiped {
        tracing::error!("cached keys are not used any more, but cannot be wiped: {refusal}");
    }
}
