//! `volcrypt key rotate-kek`.

use super::progress::Progress;
use super::{CommandError, Daemon};
use crate::keys::{KekHome, KekRotation, RotationStep};
use crate::protocol::{Reply, Request};

/// Replaces the key-encryption key, a step at a time, and tells how far it is.
pub(super) fn rotate(daemon: &Daemon<'_>) -> Result<String, CommandError> {
    let mut progress = Progress::new();
    let mut step = RotationStep::Begin;
    let mut total = None;
    loop {
        match daemon.call(&Request::RotateKek(step))? {
            Reply::KekRotation(KekRotation::UnderWay { old, new, resumed, remaining, after }) => {
                let total = *total.get_or_insert_with(|| {
                    let what = if resumed { "Going on to replace" } else { "Replacing" };
                    progress.say(&format!("{what} the key-encryption key {old} by {new}: {remaining} keys to rewrap."));
                    remaining
                });
                progress.show(total.saturating_sub(remaining), total);
                step = RotationStep::GoOn { after };
            }
            Reply::KekRotation(KekRotation::Finished { new, home, keys }) => {
                if let Some(total) = total {
                    progress.show(total, total);
                }
                return Ok(summary(&new.to_string(), home, keys));
            }
            _ => return Err(CommandError::UnexpectedReply),
        }
    }
}

fn summary(new: &str, home: KekHome, keys: u64) -> String {
    let old = match home {
        KekHome::File => "The old one is removed: backups of the database that were made before need a copy of it.",
        KekHome::Credential => {
            "The old one is not needed here any more: have only the new one, as volcrypt.kek, in the drop-in of \
             volcryptd.service, and run 'systemctl daemon-reload' and 'systemctl restart volcryptd'. Backups of the \
             database that were made before need the old one."
        }
    };
    format!(
        "The key-encryption key {new} wraps all {keys} keys. {old}\n\
         Back up the new one now, and the database with it: neither is of use without the other.\n"
    )
}
