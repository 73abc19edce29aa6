use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use super::table::{Table, printable};
use super::time::utc;
use super::{CommandError, Daemon, Format, json};
use crate::keys::{PassphraseHash, SecretId};
use crate::protocol::{Reply, Request, VolumeStatus};
use crate::volume::VolumeId;

pub(super) fn list(daemon: &Daemon<'_>, format: Format) -> Result<String, CommandError> {
    let volumes = volumes(daemon, &Request::Volumes)?;
    match format.json {
        true => json(&volumes),
        false if volumes.is_empty() => Ok("No volume is enrolled.\n".to_owned()),
        false => Ok(table(&volumes)),
    }
}

pub(super) fn show(daemon: &Daemon<'_>, id: &VolumeId, format: Format) -> Result<String, CommandError> {
    let volume = one_volume(daemon, &Request::Volume { id: id.clone() })?;
    if format.json { json(&volume) } else { Ok(describe(&volume)) }
}

pub(super) fn enrol(
    daemon: &Daemon<'_>,
    device: &Path,
    secret: Option<&SecretId>,
    owner: Option<&str>,
) -> Result<String, CommandError> {
    let (device, owner) = (absolute(device)?, owner.map(str::to_owned));
    Ok(describe(&one_volume(daemon, &Request::Enrol { device, owner, secret: secret.cloned() })?))
}

pub(super) fn adopt(
    daemon: &Daemon<'_>,
    device: &Path,
    (secret, hash): (Option<&SecretId>, Option<PassphraseHash>),
    owner: Option<&str>,
) -> Result<String, CommandError> {
    let (device, owner) = (absolute(device)?, owner.map(str::to_owned));
    Ok(describe(&one_volume(daemon, &Request::Adopt { device, secret: secret.cloned(), hash, owner })?))
}

/// The daemon has a working directory of its own.
fn absolute(device: &Path) -> Result<PathBuf, CommandError> {
    std::path::absolute(device).map_err(|source| CommandError::File { path: device.to_owned(), source })
}

pub(super) fn set_owner(daemon: &Daemon<'_>, id: &VolumeId, owner: Option<&str>) -> Result<String, CommandError> {
    let request = Request::SetOwner { id: id.clone(), owner: owner.map(str::to_owned) };
    Ok(describe(&one_volume(daemon, &request)?))
}

pub(super) fn retire(daemon: &Daemon<'_>, id: &VolumeId) -> Result<String, CommandError> {
    let volume = one_volume(daemon, &Request::Retire { id: id.clone() })?;
    Ok(format!("{}Volume {id} is retired; its key is kept.\n", describe(&volume)))
}

pub(super) fn destroy(
    daemon: &Daemon<'_>,
    id: &VolumeId,
    is_gone: bool,
    confirmed: Option<&VolumeId>,
) -> Result<String, CommandError> {
    let confirmed = match confirmed {
        Some(confirmed) => confirmed == id,
        None => {
            let volume = one_volume(daemon, &Request::Volume { id: id.clone() })?;
            ask_for(id, &describe(&volume))
        }
    };
    if !confirmed {
        return Err(CommandError::NotConfirmed(id.clone()));
    }
    let Reply::Destroyed { elsewhere } = daemon.call(&Request::Destroy { id: id.clone(), is_gone })? else {
        return Err(CommandError::UnexpectedReply);
    };
    Ok(match (elsewhere, is_gone) {
        (Some(elsewhere), _) => {
            format!("The key of volume {id} is destroyed in the key manager in use, but {}.\n", printable(&elsewhere))
        }
        (None, false) => {
            format!("The key of volume {id} is destroyed: what stands on the volume can never be read again.\n")
        }
        (None, true) => format!(
            "The key of volume {id} is gone, and that is recorded: what stands on the volume can never be read again.\n"
        ),
    })
}

/// Whether somebody types the volume's id.
fn ask_for(id: &VolumeId, description: &str) -> bool {
    let question = format!("{description}What stands on this volume will be lost for ever. Type its id to go on: ");
    let mut answer = String::new();
    io::stderr().write_all(question.as_bytes()).is_ok()
        && io::stdin().lock().take(256).read_line(&mut answer).is_ok()
        && answer.trim() == id.as_str()
}

