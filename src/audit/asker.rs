//! For whom something is done.

use std::cell::RefCell;
use std::fmt;
use std::fs;

use serde::{Deserialize, Serialize};

use crate::domain::Facts;

/// What asked for something.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// Nobody: the daemon did it of its own accord.
    #[default]
    Daemon,
    /// A QEMU that opens a device.
    Guest,
    /// libvirt's hook.
    Hook,
    /// Somebody at the control socket.
    Operator,
}

/// For whom something is done, as far as it is known.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Asker {
    /// The domain's name: for a guest it is what libvirt says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub domain: Option<String>,
    /// The domain's UUID, known in the same way.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub domain_uuid: Option<String>,
    /// The process that asked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pid: Option<u32>,
    /// What it is.
    pub by: Role,
    /// The user it runs as; said of operators.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uid: Option<u32>,
    /// The user who logged in and became that one, where the kernel knows it (pam_loginuid(8)).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub login_uid: Option<u32>,
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.serialize(f)
    }
}

thread_local! {
    static CURRENT: RefCell<Asker> = RefCell::default();
}

impl Asker {
    /// The operator behind process `pid` of user `uid`.
    pub fn operator(pid: u32, uid: u32) -> Self {
        let login_uid = fs::read_to_string(format!("/proc/{pid}/loginuid")).ok();
        let login_uid = login_uid.and_then(|text| text.trim().parse().ok()).filter(|&uid| uid != u32::MAX);
        Asker { pid: Some(pid), by: Role::Operator, uid: Some(uid), login_uid, ..Asker::default() }
    }

    /// The hook, which libvirt called for a domain.
    pub fn hook(domain: &str, domain_uuid: Option<&str>) -> Self {
        Asker {
            domain: Some(domain.to_owned()),
            domain_uuid: domain_uuid.map(str::to_owned),
            by: Role::Hook,
            ..Asker::default()
        }
    }

    /// The same, with what libvirt says of its domain in the place of what it says of itself.
    pub fn known_as(self, domain: Option<&Facts>) -> Self {
        match domain {
            Some(domain) => Asker { domain: Some(domain.name.clone()), domain_uuid: domain.uuid.clone(), ..self },
            None => self,
        }
    }

    /// Runs `work` on behalf of this asker: every event that this thread makes meanwhile names it, as
    /// every message within a span carries the span's fields. One request is worked on by one thread.
    pub fn ask<R>(self, work: impl FnOnce() -> R) -> R {
        let _restore = Restore(CURRENT.replace(self));
        work()
    }

    /// For whom this thread works right now.
    pub fn current() -> Asker {
        CURRENT.with_borrow(Asker::clone)
    }
}

/// Ends the work for an asker, also when it panicked.
struct Restore(Asker);

impl Drop for Restore {
    fn drop(&mut self) {
        CURRENT.set(std::mem::take(&mut self.0));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_asker_is_named_as_long_as_its_work_takes() {
        assert_eq!(Asker::current(), Asker::default());
        let inner = Asker::operator(std::process::id(), 0).ask(|| {
            let result = std::panic::catch_unwind(|| Asker::hook("vm", None).ask(|| panic!("on purpose")));
            assert!(result.is_err());
            Asker::current()
        });
        assert_eq!((inner.by, inner.pid, inner.uid), (Role::Operator, Some(std::process::id()), Some(0)));
        assert_ne!(inner.login_uid, Some(u32::MAX));
        assert_eq!(Asker::current(), Asker::default());
        let elsewhere = Asker::hook("vm", None).ask(|| std::thread::spawn(Asker::current).join());
        assert_eq!(elsewhere.unwrap(), Asker::default(), "another thread's work is its own");
    }
}
