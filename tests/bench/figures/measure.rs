//! How things are measured: in turn, and by their median.

use std::ffi::OsStr;
use std::io::Write;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::pipe::{PipeFlags, fcntl_setpipe_size, pipe_with};

use crate::Outcome;
use crate::table::Measured;

/// One measurement of one thing.
pub type Run<'a> = Box<dyn FnMut() -> Outcome<Duration> + 'a>;

/// Measures every one of `runs` once a round, each round beginning with another one, and returns
/// their medians. One round before the first warms the caches.
pub fn medians(rounds: usize, runs: &mut [Run<'_>]) -> Outcome<Vec<Measured>> {
    let mut taken = vec![Vec::with_capacity(rounds); runs.len()];
    for run in runs.iter_mut() {
        run()?;
    }
    for round in 0..rounds {
        for turn in 0..runs.len() {
            let which = (round + turn) % runs.len();
            taken[which].push(runs[which]()?);
        }
    }
    Ok(taken.iter_mut().map(|times| summary(times)).collect())
}

/// The median of at least one time, and the distance between the quartiles.
pub fn summary(times: &mut [Duration]) -> Measured {
    times.sort_unstable();
    let at = |quarters: usize| times[(times.len() - 1) * quarters / 4];
    Measured::time(at(2), at(3) - at(1))
}

/// How long `command` takes from its start to its end, with `input` in a pipe as its standard input.
pub fn run(command: &mut Command, input: &str) -> Outcome<Duration> {
    let (reader, writer) = pipe_with(PipeFlags::CLOEXEC)?;
    // All of it has to fit, for nobody writes while the command runs.
    fcntl_setpipe_size(&writer, (input.len() + 1).next_power_of_two())?;
    std::fs::File::from(writer).write_all(input.as_bytes())?;
    command.stdin(Stdio::from(reader)).stdout(Stdio::null());
    let began = Instant::now();
    let status = command.status().map_err(|error| format!("{:?} does not start: {error}", command.get_program()))?;
    let took = began.elapsed();
    match status.success() {
        true => Ok(took),
        false => Err(format!("{:?} failed: {status}", command.get_program()).into()),
    }
}

/// A run of `program` with `arguments` and `input`.
pub fn of_program<'a>(program: impl AsRef<OsStr>, arguments: &[&str], input: &'a str) -> Run<'a> {
    let mut command = Command::new(program);
    command.args(arguments);
    Box::new(move || run(&mut command, input))
}
