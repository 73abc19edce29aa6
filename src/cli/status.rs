use super::table::{Table, printable};
use super::time::utc;
use super::{CommandError, Daemon, Format, json};
use crate::policy::Intercept;
use crate::protocol::{GuardStatus, KeyCacheStatus, MappingStatus, Reply, Request, Status};

pub(super) fn show(daemon: &Daemon<'_>, format: Format) -> Result<String, CommandError> {
    let status = ask(daemon)?;
    if format.json { json(&status) } else { Ok(describe(&status)) }
}

pub(super) fn ask(daemon: &Daemon<'_>) -> Result<Status, CommandError> {
    match daemon.call(&Request::Status)? {
        Reply::Status(status) => Ok(*status),
        _ => Err(CommandError::UnexpectedReply),
    }
}

/// Warnings first, then the mappings, then the number of guests, the guard, and the key cache.
fn describe(status: &Status) -> String {
    let warning = |text: &Option<String>| text.as_ref().map(|text| format!("warning: {}\n", printable(text)));
    let mut text: String = [&status.configuration_error, &status.key_store_error, &status.keys_left_behind]
        .into_iter()
        .filter_map(warning)
        .collect();
    let GuardStatus { cgroup, devices, fault, all_because, .. } = &status.guard;
    if let Some(fault) = fault {
        text.push_str(&format!("warning: the guard is off: {}\n", printable(fault)));
    }
    if status.mappings.is_empty() {
        text.push_str("No volume is mapped.\n");
    } else {
        text.push_str(&mappings(&status.mappings));
    }
    text.push_str(&match status.guests.len() {
        0 if status.intercept == Intercept::Xml => "Guests get to their mappings by the domain's XML.\n".to_owned(),
        0 => "No guest is guarded.\n".to_owned(),
        1 => "1 guest is guarded.\n".to_owned(),
        number => format!("{number} guests are guarded.\n"),
    });
    if status.guard.on {
        let cgroup = printable(cgroup);
        text.push_str(&match devices {
            _ if all_because.is_some() => format!(
                "The guard is on: every block device is shut for {cgroup}, because the configuration is faulty.\n"
            ),
            1 => format!("The guard is on: 1 raw device is shut for {cgroup}.\n"),
            _ => format!("The guard is on: {devices} raw devices are shut for {cgroup}.\n"),
        });
    }
    text.extend(status.key_cache.as_deref().map(key_cache));
    text
}

/// Which volumes would start without the key server.
fn key_cache(cache: &KeyCacheStatus) -> String {
    let KeyCacheStatus { lifetime_days, fault, volumes } = cache;
    if let Some(fault) = fault {
        return format!("warning: no volume would start without the key server: {}\n", printable(fault));
    }
    if *lifetime_days == 0 {
        return "No volume would start without the key server: the key cache is off.\n".to_owned();
    }
    let usable = volumes.iter().filter(|volume| volume.starts_until.is_some()).count();
    let mut text = format!("{usable} of {} volumes would start without the key server", volumes.len());
    if volumes.is_empty() {
        return text + ".\n";
    }
    let mut table = Table::new(["VOLUME", "STARTS WITHOUT KEY SERVER UNTIL"]);
    for volume in volumes {
        table.push([volume.volume.to_string(), volume.starts_until.map_or_else(|| "would not start".to_owned(), utc)]);
    }
    text.push_str(":\n");
    text + &table.render()
}

/// Who has the mapping open, and for whom the daemon has.
fn users(mapping: &MappingStatus) -> String {
    let held = mapping.held_for.iter().map(|domain| format!("{domain} (held)"));
    mapping.domains.iter().cloned().chain(held).collect::<Vec<_>>().join(",")
}

