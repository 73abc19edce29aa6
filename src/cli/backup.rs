//! `volcrypt key backup` and `volcrypt key restore`: copies of the database, made and put in place without the daemon.

use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use super::CommandError;
use super::table::printable;
use super::time::utc;
use crate::audit::{Asker, Event, Kind};
use crate::domain::quoted;
use crate::keys::{CheckValue, EmbeddedKeyManager, kek_file};
use crate::logging;
use crate::policy::{Config, KeyManagerConfig};
use crate::protocol::{CONTROL_SOCKET, WRAPPER_SOCKET};
use crate::refusal::{Reason, Refusal};
use crate::store::{self, Changed, Contents, Held, Replaced, Staged, Store, Terms, seconds_now};
use crate::sys::signals;

/// What listens on which socket: unix(7), `/proc/net/unix`.
const SOCKETS: &str = "/proc/net/unix";

/// Copies the database to `to`, or to a new file in the directory `to`.
pub(super) fn back_up(config: &Path, to: &Path) -> Result<String, CommandError> {
    let config = key_manager(config)?;
    let to = match to.is_dir() {
        true => to.join(format!("volcrypt-{}.db", stamp())),
        false => to.to_owned(),
    };
    // Without that, only what is left when it is broken off would be more.
    signals::before_ending(store::abandon_backup).ok();
    let contents = store::back_up(config.directory(), &to).map_err(CommandError::Refused)?;
    let Contents { volumes, keys, records, keks } = &contents;
    let detail = format!("to {}, with {volumes} volumes and {keys} wrapped keys", to.display());
    let recorded = operator()
        .ask(|| Store::open(config.directory())?.append_audit(Event::of_the_host(Kind::DatabaseBackedUp, detail)));
    let mut text =
        format!("{} holds {volumes} volumes, {keys} wrapped keys and {records} audit records.\n", to.display());
    if needs_kek(&config, &contents) {
        text.push_str(&keks_are_needed(config.directory(), keks));
    }
    let elsewhere = match &config {
        KeyManagerConfig::Embedded { .. } => None,
        KeyManagerConfig::Kmip { .. } => Some("on the KMIP server".to_owned()),
        KeyManagerConfig::Barbican { .. } => Some("in Barbican".to_owned()),
        KeyManagerConfig::KeyFile { file } => Some(format!("in {}", file.display())),
    };
    match elsewhere {
        None => {}
        // Some have not been moved yet, or not been destroyed here since.
        Some(place) if *keys > 0 => text.push_str(&format!("Keys that are {place} are not in it.\n")),
        Some(place) => text.push_str(&format!("The keys are not in it: they are {place}.\n")),
    }
    if let Err(refusal) = recorded {
        // On a file system that is read-only a backup may be the last thing that can be done.
        text.push_str(&format!("WARNING: this backup is not in the audit log: {refusal}\n"));
    }
    for left in store::leftovers(&to) {
        text.push_str(&format!("{} is what is left of a backup that was killed: remove it.\n", left.display()));
    }
    Ok(text)
}

/// Whether a backup with `contents` is of use only with its key-encryption keys: also where keys are on a server by now,
/// those that are still in it need them.
fn needs_kek(config: &KeyManagerConfig, contents: &Contents) -> bool {
    !contents.keks.is_empty() && (contents.keys > 0 || matches!(config, KeyManagerConfig::Embedded { .. }))
}

/// Which key-encryption keys a backup needs, and where each of them is.
fn keks_are_needed(directory: &Path, keks: &[CheckValue]) -> String {
    let place = |value: &CheckValue| match kek_file(directory, *value) {
        Some(path) => format!("{} (check value {value})", path.display()),
        None => format!("what the credential volcrypt.kek or volcrypt.kek.new is made from (check value {value})"),
    };
    let places: Vec<String> = keks.iter().map(place).collect();
    let (subject, verb, them) = match places.len() {
        1 => ("The key-encryption key", "is", "it"),
        _ => ("The key-encryption keys, two because one takes the other's place,", "are", "them"),
    };
    format!(
        "{subject} {verb} NOT in it, and without that no key opens: back up {} as well, and keep {them} elsewhere.\n",
        places.join(" and ")
    )
}

