use std::path::{Path, PathBuf};
use std::time::Duration;

use toml::Spanned;

use super::config::seconds;
use super::error::Fault;
use super::file::{BarbicanTable, KeyCacheTable, KeyManagerTable, KmipTable};
use crate::keys::ManagerKind;
use crate::keys::barbican::{BarbicanConfig, Credential, check_url};
use crate::keys::kmip::message::Version;
use crate::keys::kmip::{KeyOrigin, KmipConfig, WrappingKey, split_address};

/// Where the database and the key-encryption key are, unless the configuration says otherwise.
pub const DEFAULT_DIRECTORY: &str = "/var/lib/volcrypt";
/// In seconds.
const DEFAULT_KMIP_DEADLINE: u64 = 5;
/// In seconds.
const DEFAULT_BARBICAN_DEADLINE: u64 = 5;
/// The longest lifetime of cached keys, in days.
const LONGEST_LIFETIME: i64 = 30;
/// OpenStack's own default.
const DEFAULT_DOMAIN: &str = "Default";

/// Which key manager is used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KeyManagerConfig {
    /// The daemon's own database.
    Embedded {
        /// Where it stands, an absolute path.
        directory: PathBuf,
    },
    /// A KMIP server.
    Kmip {
        /// Where the database of enrolled volumes stands, an absolute path.
        directory: PathBuf,
        /// How the server is reached.
        kmip: KmipConfig,
    },
    /// OpenStack Barbican.
    Barbican {
        /// Where the database of enrolled volumes stands, an absolute path.
        directory: PathBuf,
        /// How Barbican is reached.
        barbican: Box<BarbicanConfig>,
    },
    /// Keys in clear text in a file, for tests only.
    KeyFile {
        /// The file, an absolute path.
        file: PathBuf,
    },
}

/// The section `[key_cache]`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct KeyCacheConfig {
    /// For how long a key may be used after the key server last gave it, in days: 1 to 30, or 0 if none is kept.
    pub lifetime_days: u32,
}

impl KeyCacheConfig {
    /// The lifetime of a key, if keys are kept.
    pub fn lifetime(&self) -> Option<Duration> {
        (self.lifetime_days > 0).then(|| Duration::from_secs(u64::from(self.lifetime_days) * 24 * 3600))
    }

    pub(super) fn new(table: KeyCacheTable) -> Result<Self, Fault> {
        let Some(days) = table.lifetime_days else { return Ok(KeyCacheConfig::default()) };
        match u32::try_from(*days.get_ref()) {
            Ok(lifetime_days) if i64::from(lifetime_days) <= LONGEST_LIFETIME => Ok(KeyCacheConfig { lifetime_days }),
            _ => {
                let sentence = format!(
                    "lifetime_days = {days} is out of range; use 1 to {LONGEST_LIFETIME}, or 0 to keep no keys"
                );
                Err(Fault::new(days.span(), sentence))
            }
        }
    }
}

impl KeyManagerConfig {
    /// What tells the key server that is named from others; nothing if keys come from none.
    pub fn server(&self) -> Option<String> {
        match self {
            KeyManagerConfig::Kmip { kmip, .. } => {
                let mut servers = kmip.servers.clone();
                servers.sort();
                Some(format!("kmip {}", servers.join(" ")))
            }
            KeyManagerConfig::Barbican { barbican, .. } => {
                let BarbicanConfig { auth_url, credential, interface, region, .. } = barbican.as_ref();
                Some(format!("barbican {auth_url} {credential:?} {interface} {region:?}"))
            }
            KeyManagerConfig::Embedded { .. } | KeyManagerConfig::KeyFile { .. } => None,
        }
    }

    /// Where the database of enrolled volumes stands.
    pub fn directory(&self) -> &Path {
        match self {
            KeyManagerConfig::Embedded { directory }
            | KeyManagerConfig::Kmip { directory, .. }
            | KeyManagerConfig::Barbican { directory, .. } => directory,
            KeyManagerConfig::KeyFile { .. } => Path::new(DEFAULT_DIRECTORY),
        }
    }

    /// Its name in the configuration.
    pub fn kind(&self) -> ManagerKind {
        match self {
            KeyManagerConfig::Embedded { .. } => ManagerKind::Embedded,
            KeyManagerConfig::Kmip { .. } => ManagerKind::Kmip,
            KeyManagerConfig::Barbican { .. } => ManagerKind::Barbican,
            KeyManagerConfig::KeyFile { .. } => ManagerKind::KeyFile,
        }
    }

