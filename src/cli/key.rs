use super::progress::Progress;
use super::table::Table;
use super::time::utc;
use super::{CommandError, Daemon, Format, json};
use crate::protocol::{KeyStatus, Reply, Request};
use crate::volume::VolumeId;

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
    let mut progress = Progress::new();
    loop {
        let Reply::Keys(page) = daemon.call_for_long(&Request::Keys { after }, &mut progress)? else {
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
    let heading = ["KEY", "VERSION", "BITS", "MANAGER", "CREATED", "DAYS", "LAST USE", "VOLUMES", "HOSTS", "STATE"];
    let mut table = Table::new(heading);
    for key in keys {
        let info = &key.info;
        table.push([
            info.key.id.to_string(),
            info.key.version.to_string(),
            info.key_size.bits().to_string(),
            key.manager.to_string(),
            utc(info.created_at),
            key.age_days.to_string(),
            key.last_use.map(utc).unwrap_or_default(),
            key.volumes.iter().map(VolumeId::as_str).collect::<Vec<_>>().join(","),
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
    fn a_key_is_told_by_its_handle_its_age_its_use_and_its_state() {
        let volume: VolumeId = "vol-1".parse().unwrap();
        let key = |version, destroyed, old, last_use, used: &[&str]| KeyStatus {
            info: KeyInfo {
                volume: volume.clone(),
                key: KeyHandle::of(&volume, version),
                key_size: 512.try_into().unwrap(),
                created_at: 86_400,
                destroyed,
                hosts: if old { vec!["host1".to_owned(), "host2".to_owned()] } else { vec![] },
            },
            manager: ManagerKind::Barbican,
            volumes: used.iter().map(|name| name.parse().unwrap()).collect(),
            last_use,
            age_days: 400,
            old,
        };
        let keys = [
            key(1, false, false, None, &[]),
            key(2, false, true, Some(172_800), &["vol-1", "vol-2"]),
            key(1, true, false, None, &[]),
        ];
        assert_eq!(
            table(&keys),
            "KEY    VERSION  BITS  MANAGER   CREATED               DAYS  LAST USE              VOLUMES      HOSTS        STATE\n\
             vol-1  1        512   barbican  1970-01-02T00:00:00Z  400   -                     -            -            usable\n\
             vol-1  2        512   barbican  1970-01-02T00:00:00Z  400   1970-01-03T00:00:00Z  vol-1,vol-2  host1,host2  usable, OLD\n\
             vol-1  1        512   barbican  1970-01-02T00:00:00Z  400   -                     -            -            destroyed\n"
        );
        let json = serde_json::to_value(&keys[1]).unwrap();
        assert_eq!(
            (&json["id"], &json["version"], &json["volume"], &json["volumes"]),
            (&"vol-1".into(), &2.into(), &"vol-1".into(), &serde_json::json!(["vol-1", "vol-2"]))
        );
        let back: KeyStatus = serde_json::from_value(json).unwrap();
        assert_eq!((back.info, back.volumes), (keys[1].info.clone(), keys[1].volumes.clone()));
    }
}
