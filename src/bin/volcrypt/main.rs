//! `volcrypt`, the operator's command. The only program of the project that links libvirt.

use std::process::ExitCode;

mod survey;

fn main() -> ExitCode {
    volcrypt::cli::main(survey::survey)
}