/// Puts `backup` in the database's place.
pub(super) fn restore(config: &Path, backup: &Path) -> Result<String, CommandError> {
    let config = key_manager(config)?;
    check_stopped()?;
    let refused = |refusal: Refusal| CommandError::Refused(refusal);
    let staged = Staged::new(backup, config.directory()).map_err(refused)?;
    let contents = staged.contents().map_err(refused)?;
    let directory = config.directory();
    let opened = match (staged.store(), &contents) {
        (Some(store), Some(contents)) if needs_kek(&config, contents) => {
            let credentials = std::env::var_os("CREDENTIALS_DIRECTORY").map(PathBuf::from);
            EmbeddedKeyManager::open(store, credentials.as_deref(), directory)
                .and_then(|keys| keys.check_all(config.server().is_none()))
                .map_err(|refusal| refused(not_opened(backup, directory, contents, credentials.is_some(), &refusal)))?
        }
        _ => 0,
    };
    check_stopped()?;
    let volumes = contents.map_or(0, |contents| contents.volumes);
    // It is in the copy before that takes its place, so that none does without a record.
    let detail = format!("from {}, with {volumes} volumes; {opened} keys were opened", backup.display());
    let event = operator().ask(|| Event::of_the_host(Kind::DatabaseRestored, detail));
    let link = staged.store().map(|store| store.append_silently(event.clone())).transpose().map_err(refused)?;
    let held = staged.held().map_err(refused)?;
    let terms = staged.terms().map_err(refused)?;
    let replaced = staged.put_in_place(&stamp()).map_err(refused)?;
    if let Some(link) = link {
        event.announce(link);
    }
    let mut text =
        format!("The database is that of {}: {volumes} volumes; {opened} keys were opened.\n", backup.display());
    match replaced {
        Some(Replaced::Database { path, not_wiped }) => {
            text.push_str(&what_is_kept(&path, held.as_ref()));
            if let Some(terms) = terms {
                text.push_str(&what_changed(&path, &terms));
            }
            if let Some(why) = not_wiped {
                text.push_str(&format!(
                    "WARNING: keys that [key_cache] had kept could not be wiped from it ({why}): once it is not needed, \
                     overwrite it ('shred -u {0}'), and {0}-wal and {0}-journal if they are there.\n",
                    path.display()
                ));
            }
        }
        Some(Replaced::Logs(logs)) => logs.iter().for_each(|log| text.push_str(&lone_log(log))),
        None => {}
    }
    text.push_str(
        "What was enrolled or granted after the backup was made is missing. Start volcryptd: 'systemctl start volcryptd.socket \
         volcryptd-control.socket volcryptd'.\n",
    );
    Ok(text)
}

/// What is to be done with the database that was replaced, now that one that holds the keys `held` is in its place.
fn what_is_kept(kept: &Path, held: Option<&Held>) -> String {
    let name = kept.display();
    let before = match (Held::in_file(kept), held) {
        (Ok(before), Some(_)) => before,
        (Err(refusal), _) => {
            return format!(
                "The one before is kept as {name}. Which keys are in it alone cannot be told ({refusal}): do not remove it \
                 while you need any of them.\n"
            );
        }
        (Ok(_), None) => return format!("The one before is kept as {name}.\n"),
    };
    let alone = held.map_or_else(Vec::new, |held| before.lacking_in(held));
    if alone.is_empty() {
        return format!(
            "The one before is kept as {name}, and has no key that is not here: remove it once all is well.\n"
        );
    }
    let keks = match before.keks.as_slice() {
        [] => String::new(),
        keks => format!(" (check value {})", list(keks)),
    };
    format!(
        "The one before is kept as {name}. THE KEYS OF THESE VOLUMES ARE IN IT ALONE: {}. Do not remove it while you need \
         them, nor the key-encryption key that opens it{keks}.\n",
        alone.join(", ")
    )
}

