//! One question over HTTP: until a deadline, to one host, with an answer of limited length.

use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use ureq::Agent;
use ureq::http::{Method, Request, Uri};
use ureq::tls::{Certificate, RootCerts, TlsConfig, TlsProvider};
use ureq::unversioned::resolver::DefaultResolver;
use ureq::unversioned::transport::{Connector, DefaultConnector};

use super::answer::{Answer, NoAnswer, refused, trouble};
use super::wiped::Wiping;
use crate::keys::tls::{self, FileIdentity};

/// How long a server that has too much to do is left alone, if it does not say.
const PAUSE: Duration = Duration::from_secs(1);
/// How long at least.
const SHORTEST_PAUSE: Duration = Duration::from_millis(100);

/// A question.
pub struct Question<'a> {
    /// GET, POST, PUT or DELETE.
    pub method: Method,
    /// Where it goes, with the query.
    pub url: &'a str,
    /// What shows who asks.
    pub token: Option<&'a str>,
    /// The JSON that goes with it.
    pub body: Option<&'a [u8]>,
    /// The kind of answer that is asked for.
    pub accept: &'a str,
    /// The version of Barbican's interface.
    pub version: Option<&'a str>,
    /// Whether a key is in it or in its answer: the connection's memory is wiped afterwards.
    pub secret: bool,
}

/// Asks servers.
pub struct Http {
    ca: Option<PathBuf>,
    /// With the file of authorities that it was made with.
    agent: Mutex<Option<(FileIdentity, Agent)>>,
}

impl Http {
    /// One that believes the authorities in the file `ca`.
    pub fn new(ca: Option<PathBuf>) -> Self {
        Http { ca, agent: Mutex::default() }
    }

    /// Has a server answer `question` until `deadline`. One that asks to be left alone for a while is asked again, if
    /// that is before the deadline.
    ///
    /// # Errors
    /// [`NoAnswer`].
    pub fn ask(&self, question: &Question<'_>, deadline: Instant) -> Result<Answer, NoAnswer> {
        let host = check_url(question.url).map_err(NoAnswer::Local)?;
        loop {
            let (status, mut answer) = self.ask_once(question, deadline, &host)?;
            if (200..300).contains(&status) {
                return Ok(answer);
            }
            let pause = answer.header("retry-after").and_then(|seconds| seconds.parse().ok()).map(Duration::from_secs);
            let refused = refused(status, &mut answer);
            if !matches!(status, 429 | 503) {
                return Err(NoAnswer::Refused(refused));
            }
            let pause = pause.unwrap_or(PAUSE).max(SHORTEST_PAUSE);
            if pause >= deadline.saturating_duration_since(Instant::now()) {
                let sentence = format!("{host}: it has too much to do ({refused})");
                return Err(NoAnswer::Unreachable(sentence));
            }
            std::thread::sleep(pause);
        }
    }

