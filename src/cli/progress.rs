use std::io::{self, IsTerminal, Write};

/// Where the operator sees how far it is: standard error, and a line that changes only if that is a terminal.
pub(super) struct Progress {
    terminal: bool,
    shown: bool,
}

impl Progress {
    pub(super) fn new() -> Self {
        Progress { terminal: io::stderr().is_terminal(), shown: false }
    }

    // Whether anybody reads it makes no difference to what is done.
    pub(super) fn say(&mut self, line: &str) {
        if std::mem::take(&mut self.shown) {
            let _ = writeln!(io::stderr());
        }
        let _ = writeln!(io::stderr(), "{line}");
    }

    pub(super) fn show(&mut self, done: u64, total: u64) {
        if self.terminal {
            let _ = write!(io::stderr(), "\r{done} of {total} ");
            self.shown = true;
        }
    }
}

/// What follows, a refusal perhaps, begins on a line of its own.
impl Drop for Progress {
    fn drop(&mut self) {
        if self.shown {
            let _ = writeln!(io::stderr());
        }
    }
}