/// Makes the file here, with the rights of whoever calls, and lets the daemon write the key to it: no
/// key passes through this process.
pub(super) fn export_key(daemon: &Daemon<'_>, id: &VolumeId, to: &Path) -> Result<String, CommandError> {
    let client = daemon.connect()?;
    let failure = |source| CommandError::File { path: to.to_owned(), source };
    let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(to).map_err(failure)?;
    let exported = match client.call_with_file(&Request::ExportKey { id: id.clone() }, &file) {
        Ok(Reply::Nothing) => file.sync_all().and_then(|()| sync_folder_of(to)).map_err(failure),
        Ok(_) => Err(CommandError::UnexpectedReply),
        Err(error) => Err(CommandError::Daemon(error)),
    };
    match exported {
        Ok(()) => Ok(format!("The key of {id} is in {}: whoever has it can read the volume.\n", to.display())),
        Err(error) => {
            // The refusal is what matters; a file that stays behind shows itself at the next attempt.
            let _ = fs::remove_file(to);
            Err(error)
        }
    }
}

/// Has the name of a new file on the disk: whoever has exported a key may destroy it next.
fn sync_folder_of(path: &Path) -> io::Result<()> {
    std::path::absolute(path)?.parent().map_or(Ok(()), |folder| File::open(folder)?.sync_all())
}

fn volumes(daemon: &Daemon<'_>, request: &Request) -> Result<Vec<VolumeStatus>, CommandError> {
    match daemon.call(request)? {
        Reply::Volumes(volumes) => Ok(volumes),
        _ => Err(CommandError::UnexpectedReply),
    }
}

fn one_volume(daemon: &Daemon<'_>, request: &Request) -> Result<VolumeStatus, CommandError> {
    let mut volumes = volumes(daemon, request)?;
    match (volumes.pop(), volumes.is_empty()) {
        (Some(volume), true) => Ok(volume),
        _ => Err(CommandError::UnexpectedReply),
    }
}

fn table(volumes: &[VolumeStatus]) -> String {
    let mut table = Table::new(["VOLUME", "PROFILE", "FORMAT", "CIPHER", "BITS", "SIZE", "ENROLLED", "STATE"]);
    for volume in volumes {
        let record = &volume.record;
        table.push([
            record.id.to_string(),
            record.profile.clone(),
            record.provider.to_string(),
            record.cipher.clone(),
            record.key_size.bits().to_string(),
            size(record.size_bytes),
            utc(record.enrolled_at),
            state(volume),
        ]);
    }
    table.render()
}

fn describe(volume: &VolumeStatus) -> String {
    let record = &volume.record;
    let lines = [
        ("volume", record.id.to_string()),
        ("device", record.device.to_string()),
        ("size", format!("{} ({} bytes)", size(record.size_bytes), record.size_bytes)),
        ("profile", record.profile.clone()),
        ("format", record.provider.to_string()),
        ("cipher", record.cipher.clone()),
        ("key size", format!("{} bits", record.key_size.bits())),
        ("sector size", format!("{} bytes", record.sector_size)),
        ("key", record.foreign_key().unwrap_or_else(|| record.key.id.to_string())),
        ("key version", record.key.version.to_string()),
        ("key check value", record.check_value.to_string()),
        ("enrolled", utc(record.enrolled_at)),
        ("owner", record.owner.clone().unwrap_or("everybody".to_owned())),
        ("state", state(volume)),
    ];
    lines.iter().map(|(name, value)| format!("{:<16} {}\n", format!("{name}:"), printable(value))).collect()
}