    pub(super) fn new(table: KeyManagerTable, servers: &KeyServers) -> Result<Self, Fault> {
        let refuse = |span, sentence: &str| Err(Fault::new(span, sentence));
        match table.kind.as_ref().map(|kind| kind.get_ref().as_str()) {
            kind @ (None | Some("embedded" | "kmip" | "barbican")) => {
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
                let span = table.kind.as_ref().map_or(0..0, Spanned::span);
                match (kind, servers.kmip.clone(), servers.barbican.clone()) {
                    (Some("kmip"), Some(kmip), _) => Ok(KeyManagerConfig::Kmip { directory, kmip }),
                    (Some("kmip"), None, _) => {
                        refuse(span, "the type \"kmip\" needs a section [kmip] that names its servers; add one")
                    }
                    (Some("barbican"), _, Some(barbican)) => Ok(KeyManagerConfig::Barbican { directory, barbican }),
                    (Some("barbican"), _, None) => {
                        refuse(span, "the type \"barbican\" needs a section [barbican] that names Keystone; add one")
                    }
                    _ => Ok(KeyManagerConfig::Embedded { directory }),
                }
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
                let sentence =
                    format!("key manager type {other:?} is not known; use \"embedded\", \"kmip\" or \"barbican\"");
                Err(Fault::new(table.kind.map_or(0..0, |kind| kind.span()), sentence))
            }
        }
    }
}

/// The key servers that have a section, whether or not they are used: keys can be moved from and to them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KeyServers {
    /// The section `[kmip]`.
    kmip: Option<KmipConfig>,
    /// The section `[barbican]`.
    barbican: Option<Box<BarbicanConfig>>,
}

impl KeyServers {
    pub(super) fn new(
        kmip: Option<Spanned<KmipTable>>,
        barbican: Option<Spanned<BarbicanTable>>,
    ) -> Result<Self, Fault> {
        // What is wrong with them is wrong also while they are not used.
        let kmip = kmip.map(new_kmip).transpose()?;
        let barbican = barbican.map(new_barbican).transpose()?;
        Ok(KeyServers { kmip, barbican: barbican.map(Box::new) })
    }

    /// The key manager `kind` beside the database that `used` has; nothing if the file does not say how to reach it.
    pub fn named(&self, kind: ManagerKind, used: &KeyManagerConfig) -> Option<KeyManagerConfig> {
        let directory = used.directory().to_owned();
        match kind {
            kind if kind == used.kind() => Some(used.clone()),
            ManagerKind::Embedded => Some(KeyManagerConfig::Embedded { directory }),
            ManagerKind::Kmip => self.kmip.clone().map(|kmip| KeyManagerConfig::Kmip { directory, kmip }),
            ManagerKind::Barbican => {
                self.barbican.clone().map(|barbican| KeyManagerConfig::Barbican { directory, barbican })
            }
            ManagerKind::KeyFile => None,
        }
    }
}

fn new_kmip(table: Spanned<KmipTable>) -> Result<KmipConfig, Fault> {
    let span = table.span();
    let table = table.into_inner();
    let KmipTable { servers, ca, certificate, key, key_origin, newest_version, deadline_seconds, .. } = table;
    let missing = |what: &str| Fault::new(span.clone(), format!("the section [kmip] needs {what}; add it"));
    let servers = servers.ok_or_else(|| missing("servers = [\"HOST:5696\"]"))?;
    if servers.get_ref().is_empty() {
        return Err(Fault::new(servers.span(), "servers is empty; name a KMIP server as \"HOST:5696\""));
    }
    for server in servers.get_ref() {
        if split_address(server.get_ref()).is_none() {
            let sentence = format!("{:?} is no server; write \"HOST:PORT\", usually with port 5696", server.get_ref());
            return Err(Fault::new(server.span(), sentence));
        }
    }
    let key_origin = match key_origin.as_ref().map(|origin| origin.get_ref().as_str()) {
        None | Some("host") => KeyOrigin::Host,
        Some("server") => KeyOrigin::Server,
        Some(other) => {
            let sentence = format!("{other:?} makes no keys; use \"host\" or \"server\"");
            return Err(Fault::new(key_origin.map_or(span, |origin| origin.span()), sentence));
        }
    };
    let newest_version = match newest_version {
        None => Version::NEWEST,
        Some(version) => version.get_ref().parse().map_err(|_| {
            let sentence = format!(
                "{:?} is no version of KMIP that is spoken here; use \"1.0\" to \"1.4\" or \"2.0\"",
                version.get_ref()
            );
            Fault::new(version.span(), sentence)
        })?,
    };
    let wrapping_key = match (table.wrapping_key, table.wrapping_key_file) {
        (None, None) => None,
        (Some(identifier), _) if identifier.get_ref().is_empty() => {
            let sentence = "wrapping_key is empty; write what the KMIP servers call the key, its unique identifier";
            return Err(Fault::new(identifier.span(), sentence));
        }
        (Some(identifier), Some(file)) => {
            Some(WrappingKey { identifier: identifier.into_inner(), file: absolute(file)? })
        }
        (Some(identifier), None) => {
            let sentence = "wrapping_key needs wrapping_key_file = \"/path\", the same key on this host; add it";
            return Err(Fault::new(identifier.span(), sentence));
        }
        (None, Some(file)) => {
            let sentence = "wrapping_key_file needs wrapping_key, what the KMIP servers call that key; add it";
            return Err(Fault::new(file.span(), sentence));
        }
    };
    Ok(KmipConfig {
        servers: servers.into_inner().into_iter().map(Spanned::into_inner).collect(),
        ca: absolute(ca.ok_or_else(|| missing("ca = \"/path\", the authorities that vouch for the servers"))?)?,
        certificate: absolute(certificate.ok_or_else(|| missing("certificate = \"/path\", this host's own"))?)?,
        key: absolute(key.ok_or_else(|| missing("key = \"/path\", the private key of its certificate"))?)?,
        key_origin,
        newest_version,
        wrapping_key,
        deadline: seconds("deadline_seconds", deadline_seconds, DEFAULT_KMIP_DEADLINE, 1..=60)?,
    })
}

