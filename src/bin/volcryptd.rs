//! The program `volcryptd`: see [`volcrypt::daemon`].

fn main() -> std::process::ExitCode {
    volcrypt::daemon::main()
}