/// Which volumes and grants are not as in the database that was replaced, now that one with `terms` is in its place.
fn what_changed(kept: &Path, terms: &Terms) -> String {
    let before = match Terms::in_file(kept) {
        Ok(before) => before,
        Err(refusal) => {
            return format!(
                "States, owners and grants are those of the backup, and which were changed later cannot be told ({refusal}): \
                 look at 'volcrypt volume list' and 'volcrypt grant list' as soon as volcryptd runs.\n"
            );
        }
    };
    let now = seconds_now();
    let changed = terms.changed_since(&before, now);
    if changed.is_empty() {
        return String::new();
    }
    let lines: Vec<String> =
        changed.iter().map(|changed| format!("  {}\n", printable(&in_words(changed, now)))).collect();
    format!(
        "STATES, OWNERS AND GRANTS ARE THOSE OF THE BACKUP. The following were others in the database before; unless that is \
         what you want, put them right as soon as volcryptd runs:\n{}",
        lines.concat()
    )
}

/// What has changed, and the command that takes it back.
fn in_words(changed: &Changed<'_>, now: i64) -> String {
    let whom = |owner: &Option<&str>| owner.map_or("nobody".to_owned(), |owner| format!("{owner:?}"));
    match changed {
        Changed::State { volume, now, before } => {
            let command = match (*now, *before) {
                (_, "retired") => format!(": volcrypt volume retire {}", quoted(volume)),
                (_, "destroyed") => format!(": volcrypt volume destroy {}", quoted(volume)),
                ("retired", _) => ": volcrypt volume enrol with the path of its device".to_owned(),
                // Its key is not in this database.
                _ => String::new(),
            };
            format!("volume {volume} is {now}, and was {before} before{command}")
        }
        Changed::Owner { volume, now, before } => {
            let owner = before.map_or(String::new(), |owner| format!(" {}", quoted(owner)));
            format!(
                "volume {volume} belongs to {}, and to {} before: volcrypt volume set-owner {}{owner}",
                whom(now),
                whom(before),
                quoted(volume)
            )
        }
        Changed::Grant { volume, domain, until, before: None } => format!(
            "domain {domain:?} may have volume {volume} until {}, and had no grant before: volcrypt grant revoke {} {}",
            utc(*until),
            quoted(volume),
            quoted(domain)
        ),
        Changed::Grant { volume, domain, until, before: Some(before) } => format!(
            "domain {domain:?} may have volume {volume} until {}, and until {} before: volcrypt grant add {} {} --for {}s",
            utc(*until),
            utc(*before),
            quoted(volume),
            quoted(domain),
            before - now
        ),
    }
}

/// What is to be done with the log or journal of a database that was not there any more.
fn lone_log(kept: &Path) -> String {
    let end = match kept.as_os_str().as_bytes().ends_with(b"-journal") {
        true => "-journal",
        false => "-wal",
    };
    // Elsewhere they are no backup: that has to be one file.
    let place = kept.with_file_name("volcrypt.db");
    format!(
        "A log was there without its database and is kept as {0}. Without it that database lacks its last changes: to use \
         that again, stop volcryptd, move {1} and what has the same name with -wal, -shm or -journal away, and put both back, \
         as {1} and {1}{end}; once it is not needed, overwrite it ('shred -u {0}'), for it may hold keys.\n",
        kept.display(),
        place.display()
    )
}

fn list(keks: &[CheckValue]) -> String {
    keks.iter().map(ToString::to_string).collect::<Vec<_>>().join(" and ")
}

fn key_manager(config: &Path) -> Result<KeyManagerConfig, CommandError> {
    Ok(Config::load(config).map_err(CommandError::Configuration)?.key_manager)
}

