use super::table::Table;
use super::time::utc;
use super::{CommandError, Daemon, Format, json};
use crate::protocol::{KeyStatus, Reply, Request};

pub(super) fn list(daemon: &Daemon<'_>, format: Format) -> Result<String, CommandError> {
    let keys = all(daemon)?;
    match format.json {
        true => json(&keys),
        false if keys.is_empty() => Ok("There is no key.\n".to_owned()),
        false => Ok(table(&keys)),
    }
}

/// What is known of every key, asked for some at a time.
pub(super) fn all(daemon: &Daemon<'_>) -> Result<Vec<KeyStatus>, CommandError> {
    let mut keys = Vec::new();
    let mut after = None;
    loop {
        let Reply::Keys(page) = daemon.call(&Request::Keys { after })? else {
            return Err(CommandError::UnexpectedReply);
        };
        keys.extend(page.keys);
        match page.after {
            Some(last) => after = Some(last),
            None => return Ok(keys),
        }
    }
}

fn table(keys: &[KeyStatus]) -> String {
    let heading = ["VOLUME", "BITS", "VERSION", "MANAGER", "CREATED", "DAYS", "LAST USE", "HOSTS", "STATE"];
    let mut table = Table::new(heading);
    for key in keys {
        let info = &key.info;
        table.push([
            info.volume.to_string(),
            info.key_size.bits().to_string(),
            info.key.version.to_string(),
            key.manager.to_string(),
            utc(info.created_at),
            key.age_days.to_string(),
            key.last_use.map(utc).unwrap_or_default(),
            info.hosts.join(","),
            match (info.destroyed, key.old) {
                (true, _) => "destroyed",
                (false, true) => "usable, OLD",
                (false, false) => "usable",
            }
            .to_owned(),
        ]);
    }
    table.render()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keys::{KeyHandle, KeyInfo, ManagerKind};

    #[test]
    fn a_key_is_told_by_its_age_its_use_and_its_state() {
        let key = |destroyed, old, last_use| KeyStatus {
            info: KeyInfo {
                volume: "vol-1".parse().unwrap(),
                key: KeyHandle::first(&"vol-1".parse().unwrap()),
                key_size: 512.try_into().unwrap(),
                created_at: 86_400,
                destroyed,
                hosts: if old { vec!["host1".to_owned(), "host2".to_owned()] } else { vec![] },
            },
            manager: ManagerKind::Barbican,
            last_use,
            age_days: 400,
            old,
        };
        assert_eq!(
            table(&[key(false, false, None), key(false, true, Some(172_800)), key(true, false, None)]),
            "VOLUME  BITS  VERSION  MANAGER   CREATED               DAYS  LAST USE              HOSTS        STATE\n\
             vol-1   512   1        barbican  1970-01-02T00:00:00Z  400   -                     -            usable\n\
             vol-1   512   1        barbican  1970-01-02T00:00:00Z  400   1970-01-03T00:00:00Z  host1,host2  usable, OLD\n\
             vol-1   512   1        barbican  1970-01-02T00:00:00Z  400   -                     -            destroyed\n"
        );
    }
}
