//! What TLS takes on this side: certificates, a private key, and words for what is wrong with them.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ClientConfig, RootCertStore};

use super::secret_file::{self, Trust};

/// The largest private key that is read, in bytes.
const LONGEST_PRIVATE_KEY: usize = 64 << 10;

/// What tells whether a file was replaced: inode, size and time of change; nothing if it is not there.
pub type FileIdentity = Option<(u64, u64, i64, i64)>;

/// The identity of the file `path`.
pub fn file_identity(path: &Path) -> FileIdentity {
    let metadata = fs::metadata(path).ok()?;
    Some((metadata.ino(), metadata.size(), metadata.ctime(), metadata.ctime_nsec()))
}

/// The certificates in a PEM file.
///
/// # Errors
/// When it cannot be read or holds none.
pub fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let shown = path.display();
    let bytes = fs::read(path).map_err(|error| format!("{shown} cannot be read: {error}"))?;
    let certificates: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&bytes).collect();
    match certificates {
        Ok(certificates) if !certificates.is_empty() => Ok(certificates),
        Ok(_) => Err(format!("{shown} holds no certificate in PEM")),
        Err(error) => Err(format!("{shown} holds no certificate in PEM: {error}")),
    }
}

/// A client that believes the authorities in the file `ca` and shows the `certificate` with its private `key`, which is
/// that of `whose`. Read anew for every connection, so that a renewed certificate counts without a restart.
///
/// # Errors
/// One sentence that names the file and says what is wrong with it.
pub fn mutual_client(ca: &Path, certificate: &Path, key: &Path, whose: &str) -> Result<Arc<ClientConfig>, String> {
    let mut roots = RootCertStore::empty();
    for authority in certificates(ca)? {
        roots.add(authority).map_err(|error| format!("{} holds no usable certificate: {error}", ca.display()))?;
    }
    let chain = certificates(certificate)?;
    let purpose = format!("the private key of {whose}");
    let private = secret_file::read(key, &purpose, Trust::Mode, LONGEST_PRIVATE_KEY)
        .map_err(|refusal| refusal.to_string())?
        .ok_or_else(|| format!("{} ({purpose}) is not there", key.display()))?;
    let private = PrivateKeyDer::from_pem_slice(private.bytes())
        .map_err(|error| format!("{} holds no private key in PEM: {error}", key.display()))?;
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let unusable = |error| format!("{} and {}: {error}", certificate.display(), key.display());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(unusable)?
        .with_root_certificates(roots)
        .with_client_auth_cert(chain, private)
        .map_err(unusable)?;
    Ok(Arc::new(config))
}

/// What is wrong with a TLS connection, for whoever manages the certificates.
pub fn fault(error: &rustls::Error) -> String {
    use rustls::CertificateError::{
        Expired, ExpiredContext, NotValidForName, NotValidForNameContext, NotValidYet, NotValidYetContext,
        UnknownIssuer,
    };
    match error {
        rustls::Error::InvalidCertificate(fault) => match fault {
            Expired | ExpiredContext { .. } => "its certificate has expired".to_owned(),
            NotValidYet | NotValidYetContext { .. } => {
                "its certificate is not valid yet: is the clock right?".to_owned()
            }
            NotValidForName | NotValidForNameContext { .. } => "its certificate is for another name".to_owned(),
            UnknownIssuer => "its certificate is of an authority that is not among those in ca".to_owned(),
            fault => format!("its certificate is no good: {fault}"),
        },
        rustls::Error::AlertReceived(alert) => format!("it does not accept this host or its certificate: {alert:?}"),
        error => error.to_string(),
    }
}
