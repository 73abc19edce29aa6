use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::table::Table;
use super::time::{seconds_in, utc};
use super::{CommandError, Daemon, Format, json};
use crate::domain::is_uuid;
use crate::protocol::{Reply, Request};
use crate::store::Grant;
use crate::volume::VolumeId;

pub(super) fn add(
    daemon: &Daemon<'_>,
    volume: &VolumeId,
    domain: &str,
    duration: Duration,
) -> Result<String, CommandError> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let seconds = |time: Duration| i64::try_from(time.as_secs()).unwrap_or(i64::MAX);
    let expires_at = seconds(now.saturating_add(duration));
    let domain = as_libvirt_writes(domain);
    let text = format!("Domain {domain} may open volume {volume} until {}.\n", utc(expires_at));
    let grant = Grant { volume: volume.clone(), domain, expires_at, created_at: seconds(now) };
    done(daemon, &Request::Grant { grant }).map(|()| text)
}

pub(super) fn revoke(daemon: &Daemon<'_>, volume: &VolumeId, domain: &str) -> Result<String, CommandError> {
    let domain = as_libvirt_writes(domain);
    let text = format!(
        "Domain {domain} may not open volume {volume} any more; what it has open stays open until it is detached.\n"
    );
    done(daemon, &Request::Revoke { volume: volume.clone(), domain }).map(|()| text)
}

pub(super) fn list(daemon: &Daemon<'_>, format: Format) -> Result<String, CommandError> {
    let Reply::Grants(grants) = daemon.call(&Request::Grants)? else { return Err(CommandError::UnexpectedReply) };
    match format.json {
        true => json(&grants),
        false if grants.is_empty() => Ok("There is no grant.\n".to_owned()),
        false => {
            let mut table = Table::new(["VOLUME", "DOMAIN", "GRANTED", "UNTIL"]);
            for Grant { volume, domain, expires_at, created_at } in grants {
                table.push([volume.to_string(), domain, utc(created_at), utc(expires_at)]);
            }
            Ok(table.render())
        }
    }
}

fn done(daemon: &Daemon<'_>, request: &Request) -> Result<(), CommandError> {
    match daemon.call(request)? {
        Reply::Nothing => Ok(()),
        _ => Err(CommandError::UnexpectedReply),
    }
}

/// A UUID in small letters; a name as it is.
fn as_libvirt_writes(domain: &str) -> String {
    match is_uuid(domain) {
        true => domain.to_ascii_lowercase(),
        false => domain.to_owned(),
    }
}

/// Reads `90m`, `12h`, `30d` or `45s`.
pub(super) fn parse_duration(text: &str) -> Result<Duration, String> {
    let wrong = || format!("{text:?} is no time: write a whole number and s, m, h or d, for example 12h");
    let unit = text.chars().last().ok_or_else(wrong)?;
    let seconds = seconds_in(unit).ok_or_else(wrong)?;
    let number: u32 = text[..text.len() - unit.len_utf8()].parse().map_err(|_| wrong())?;
    match number {
        0 => Err(wrong()),
        _ => Ok(Duration::from_secs(u64::from(number) * u64::from(seconds))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_a_number_and_a_unit() {
        for (text, seconds) in [("45s", 45), ("90m", 5400), ("12h", 43_200), ("30d", 2_592_000)] {
            assert_eq!(parse_duration(text), Ok(Duration::from_secs(seconds)));
        }
        for text in ["", "h", "0h", "12", "-1h", "1.5h", "1ü", "99999999999d", "1 h"] {
            assert!(parse_duration(text).unwrap_err().contains("for example 12h"), "{text}");
        }
    }

    #[test]
    fn a_uuid_is_compared_as_libvirt_writes_it() {
        assert_eq!(as_libvirt_writes("0B1F7C1E-1111-4222-8333-444455556666"), "0b1f7c1e-1111-4222-8333-444455556666");
        assert_eq!(as_libvirt_writes("Web"), "Web");
    }
}
