//! The program `volcrypt-hook`: see [`volcrypt::hook`].

fn main() -> std::process::ExitCode {
    volcrypt::hook::main()
}
