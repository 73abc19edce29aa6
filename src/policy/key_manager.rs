use std::path::{Path, PathBuf};

use toml::Spanned;

use super::error::Fault;
use super::file::KeyManagerTable;

/// Where the database and the key-encryption key are, unless the configuration says otherwise.
pub const DEFAULT_DIRECTORY: &str = "/var/lib/volcrypt";

/// Which key manager is used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KeyManagerConfig {
    /// The daemon's own database.
    Embedded {
        /// Where it stands, an absolute path.
        directory: PathBuf,
    },
    /// Keys in clear text in a file, for tests only.
    KeyFile {
        /// The file, an absolute path.
        file: PathBuf,
    },
}

impl KeyManagerConfig {
    /// Where the database of enrolled volumes stands.
    pub fn directory(&self) -> &Path {
        match self {
            KeyManagerConfig::Embedded { directory } => directory,
            KeyManagerConfig::KeyFile { .. } => Path::new(DEFAULT_DIRECTORY),
        }
    }

    pub(super) fn new(table: KeyManagerTable) -> Result<Self, Fault> {
        let refuse = |span, sentence: &str| Err(Fault::new(span, sentence));
        match table.kind.as_ref().map(|kind| kind.get_ref().as_str()) {
            None | Some("embedded") => {
                if let Some(file) = table.file {
                    return refuse(file.span(), "file belongs to the type \"key-file\"; remove it, or use directory");
                }
                if let Some(consent) = table.i_know_this_is_insecure {
                    return refuse(
                        consent.span(),
                        "i_know_this_is_insecure belongs to the type \"key-file\"; remove it",
                    );
                }
                let directory = table.directory.map_or(Ok(PathBuf::from(DEFAULT_DIRECTORY)), absolute)?;
                Ok(KeyManagerConfig::Embedded { directory })
            }
            Some("key-file") => {
                let span = table.kind.as_ref().map_or(0..0, Spanned::span);
                if table.i_know_this_is_insecure.is_none_or(|consent| !consent.into_inner()) {
                    return refuse(
                        span,
                        "the type \"key-file\" keeps keys in clear text, for tests only; \
                     use \"embedded\", or add i_know_this_is_insecure = true",
                    );
                }
                if let Some(directory) = table.directory {
                    return refuse(
                        directory.span(),
                        "directory belongs to the type \"embedded\"; remove it, or use file",
                    );
                }
                match table.file {
                    Some(file) => Ok(KeyManagerConfig::KeyFile { file: absolute(file)? }),
                    None => refuse(span, "the type \"key-file\" needs a file; add file = \"/path\""),
                }
            }
            Some(other) => {
                let sentence = format!("key manager type {other:?} is not known; use \"embedded\"");
                Err(Fault::new(table.kind.map_or(0..0, |kind| kind.span()), sentence))
            }
        }
    }
}

fn absolute(path: Spanned<String>) -> Result<PathBuf, Fault> {
    let text = path.get_ref();
    match text.starts_with('/') && !text.contains('\0') {
        true => Ok(PathBuf::from(text)),
        false => Err(Fault::new(path.span(), format!("{text:?} is no absolute path; write one that starts with '/'"))),
    }
}
