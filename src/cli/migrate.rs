//! `volcrypt key migrate`.

use std::io::{self, BufRead, Read, Write};

use super::progress::Progress;
use super::table::printable;
use super::{CommandError, Daemon, Outcome};
use crate::keys::{Aim, ManagerKind, MigrationProgress, MigrationStep, Route};
use crate::protocol::{Reply, Request};

/// Moves keys, a step at a time, and tells how far it is. The exit code is 1 when a key could not be moved.
pub(super) fn migrate(
    daemon: &Daemon<'_>,
    route: Route,
    destroy_old: bool,
    confirmed: Option<ManagerKind>,
) -> Result<Outcome, CommandError> {
    let aim = if destroy_old { Aim::DestroyOld } else { Aim::Copy };
    if destroy_old && !confirmed.map_or_else(|| ask_for(route), |confirmed| confirmed == route.from) {
        return Err(CommandError::KeysNotConfirmed(route.from));
    }
    let mut progress = Progress::new();
    let mut sum = Sum::default();
    let mut step = MigrationStep { route, aim, after: None };
    loop {
        let Reply::KeyMigration(came) = daemon.call_for_long(&Request::MigrateKeys(step), &mut progress)? else {
            return Err(CommandError::UnexpectedReply);
        };
        if sum.total.is_none() {
            progress.say(&beginning(route, aim, &came));
        }
        for sentence in came.skipped.iter().chain(&came.refused) {
            progress.say(&printable(sentence));
        }
        let total = sum.add(&came);
        progress.show(sum.done(), total);
        match came.after {
            Some(after) => step = MigrationStep { route, aim, after: Some(after) },
            None => {
                let code = u8::from(sum.refused > 0);
                return Ok(Outcome { text: ending(route, aim, &sum), code });
            }
        }
    }
}

/// What all steps came to.
#[derive(Default)]
struct Sum {
    total: Option<u64>,
    stored: u64,
    present: u64,
    removed: u64,
    skipped: usize,
    refused: usize,
}

impl Sum {
    fn add(&mut self, came: &MigrationProgress) -> u64 {
        self.stored += came.stored;
        self.present += came.present;
        self.removed += came.removed;
        self.skipped += came.skipped.len();
        self.refused += came.refused.len();
        *self.total.get_or_insert(came.remaining)
    }

    fn done(&self) -> u64 {
        self.stored + self.present + self.removed
    }
}

fn keys(number: u64) -> String {
    match number {
        1 => "1 key".to_owned(),
        number => format!("{number} keys"),
    }
}

fn beginning(route: Route, aim: Aim, came: &MigrationProgress) -> String {
    let Route { from, to } = route;
    let keys = keys(came.remaining);
    match (aim, came.resumed) {
        (Aim::Copy, false) => format!("Copying {keys} from {from} to {to}."),
        (Aim::Copy, true) => format!("Going on to copy keys from {from} to {to}: {keys} left."),
        (Aim::DestroyOld, false) => format!("Destroying {keys} in {from} that {to} has as well."),
        (Aim::DestroyOld, true) => format!("Going on to destroy keys in {from} that {to} has as well: {keys} left."),
    }
}

fn ending(route: Route, aim: Aim, sum: &Sum) -> String {
    let Route { from, to } = route;
    let mut text = match aim {
        Aim::Copy => format!(
            "{} copied from {from} to {to}, {} there already; each was read back and compared.\n",
            keys(sum.stored),
            sum.present
        ),
        Aim::DestroyOld => format!("{} destroyed in {from}; {to} has each of them.\n", keys(sum.removed)),
    };
    if sum.skipped > 0 {
        text.push_str(&format!("{} passed over, as said above.\n", keys(sum.skipped as u64)));
    }
    if sum.refused > 0 {
        text.push_str(&format!("{} NOT done, as said above: see to them and repeat.\n", keys(sum.refused as u64)));
        return text;
    }
    if aim == Aim::Copy {
        text.push_str(&format!(
            "The keys in {from} are still there. What is enrolled before every host uses {to} (type = \"{to}\" in the section \
             [key_manager], 'systemctl restart volcryptd') has its key in {from} only: run this again then, and after that \
             with --destroy-old if the old keys are to go.\n"
        ));
    }
    text
}

/// What is asked before keys are destroyed.
fn question(route: Route) -> String {
    let Route { from, to } = route;
    format!(
        "Every key in {from} that was copied to {to} is compared once more and destroyed in {from}. A host that still uses \
         {from} opens none of these volumes any more. Type {from} to go on: "
    )
}

/// Whether somebody types the name of the key manager whose keys are to be destroyed.
fn ask_for(route: Route) -> bool {
    let Route { from, .. } = route;
    let question = question(route);
    let mut answer = String::new();
    io::stderr().write_all(question.as_bytes()).is_ok()
        && io::stdin().lock().take(256).read_line(&mut answer).is_ok()
        && answer.trim() == from.as_str()
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROUTE: Route = Route { from: ManagerKind::Embedded, to: ManagerKind::Kmip };

    #[test]
    fn an_end_says_what_was_done_and_what_is_next() {
        let sum = Sum { total: Some(3), stored: 2, present: 1, ..Sum::default() };
        assert_eq!(
            ending(ROUTE, Aim::Copy, &sum),
            "2 keys copied from embedded to kmip, 1 there already; each was read back and compared.\n\
             The keys in embedded are still there. What is enrolled before every host uses kmip (type = \"kmip\" in the \
             section [key_manager], 'systemctl restart volcryptd') has its key in embedded only: run this again then, and \
             after that with --destroy-old if the old keys are to go.\n"
        );
        let sum = Sum { total: Some(3), stored: 1, skipped: 1, refused: 1, ..Sum::default() };
        assert_eq!(
            ending(ROUTE, Aim::Copy, &sum),
            "1 key copied from embedded to kmip, 0 there already; each was read back and compared.\n\
             1 key passed over, as said above.\n\
             1 key NOT done, as said above: see to them and repeat.\n"
        );
        let sum = Sum { total: Some(3), removed: 3, ..Sum::default() };
        assert_eq!(ending(ROUTE, Aim::DestroyOld, &sum), "3 keys destroyed in embedded; kmip has each of them.\n");
    }

    #[test]
    fn the_question_before_keys_are_destroyed_warns_of_other_hosts() {
        let question = question(ROUTE);
        assert!(question.contains("A host that still uses embedded opens none of these volumes"), "{question}");
        assert!(question.ends_with("Type embedded to go on: "), "{question}");
    }

    #[test]
    fn a_beginning_says_whether_it_goes_on() {
        let came = |resumed| MigrationProgress { resumed, remaining: 2, ..MigrationProgress::default() };
        assert_eq!(beginning(ROUTE, Aim::Copy, &came(false)), "Copying 2 keys from embedded to kmip.");
        assert_eq!(
            beginning(ROUTE, Aim::Copy, &came(true)),
            "Going on to copy keys from embedded to kmip: 2 keys left."
        );
        assert_eq!(
            beginning(ROUTE, Aim::DestroyOld, &came(false)),
            "Destroying 2 keys in embedded that kmip has as well."
        );
    }
}