/// Who runs this command, which writes to the audit log itself: the daemon need not run.
fn operator() -> Asker {
    logging::announce_only("volcrypt");
    Asker::operator(std::process::id(), rustix::process::getuid().as_raw())
}

/// Now, as part of a file's name.
fn stamp() -> String {
    utc(seconds_now()).replace(['-', ':'], "")
}

/// A backup whose keys do not open is not put in place.
fn not_opened(
    backup: &Path,
    directory: &Path,
    contents: &Contents,
    has_credentials: bool,
    refusal: &Refusal,
) -> Refusal {
    let kek = directory.join("kek");
    let places = match contents.keks.as_slice() {
        // While one takes the other's place; the first is the new one.
        [new, old] => format!("keys of when it was made, check value {old} as {0} and {new} as {0}.new", kek.display()),
        keks => format!("key of when it was made, check value {} as {}", list(keks), kek.display()),
    };
    let credential = match has_credentials {
        true => String::new(),
        // That runs it in another directory.
        false => format!(
            "; if it is a credential, run 'systemd-run --pipe --wait --property=LoadCredentialEncrypted=volcrypt.kek:FILE \
             volcrypt key restore {}'",
            std::path::absolute(backup).as_deref().unwrap_or(backup).display()
        ),
    };
    Refusal::new(
        refusal.reason(),
        format!(
            "the keys in {} do not open here, and nothing was changed ({refusal}): it needs the key-encryption {places}, and \
             what is there now has to be kept under another name first{credential}",
            backup.display(),
        ),
    )
}

/// Neither the daemon nor systemd, which would start it at any moment, may listen for guests and clients.
fn check_stopped() -> Result<(), CommandError> {
    let sockets = fs::read_to_string(SOCKETS).unwrap_or_default();
    match listening(&sockets, &[CONTROL_SOCKET, WRAPPER_SOCKET]) {
        None => Ok(()),
        Some(socket) => Err(CommandError::Refused(Refusal::new(
            Reason::NotAllowed,
            format!(
                "volcryptd runs, or is started as soon as somebody asks ({socket}): run 'systemctl stop volcryptd.socket \
                 volcryptd-control.socket volcryptd' first; guests that open a disk meanwhile wait"
            ),
        ))),
    }
}

/// The first of `sockets` on which somebody listens: the flag `__SO_ACCEPTCON`.
fn listening<'a>(table: &str, sockets: &[&'a str]) -> Option<&'a str> {
    let listens = |line: &str, socket: &str| {
        let mut fields = line.split_ascii_whitespace();
        let flags = fields.nth(3).and_then(|flags| u32::from_str_radix(flags, 16).ok());
        flags.is_some_and(|flags| flags & 0x1_0000 != 0) && fields.nth(3) == Some(socket)
    };
    sockets.iter().copied().find(|socket| table.lines().any(|line| listens(line, socket)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_listens_is_told_from_who_is_connected() {
        let table = "Num       RefCount Protocol Flags    Type St Inode Path\n\
                     0000000000000000: 00000003 00000000 00000000 0001 03 2345 /run/volcrypt/wrapper.sock\n\
                     0000000000000000: 00000002 00000000 00010000 0001 01 1234 /run/volcrypt/control.sock\n\
                     0000000000000000: 00000002 00000000 00010000 0001 01 1235\n";
        let all = [WRAPPER_SOCKET, CONTROL_SOCKET];
        assert_eq!(listening(table, &all), Some(CONTROL_SOCKET));
        assert_eq!(listening(table, &[WRAPPER_SOCKET]), None);
        let own = tempfile::tempdir().unwrap();
        let path = own.path().join("control.sock");
        let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let listening =
            |path: &Path| listening(&fs::read_to_string(SOCKETS).unwrap(), &[path.to_str().unwrap()]).is_some();
        assert!(listening(&path));
        drop(listener);
        assert!(!listening(&path));
    }
}
