//! Changes of the database: each is a transaction, together with the audit record of it.

use rusqlite::{Transaction, TransactionBehavior};

use super::Store;
use crate::audit::Event;
use crate::refusal::Refusal;

/// What comes of a change.
pub(super) enum Change<T> {
    /// There is nothing to change, so nothing is written.
    Needless(T),
    /// It is made, and recorded as that.
    Recorded(T, Event),
    /// It is made, and no record of its own.
    Unrecorded(T),
    /// The same, and what it has deleted should not stand in the write-ahead log either.
    Wiped(T),
}

impl Store {
    /// Lets `make` change the database. What it returns is what holds when this returns.
    pub(super) fn change<T>(
        &self,
        make: impl FnOnce(&Transaction<'_>) -> Result<Change<T>, Refusal>,
    ) -> Result<T, Refusal> {
        let fault = |error| self.fault(&error);
        let mut connection = self.connection();
        self.check_in_place()?;
        let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate).map_err(fault)?;
        let made = match make(&transaction)? {
            Change::Needless(unchanged) => return Ok(unchanged),
            Change::Recorded(made, event) => self.commit_recorded(transaction, event).map(|()| made)?,
            Change::Unrecorded(made) => transaction.commit().map(|()| made).map_err(fault)?,
            Change::Wiped(made) => {
                transaction.commit().map_err(fault)?;
                self.merge_wiped_log(&connection);
                return Ok(made);
            }
        };
        self.merge_log(&connection);
        Ok(made)
    }
}
