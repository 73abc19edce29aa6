//! What every key manager promises, asked of each one, KMIP's of a real server (PyKMIP); and what becomes of a KMIP
//! server's faults.

mod key_managers {
    pub mod authority;
    mod conformance;
    mod faults;
    pub mod proxy;
    pub mod pykmip;
}