    fn ask_once(&self, question: &Question<'_>, deadline: Instant, host: &str) -> Result<(u16, Answer), NoAnswer> {
        let agent = self.agent(question.url)?;
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(NoAnswer::Unreachable(format!("{host}: it did not answer in time")));
        }
        let mut request =
            Request::builder().method(&question.method).uri(question.url).header("accept", question.accept);
        for (name, value) in [("x-auth-token", question.token), ("openstack-api-version", question.version)] {
            if let Some(value) = value {
                request = request.header(name, value);
            }
        }
        if question.secret {
            request = request.header("connection", "close");
        }
        let in_time = |request| agent.configure_request(request).timeout_global(Some(left)).build();
        let unusable = |error| NoAnswer::Local(format!("{host} cannot be asked: {error}"));
        let outcome = match question.body {
            Some(body) => {
                let request = request.header("content-type", "application/json").body(body).map_err(unusable)?;
                agent.run(agent.configure_request(request).timeout_global(Some(left)).build())
            }
            None => agent.run(in_time(request.body(()).map_err(unusable)?)),
        };
        let (parts, body) = outcome.map_err(|error| trouble(error, host))?.into_parts();
        Ok((parts.status.as_u16(), Answer::new(parts.headers, body, host)))
    }

    /// What connections are made with: anew when the file of authorities was replaced.
    fn agent(&self, url: &str) -> Result<Agent, NoAnswer> {
        let identity = self.ca.as_deref().and_then(tls::file_identity);
        let mut agent = self.agent.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((made_with, agent)) = &*agent
            && *made_with == identity
        {
            return Ok(agent.clone());
        }
        let authorities = match &self.ca {
            Some(ca) => tls::certificates(ca).map_err(NoAnswer::Local)?,
            None if url.starts_with("https:") => {
                return Err(NoAnswer::Local(format!("{url} needs ca = \"/path\" in the section [barbican]; add it")));
            }
            None => Vec::new(),
        };
        let authorities: Vec<_> = authorities.iter().map(|der| Certificate::from_der(der).to_owned()).collect();
        let tls_config = TlsConfig::builder()
            .provider(TlsProvider::Rustls)
            .unversioned_rustls_crypto_provider(Arc::new(rustls::crypto::aws_lc_rs::default_provider()))
            .root_certs(RootCerts::new_with_certs(&authorities))
            .build();
        let config = Agent::config_builder()
            .tls_config(tls_config)
            .proxy(None)
            .http_status_as_error(false)
            .max_redirects(0)
            .user_agent(concat!("volcrypt/", env!("CARGO_PKG_VERSION")))
            .input_buffer_size(32 << 10)
            .output_buffer_size(16 << 10)
            .build();
        let new = Agent::with_parts(config, DefaultConnector::default().chain(Wiping), DefaultResolver::default());
        *agent = Some((identity, new.clone()));
        Ok(new)
    }
}

/// Whether `url` may be asked: by https, or by http on this machine. Returns the host and port in it.
///
/// # Errors
/// One sentence.
pub fn check_url(url: &str) -> Result<String, String> {
    let parsed: Option<Uri> = url.parse().ok();
    let authority = parsed.as_ref().and_then(Uri::authority);
    let (Some(parsed), Some(authority)) = (&parsed, authority) else {
        return Err(format!("{url:?} is no URL; write \"https://HOST:PORT/…\""));
    };
    if authority.as_str().contains('@') {
        return Err(format!("{:?} has a user in it; leave that out", authority.host()));
    }
    let host = authority.host();
    let address = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host).parse::<IpAddr>();
    let is_here = host == "localhost" || address.is_ok_and(|address| address.is_loopback());
    match parsed.scheme_str() {
        Some("https") => Ok(authority.to_string()),
        Some("http") if is_here => Ok(authority.to_string()),
        Some("http") => Err(format!("{url:?} would send keys in clear over the network; use https")),
        _ => Err(format!("{url:?} is no URL; write \"https://HOST:PORT/…\"")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_go_over_tls_or_stay_on_this_machine() {
        for url in [
            "https://barbican.example:9311/v1",
            "https://[2001:db8::1]/key-manager",
            "http://127.0.0.1:5000/v3",
            "http://[::1]:5000/v3",
            "http://localhost:5000",
        ] {
            assert!(check_url(url).is_ok(), "{url}");
        }
        for (url, what) in [
            ("http://barbican.example:9311", "in clear"),
            ("http://127.0.0.1.example", "in clear"),
            ("http://10.0.0.1", "in clear"),
            ("https://user@barbican.example", "has a user"),
            ("ftp://barbican.example", "no URL"),
            ("barbican.example:9311", "no URL"),
            ("/v3", "no URL"),
            ("", "no URL"),
        ] {
            let sentence = check_url(url).unwrap_err();
            assert!(sentence.contains(what), "{url}: {sentence}");
        }
    }
}
