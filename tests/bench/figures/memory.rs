//! The daemon's memory with many guests.

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::Outcome;
use crate::daemon::Daemon;
use crate::table::{Aim, Figure, Measured};
use crate::wrapper::StandIn;

const GUESTS: usize = 500;
const AIM: u64 = 16 << 20;
const START_DEADLINE: Duration = Duration::from_secs(60);

/// What stays resident with many registered guests, against none.
pub fn figures(daemon: &Daemon, stand_in: &StandIn) -> Outcome<Vec<Figure>> {
    let none = resident(daemon.pid())?;
    let guests = (0..GUESTS).map(|_| Waiting::start(stand_in)).collect::<Outcome<Vec<_>>>()?;
    let deadline = Instant::now() + START_DEADLINE;
    for guest in &guests {
        guest.wait_until_registered(&stand_in.program, deadline)?;
    }
    let many = resident(daemon.pid())?;
    Ok(vec![Figure {
        what: format!("resident memory of volcryptd, {GUESTS} guests"),
        value: Measured::bytes(many),
        compared: ("no guest".to_owned(), Measured::bytes(none)),
        aim: Aim::AtMost(AIM),
    }])
}

/// A guest that does nothing, gone with this value.
struct Waiting(Child);

impl Waiting {
    fn start(stand_in: &StandIn) -> Outcome<Self> {
        let mut command = Command::new(&stand_in.wrapped);
        Ok(Waiting(command.args(["-machine", "pc", "wait"]).stdin(Stdio::null()).spawn()?))
    }

    /// The wrapper executes the emulator only once it is registered.
    fn wait_until_registered(&self, emulator: &Path, deadline: Instant) -> Outcome<()> {
        let program = format!("/proc/{}/exe", self.0.id());
        while fs::read_link(&program)? != emulator {
            if Instant::now() > deadline {
                return Err(format!("{GUESTS} guests were not registered in {START_DEADLINE:?}").into());
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// `VmRSS` of proc_pid_status(5), in bytes.
pub fn resident(pid: u32) -> Outcome<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).ok_or("the daemon has no VmRSS")?;
    Ok(line.trim().trim_end_matches(" kB").parse::<u64>()? * 1024)
}
