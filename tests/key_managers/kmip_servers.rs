//! Several KMIP servers that are to hold the same keys: one that can be reached in two ways, and ones that do not.

use std::time::Duration;

use volcrypt::keys::KeyManager;
use volcrypt::keys::kmip::{KmipConfig, KmipKeyManager};

use super::faults::{create, volume};
use super::proxy::Proxy;
use super::pykmip::PyKmip;

#[test]
fn what_is_waited_costs_none_of_two_servers_its_time() {
    let server = PyKmip::start();
    let proxy = Proxy::start(server.authority(), "server", server.address());
    let servers = server.config("client", vec![server.address(), proxy.address()]);
    let manager = KmipKeyManager::new(KmipConfig { deadline: Duration::from_secs(2), ..servers });
    let key = create(&manager, &volume("patient")).unwrap();
    assert!(server.manager().get(&volume("patient")).unwrap().same_as(&key));
}
