use super::table::Table;
use super::time::utc;
use super::{CommandError, Daemon, Format, Outcome, json};
use crate::audit::{Asker, Entry, Link, Role};
use crate::protocol::{Reply, Request};
use crate::store::{AuditQuery, Verified};

pub(super) fn show(
    daemon: &Daemon<'_>,
    mut query: AuditQuery,
    limit: usize,
    format: Format,
) -> Result<String, CommandError> {
    let mut entries = Vec::new();
    while entries.len() < limit {
        let page = match daemon.call(&Request::Audit(query.clone()))? {
            Reply::Audit(page) => page,
            _ => return Err(CommandError::UnexpectedReply),
        };
        entries.extend(page.entries);
        match page.before {
            Some(_) => query.before = page.before,
            None => break,
        }
    }
    entries.truncate(limit);
    entries.reverse();
    match format.json {
        true => json(&entries),
        false if entries.is_empty() => Ok("There is no such record.\n".to_owned()),
        false => Ok(table(&entries)),
    }
}

/// Goes through the whole chain.
pub(super) fn verify(daemon: &Daemon<'_>) -> Result<Outcome, CommandError> {
    let mut from = Link::default();
    loop {
        match daemon.call(&Request::VerifyAudit { from })? {
            Reply::AuditVerified(Verified { broken: Some(sentence), end, .. }) => {
                let text = format!("{sentence}; the {} records before it are as they were written\n", end.seq);
                return Ok(Outcome { text, code: 1 });
            }
            Reply::AuditVerified(Verified { complete: true, end, .. }) => {
                let text = format!("{} records, newest hash {}\n", end.seq, end.hash);
                return Ok(Outcome { text, code: 0 });
            }
            // A daemon that does not get on would be asked for ever.
            Reply::AuditVerified(Verified { end, .. }) if end.seq > from.seq => from = end,
            _ => return Err(CommandError::UnexpectedReply),
        }
    }
}

fn table(entries: &[Entry]) -> String {
    let mut table = Table::new(["NUMBER", "TIME", "KIND", "VOLUME", "DOMAIN", "PID", "BY", "OUTCOME", "DETAIL"]);
    for entry in entries {
        let (record, event) = match entry {
            Entry::Record { record, .. } => (record.as_ref(), &record.event),
            Entry::Damaged { seq, damaged } => {
                let mut row: [String; 9] = Default::default();
                (row[0], row[2], row[8]) = (seq.to_string(), "damaged".to_owned(), damaged.clone());
                table.push(row);
                continue;
            }
        };
        table.push([
            record.seq.to_string(),
            utc(record.time),
            event.kind.to_string(),
            event.volume.as_ref().map(ToString::to_string).unwrap_or_default(),
            event.asker.domain.clone().unwrap_or_default(),
            event.asker.pid.map(|pid| pid.to_string()).unwrap_or_default(),
            by(&event.asker),
            event.outcome.clone(),
            event.detail.clone(),
        ]);
    }
    table.render()
}

/// Of an operator also the user: the one who logged in, if that was another one.
fn by(asker: &Asker) -> String {
    match (asker.by, asker.uid, asker.login_uid) {
        (Role::Operator, Some(uid), Some(login)) if login != uid => format!("operator {login} as {uid}"),
        (Role::Operator, Some(uid), _) => format!("operator {uid}"),
        (role, ..) => role.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::audit::{Event, Kind, StoredRecord};

    #[test]
    fn records_are_lines_and_steer_no_terminal() {
        let asker = Asker { pid: Some(7), login_uid: Some(1000), ..Asker::operator(0, 0) };
        let mut event = asker.ask(|| Event::new(Kind::KeyExported, &"one".parse().unwrap(), "a\nb\u{1b}[2J"));
        event.asker.domain = Some("v\u{9b}m".to_owned());
        let (record, link) = Link::default().append(event, 0).unwrap();
        let hash = link.hash.to_string().into_bytes();
        let entries = [
            StoredRecord { seq: 1, record: record.into_bytes(), hash: hash.clone() }.read(),
            StoredRecord { seq: 2, record: b"\xff\n{".to_vec(), hash }.read(),
        ];
        assert_eq!(
            table(&entries),
            "NUMBER  TIME                  KIND          VOLUME  DOMAIN  PID  BY                  OUTCOME  DETAIL\n\
             1       1970-01-01T00:00:00Z  key-exported  one     v?m     7    operator 1000 as 0  done     a?b?[2J\n\
             2       -                     damaged       -       -       -    -                   -        \u{fffd}?{\n"
        );
    }
}
