//! The program `volcrypt-qemu`: see [`volcrypt::wrapper`].

fn main() -> std::process::ExitCode {
    volcrypt::wrapper::main()
}