fn mappings(mappings: &[MappingStatus]) -> String {
    let mut table = Table::new(["VOLUME", "MAPPING", "BACKING", "FORMAT", "CIPHER", "DOMAINS", "SINCE"]);
    for mapping in mappings {
        table.push([
            mapping.volume.to_string(),
            mapping.device.display().to_string(),
            mapping.backing.clone(),
            mapping.format.clone(),
            mapping.cipher.clone(),
            users(mapping),
            mapping.since.map(utc).unwrap_or_default(),
        ]);
    }
    table.render()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::{CachedVolume, GuestStatus};

    fn idle() -> Status {
        Status {
            version: "0.1.0".into(),
            configuration_error: None,
            key_store_error: None,
            keys_left_behind: None,
            mappings: vec![],
            guests: vec![],
            intercept: Intercept::Open,
            guard: GuardStatus { on: true, cgroup: "machine.slice".into(), devices: 0, fault: None, all_because: None },
            key_cache: None,
        }
    }

    fn mapping(domains: &[&str], since: Option<i64>) -> MappingStatus {
        MappingStatus {
            volume: "vol-1".parse().unwrap(),
            name: "volcrypt-vol-1".into(),
            device: "/dev/dm-0".into(),
            backing: "/dev/sda".into(),
            format: "plain".into(),
            cipher: "aes-xts-plain64".into(),
            open_count: 1,
            deferred_removal: true,
            held_for: vec![],
            domains: domains.iter().map(|&domain| domain.to_owned()).collect(),
            since,
        }
    }

    #[test]
    fn an_idle_host_is_told_in_three_sentences() {
        assert_eq!(
            describe(&idle()),
            "No volume is mapped.\nNo guest is guarded.\nThe guard is on: 0 raw devices are shut for machine.slice.\n"
        );
    }

    #[test]
    fn each_volume_says_until_when_it_starts_without_the_key_server() {
        let says = |cache| {
            let text = describe(&Status { key_cache: Some(Box::new(cache)), ..idle() });
            text.strip_prefix(&describe(&idle())).unwrap().to_owned()
        };
        let off = "No volume would start without the key server: the key cache is off.\n";
        assert_eq!(says(KeyCacheStatus::default()), off);
        let volume = |id: &str, starts_until| CachedVolume { volume: id.parse().unwrap(), starts_until };
        let volumes = vec![volume("vol-1", Some(0)), volume("vol-2", None)];
        let cache = KeyCacheStatus { lifetime_days: 7, fault: None, volumes };
        assert_eq!(
            says(cache.clone()),
            "1 of 2 volumes would start without the key server:\n\
             VOLUME  STARTS WITHOUT KEY SERVER UNTIL\n\
             vol-1   1970-01-01T00:00:00Z\n\
             vol-2   would not start\n"
        );
        let fault = "warning: no volume would start without the key server: no kek\n";
        assert_eq!(says(KeyCacheStatus { fault: Some("no kek".into()), ..cache }), fault);
    }

    #[test]
    fn with_xml_it_says_who_a_mapping_is_held_for() {
        let mut held = mapping(&["web1"], None);
        held.held_for = vec!["web2".into()];
        let text = describe(&Status { mappings: vec![held], intercept: Intercept::Xml, ..idle() });
        assert!(text.contains("  web1,web2 (held)  "), "{text}");
        assert!(text.contains("\nGuests get to their mappings by the domain's XML.\n"), "{text}");
    }

    #[test]
    fn a_guard_that_shuts_everything_says_why() {
        let guard = GuardStatus { all_because: Some("volcrypt.toml:3: no".into()), devices: 9, ..idle().guard };
        let status = Status { configuration_error: Some("volcrypt.toml:3: no".into()), guard, ..idle() };
        assert_eq!(
            describe(&status),
            "warning: volcrypt.toml:3: no\nNo volume is mapped.\nNo guest is guarded.\n\
             The guard is on: every block device is shut for machine.slice, because the configuration is faulty.\n"
        );
    }

    #[test]
    fn warnings_come_before_the_table() {
        let status = Status {
            configuration_error: Some("volcrypt.toml:3: no".into()),
            key_store_error: Some("locked".into()),
            keys_left_behind: Some("the keys of 2".into()),
            mappings: vec![mapping(&["web1", "web2"], Some(0)), mapping(&[], None)],
            guests: vec![GuestStatus { pid: 7, domain: None }, GuestStatus { pid: 8, domain: Some("web1".into()) }],
            guard: GuardStatus { on: false, fault: Some("no such cgroup".into()), ..idle().guard },
            ..idle()
        };
        assert_eq!(
            describe(&status),
            "warning: volcrypt.toml:3: no\n\
             warning: locked\n\
             warning: the keys of 2\n\
             warning: the guard is off: no such cgroup\n\
             VOLUME  MAPPING    BACKING   FORMAT  CIPHER           DOMAINS    SINCE\n\
             vol-1   /dev/dm-0  /dev/sda  plain   aes-xts-plain64  web1,web2  1970-01-01T00:00:00Z\n\
             vol-1   /dev/dm-0  /dev/sda  plain   aes-xts-plain64  -          -\n\
             2 guests are guarded.\n"
        );
    }
}
