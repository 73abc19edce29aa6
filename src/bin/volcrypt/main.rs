//! `volcrypt`, the operator's command. The only program of the project that links libvirt.

use std::process::ExitCode;

use volcrypt::cli::Libvirt;

mod definition;
mod survey;

fn main() -> ExitCode {
    volcrypt::cli::main(Libvirt {
        survey: survey::survey,
        look: definition::look,
        define: definition::define,
        find: definition::find,
        change: definition::change,
    })
}
