//! The wrapper, against executing the emulator without it.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::Outcome;
use crate::measure::{medians, of_program};
use crate::table::{Aim, Figure, Measured};

const ROUNDS: usize = 201;
const QEMU_ROUNDS: usize = 51;
const AIM: Duration = Duration::from_millis(3);

/// As libvirt starts a guest, as far as the wrapper cares.
const GUEST: [&str; 6] =
    ["-name", "guest=figures,debug-threads=on", "-machine", "pc", "-uuid", "0b1f7c1e-1111-4222-8333-444455556666"];
/// As libvirt asks an emulator what it can do.
const PROBE: [&str; 2] = ["-machine", "none,accel=kvm:tcg"];
/// A real guest that never runs and ends when its monitor is told so.
const QEMU: [&str; 9] = ["-machine", "pc", "-accel", "tcg", "-nodefaults", "-nographic", "-S", "-monitor", "stdio"];

/// A small program under an emulator's name in a folder where the wrapper looks for emulators.
pub struct StandIn {
    /// The program.
    pub program: PathBuf,
    /// The wrapper under the same name.
    pub wrapped: PathBuf,
    links: PathBuf,
}

impl StandIn {
    /// Makes it, with links below `folder`.
    pub fn compile(folder: &Path) -> Outcome<Self> {
        let program = PathBuf::from("/usr/local/bin/qemu-system-figures");
        let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/bench/stand-in.c");
        let compiled = Command::new("cc").args(["-static", "-O1", "-o"]).arg(&program).arg(source).status()?;
        if !compiled.success() {
            return Err(format!("{source} cannot be compiled: {compiled}").into());
        }
        let links = folder.join("emulators");
        fs::create_dir(&links)?;
        let wrapped = link(&links, "qemu-system-figures")?;
        Ok(StandIn { program, wrapped, links })
    }
}

/// The way to an emulator through the wrapper against the direct one.
pub fn figures(stand_in: &StandIn) -> Outcome<Vec<Figure>> {
    let StandIn { program, wrapped, links } = stand_in;
    let [direct, guest, probe] = medians(
        ROUNDS,
        &mut [of_program(program, &GUEST, ""), of_program(wrapped, &GUEST, ""), of_program(wrapped, &PROBE, "")],
    )?[..] else {
        unreachable!("there are as many medians as runs")
    };

    let real = Path::new("/usr/bin/qemu-system-x86_64");
    let real_wrapped = link(links, "qemu-system-x86_64")?;
    let [qemu, qemu_wrapped] =
        medians(QEMU_ROUNDS, &mut [of_program(real, &QEMU, "quit\n"), of_program(real_wrapped, &QEMU, "quit\n")])?[..]
    else {
        unreachable!("there are as many medians as runs")
    };

    let figure = |what: &str, value: Measured, direct: (&str, Measured), aim| Figure {
        what: what.to_owned(),
        value,
        compared: (direct.0.to_owned(), direct.1),
        aim,
    };
    Ok(vec![
        figure("wrapper, exec to exec, probe", probe, ("stand-in executed directly", direct), Aim::None),
        figure("wrapper, exec to exec, guest", guest, ("stand-in executed directly", direct), Aim::Over(AIM)),
        figure("QEMU wrapped, start to end", qemu_wrapped, ("QEMU started directly", qemu), Aim::Over(AIM)),
    ])
}

fn link(folder: &Path, name: &str) -> Outcome<PathBuf> {
    let link = folder.join(name);
    symlink(env!("CARGO_BIN_EXE_volcrypt-qemu"), &link)?;
    Ok(link)
}
