//! `volcrypt volume identify`.

use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use super::table::printable;
use super::volume::size;
use super::{CommandError, Daemon, Format, json};
use crate::domain::Requester;
use crate::policy::{Config, Outcome, Trace};
use crate::protocol::{Identification, Reply, Request};
use crate::volume::vpd::{Association, Designator, DesignatorKind};
use crate::volume::{Mapping, Portrait, VolumeId};

/// The handle is opened here, because the daemon does not see every folder, and without any right to what is
/// there: looking at a device neither waits for it nor disturbs it.
pub(super) fn show(daemon: &Daemon<'_>, path: &Path, format: Format) -> Result<String, CommandError> {
    let place = OpenOptions::new().read(true).custom_flags(libc::O_PATH).open(path);
    let place = place.map_err(|source| CommandError::Place { path: path.to_owned(), source })?;
    let reply = daemon.connect()?.call_with_file(&Request::Identify, &place).map_err(CommandError::Daemon)?;
    match reply {
        Reply::Identification(identification) if format.json => json(&identification),
        Reply::Identification(identification) => Ok(describe(&identification)),
        _ => Err(CommandError::UnexpectedReply),
    }
}

/// An identification as text, a line for each thing that is known.
pub fn describe(identification: &Identification) -> String {
    let mut lines = Vec::new();
    match identification {
        Identification::File { device, inode, size: bytes } => {
            lines.push(line("image file", format!("inode {inode} of device {device}")));
            lines.push(line("size", whole_size(*bytes)));
            lines.push(line("outcome", "not protected: no rule protects image files"));
        }
        Identification::Device { device, policy, configuration_error } => {
            portray(device, "", &mut lines);
            if let Some(trace) = policy {
                judge(trace, &mut lines);
            }
            if let Some(error) = configuration_error {
                lines.push(line("outcome", format!("refused: {error}")));
            }
        }
    }
    lines.iter().map(|text| printable(text) + "\n").collect()
}

/// What `config` makes of a device, and of each one that it stands on, when `requester` asks for it.
pub(super) fn judgement(portrait: &Portrait, config: &Config, requester: &dyn Requester) -> String {
    let mut lines = Vec::new();
    judge_layer(portrait, config, requester, "", &mut lines);
    lines.iter().map(|text| printable(text) + "\n").collect()
}

fn judge_layer(portrait: &Portrait, config: &Config, requester: &dyn Requester, indent: &str, lines: &mut Vec<String>) {
    let mut own = vec![line("device", &portrait.identity)];
    judge(&config.trace(&portrait.judged(), requester), &mut own);
    lines.extend(own.into_iter().map(|text| format!("{indent}{text}")));
    for below in &portrait.beneath {
        judge_layer(below, config, requester, &format!("{indent}  "), lines);
    }
}

/// The lines of a device, and indented below them those of what it stands on.
fn portray(portrait: &Portrait, indent: &str, lines: &mut Vec<String>) {
    let (identity, details) = (&portrait.identity, &portrait.details);
    let known = |name: &str, value: &Option<String>| value.as_ref().map(|value| line(name, value));
    let mut own =
        vec![line("device", format!("{identity} ({})", identity.number)), line("size", whole_size(identity.size))];
    own.extend(identity.read_only.then(|| line("writes", "refused by the kernel")));
    own.extend(identity.sequence.map(|sequence| line("disk sequence", sequence)));
    own.extend(identity.partition.map(|partition| line("partition", partition)));
    if let Some(iscsi) = &identity.iscsi {
        own.push(line("iSCSI target", &iscsi.target));
        own.extend(known("portal", &iscsi.portal));
    }
    own.extend(identity.lun.map(|lun| line("LUN", lun)));
    own.extend(known("WWID", &identity.wwid));
    own.extend(known("serial", &details.serial));
    own.extend(details.designators.iter().map(|designator| line("designator", in_words(designator))));
    own.extend(details.namespace.map(|namespace| line("NVMe namespace", namespace)));
    own.extend(known("NVMe NGUID", &details.nguid));
    own.extend(known("NVMe EUI-64", &details.eui64));
    own.extend(known("NVMe UUID", &details.uuid));
    if let Some(Mapping { uuid, .. }) = &identity.mapping {
        own.push(line("dm UUID", if uuid.is_empty() { "none" } else { uuid }));
    }
    if let Some(volume) = &details.lvm {
        own.push(line("LVM group UUID", &volume.group_uuid));
        own.push(line("LVM volume UUID", &volume.volume_uuid));
    }
    own.extend(identity.path_of.as_ref().map(|map| line("path of", map)));
    own.extend(details.faults.iter().map(|fault| line("malformed", fault)));
    lines.extend(own.into_iter().map(|text| format!("{indent}{text}")));

    let relation = match (identity.is_multipath(), identity.partition) {
        (true, _) => "path",
        (_, Some(_)) => "partition of",
        _ => "stands on",
    };
    for below in &portrait.beneath {
        lines.push(format!("{indent}{relation}:"));
        portray(below, &format!("{indent}  "), lines);
    }
}

fn judge(trace: &Trace, lines: &mut Vec<String>) {
    for rule in &trace.rules {
        let verdict = if rule.matches { "matches" } else { "no" };
        lines.push(line(&format!("rule {}", rule.rule), format!("{verdict}: {}", rule.why)));
    }
    lines.push(line(
        "outcome",
        match &trace.outcome {
            Outcome::NotProtected => "not protected".to_owned(),
            Outcome::Protected { volume, rule } => format!("protected as volume {volume} by rule {rule}"),
            Outcome::Mapped { volumes } => {
                let volumes: Vec<&str> = volumes.iter().map(VolumeId::as_str).collect();
                format!("for domains that may have the volume {}, whose mapping it is or stands on", volumes.join(", "))
            }
            Outcome::Refused { sentence } => format!("refused: {sentence}"),
        },
    ));
}

fn in_words(designator: &Designator) -> String {
    let of = match designator.association {
        Association::LogicalUnit => "the volume's",
        Association::TargetPort => "the target port's",
        Association::TargetDevice => "the target's",
        Association::Reserved => "of no known association",
    };
    let more = if designator.kind == DesignatorKind::Other { ", no name" } else { "" };
    format!("{} ({of}{more})", designator.value)
}

fn whole_size(bytes: u64) -> String {
    format!("{} ({bytes} bytes)", size(bytes))
}

fn line(name: &str, value: impl std::fmt::Display) -> String {
    format!("{:<16} {value}", format!("{name}:"))
}