fn new_barbican(table: Spanned<BarbicanTable>) -> Result<BarbicanConfig, Fault> {
    let span = table.span();
    let table = table.into_inner();
    let missing = |what: &str| Fault::new(span.clone(), format!("the section [barbican] needs {what}; add it"));
    let auth_url = table.auth_url.ok_or_else(|| missing("auth_url = \"https://HOST:5000/v3\", Keystone's address"))?;
    check_url(auth_url.get_ref()).map_err(|sentence| Fault::new(auth_url.span(), sentence))?;
    let ca = table.ca.map(absolute).transpose()?;
    if ca.is_none() && auth_url.get_ref().starts_with("https:") {
        return Err(missing("ca = \"/path\", the authorities that vouch for the servers"));
    }
    let domain = |domain: Option<String>| domain.unwrap_or_else(|| DEFAULT_DOMAIN.to_owned());
    let (user_domain, project_domain) = (domain(table.user_domain), domain(table.project_domain));
    let credential = match (table.application_credential_id, table.application_credential_name, table.user) {
        (Some(id), None, None) => Credential::Application(id),
        (None, Some(name), Some(user)) => Credential::NamedApplication { name, user, user_domain },
        (None, None, Some(user)) => {
            let project = table.project.ok_or_else(|| missing("project, whose keys user is to have"))?;
            Credential::Password { user, user_domain, project, project_domain }
        }
        (None, Some(_), None) => return Err(missing("user, whose application_credential_name is meant")),
        (Some(_), _, _) => {
            let sentence =
                "application_credential_id says who this host is; remove application_credential_name and user";
            return Err(Fault::new(span, sentence));
        }
        (None, None, None) => return Err(missing("application_credential_id, which says who this host is")),
    };
    let interface = match table.interface {
        None => "public".to_owned(),
        Some(interface) if ["public", "internal", "admin"].contains(&interface.get_ref().as_str()) => {
            interface.into_inner()
        }
        Some(interface) => {
            let sentence =
                format!("{:?} is no interface; use \"public\", \"internal\" or \"admin\"", interface.get_ref());
            return Err(Fault::new(interface.span(), sentence));
        }
    };
    Ok(BarbicanConfig {
        auth_url: auth_url.into_inner(),
        credential,
        secret: absolute(
            table.secret.ok_or_else(|| missing("secret = \"/path\", the application credential's secret"))?,
        )?,
        ca,
        interface,
        region: table.region,
        deadline: seconds("deadline_seconds", table.deadline_seconds, DEFAULT_BARBICAN_DEADLINE, 1..=60)?,
        volume_secrets: table.volume_secrets.map(absolute).transpose()?,
    })
}

fn absolute(path: Spanned<String>) -> Result<PathBuf, Fault> {
    let text = path.get_ref();
    match text.starts_with('/') && !text.contains('\0') {
        true => Ok(PathBuf::from(text)),
        false => Err(Fault::new(path.span(), format!("{text:?} is no absolute path; write one that starts with '/'"))),
    }
}
