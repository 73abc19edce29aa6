//! Who this host is to OpenStack: Keystone's tokens (Identity API v3), and where its catalogue says that Barbican is.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde::Deserialize;
use ureq::http::Method;
use x509_cert::der::DateTime;
use zeroize::Zeroizing;

use super::BarbicanConfig;
use super::answer::{Answered, NoAnswer};
use super::credential::Credential;
use super::http::{Http, Question};
use crate::keys::secret_file::{self, Trust};

/// The longest secret or password that is read, in bytes.
const LONGEST_SECRET: usize = 4096;
/// A token is not used for so long before its end: what is asked with it still has to be answered.
const MARGIN: Duration = Duration::from_secs(60);

/// A token, and what came with it.
pub struct Token {
    /// What is shown to Barbican.
    pub value: Zeroizing<String>,
    /// Until when it is used.
    pub until: Instant,
    /// The id of the user that it is for.
    pub user: String,
    /// Where Barbican is, with the version, without a slash at the end.
    pub barbican: String,
}

#[derive(Deserialize)]
struct Issued {
    token: Body,
}

#[derive(Deserialize)]
struct Body {
    expires_at: String,
    issued_at: String,
    user: User,
    #[serde(default)]
    catalog: Vec<Service>,
}

#[derive(Deserialize)]
struct User {
    id: String,
}

#[derive(Deserialize)]
struct Service {
    #[serde(rename = "type")]
    kind: String,
    #[serde(default)]
    endpoints: Vec<Endpoint>,
}

#[derive(Deserialize)]
struct Endpoint {
    interface: String,
    #[serde(default)]
    region_id: Option<String>,
    url: String,
}

/// Has Keystone give this host a token, until `deadline`.
///
/// # Errors
/// [`NoAnswer`].
pub fn authenticate(http: &Http, config: &BarbicanConfig, deadline: Instant) -> Result<Token, NoAnswer> {
    let purpose = "what this host shows to Keystone";
    let path: &PathBuf = &config.secret;
    let secret = secret_file::read(path, purpose, Trust::Mode, LONGEST_SECRET)
        .map_err(|refusal| NoAnswer::Local(refusal.to_string()))?
        .ok_or_else(|| NoAnswer::Local(format!("{} ({purpose}) is not there", path.display())))?;
    let secret = std::str::from_utf8(secret.bytes().trim_ascii())
        .map_err(|_| NoAnswer::Local(format!("{} ({purpose}) is no text", path.display())))?;
    let url = format!("{}/auth/tokens", versioned(&config.auth_url, "v3"));
    let body = config.credential.request(secret);
    let question = Question {
        method: Method::POST,
        url: &url,
        token: None,
        body: Some(&body),
        accept: "application/json",
        version: None,
        secret: true,
    };
    let asked = Instant::now();
    let answer = http.ask(&question, deadline).map_err(|no_answer| match no_answer {
        NoAnswer::Refused(answered) if matches!(answered.status, 401 | 403) => NoAnswer::NoToken(answered),
        NoAnswer::Refused(answered) if answered.status == 404 && names_credential(config, &answered) => {
            NoAnswer::NoToken(answered)
        }
        NoAnswer::Refused(answered) if answered.status == 404 => NoAnswer::Malformed(format!(
            "{}: {answered}; Keystone may not be up, or auth_url be another's",
            config.auth_url
        )),
        NoAnswer::Refused(answered) if matches!(answered.status, 502 | 504) => {
            NoAnswer::Unreachable(format!("{}: {answered}", config.auth_url))
        }
        NoAnswer::Refused(answered) => NoAnswer::Malformed(format!("{}: {answered}", config.auth_url)),
        no_answer => no_answer,
    })?;
    let malformed = |what: &str| NoAnswer::Malformed(format!("{}: its answer has {what}", config.auth_url));
    let value = answer.header("x-subject-token").ok_or_else(|| malformed("no token"))?;
    let value = Zeroizing::new(value.to_owned());
    let Issued { token } = answer.json()?;
    // The difference only: the clocks need not agree.
    let [issued, expires] = [&token.issued_at, &token.expires_at].map(|time| seconds(time));
    let (Some(issued), Some(expires)) = (issued, expires) else { return Err(malformed("a time that is none")) };
    let lifetime = Duration::from_secs(expires.saturating_sub(issued)).saturating_sub(MARGIN);
    let barbican = endpoint(config, &token.catalog)?;
    Ok(Token { value, until: asked + lifetime.min(Duration::from_secs(24 * 3600)), user: token.user.id, barbican })
}

/// Whether Keystone says that there is no such application credential, or none any more. It names the credential then;
/// whoever else says 404, such as a proxy while Keystone is not up yet, knows nothing of it.
fn names_credential(config: &BarbicanConfig, answered: &Answered) -> bool {
    matches!(&config.credential, Credential::Application(id) if answered.message.contains(id.as_str()))
}

/// Where Barbican is.
fn endpoint(config: &BarbicanConfig, catalog: &[Service]) -> Result<String, NoAnswer> {
    let in_region = |endpoint: &&Endpoint| {
        endpoint.interface == config.interface
            && config.region.as_ref().is_none_or(|region| endpoint.region_id.as_ref() == Some(region))
    };
    let endpoints = || {
        let services = catalog.iter().filter(|service| service.kind == "key-manager");
        services.flat_map(|service| &service.endpoints).filter(in_region)
    };
    let place = config.region.as_ref().map(|region| format!(" in the region {region:?}")).unwrap_or_default();
    match (endpoints().next(), endpoints().nth(1)) {
        (Some(endpoint), None) => Ok(versioned(&endpoint.url, "v1")),
        (None, _) => Err(NoAnswer::Local(format!(
            "Keystone's catalogue has no key manager with the interface {:?}{place}: correct interface and region in the \
             section [barbican], or have the catalogue corrected",
            config.interface
        ))),
        (Some(_), Some(_)) => Err(NoAnswer::Local(format!(
            "Keystone's catalogue has several key managers with the interface {:?}{place}: name one by region in the \
             section [barbican]",
            config.interface
        ))),
    }
}

/// `url` with the version of the interface that is spoken, which it may have already.
fn versioned(url: &str, version: &str) -> String {
    let url = url.trim_end_matches('/');
    match url.rsplit_once('/') {
        Some((_, last)) if last == version => url.to_owned(),
        _ => format!("{url}/{version}"),
    }
}

/// Seconds since 1970 of a time as OpenStack writes it: `2026-11-24T15:52:57.838519`, with or without `Z` at the end.
pub fn seconds(time: &str) -> Option<u64> {
    let whole = time.get(..19)?;
    let time: DateTime = format!("{whole}Z").parse().ok()?;
    Some(time.unix_duration().as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_version_is_added_once() {
        for url in ["https://k:5000", "https://k:5000/", "https://k:5000/v3", "https://k:5000/v3/"] {
            assert_eq!(versioned(url, "v3"), "https://k:5000/v3");
        }
        assert_eq!(versioned("https://b/key-manager", "v1"), "https://b/key-manager/v1");
    }

    #[test]
    fn times_are_as_openstack_writes_them() {
        for time in ["2026-11-24T15:52:57.838519", "2026-11-24T15:52:57.000000Z", "2026-11-24T15:52:57Z"] {
            assert_eq!(seconds(time), Some(1_795_535_577));
        }
        for time in ["", "2026-11-24", "2026-13-24T15:52:57Z", "2026-11-24T15:52:5é"] {
            assert_eq!(seconds(time), None);
        }
    }
}