/// A size in the largest binary unit that keeps it a whole number.
pub(super) fn size(bytes: u64) -> String {
    let units = [(40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")];
    let whole = units.iter().find(|(shift, _)| bytes != 0 && bytes.is_multiple_of(1 << shift));
    whole.map_or_else(|| format!("{bytes} B"), |(shift, unit)| format!("{} {unit}", bytes >> shift))
}

/// The state, and who uses the volume: `enrolled, in use by domain web`.
fn state(VolumeStatus { record, mapped, domains }: &VolumeStatus) -> String {
    let state = record.state;
    match (mapped, domains.as_slice()) {
        (false, _) => state.to_string(),
        (true, []) => format!("{state}, in use"),
        (true, [domain]) => format!("{state}, in use by domain {domain}"),
        (true, domains) => format!("{state}, in use by domains {}", domains.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keys::KeyHandle;
    use crate::store::VolumeState;
    use serde_json::json;

    fn volume(device: serde_json::Value, users: Option<&[&str]>) -> VolumeStatus {
        serde_json::from_value(json!({
            "id": "vol-1", "device": device, "size_bytes": 10u64 << 30, "profile": "default", "provider": "plain",
            "cipher": "aes-xts-plain64", "key_size": 512, "sector_size": 4096,
            "key": { "id": "vol-1", "version": 2 }, "check_value": "000102030405060708090a0b0c0d0e0f", "enrolled_at": 0, "state": "enrolled", "owner": null,
            "mapped": users.is_some(), "domains": users.unwrap_or_default()
        }))
        .unwrap()
    }

    #[test]
    fn a_volume_is_one_line_of_the_list() {
        assert_eq!(
            table(&[volume(json!({}), Some(&["web"]))]),
            "VOLUME  PROFILE  FORMAT  CIPHER           BITS  SIZE    ENROLLED              STATE\n\
             vol-1   default  plain   aes-xts-plain64  512   10 GiB  1970-01-01T00:00:00Z  enrolled, in use by domain web\n"
        );
    }

    #[test]
    fn a_record_is_shown_whole() {
        let text = describe(&volume(json!({ "iscsi_target": "iqn.x:y", "lun": 1, "wwid": "naa.6" }), None));
        assert_eq!(
            text,
            "volume:          vol-1\n\
             device:          target iqn.x:y, LUN 1, WWID naa.6\n\
             size:            10 GiB (10737418240 bytes)\n\
             profile:         default\n\
             format:          plain\n\
             cipher:          aes-xts-plain64\n\
             key size:        512 bits\n\
             sector size:     4096 bytes\n\
             key:             vol-1\n\
             key version:     2\n\
             key check value: 000102030405060708090a0b0c0d0e0f\n\
             enrolled:        1970-01-01T00:00:00Z\n\
             owner:           everybody\n\
             state:           enrolled\n"
        );
        assert!(describe(&volume(json!({}), None)).contains("device:          not told by the kernel\n"));
        let mut foreign = volume(json!({}), None);
        let id = "dfe2418f-8205-4e90-816a-4e8ea2366b48.ripemd160-512".parse().unwrap();
        foreign.record.key = KeyHandle { id, version: 1 };
        let key = "\nkey:             Cinder's secret dfe2418f-8205-4e90-816a-4e8ea2366b48, hashed as a passphrase (ripemd160)\n";
        assert!(describe(&foreign).contains(key), "{}", describe(&foreign));
    }

    #[test]
    fn the_state_is_shown_together_with_the_use() {
        let said = |state: VolumeState, users| {
            let mut volume = volume(json!({}), users);
            volume.record.state = state;
            super::state(&volume)
        };
        assert_eq!(said(VolumeState::Retired, None), "retired");
        assert_eq!(said(VolumeState::Retired, Some(&[])), "retired, in use");
        assert_eq!(said(VolumeState::Enrolled, Some(&["web"])), "enrolled, in use by domain web");
        assert_eq!(said(VolumeState::Destroyed, Some(&["web", "db"])), "destroyed, in use by domains web, db");
    }

    #[test]
    fn sizes_are_never_rounded() {
        for (bytes, text) in [
            (0, "0 B"),
            (512, "512 B"),
            (1536, "1536 B"),
            (1 << 20, "1 MiB"),
            ((10 << 30) + 512, "10737418752 B"),
            (3 << 40, "3 TiB"),
        ] {
            assert_eq!(size(bytes), text);
        }
    }
}
