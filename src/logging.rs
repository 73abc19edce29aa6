//! Where messages go: the journal with structured fields, or else standard error. Never standard
//! output, which is the hook's XML.

use tracing_subscriber::EnvFilter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

/// What every field of a message is called in the journal, before its name: `VOLCRYPT_VOLUME`.
const FIELD_PREFIX: &str = "VOLCRYPT";
/// The journal is the second witness of the audit log, however little else is wanted there.
const ALWAYS: &str = "volcrypt::audit=info";

/// Starts logging as `program`. The environment variable `VOLCRYPT_LOG` says how much (`info` unless
/// it is set): `error`, `warn`, `info`, `debug` or `trace`.
pub fn start(program: &str) {
    let filter = EnvFilter::try_from_env("VOLCRYPT_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    let filter = ALWAYS.parse().into_iter().fold(filter, EnvFilter::add_directive);
    let registry = tracing_subscriber::registry().with(filter);
    // systemd sets JOURNAL_STREAM for whatever it starts with its output to the journal.
    let journal = std::env::var_os("JOURNAL_STREAM").and_then(|_| tracing_journald::layer().ok());
    match journal {
        Some(journal) => {
            let journal = journal.with_field_prefix(Some(FIELD_PREFIX.to_owned()));
            registry.with(journal.with_syslog_identifier(program.to_owned())).init();
        }
        None => registry.with(tracing_subscriber::fmt::layer().with_writer(std::io::stderr).with_target(false)).init(),
    }
}

/// Has the journal know what is put into the audit log by a command, and nothing else; without a journal nobody does.
pub fn announce_only(program: &str) {
    let Ok(journal) = tracing_journald::layer() else { return };
    let journal = journal.with_field_prefix(Some(FIELD_PREFIX.to_owned()));
    let registry = tracing_subscriber::registry().with(EnvFilter::new(ALWAYS));
    // Where messages go somewhere already, these go there as well.
    let _ = registry.with(journal.with_syslog_identifier(program.to_owned())).try_init();
}
