//! What every key manager promises, asked of each one, KMIP's of a real server (PyKMIP), Barbican's of a real one
//! with a real Keystone; and what becomes of the servers' faults.

mod key_managers {
    pub mod authority;
    pub mod barbican;
    mod barbican_cluster;
    mod barbican_consumers;
    mod barbican_faults;
    mod cache;
    mod cinder;
    pub mod cluster;
    mod conformance;
    mod faults;
    mod kmip_create;
    mod kmip_servers;
    mod kmip_versions;
    mod kmip_wrapped;
    mod many;
    mod migration;
    pub mod proxy;
    pub mod pykmip;
    pub mod scripted;
}
