//! Where messages go: the journal with structured fields, or else standard error. Never standard
//! output, which is the hook's XML.

use tracing_subscriber::EnvFilter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

/// Starts logging as `program`. The environment variable `VOLCRYPT_LOG` says how much (`info` unless
/// it is set): `error`, `warn`, `info`, `debug` or `trace`.
pub fn start(program: &str) {
    let filter = EnvFilter::try_from_env("VOLCRYPT_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    let registry = tracing_subscriber::registry().with(filter);
    // systemd sets JOURNAL_STREAM for whatever it starts with its output to the journal.
    let journal = std::env::var_os("JOURNAL_STREAM").and_then(|_| tracing_journald::layer().ok());
    match journal {
        Some(journal) => registry.with(journal.with_syslog_identifier(program.to_owned())).init(),
        None => registry.with(tracing_subscriber::fmt::layer().with_writer(std::io::stderr).with_target(false)).init(),
    }
}
